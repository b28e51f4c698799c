"""BCQ and NCQ drafts: what they show, and that nothing shown says which candidate is right."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.core.draws import keyed_random
from zppo.core.reformulate import BinaryCandidateQuestion, Candidate, Material, NegativeCandidateQuestion, Reformulation, distinct_answers
from zppo.core.types import Message, Question

QUESTION = Question("q", (Message("user", "1+1?"),), "2")
RIGHT, WRONG = Candidate("one and one are 2", "2", 3), Candidate("one and one are 3", "3", 0)


@pytest.mark.parametrize(
    ("reformulation", "kind", "needs"), [(BinaryCandidateQuestion(), "bcq", {"pair"}), (NegativeCandidateQuestion(), "ncq", {"wrong"})]
)
def test_kind_and_needs(reformulation: Reformulation, kind: str, needs: set[str]) -> None:
    draft = reformulation.draft(Material(QUESTION, (RIGHT, WRONG), (WRONG,), ("3",)), random.Random(0))
    assert reformulation.kind == kind and reformulation.needs == needs
    assert draft is not None and draft.kind == kind and draft.question is QUESTION and draft.forced_ids == ()


def test_bcq_shows_both_texts_and_nothing_else() -> None:
    for seed in range(20):
        draft = BinaryCandidateQuestion().draft(Material(QUESTION, (RIGHT, WRONG)), random.Random(seed))
        assert draft is not None
        candidates = draft.slots["candidates"]
        assert set(draft.slots) == {"candidates"} and set(candidates) == {RIGHT.text, WRONG.text}
        assert candidates[draft.audit["correct_at"]] == RIGHT.text
        assert (draft.audit["positive_answer"], draft.audit["negative_answer"]) == ("2", "3")


def test_bcq_order_says_nothing() -> None:
    """The right candidate stands first half of the time, and the draw does not look at the texts."""
    first = 0
    for seed in range(2000):
        rng = keyed_random(0, "reformulate", 1, f"q{seed}", "bcq")
        state = rng.getstate()
        draft = BinaryCandidateQuestion().draft(Material(QUESTION, (RIGHT, WRONG)), rng)
        rng.setstate(state)
        swapped = BinaryCandidateQuestion().draft(Material(QUESTION, (WRONG, RIGHT)), rng)
        assert draft is not None and swapped is not None
        assert draft.audit["correct_at"] == swapped.audit["correct_at"]
        assert draft.slots["candidates"] == swapped.slots["candidates"][::-1]
        first += draft.audit["correct_at"] == 0
    assert abs(first - 1000) < 5 * (2000 * 0.25) ** 0.5


def test_no_pair_no_bcq() -> None:
    assert BinaryCandidateQuestion().draft(Material(QUESTION, None, (WRONG,), ("3",)), random.Random(0)) is None


def test_ncq_shows_all_wrong_candidates_in_order_and_nothing_of_the_teacher() -> None:
    wrong = (WRONG, Candidate("4?", "4", 1), WRONG)
    with_pair = NegativeCandidateQuestion().draft(Material(QUESTION, (RIGHT, WRONG), wrong, ("3", "4")), random.Random(0))
    without = NegativeCandidateQuestion().draft(Material(QUESTION, None, wrong, ("3", "4")), random.Random(1))
    assert with_pair is not None and with_pair == without
    assert with_pair.slots == {"answers": ("3", "4"), "candidates": (WRONG.text, "4?", WRONG.text)}
    assert with_pair.audit == {"wrong_answers": ("3", "4")}


def test_ncq_can_show_equal_candidates_once_with_their_number() -> None:
    wrong = (WRONG, Candidate("4?", "4", 1), WRONG, Candidate(WRONG.text, None, 3))
    material = Material(QUESTION, None, wrong, ("3", "4"), count_duplicates=True)
    draft = NegativeCandidateQuestion().draft(material, random.Random(0))
    assert draft is not None
    assert draft.slots == {"answers": ("3", "4"), "candidates": (WRONG.text, "4?"), "counts": (3, 1)}
    assert draft.audit == {"wrong_answers": ("3", "4")}


def test_ncq_logs_what_the_teacher_answered_and_shows_none_of_it() -> None:
    without = NegativeCandidateQuestion().draft(Material(QUESTION, None, (WRONG,), ("3",)), random.Random(0))
    for answers in ((), ("2", "two")):
        draft = NegativeCandidateQuestion().draft(Material(QUESTION, None, (WRONG,), ("3",), teacher_answers=answers), random.Random(0))
        assert draft is not None and without is not None and draft.slots == without.slots
        assert draft.audit == {"wrong_answers": ("3",), "teacher_answers": answers} and "teacher_answers" not in without.audit


def test_no_wrong_rollout_no_ncq_but_an_empty_list_of_answers_will_do() -> None:
    assert NegativeCandidateQuestion().draft(Material(QUESTION, (RIGHT, WRONG)), random.Random(0)) is None
    draft = NegativeCandidateQuestion().draft(Material(QUESTION, None, (Candidate("hm", None, 0),)), random.Random(0))
    assert draft is not None and draft.slots["answers"] == ()


@given(st.lists(st.one_of(st.none(), st.sampled_from(["A", "a", "B", " b", "C", "None"])), max_size=10))
def test_distinct_answers_keep_first_form_and_order(answers: list[str | None]) -> None:
    def normal(answer: str | None) -> str:
        return (answer or "").strip().lower()

    expected: list[str] = []
    for answer in answers:
        if answer is not None and normal(answer) != "c" and normal(answer) not in map(normal, expected):
            expected.append(answer)
    assert distinct_answers([(a, normal(a)) for a in answers], "c") == tuple(expected)
