"""`zppo eval table`: the paper's tables over results of `zppo eval`; and evaluations in `zppo compare`."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from report_runs import invented_run
from zppo import cli
from zppo.config.recipe import dump_yaml
from zppo.errors import SettingsError, ZPPOError
from zppo.evals.options import EvalOptions, settings_of
from zppo.evals.registry import BENCHMARKS, find
from zppo.evals.results import EvalFolder, SampleResult, begin, summary, with_benchmark
from zppo.report.bootstrap import cluster_bootstrap, read_table
from zppo.report.compare import compare_runs
from zppo.report.evaluations.paper_data import paper_averages, paper_teacher_gains
from zppo.report.evaluations.paper_tables import paper_rows_of, rows_of, tables_of_rows
from zppo.report.evaluations.table_views import table_command
from zppo.report.tables import Heading, Strong, Table

PAPER = Path(__file__).parents[1] / "src/zppo/report/data"
METHODS = {"GRPO": "grpo", "GRPO†": "grpo-replay", "Off-Distill†": "off-distill-replay", "On-Distill†": "on-distill-replay", "ZPPO": "zppo"}


def result(folder: Path, accuracies: Mapping[str, float], recipe: Mapping[str, Any] | None = None, label: str = "") -> Path:
    """A run's folder with its recipe and the eval.json that `zppo eval` leaves there; or a result of a model that is no run's."""
    folder.mkdir(parents=True, exist_ok=True)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    place, label = EvalFolder(folder), label or str(folder / "final")
    state = begin(place, label, label, settings_of(EvalOptions("m", "paper"), label, "j", "frames"))
    for name, value in accuracies.items():
        benchmark = find(name)
        part = summary(benchmark, [SampleResult("1", 1, "rule", 1.0)], 1)
        part |= {name: value / 100 for name in ("value", "by_box") if name in part}  # one row without facts comes to no figure of some
        part |= {"limit": None, "samples": 1, "origin": "here", "revision": ""}
        state = with_benchmark(state, part, [each.name for each in BENCHMARKS])
    place.write(state)
    return folder


def run(folder: Path, method: str, size: str, accuracies: Mapping[str, float], seed: int = 0, **more: Any) -> Path:
    recipe = {"method": {"name": method}, "seed": seed, "output": str(folder), "student": {"model": f"Qwen/Qwen3.5-{size}"}, **more}
    return result(folder, accuracies, recipe)


def paper_figures(size: str, method: str) -> dict[str, float]:
    table = read_table(PAPER / "paper_accuracy.csv")
    return {n: v for (s, _), methods in table.items() if s == size for n, v in methods.get(method, {}).items()}


def paper_runs(base: Path, sizes: tuple[str, ...] = ("0.8B", "2B"), noise: float = 0.0) -> list[Path]:
    """Runs whose evaluations came to the paper's figures, ZPPO under three seeds; and the students that they started from."""
    draw = random.Random(0)
    folders = []
    for size in sizes:
        base_model = result(base / f"base-{size}", paper_figures(size, "Base"), label=f"Qwen/Qwen3.5-{size}")
        folders.append(base_model)
        for name, method in METHODS.items():
            for seed in (0, 1, 2) if name == "ZPPO" else (0,):
                figures = {n: abs(v + draw.gauss(0, noise) * (name == "ZPPO")) for n, v in paper_figures(size, name).items()}
                folders.append(run(base / f"{method}-{size}-{seed}", method, size, figures, seed))
    return folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return list(map(str, paper_runs(tmp_path_factory.mktemp("runs"), noise=1.0)))


def line(table: Table, first: str, heading: str = "") -> dict[str, str]:
    """A row by its first text, below a heading, by column."""
    at = next((i for i, row in enumerate(table.rows) if row[0] == heading), 0)
    row = next(row for row in table.rows[at:] if row[0] == first)
    return dict(zip(table.columns, row, strict=True))


# The tables


def tables(runs: list[str], **options: Any) -> dict[str, Table]:
    rows, _ = rows_of(runs)
    return {table.id: table for table in tables_of_rows(rows, resamples=200, **options)[0]}


