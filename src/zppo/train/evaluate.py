"""Held-out evaluation: plain prompts, the same engine, words and grading as training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zppo.core.types import Question
from zppo.train.rollouts import Roller
from zppo.train.settings import EvalSettings


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy on held-out questions.

    Attributes:
        accuracy: share of correct completions.
        by_level: accuracy per `Question.level`, in order of first appearance; a single unnamed level is left out.
        count: completions.
        tokens: mean completion length.
        truncated: share of completions that the limit stopped.
    """

    accuracy: float
    by_level: dict[str, float]
    count: int
    tokens: float
    truncated: float


def evaluate(roller: Roller, questions: Sequence[Question], settings: EvalSettings) -> Evaluation:
    """Evaluate the roller's student; draws are keyed by question, so that two evaluations of the same weights are equal."""
    roller = replace(roller, sampling=settings.sampling(), group_size=settings.samples)
    groups = roller.roll([roller.speaker.plain(q) for q in questions], 0, purpose="eval")
    levels: dict[str, list[bool]] = {}
    for group in groups:
        levels.setdefault(group.question.level, []).extend(r.correct for r in group.rollouts)
    rollouts = [r for group in groups for r in group.rollouts]
    return Evaluation(
        accuracy=sum(r.correct for r in rollouts) / len(rollouts),
        by_level={level: sum(values) / len(values) for level, values in levels.items()} if set(levels) != {""} else {},
        count=len(rollouts),
        tokens=sum(len(r.ids) for r in rollouts) / len(rollouts),
        truncated=sum(r.truncated for r in rollouts) / len(rollouts),
    )
