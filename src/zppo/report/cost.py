"""What a run cost in FLOPs, part by part, from its metrics.jsonl (Tab. 9); `cost_plan` plans the same from a recipe.

The convention is Tab. 9's: 2N FLOPs per token forward, 6N per token forward and backward, N the parameters of the model.
Attention, whose cost grows with the square of the length, padding and held-out evaluation are not counted.

Everything is counted twice. *To the letter*: Algorithm 1 with a trainer that reads the prompt for every rollout, takes old
log-probs from a forward pass over all rows, trains on all rows and asks the teacher about every hard question. *With the exact
savings*: what zppo does for the same gradients (method.md sections 3 and 6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zppo.config.settings import Settings
from zppo.core.select import share_of
from zppo.core.types import BCQ
from zppo.errors import CheckpointError

FORWARD, FORWARD_BACKWARD = 2, 6


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that pass through a model in a whole run, by part; floats, since a plan holds means.

    Attributes:
        sampling: student rollouts, prompts included.
        logprob: forward pass for old log-probs.
        update: forward and backward.
        teacher: teacher rollouts on hard questions, prompts included.
        compression: candidate compression and hints by the teacher, prompts included.
        scoring: completions that the teacher rescores for distillation (Algs. 2 and 3).
        judge: verdicts of an LLM judge on free-form answers, prompts included.
    """

    sampling: float = 0.0
    logprob: float = 0.0
    update: float = 0.0
    teacher: float = 0.0
    compression: float = 0.0
    scoring: float = 0.0
    judge: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def times(self, factor: float) -> Work:
        """Every part times `factor`."""
        return Work(*(getattr(self, f.name) * factor for f in fields(Work)))

    def flops(self, student: float, teacher: float, judge: float | None = None) -> dict[str, float]:
        """FLOPs by part for models of so many parameters; without a number of its own the judge is the teacher."""
        return {
            "sampling": FORWARD * student * self.sampling,
            "logprob": FORWARD * student * self.logprob,
            "update": FORWARD_BACKWARD * student * self.update,
            "teacher": FORWARD * teacher * self.teacher,
            "compression": FORWARD * teacher * self.compression,
            "scoring": FORWARD * teacher * self.scoring,
            "judge": FORWARD * (teacher if judge is None else judge) * self.judge,
        }


@dataclass(frozen=True, slots=True)
class Cost:
    """The work of a run.

    Attributes:
        literal: to the letter of Algorithm 1.
        saved: with the exact savings, as this recipe or run has them.
        steps: rollout steps counted.
        notes: what was assumed or estimated, one sentence each.
    """

    literal: Work
    saved: Work
    steps: int
    notes: tuple[str, ...]


def as_run(settings: Settings, records: Sequence[Mapping[str, Any]], source: Path) -> Cost:
    """The cost of what a run has done so far.

    Args:
        settings: of the run's recipe.yaml.
        records: lines of metrics.jsonl.
        source: that file, for errors.

    Raises:
        CheckpointError: there is no finished step, or a step lacks a number.
    """
    method = settings.method.resolve()
    steps = [record for record in records if record.get("event") == "step"]
    if not steps:
        raise CheckpointError(
            f"{source} holds no finished step; wait for the first one, or plan with `zppo cost RECIPE`"
        )

    def total(name: str) -> float:
        for record in steps:
            if not isinstance(record.get(name), int | float):
                raise CheckpointError(
                    f"{source}, step {record.get('step')}: there is no number {name!r} (found: {record.get(name)!r}); "
                    "the run was made by another version: use that one"
                )
        return math.fsum(record[name] for record in steps)

    per_rollout, sampled = total("prompt_tokens"), total("student_tokens")
    once = per_rollout / settings.rollout.group_size
    rows = per_rollout + sampled
    saved = Work(
        sampling=once + sampled,
        logprob=total("logprob_tokens"),
        update=total("train_tokens_needed"),
        teacher=total("teacher_prompt_tokens") + total("teacher_completion_tokens"),
        compression=total("compression_prompt_tokens")
        + total("compression_completion_tokens")
        + (total("hint_completion_tokens") if "hint" in method.reformulations else 0.0),
        scoring=total("train_tokens_needed")
        if method.distils
        else 0.0,  # the teacher reads what the student learns from
        judge=judge_tokens(steps),
    )
    draws, lazy = settings.zone.teacher_group_size, settings.teacher is not None and settings.teacher.ask != "all"
    asked, hard = total("teacher_questions"), total("hard_questions")
    more = hard / asked if asked and lazy and BCQ in method.reformulations else 1.0
    teacher = total("teacher_prompt_tokens") * draws + total("teacher_completion_tokens")
    literal = Work(
        sampling=rows,
        logprob=0.0 if method.distils else rows,
        update=saved.update if method.distils else rows,
        teacher=teacher * more,
        compression=saved.compression * _unbuilt(settings, steps),
        scoring=saved.scoring,
        judge=saved.judge,
    )
    padding = total("train_tokens_computed") / saved.update - 1 if saved.update else 0.0
    notes = [f"Padding, not counted, adds {padding:.1%} to the tokens of forward and backward."]
    if more > 1:
        notes.append(
            f"The teacher was asked about {asked:,.0f} of {hard:,.0f} hard questions; what the others would have taken is an estimate "
            "from the means of these (they are easier)."
        )
    if "hint" in method.reformulations:
        notes.append("The prompts of hints are not in the log and not counted.")
    return Cost(literal, saved, len(steps), tuple(notes))


def judge_tokens(steps: Sequence[Mapping[str, Any]]) -> float:
    """Tokens that the judge read and wrote in these steps; 0 where no question wanted one."""
    names = ("judge_prompt_tokens", "judge_completion_tokens")
    return math.fsum(record.get(name) or 0.0 for record in steps for name in names)


def _unbuilt(settings: Settings, steps: Sequence[Mapping[str, Any]]) -> float:
    """How many times as many questions Algorithm 1 builds prompts for: all under the pre-cap, some of which the post-cap cuts off."""
    if settings.teacher is None or settings.teacher.ask == "all" or len(settings.method.resolve().reformulations) < 2:
        return 1.0
    cap = share_of(settings.zone.rho_aug, settings.rollout.batch_size)
    built = math.fsum(record["teacher_questions"] for record in steps)
    precap = math.fsum(max(record["teacher_questions"], min(cap, record["hard_questions"])) for record in steps)
    return precap / built if built else 1.0
