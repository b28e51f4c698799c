"""Advantages -> I optimizer steps (Alg. 1, l. 18; method.md sections 5 and 6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from zppo.config.settings import AdvantageSettings, LossSettings, TrainSettings
from zppo.core.advantages import group_advantages, two_step_advantages
from zppo.core.loss import clipped_surrogate
from zppo.core.minibatch import MicroBatch, deal_groups
from zppo.core.types import Group
from zppo.distributed.parallel import Weights, zero_gradients
from zppo.engines.logprobs import Sharing, completion_logprobs, shared_logprobs
from zppo.errors import MemoryLimitError
from zppo.images.processor import Sight
from zppo.train.budget import TokenBudget
from zppo.train.guard import GuardedStep
from zppo.train.sampler_check import SamplerCheck
from zppo.train.samples import Sample, Share, pack_length, packed, packs_of, samples_of, share_minibatch
from zppo.train.tally import Tally

Result = TypeVar("Result")

PROBE = 8
"""Rows that are scored to compare sampler and trainer where the first minibatch has none with a gradient."""


def advantages_of(groups: Sequence[Group], settings: AdvantageSettings) -> torch.Tensor:
    """Advantages of all rollouts of a step, in order of groups and rollouts, (N,) float32."""
    rollouts = [r for group in groups for r in group.rollouts]
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group.rollouts], dtype=torch.int64)
    graded = torch.tensor([r.graded for r in rollouts], dtype=torch.bool)
    if settings.scope == "group":
        return group_advantages(rewards, ids, eps=settings.eps, graded=graded)
    return two_step_advantages(rewards, ids, settings.scope, eps=settings.eps, graded=graded)


@dataclass(frozen=True, slots=True)
class Begun:
    """The update of a step between two of its I optimizer steps.

    Attributes:
        done: minibatches that are in the weights.
        tally: sums over them, of all processes.
        old: (T,) old log-probs of every rollout, of the weights before the first one.
    """

    done: int
    tally: Tally
    old: list[torch.Tensor]


class UpdateStopped(Exception):  # noqa: N818 - nothing went wrong
    """The run shall stop, and the update of a step waits at `begun`; the weights are those between two optimizer steps.

    Attributes:
        cause: the error that ends the run; None where somebody wants it to stop.
    """

    def __init__(self, begun: Begun, cause: MemoryLimitError | None = None) -> None:
        super().__init__(f"stopped after {begun.done} updates")
        self.begun, self.cause = begun, cause


class Updater:
    """Owns the optimizer; turns the groups of one rollout step into at most I optimizer steps.

    Args:
        model, optimizer: as `accelerator.prepare` returned them; weights in fp32, autocast is the accelerator's.
        temperature, banned_ids: as in sampling, so that log-probs are those of the sampling distribution.
        sampler_is_exact: whether `Rollout.logprobs` are old log-probs (old_logprobs: auto is resolved by the caller).
        check: takes that back where they turn out to be others than the trainer's; None for never.
        budget: tokens of a micro-batch; None for the setting's.
        stop: asked before each optimizer step: whether to leave the step there.
        weights: how the weights lie over the processes.
        sight: how the model sees the images of prompts; None for one that reads text only.
        sharing: when rows of one prompt compute it once; None for never.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        train: TrainSettings,
        loss: LossSettings,
        seed: int,
        temperature: float,
        banned_ids: tuple[int, ...],
        pad_id: int,
        sampler_is_exact: bool,
        check: SamplerCheck | None = None,
        budget: TokenBudget | None = None,
        stop: Callable[[], bool] = lambda: False,
        weights: Weights | None = None,
        sight: Sight | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.sight = model, optimizer, accelerator, sight
        self.train, self.loss, self.seed = train, loss, seed
        self.temperature, self.banned_ids, self.pad_id = temperature, banned_ids, pad_id
        self.sampler_is_exact, self.check, self.stop = sampler_is_exact, check, stop
        self.budget = budget or TokenBudget(train.tokens_per_microbatch)
        self.weights, self.sharing = weights or Weights(), sharing
        self.guard = GuardedStep(optimizer, accelerator, train.max_grad_norm, self.weights)

    @property
    def trusts_sampler(self) -> bool:
        """Whether the sampler's log-probs are old log-probs now."""
        return self.sampler_is_exact and not (self.check and self.check.refused)

    def update(
        self, groups: Sequence[Group], advantages: torch.Tensor, step: int, begun: Begun | None = None
    ) -> dict[str, float | None]:
        """I optimizer steps over whole groups; every rollout token is used once. Returns the metrics of the update.

        Args:
            begun: where the update of this step, of the same groups, was left; None: from its start.

        Raises:
            UpdateStopped: `stop` said so, in one of the processes; or memory ran out, and there is only this one.
            MemoryLimitError: memory ran out before the first optimizer step, or in one of several processes.
        """
        samples = samples_of(groups, advantages, mask_truncated=self.loss.mask_truncated)
        team = self.weights.team
        deals = deal_groups(len(groups), self.train.minibatches, seed=self.seed, step=step)
        mine = [share_minibatch(samples, dealt, rank=team.rank, size=team.size) for dealt in deals]
        rows = [row for share in mine for row in share.rows]
        if begun:
            tally = begun.tally if team.main else begun.tally.without_rows()
            lines = iter(begun.old)
            known = {(g, i): next(lines) for g, group in enumerate(samples) for i in range(len(group))}
            old = {row: known[row] for row in rows}
        else:
            tally = Tally(fallback=int(self.sampler_is_exact and not self.trusts_sampler))
            old = self._old_logprobs(samples, rows, tally)
        for index in range(begun.done if begun else 0, len(deals)):
            if team.any(self.stop()):
                raise UpdateStopped(self._begun(index, tally, samples, old))
            minibatch = [s for g in deals[index] for s in samples[g]]
            try:
                total, counts = self._gradients(minibatch, mine[index], samples, old, tally, first=index == 0)
                if index == 0 and self._refuses(step, counts, samples, minibatch):
                    # The weights have not moved yet: a forward pass still gives old log-probs.
                    tally.fallback, (tally.gap_sum, tally.gap_max, tally.gap_tokens) = 1, counts.gap
                    old = self._old_logprobs(samples, rows, tally)
                    total, counts = self._gradients(minibatch, mine[index], samples, old, tally, first=False)
                tally = self._step(total, counts)
            except MemoryLimitError as error:
                if team.size > 1:
                    raise  # the others wait for its gradients
                # There was no optimizer step: the weights are those before this minibatch.
                raise UpdateStopped(self._begun(index, tally, samples, old), error) from error
        first, *others = team.gather(tally)
        return {**first.plus(others).metrics(), "tokens_per_microbatch": float(self.budget.tokens)}

    def _begun(
        self,
        done: int,
        tally: Tally,
        samples: Sequence[Sequence[Sample]],
        old: Mapping[tuple[int, int], torch.Tensor],
    ) -> Begun:
        """What all processes together know after `done` minibatches."""
        parts = self.weights.team.gather((tally, dict(old)))
        known = {row: line for _, lines in parts for row, line in lines.items()}
        every = [known.get((g, i), s.sampled_logprobs) for g, group in enumerate(samples) for i, s in enumerate(group)]
        return Begun(done, parts[0][0].plus([other for other, _ in parts[1:]]), every)

    def _old_logprobs(
        self, samples: Sequence[Sequence[Sample]], rows: Sequence[tuple[int, int]], tally: Tally
    ) -> dict[tuple[int, int], torch.Tensor]:
        """(T,) per row, given as (group, rollout): the sampler's, or of a forward pass."""
        result = {(g, i): samples[g][i].sampled_logprobs for g, i in rows}
        unknown = [(g, i) for g, i in rows if samples[g][i].foreign or not self.trusts_sampler]
        asked = [samples[g][i] for g, i in unknown]
        tally.old_needed += sum(_needed(asked, micro) for micro in self._split(asked))

        def score(batches: list[MicroBatch]) -> None:
            for micro in batches:
                logprobs, _ = self._forward(asked, micro)
                for (g, i), line in zip([unknown[m] for m in micro.rows], logprobs.float().cpu(), strict=True):
                    result[g, i] = line[: samples[g][i].tokens].clone()  # a view is sent with its whole batch

        if self.weights.team.any(bool(unknown)):
            with torch.no_grad(), self.weights.whole():
                self._in_micro_batches(asked, score)
        return result

    def _refuses(
        self, step: int, counts: Tally, samples: Sequence[Sequence[Sample]], computed: Sequence[Sample]
    ) -> bool:
        """Whether the sampler's log-probs are not the trainer's, before the first optimizer step; all processes agree.

        Rows of the first minibatch that are `computed` are what is looked at, for nothing, since their forward pass was to be made anyway.
        Where none of them has a gradient a few others are scored: after the optimizer step it would be too late.
        """
        if self.check is None or not self.trusts_sampler:
            return False
        if not any(s.live and not s.foreign for s in computed):
            self._probe([s for group in samples for s in group if s.live and not s.foreign][:PROBE], counts)
        refused = self.check.refuses(step, counts.gap)
        counts.fallback = int(refused)
        return refused

    def _probe(self, rows: Sequence[Sample], counts: Tally) -> None:
        """Counts the gap of rows that every process scores."""

        def score(batches: list[MicroBatch]) -> list[torch.Tensor]:
            return [_gap(*self._forward(rows, micro), [rows[m] for m in micro.rows]) for micro in batches]

        with torch.no_grad(), self.weights.whole():
            parts = self._in_micro_batches(rows, score) if rows else []
        for part in parts if self.weights.team.main else ():
            counts.add_gap(*part.tolist())

    def _gradients(
        self,
        minibatch: Sequence[Sample],
        share: Share,
        samples: Sequence[Sequence[Sample]],
        old: Mapping[tuple[int, int], torch.Tensor],
        tally: Tally,
        *,
        first: bool,
    ) -> tuple[float, Tally]:
        """Gradients of a minibatch: token-level mean over all of it, rows without gradient only in the denominator.

        Args:
            share: this process's rows, with their old log-probs in `old`.

        Returns:
            What this process's rows add to the loss, and the tally with them.
        """
        live, known = [samples[g][i] for g, i in share.rows], [old[row] for row in share.rows]
        denominator = sum(s.tokens for s in minibatch if s.counted)

        def accumulate(batches: list[MicroBatch]) -> tuple[float, Tally]:
            """An attempt that runs out of memory leaves nothing: gradients start at 0, and what it counted is dropped."""
            zero_gradients(self.model)
            counts = copy.copy(tally)
            sums = [self._backward(live, known, micro, denominator, counts, first=first) for micro in batches]
            others = share.others if self.weights.sharded else []
            passes = [len(self._split([samples[g][i] for g, i in rows])) for rows in others]
            for _ in range(max(passes, default=0) - len(batches)):
                self._idle(min((s for s in minibatch if s.live), key=lambda s: s.length))
            return counts.add(sums), counts

        return self._in_micro_batches(live, accumulate)

    def _step(self, total: float, tally: Tally) -> Tally:
        """One optimizer step with the gradients that are there."""
        total, norm, stepped = self.guard.step(total)
        tally.losses = [*tally.losses, total]
        tally.grad_norms = [*tally.grad_norms, norm]
        tally.skipped += not stepped
        return tally

    def _idle(self, sample: Sample) -> None:
        """A pass that adds nothing: where weights are sharded, a process without a row left takes part in those of the others."""
        logprobs, mask = self._forward([sample], MicroBatch([[0]], sample.length))
        self.accelerator.backward(logprobs.where(mask, 0.0).sum() * 0.0)

    def _backward(
        self,
        live: Sequence[Sample],
        old: Sequence[torch.Tensor],
        micro: MicroBatch,
        denominator: int,
        tally: Tally,
        *,
        first: bool,
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; sums over it (see `Tally.add`) that stay on the device: reading them would wait."""
        samples = [live[m] for m in micro.rows]
        logprobs, mask = self._forward(live, micro)
        advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32)
        surrogate = clipped_surrogate(
            logprobs,
            _padded([old[m] for m in micro.rows], logprobs.device),
            advantages.to(logprobs.device, non_blocking=True),
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            dual_clip=self.loss.dual_clip,
        )
        loss = surrogate.loss.where(mask, 0.0).sum() / denominator
        self.accelerator.backward(loss)
        tally.tokens += sum(s.tokens for s in samples)
        tally.needed += _needed(live, micro)
        tally.computed += micro.padded
        clips = [(clip & mask).sum() for clip in surrogate[1:]]
        sums = torch.stack([loss.detach(), *clips]).float()
        # Before any update of this step: what the sampler said against what the trainer says.
        return torch.cat([sums, _gap(logprobs, mask, samples)]) if first else sums

    def _split(self, rows: Sequence[Sample]) -> list[MicroBatch]:
        """Micro-batches of rows: packs that share a prompt apart from single rows, which need no attention mask."""
        packs = packed(rows, self.sharing, self.budget.tokens) if self.sharing else [[i] for i in range(len(rows))]
        kinds = [pack for pack in packs if len(pack) > 1], [pack for pack in packs if len(pack) == 1]
        return [m for kind in kinds for m in self.budget.split([pack_length(rows, pack) for pack in kind], kind)]

    def _in_micro_batches(self, rows: Sequence[Sample], work: Callable[[list[MicroBatch]], Result]) -> Result:
        return self.budget.run([s.length for s in rows], work, lambda: self._split(rows))

    def _forward(self, rows: Sequence[Sample], micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (B, T) and completion mask of `micro.rows`."""
        how: dict[str, Any] = {"temperature": self.temperature, "banned_ids": self.banned_ids, "pad_id": self.pad_id}
        if len(micro.rows) > len(micro.packs):
            return shared_logprobs(self.model, packs_of(rows, micro.packs), **how)
        with self.accelerator.autocast():  # the vision tower is called by itself
            return completion_logprobs(self.model, [rows[m].row for m in micro.rows], sight=self.sight, **how)


def _needed(rows: Sequence[Sample], micro: MicroBatch) -> int:
    """Tokens of a micro-batch without padding; a shared prompt counts once."""
    return sum(pack_length(rows, pack) for pack in micro.packs)


def _padded(lines: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """(B, T) of tensors on the CPU, without waiting for what the device has still to do."""
    return torch.nn.utils.rnn.pad_sequence(list(lines), batch_first=True).to(device, non_blocking=True)


def _gap(logprobs: torch.Tensor, mask: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """(3,) float32: sum, largest and number of the differences between sampler and trainer, over tokens that a sampler knows."""
    gap = (logprobs.detach() - _padded([s.sampled_logprobs for s in samples], logprobs.device)).abs()
    known = mask & ~gap.isnan()
    gap = gap.where(known, 0.0)
    return torch.stack([gap.sum(), gap.max(), known.sum()]).float()
