"""Several right answers, and what bounds the time of hostile ones: counted work, no clock."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.config.settings import Settings
from zppo.core.types import Golds, Message, Question
from zppo.grading import Grader, same_words
from zppo.grading.golds import bare_items
from zppo.grading.grader import TimeOuts
from zppo.rollout.grading import Scorer, rule_grading
from zppo.rollout.student import Answered
from zppo.step_log import StepLog


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(deadline=30.0) as grader:  # a busy machine must not fail it
        yield grader


def right(grader: Grader, gold: Golds, answer: str) -> bool:
    return grader.grade(f"\\boxed{{{answer}}}", gold).correct


ANY = Golds("any", ("Paris", "the city on the Seine", r"x^2-1"))
SET = Golds("set", ("3", r"\frac12", "x+1"))
ORDERED = Golds("ordered", ("68", "27", "20"))


@pytest.mark.parametrize(
    ("gold", "answer", "wanted"),
    [
        (ANY, "paris", True),
        (ANY, "The city on the Seine", True),
        (ANY, "(x-1)(x+1)", True),  # by algebra
        (ANY, "Lyon", False),
        (ANY, "(x-1)(x+2)", False),
        (ANY, "Paris or Lyon", False),
        (Golds("any", ("5", "6")), "5 or 6", False),  # a hedge
        (Golds("any", ("5", "6")), r"\{5, 6\}", False),
        (SET, r"0.5, 3, 1+x", True),
        (SET, r"\{1 + x, 3, \frac{1}{2}\}", True),
        (SET, r"x + 1, 3 \text{ and } 1/2", True),
        (SET, "3, 1/2", False),
        (SET, "3, 1/2, x+1, 4", False),
        (SET, "3, 3, 1/2", False),
        (SET, "3", False),
        (SET, "(3, 1/2, x+1)", False),  # a point is no set
        (Golds("set", ("A", "C")), "CA", True),
        (Golds("set", ("A", "C")), "C and A", True),
        (Golds("set", ("A", "C")), "A", False),
        (Golds("set", ("(1,2)", "(3,4)")), "(3,4), (1,2)", True),
        (Golds("set", ("(1,2)", "(3,4)")), "(4,3), (1,2)", False),
        (Golds("set", ("x^2-1", "x^2-4")), "(x-2)(x+2), (x-1)(x+1)", True),
        (Golds("set", ("1", "-1")), r"\pm 1", True),
        (Golds("set", ("red", "light blue")), "light blue and red", True),
        (ORDERED, "68, 27, 20", True),
        (ORDERED, "(68, 27, 20)", True),
        (ORDERED, "[68, 27, 20]", True),
        (ORDERED, "68, 27 and 20", True),
        (ORDERED, "20, 27, 68", False),
        (ORDERED, r"\{68, 27, 20\}", False),  # a set has no order
        (ORDERED, "68, 27", False),
        (ORDERED, "68, 27, 20, 5", False),
        (Golds("ordered", ("3", "5")), "[3, 5]", True),
        (Golds("ordered", ("3", "5")), "[3, 5)", False),
        (Golds("ordered", ("B", "D", "A")), "BDA", True),
        (Golds("ordered", ("B", "D", "A")), "ABD", False),
        (Golds("ordered", ("x^2-1", "2")), "(x-1)(x+1), 2", True),
        (Golds("set", tuple(map(str, range(40)))), ", ".join(map(str, range(39, -1, -1))), True),  # more than is paired off: by words
        (Golds("ordered", tuple(map(str, range(40)))), ", ".join(map(str, range(39, -1, -1))), False),
    ],
)
def test_any_set_and_ordered(grader: Grader, gold: Golds, answer: str, wanted: bool) -> None:
    assert right(grader, gold, answer) is wanted


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=8, unique=True), st.randoms(use_true_random=False))
def test_a_set_has_no_order_and_an_order_is_kept(numbers: list[int], random: Any) -> None:
    golds = tuple(map(str, numbers))
    shuffled = random.sample(golds, len(golds))
    answer = ", ".join(shuffled)
    grader = Grader()  # no worker is needed
    assert right(grader, Golds("set", golds), answer)
    assert right(grader, Golds("ordered", golds), answer) is (shuffled == list(golds))
    assert not right(grader, Golds("any", golds), answer)
    assert all(right(grader, Golds("any", golds), one) for one in golds)


def test_the_very_words_of_several() -> None:
    assert same_words("\\text{Paris}", "paris") and not same_words("Paris", "the city Paris")
    assert same_words(Golds("any", ("Rome", "Paris")), "paris") and not same_words(Golds("any", ("1", "2")), "1, 2")
    assert same_words(Golds("set", ("red", "Blue")), "blue, Red") and not same_words(Golds("set", ("red", "blue")), "red")
    assert same_words(Golds("ordered", ("red", "blue")), "red, blue") and not same_words(Golds("ordered", ("red", "blue")), "blue, red")


@pytest.mark.parametrize(
    ("gold", "items"),
    [("68, 27, 20", ("68", "27", "20")), ("1,234", ("1,234",)), ("(1, 2)", ("(1, 2)",)), ("[3, 5)", ("[3, 5)",)), ("5", ("5",))],
)
def test_only_a_bare_list_has_items(gold: str, items: tuple[str, ...]) -> None:
    assert bare_items(gold) == items


@pytest.mark.parametrize(("gold", "answer"), [(r"\{,\}", "5"), ("5", r"\{,\}"), (r"\{,\}", "1,2"), ("1,2", r"\{,\}"), (r"\{;\}", r"(1,2)")])
def test_a_set_of_nothing_but_commas_is_no_fault(grader: Grader, caplog: pytest.LogCaptureFixture, gold: str, answer: str) -> None:
    with caplog.at_level(logging.ERROR):
        assert grader.grade(f"\\boxed{{{answer}}}", gold).reason == "different"
    assert not caplog.records


# --- time-outs ------------------------------------------------------------------------------------------------------


class Pool:
    """In the place of the workers: towers of powers time out, everything else is equal; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []
        self.asked: list[tuple[str, str]] = []

    def compare(self, pairs: Sequence[tuple[str, str]], part: float = 1.0) -> list[str]:
        self.calls.append((len(pairs), part))
        self.asked += pairs
        return ["timeout" if "^{9" in answer else "equal" for _, answer in pairs]


