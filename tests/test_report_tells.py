"""Tells of candidates, and the warnings of a report."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from report_runs import change_rows, evaluated, files_of, invented_run, rows_of
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.core.types import Draft, Message, Question
from zppo.prompts.book import PromptBook
from zppo.report import tells
from zppo.report.audits import Counts, Proportion, fraction
from zppo.report.compare import compare_runs
from zppo.report.summary import Reader
from zppo.report.tells import Pair, features, pair_of, style_tell, tell_warnings
from zppo.runs.log import ROLLOUT_SCHEMA
from zppo.train.health_checks import HealthChecks

WORDS = "so we add both and get the sum then take away what is left of it because there were more before".split()


def sentence(draw: random.Random) -> str:
    return " ".join(draw.sample(WORDS, 8))


def style(right: str, wrong: str, questions: int = 120, share: float = 1.0, each: int = 2) -> Proportion:
    """The tell of pairs whose right candidate has `right` around common words in this share of questions, else the other way round."""
    draw, pairs = random.Random(5), []
    for index in range(questions):
        one, other = (right, wrong) if draw.random() < share else (wrong, right)
        pairs += [Pair(f"q{index}", features(one.format(sentence(draw))), features(other.format(sentence(draw)))) for _ in range(each)]
    return style_tell(pairs)


def test_a_style_is_found_and_its_absence_too() -> None:
    found = style("Step 1: {}.", "Okay, {}.")
    assert found.share > 0.97 and found.low > 0.9 and found.n == 120  # questions, not pairs
    assert style("1. {}", "{}\n\n").share > 0.97  # marks and lines alone
    assert 0.65 < style("Step 1: {}.", "Okay, {}.", share=0.8).share < 0.85  # which could be 0.8
    same = style("{}.", "{}.")
    assert same.low < 0.5 < same.high
    assert not tell_warnings({"style": same})


def test_what_candidates_say_is_no_style() -> None:
    assert np.array_equal(features("7 and 12.5, so 19"), features("1 and 30,000, so 2"))
    for form in (r"it is \boxed{%s}", "Answer: %s", "so\nThe answer is: %s"):
        assert np.array_equal(features(form % "right"), features(form % "wrong"))
    assert style(r"{} \boxed{{yes}}", r"{} \boxed{{no}}").share < 0.7
    assert not np.array_equal(features("it is so"), features("so it is"))  # pairs of words count


def test_few_questions_and_long_candidates() -> None:
    assert style("a {}", "b {}", questions=tells.LEAST_QUESTIONS - 1).n == 0
    assert style_tell([]).n == 0
    assert features("").size and features("\ud800 x").size  # half a character
    assert np.array_equal(features("a " * 3_000_000), features("a " * 2_000_000))
    many = style("Step 1: {}.", "Okay, {}.", questions=tells.MOST_PAIRS, each=2)
    assert many.n == tells.MOST_PAIRS and many.share > 0.97  # every second pair


def test_the_classifier_is_at_its_minimum() -> None:
    rows = np.sign(np.random.default_rng(3).normal(size=(60, 9)) + 0.3)
    weights = tells._logistic(rows)
    chance = 1 / (1 + np.exp(-rows @ weights))
    assert np.abs(rows.T @ (chance - 1) + 10 * weights).max() < 1e-6


def test_pairs_are_read_off_prompts() -> None:
    question = Question("q", (Message("user", "2 + 2?"),), "4")
    prompt = PromptBook().render(Draft("bcq", question, {"candidates": ["first it is", "then it was"]}))[-1].content
    pair = pair_of("bcq", "q", {"correct_at": 1}, prompt)
    assert pair is not None and np.array_equal(pair.right, features("then it was")) and np.array_equal(pair.wrong, features("first it is"))
    assert pair_of("ncq", "q", {"wrong_answers": ["3"]}, prompt) is None
    assert pair_of("bcq", "q", {"correct_at": 1}, "no blocks") is None


def test_every_tell_has_its_warning() -> None:
    counts: Counts = Counts({
        ("position", "right first"): 90, ("position", "prompts"): 100,
        ("leak", "bcq", "right longer"): 10, ("leak", "bcq", "wrong longer"): 60,
    })  # fmt: skip
    found = tells.tells(counts, [])
    assert found == {"place": fraction(90, 100), "length": fraction(10, 70)}
    first, second = tell_warnings(found)
    assert "stands first in 90% of 100" in first and "the longer one in 14% of 70" in second and "compression" in second
    assert "words and marks alone" in tell_warnings({"style": fraction(40, 50)})[0]
    assert not tell_warnings({"place": fraction(53, 100), "length": fraction(9, 20), "style": fraction(5, 60)})


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A run whose right candidates open as the teacher's do, and whose students have stopped learning."""
    run = invented_run(tmp_path / "run", steps=6, batch=48)

    def open_differently(row: dict[str, object]) -> dict[str, object]:
        if row["kind"] == "bcq":
            first = json.loads(str(row["audit"]))["correct_at"] == 0
            head, one, other = str(row["prompt"]).split("<candidate>")
            openings = ["Well, ", "Let me see. "] if first else ["Let me see. ", "Well, "]
            row = {**row, "prompt": "<candidate>".join([head, openings[0] + one, openings[1] + other])}
        return row

    for path in files_of(run):
        change_rows(path, open_differently)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({"nonzero_advantage_share": 0.0} if line["event"] == "step" else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.slow
def test_warnings_reach_the_page_and_the_terminal(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bcq = {row["question_id"] for row in rows_of(told) if row["kind"] == "bcq"}
    assert len(bcq) >= tells.LEAST_QUESTIONS
    summary = Reader(told).read()
    style_warning = next(text for text in summary.warnings if text.startswith("A tell: words and marks"))
    gradient = next(text for text in summary.warnings if "advantage other than 0" in text)
    assert gradient.startswith("step 3: ")
    rows = next(table.rows for table in summary.tables if table.id == "tells-table")
    assert rows[-1][0].startswith("BCQ questions whose right candidate is told by words") and rows[-1][3] == str(len(bcq))
    assert main(["report", str(told), "--figures", "none"]) == 0
    printed, page = " ".join(capsys.readouterr().out.split()), (told / "report.html").read_text()
    for text in (style_warning, gradient):
        assert f"warning: {text}" in printed and json.dumps(text)[1:-1] in page


def test_the_page_warns_of_what_the_run_warned_of(told: Path) -> None:
    run = Reader(told).read().run
    checks, expected = HealthChecks.of(load_recipe(run.recipe)), []
    lines = [json.loads(line) for line in (told / "metrics.jsonl").read_text().splitlines()]  # in the order of the run
    for line in lines:
        expected += checks.advice(line["step"], line)
    assert expected and [text for text in Reader(told).read().warnings if not text.startswith("A tell")] == expected


@pytest.mark.slow
def test_a_comparison_says_whether_the_held_out_questions_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def arm(name: str, right: list[int]) -> Path:
        """A run that answered this many of 4 completions of each held-out question right."""
        run = evaluated(invented_run(tmp_path / name, steps=1, method="grpo" if name == "b" else "zppo"))
        path, draw = run / "held_out" / "eval-000000.parquet", iter(range(10_000))
        kept = [row for row in pq.read_table(path).to_pylist() if row["rollout"] < 4][: 4 * len(right)]
        for row in kept:
            number = next(draw)
            row |= {"question_id": f"q{number // 4}", "rollout": number % 4, "graded": True, "correct": number % 4 < right[number // 4]}
        pq.write_table(pa.Table.from_pylist(kept, schema=ROLLOUT_SCHEMA), path)
        return run

    one, other = [4, 4, 3, 2, 4, 1], [3, 4, 1, 2, 4, 2]
    folders = [arm("a", one), arm("b", other)]
    comparison = compare_runs(folders)
    table = next(table for table in comparison.tables if table.id == "questions")
    differences = [(x - y) / 4 for x, y in zip(one, other, strict=True)]
    mean, half = statistics.fmean(differences), 2.570582 * statistics.stdev(differences) / math.sqrt(6)
    assert table.rows == (
        (
            "zppo minus grpo",
            f"{100 * mean:+.1f}",
            f"{100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}",
            "2",
            "1",
            "6",
            "not told apart",
        ),
    )
    assert "These 6 questions do not tell zppo and grpo apart." in comparison.outcome
    assert main(["compare", *map(str, folders), "--json", "-"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["questions"]
    assert (found["difference"], found["better"], found["worse"], found["questions"]) == (mean, 2, 1, 6)
    clear = compare_runs([arm("c", [4] * 6), arm("d", [1, 0, 1, 0, 2, 0])])
    assert next(table.rows for table in clear.tables if table.id == "questions")[0][-1] == "first"
    assert "apart" not in clear.outcome


def test_the_outcome_says_how_sure_the_change_is(tmp_path: Path) -> None:
    run = evaluated(invented_run(tmp_path / "run", steps=2))
    path = run / "held_out" / "eval-000000.parquet"
    rows = [row for row in pq.read_table(path).to_pylist() if row["rollout"] == 0][:12]

    def write(name: str, right: int) -> None:
        kept = [row | {"question_id": f"q{i}", "graded": True, "correct": i < right} for i, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(kept, schema=ROLLOUT_SCHEMA), run / "held_out" / name)

    write("eval-000000.parquet", 3)
    write("final-000002.parquet", 5)
    differences = [0.0] * 10 + [1.0] * 2
    half = 2.200985 * statistics.stdev(differences) / math.sqrt(12)
    low, high = 100 * (2 / 12 - half), 100 * (2 / 12 + half)
    assert f", +16.7 points [{low:+.1f}, {high:+.1f}] over 12 questions, which may be chance" in Reader(run).read().outcome
    write("final-000002.parquet", 12)
    outcome = Reader(run).read().outcome
    assert "+75.0 points" in outcome and "chance" not in outcome
