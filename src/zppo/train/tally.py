"""What an update counts, micro-batch by micro-batch, and the metrics that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from zppo.core.metrics import mean
from zppo.train.sampler_check import Gap


@dataclass(slots=True)
class Tally:
    """Sums over the micro-batches of a step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens: int = 0
    clipped_low: int = 0
    clipped_high: int = 0
    clipped_dual: int = 0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    gap_tokens: int = 0
    needed: int = 0
    computed: int = 0
    old_needed: int = 0
    skipped: int = 0
    fallback: int = 0  # 1 where the sampler's log-probs were to be old log-probs, and were refused

    @property
    def gap(self) -> Gap:
        """Between sampler and trainer, before the first update."""
        return Gap(self.gap_sum, self.gap_max, self.gap_tokens)

    def add(self, sums: Sequence[torch.Tensor]) -> float:
        """Counts what `Updater._backward` gave for each micro-batch, read at once; returns their loss.

        Float32 holds whole numbers up to 16 million, more than a micro-batch has tokens.
        """
        loss = 0.0
        for line in torch.stack(list(sums)).tolist() if sums else ():
            loss += line[0]
            self.clipped_low += int(line[1])
            self.clipped_high += int(line[2])
            self.clipped_dual += int(line[3])
            if len(line) > 4:
                self.add_gap(*line[4:])
        return loss

    def add_gap(self, total: float, largest: float, tokens: float) -> None:
        """Counts differences between sampler and trainer."""
        self.gap_sum += total
        self.gap_max = max(self.gap_max, largest)
        self.gap_tokens += int(tokens)

    def plus(self, others: Sequence[Tally]) -> Tally:
        """With what other processes have counted of their rows; losses, norms and skipped updates are everybody's already."""
        summed = {name: sum(getattr(t, name) for t in (self, *others)) for name in _COUNTED}
        return replace(self, gap_max=max(t.gap_max for t in (self, *others)), **summed)

    def without_rows(self) -> Tally:
        """Losses, norms and skipped updates alone."""
        return Tally(losses=list(self.losses), grad_norms=list(self.grad_norms), skipped=self.skipped)

    def metrics(self) -> dict[str, float | None]:
        tokens = max(1, self.tokens)
        return {
            "loss": mean(self.losses),
            "grad_norm": mean(self.grad_norms),
            "clip_low_share": self.clipped_low / tokens,
            "clip_high_share": self.clipped_high / tokens,
            "clip_dual_share": self.clipped_dual / tokens,
            "logprob_gap_mean": self.gap_sum / self.gap_tokens if self.gap_tokens else None,
            "logprob_gap_max": self.gap_max if self.gap_tokens else None,
            "optimizer_steps": float(len(self.losses) - self.skipped),
            "skipped_updates": float(self.skipped),
            "train_tokens_needed": float(self.needed),
            "train_tokens_computed": float(self.computed),
            "logprob_tokens": float(self.old_needed),
            "logprob_fallback": float(self.fallback),
        }


_COUNTED = tuple("tokens clipped_low clipped_high clipped_dual gap_sum gap_tokens needed computed old_needed".split())
