"""Which questions are asked again: the hard set, hardest first, and the waves of the lazy order (Alg. 1, l. 4-15)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from zppo.core.draws import draw_key
from zppo.core.types import Group


def share_of(rho: float, count: int) -> int:
    """floor(rho * count), exact where the product is a whole number that floats miss (0.29 * 100)."""
    return math.floor(rho * count + 1e-9)


def is_hard(accuracy: float, threshold: float) -> bool:
    """rbar_x < tau. What is hard is asked again and admitted to the buffer; what is not graduates from it."""
    return accuracy < threshold


Helped = Literal["hard", "unsolved", "every"]
"""Which questions are helped: those below tau, those without a right rollout, or all."""


def helped_below(helped: Helped, threshold: float) -> float:
    """The accuracy below which a question is helped: tau in the paper, others for rivals (docs/method.md section 13).

    Args:
        threshold: tau.
    """
    return {"hard": threshold, "unsolved": 1e-9, "every": math.inf}[helped]


def hard_groups(
    groups: Sequence[Group], threshold: float, *, ties: Literal["random", "batch"] = "random", seed: int = 0, step: int = 0
) -> list[Group]:
    """The plain groups with rbar_x < tau, hardest first (Alg. 1, l. 4 and 6).

    Args:
        groups: plain groups in batch order, new questions first.
        threshold: tau, or what `helped_below` gives.
        ties: order among equal accuracies: "random" is keyed by (seed, step, question id), "batch" is batch order [zppo].

    Returns:
        Ascending rbar_x. A group with fewer than half of its rollouts graded is not known to be hard and is left out.
    """
    hard = [g for g in groups if g.counts and is_hard(g.accuracy, threshold)]
    if ties == "random":
        hard.sort(key=lambda g: draw_key(seed, "ties", step, g.question.id))
    return sorted(hard, key=lambda g: g.accuracy)


def next_wave(free: int, per_question: int, *, lazy: bool = True) -> int | None:
    """How many of the kept questions to reformulate next (Alg. 1, l. 6-15).

    Algorithm 1 reformulates all kept questions and then stops at the cap. Lazily they are taken in waves, hardest first, no longer than
    the free slots may need: ranks do not depend on the teacher, so the prompts are the same and the teacher is asked about fewer questions.

    Args:
        free: slots below the cap that are still empty.
        per_question: most prompts that one question can give.
        lazy: False takes all at once, as Algorithm 1 is written.

    Returns:
        Questions of the next wave, 0 where the slots are full or a question gives no prompt; None for all that are left.
    """
    if free <= 0 or not per_question:
        return 0
    return math.ceil(free / per_question) if lazy else None
