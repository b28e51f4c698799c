"""Rollouts on their way into the loss, and which of them are a process's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zppo.core.minibatch import share_prompt, shares
from zppo.core.types import Group, Rollout
from zppo.engines.logprobs import Pack, Row, Sharing


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
    """What one process does of a minibatch [zppo].

    Attributes:
        rows: (group, rollout) of its rows that have a gradient: whole groups.
        others: the rows of every other process.
    """

    rows: list[tuple[int, int]]
    others: list[list[tuple[int, int]]]


def share_minibatch(samples: Sequence[Sequence[Sample]], dealt: Sequence[int], *, rank: int, size: int) -> Share:
    """The share of a process in a minibatch of the groups `dealt`, balanced by tokens. All processes work out the same."""
    live = [[(g, i) for i, s in enumerate(samples[g]) if s.live] for g in dealt]
    parts = shares([sum(samples[g][i].length for g, i in rows) for rows in live], size)
    rows = [[row for part in mine for row in live[part]] for mine in parts]
    return Share(rows[rank], [*rows[:rank], *rows[rank + 1 :]])


def packed(samples: Sequence[Sample], sharing: Sharing, most: int) -> list[list[int]]:
    """Indices of samples in packs that compute their prompt once, where that pays; of at most `most` tokens, if several share one.

    Rows with images stay alone.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        if not sample.row.images:
            by_prompt.setdefault(tuple(sample.row.prompt_ids), []).append(i)
    packs = [[i] for i, sample in enumerate(samples) if sample.row.images]
    for prompt, members in by_prompt.items():
        tokens = [samples[i].tokens for i in members]
        dealt = share_prompt(len(prompt), tokens, reach=sharing.reach, most=min(most, sharing.most))
        packs += [[members[j] for j in pack] for pack in dealt]
    return packs


def packs_of(samples: Sequence[Sample], packs: Sequence[Sequence[int]]) -> list[Pack]:
    """What a model is given."""
    return [Pack(samples[pack[0]].row.prompt_ids, [samples[i].row.completion_ids for i in pack]) for pack in packs]


def pack_length(samples: Sequence[Sample], pack: Sequence[int]) -> int:
    """Tokens of a prompt and its completions."""
    return len(samples[pack[0]].row.prompt_ids) + sum(samples[i].tokens for i in pack)
