"""Rollouts on their way into the loss, and which of them are a process's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zppo.core.minibatch import shares
from zppo.core.types import Group, Rollout
from zppo.engines.forward import Row


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout on its way into the loss."""

    row: Row
    sampled_logprobs: torch.Tensor
    advantage: float
    counted: bool  # stands in the token-level denominator

    @property
    def tokens(self) -> int:
        return len(self.row.completion_ids)

    @property
    def length(self) -> int:
        return len(self.row.prompt_ids) + self.tokens

    @property
    def foreign(self) -> bool:
        """Whether the student did not sample it (Teacher response), so that no sampler knows its log-probs."""
        return bool(self.sampled_logprobs.isnan().any())

    @property
    def live(self) -> bool:
        """Whether it has a gradient at all: with no KL term, a rollout with A = 0 has exactly none."""
        return self.counted and self.advantage != 0


def samples_of(groups: Sequence[Group], advantages: torch.Tensor, *, mask_truncated: bool) -> list[list[Sample]]:
    """Samples per group."""
    values = iter(advantages.tolist())

    def sample(group: Group, rollout: Rollout) -> Sample:
        row = Row(group.prompt.ids + group.prompt.forced_ids, tuple(rollout.ids.tolist()), group.prompt.images)
        return Sample(row, rollout.logprobs, next(values), not (mask_truncated and rollout.truncated))

    return [[sample(group, rollout) for rollout in group.rollouts] for group in groups]


@dataclass(frozen=True, slots=True)
class Share:
    """What one process does of a minibatch (ours).

    Attributes:
        rows: (group, rollout) of its rows that have a gradient: whole groups.
        others: lengths of the rows of every other process.
    """

    rows: list[tuple[int, int]]
    others: list[list[int]]

    def idle_passes(self, own: int, split: Callable[[Sequence[int]], Sequence[object]]) -> int:
        """Micro-batches that another process has more than the `own` ones of this; all of them `split` their lengths alike."""
        return max([0, *(len(split(lengths)) - own for lengths in self.others)])


def share_minibatch(samples: Sequence[Sequence[Sample]], dealt: Sequence[int], *, rank: int, size: int) -> Share:
    """The share of a process in a minibatch of the groups `dealt`, balanced by tokens. All processes work out the same."""
    live = [[(g, i) for i, s in enumerate(samples[g]) if s.live] for g in dealt]
    parts = shares([sum(samples[g][i].length for g, i in rows) for rows in live], size)
    rows = [[row for part in mine for row in live[part]] for mine in parts]
    lengths = [[samples[g][i].length for g, i in mine] for mine in rows]
    return Share(rows[rank], [*lengths[:rank], *lengths[rank + 1 :]])