def test_methods_by_benchmarks_with_seeds_means_and_differences(runs: list[str]) -> None:
    made = tables(runs)
    assert list(made) == ["benchmarks-means", "benchmarks-vlm", "benchmarks-llm", "benchmarks-video", "benchmarks-intervals"]
    vlm = made["benchmarks-vlm"]
    assert vlm.columns == ("", *(b.name for b in BENCHMARKS if b.family == "vlm"), "mean")
    assert [row[0] for row in vlm.rows] == [
        name
        for size in ("0.8B", "2B")
        for name in (size, "Base", "GRPO", "GRPO†", "Off-Distill†", "On-Distill†", "ZPPO (3 seeds)", "ZPPO − best other")
    ]
    figures = [paper_of(folder) for folder in runs if "zppo-2B" in folder]
    ours = line(vlm, "ZPPO (3 seeds)", "2B")
    means = [fmean(run[b.name] for b in BENCHMARKS if b.family == "vlm") for run in figures]
    assert ours["mean"] == f"{fmean(means):.1f} ±{stdev(means):.1f}" and isinstance(ours["mean"], Strong)
    values = [run["VisP"] for run in figures]
    assert ours["VisP"] == f"{fmean(values):.1f} ±{stdev(values):.1f}"
    best = max(paper_figures("2B", name)["VisP"] for name in ("Base", *METHODS) if name != "ZPPO")
    assert line(vlm, "ZPPO − best other", "2B")["VisP"] == f"{fmean(values) - best:+.1f}"
    assert line(vlm, "GRPO", "2B")["VisP"] == f"{paper_figures('2B', 'GRPO')['VisP']:.1f}"
    assert line(made["benchmarks-means"], "ZPPO (3 seeds)", "2B")["vlm, 16"] == ours["mean"]


def paper_of(folder: str) -> dict[str, float]:
    state = EvalFolder(Path(folder)).read() or {}
    return {each["name"]: 100 * each["value"] for each in state["benchmarks"]}


def test_intervals_are_the_cluster_bootstraps_and_the_best_other_has_a_column(tmp_path: Path) -> None:
    """Over the paper's own figures: its Table in App. F.6, which is rounded from more decimals."""
    folders = [str(run(tmp_path / m, m, "2B", paper_figures("2B", name))) for name, m in METHODS.items()]
    rows, _ = rows_of(folders)
    made = {table.id: table for table in tables_of_rows(rows)[0]}["benchmarks-intervals"]
    assert made.columns == ("", "− best other", "− GRPO", "− GRPO†", "− Off-Distill†", "− On-Distill†")
    families = {name: b.family for b in BENCHMARKS for name in [b.name]}
    for family, wins in (("vlm", "16/16"), ("llm", "9/10"), ("video", "5/5")):
        ours, other = ({n: v for n, v in paper_figures("2B", m).items() if families[n] == family} for m in ("ZPPO", "GRPO†"))
        each = cluster_bootstrap(ours, other)
        text = f"{each.delta:+.2f} [{each.low:+.2f}, {each.high:+.2f}] {wins}"
        row = line(made, f"2B {family}")
        assert row["− GRPO†"] == text and row["− best other"] == f"{text} GRPO†"
    published = next(r for r in (PAPER / "paper_bootstrap.csv").read_text().splitlines() if r.startswith("2B,vlm,ZPPO,GRPO†"))
    delta, low, high = map(float, published.split(",")[4:7])
    shown = line(made, "2B vlm")["− GRPO†"].replace("[", "").replace("]", "").replace(",", "").split()
    assert [float(x) for x in shown[:3]] == pytest.approx([delta, low, high], abs=0.1)


