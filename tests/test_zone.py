"""The zone: hard questions, teacher, compression and reformulated prompts, with a teacher and a student that follow a script."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from zppo.core.types import Group, Message, Question, Rollout
from zppo.engines.base import Sampling
from zppo.grading import extract_boxed
from zppo.grading.base import Verdict
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.teacher.base import TeacherReply, TeacherRequest, TeacherSampling
from zppo.teacher.compress import Compressor
from zppo.train.rollouts import Answered, Speaker
from zppo.train.settings import ZoneSettings
from zppo.train.zone import Zone, ZoneBuilder


class Words:
    """A chat whose tokens are the words of the last turn."""

    special_texts = ()

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(range(len(messages[-1].content.split())))

    def think_open(self, ids: Sequence[int]) -> bool:
        return False


@dataclass
class ScriptedTeacher:
    """Answers each question right with a fixed set of draws, compresses by copying the box; `down` fails every call."""

    solves: dict[str, int] = field(default_factory=dict)
    down: bool = False
    rollouts: list[str] = field(default_factory=list)

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling) -> list[TeacherReply]:
        return [self._reply(request) for request in requests]

    def _reply(self, request: TeacherRequest) -> TeacherReply:
        if self.down:
            return TeacherReply((None,) * len(request.keys), error="refused")
        text = request.messages[-1].content
        if "<response>" in text:
            box = extract_boxed(text.rsplit("<response>", 1)[1])
            return TeacherReply((f"<summary>short \\boxed{{{box}}}</summary>",), completion_tokens=3)
        name = text.split()[0]
        self.rollouts.append(name)
        right = self.solves.get(name, 0)
        return TeacherReply(tuple(f"so \\boxed{{{'gold' if i < right else 'bad'}}}" for i in range(len(request.keys))))


def score(answered: Sequence[Answered]) -> list[Verdict]:
    verdicts = []
    for a in answered:
        answer = extract_boxed(a.completion)
        verdicts.append(Verdict(answer == a.question.gold, answer, "test", float(answer == a.question.gold)))
    return verdicts


def make_group(name: str, right: int, wrong: int, answerless: int = 0) -> Group:
    question = Question(name, (Message("user", f"{name} asks something"),), "gold")
    texts = ["\\boxed{gold}"] * right + [f"\\boxed{{wrong{i % 2}}}" for i in range(wrong)] + ["nothing"] * answerless
    rollouts = tuple(
        Rollout(
            torch.tensor([1]), torch.zeros(1), t, extract_boxed(t), t == "\\boxed{gold}", float(t == "\\boxed{gold}")
        )
        for t in texts
    )
    return Group(Speaker(PromptBook(), Words()).plain(question), rollouts)  # type: ignore[arg-type]


def make_builder(
    teacher: ScriptedTeacher,
    *,
    kinds: tuple[str, ...] = ("bcq", "ncq"),
    context: int | None = None,
    lazy: bool = True,
    rho_aug: float = 1.0,
) -> ZoneBuilder:
    how = TeacherSampling(Sampling(max_new_tokens=16))
    book = PromptBook(neutralise=Neutraliser())
    return ZoneBuilder(
        kinds,
        teacher=teacher,
        teacher_rollout=how,
        compressor=Compressor(teacher, book, how, lambda text: text),
        speaker=Speaker(book, Words()),  # type: ignore[arg-type]
        score=score,
        settings=ZoneSettings(rho_aug=rho_aug),
        seed=3,
        context=context,
        max_new_tokens=16,
        lazy=lazy,
    )


def names(zone: Zone) -> list[tuple[str, str]]:
    return [(p.question.id, p.kind) for p in zone.prompts]


def test_hardest_first_bcq_before_ncq_until_the_cap() -> None:
    plain = [
        make_group("easy", 5, 3),
        make_group("middle", 3, 5),
        make_group("hard", 0, 8),
        make_group("unsolved", 1, 7),
    ]
    zone = make_builder(ScriptedTeacher({"hard": 1, "middle": 4}), rho_aug=1.0).build(plain, 4, step=1)
    assert names(zone) == [("hard", "bcq"), ("hard", "ncq"), ("unsolved", "ncq"), ("middle", "bcq")]
    assert zone.metrics["hard_questions"] == 3
    assert zone.metrics["teacher_solved_none"] == 1


def test_a_bcq_shows_one_right_and_one_wrong_summary_and_an_ncq_all_wrong_ones() -> None:
    zone = make_builder(ScriptedTeacher({"hard": 4})).build([make_group("hard", 1, 3)], 2, step=1)
    bcq, ncq = (p.messages[-1].content for p in zone.prompts)
    assert (
        bcq.count("<candidate>") == 2
        and bcq.count("short \\boxed{gold}") == 1
        and bcq.count("short \\boxed{wrong") == 1
    )
    assert ncq.count("<candidate>") == 3 and "gold" not in ncq
    assert ncq.index("\\boxed{wrong0}") < ncq.index("\\boxed{wrong1}") < ncq.index("<candidate>")


def test_without_an_answer_to_show_there_is_no_bcq() -> None:
    zone = make_builder(ScriptedTeacher({"hard": 4})).build([make_group("hard", 0, 0, answerless=4)], 2, step=1)
    assert names(zone) == [("hard", "ncq")]
    assert zone.metrics["bcq_without_negative"] == 1
    assert "\\boxed{wrong" not in zone.prompts[0].messages[-1].content


def test_a_teacher_that_is_down_costs_bcq_and_compression_only() -> None:
    zone = make_builder(ScriptedTeacher(down=True)).build([make_group("hard", 0, 3)], 4, step=1)
    assert names(zone) == [("hard", "ncq")]
    assert zone.metrics["teacher_unreachable"] == 4
    assert zone.metrics["compression_unreachable"] == 2  # two distinct completions
    assert zone.metrics["ncq_raw_candidates"] == 3


def test_a_prompt_over_the_context_gives_its_slot_to_the_next() -> None:
    plain = [make_group("long", 0, 8), make_group("short", 1, 2)]
    room = len(make_builder(ScriptedTeacher(), kinds=("ncq",)).build([plain[1]], 1, step=1).prompts[0].ids) + 16
    zone = make_builder(ScriptedTeacher(), kinds=("ncq",), context=room, rho_aug=0.5).build(
        [*plain, plain[0]], 3, step=1
    )
    assert zone.prompts == []  # the pre-cap keeps one question, the hardest
    zone = make_builder(ScriptedTeacher(), kinds=("ncq",), context=room).build(plain, 2, step=1)
    assert names(zone) == [("short", "ncq")]
    assert zone.metrics["too_long"] == 1


def test_without_reformulations_nobody_is_asked() -> None:
    teacher = ScriptedTeacher()
    assert make_builder(teacher, kinds=()).build([make_group("hard", 0, 8)], 4, step=1).prompts == []
    assert teacher.rollouts == []


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
    assert [(p.kind, p.messages, p.audit) for p in asked_lazily.prompts] == [
        (p.kind, p.messages, p.audit) for p in asked_all.prompts
    ]
    assert set(lazy.rollouts) <= set(literal.rollouts)
    assert len(literal.rollouts) == sum(g.accuracy < 0.5 for g in plain)