def counted(workers: int = 1) -> tuple[Grader, Pool]:
    grader, pool = Grader(workers=workers), Pool()
    grader._pool = pool  # type: ignore[assignment]
    return grader, pool


def hostile(*numbers: int) -> list[str]:
    return [f"\\boxed{{{n}^{{9^{{9}}}}+x}}" for n in numbers]


HONEST = [f"\\boxed{{(x+{n})(x-{n})}}" for n in range(1, 40)]
GOLD = "x^2+7"


def test_a_group_s_hostile_answers_cost_two_deadlines() -> None:
    grader, pool = counted()
    spent = TimeOuts()
    verdicts = grader.grade_many([(text, GOLD) for text in hostile(*range(2, 66))], spent=spent)
    assert [v.reason for v in verdicts] == ["timeout"] * 64 and len(pool.asked) == 2
    assert (spent.total, spent.untried, grader.timeouts) == (2, 62, 64)


def test_honest_answers_of_other_groups_are_tried_in_full() -> None:
    grader, pool = counted()
    items = [(text, GOLD) for text in hostile(2, 3, 4, 5)] + [(text, "x^2+8") for text in HONEST]
    reasons = [v.reason for v in grader.grade_many(items)]
    assert reasons == ["timeout"] * 4 + ["equal"] * len(HONEST)
    assert {part for _, part in pool.calls} == {1.0}
    # Of one group, those that come before it has had its time.
    before = [(HONEST[0], GOLD), *((text, GOLD) for text in hostile(2, 3, 4)), (HONEST[1], GOLD), ("\\boxed{x^2+7}", GOLD)]
    assert [v.reason for v in grader.grade_many(before)] == ["equal", "timeout", "timeout", "timeout", "timeout", "equal"]


