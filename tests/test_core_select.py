"""Selection of hard questions against Algorithm 1 written out line by line, on random batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.core.draws import draw_key, keyed_random
from zppo.core.reformulate import BinaryCandidateQuestion, Candidate, Material, NegativeCandidateQuestion, Reformulation
from zppo.core.select import hard_groups, next_wave, share_of
from zppo.core.types import BCQ, NCQ, PLAIN, Draft, Group, Message, Prompt, Question, Rollout

Ties = Literal["random", "batch"]
NOTHING = torch.zeros(0)
REFORMULATIONS: dict[str, Reformulation] = {BCQ: BinaryCandidateQuestion(), NCQ: NegativeCandidateQuestion()}
KIND_SETS: list[tuple[str, ...]] = [(BCQ,), (NCQ,), (BCQ, NCQ)]


def group(name: str, right: int, wrong: int, ungraded: int = 0) -> Group:
    question = Question(name, (Message("user", name),), "gold")
    verdicts = [True] * right + [False] * wrong + [None] * ungraded
    rollouts = (
        Rollout(NOTHING, NOTHING, f"{name} rollout {i}", f"answer {i}", v is True, float(v is True), graded=v is not None)
        for i, v in enumerate(verdicts)
    )
    return Group(Prompt(PLAIN, question, question.messages, (1,)), tuple(rollouts))


@dataclass(frozen=True)
class World:
    """A batch and what would come of every question in it: from the teacher, from the wrong rollouts, and in the context window."""

    groups: list[Group]
    teacher_right: list[bool]
    wrong_has_answer: list[bool]
    too_long: list[frozenset[str]]

    def material(self, index: int) -> Material:
        """What the teacher's call on this question brings; `pair` only where T_x and the negatives with an answer are non-empty."""
        asked = self.groups[index]
        wrong = tuple(Candidate(r.text, r.answer, i) for i, r in enumerate(asked.wrong))
        pair = (Candidate(f"{asked.question.id} teacher", "gold", 0), wrong[0]) if wrong else None
        paired = pair if self.teacher_right[index] and self.wrong_has_answer[index] else None
        return Material(asked.question, paired, wrong, ("x",) if self.wrong_has_answer[index] else ())

    def draft(self, index: int, kind: str, seed: int, step: int) -> Draft | None:
        """The reformulated prompt of one kind, None where something is missing or it exceeds the context."""
        if kind in self.too_long[index]:
            return None
        rng = keyed_random(seed, "reformulate", step, self.groups[index].question.id, kind)
        return REFORMULATIONS[kind].draft(self.material(index), rng)


def decode(code: int, index: int) -> tuple[Group, bool, bool, frozenset[str]]:
    """One question of a world from one number, so that hypothesis draws and shrinks quickly."""
    code, right = divmod(code, 9)
    code, ungraded = divmod(code, 7)
    code, long = divmod(code, 5)
    right, ungraded = min(right, 8), max(0, ungraded - 2)  # ungraded 0 three times of seven
    wrong = max(0, 8 - right - ungraded)
    too_long = frozenset([(), (), (), (BCQ,), (BCQ, NCQ)][long])
    return group(f"q{index}", right, wrong, 8 - right - wrong), code % 4 != 0, code % 8 < 6, too_long


@st.composite
def worlds(draw: st.DrawFn) -> World:
    codes = draw(st.lists(st.integers(0, 9 * 7 * 5 * 8 - 1), max_size=24))
    decoded = [decode(code, i) for i, code in enumerate(codes)]
    return World(*(list(part) for part in zip(*decoded, strict=True))) if decoded else World([], [], [], [])


@dataclass(frozen=True)
class Choice:
    """Settings of one selection."""

    threshold: float
    rho: Fraction
    new: int
    kinds: tuple[str, ...]
    ties: Ties
    seed: int
    step: int


choices = st.builds(
    Choice,
    threshold=st.sampled_from([0.5, 0.25, 0.375, 1.0, 0.1]),
    rho=st.builds(Fraction, st.integers(0, 100), st.just(100)),
    new=st.integers(0, 24),
    kinds=st.sampled_from(KIND_SETS),
    ties=st.sampled_from(["random", "batch"]),
    seed=st.integers(0, 3),
    step=st.integers(0, 3),
)


