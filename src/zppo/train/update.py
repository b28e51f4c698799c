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
from zppo.train.samples import Sample, Share, samples_of, share_minibatch
from zppo.train.settings import AdvantageSettings, LossSettings, TrainSettings
from zppo.train.weights import Weights


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
        budget: TokenBudget | None = None,
        stop: Callable[[], bool] = lambda: False,
        weights: Weights | None = None,
        sight: Sight | None = None,
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.sight = model, optimizer, accelerator, sight
        self.train, self.loss, self.seed = train, loss, seed
        self.temperature, self.banned_ids, self.pad_id = temperature, banned_ids, pad_id
        self.sampler_is_exact, self.stop = sampler_is_exact, stop
        self.budget = budget or TokenBudget(train.tokens_per_microbatch)
        self.weights = weights or Weights()
        self.guard = GuardedStep(optimizer, accelerator, train.max_grad_norm, self.weights)

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
            tally = Tally()
            old = self._old_logprobs(samples, rows, tally)
        for index in range(begun.done if begun else 0, len(deals)):
            if team.any(self.stop()):
                raise UpdateStopped(self._begun(index, tally, samples, old))
            live = [(samples[g][i], old[g, i]) for g, i in mine[index].rows]
            minibatch = [s for g in deals[index] for s in samples[g]]
            try:
                tally = self._minibatch(minibatch, live, mine[index], tally, first=index == 0)
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
        unknown = [(g, i) for g, i in rows if samples[g][i].foreign or not self.sampler_is_exact]
        tally.old_needed = sum(samples[g][i].length for g, i in unknown)

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

    def _minibatch(
        self,
        samples: Sequence[Sample],
        live: Sequence[tuple[Sample, torch.Tensor]],
        share: Share,
        tally: Tally,
        *,
        first: bool,
    ) -> Tally:
        """One optimizer step: token-level mean over the minibatch, rows without gradient only in the denominator.

        Args:
            samples: the whole minibatch.
            live: those that have a gradient and are this process's, with their old log-probs.
        """
        denominator = sum(s.tokens for s in samples if s.counted)

        def accumulate(batches: list[list[int]]) -> tuple[float, Tally]:
            """An attempt that runs out of memory leaves nothing: gradients start at 0, and what it counted is dropped."""
            self.weights.start_gradients(self.model)
            counts, total = copy.copy(tally), 0.0
            for micro in batches:
                total += self._backward([live[m] for m in micro], denominator, counts, first=first)
            for _ in range(share.idle_passes(len(batches), self.budget.split) if self.weights.sharded else 0):
                self._idle(min((s for s in samples if s.live), key=lambda s: s.length))
            return total, counts

        total, tally = self.budget.run([s.length for s, _ in live], accumulate)
        total, norm, stepped = self.guard.step(total)
        tally.losses.append(total)
        tally.grad_norms.append(norm)
        tally.skipped += not stepped
        return tally

    def _idle(self, sample: Sample) -> None:
        """A pass that adds nothing: where weights are sharded, a process without a row left takes part in those of the others."""
        logprobs, mask = self._forward([sample])
        self.weights.backward(logprobs.where(mask, 0.0).sum() * 0.0, self.accelerator)

    def _backward(
        self, rows: list[tuple[Sample, torch.Tensor]], denominator: int, tally: Tally, *, first: bool
    ) -> float:
        """Forward and backward of one micro-batch; returns its share of the minibatch's loss."""
        logprobs, mask = self._forward([s for s, _ in rows])
        old = torch.nn.utils.rnn.pad_sequence([o for _, o in rows], batch_first=True).to(logprobs.device)
        advantages = torch.tensor([s.advantage for s, _ in rows], dtype=torch.float32, device=logprobs.device)
        surrogate = clipped_surrogate(
            logprobs,
            old,
            advantages,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            dual_clip=self.loss.dual_clip,
        )
        loss = surrogate.loss.where(mask, 0.0).sum() / denominator
        self.weights.backward(loss, self.accelerator)
        tally.tokens += int(mask.sum())
        tally.clipped_low += int((surrogate.clipped_low & mask).sum())
        tally.clipped_high += int((surrogate.clipped_high & mask).sum())
        tally.clipped_dual += int((surrogate.clipped_dual & mask).sum())
        if first:  # before any update of this step: what the sampler said against what the trainer says
            gap = (
                logprobs.detach()
                - torch.nn.utils.rnn.pad_sequence([s.sampled_logprobs for s, _ in rows], True).to(logprobs.device)
            ).abs()
            sampled = mask & ~gap.isnan()
            tally.gap_sum += float(gap.where(sampled, 0.0).sum())
            tally.gap_max = max(tally.gap_max, float(gap.where(sampled, 0.0).max()))
            tally.gap_tokens += int(sampled.sum())
        tally.needed += sum(s.length for s, _ in rows)
        tally.computed += len(rows) * max(s.length for s, _ in rows)
        return float(loss.detach())

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
