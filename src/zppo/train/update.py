"""Advantages -> I optimizer steps (Alg. 1, l. 13; method.md sections 5 and 6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import nn

from zppo.core.advantages import group_advantages, two_step_advantages
from zppo.core.loss import clipped_surrogate
from zppo.core.metrics import mean
from zppo.core.minibatch import deal_groups
from zppo.core.types import Group
from zppo.engines.forward import completion_logprobs
from zppo.engines.sight import Sight
from zppo.errors import MemoryLimitError
from zppo.train.budget import TokenBudget
from zppo.train.guard import GuardedStep
from zppo.train.sampler_check import Gap, SamplerCheck
from zppo.train.samples import Sample, Share, samples_of, share_minibatch
from zppo.train.settings import AdvantageSettings, LossSettings, TrainSettings
from zppo.train.weights import Weights

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
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.sight = model, optimizer, accelerator, sight
        self.train, self.loss, self.seed = train, loss, seed
        self.temperature, self.banned_ids, self.pad_id = temperature, banned_ids, pad_id
        self.sampler_is_exact, self.check, self.stop = sampler_is_exact, check, stop
        self.budget = budget or TokenBudget(train.tokens_per_microbatch)
        self.weights = weights or Weights()
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
                if index == 0 and self._refuses(step, counts, minibatch, samples):
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
        tally.old_needed += sum(samples[g][i].length for g, i in unknown)

        def score(batches: list[list[int]]) -> None:
            for micro in batches:
                asked = [unknown[m] for m in micro]
                logprobs, _ = self._forward([samples[g][i] for g, i in asked])
                for (g, i), line in zip(asked, logprobs.float().cpu(), strict=True):
                    result[g, i] = line[: samples[g][i].tokens].clone()  # a view is sent with its whole batch

        if self.weights.team.any(bool(unknown)):
            with torch.no_grad(), self.weights.whole():
                self.budget.run([samples[g][i].length for g, i in unknown], score)
        return result

    def _refuses(
        self, step: int, counts: Tally, minibatch: Sequence[Sample], samples: Sequence[Sequence[Sample]]
    ) -> bool:
        """Whether the sampler's log-probs, which the first minibatch was computed with, are not the trainer's; all processes agree.

        Its rows are what is looked at, for nothing, since their forward pass was to be made anyway. Where none of them has a gradient
        a few others are scored: after the optimizer step it would be too late.
        """
        if self.check is None or not self.trusts_sampler:
            return False
        if not any(s.live and not s.foreign for s in minibatch):
            self._probe([s for group in samples for s in group if s.live and not s.foreign][:PROBE], counts)
        return self.check.refuses(step, counts.gap)

    def _probe(self, rows: Sequence[Sample], counts: Tally) -> None:
        """Counts the gap of rows that every process scores."""

        def score(batches: list[list[int]]) -> list[torch.Tensor]:
            found = []
            for micro in batches:
                logprobs, mask = self._forward([rows[m] for m in micro])
                found.append(_gap(logprobs, mask, [rows[m] for m in micro]))
            return found

        with torch.no_grad():
            parts = self.budget.run([s.length for s in rows], score) if rows else []
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
        live = [(samples[g][i], old[g, i]) for g, i in share.rows]
        denominator = sum(s.tokens for s in minibatch if s.counted)

        def accumulate(batches: list[list[int]]) -> tuple[float, Tally]:
            """An attempt that runs out of memory leaves nothing: gradients start at 0, and what it counted is dropped."""
            self.weights.start_gradients(self.model)
            counts = copy.copy(tally)
            sums = [self._backward([live[m] for m in micro], denominator, counts, first=first) for micro in batches]
            for _ in range(share.idle_passes(len(batches), self.budget.split) if self.weights.sharded else 0):
                self._idle(min((s for s in minibatch if s.live), key=lambda s: s.length))
            return counts.add(sums), counts

        return self.budget.run([s.length for s, _ in live], accumulate)

    def _step(self, total: float, tally: Tally) -> Tally:
        """One optimizer step with the gradients that are there."""
        total, norm, stepped = self.guard.step(total)
        tally.losses = [*tally.losses, total]
        tally.grad_norms = [*tally.grad_norms, norm]
        tally.skipped += not stepped
        return tally

    def _idle(self, sample: Sample) -> None:
        """A pass that adds nothing: where weights are sharded, a process without a row left takes part in those of the others."""
        logprobs, mask = self._forward([sample])
        self.weights.backward(logprobs.where(mask, 0.0).sum() * 0.0, self.accelerator)

    def _backward(
        self, rows: list[tuple[Sample, torch.Tensor]], denominator: int, tally: Tally, *, first: bool
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; sums over it (see `Tally.add`) that stay on the device: reading them would wait."""
        samples = [s for s, _ in rows]
        logprobs, mask = self._forward(samples)
        old = _padded([o for _, o in rows], logprobs.device)
        advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32)
        surrogate = clipped_surrogate(
            logprobs,
            old,
            advantages.to(logprobs.device, non_blocking=True),
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            dual_clip=self.loss.dual_clip,
        )
        loss = surrogate.loss.where(mask, 0.0).sum() / denominator
        self.weights.backward(loss, self.accelerator)
        tally.tokens += sum(s.tokens for s in samples)
        tally.needed += sum(s.length for s in samples)
        tally.computed += len(rows) * max(s.length for s in samples)
        clips = [(clip & mask).sum() for clip in surrogate[1:]]
        sums = torch.stack([loss.detach(), *clips]).float()
        # Before any update of this step: what the sampler said against what the trainer says.
        return torch.cat([sums, _gap(logprobs, mask, samples)]) if first else sums

    def _forward(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        with self.accelerator.autocast():  # the vision tower is called by itself
            return completion_logprobs(
                self.model,
                [s.row for s in samples],
                temperature=self.temperature,
                banned_ids=self.banned_ids,
                pad_id=self.pad_id,
                sight=self.sight,
            )


def _padded(lines: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """(B, T) of tensors on the CPU, without waiting for what the device has still to do."""
    return torch.nn.utils.rnn.pad_sequence(list(lines), batch_first=True).to(device, non_blocking=True)


def _gap(logprobs: torch.Tensor, mask: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """(3,) float32: sum, largest and number of the differences between sampler and trainer, over tokens that a sampler knows."""
    gap = (logprobs.detach() - _padded([s.sampled_logprobs for s in samples], logprobs.device)).abs()
    known = mask & ~gap.isnan()
    gap = gap.where(known, 0.0)
    return torch.stack([gap.sum(), gap.max(), known.sum()]).float()
