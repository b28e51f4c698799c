"""The zone: hard questions, teacher, compression and reformulated prompts, with a teacher and a student that follow a script."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokenizer
from zppo.config.methods import METHODS, Method
from zppo.config.settings import Settings, ZoneSettings
from zppo.core.select import hard_groups, share_of
from zppo.core.types import Group, ImageRef, Message, Prompt, Question, Rollout
from zppo.engines.base import Sampling
from zppo.grading import extract_boxed
from zppo.grading.grader import Verdict
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.reformulated import CandidateMaker, Reformulator, make_reformulations, make_reformulator
from zppo.rollout.student import Answered, PromptRenderer
from zppo.rollout.teacher import Pools, TeacherSampler
from zppo.step_log import StepLog
from zppo.teacher.compression import Compressor
from zppo.teacher.interface import Teacher, TeacherReply, TeacherRequest, TeacherSampling


class Words:
    """A chat whose tokens are the words of the last turn."""

    special_texts = ()

    def encode(self, messages: Sequence[Message], images: Sequence[ImageRef] = ()) -> tuple[int, ...]:
        return tuple(range(len(messages[-1].content.split())))

    def think_open(self, ids: Sequence[int]) -> bool:
        return False


@dataclass
class ScriptedTeacher:
    """Answers each question right with a fixed set of draws, compresses by copying the box; `down` fails every call."""

    solves: dict[str, int] = field(default_factory=dict)
    down: bool = False
    hint: str = "<hint>look at the start</hint>"
    hinted: int = 0
    rollouts: list[str] = field(default_factory=list)

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        return [self._reply(request) for request in requests]

    def _reply(self, request: TeacherRequest) -> TeacherReply:
        if self.down:
            return TeacherReply((None,) * len(request.keys), error="refused")
        text = request.messages[-1].content
        if "Write a hint" in text:
            self.hinted += 1
            return TeacherReply((self.hint,))
        if "<response>" in text:
            box = extract_boxed(text.rsplit("<response>", 1)[1])
            return TeacherReply(
                (f"<summary>short \\boxed{{{box}}}</summary>" if box else "<summary>short: nothing found</summary>",), completion_tokens=3
            )
        name = text.split()[0]
        self.rollouts.append(name)
        right = self.solves.get(name, 0)
        return TeacherReply(tuple(f"so \\boxed{{{'gold' if i < right else 'bad'}}}" for i in range(len(request.keys))))


def score(answered: Sequence[Answered], log: StepLog) -> list[Verdict]:
    verdicts = []
    for a in answered:
        answer = extract_boxed(a.completion)
        verdicts.append(Verdict(answer == a.question.gold, answer, "test", float(answer == a.question.gold)))
    return verdicts


def make_group(name: str, right: int, wrong: int, answerless: int = 0) -> Group:
    question = Question(name, (Message("user", f"{name} asks something"),), "gold")
    texts = ["\\boxed{gold}"] * right + [f"\\boxed{{wrong{i % 2}}}" for i in range(wrong)] + ["nothing"] * answerless
    rollouts = tuple(
        Rollout(torch.tensor([1]), torch.zeros(1), t, extract_boxed(t), t == "\\boxed{gold}", float(t == "\\boxed{gold}")) for t in texts
    )
    return Group(PromptRenderer(PromptBook(), Words()).plain(question), rollouts)  # type: ignore[arg-type]


def make_builder(
    teacher: ScriptedTeacher,
    *others: ScriptedTeacher,
    method: Method = METHODS["zppo"],
    context: int | None = None,
    lazy: bool = True,
    rho_aug: float = 1.0,
) -> Builder:
    how = TeacherSampling(Sampling(max_new_tokens=16))
    book = PromptBook(neutralise=Neutraliser())
    renderer = PromptRenderer(book, Words())  # type: ignore[arg-type]
    reformulations = make_reformulations(method)
    candidates = CandidateMaker(
        frozenset(need for r in reformulations for need in r.needs),
        compressor=Compressor(teacher, book, how, lambda text: text),
        teacher=teacher,
        hint=how,
        book=book,
        response_ids=lambda source: tuple(range(len(source.text))),
        seed=3,
    )
    settings = Settings(
        method=method.name,
        seed=3,
        student={"model": "-"},
        teacher={"model": "-", "ask": "lazy" if lazy else "all"},
        data={"train": "-"},
        rollout={"max_new_tokens": 16},
        zone={"rho_aug": rho_aug},
    )
    sampler = TeacherSampler([(t, how) for t in (teacher, *others)], renderer, score, group_size=4, seed=3)
    return Builder(settings, Reformulator(settings, reformulations, sampler, candidates, renderer, context))


@dataclass
class Asked:
    """What a step asks again, and what it counted."""

    prompts: list[Prompt]
    pools: Pools
    metrics: dict[str, float | None]


@dataclass
class Builder:
    """From plain groups to reformulated prompts."""

    settings: Settings
    reformulator: Reformulator

    def build(self, plain: Sequence[Group], new: int, step: int) -> Asked:
        zone, log = self.settings.zone, StepLog(step)
        hard = hard_groups(plain, zone.threshold, ties=zone.ties, seed=3, step=step)
        made = self.reformulator.reformulate(hard, share_of(zone.rho_aug, new), log)
        return Asked(made.prompts, made.responses, log.counts)


def names(zone: Asked) -> list[tuple[str, str]]:
    return [(p.question.id, p.kind) for p in zone.prompts]


def test_hardest_first_bcq_before_ncq_until_the_cap() -> None:
    plain = [make_group("easy", 5, 3), make_group("middle", 3, 5), make_group("hard", 0, 8), make_group("unsolved", 1, 7)]
    zone = make_builder(ScriptedTeacher({"hard": 1, "middle": 4}), rho_aug=1.0).build(plain, 4, step=1)
    assert names(zone) == [("hard", "bcq"), ("hard", "ncq"), ("unsolved", "ncq"), ("middle", "bcq")]
    assert zone.metrics["hard_questions"] == 3
    assert zone.metrics["teacher_solved_none"] == 1


def test_a_bcq_shows_one_right_and_one_wrong_summary_and_an_ncq_all_wrong_ones() -> None:
    zone = make_builder(ScriptedTeacher({"hard": 4})).build([make_group("hard", 1, 3)], 2, step=1)
    bcq, ncq = (p.messages[-1].content for p in zone.prompts)
    assert bcq.count("<candidate>") == 2 and bcq.count("short \\boxed{gold}") == 1 and bcq.count("short \\boxed{wrong") == 1
    assert ncq.count("<candidate>") == 3 and "gold" not in ncq
    assert ncq.index("\\boxed{wrong0}") < ncq.index("\\boxed{wrong1}") < ncq.index("<candidate>")


def test_a_student_that_does_not_box_its_answers_yet_sees_the_teacher_all_the_same() -> None:
    """The wrong candidate is drawn from all of W_x where none of it has an answer, and from the answered ones where one has."""
    zone = make_builder(ScriptedTeacher({"hard": 4})).build([make_group("hard", 0, 0, answerless=4)], 2, step=1)
    assert names(zone) == [("hard", "bcq"), ("hard", "ncq")]
    assert zone.metrics["bcq_without_negative"] == 1 and zone.metrics["bcq_raw_pairs"] == 0
    bcq, ncq = zone.prompts
    texts = bcq.messages[-1].content.split("<candidate>")[1:]
    assert [text.split("</candidate>")[0].strip() for text in texts] == (
        ["short \\boxed{gold}", "short: nothing found"] if bcq.audit["correct_at"] == 0 else ["short: nothing found", "short \\boxed{gold}"]
    )
    assert bcq.audit["positive_answer"] == "gold" and bcq.audit["negative_answer"] is None
    assert "\\boxed{wrong" not in ncq.messages[-1].content
    for step in range(8):
        one = make_builder(ScriptedTeacher({"hard": 4})).build([make_group("hard", 0, 1, answerless=7)], 2, step=step)
        assert one.prompts[0].audit["negative_answer"] == "wrong0" and one.metrics["bcq_without_negative"] == 0


def test_right_responses_without_an_answer_are_shown_where_there_are_no_others() -> None:
    """A judge, or a reward function of one's own, may find right what has no box."""
    builder = make_builder(ScriptedTeacher({"hard": 4}))
    builder.reformulator.teacher_sampler.score = lambda answered, log: [Verdict(True, None, "judge correct", 1.0) for _ in answered]
    zone = builder.build([make_group("hard", 0, 4)], 2, step=1)
    assert names(zone) == [("hard", "bcq"), ("hard", "ncq")]
    assert zone.prompts[0].audit["positive_answer"] is None and zone.metrics["bcq_without_negative"] == 0


