"""`zppo report`, `zppo compare` and `zppo inspect` through the command line, on invented runs and on one that really trained."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from rich.console import Console

from conftest import make_tiny
from report_runs import change_rows, evaluated, files_of, invented_run, rows_of
from zppo.cli import main
from zppo.config.help import known_keys
from zppo.report.compare import arms_of, compare_runs, comparison_charts
from zppo.report.evaluations.table_views import print_fitting
from zppo.report.page import write_figures
from zppo.report.read_run import NOT_ARMS, open_run
from zppo.report.summary import Reader, Summary
from zppo.report.tables import Table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented_run(tmp_path_factory.mktemp("runs") / "run", steps=4)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | int | Path, status: int = 0) -> str:
    """What a command printed, white space collapsed."""
    assert main(list(map(str, arguments))) == status
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split())


@pytest.mark.long
def test_report_writes_a_page_and_all_its_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "report", folder, "--out", tmp_path / "a", "--figures", "both")
    assert "report.html" in text and "Held-out accuracy" in text
    charts = {chart.id for chart in Reader(folder).read().charts}
    written = sorted((tmp_path / "a" / "figures").iterdir())
    assert {p.name for p in written} == {f"{name}.{suffix}" for name in charts for suffix in ("png", "svg")}
    page = (tmp_path / "a" / "report.html").read_text()
    assert all(f'"id":"{name}"' in page for name in charts)


def test_figures_are_files_that_open_and_the_same_run_gives_the_same(folder: Path, tmp_path: Path) -> None:
    some = [chart for chart in Reader(folder).read().charts if chart.id in ("accuracy", "fate")]
    written = write_figures(some, tmp_path / "a", ["png", "svg"])
    assert {path.name for path in written} == {f"{chart.id}.{suffix}" for chart in some for suffix in ("png", "svg")}
    for path, again in zip(written, write_figures(some, tmp_path / "b", ["png", "svg"]), strict=True):
        if path.suffix == ".png":
            assert min(Image.open(path).size) > 300
        else:
            assert "<svg" in path.read_text()[:1000] and path.read_bytes() == again.read_bytes()


def test_report_leaves_the_run_as_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    run(capsys, "report", folder, "--figures", "none")
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert set(after) - set(before) == {folder / "report.html"}
    assert all(after[p] == text for p, text in before.items())


def test_mistakes_are_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in run(capsys, "report", tmp_path, status=2)
    assert "is no folder" in run(capsys, "inspect", tmp_path / "none", "q", status=2)
    assert "at least two" in run(capsys, "compare", folder, status=2)
    assert "at least two" in run(capsys, "compare", folder, folder, status=2)
    (tmp_path / "file").write_text("")
    assert "--out" in run(capsys, "report", folder, "--out", tmp_path / "file", status=2)
    assert "--port" in run(capsys, "report", folder, "--watch", "--port", "99999", status=2)


def test_inspect_tells_a_whole_story(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(folder)
    wanted = next(row["question_id"] for row in rows if row["kind"] == "ncq")
    own = [row for row in rows if row["question_id"] == wanted]
    text = run(capsys, "inspect", folder, wanted, "--full")
    for row in own:
        assert " ".join(row["completion"].split()) in text and " ".join(row["prompt"].split()) in text
        assert f"answer {row['answer']}" in text if row["answer"] else "no answer" in text
    assert len(re.findall(r"\d (?:right|wrong): (?:no )?answer", text)) == len(own)
    only = run(capsys, "inspect", folder, wanted, "--kind", "ncq", "--step", own[0]["step"])
    assert "NCQ" in only and "plain," not in only and "listed as wrong" in only
    assert "No group fits" in run(capsys, "inspect", folder, wanted, "--step", 99)


def test_inspect_says_where_a_long_text_is_cut_and_how_it_is_seen_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = invented_run(tmp_path / "run", steps=1)
    id = rows_of(base)[0]["question_id"]
    assert "--full" not in run(capsys, "inspect", base, id)
    long = "Who " + "and who else " * 200 + "stands in the middle?" + " of it all" * 200
    change_rows(files_of(base)[0], lambda row: {**row, "question": long, "prompt": f"user {long} closing"})
    text = run(capsys, "inspect", base, id)
    assert "stands in the middle?" in text  # the question itself is whole
    assert "characters left out ...]" in text and "Texts of more than 1,200 characters lost their middle; --full shows them whole." in text
    assert "left out ...]" not in (whole := run(capsys, "inspect", base, id, "--full")) and whole.count("stands in the middle?") >= 2
    assert "lost their middle" not in whole


def test_inspect_names_similar_questions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "similar ones: invented.jsonl:" in run(capsys, "inspect", folder, "invented.jsonl:999999", status=2)
    assert "such as invented.jsonl:1" in run(capsys, "inspect", folder, "@", status=2)


def test_inspect_shows_control_characters_instead_of_obeying(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = invented_run(tmp_path / "run", steps=1)
    attack = "\x1b]0;owned\x07\x1b[2Jtext \u202e [bold red]markup[/]"
    change_rows(files_of(folder)[0], lambda row: {**row, "completion": attack, "answer": attack, "reason": attack})
    assert main(["inspect", str(folder), "invented.jsonl:1"]) == 0
    printed = capsys.readouterr().out
    assert not re.search(r"[\x07\x1b\u202e]", printed)
    assert r"\x1b[2Jtext" in printed and "[bold red]markup[/]" in printed


# Comparing


def runs_of(base: Path, *shapes: dict[str, Any]) -> list[Path]:
    return [invented_run(base / f"run-{i}", **{"steps": 3, **shape}) for i, shape in enumerate(shapes)]


def test_runs_that_differ_in_the_seed_alone_are_one_arm(tmp_path: Path) -> None:
    folders = runs_of(
        tmp_path, {"seed": 0}, {"seed": 1}, {"seed": 0, "method": "grpo"}, {"seed": 0, "capacity": 50}, {"seed": 1, "capacity": 50}
    )
    arms = arms_of([open_run(folder) for folder in folders])
    assert [(arm.name, list(arm.runs)) for arm in arms] == [
        ("zppo zone.buffer_capacity=24", [0, 1]), ("grpo", [0]), ("zppo zone.buffer_capacity=50", [0, 1]),
    ]  # fmt: skip


def test_what_changes_nothing_that_is_learned_makes_no_arm(tmp_path: Path) -> None:
    assert set(NOT_ARMS) <= set(known_keys())
    folders = runs_of(tmp_path, {"seed": 0}, {"seed": 1}, {"seed": 2})
    recipe = yaml.safe_load((folders[1] / "recipe.yaml").read_text())
    recipe["train"] |= {"checkpoint_every": 7, "trackers": ["tensorboard"], "tokens_per_microbatch": 100}
    recipe["eval"]["every"] = 3
    (folders[1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert [(arm.name, list(arm.runs)) for arm in arms_of([open_run(folder) for folder in folders])] == [("zppo", [0, 1, 2])]
    recipe["train"]["learning_rate"] = 0.5
    (folders[1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    names = [arm.name for arm in arms_of([open_run(folder) for folder in folders])]
    assert len(names) == 2 and names[1] == "zppo train.learning_rate=0.5"


def test_words_of_ones_own_make_an_arm_though_they_have_one_name_in_every_run(tmp_path: Path) -> None:
    folders = runs_of(tmp_path, {"seed": 0}, {"seed": 1}, {"seed": 1})
    for folder, words in zip(folders, ("Box it.", "Box it.", "Think."), strict=True):
        (folder / "words").mkdir()
        (folder / "words" / "prompts.closing.jinja").write_text(words)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["prompts"] = {"closing": "words/prompts.closing.jinja"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arms = arms_of([open_run(folder) for folder in folders])
    assert [list(arm.runs) for arm in arms] == [[0, 1], [1]]
    assert all(arm.name.startswith("zppo prompts.closing=sha256:") for arm in arms) and arms[0].name != arms[1].name


def test_a_recipe_of_an_older_version_is_no_arm_of_its_own(tmp_path: Path) -> None:
    folders = runs_of(tmp_path, {"seed": 0}, {"seed": 1})
    recipe = yaml.safe_load((folders[1] / "recipe.yaml").read_text())
    del recipe["zone"]["ties"]  # as if it had not been there yet
    (folders[1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert len(arms_of([open_run(folder) for folder in folders])) == 1


def test_numbers_of_a_comparison_as_csv_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = runs_of(tmp_path, {"seed": 0}, {"seed": 0, "method": "grpo"}, {"seed": 1, "method": "grpo"})
    assert main(["compare", *map(str, folders), "--csv", "-"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    accuracy = {row["run"]: float(row["value"]) for row in rows if row["quantity"] == "held-out accuracy"}
    assert accuracy == {folder.name: pytest.approx(held_out(folder)) for folder in folders}
    assert {(row["arm"], row["seed"]) for row in rows} == {("zppo", "0"), ("grpo", "0"), ("grpo", "1")}
    text = run(capsys, "compare", *folders, "--json", tmp_path / "c.json")
    assert "What the runs came to" in text
    told = json.loads((tmp_path / "c.json").read_text())
    assert [arm["name"] for arm in told["arms"]] == ["zppo", "grpo"] and told["arms"][0]["settings"] == {"method.name": "zppo"}
    pair = next(p for p in told["pairs"] if p["quantity"] == "held-out accuracy")
    assert pair["difference"] == pytest.approx(held_out(folders[0]) - held_out(folders[1])) and pair["low"] is None and pair["seeds"] == 1
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run(capsys, "compare", *folders, "--json", tmp_path / "file" / "c.json", status=2)


def of_other_questions(folder: Path, name: str) -> Path:
    """An evaluation beside the run, of questions that have the ids of other runs' and ask something else, in a long-named file."""
    evaluated(folder)
    change_rows(folder / "held_out" / "eval-000000.parquet", lambda row: {**row, "question": f"{row['question']} {name}"})
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["eval"] = f"/home/somebody/arithmetic/data/held-out-questions-{name}.csv"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_held_out_accuracies_of_other_questions_are_not_compared_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by what is printed, which fits its terminal, nor question by question."""
    first, second, third = runs_of(tmp_path, {"seed": 0}, {"seed": 1}, {"seed": 1})
    for folder in (first, second):
        of_other_questions(folder, "a")
    alike = compare_runs([first, second])
    assert alike.warnings == () and len(alike.arms) == 1
    of_other_questions(third, "b")
    comparison = compare_runs([first, second, third])
    (told,) = comparison.warnings
    assert "different held-out questions (run-0, run-1: 16; run-2: 16; none in common)" in told and not comparison.questions
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["compare", *map(str, (first, second, third))]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns and lines[0].startswith("warning: these runs were evaluated on different")
        text = "\n".join(lines)
        assert "A  zppo" in text and "A minus B" in text and "Settings that differ" in text
    change = {**yaml.safe_load((second / "recipe.yaml").read_text())}
    change["eval"]["temperature"] = 0.0
    (second / "recipe.yaml").write_text(yaml.safe_dump(change))
    assert any("asked in different ways (eval.temperature: 0.6, 0.0)" in text for text in compare_runs([first, second]).warnings)


def test_a_table_is_wrapped_between_words_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    columns = ("", "difference", "95% interval", "better", "worse", "questions", "which is better")
    rows = (("held-out accuracy of the arm", "+0.0", "-10.0 to +10.0", "10", "10", "1,000", "not told apart"),)
    for width in (40, 80, 120):
        console = Console(file=io.StringIO(), width=width)
        print_fitting(console, Table("t", "s", "A title", columns, rows, "What it says."))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert all(word in text.split() for word in " ".join((*columns, *rows[0])).split())
        assert max(map(len, text.splitlines())) <= width


def test_curves_differ_without_their_colours(tmp_path: Path) -> None:
    folders = [invented_run(tmp_path / f"{i}", steps=2, capacity=20 + i) for i in range(5)]
    chart = next(c for c in comparison_charts(compare_runs(folders).arms) if c.id == "accuracy-plain")
    assert len({(s.dash, s.marker) for s in chart.series}) == len({s.dash for s in chart.series}) == 5


def test_equal_recipes_and_seeds_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    arms = arms_of([open_run(folder) for folder in runs_of(tmp_path, {"seed": 0}, {"seed": 0})])
    assert [arm.name for arm in arms] == ["zppo (run-0)", "zppo (run-1)"]


def held_out(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(next(line["accuracy"] for line in lines if line["event"] == "final"))


def test_pairs_are_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes: list[dict[str, Any]] = [{"method": m, "seed": s, "gain": g} for m, g in (("zppo", 4.0), ("grpo", 2.0)) for s in (0, 1, 2)]
    folders = runs_of(tmp_path, *shapes, {"method": "grpo", "seed": 7})
    table = next(t for t in compare_runs(folders).tables if t.id == "paired")
    row = next(r for r in table.rows if r[0] == "zppo minus grpo: held-out accuracy")
    differences = [100 * (held_out(folders[i]) - held_out(folders[i + 3])) for i in range(3)]  # seed 7 has no partner
    mean = sum(differences) / 3
    spread = (sum((d - mean) ** 2 for d in differences) / 2) ** 0.5
    half = 4.303 * spread / 3**0.5
    assert row[1:] == (f"{mean:+.1f}", f"{mean - half:+.1f} to {mean + half:+.1f}", "3 of 3")
    text = run(capsys, "compare", *folders, "--html", "--out", tmp_path / "c.html", "--figures", "svg")
    assert "Paired over seeds" in text and "method.name zppo grpo" in text and f"{tmp_path / 'c.html'}" in text
    assert (tmp_path / "c.html").exists() and (tmp_path / "c-figures" / "accuracy-plain.svg").exists()


def test_what_is_written_is_said_with_its_whole_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = runs_of(tmp_path, {"seed": 0, "steps": 2}, {"seed": 1, "steps": 2})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = run(capsys, "compare", *folders, "--html", "--figures", "none", "--csv", "a.csv", "--json", "b.json")
    for name in ("compare.html", "a.csv", "b.json"):
        assert str(tmp_path / "here" / name) in text


def test_the_buffers_of_two_methods_side_by_side(tmp_path: Path) -> None:
    """Figs. 4, 23 and 24: every entry bin, what left, the three fates, what graduates were; and the loss."""
    shapes: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1}, {"seed": 0, "method": "grpo-replay"}]
    folders = runs_of(tmp_path, *({**shape, "steps": 12, "characters": 60} for shape in shapes))
    comparison = compare_runs(folders)
    charts = {chart.id: chart for chart in comparison_charts(comparison.arms)}
    events = [[json.loads(line) for line in (folder / "buffer.jsonl").read_text().splitlines()] for folder in folders]

    def shares(what: str, of: tuple[str, ...], step: int, accuracy: float | None = None) -> list[float]:
        """What happened to entries, divided by one thing or another that happened, of each run up to a step."""
        counts = [Counter(e["event"] for e in told if e["step"] <= step and accuracy in (None, e["entry_accuracy"])) for told in events]
        return [count[what] / total if (total := sum(count[name] for name in of)) else math.nan for count in counts]

    for i, name in enumerate(("0%", "12.5%", "25%", "37.5%")):
        chart = charts[f"graduation-{i}"]
        assert chart.title.endswith(f"admitted at {name}") and [s.name for s in chart.series] == ["zppo", "grpo-replay"]
        one, two, other = shares("graduated", ("admitted",), 12, i / 8)
        assert [s.y[-1] for s in chart.series] == [pytest.approx((one + two) / 2), pytest.approx(other)]
        assert comparison.results["grpo-replay"][0][f"graduated / admitted, entry at {name}"] == pytest.approx(other)
    one, two, other = shares("graduated", ("graduated", "evicted"), 12)
    assert [s.y[-1] for s in charts["left"].series] == [pytest.approx((one + two) / 2), pytest.approx(other)]
    assert comparison.results["grpo-replay"][0]["graduated / left, all"] == pytest.approx(other)

    visits = next(chart for chart in Reader(folders[2]).read().charts if chart.id == "visits")
    for index, series in enumerate(visits.series):
        own = charts[f"fate-{index}"].series[-1]
        assert (own.name, list(own.y)) == ("grpo-replay", pytest.approx(list(series.y)))

    bars = charts["graduate-shares"]
    graduates = Counter(e["entry_accuracy"] for told in events[:2] for e in told if e["event"] == "graduated")
    assert list(bars.series[0].x[:2]) == ["zppo", "grpo-replay"] and "paper 2B, ZPPO" in bars.series[0].x
    assert [s.y[0] for s in bars.series[:4]] == pytest.approx([graduates[k / 8] / sum(graduates.values()) for k in range(4)])
    table = next(t for t in comparison.tables if t.id == "fates")
    [row] = [row for row in table.rows if row[0] == "0% · zppo"]
    admitted = sum(e["event"] == "admitted" and e["entry_accuracy"] == 0 for told in events[:2] for e in told)
    assert row[1:3] == (f"{admitted:,}", f"{graduates[0.0]:,}")

    losses = [[json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    assert list(charts["loss"].series[1].y) == pytest.approx([loss for loss in losses[2] if loss is not None])


def test_a_comparison_of_runs_without_a_buffer_has_nothing_of_it(tmp_path: Path) -> None:
    comparison = compare_runs(runs_of(tmp_path, {"method": "grpo"}, {"method": "grpo-both"}))
    assert "fates" not in {t.id for t in comparison.tables}
    assert not {"left", "fate-0", "graduation-0", "graduate-shares"} & {c.id for c in comparison_charts(comparison.arms)}


# A run that really trained


def test_the_report_of_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the trainer writes is what the report reads."""
    AcceleratorState._reset_state(True)
    make_tiny(tmp_path / "student", seed=0)
    make_tiny(tmp_path / "teacher", seed=1)
    rows = [{"prompt": f"What is {i} plus {i}?", "answer": 2 * i, "level": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text(
        "def reward(completion, question):\n"
        "    share = sum(map(ord, completion)) % 4\n"
        '    return {"correct": share == 0, "reward": float(share == 0), "answer": str(share)}\n'
    )
    recipe = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "rollout": {"max_new_tokens": 8}, "compression": {"max_new_tokens": 8}},
        "data": {"train": "questions.jsonl", "eval": "questions.jsonl", "eval_limit": 4},
        "rollout": {"batch_size": 6, "group_size": 4, "max_new_tokens": 8},
        "zone": {"rho_aug": 4.0},
        "eval": {"max_new_tokens": 8, "every": 1},
        "train": {"steps": 3, "device": "cpu", "checkpoint_every": 0},
        "grading": {"reward": "reward.py:reward"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    run(capsys, "train", tmp_path / "recipe.yaml", f"--output={out}")
    summary = Reader(out).read()
    names = {chart.id for chart in summary.charts}
    assert {"held-out", "accuracy", "loss", "clip", "composition", "seconds", "teacher", "occupancy", "match-bcq"} <= names
    assert summary.head["steps"] == "3" and "FLOPs" in summary.head["cost"]
    assert summary.run.finished and "after" not in summary.outcome
    _check_what_could_be_asked(out, summary)
    _check_the_caps(tmp_path, summary, capsys)
    logged = [line["accuracy"]["plain"] for line in summary.run.steps]
    chart = next(chart for chart in summary.charts if chart.id == "accuracy")
    assert list(chart.series[0].y) == pytest.approx(logged)
    run(capsys, "report", out, "--figures", "none")
    held_out = {f"held-out=questions.jsonl:{i + 1}" for i in range(4)}
    assert set(summary.lines) == {f"questions.jsonl:{i + 1}" for i in range(12)} | held_out
    assert all(summary.lines[key].steps == [0, 1, 2, 3] and len(summary.lines[key].visits) == 4 for key in held_out)
    story = run(capsys, "inspect", out, "questions.jsonl:1")
    assert "What is 0 plus 0?" in story and "evaluation at step 2: plain" in story and "evaluation of final/: plain" in story


def _check_what_could_be_asked(out: Path, summary: Summary) -> None:
    """Fig. 5a of a run whose caps leave nothing out: what could be asked again is what was; and the audit knows all teacher answers."""
    groups: dict[tuple[int, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(out):
        groups[row["step"], row["kind"]][row["question_id"]].append(row["correct"])
        if row["kind"] == "ncq":
            audit = json.loads(row["audit"])
            assert bool(audit["teacher_answers"]) == (row["question_id"] in groups[row["step"], "bcq"])
            assert set(audit["teacher_answers"]) <= {"0"}  # what the reward function calls right
    seen = set()
    for line in summary.run.steps:
        plain = groups[line["step"], "plain"]
        hard = {question for question, verdicts in plain.items() if sum(verdicts) / len(verdicts) < 0.5}
        able = set(groups[line["step"], "bcq"])
        assert set(groups[line["step"], "ncq"]) == hard and able <= hard
        parts = {"easy": len(plain) - len(hard), "bcq": len(able), "ncq": len(hard - able)}
        assert line["eligibility"] == pytest.approx({name: n / len(plain) for name, n in parts.items() if n})
        seen |= line["eligibility"].keys()
    assert {"easy", "bcq"} <= seen


def _check_the_caps(base: Path, summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    """With the caps of a batch, `teacher.ask: all` knows as much; lazily the rest of the hard questions is unasked."""
    found = {}
    for ask in ("all", "lazy"):
        AcceleratorState._reset_state(True)
        options = ["--zone.rho_aug=0.25", f"--teacher.ask={ask}", "--train.steps=1", "--data.eval=null", f"--output={base / ask}"]
        run(capsys, "train", base / "recipe.yaml", *options)
        found[ask] = open_run(base / ask).steps[0]["eligibility"]
    whole = summary.run.steps[0]["eligibility"]
    assert found["all"] == whole and "unasked" not in whole
    assert found["lazy"]["unasked"] > 0 and found["lazy"].get("easy") == whole.get("easy")
    assert sum(found["lazy"].values()) == pytest.approx(1)
