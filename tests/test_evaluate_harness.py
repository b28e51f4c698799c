"""Our scorers and public harnesses (asked by `make_harness_verdicts.py`) on the same answers: equal, or different for a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anls import anls_score

from zppo.core.types import Message
from zppo.evals.adapters.row import DatasetRow
from zppo.evals.item import Item, Kind
from zppo.evals.registry import find
from zppo.evals.results import Scored, mastery
from zppo.evals.scoring.rules import Score, score
from zppo.evals.scoring.text_scores import anls
from zppo.evals.scoring.verdicts import judge_score
from zppo.grading import Grader

HARNESS = json.loads((Path(__file__).parent / "data" / "evaluate" / "harness.json").read_text(encoding="utf-8"))

# Where the two differ: (group, gold, answer) -> ours, None where we ask the judge. The docs (docs/evaluation.md) explain each kind.
TEXT_OF_AN_OPTION = "the text of an option is as good as its letter"
LETTER = "a letter counts in any case, alone or before its text"
JUDGED = "what cannot be read goes to the judge"
DRAWN = "the harness draws a letter at random where it finds none"
SPELLING = "another spelling of the gold: a fraction, a unit, a percent sign, a word for a number, what is equal to it"
EXACT = "no rounding that the question does not ask for"
SEVERAL = "several letters are no choice of one"
THRESHOLD = "a similarity of exactly 0.5 is not above the threshold"
DIFFERENT: dict[tuple[str, str, str], tuple[float | None, str]] = {
    ("choice", "B", "b"): (1.0, LETTER),
    ("choice", "B", "B) rabbit"): (1.0, LETTER),
    ("choice", "B", "B: the rabbit"): (1.0, LETTER),
    ("choice", "B", "rabbit"): (1.0, TEXT_OF_AN_OPTION),
    ("choice", "B", "Rabbit."): (1.0, TEXT_OF_AN_OPTION),
    ("choice", "B", "a rabbit"): (1.0, TEXT_OF_AN_OPTION),
    ("choice", "B", "fox"): (0.0, TEXT_OF_AN_OPTION),
    ("choice", "B", "E"): (0.0, DRAWN),
    ("choice", "B", "none of them"): (None, DRAWN),
    ("choice", "B", "A or B"): (None, JUDGED),
    ("choice", "B", "AB"): (0.0, SEVERAL),
    ("choice, MVBench", "B", "rabbit"): (1.0, TEXT_OF_AN_OPTION),
    ("choice, MVBench", "B", "Rabbit."): (1.0, TEXT_OF_AN_OPTION),
    ("choice, MVBench", "B", "a rabbit"): (1.0, TEXT_OF_AN_OPTION),
    ("choice, MVBench", "B", "A or B"): (None, JUDGED),
    ("choice, MVBench", "B", "none of them"): (None, JUDGED),
    ("number", "25", "m+n=25"): (1.0, SPELLING),
    ("number", "70", "seventy"): (1.0, SPELLING),
    ("number", "70", "70 or 80"): (None, JUDGED),
    ("number", "12", "12\\%"): (1.0, SPELLING),
    ("number", "7", "\\frac{14}{2}"): (1.0, SPELLING),
    ("number", "600", "6 \\times 100"): (1.0, SPELLING),
    ("precision", "1.2", "6/5"): (1.0, SPELLING),
    ("precision", "1.2", "1.2 m/s"): (1.0, SPELLING),
    ("precision", "1.2", "about 1.2"): (None, JUDGED),
    ("precision", "0.33", "1/3"): (1.0, SPELLING),
    ("precision", "0.33", "33%"): (1.0, SPELLING),
    ("precision", "7", "7.4"): (0.0, EXACT),
    ("precision", "7", "7 years"): (1.0, SPELLING),
    ("precision", "7", "seven"): (1.0, SPELLING),
    ("precision", "7", "7,0"): (None, JUDGED),
    ("text", "0.5", "0.504"): (0.0, EXACT),
    ("text", "3,5", "(3,5)"): (1.0, SPELLING),
    ("text", "\\sqrt{2}", "1.41"): (None, JUDGED),
    ("text", "2\\pi", "6.28"): (None, JUDGED),
    ("text", "30", "30^{\\circ}"): (1.0, SPELLING),
    ("text", "(2,3)", "(3,2)"): (None, JUDGED),
    ("text", "5", "five"): (1.0, SPELLING),
    ("anls", "31%", "13%"): (0.0, THRESHOLD),
    ("anls", "twenty five", "2"): (0.0, THRESHOLD),
    ("blind", "Yes", "Yes, they touch"): (1.0, SPELLING),
    ("blind", "3,4", "3 rows and 4 columns"): (1.0, SPELLING),
    ("blind", "3,4", "3x4"): (1.0, SPELLING),
    ("blind", "3,4", "three by four"): (None, JUDGED),
    ("blind", "k", "the letter k"): (None, JUDGED),
    ("blind", "2", "two"): (1.0, SPELLING),
    ("blind", "2", "2 times"): (None, JUDGED),
    ("ocr", "B", "B. rabbit"): (1.0, LETTER),
    ("ocr", "B", "b"): (1.0, LETTER),
}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as made:
        yield made


def item(kind: Kind, gold: str | tuple[str, ...], facts: dict[str, Any] | None = None, options: list[str] | None = None) -> Item:
    return Item("1", "x", (Message("user", "?"),), gold, kind, options=tuple(options or ()), facts=facts or {})


def as_item(group: str, case: dict[str, Any]) -> Item:
    if group.startswith("choice"):
        return item("choice", case["gold"], options=case["options"])
    if group.startswith("anls"):
        return item("anls", tuple(case["golds"]))
    if group == "precision":
        return item("precision", case["gold"], {"precision": str(case["places"])})
    if group == "blind":
        row = {"task": case["task"], "prompt": "?", "groundtruth": case["gold"], "image": "a.png"}
        return find("VBlind").adapter(DatasetRow("VBlind", 1, row))[0]
    if group == "ocr":
        facts = {"task": case["type"], "how": case["eval"], "question": case["question"], "bbox": case.get("bbox", ())}
        return item("ocr", tuple(case["answers"]), facts | {"boxes": case.get("bbox_list", ()), "content": case.get("content", ())})
    return item("number" if group == "number" else "text", case["gold"])


def ours(group: str, case: dict[str, Any], grader: Grader) -> Score:
    completion = case["answer"] if group == "ocr" else f"<think>hm</think>So: \\boxed{{{case['answer']}}}"
    return score(as_item(group, case), completion, grader.equal)


RULED = [name for name in HARNESS if name not in ("graded", "wemath")]


@pytest.mark.slow
@pytest.mark.parametrize("group", RULED)
def test_scores_are_those_of_the_harness_or_different_for_a_reason(group: str, grader: Grader) -> None:
    expected = {key[1:]: value[0] for key, value in DIFFERENT.items() if key[0] == group}
    for case in HARNESS[group]["cases"]:
        gold = case.get("gold") or (case.get("golds") or case["answers"])[0]
        found = ours(group, case, grader)
        if (gold, case["answer"]) in expected:
            assert found.value == expected[gold, case["answer"]], case
            assert case["theirs"] is None or found.value != case["theirs"], f"no difference any more: {case}"
            del expected[gold, case["answer"]]
        else:
            assert found.value == pytest.approx(case["theirs"], abs=1e-9), case
    assert not expected, "these are never asked"


@pytest.mark.parametrize("case", HARNESS["graded"]["cases"], ids=lambda c: c["grade"])
def test_a_grade_of_the_judge_is_the_harness_score(case: dict[str, Any]) -> None:
    """MM-Vet: the harness takes the bare number, we want it in JSON; the same grade is the same score."""
    graded = item("graded", "-1 <AND> -5")
    assert judge_score(find("MM-Vet"), graded, json.dumps({"score": float(case["grade"])})) == case["theirs"]


def test_four_way_score_counts_like_the_harness() -> None:
    """We-Math: 60 composite problems of two and three steps, right and wrong at random."""
    case = HARNESS["wemath"]["cases"][0]
    rows = [Scored(float(row["joker"]), {"problem": row["ID"], "key": row["key"]}) for row in case["rows"]]
    found, n = mastery(rows), case["of"]
    theirs = {
        "IK": "InsufficientKnowledge", "IG": "InadequateGeneralization", "CM strict": "CompleteMastery_strict",
        "CM loose": "CompleteMastery_loose", "RM strict": "RoteMemorization_strict", "RM loose": "RoteMemorization_loose",
    }  # fmt: skip
    assert {name: round(found[name] * n) for name in theirs} == {name: case["theirs"][key] for name, key in theirs.items()}


@pytest.mark.parametrize("answer", ["Rotterdam", "Roterdam", "rotter dam", "Rott", "Amsterdam", "31 %", "ein langer Text"])
@pytest.mark.parametrize("golds", [["Rotterdam"], ["31%", "31 %"], ["Ein langer Text über etwas", "Amsterdam"]])
def test_anls_is_that_of_the_package(golds: list[str], answer: str) -> None:
    assert anls(golds, answer) == pytest.approx(anls_score(answer, golds), abs=1e-9)
