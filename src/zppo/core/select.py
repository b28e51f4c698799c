"""Which hard questions are asked again: the hard set, pre-cap, post-cap, and the lazy order (Alg. 1, l. 4-15)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from zppo.core.draws import draw_key
from zppo.core.types import Group

T = TypeVar("T")
B = TypeVar("B")


def share_of(rho: float, count: int) -> int:
    """floor(rho * count), exact where the product is a whole number that floats miss (0.29 * 100)."""
    return math.floor(rho * count + 1e-9)


def hard_groups(
    groups: Sequence[Group],
    threshold: float,
    *,
    ties: Literal["random", "batch"] = "random",
    seed: int = 0,
    step: int = 0,
) -> list[Group]:
    """The plain groups with rbar_x < tau, hardest first (Alg. 1, l. 4 and 6).

    Args:
        groups: plain groups in batch order, new questions first.
        threshold: tau.
        ties: order among equal accuracies: "random" is keyed by (seed, step, question id), "batch" is batch order [zppo].

    Returns:
        Ascending rbar_x. A group with fewer than half of its rollouts graded is not known to be hard and is left out.
    """
    hard = [g for g in groups if g.counts and g.accuracy < threshold]
    if ties == "random":
        hard.sort(key=lambda g: draw_key(seed, "ties", step, g.question.id))
    return sorted(hard, key=lambda g: g.accuracy)


def fill_slots(
    kept: Sequence[T],
    cap: int,
    build: Callable[[Sequence[T]], Sequence[Sequence[B]]],
    per_question: int,
    *,
    lazy: bool = True,
) -> list[B]:
    """Build reformulated prompts for the kept questions until the cap is full (Alg. 1, l. 6-15: pre-cap, build, post-cap).

    The pre-cap is `kept[:cap]`, the post-cap stops at `cap` instances in all, in the order of the questions and within a question
    in the order of its kinds, so that a last free slot goes to a BCQ. Lazily, questions are built in waves no longer than the free
    slots may need: ranks do not depend on the teacher, so the instances are the same and the teacher is asked about fewer questions.

    Args:
        kept: hard questions, hardest first.
        cap: floor(rho_aug * len(X_new)).
        build: reformulated prompts per question of a wave, in the order of the wave; fewer than `per_question` where something is missing.
        per_question: most prompts that one question can give.
        lazy: False builds every question of the pre-cap at once, as Algorithm 1 is written.
    """
    built: list[B] = []
    kept, position = kept[:cap], 0
    while position < len(kept) and len(built) < cap and per_question:
        size = math.ceil((cap - len(built)) / per_question) if lazy else len(kept)
        wave = kept[position : position + size]
        for drafts in build(wave):
            built.extend(drafts)
        position += len(wave)
    return built[:cap]
