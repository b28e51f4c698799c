"""The questions of a recipe, and who grades them. No torch: a dry run asks too."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zppo.config.settings import Settings
from zppo.core.types import JUDGE, Question
from zppo.data.load import load_questions
from zppo.errors import SettingsError


def load_data(settings: Settings, warn: Callable[[str], None] | None = None) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions of a recipe; `warn` is told of right answers that cannot match. Raises DataError."""
    data = settings.data
    warn = None if settings.grading.reward else warn  # it may know what the rules do not
    train = load_questions(data.train, data.columns, data.limit, data.reading(), warn)
    held_out = load_questions(data.eval, data.columns, data.eval_limit, data.reading(held_out=True), warn) if data.eval else []
    return train, held_out


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