def algorithm_1(world: World, choice: Choice) -> tuple[list[Draft], list[int]]:
    """Lines 4 to 15 of Algorithm 1 to the letter, with method.md's decisions: (instances, questions that the teacher was asked about)."""
    hard: list[tuple[Fraction, int, int]] = []
    for position, g in enumerate(world.groups):  # line 4: the hard set, of questions with enough verdicts
        verdicts = [r.correct for r in g.rollouts if r.graded]
        if verdicts and 2 * len(verdicts) >= len(g.rollouts):
            share = Fraction(sum(verdicts), len(verdicts))
            if share < Fraction(choice.threshold):
                key = draw_key(choice.seed, "ties", choice.step, g.question.id) if choice.ties == "random" else position
                hard.append((share, key, position))
    asked = [position for _, _, position in hard]  # the teacher answers every hard question
    cap = choice.rho * choice.new // 1
    kept = [position for _, _, position in sorted(hard)][:cap]  # line 6: pre-cap
    everything: list[list[Draft]] = []
    for position in kept:  # lines 8 to 10: build
        drafts = [world.draft(position, kind, choice.seed, choice.step) for kind in choice.kinds]
        everything.append([d for d in drafts if d is not None])
    instances: list[Draft] = []
    for built in everything:  # lines 13 to 15: post-cap
        for draft in built:
            if len(instances) < cap:
                instances.append(draft)
    return instances, asked


def fill_slots(
    kept: Sequence[Any], cap: int, build: Callable[[Sequence[Any]], Sequence[Sequence[Any]]], per_question: int, lazy: bool = True
) -> list[Any]:
    """The loop that `Reformulator` runs: waves of the pre-cap until the slots are full, then the post-cap."""
    built: list[Any] = []
    kept = kept[:cap]
    while kept and (size := next_wave(cap - len(built), per_question, lazy=lazy)) != 0:
        wave, kept = kept[:size], kept[size:] if size else ()
        for prompts in build(wave):
            built += prompts
    return built[:cap]


def ours(world: World, choice: Choice, lazy: bool) -> tuple[list[Draft], list[str]]:
    """The same through `hard_groups`, `share_of` and `next_wave`."""
    places = {id(g): i for i, g in enumerate(world.groups)}
    asked: list[str] = []

    def build(wave: Sequence[Group]) -> list[list[Draft]]:
        assert wave, "the teacher is never called about nothing"
        asked.extend(g.question.id for g in wave)
        drafts = [[world.draft(places[id(g)], kind, choice.seed, choice.step) for kind in choice.kinds] for g in wave]
        return [[d for d in row if d is not None] for row in drafts]

    hard = hard_groups(world.groups, choice.threshold, ties=choice.ties, seed=choice.seed, step=choice.step)
    cap = share_of(float(choice.rho), choice.new)
    return fill_slots(hard, cap, build, len(choice.kinds), lazy=lazy), asked


def check(world: World, choice: Choice) -> None:
    expected, expected_asked = algorithm_1(world, choice)
    literal, literal_asked = ours(world, choice, lazy=False)
    lazy, lazy_asked = ours(world, choice, lazy=True)
    assert literal == expected
    assert lazy == expected
    assert lazy_asked == literal_asked[: len(lazy_asked)], "hardest first, each once"
    assert len(lazy_asked) <= len(literal_asked) <= len(expected_asked)
    assert set(literal_asked) <= {world.groups[i].question.id for i in expected_asked}


@pytest.mark.slow
@settings(max_examples=1200, deadline=None)
@given(worlds(), choices)
def test_selection_is_algorithm_1(world: World, choice: Choice) -> None:
    check(world, choice)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(worlds(), choices)
def test_selection_is_algorithm_1_on_many_batches(world: World, choice: Choice) -> None:
    check(world, choice)


@pytest.mark.slow
def test_selection_is_algorithm_1_on_large_batches() -> None:
    """At the size of a real step; half of the questions fail in every rollout, so that the cap is full of ties."""
    for number in range(40):
        rng = keyed_random("large batches", number)
        decoded = [decode(rng.randrange(9 * 7 * 5 * 8) if rng.random() < 0.5 else 9 * 7 * 5 * 5, i) for i in range(96)]
        world = World(*(list(part) for part in zip(*decoded, strict=True)))
        for kinds in KIND_SETS:
            check(world, Choice(0.5, Fraction(1, 4), rng.randrange(24, 97), kinds, "random", 0, number))


