"""Held-out evaluation: plain prompts, the same engine, words and grading as training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zppo.config.settings import EvalSettings
from zppo.core.types import Group, Question
from zppo.rollout.student import StudentSampler
from zppo.step_log import StepLog


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy on held-out questions.

    Attributes:
        accuracy: share of correct completions among the graded ones; NaN if none is graded.
        by_level: accuracy per `Question.level`, in order of first appearance; a single unnamed level is left out, and so is one without
            a graded completion.
        count: completions.
        tokens: mean completion length.
        truncated: share of completions that the limit stopped.
        ungraded: completions without a verdict, since the judge could not be reached; they are no wrong answers.
        no_answer_share: share of completions from which no answer could be extracted.
    """

    accuracy: float
    by_level: dict[str, float]
    count: int
    tokens: float
    truncated: float
    ungraded: int = 0
    no_answer_share: float = 0.0


def evaluate_held_out(
    student: StudentSampler, questions: Sequence[Question], settings: EvalSettings, log: StepLog
) -> tuple[Evaluation, list[Group]]:
    """Evaluate a student; draws are keyed by question, so that two evaluations of the same weights are equal.

    Args:
        log: of this evaluation alone, with the step 0.

    Returns:
        The result, and the completions that it is made of, a group per question.
    """
    student = replace(student, sampling=settings.sampling(), group_size=settings.samples)
    groups = student.rollout([student.renderer.plain(q) for q in questions], log, purpose="eval")
    levels: dict[str, list[bool]] = {}
    for group in groups:
        levels.setdefault(group.question.level, []).extend(r.correct for r in group.graded)
    rollouts = [r for group in groups for r in group.rollouts]
    correct = [value for values in levels.values() for value in values]
    named = {level: values for level, values in levels.items() if values} if set(levels) != {""} else {}
    result = Evaluation(
        accuracy=sum(correct) / len(correct) if correct else float("nan"),
        by_level={level: sum(values) / len(values) for level, values in named.items()},
        count=len(rollouts),
        tokens=sum(len(r.ids) for r in rollouts) / len(rollouts),
        truncated=sum(r.truncated for r in rollouts) / len(rollouts),
        ungraded=len(rollouts) - len(correct),
        no_answer_share=sum(r.answer is None for r in rollouts) / len(rollouts),
    )
    return result, groups
