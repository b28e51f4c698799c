"""The rows of a batch while it is decoded: what each has drawn, and which still go on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zppo.engines.base import Completion
from zppo.engines.draw import Draws
from zppo.errors import ModelError

DROP_SHARE = 16  # rows are dropped once one in so many has finished


class Rows:
    """Notes what is drawn, drops rows that have finished, and hands their completions over when it does.

    Args:
        limits: (R,) most tokens of each row.
        ends: (V,) bool, which ids end a completion.
        look_every: steps between looks at what has finished.
        end: given the number of each row with its completion, up to its first end token, else up to its limit.

    Attributes:
        rows: numbers of the rows that go on, in the order in which they lie in the batch now, (R',).
        longest: steps after which all have finished.
    """

    def __init__(
        self, limits: torch.Tensor, ends: torch.Tensor, look_every: int, end: Callable[[int, Completion], None]
    ) -> None:
        self.rows = torch.arange(len(limits), device=limits.device)
        self.longest, self._shortest = int(limits.max()), int(limits.min())
        self._limits, self._ends, self._look_every, self._end = limits, ends, look_every, end
        self._live = torch.ones_like(self.rows, dtype=torch.bool)
        nothing = torch.zeros(len(limits), 0, device=limits.device)
        self._before = Draws(nothing.long(), nothing, nothing)  # (R', T') of the rows as they lie now
        self._since: list[Draws] = []  # (R',) each
        self._step = 0

    def record(self, draws: Draws) -> torch.Tensor | None:
        """Notes one step. Returns the places in the batch to go on with, None for all; `rows` is empty once all are done.

        Raises:
            ModelError: a log-prob of a row that has finished is not a number.
        """
        self._since.append(draws)
        self._step += 1
        self._live &= ~self._ends[draws.tokens]
        if self._step >= self._shortest:
            self._live &= self._limits[self.rows] > self._step
        if self._step % self._look_every and self._step < self._shortest:
            return None
        count = int(self._live.sum())
        if count and (len(self.rows) - count) * DROP_SHARE < len(self.rows):
            return None
        # The last live rows fill the gaps, so that most stay where they are.
        kept = torch.arange(count, device=self.rows.device)
        kept[~self._live[:count]] = self._live[count:].nonzero()[:, 0] + count
        self._drop((~self._live).nonzero()[:, 0], kept)
        return kept

    def _drop(self, gone: torch.Tensor, kept: torch.Tensor) -> None:
        """Hands the rows at the places `gone` over, and goes on with those at `kept`."""
        new = (torch.stack(part, 1) for part in zip(*self._since, strict=True))
        whole = Draws(*(torch.cat(parts, 1) for parts in zip(self._before, new, strict=True)))
        rows, ended = self.rows[gone], Draws(*(part[gone] for part in whole))
        self._before, self._since = Draws(*(part[kept] for part in whole)), []
        self.rows, self._live = self.rows[kept], self._live[kept]
        places = torch.arange(self._step, device=rows.device)
        first_end = torch.where(self._ends[ended.tokens], places, self._step).amin(-1)
        lengths = torch.minimum(first_end + 1, self._limits[rows])
        written = places < lengths[:, None]
        if bool((ended.logprobs.isnan() & written).any()):
            raise ModelError(
                "the model's logits are not numbers while sampling: its weights have diverged or its precision overflows; "
                "go back to a checkpoint with a lower learning rate, or use bf16 or fp32 instead of fp16"
            )
        means = ((ended.entropies * written).sum(-1) / lengths).tolist()
        truncated = (first_end + 1 > self._limits[rows]).tolist()
        tokens, logprobs = ended.tokens.cpu(), ended.logprobs.cpu()
        for i, (row, n) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            self._end(row, Completion(tokens[i, :n].clone(), logprobs[i, :n].clone(), truncated[i], means[i]))
