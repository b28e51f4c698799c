"""The clipped surrogate per token (method.md section 6): PPO, asymmetric clip (DAPO), dual clip, no KL term."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

MAX_LOG_RATIO = 80.0  # exp overflows fp32 at 88.7, and an infinite ratio makes NaN of a gradient that is 0


MIN_LOG_PROBABILITY = -1e4
"""exp of it is 0 in float32."""


class Surrogate(NamedTuple):
    """Per-token loss and where a clip was active.

    Attributes:
        loss: (B, T), to be summed over completion tokens and divided by their number.
        clipped_low, clipped_high, clipped_dual: (B, T) bool, where the bound decides and the gradient is zero.
    """

    loss: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    clipped_dual: torch.Tensor


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float = 0.20,
    clip_high: float = 0.28,
    dual_clip: float | None = 10.0,
) -> Surrogate:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), for A < 0 not below dual_clip * A, with rho = exp(logprobs - old_logprobs).

    Args:
        logprobs: (B, T) of the current weights, with gradient.
        old_logprobs: (B, T) of the weights that sampled.
        advantages: (B,), one per rollout.
        clip_low, clip_high: clip range below and above 1.
        dual_clip: bound on the ratio for negative advantages; None is off.

    Returns:
        See `Surrogate`. With A = 0 the loss and its gradient are exactly 0.

    Raises:
        TypeError: one of the three is no tensor.
    """
    for name, given in (("logprobs", logprobs), ("old_logprobs", old_logprobs), ("advantages", advantages)):
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}: give a tensor")
    advantage = advantages.unsqueeze(-1)
    ratio = (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    negative, positive = advantage < 0, advantage > 0
    dual = (ratio > (torch.inf if dual_clip is None else dual_clip)) & negative
    if dual_clip is not None:
        loss = loss.where(~dual, -dual_clip * advantage)
    return Surrogate(loss, (ratio < 1 - clip_low) & negative, (ratio > 1 + clip_high) & positive, dual)


def shaped_surrogate(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, gamma: float) -> torch.Tensor:
    """-f(rho) A with f(x) = x / (x + gamma) and no clip, for tokens that another policy has drawn (LUFFY, arXiv 2504.14945).

    Unlike the ratio itself f is bounded, and its slope is steepest where the token is unlikely.

    Args:
        logprobs: (B, T) of the current weights, with gradient.
        old_logprobs: (B, T) of the policy that drew them; zeros (a probability of 1) for one whose probabilities nobody knows.
        advantages: (B,), one per rollout.
        gamma: above 0.

    Returns:
        (B, T) loss.
    """
    return -(logprobs - old_logprobs - math.log(gamma)).sigmoid() * advantages.unsqueeze(-1)


def jensen_shannon(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Per-token Jensen-Shannon divergence of two next-token distributions, nats (Algs. 2 and 3).

    JSD(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; between 0 and log 2.

    Args:
        logits: (..., V) of the student, with gradient.
        teacher_logits: (..., V) of the teacher, over the same vocabulary.

    Returns:
        (...) float32.
    """
    # A masked id (-inf) has probability 0 at this bound already, and 0 times a finite number is 0, in the gradient too.
    student = logits.float().log_softmax(-1).clamp(min=MIN_LOG_PROBABILITY)
    teacher = teacher_logits.float().log_softmax(-1).clamp(min=MIN_LOG_PROBABILITY)
    middle = torch.logaddexp(student, teacher) - math.log(2.0)
    divergence = teacher.exp() * (teacher - middle) + student.exp() * (student - middle)
    return divergence.sum(-1) / 2