def test_what_is_tried_does_not_depend_on_the_calls() -> None:
    """Rollouts are graded while others are sampled, in calls that depend on the machine; the step's time-outs go through them."""
    texts = [HONEST[0], *hostile(2), *HONEST[1:3], *hostile(3), HONEST[3], *hostile(4), HONEST[4]]
    items = [(text, gold) for text in texts for gold in (GOLD, "x^2+8")]
    found = []
    for size in (1, 2, 3, 5, len(items)):
        grader, _ = counted()
        spent = TimeOuts()
        found.append([v.reason for at in range(0, len(items), size) for v in grader.grade_many(items[at : at + size], spent=spent)])
        assert (spent.total, spent.untried) == (4, 6)
    assert all(reasons == found[0] for reasons in found) and found[0].count("equal") == 6


def test_nor_on_what_is_remembered() -> None:
    """A resumed run remembers nothing of earlier steps."""
    texts = [(text, GOLD) for text in (*hostile(2, 3), HONEST[0], *hostile(4))]
    grader, pool = counted()
    grader.grade_many([(HONEST[0], GOLD), *((text, GOLD) for text in hostile(2))])
    asked = len(pool.asked)
    remembering = [v.reason for v in grader.grade_many(texts)]
    assert len(pool.asked) == asked + 1  # the second tower alone
    assert remembering == [v.reason for v in counted()[0].grade_many(texts)] == ["timeout"] * 4


@pytest.mark.parametrize("workers", [1, 3])
def test_hostile_answers_of_many_groups_soon_get_little_time(workers: int) -> None:
    grader, pool = counted(workers)
    groups = range(100)
    items = [(text, f"x^2+{group}") for group in groups for text in hostile(2, 3, 4)]
    reasons = [v.reason for v in grader.grade_many(items)]
    assert reasons == ["timeout"] * 300
    full = sum(count for count, part in pool.calls if part == 1.0)
    assert full == 8 * workers and len(pool.asked) - full <= 100
    # An honest answer of yet another group is still tried, and what had little time is not remembered.
    spent = TimeOuts({"others": 8 * workers})
    assert grader.grade_many([(HONEST[0], "x^2+999")], spent=spent)[0].correct
    asked = len(pool.asked)
    grader.grade_many([(items[-3][0], items[-3][1])])
    assert len(pool.asked) == asked + 1


def test_several_golds_do_not_multiply_the_time() -> None:
    grader, pool = counted()
    gold = Golds("any", tuple(f"x^2+{n}" for n in range(1, 20)))
    grader.grade_many([(text, gold) for text in hostile(*range(2, 12))])
    assert len(pool.asked) == 2
    grader, pool = counted()
    gold = Golds("set", tuple(f"x^2+{n}" for n in range(1, 20)))
    answer = ", ".join(f"{n}^{{9^{{9}}}}+x" for n in range(2, 21))
    assert grader.grade(f"\\boxed{{{answer}}}", gold).reason == "timeout" and len(pool.asked) == 2


def test_groups_of_a_step_have_time_of_their_own_and_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rollouts that spend it take nothing from the teacher's responses to the same question."""
    pool = Pool()
    pool.close = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr("zppo.grading.grader.WorkerPool", lambda *_: pool)
    question = Question("q", (Message("user", "?"),), GOLD)
    settings = Settings.model_validate({"student": {"model": "s"}, "data": {"train": "none.jsonl"}, "method": "grpo"})
    log = StepLog(1)
    with rule_grading(settings) as rule:
        score = Scorer(rule)
        score([Answered(question, text, False, "plain") for text in hostile(2, 3, 4)], log)
        assert score([Answered(question, HONEST[0], False, "teacher")], log)[0].correct
        assert not score([Answered(question, HONEST[1], False, "plain")], log)[0].correct
        assert log.own == {"graded_answers": 5, "grading_untried": 2}
        assert score([Answered(question, HONEST[1], False, "plain")], StepLog(2))[0].correct  # another step
