"""What a step reports about its groups (method.md section 9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from zppo.core.select import is_hard
from zppo.core.types import PLAIN, Group, Rollout

_MOST_SHOWN = 100  # characters of an answer


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, None where there is nothing to average; NaNs are left out."""
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else None


def accuracy_by_kind(groups: Sequence[Group]) -> dict[str, float]:
    """Share of correct rollouts per kind of prompt (Fig. 22); kinds without a graded rollout are left out."""
    rollouts: dict[str, list[float]] = {}
    for group in groups:
        rollouts.setdefault(group.kind, []).extend(float(r.correct) for r in group.graded)
    return {kind: sum(values) / len(values) for kind, values in rollouts.items() if values}


def composition(groups: Sequence[Group], threshold: float) -> dict[str, float]:
    """Shares of the batch's groups, after the caps: `easy` and `hard` plain groups, and one share per other kind.

    A plain group with fewer than half of its rollouts graded is neither easy nor hard: `ungraded`.
    """
    counts: dict[str, int] = {}
    for group in groups:
        name = group.kind
        if name == PLAIN:
            name = "ungraded" if not group.counts else "hard" if is_hard(group.accuracy, threshold) else "easy"
        counts[name] = counts.get(name, 0) + 1
    return {name: count / len(groups) for name, count in counts.items()}


def eligibility(plain: Sequence[Group], responses: Mapping[str, Sequence[object]], threshold: float) -> dict[str, float]:
    """Shares of the plain groups by what could be made of them before the caps (Fig. 5a); parts that are 0 are left out.

    `easy` ones are asked no more. Of the hard ones, which all have a wrong rollout: `bcq` could give BCQ and NCQ, `ncq` NCQ alone, since
    no teacher response was correct; of `unasked` ones nobody knows, since the teacher was not asked (`teacher.ask: lazy`). A group with
    fewer than half of its rollouts graded is `ungraded`.

    Args:
        responses: correct teacher responses by question id, of every question that was asked about.
    """
    counts: dict[str, int] = {}
    for group in plain:
        pool = responses.get(group.question.id)
        hard = "unasked" if pool is None else "bcq" if pool else "ncq"
        name = "ungraded" if not group.counts else hard if is_hard(group.accuracy, threshold) else "easy"
        counts[name] = counts.get(name, 0) + 1
    return {name: count / len(plain) for name, count in counts.items()}


def rollout_metrics(rollouts: Sequence[Rollout], advantages: torch.Tensor) -> dict[str, float | None]:
    """Over all rollouts of a step: positive-advantage share, entropy (nats), lengths (tokens), truncation, answers, grading."""
    judged = advantages[torch.tensor([r.graded for r in rollouts], dtype=torch.bool)]  # an ungraded one has none
    lengths = [float(len(r.ids)) for r in rollouts]
    return {
        "positive_advantage_share": mean((judged > 0).double().tolist()),
        "nonzero_advantage_share": mean((judged != 0).double().tolist()),
        "entropy": mean(r.entropy for r in rollouts),
        "completion_tokens_mean": mean(lengths),
        "completion_tokens_max": max(lengths, default=0.0),
        "truncated_share": mean(float(r.truncated) for r in rollouts),
        "no_answer_share": mean(float(r.answer is None) for r in rollouts),
        "grading_timeout_share": mean(float(r.reason == "timeout") for r in rollouts),
        "ungraded": float(sum(not r.graded for r in rollouts)),
    }


def groups_with_gradient(groups: Sequence[Group], advantages: torch.Tensor) -> int:
    """How many of the groups have a rollout whose advantage is not 0: the others move nothing.

    Args:
        advantages: (N,) of their rollouts, in order.
    """
    return sum(bool((part != 0).any()) for part in advantages.split([len(group.rollouts) for group in groups]))


def reward_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mean of each of the user's reward functions, by its name, over the rollouts that it applied to."""
    given: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.rewards.items():
            given.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in given.items()}


def wrong_example(groups: Sequence[Group]) -> str:
    """The right answer and the answer of the first rollout that has one and is wrong, beside each other; "" where there is none."""
    for group in groups:
        for rollout in group.graded:
            if not rollout.correct and rollout.answer is not None:
                gold, answer = (
                    repr(text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}...")
                    for text in (str(group.question.gold), rollout.answer)
                )
                return f"Right answer {gold} | answer {answer} (question {group.question.id!r})"
    return ""