def test_a_teacher_that_is_down_costs_bcq_and_compression_only() -> None:
    zone = make_builder(ScriptedTeacher(down=True)).build([make_group("hard", 0, 3)], 4, step=1)
    assert names(zone) == [("hard", "ncq")]
    assert zone.metrics["teacher_unreachable"] == 4
    assert zone.metrics["compression_unreachable"] == 2  # two distinct completions
    assert zone.metrics["ncq_raw_candidates"] == 3


def test_a_prompt_over_the_context_gives_its_slot_to_the_next() -> None:
    plain = [make_group("long", 0, 8), make_group("short", 1, 2)]
    room = len(make_builder(ScriptedTeacher(), method=METHODS["grpo-replay-ncq"]).build([plain[1]], 1, step=1).prompts[0].ids) + 16
    zone = make_builder(ScriptedTeacher(), method=METHODS["grpo-replay-ncq"], context=room, rho_aug=0.5).build(
        [*plain, plain[0]], 3, step=1
    )
    assert zone.prompts == []  # the pre-cap keeps one question, the hardest
    zone = make_builder(ScriptedTeacher(), method=METHODS["grpo-replay-ncq"], context=room).build(plain, 2, step=1)
    assert names(zone) == [("short", "ncq")]
    assert zone.metrics["too_long"] == 1


