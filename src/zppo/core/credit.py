"""Whose gradient what is: for rivals of the method that take what hinted prompts gave back to the plain one (docs/method.md section 13).

In the paper every group is its own and has its credit on the prompt that it was sampled from: then nothing here is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from zppo.core.draws import keyed_random
from zppo.core.types import Group

Credit = Literal["shown", "plain"]
"""Which prompt the gradient of reformulated rollouts is on: the one that was shown, or the plain one."""
Grouping = Literal["own", "one-joins", "all-join"]
"""What becomes of a reformulated group: its own, or its right rollouts (or one of them) take the place of wrong ones in the plain group."""


def credited_groups(
    plain: Sequence[Group], reformulated: Sequence[Group], credit: Credit, grouping: Grouping, *, seed: int, step: int
) -> list[Group]:
    """The groups that the gradient is of, plain ones first; a rollout that has come from another prompt says so in `drawn`.

    Args:
        plain, reformulated: as they were sampled.
        seed, step: key which wrong rollouts give way, and which right ones take their places.
    """
    if grouping == "own":
        return [*plain, *(_on_plain(g, plain) if credit == "plain" else g for g in reformulated)]
    return [_joined(group, reformulated, 1 if grouping == "one-joins" else len(group.rollouts), seed, step) for group in plain]


def _on_plain(group: Group, plain: Sequence[Group]) -> Group:
    """The same rollouts under the plain prompt of their question (Guide, arXiv 2506.13923)."""
    prompt = next(g.prompt for g in plain if g.question.id == group.question.id)
    return Group(replace(prompt, kind=group.kind), tuple(replace(r, drawn=group.prompt) for r in group.rollouts))


def _joined(group: Group, reformulated: Sequence[Group], most: int, seed: int, step: int) -> Group:
    """With right rollouts of the question's reformulated prompts in the places of wrong ones, all drawn uniformly."""
    right = [replace(r, drawn=g.prompt) for g in reformulated if g.question.id == group.question.id for r in g.graded if r.correct]
    wrong = [i for i, r in enumerate(group.rollouts) if r.graded and not r.correct]
    count = min(most, len(right), len(wrong))
    if not count:
        return group
    rng = keyed_random(seed, "joins", step, group.question.id)
    places = dict(zip(rng.sample(wrong, count), rng.sample(right, count), strict=True))
    return replace(group, rollouts=tuple(places.get(i, r) for i, r in enumerate(group.rollouts)))