def fake_build(gives: dict[int, int], asked: list[int]) -> Callable[[Sequence[int]], list[list[tuple[int, int]]]]:
    """Questions are numbers, and `gives` says how many prompts each yields."""

    def build(wave: Sequence[int]) -> list[list[tuple[int, int]]]:
        asked.extend(wave)
        return [[(q, i) for i in range(gives[q])] for q in wave]

    return build


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 30))
def test_lazy_equals_literal_for_any_number_of_kinds(gives: list[int], cap: int) -> None:
    lazy_asked, literal_asked = list[int](), list[int]()
    table, kept = dict(enumerate(gives)), range(len(gives))
    lazy = fill_slots(kept, cap, fake_build(table, lazy_asked), 3)
    assert lazy == fill_slots(kept, cap, fake_build(table, literal_asked), 3, lazy=False)
    assert len(lazy) == min(cap, sum(gives[:cap]))
    needed = next((n for n in range(len(gives) + 1) if sum(gives[:n]) >= cap), min(cap, len(gives)))
    assert lazy_asked == list(range(min(cap, len(gives)))) or len(lazy_asked) == needed, "no question too many"


def test_lazy_asks_half_as_many_questions_where_all_goes_well() -> None:
    lazy_asked, literal_asked = list[int](), list[int]()
    gives = dict.fromkeys(range(300), 2)
    assert len(fill_slots(range(300), 96, fake_build(gives, lazy_asked), 2)) == 96
    fill_slots(range(300), 96, fake_build(gives, literal_asked), 2, lazy=False)
    assert (len(lazy_asked), len(literal_asked)) == (48, 96)


def test_the_last_free_slot_goes_to_the_first_kind_and_a_freed_slot_to_the_next_question() -> None:
    assert fill_slots([0, 1, 2], 3, fake_build({0: 2, 1: 2, 2: 2}, []), 2) == [(0, 0), (0, 1), (1, 0)]
    assert fill_slots([0, 1, 2], 3, fake_build({0: 0, 1: 1, 2: 2}, []), 2) == [(1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize(("cap", "per_question"), [(0, 2), (5, 0)])
def test_without_slots_or_kinds_nobody_is_asked(cap: int, per_question: int) -> None:
    asked = list[int]()
    assert fill_slots([0, 1], cap, fake_build({0: 2, 1: 2}, asked), per_question) == [] and asked == []


@given(st.integers(0, 400), st.integers(0, 20_000))
def test_share_of_is_the_exact_floor(hundredths: int, count_of_new: int) -> None:
    assert share_of(hundredths / 100, count_of_new) == hundredths * count_of_new // 100


def test_share_of_where_floats_fall_short() -> None:
    assert 0.29 * 100 < 29 and share_of(0.29, 100) == 29
    assert share_of(0.25, 384) == 96 and share_of(0.25, 383) == 95 and share_of(1 / 3, 3) == 1


def test_hard_is_below_the_threshold_and_needs_half_of_the_verdicts() -> None:
    at, below, unknown, half = (group("at", 4, 4), group("below", 3, 5), group("unknown", 0, 3, 5), group("half", 0, 4, 4))
    silent = group("silent", 0, 0, 8)
    assert hard_groups([at, below, unknown, half, silent], 0.5, ties="batch") == [half, below]


def test_batch_ties_keep_batch_order() -> None:
    groups = [group(f"q{i}", i % 2, 8 - i % 2) for i in range(20)]
    assert [g.question.id for g in hard_groups(groups, 0.5, ties="batch")] == [f"q{i}" for i in [*range(0, 20, 2), *range(1, 20, 2)]]


@given(st.permutations(range(12)), st.integers(0, 5), st.integers(0, 5))
def test_random_ties_do_not_depend_on_batch_order(order: list[int], seed: int, step: int) -> None:
    groups = [group(f"q{i}", i % 3, 8 - i % 3) for i in range(12)]
    expected = hard_groups(groups, 0.5, seed=seed, step=step)
    assert hard_groups([groups[i] for i in order], 0.5, seed=seed, step=step) == expected
    assert [g.accuracy for g in expected] == sorted(g.accuracy for g in groups)


def test_random_ties_favour_nobody() -> None:
    """Replayed questions stand last in the batch; over many steps each of 8 gets one of the two slots a quarter of the time."""
    groups = [group(f"q{i}", 0, 8) for i in range(8)]
    firsts = dict.fromkeys((g.question.id for g in groups), 0)
    steps = 1600
    for step in range(steps):
        for g in hard_groups(groups, 0.5, step=step)[:2]:
            firsts[g.question.id] += 1
    expected = steps / 4
    assert sum((n - expected) ** 2 / (expected * 0.75) for n in firsts.values()) < 7 + 7 * 14**0.5 + 10
