"""The cluster bootstrap: the paper's intervals, its algebra, tables that are wrong, and the command."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zppo.report
from zppo.cli import main
from zppo.errors import DataError, SettingsError
from zppo.report.bootstrap import OUT_COLUMNS, MethodDifference, Table, bootstrap_pairs, bootstrap_table, cluster_bootstrap, read_table

DATA = Path(zppo.report.__file__).parent / "data"
ACCURACY = DATA / "paper_accuracy.csv"
HEADER = "scale,method,family,benchmark,accuracy\n"

accuracies = st.floats(0, 100).map(lambda x: round(x, 1))
pairs = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.tuples(accuracies, accuracies), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def paper() -> Table:
    return read_table(ACCURACY)


@pytest.fixture(scope="module")
def ours(paper: Table) -> dict[tuple[str, str, str], MethodDifference]:
    return {(c.scale, c.family, c.subtrahend): c for c in bootstrap_table(paper, minuend="ZPPO")}


# --- the paper ------------------------------------------------------------------------------------------------------


def test_the_papers_intervals_come_out_of_the_papers_accuracies(ours: dict[tuple[str, str, str], MethodDifference]) -> None:
    """App. F.6 within Monte Carlo error: 0.15 points, 0.4 where a family has ten benchmarks."""
    with open(DATA / "paper_bootstrap.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 36
    for row in rows:
        interval = ours[row["scale"], row["family"], row["subtrahend"]].interval
        near = 0.4 if row["benchmarks"] == "10" else 0.15
        assert interval.delta == pytest.approx(float(row["delta"]), abs=0.0051), row
        assert interval.low == pytest.approx(float(row["ci_low"]), abs=near), row
        assert interval.high == pytest.approx(float(row["ci_high"]), abs=near), row
        assert (interval.wins, interval.n) == (int(row["wins"]), int(row["benchmarks"])), row


def test_a_row_of_the_table_is_the_bootstrap_of_its_pair(paper: Table, ours: dict[tuple[str, str, str], MethodDifference]) -> None:
    methods = paper["2B", "llm"]
    alone, shared = cluster_bootstrap(methods["ZPPO"], methods["GRPO†"]), ours["2B", "llm", "GRPO†"].interval
    assert (alone.wins, alone.n) == (shared.wins, shared.n)
    assert (alone.delta, alone.low, alone.high) == pytest.approx((shared.delta, shared.low, shared.high), abs=1e-9)


def test_without_a_minuend_every_pair_stands_once_the_later_listed_first(paper: Table) -> None:
    found = bootstrap_table(paper, resamples=10)
    of_one = [(c.minuend, c.subtrahend) for c in found if (c.scale, c.family) == ("0.8B", "llm")]
    methods = list(paper["0.8B", "llm"])
    assert len(of_one) == len(methods) * (len(methods) - 1) // 2 == len({frozenset(pair) for pair in of_one})
    assert all(methods.index(a) > methods.index(b) for a, b in of_one)
    order = [(c.scale, c.family) for c in found]
    assert [scale for scale, _ in order] == sorted((scale for scale, _ in order), key=["0.8B", "2B", "4B", "9B"].index)


# --- what an interval is --------------------------------------------------------------------------------------------


def test_the_distribution_of_two_benchmarks_is_known() -> None:
    """Means are d1, (d1 + d2) / 2, d2 with chances 1/4, 1/2, 1/4: the tails are the two differences."""
    interval = cluster_bootstrap({"a": 10.0, "b": 20.0}, {"a": 12.0, "b": 16.0})
    assert (interval.delta, interval.low, interval.high, interval.wins, interval.n) == (1.0, -2.0, 4.0, 1, 2)


def test_the_spread_is_that_of_a_mean() -> None:
    """Of n = 100 alternating differences of +-1 the mean has a standard deviation of 0.1, so 95% is about +-0.196."""
    minuend = {f"{i:03}": 50.0 + (-1) ** i for i in range(100)}
    interval = cluster_bootstrap(minuend, dict.fromkeys(minuend, 50.0))
    assert interval.high == pytest.approx(0.196, abs=0.02)
    assert interval.low == pytest.approx(-0.196, abs=0.02)


@settings(max_examples=30)
@given(pairs, st.integers(0, 5))
def test_exchanging_the_sides_mirrors_the_interval(both: dict[str, tuple[float, float]], seed: int) -> None:
    a, b = ({name: values[i] for name, values in both.items()} for i in (0, 1))
    one, other = cluster_bootstrap(a, b, 500, seed), cluster_bootstrap(b, a, 500, seed)
    assert (one.delta, one.low, one.high) == pytest.approx((-other.delta, -other.high, -other.low), abs=1e-9)
    assert one.low <= one.high
    assert one.wins + other.wins == sum(x != y for x, y in both.values())


@settings(max_examples=30)
@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_the_benchmarks_does_not_matter(both: dict[str, tuple[float, float]], random: object) -> None:
    a, b = ({name: values[i] for name, values in both.items()} for i in (0, 1))
    names = list(both)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert cluster_bootstrap({n: a[n] for n in names}, b, 200) == cluster_bootstrap(a, b, 200)


@settings(max_examples=30)
@given(pairs, st.floats(-50, 50))
def test_all_pairs_share_one_resample(both: dict[str, tuple[float, float]], shift: float) -> None:
    """With one resample a - c is a - b moved by what c is below b, at every percentile."""
    a, b = ({name: values[i] for name, values in both.items()} for i in (0, 1))
    c = {name: value - shift for name, value in b.items()}
    first, moved = bootstrap_pairs({"a": a, "b": b, "c": c}, [("a", "b"), ("a", "c")], 300)
    assert (moved.delta, moved.low, moved.high) == pytest.approx((first.delta + shift, first.low + shift, first.high + shift), abs=1e-9)


def test_the_seed_decides() -> None:
    a = {str(i): float(i * i % 17) for i in range(16)}
    b = dict.fromkeys(a, 5.0)
    assert cluster_bootstrap(a, b, 1000) == cluster_bootstrap(a, b, 1000)
    assert cluster_bootstrap(a, b, 1000) != cluster_bootstrap(a, b, 1000, seed=1)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({}, {}, "minuend and subtrahend have no benchmarks"),
        ({"x": 1.0, "y": 2.0}, {"x": 1.0}, "subtrahend has no accuracy on y, which the other side has"),
        ({"x": 1.0}, {"x": 1.0, "z": 2.0, "y": 1.0}, "minuend has no accuracy on y, z"),
        ({"x": float("nan")}, {"x": 1.0}, "minuend: the accuracy on x is nan"),
    ],
)
def test_sides_that_cannot_be_compared(a: dict[str, float], b: dict[str, float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        cluster_bootstrap(a, b)


def test_no_resamples() -> None:
    with pytest.raises(SettingsError, match="resamples is 0; at least 1"):
        cluster_bootstrap({"x": 1.0}, {"x": 2.0}, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "row 1: there is no column scale, method, family, benchmark, accuracy .found: nothing"),
        ("scale,method,family,benchmark\n", "row 1: there is no column accuracy"),
        (HEADER.replace("\n", ",scale\n"), "row 1: the column scale stands twice"),
        (HEADER, "has no rows below its header"),
        (HEADER + "2B,A,vlm,x,50\n2B,A,vlm,,50\n", "row 3, column benchmark: is empty"),
        (HEADER + "2B,A,vlm,x\n", "row 2, column accuracy: is empty"),
        (HEADER + "2B,A,vlm,x,50,51\n", "row 2: has more cells than the header"),
        (HEADER + "2B,A,vlm,x,good\n", "row 2, column accuracy: 'good' is no percentage"),
        (HEADER + "2B,A,vlm,x,nan\n", "row 2, column accuracy: 'nan' is no percentage"),
        (HEADER + "2B,A,vlm,x,101\n", "row 2, column accuracy: '101' is no percentage; write a number from 0 to 100"),
        (HEADER + "2B,A,vlm,x,1\n2B,B,vlm,x,1\n2B,A,vlm,x,2\n", "row 4, column benchmark: A at 2B has an accuracy on x"),
        (HEADER + '2B,A,vlm,"x,50\n', "is no CSV"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + "2B,GRPO†,vlm,x,1\n".encode("cp1252"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_table(tmp_path / "latin.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "none.csv")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_the_papers_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert main(["bootstrap", str(ACCURACY), "--minuend", "ZPPO", "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "[+1.89, +3.74]" in printed or "[+1.90, +3.74]" in printed  # 2B, vlm, GRPO†
    assert "10,000 resamples of the benchmarks with seed 0" in printed
    rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    assert tuple(rows[0]) == OUT_COLUMNS
    assert {row["minuend"] for row in rows} == {"ZPPO"}
    row = next(r for r in rows if (r["scale"], r["family"], r["subtrahend"]) == ("9B", "video", "GRPO†"))
    assert (row["delta"], row["wins"], row["benchmarks"]) == ("0.78", "5", "5")


def test_resamples_and_seed_reach_the_bootstrap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs: list[str] = []
    for options in ([], ["--seed", "1"], ["--resamples", "50"]):
        out = tmp_path / f"{len(outs)}.csv"
        assert main(["bootstrap", str(ACCURACY), "--minuend", "ZPPO", "--csv", str(out), *options]) == 0
        outs.append(out.read_text(encoding="utf-8"))
    assert len(set(outs)) == 3


def test_mistakes_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bootstrap", str(ACCURACY), "--minuend", "PPO"]) == 2
    assert "the table has no method 'PPO'; it has Base, Off-Distill" in capsys.readouterr().err
    table = tmp_path / "table.csv"
    table.write_text(HEADER + "2B,A,vlm,x,1\n2B,A,vlm,y,1\n2B,B,vlm,x,1\n", encoding="utf-8")
    assert main(["bootstrap", str(table)]) == 2
    assert "scale 2B, family vlm: B has no accuracy on y" in capsys.readouterr().err
    table.write_text(HEADER + "2B,A,vlm,x,1\n4B,B,vlm,x,1\n", encoding="utf-8")
    assert main(["bootstrap", str(table)]) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert main(["bootstrap", str(ACCURACY), "--minuend", "ZPPO", "--csv", str(tmp_path / "no" / "out.csv")]) == 2
    assert "cannot be written" in capsys.readouterr().err
