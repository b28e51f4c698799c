"""The questions of a recipe, and who grades them. No torch: a dry run asks too."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zppo.config.settings import Settings
from zppo.core.select import share_of
from zppo.core.types import JUDGE, Question
from zppo.data.load import load_questions
from zppo.data.order import effective_batch
from zppo.errors import SettingsError


def load_data(settings: Settings, warn: Callable[[str], None] | None = None) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions of a recipe; `warn` is told of right answers that cannot match, and of parts of the method that stay
    idle. Raises DataError."""
    data, told = settings.data, warn
    warn = None if settings.grading.reward else warn  # it may know what the rules do not
    train = load_questions(data.train, data.columns, data.limit, data.reading(), warn)
    held_out = load_questions(data.eval, data.columns, data.eval_limit, data.reading(held_out=True), warn) if data.eval else []
    for text in idle_parts(settings, len(train)):
        if told is not None:
            told(text)
    return train, held_out


def idle_parts(settings: Settings, questions: int) -> list[str]:
    """What a method does not get to do where there are few questions, or few in a batch: its shares of the batch are rounded down."""
    method, zone = settings.method.resolve(), settings.zone
    batch = effective_batch(questions, settings.rollout.batch_size)
    said = []
    if method.replay and zone.rho_replay > 0 and batch == questions:
        said.append(
            f"no question is ever replayed: each of the {questions:,} is new in every step. Give more questions, or lower "
            f"rollout.batch_size ({settings.rollout.batch_size:,})"
        )
    for name, share, on, what in (
        ("rho_replay", zone.rho_replay, method.replay, "no question is ever replayed"),
        (
            "rho_aug",
            zone.rho_aug,
            bool(method.reformulations),
            "no hard question is ever asked again with help, so the teacher is of no use",
        ),
    ):
        if on and share > 0 and share_of(share, batch) == 0:
            said.append(
                f"{what}: zone.{name} = {share:g} of {batch:,} new questions is less than one. Raise rollout.batch_size, or the share"
            )
    return said


def count_judged(settings: Settings, questions: Iterable[Question]) -> int:
    """How many of the questions want a judge.

    Raises:
        SettingsError: some do, and the recipe names no model that could judge.
    """
    wanting = [question.id for question in questions if question.grading == JUDGE]
    if wanting and settings.judging is None:
        raise SettingsError(
            f"{len(wanting):,} questions want a judge (the first is {wanting[0]!r}, column {settings.data.columns.grading!r}), and the "
            "recipe has neither a judge nor a teacher: set judge.model, or teacher.model, or let these questions be graded by rule"
        )
    return len(wanting)