def test_without_reformulations_nobody_is_asked() -> None:
    teacher = ScriptedTeacher()
    assert make_builder(teacher, method=METHODS["grpo"]).build([make_group("hard", 0, 8)], 4, step=1).prompts == []
    assert teacher.rollouts == []


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), rho=st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_the_lazy_teacher_gives_the_same_prompts_for_fewer_calls(seed: int, count: int, rho: float) -> None:
    rng = random.Random(seed)
    plain = []
    for i in range(count):
        right = rng.choice([0, 0, 0, 1, 2, 3])
        answerless = rng.choice([0, 0, 4 - right])
        plain.append(make_group(f"q{i}", right, 4 - right - answerless, answerless))
    solves = {f"q{i}": rng.choice([0, 1, 4]) for i in range(count)}
    lazy, literal = ScriptedTeacher(solves), ScriptedTeacher(solves)
    context = rng.choice([None, 120])
    asked_lazily = make_builder(lazy, rho_aug=rho, context=context).build(plain, count, step=seed)
    asked_all = make_builder(literal, rho_aug=rho, context=context, lazy=False).build(plain, count, step=seed)
    assert [(p.kind, p.messages, p.audit) for p in asked_lazily.prompts] == [(p.kind, p.messages, p.audit) for p in asked_all.prompts]
    assert set(lazy.rollouts) <= set(literal.rollouts)
    assert len(literal.rollouts) == sum(g.accuracy < 0.5 for g in plain)


def test_a_hint_never_gives_the_answer_away() -> None:
    plain = [make_group("hard", 0, 4)]
    good = make_builder(ScriptedTeacher({"hard": 4}), method=METHODS["hint"]).build(plain, 2, step=1)
    assert names(good) == [("hard", "hint")]
    assert "<hint>\nlook at the start\n</hint>" in good.prompts[0].messages[-1].content
    for reply in ("<hint>it is Gold.</hint>", "<hint>\\boxed{x}</hint>", "<hint> </hint>", "no tags"):
        teacher = ScriptedTeacher({"hard": 4}, hint=reply)
        told = make_builder(teacher, method=METHODS["hint"]).build(plain, 2, step=1)
        assert told.prompts == [] and told.metrics["hint_failed"] == teacher.hinted == 1  # four equal responses: one try
        leaked = reply in ("<hint>it is Gold.</hint>", "<hint>\\boxed{x}</hint>")
        assert told.metrics["hint_leaked"] == leaked and ("hint_leaked of gold" in told.metrics) == leaked


