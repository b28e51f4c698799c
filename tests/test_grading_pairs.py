"""How right the grader is: labelled pairs by kind, right answers with one thing changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import grading
from benchmarks.common import Options
from benchmarks.mutations import KINDS, apart, mutations

from zppo.grading import Grader


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(deadline=30.0) as grader:  # a busy machine must not fail it
        yield grader


def test_pairs_are_many_of_every_kind_and_labelled_both_ways() -> None:
    rows = grading.pairs()
    assert len(rows) >= 400 and all(set(row) == {"kind", "gold", "answer", "equal"} and type(row["equal"]) is bool for row in rows)
    assert max(Counter((row["gold"], row["answer"]) for row in rows).values()) == 1
    assert {row["kind"] for row in rows if row["equal"]} == {row["kind"] for row in rows if not row["equal"]}
    assert 0.4 < sum(row["equal"] for row in rows) / len(rows) < 0.6


@pytest.mark.slow
def test_the_grader_is_right_on_labelled_pairs(grader: Grader) -> None:
    found = grading.on_pairs(grader.equal, grading.pairs())
    precision, recall = grading.precision(found["total"]), grading.recall(found["total"])
    assert precision is not None and precision >= 0.995, found["wrong"]
    assert recall is not None and recall >= 0.93, found["wrong"]
    assert grader.timeouts == 0


@pytest.mark.slow
@pytest.mark.long
def test_the_grader_refuses_answers_in_which_one_thing_was_changed(grader: Grader) -> None:
    changed = mutations(grading.golds())
    assert len(changed) > 1000 and {kind for kind, _, _ in changed} == set(KINDS)
    accepted = grading.on_mutations(grader.equal, changed)["accepted"]
    assert len(accepted) <= 0.01 * len(changed), accepted


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        ("007", "7"),
        ("1^5", "1^7"),
        ("0 \\cdot 3", "0 \\cdot 5"),
        ("\\{1,-1\\}", "\\{-1,1\\}"),
        ("x^2-5x+6", "(x-2)(x-3)"),
        ("2x+4y=6", "x+2y=3"),
        ("2x>0", "3x>0"),
        ("1:2", "2:4"),
        ("2.50", "2.5"),
        ("(A) \\frac{1}{3}", "(A) \\frac{1}{4}"),  # the letter decides
        ("i^2", "i^6"),
        ("no solution", "no answer"),
    ],
)
def test_what_may_be_the_same_is_no_mutation(gold: str, other: str) -> None:
    assert not apart(gold, other) and not apart(gold, gold)


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        ("\\frac{1}{2^{2021}}", "\\frac{1}{2^{2022}}"),
        ("1-\\frac{1}{20!}", "1-\\frac{1}{21!}"),
        ("(1,2)", "(2,1)"),
        ("(a,\\infty)", "(-\\infty,a)"),
        ("\\{1,2\\}", "\\{1\\}"),
        ("\\pi r^2 h", "\\pi r^2"),
        ("52_8", "52_7"),
        ("x=5", "x=-5"),
        ("5 \\text{ m/s}^2", "5 \\text{ m/s}"),
        ("3:30 \\text{ PM}", "4:30 \\text{ PM}"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
        ("2\\frac{1}{2}", "2\\frac{1}{3}"),
        ("AC", "A"),
    ],
)
def test_other_values_are_apart(gold: str, other: str) -> None:
    assert apart(gold, other) and not apart(gold, gold) and not apart(other, other)


def test_mutations_hang_on_gold_and_seed_alone() -> None:
    golds = ["4m+3", "(1, 2)", "3n+1 \\text{ for all } n", "\\frac{\\pi}{4}+k\\pi, k\\in\\mathbb{Z}"]
    changed = mutations(golds)
    assert changed == mutations([*reversed(golds), golds[0]]) and mutations(golds[:1]) == [row for row in changed if row[1] == golds[0]]
    assert changed != mutations(golds, seed=1)
    assert {kind for kind, _, _ in changed} == set(KINDS)
    assert all(other.endswith(" \\text{ for all } n") for _, gold, other in changed if gold == golds[2])
    assert golds[3] not in {gold for _, gold, _ in changed}  # with another sign it is the same family of solutions


def test_what_the_one_unknown_is_called_is_no_mutation() -> None:
    assert {kind for kind, _, _ in mutations(["x=5", "x>5", "x=5, y=3", "k\\pi", "5 mol"])} == {"digit", "sign", "part"}
    assert {other for kind, _, other in mutations(["y=2x"]) if kind == "variable"} <= {f"y=2{name}" for name in "zabnmptqr"}


def test_shares_are_counted() -> None:
    rows = [{"kind": "k", "gold": gold, "answer": "1", "equal": gold < "3"} for gold in "1234"]
    found = grading.on_pairs(lambda gold, answer: gold in "134", rows)
    assert found["total"] == {"right accepted": 1, "right refused": 1, "wrong accepted": 2, "wrong refused": 0}
    assert (grading.precision(found["total"]), grading.recall(found["total"])) == (1 / 3, 1 / 2)
    assert found["wrong"] == ["2 | 1: refused", "3 | 1: accepted", "4 | 1: accepted"]


@pytest.mark.slow
@pytest.mark.long
def test_the_row_of_the_benchmarks_has_two_tables(tmp_path: Path) -> None:
    result = grading.measure(Options(quick=True, threads=1, repetitions=1, results=tmp_path))
    table = grading.table(result)
    assert {"zppo", "math-verify"} <= set(result["graders"])
    assert table.startswith("| kind |") and "| **all** |" in table and "| changed | golds | zppo accepts |" in table
