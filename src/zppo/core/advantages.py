"""Advantages: two-step (Eqs. 2-6, after REINFORCE++) and group-relative (Eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from zppo.core.types import Group

Scope = Literal["nontrivial", "all", "none"]
Estimator = Literal["nontrivial", "all", "none", "group"]
Vector = torch.Tensor | Sequence[float]


def _centred(rewards: torch.Tensor, groups: torch.Tensor, graded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row: A' = r - mean of its group, is the group non-trivial, population std of the group; float64, of graded rows."""
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    rewards = rewards.to(torch.float64)
    zeros = rewards.new_zeros(count)
    size = zeros.index_add(0, index, graded.to(torch.float64)).clamp(min=1)
    mean = zeros.index_add(0, index, rewards.where(graded, 0.0)) / size
    high = (zeros - torch.inf).scatter_reduce(0, index, rewards.where(graded, -torch.inf), "amax")
    low = (zeros + torch.inf).scatter_reduce(0, index, rewards.where(graded, torch.inf), "amin")
    nontrivial = (high > low)[index] & graded
    centred = (rewards - mean[index]).where(nontrivial, 0.0)  # exactly 0 where all rewards are equal
    deviation = (zeros.index_add(0, index, centred**2) / size).sqrt()
    return centred, nontrivial, deviation[index]


def _checked(rewards: Vector, groups: Vector, graded: Vector | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three as tensors."""
    rewards = _vector("rewards", rewards)
    groups = _vector("groups", groups).to(rewards.device)
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must be two vectors of one length")
    graded = torch.ones_like(rewards, dtype=torch.bool) if graded is None else _vector("graded", graded).to(rewards.device, torch.bool)
    if graded.shape != rewards.shape:
        raise ValueError(f"graded {tuple(graded.shape)} must be as long as rewards {tuple(rewards.shape)}")
    if not torch.isfinite(rewards[graded]).all():
        raise ValueError("a reward is NaN or infinite: mend the reward function")
    return rewards, groups, graded


def _vector(name: str, given: Vector) -> torch.Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a vector of numbers, as a tensor, an array or a list: {error}") from None


def two_step_advantages(
    rewards: Vector, groups: Vector, scope: Scope = "nontrivial", *, eps: float = 1e-8, graded: Vector | None = None
) -> torch.Tensor:
    """Two-step advantages of one whole rollout step (Eqs. 2-5).

    Step 1, per group: A' = r - mean(r). Step 2, over the rollouts of a set S of groups: A = (A' - mean_S A') / (std_S A' + eps).

    Each vector may be a tensor, an array or a list of numbers.

    Args:
        rewards: (N,) rewards of all rollouts of the step, plain and reformulated together.
        groups: (N,) integer group ids; plain, BCQ and NCQ groups of one question have ids of their own.
        scope: S = groups with max(r) > min(r) ("nontrivial"), every group ("all"), or no step 2 ("none": A = A').
        eps: added to the population standard deviation.
        graded: (N,) bool; an ungraded rollout gets 0 and is left out of all statistics.

    Returns:
        (N,) float32; exactly 0 for every rollout of a group with equal rewards.

    Raises:
        ValueError: shapes differ, scope unknown, or a graded reward is not finite.
        TypeError: a vector holds something else than numbers.
    """
    rewards, groups, graded = _checked(rewards, groups, graded)
    centred, nontrivial, _ = _centred(rewards, groups, graded)
    if scope not in ("nontrivial", "all", "none"):
        raise ValueError(f"scope is {scope!r}: nontrivial, all or none is needed")
    members = graded if scope == "all" else nontrivial
    if scope == "none" or not members.any():
        return centred.to(torch.float32)
    inside = centred[members]
    mean, deviation = inside.mean(), inside.std(correction=0)
    return ((centred - mean) / (deviation + eps)).where(nontrivial, 0.0).to(torch.float32)


def group_advantages(rewards: Vector, groups: Vector, *, eps: float = 1e-8, graded: Vector | None = None) -> torch.Tensor:
    """Textbook GRPO (Eq. 1): (r - mean of the group) / (population std of the group + eps); arguments as in `two_step_advantages`."""
    centred, _, deviation = _centred(*_checked(rewards, groups, graded))
    return (centred / (deviation + eps)).where(centred != 0, 0.0).to(torch.float32)


def step_advantages(groups: Sequence[Group], estimator: Estimator, batches: Sequence[Sequence[int]] = ()) -> torch.Tensor:
    """Advantages of all rollouts of a step, in order of groups and rollouts, (N,) float32.

    Args:
        estimator: the scope of two-step advantages, or "group" for textbook GRPO; the row of a method names one.
        batches: group indices, each group once: what the statistics of Eq. 3 are over, each batch by itself. Empty: the whole step.
    """
    if batches:
        parts: dict[int, torch.Tensor] = {}
        for batch in batches:
            lines = step_advantages([groups[g] for g in batch], estimator).split([len(groups[g].rollouts) for g in batch])
            parts.update(zip(batch, lines, strict=True))
        return torch.cat([parts[g] for g in range(len(groups))])
    rollouts = [r for group in groups for r in group.rollouts]
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group.rollouts], dtype=torch.int64)
    graded = torch.tensor([r.graded for r in rollouts], dtype=torch.bool)
    if estimator == "group":
        return group_advantages(rewards, ids, graded=graded)
    return two_step_advantages(rewards, ids, estimator, graded=graded)


def trivial(group: Group) -> bool:
    """Whether all graded rewards of a group are equal: it is all-right or all-wrong."""
    return len({r.reward for r in group.graded}) <= 1


def spread_advantages(groups: Sequence[Group], kept: Sequence[Group], advantages: torch.Tensor) -> torch.Tensor:
    """Advantages of all rollouts, 0 for those of groups that left the batch.

    Args:
        kept: those of the groups that stayed, in their order.
        advantages: of the rollouts of `kept`.
    """
    values, held = iter(advantages.tolist()), {id(g) for g in kept}
    return torch.tensor([next(values) if id(g) in held else 0.0 for g in groups for _ in g.rollouts])


def advantages_as_sampled(groups: Sequence[Group], credited: Sequence[Group], advantages: torch.Tensor) -> torch.Tensor:
    """Advantages of all rollouts as they were sampled, 0 for one that the gradient is not of (`core.credit`).

    Args:
        groups: as they were sampled.
        advantages: of the rollouts of `credited`, which share their token ids with those that they came from.
    """
    values = dict(zip((id(r.ids) for g in credited for r in g.rollouts), advantages.tolist(), strict=True))
    return torch.tensor([values.get(id(r.ids), 0.0) for g in groups for r in g.rollouts])
