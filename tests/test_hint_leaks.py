"""Hints: what gives the answer away is refused, and plain English is not, whatever the right answer is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from same_run import records
from test_zone import ScriptedTeacher
from zppo.cli import main
from zppo.core.types import Message, Question
from zppo.engines.base import Sampling
from zppo.prompts.book import PromptBook
from zppo.teacher.hint_leaks import gives_away
from zppo.teacher.hints import accept_hint, hint_trial
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling
from zppo.teacher.local import LocalTeacher

HINTS = [
    "Draw a diagram and label every side that you know.",
    "A good first step is to move all the terms to one side. Is there a common factor?",
    "Think about what stays the same when the order of the numbers changes.",
    "Start from the definition, and check each of the options against it in turn.",
    "There is no need to expand; in each case look for a pair that adds up to the total.",
    "Yes, a table helps here: write down what is true of both of them, and what is false.",
    "Look at the units first. All of the lengths have to be in the same one.",
    "Choose a variable for the unknown length, and write the area in two ways.",
    "The answer is a whole number; the solution is in the pattern of the remainders.",
    "Step 1: find the slope. Step 2: put a point into the equation of the line.",
    "1. Factor the left side.\n2. Set each factor to zero.",
    "Try small values of n, and guess the rule before you prove it.",
    "Compare the first and the last row of the table; which one is it that does not fit?",
    "If the shop opens an hour later, how many of the trains are still to come?",
    "Use the fact that x^2 and y^{2} are never negative, and that e is the base of ln.",
    "Let I be the incentre and C a point on the circle. What do you know about the angle at C?",
    "The result is in the same form as the question asks for, so round at the end.",
    "Remember to put what you find into \\boxed{}.",
    "Ask yourself: do I need all the information? Cross out what is not used.",
    "Read the chart from left to right and note where the two curves meet.",
    "Angle A is a right angle, and B is right of it.",
    "In part (a) you set up a sum; equation (C) and P(A) come from it, and so does f(x).",
    "It must be an even number, all but the last of them.",
    "The author says why in the second paragraph; read it once more, and mind the negation.",
]
QUESTION = "Which is the capital of the country? (A) red (B) blue (C) 12 km (D) none of these. Here 2x + 10 = 18, at 7 o'clock."
GOLDS = [
    *("A", "B", "C", "D", "E", "I", "(A)", "A.", "A. red", "(B) blue", "\\text{A}", "$A$", "Option C", "a", "e", "n", "x", "y", "J)"),
    *("no", "yes", "true", "false", "none", "all", "the", "in", "one", "both", "first", "No", "None", "Both", "a"),
    *("red", "blue", "12 km", "10", "18", "7", "capital", "country", "none of these", "2x + 10"),  # words of the question
    *("4", "2", "1", "0.5", "144", "-3", "\\frac{3}{4}", "3/4", "1,200", "45%", "$12.50", "2^{10}"),
    *("Paris", "the Seine", "photosynthesis", "New York City", "Albert Einstein", "May 5, 2020", "3 apples", "$\\text{Paris}$"),
    *(
        "x + 1",
        "x^2 + 1",
        "\\sqrt{2}",
        "2\\pi r",
        "(3, 4)",
        "y = 2x + 1",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
        "n(n+1)/2",
        "",
        "\\text{}",
    ),
]


@pytest.mark.parametrize("gold", dict.fromkeys(GOLDS))
def test_plain_english_is_never_refused(gold: str) -> None:
    refused = [hint for hint in HINTS if gives_away(hint, gold, question=QUESTION)]
    assert refused == []
    assert not any(accept_hint(f"<hint>{hint}</hint>", gold, question=QUESTION) is None for hint in HINTS)


@pytest.mark.parametrize(
    ("gold", "hint"),
    [
        ("A", "The answer is A."),
        ("A", "Check them all: the correct option is (A), since it fits."),
        ("A", "Choose A."),
        ("A", "Only option A fits."),
        ("A", "You will see that A is the correct answer"),
        ("A", "It must be (A)"),
        ("A", "So the answer is **A**"),
        ("(A)", "the answer: $A$"),
        ("B. blue", "The answer is \\text{B}"),
        ("C", "the answer is c."),
        ("D", "It must be D because the others fail."),
        ("B", "You end up with B."),
        ("B", "Rule out everything except B."),
        ("B", "Answer - B"),
        ("B", "B is right"),
        ("B", "B is the right choice"),
        ("no", "The answer is no."),
        ("1/2", "it comes to 0.5 of it"),
        ("0.5", "that leaves \\frac{1}{2} of it"),
        ("\\frac12", "that leaves 1/2"),
        ("-5", "you get \u22125 there"),
        ("yes", "So the answer: yes, because it rains."),
        ("true", "Conclude true."),
        ("red", "The answer is red."),
        ("red", "Red is the right answer."),
        ("10", "so you find y = 10."),
        ("18", "The result is 18"),
        ("4", "so x = 4"),
        ("4", "Divide, and 4 is left"),
        ("144", "There are 144 of them."),
        ("-3", "It comes to -3."),
        ("0.50", "about 0.5 of it"),
        ("1,200", "you get 1200"),
        ("1200", "you get 1,200 in all"),
        ("3/4", "that is \\frac{3}{4} of it"),
        ("\\frac{3}{4}", "that is \\dfrac{3}{4}"),
        ("45%", "nearly 45 % of them"),
        ("45\\%", "nearly 45% of them"),
        ("Paris", "Think of Paris."),
        ("\\text{Paris}", "think of paris, of course"),
        ("the Seine", "It lies on the  Seine"),
        ("x^2 + 1", "write it as $x^2+1$"),
        ("\\sqrt{2}", "recall that \\(\\sqrt{2}\\) is irrational"),
        ("(3, 4)", "they meet at (3,4)"),
        ("3 apples", "You have 3 apples left"),
        ("A", "\\boxed{B}"),
        ("Paris", "it is \\fbox{x}"),
    ],
)
def test_what_gives_the_answer_away_is_refused(gold: str, hint: str) -> None:
    assert gives_away(hint, gold, question=QUESTION)
    assert accept_hint(f"<hint>{hint}</hint>", gold, question=QUESTION) is None
    assert accept_hint(f"<hint>{hint}</hint>", "something else", gold, question=QUESTION) is None


def test_what_the_question_says_itself_gives_nothing_away() -> None:
    hint = "Start from 2x + 10 = 18 and bring the numbers to one side. Which of them is red?"
    assert not any(gives_away(hint, gold, question=QUESTION) for gold in ("10", "18", "red", "2x + 10 = 18"))
    assert gives_away(hint, "18", question="Solve it.") and gives_away(hint, "red", question="Solve it.")


@given(st.text(max_size=300), st.text(max_size=40), st.text(max_size=100))
def test_any_texts_can_be_compared(hint: str, gold: str, question: str) -> None:
    assert gives_away(hint, gold, question=question) in (True, False)


def test_long_texts_take_no_longer_than_what_is_looked_at() -> None:
    """Hostile texts: what makes expressions go back and forth."""
    for text in ("the answer is " * 5000, "((((" * 5000, "= " * 10000, "\\frac{" * 5000, "1,000," * 5000, " " * 50000, "x" * 50000):
        for gold in ("A", "red", "7", "x + 1", text):
            assert gives_away(text, gold, question=text) in (True, False)


@pytest.mark.parametrize(
    ("teacher", "problem"),
    [
        (ScriptedTeacher(), ""),
        (ScriptedTeacher(hint="<hint>The answer is gold.</hint>"), ""),  # it knows the form; what it gives away is refused later
        (ScriptedTeacher(hint="Look at\nthe start."), "1 of 1 replies have no <hint> in them; the first one begins 'Look at the start.'"),
        (ScriptedTeacher(hint="<hint> </hint>"), "1 of 1 replies have no <hint> in them; the first one begins '<hint> </hint>'"),
        (ScriptedTeacher(down=True), "no reply came (refused)"),
    ],
)
def test_a_teacher_is_asked_for_a_hint_before_the_run(teacher: ScriptedTeacher, problem: str) -> None:
    question = Question("q", (Message("user", "Why?"),), "gold")
    assert hint_trial(question, teacher, PromptBook(), TeacherSampling(Sampling(max_new_tokens=8)), seed=1) == problem


def run_of_hint(recipe: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hint: str) -> str:
    """Trains with hints that a teacher writes; what is shown."""
    inner = LocalTeacher.complete

    def complete(self: LocalTeacher, requests: Sequence[TeacherRequest], *rest: Any) -> list[TeacherReply]:
        if requests and "Write a hint" in requests[0].messages[-1].content:
            return [TeacherReply((hint,) * len(r.keys), completion_tokens=3) for r in requests]
        return inner(self, requests, *rest)

    AcceleratorState._reset_state(True)
    monkeypatch.setattr(LocalTeacher, "complete", complete)
    capsys.readouterr()
    assert main(["train", str(recipe), "--method=hint", "--train.steps=2", "--data.eval=null", f"--output={output}"]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_hints_train_and_refusals_are_counted_by_right_answer(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run_of_hint(recipe, tmp_path / "good", monkeypatch, capsys, "<hint>Look at the start.</hint>")
    lines = records(tmp_path / "good")
    assert "writes no hints" not in shown and "gave the answer away" not in shown
    assert sum(line.get("hint_prompts", 0) for line in lines) > 0 and all(
        line["hint_leaked_by_gold"] == [] for line in lines if "loss" in line
    )

    shown = run_of_hint(recipe, tmp_path / "leaks", monkeypatch, capsys, "<hint>\\boxed{12}</hint>")
    steps = [line for line in records(tmp_path / "leaks") if "loss" in line]
    leaked = [pair for line in steps for pair in line["hint_leaked_by_gold"]]
    assert leaked and all(line["hint_leaked"] == sum(n for _, n in line["hint_leaked_by_gold"]) == line["hint_failed"] for line in steps)
    totals: dict[str, int] = {}
    for gold, count in leaked:
        totals[gold] = totals.get(gold, 0) + count
    most = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    assert "hints that gave the answer away, by right answer: " + ", ".join(f"{gold!r} {n}" for gold, n in most[:10]) in shown
    (state,) = (tmp_path / "leaks" / "checkpoints").glob("*/state.json")
    assert json.loads(state.read_text(encoding="utf-8"))["totals"]["hint_leaks"] == totals


@pytest.mark.slow
def test_a_run_of_hint_whose_teacher_writes_none_says_what_it_is(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The random teacher of the tests, like those of the lab."""
    AcceleratorState._reset_state(True)
    assert main(["train", str(recipe), "--method=hint", "--train.steps=0", "--data.eval=null", f"--output={tmp_path / 'run'}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "writes no hints: 4 of 4 replies have no <hint> in them" in shown and "so that this run is GRPO\u2020 (grpo-replay)" in shown