def test_the_papers_figures_stand_below_ours_where_it_has_some(tmp_path: Path) -> None:
    figures = {name: value for name, value in paper_figures("2B", "ZPPO").items() if name in ("AI2D", "VisP", "MMLU")}
    ours, _ = rows_of([str(run(tmp_path / "a", "zppo", "2B", figures)), str(run(tmp_path / "b", "zppo", "1.7B", figures))])
    theirs, notes = paper_rows_of(ours)
    assert notes == ["the paper has no student of size 1.7B: it has 0.8B, 2B, 4B, 9B, 27B"]
    assert {row.size for row in theirs} == {"2B"} and all(row.paper for row in theirs)
    vlm = tables_of_rows([*ours, *theirs])[0][1]
    assert [row[0] for row in vlm.rows if isinstance(row[0], Heading)] == ["1.7B", "2B", "2B · the paper's figures, arXiv 2606.18216"]
    assert vlm.columns == ("", "AI2D", "VisP", "mean")
    assert line(vlm, "ZPPO", "2B · the paper's figures, arXiv 2606.18216")["AI2D"] == line(vlm, "ZPPO", "2B")["AI2D"]
    assert line(vlm, "GRPO†+BCQ", "2B · the paper's figures, arXiv 2606.18216")["VisP"] == "41.1"


def test_means_are_over_what_all_have_and_it_is_said(tmp_path: Path) -> None:
    run(tmp_path / "a", "zppo", "2B", {"AI2D": 50, "VisP": 70, "MMLU": 10})
    run(tmp_path / "b", "grpo", "2B", {"AI2D": 40})
    rows, _ = rows_of([str(tmp_path / name) for name in "ab"])
    made, notes = tables_of_rows(rows)
    vlm = next(table for table in made if table.id == "benchmarks-vlm")
    assert line(vlm, "ZPPO", "2B") == {"": "ZPPO", "AI2D": "50.0", "VisP": "70.0", "mean": "50.0"}
    assert line(vlm, "GRPO", "2B")["VisP"] == "–" and line(vlm, "ZPPO − best other", "2B")["mean"] == "+10.0"
    assert "2B vlm: the mean is over 1 of 2, not all have VisP" in notes
    assert line(made[-1], "2B vlm")["− GRPO"] == "+10.00 1/1"  # one benchmark has no interval
    llm = next(table for table in made if table.id == "benchmarks-llm")
    assert [row[0] for row in llm.rows] == ["2B", "ZPPO"]  # GRPO has none of them


# Names


def test_rows_are_named_by_recipe_label_and_what_differs(tmp_path: Path) -> None:
    figures = {"AI2D": 50.0}
    folders = [
        str(run(tmp_path / "a", "zppo", "2B", figures, zone={"rho_aug": 0.5})),
        str(run(tmp_path / "b", "zppo", "2B", figures, zone={"rho_aug": 1.0})),
        str(run(tmp_path / "c", "zppo", "2B", figures, seed=1, zone={"rho_aug": 1.0})),
        str(run(tmp_path / "d", "zppo-placebo", "2B", figures)),
        str(result(tmp_path / "e", figures, label="Qwen3.5-2B")),
        f"Tuned={result(tmp_path / 'f', figures, label='x')}",
        f"Tuned={result(tmp_path / 'g', figures, label='y')}",
        f"9B:Tuned={result(tmp_path / 'h' / 'i=j', figures, label='z')}/eval.json",
    ]
    rows, _ = rows_of(folders)
    assert [(row.size, row.title) for row in rows] == [
        ("2B", "ZPPO zone.rho_aug=0.5"), ("2B", "ZPPO zone.rho_aug=1.0 (2 seeds)"), ("2B", "zppo-placebo"), ("2B", "Base"), ("9B", "Tuned"),
        ("", "Tuned (2 seeds)"),
    ]  # fmt: skip
    same = [str(run(tmp_path / name, "grpo", "2B", figures)) for name in ("k", "l")]
    assert [row.title for row in rows_of(same)[0]] == ["GRPO (k)", "GRPO (l)"]
    alike = [str(result(tmp_path / name, figures, label="m-2B")) for name in ("n", "o")]
    assert [row.title for row in rows_of(alike)[0]] == ["m-2B (n)", "m-2B (o)"]


