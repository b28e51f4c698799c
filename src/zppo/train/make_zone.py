"""Puts together who asks the teacher, and who makes the reformulated prompts of a step."""

from __future__ import annotations

from collections.abc import Sequence

from zppo.config.settings import Settings
from zppo.core.reformulate import Placebo, PrefixQuestion, Reformulation
from zppo.errors import SettingsError, TemplateError
from zppo.prompts.book import VARIABLES, PromptBook
from zppo.teacher.base import Teacher, TeacherSampling
from zppo.teacher.compression import Compressor, token_tail
from zppo.train.ask import Asker, ResponseTokens, TimedTeacher
from zppo.train.materials import MaterialMaker
from zppo.train.rollouts import Score, Speaker
from zppo.train.scoring import Scorer
from zppo.train.zone import ZoneBuilder


def grades_beside(settings: Settings, scorer: Scorer) -> bool:
    """Whether completions are graded while others are sampled.

    Not where grading would take the student's device (a judge in this process), nor by a user's reward function, which may count on
    being called in the main thread.
    """
    judge = settings.judging[0] if scorer.judge is not None and settings.judging is not None else None
    return settings.grading.reward is None and (judge is None or bool(judge.base_urls))


def make_asker(settings: Settings, teachers: Sequence[Teacher], speaker: Speaker, score: Score) -> Asker:
    own = [t for t in (settings.teacher, *settings.more_teachers) if t is not None]
    return Asker(
        [(teacher, t.how(t.rollout)) for teacher, t in zip(teachers, own, strict=False)],
        speaker,
        score,
        group_size=settings.zone.teacher_group_size,
        seed=settings.seed,
    )


def _make_materials(
    settings: Settings, reformulations: Sequence[Reformulation], teacher: Teacher | None, speaker: Speaker
) -> MaterialMaker:
    own, chat, student = settings.teacher, speaker.chat, settings.rollout.sampling()
    own = own if teacher is not None else None
    cap = own.compression.max_new_tokens if own else 1
    return MaterialMaker(
        frozenset(need for r in reformulations for need in r.needs),
        compressor=Compressor(
            teacher,
            speaker.book,
            own.how(own.compression) if own else TeacherSampling(student),
            token_tail(chat.tokenizer, cap),
            enabled=own is not None and own.compression.enabled,
        ),
        teacher=teacher,
        hint=own.how(own.hint) if own else TeacherSampling(student),
        book=speaker.book,
        response_ids=ResponseTokens(chat),
        seed=settings.seed,
    )


def make_zone(
    settings: Settings,
    reformulations: Sequence[Reformulation],
    teachers: Sequence[TimedTeacher],
    speaker: Speaker,
    asker: Asker,
    context: int | None,
) -> ZoneBuilder:
    method, own = settings.method.resolve(), settings.teacher if teachers else None
    _check_templates(reformulations, speaker.book)
    return ZoneBuilder(
        reformulations,
        asker=asker,
        materials=_make_materials(settings, reformulations, teachers[0] if teachers else None, speaker),
        speaker=speaker,
        settings=settings.zone,
        seed=settings.seed,
        context=context,
        max_new_tokens=settings.rollout.max_new_tokens,
        lazy=own is None or own.ask != "all",
        teachers=teachers,
        every_hard_question=method.teacher_response,
        scramble=method.control == "scrambled",
    )


def _check_templates(reformulations: Sequence[Reformulation], book: PromptBook) -> None:
    shows_nothing = (Placebo, PrefixQuestion)  # the plain question needs no template
    for r in reformulations:
        if r.kind not in book.names() and not isinstance(r, shows_nothing):
            raise SettingsError(
                f"the method asks again with {r.kind!r}, which has no template: add prompts.{r.kind} to the recipe"
            )
    known = [*VARIABLES, *(r.kind for r in reformulations)]
    for name in book.names():
        if name not in known:
            raise TemplateError(
                f"prompts.{name}: no prompt of this run is called {name!r}, so the template would never be shown (known: "
                f"{', '.join(dict.fromkeys(known))}); mend the name, or leave it out"
            )
