"""Equality of answers: pairs, the traps of other graders, properties, fuzz."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.grading import Grader, units
from zppo.grading.equality import compare, undecided

DATA = Path(__file__).parent / "data"
FUZZ = int(os.environ.get("ZPPO_FUZZ_EXAMPLES", "150"))  # `make fuzz` raises it


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(deadline=30.0) as grader:  # a busy machine must not fail it
        yield grader


@pytest.mark.slow
def test_precision_and_recall_on_labelled_pairs(grader: Grader) -> None:
    rows = json.loads((DATA / "answer_pairs.json").read_text(encoding="utf-8"))
    said = [(row["equal"], grader.equal(row["gold"], row["answer"])) for row in rows]
    right = said.count((True, True))
    assert right / (right + said.count((False, True))) >= 0.98
    assert right / (right + said.count((True, False))) >= 0.93
    assert grader.timeouts == 0


@pytest.mark.slow
def test_rules(grader: Grader) -> None:
    rows = json.loads((DATA / "grading_rules.json").read_text(encoding="utf-8"))
    wrong = [(gold, answer) for gold, answer, equal in rows if grader.equal(gold, answer) is not equal]
    assert wrong == []


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "8=5"),
        ("5", "x=8=5"),
        ("5", "5 or 6"),
        ("5", r"5 \text{ is wrong}"),
        ("cat", "act"),
        ("2e-8", "1e-8"),
        (r"\sqrt{2} \cdot 10^{-8}", r"\sqrt{3} \cdot 10^{-8}"),
        ("12", "1 2"),
        ("5 m", "5 cm"),
        ("1,2", r"\boxed{1}, \boxed{2}"),
        ("None", ""),
        ("", ""),
        ("0", "__import__('os').getpid()*0"),
        ("4", "2+2 # four"),
        ("4", "(lambda: 4)()"),
        ("0xe956", "0xe957"),
        ("16", "0xe957"),
        ("BDAC", "ABDC"),
        ("BDAC", "A, B, C, D"),
    ],
)
def test_traps(grader: Grader, gold: str, answer: str) -> None:
    assert not grader.equal(gold, answer)


def test_scientific_notation_is_a_number(grader: Grader) -> None:
    assert grader.equal("300000", "3e5")


@given(
    st.integers(2, 4000), st.sampled_from([r"\frac{{1}}{{3^{{{0}}}}}", r"1-\frac{{1}}{{{0}!}}", r"10^{{{0}}}+1", r"\sqrt{{10^{{{0}}}+2}}"])
)
@settings(max_examples=15, deadline=None)
def test_exact_numbers_that_no_float_tells_apart(grader: Grader, size: int, form: str) -> None:
    size = min(size, 300) if "!" in form or "sqrt" in form else size  # the root of a number of 4,000 digits takes a minute
    assert not grader.equal(form.format(size), form.format(size + 1))
    assert grader.equal(form.format(size), form.format(size) + "+0")


def test_every_unit_is_known_to_pint_or_has_a_worth_of_its_own_or_none() -> None:
    names = set(units._SHORT.values()) | set(units._LONG.values())
    without = {name for name in names if units._worth(((name, 1),)) is None}
    assert without == names & units._NOT_CONVERTED
    assert units.ratio((("kilometer", 1), ("hour", -1)), (("meter", 1), ("second", -1))) == Fraction(5, 18)


@pytest.mark.parametrize("text", ["9" * 50, "m^99999999", "m" * 61, "kilo" * 10, "eval(1)", "m**9**9", "/".join("m" * 30)])
def test_only_units_of_the_tables_reach_pint(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_registry", lambda: pytest.fail("pint was asked"))
    assert units.canonical_unit(text) in (None, (("meter", -28),))


def test_a_rounded_gold_equals_what_rounds_to_it_by_choice() -> None:
    digits = {r"\frac{\pi}{3}": "1.0471975511965977", "x": None}.get
    assert compare("1.05", r"\frac{\pi}{3}", undecided, digits) is True
    assert compare("1.04", r"\frac{\pi}{3}", undecided, digits) is False
    assert compare("1.05", "x", undecided, digits) is False
    assert compare("1.05", r"\frac{\pi}{3}", undecided) is None  # a worker has to say
    assert compare("0.33", r"\frac13", undecided) is True
    assert compare("0.33", r"\frac13", undecided, rounded_golds=False) is False
    assert compare("1", r"\frac{9}{10}", undecided) is False  # an integer is no rounding
    assert compare("0.33", "0.333", undecided) is False


def test_two_boxes_are_not_a_set(grader: Grader) -> None:
    verdict = grader.grade(r"\boxed{1} and \boxed{2}", "1,2")
    assert (verdict.correct, verdict.answer, verdict.reason) == (False, "2", "different")


def test_no_answer_is_none_and_wrong(grader: Grader) -> None:
    verdict = grader.grade("the answer is None", "None")
    assert (verdict.correct, verdict.answer, verdict.reason, verdict.reward, verdict.graded) == (False, None, "no answer", 0.0, True)
    assert grader.grade(r"\boxed{None}", "None").correct
    assert grader.grade(r"<think>\boxed{5}", "5").answer is None
    assert grader.grade(r"\boxed{5}", "5", think_open=True).answer is None


@pytest.mark.parametrize(("gold", "answer"), [("5", "6"), ("0.5", "1/3"), ("A", "B"), ("Yes", "No"), ("5 cm", "6 cm"), ("cat", "dog")])
def test_types_decide_without_a_worker(gold: str, answer: str) -> None:
    assert compare(gold, answer, undecided) is False


def test_formulas_are_left_to_algebra() -> None:
    asked: list[tuple[str, str]] = []

    def algebra(gold: str, answer: str) -> bool | None:
        asked.append((gold, answer))
        return None

    assert compare("x^2-1", "(x-1)(x+1)", algebra) is None
    assert compare(r"\{1, \sqrt{8}\}", r"\{2\sqrt{2}, 1\}", algebra) is None
    assert compare(r"(1, \sqrt{8})", r"(2, 2\sqrt{2})", algebra) is False  # a part that differs decides
    assert asked[1:] == [(r"\sqrt{8}", r"2\sqrt{2}")]  # parts that types pair off or tell apart are not asked about


@pytest.mark.slow
@given(st.fractions(max_denominator=10_000), st.fractions(max_denominator=10_000))
@settings(max_examples=100, deadline=None)
def test_fractions_are_equal_iff_their_values_are(first: Fraction, second: Fraction) -> None:
    spelled = rf"\frac{{{first.numerator}}}{{{first.denominator}}}"
    assert compare(spelled, f"{second.numerator}/{second.denominator}", undecided) is (first == second)
    assert compare(f"{first.numerator}/{first.denominator}", spelled, undecided) is True


@given(st.integers(-(10**15), 10**15), st.sampled_from(["{:,}", "{}.0", "${}$", "({})", "{} ", "\\text{{{}}}", "+{}", "x = {}", "{} cm"]))
@settings(max_examples=150, deadline=None)
def test_spellings_of_an_integer(number: int, spelling: str) -> None:
    if number >= 0 or spelling != "+{}":
        assert compare(str(number), spelling.format(number), undecided) is True
        assert compare(str(number + 1), spelling.format(number), undecided) is False


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_sets_ignore_order_and_tuples_keep_it(numbers: list[int], random: object) -> None:
    shuffled = sorted(numbers)
    assert compare(r"\{" + ",".join(map(str, numbers)) + r"\}", ", ".join(map(str, shuffled)), undecided) is True
    same = compare("(" + ",".join(map(str, numbers)) + ")", "(" + ", ".join(map(str, shuffled)) + ")", undecided)
    assert same is (numbers == shuffled)


_PIECES = st.sampled_from(
    r"0 1 12 3.5 -2 1,000 2e5 \frac{1}{2} \frac12 / \sqrt{2} √ π \pi x y = < \le ( ) [ ] { } \{ \} , ; ^ _ ^{ + - * ! : . % ° $ \$ cm "
    r"m/s² kg A B C. (D) yes no or and is \text{ } \begin{pmatrix} & \\ \end{pmatrix} \boxed{ \pm \cup \in \infty "
    r"\left \right 元 ½ ² … \ud800".split()
    + [" ", "\x00", "\ud800", "\\", "\u202e", "１"]
)
_ANSWERS = st.one_of(st.lists(_PIECES, max_size=12).map("".join), st.lists(_PIECES, max_size=12).map(" ".join), st.text(max_size=40))


@given(_ANSWERS, _ANSWERS)
@settings(max_examples=FUZZ, deadline=None)
def test_fuzz_rules_never_raise_and_an_answer_equals_itself(gold: str, answer: str) -> None:
    assert compare(gold, answer, undecided) in (True, False, None)
    assert compare(gold, gold, undecided) is bool(gold.strip())


@given(_ANSWERS)
@settings(max_examples=max(FUZZ // 5, 20), deadline=None)
def test_fuzz_whole_way(grader: Grader, answer: str) -> None:
    for gold in ("5", r"\sqrt{2}+x"):
        assert grader.equal(gold, answer) in (True, False)


def test_a_fault_of_the_rules_costs_one_answer_and_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(gold: str, answer: str, *how: object, **settings: object) -> bool:
        raise ValueError("a rule")

    monkeypatch.setattr("zppo.grading.grader.compare", broken)
    verdict = Grader().grade(r"\boxed{5}", "5")
    assert (verdict.correct, verdict.reason, verdict.answer) == (False, "error", "5")
    assert "a rule" in caplog.text