def test_the_result_of_a_runs_final_folder_is_that_runs(tmp_path: Path) -> None:
    run(tmp_path / "run", "grpo", "4B", {"AI2D": 1.0})
    elsewhere = result(tmp_path / "elsewhere", {"AI2D": 50.0}, label=str(tmp_path / "run" / "final"))
    (row,) = rows_of([str(elsewhere)])[0]
    assert (row.size, row.name) == ("4B", "GRPO")


def test_mistakes_are_said(runs: list[str], tmp_path: Path) -> None:
    for names, options, said in (
        ([], {}, "was given none"),
        ([runs[0], runs[0]], {}, "different results"),
        ([str(tmp_path)], {}, "cannot be read"),
        (runs[:2], {"minuend": "PPO"}, "no row is 'PPO'; there are Base, GRPO"),
        (runs[:2], {"out": tmp_path / "file" / "x"}, "cannot be written"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(ZPPOError, match=said):
            table_command(names, **options)
    with pytest.raises(SettingsError, match="no row is 'x'"):
        tables(runs, minuend="x")


# What people see


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_table_fits_the_terminal_and_figures_stand_below_figures(runs: list[str], width: int) -> None:
    console = Console(record=True, width=width, force_terminal=False)
    table_command(runs, paper=True, resamples=50, console=console)
    lines = console.export_text().splitlines()
    assert max(cell_len(text.rstrip()) for text in lines) <= width and not any("…" in text for text in lines)
    shown = " ".join(lines)
    assert all(benchmark.name in shown for benchmark in BENCHMARKS)
    start = next(i for i, text in enumerate(lines) if text.startswith("Vision"))
    block = lines[start + 3 : start + 10]  # of 0.8B
    points = [[i for i, c in enumerate(text[18:]) if c == "." and text[18:][i - 1].isdigit() and "±" not in text[18:][max(0, i - 3) : i]]
              for text in block]  # fmt: skip
    assert len(points[0]) >= 3 and all(p == points[0] for p in points)


def test_names_from_files_do_not_speak_to_the_terminal(tmp_path: Path) -> None:
    folder = result(tmp_path / "a", {"AI2D": 50.0}, label="\x1b]0;owned\x07[bold]m[/bold]")
    console = Console(record=True, width=100)
    table_command([str(folder)], console=console)
    text = console.export_text()
    assert "[bold]m[/bold]" in text and not {"\x1b", "\x07"} & set(text)


def test_markdown_csv_and_the_page(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "table", *runs, "--markdown", "--resamples", "50"]) == 0
    text = capsys.readouterr().out
    assert "| **0.8B** |" in text and "### Video benchmarks" in text
    lines = [row for row in text.splitlines() if row.startswith("|")]
    assert all(row.count("|") in {s.count("|") for s in lines if s.startswith("|---")} for row in lines)
    assert cli.main(["eval", "table", *runs, "--csv", "--paper"]) == 0
    (tmp_path / "table.csv").write_text(capsys.readouterr().out)
    table = read_table(tmp_path / "table.csv")  # `zppo bootstrap` takes it
    assert set(table["2B", "vlm"]) >= {"Base", "GRPO†", "ZPPO", "ZPPO (paper)"}
    values = [paper_of(folder)["MMLU"] for folder in runs if "zppo-2B" in folder]
    assert table["2B", "llm"]["ZPPO"]["MMLU"] == pytest.approx(fmean(values), abs=0.006)
    record = next(
        r for r in csv.DictReader((tmp_path / "table.csv").open()) if (r["scale"], r["method"], r["benchmark"]) == ("2B", "ZPPO", "MMLU")
    )
    assert (record["seeds"], record["spread"]) == ("3", f"{stdev(values):.2f}")
    named = [f"<b>|x={runs[1]}", *runs]
    page = tmp_path / "sub" / "page.html"
    assert cli.main(["eval", "table", *[n for n in named if n != runs[1]], "--html", "--output", str(page), "--resamples", "50"]) == 0
    assert f"written to {page}" in capsys.readouterr().out
    html = page.read_text()
    assert "&lt;b&gt;|x" in html and "<b>" not in html and "<script" not in html and "default-src 'none'" in html


@pytest.mark.slow
def test_the_page_in_a_browser(runs: list[str], tmp_path: Path) -> None:
    from chromium import Browser

    table_command(runs, form="html", paper=True, resamples=50, out=tmp_path / "page.html", console=Console(quiet=True))
    with Browser() as browser:
        for width in (400, 1500):
            browser.size(width, 900)
            browser.open(f"file://{tmp_path / 'page.html'}")
            assert browser.eval("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
            assert browser.eval("document.querySelectorAll('table').length") == 5
            assert browser.eval("document.querySelectorAll('strong').length") > 50
        assert not browser.errors and all(url.startswith(("file:", "data:")) for url in browser.requests)


# `zppo compare`


@pytest.mark.slow
def test_compare_shows_the_evaluations_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = [("zppo", 0, 50.0), ("zppo", 1, 60.0), ("grpo", 0, 40.0), ("grpo", 1, 45.0)]
    folders = [invented_run(tmp_path / f"{method}-{seed}", steps=2, method=method, seed=seed) for method, seed, _ in shapes]
    assert not any(table.section == "Benchmarks" for table in compare_runs(folders).tables)
    for folder, (_, seed, value) in zip(folders, shapes, strict=True):
        result(folder, {"AI2D": value, "MMLU": value - 10, **({"VisP": 9.0} if seed == 0 else {})})
    made = {table.id: table for table in compare_runs(folders).tables}
    assert line(made["benchmarks-llm"], "zppo (2 seeds)") == {"": "zppo (2 seeds)", "MMLU": "45.0 ±7.1", "mean": "45.0 ±7.1"}
    assert line(made["benchmarks-llm"], "zppo − best other")["MMLU"] == "+12.5"
    assert line(made["benchmarks-intervals"], "llm")["− grpo"] == "+12.50 1/1"
    paired = {row[0]: row[1:] for row in made["paired"].rows}
    assert paired["zppo minus grpo: benchmarks, mean of 1 llm"][0] == "+12.5"
    assert cli.main(["compare", *map(str, folders), "--html", "--out", str(tmp_path / "c.html"), "--figures", "none"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Language benchmarks" in printed and "zppo (2 seeds) 45.0 ±7.1" in printed
    assert '"benchmarks-vlm"' in (tmp_path / "c.html").read_text()


def test_the_papers_means_of_hint_and_prefix_fit_its_figures_by_benchmark(tmp_path: Path) -> None:
    """Tab. 4 is of the same runs as Tabs. 1 to 3; and Fig. 7's gains with the 27B teacher are those of Tab. 4."""
    averages, table = paper_averages(), read_table(PAPER / "paper_accuracy.csv")
    assert list(averages) == [(s, m) for s in ("0.8B", "2B") for m in ("Base", "GRPO\u2020", "Hint", "Prefix", "GRPO\u2020+BCQ", "ZPPO")]
    for (size, method), means in averages.items():
        assert list(means) == ["llm", "vlm", "video"]
        for family, mean in means.items() if method not in ("Hint", "Prefix") else ():
            figures = table[size, family][method].values()
            assert mean == pytest.approx(sum(figures) / len(figures), abs=0.11), (size, method, family)
    gains = paper_teacher_gains()
    for size, by_teacher in gains.items():
        both = averages[size, "ZPPO"], averages[size, "Base"]
        assert by_teacher["27B"] == pytest.approx(sum(both[0][f] - both[1][f] for f in both[0]) / 3, abs=0.05)
        assert list(by_teacher.values()) == sorted(by_teacher.values()) and list(by_teacher) == ["4B", "9B", "27B"]

    runs = [
        run(tmp_path / "hint", "hint", "0.8B", paper_figures("0.8B", "ZPPO")),
        run(tmp_path / "zppo", "zppo", "0.8B", paper_figures("0.8B", "ZPPO")),
    ]
    _, notes = paper_rows_of(rows_of([str(folder) for folder in runs])[0])
    assert notes == [
        "of Hint at 0.8B the paper has means alone (Tab. 4): "
        "language benchmarks 28.8, vision-language benchmarks 47.2, video benchmarks 50.0"
    ]