def test_a_prefix_forces_two_fifths_of_a_correct_response() -> None:
    zone = make_builder(ScriptedTeacher({"hard": 1}), method=METHODS["prefix"]).build([make_group("hard", 0, 4)], 2, step=1)
    (prompt,) = zone.prompts
    assert prompt.kind == "prefix" and prompt.forced_ids == tuple(range(int(0.4 * len("so \\boxed{gold}"))))
    assert prompt.messages == make_group("hard", 0, 4).prompt.messages


def test_the_placebo_asks_the_plain_question_as_often() -> None:
    plain = [make_group("a", 0, 4), make_group("b", 1, 3), make_group("c", 0, 0, answerless=4)]
    solves = {"a": 1, "b": 0, "c": 4}
    real = make_builder(ScriptedTeacher(solves)).build(plain, 6, step=1)
    placebo = make_builder(ScriptedTeacher(solves), method=METHODS["zppo-placebo"]).build(plain, 6, step=1)
    assert names(placebo) == [(q, f"placebo-{kind}") for q, kind in names(real)]
    by_question = {g.question.id: g.prompt.messages for g in plain}
    assert all(p.messages == by_question[p.question.id] for p in placebo.prompts)


def test_the_scrambled_control_shows_another_question_s_candidates() -> None:
    solves = {"a": 1, "b": 1}
    plain = [make_group("a", 0, 4), make_group("b", 1, 3)]
    zone = make_builder(ScriptedTeacher(solves), method=METHODS["zppo-scrambled"]).build(plain, 4, step=1)
    assert [p.audit["scrambled"] for p in zone.prompts] == ["b", "b", "a", "a"]
    alone = make_builder(ScriptedTeacher(solves), method=METHODS["zppo-scrambled"]).build(plain[:1], 4, step=1)
    assert alone.prompts == []


def test_teacher_response_asks_about_every_hard_question() -> None:
    plain = [make_group(f"q{i}", i, 4 - i) for i in range(4)]
    teacher = ScriptedTeacher({"q0": 2, "q1": 0})
    zone = make_builder(teacher, method=METHODS["teacher-response"], rho_aug=0.25).build(plain, 4, step=1)
    assert zone.prompts == [] and teacher.rollouts == ["q0", "q1"]
    assert {q: len(pool) for q, pool in zone.pools.items()} == {"q0": 2, "q1": 0}


def test_a_second_teacher_helps_where_the_first_one_fails() -> None:
    plain = [make_group("hard", 0, 4)]
    assert names(make_builder(ScriptedTeacher()).build(plain, 4, step=1)) == [("hard", "ncq")]
    assert names(make_builder(ScriptedTeacher(), ScriptedTeacher({"hard": 1})).build(plain, 4, step=1)) == [
        ("hard", "bcq"),
        ("hard", "ncq"),
    ]


@pytest.mark.parametrize("duplicates", ["shown", "counted"])
def test_ncq_shows_equal_candidates_as_often_as_the_recipe_says(duplicates: str) -> None:
    """Five wrong rollouts of two kinds: all of them as in the paper, or each kind with its number."""
    builder = make_builder(ScriptedTeacher(), method=METHODS["grpo-replay-ncq"])
    before = builder.reformulator
    settings = builder.settings.model_copy(update={"zone": ZoneSettings(rho_aug=1.0, ncq_duplicates=duplicates)})
    before.renderer.chat.tokenizer = make_tokenizer()
    builder.reformulator = make_reformulator(
        settings, before.reformulations, [cast(Teacher, before.candidates.teacher)], before.renderer, before.teacher_sampler, None
    )
    (prompt,) = builder.build([make_group("hard", 0, 5)], 1, step=1).prompts
    text = prompt.messages[-1].content
    assert text.count("<candidate>") == text.count("</candidate>") == (5 if duplicates == "shown" else 2)
    assert [n in text for n in ("(3 attempts were like this one.)", "(2 attempts were like this one.)")] == [duplicates == "counted"] * 2
