"""Advantages -> I optimizer steps (Alg. 1, l. 13; method.md sections 5 and 6)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from zppo.core.advantages import group_advantages, two_step_advantages
from zppo.core.loss import clipped_surrogate
from zppo.core.metrics import mean
from zppo.core.minibatch import deal_groups
from zppo.core.types import Group, Rollout
from zppo.engines.forward import Row, completion_logprobs
from zppo.errors import ZPPOError
from zppo.train.budget import TokenBudget, zero_gradients
from zppo.train.settings import AdvantageSettings, LossSettings, TrainSettings

MOST_SKIPPED_UPDATES = 3


def advantages_of(groups: Sequence[Group], settings: AdvantageSettings) -> torch.Tensor:
    """Advantages of all rollouts of a step, in order of groups and rollouts, (N,) float32."""
    rollouts = [r for group in groups for r in group.rollouts]
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group.rollouts], dtype=torch.int64)
    graded = torch.tensor([r.graded for r in rollouts], dtype=torch.bool)
    if settings.scope == "group":
        return group_advantages(rewards, ids, eps=settings.eps, graded=graded)
    return two_step_advantages(rewards, ids, settings.scope, eps=settings.eps, graded=graded)


class GuardedStep:
    """Clips the gradient norm and steps, unless loss or norm is not finite: then the update is skipped, and three in a row stop the run.

    Attributes:
        skipped_in_a_row: part of a checkpoint.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.max_norm = model, optimizer, accelerator, max_norm
        self.skipped_in_a_row = 0

    def step(self, loss: float) -> tuple[float, bool]:
        """Gradient norm before clipping, and whether the weights moved; gradients are 0 afterwards.

        Raises:
            ZPPOError: too many updates in a row were not finite.
        """
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_norm))
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.optimizer.step()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.optimizer.zero_grad(set_to_none=False)
        if self.skipped_in_a_row >= MOST_SKIPPED_UPDATES:
            raise ZPPOError(
                f"loss {loss} and gradient norm {norm}: {MOST_SKIPPED_UPDATES} updates in a row were not finite. The weights are "
                "unchanged since the last finite update. Lower train.learning_rate, or look for odd rewards in the rollout log"
            )
        return norm, finite


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
        row = Row(group.prompt.ids + group.prompt.forced_ids, tuple(rollout.ids.tolist()))
        return Sample(row, rollout.logprobs, next(values), not (mask_truncated and rollout.truncated))

    return [[sample(group, rollout) for rollout in group.rollouts] for group in groups]


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


@dataclass(frozen=True, slots=True)
class Begun:
    """The update of a step between two of its I optimizer steps.

    Attributes:
        done: minibatches that are in the weights.
        tally: sums over them.
        old: (T,) old log-probs of every rollout, of the weights before the first one.
    """

    done: int
    tally: Tally
    old: list[torch.Tensor]


class UpdateStopped(Exception):  # noqa: N818 - nothing went wrong
    """The run shall stop, and the update of a step waits at `begun`; the weights are those between two optimizer steps."""

    def __init__(self, begun: Begun) -> None:
        super().__init__(f"stopped after {begun.done} updates")
        self.begun = begun


class Updater:
    """Owns the optimizer; turns the groups of one rollout step into at most I optimizer steps.

    Args:
        model, optimizer: as `accelerator.prepare` returned them; weights in fp32, autocast is the accelerator's.
        temperature, banned_ids: as in sampling, so that log-probs are those of the sampling distribution.
        sampler_is_exact: whether `Rollout.logprobs` are old log-probs (old_logprobs: auto is resolved by the caller).
        budget: tokens of a micro-batch; None for the setting's.
        stop: asked before each optimizer step: whether to leave the step there.
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
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.train, self.loss, self.seed = train, loss, seed
        self.temperature, self.banned_ids, self.pad_id = temperature, banned_ids, pad_id
        self.sampler_is_exact, self.stop = sampler_is_exact, stop
        self.budget = budget or TokenBudget(train.tokens_per_microbatch)
        self.guard = GuardedStep(model, optimizer, accelerator, train.max_grad_norm)

    def update(
        self, groups: Sequence[Group], advantages: torch.Tensor, step: int, begun: Begun | None = None
    ) -> dict[str, float | None]:
        """I optimizer steps over whole groups; every rollout token is used once. Returns the metrics of the update.

        Args:
            begun: where the update of this step, of the same groups, was left; None: from its start.

        Raises:
            UpdateStopped: `stop` said so.
        """
        samples = samples_of(groups, advantages, mask_truncated=self.loss.mask_truncated)
        tally = begun.tally if begun else Tally()
        lines = begun.old if begun else self._old_logprobs(samples, tally)
        each = iter(lines)
        old = [[next(each) for _ in group] for group in samples]
        dealt = deal_groups(len(groups), self.train.minibatches, seed=self.seed, step=step)
        for index in range(begun.done if begun else 0, len(dealt)):
            if self.stop():
                raise UpdateStopped(Begun(index, tally, lines))
            rows = [(s, o) for g in dealt[index] for s, o in zip(samples[g], old[g], strict=True)]
            tally = self._minibatch(rows, tally, first=index == 0)
        return {**tally.metrics(), "tokens_per_microbatch": float(self.budget.tokens)}

    def _old_logprobs(self, samples: list[list[Sample]], tally: Tally) -> list[torch.Tensor]:
        """(T,) per sample, in their order: the sampler's, or of a forward pass, over the rows that have a gradient."""
        flat = [s for group in samples for s in group]
        result = [s.sampled_logprobs for s in flat]
        live = [i for i, s in enumerate(flat) if s.live and (s.foreign or not self.sampler_is_exact)]
        tally.old_needed = sum(flat[i].length for i in live)

        def score(batches: list[list[int]]) -> None:
            for micro in batches:
                rows = [flat[live[m]] for m in micro]
                logprobs, _ = self._forward(rows)
                for m, sample, line in zip(micro, rows, logprobs.float().cpu(), strict=True):
                    result[live[m]] = line[: sample.tokens]

        with torch.no_grad():
            self.budget.run([flat[i].length for i in live], score)
        return result

    def _minibatch(self, rows: list[tuple[Sample, torch.Tensor]], tally: Tally, *, first: bool) -> Tally:
        """One optimizer step: token-level mean over the minibatch, rows without gradient only in the denominator."""
        denominator = sum(s.tokens for s, _ in rows if s.counted)
        live = [(s, o) for s, o in rows if s.live]

        def accumulate(batches: list[list[int]]) -> tuple[float, Tally]:
            """An attempt that runs out of memory leaves nothing: gradients start at 0, and what it counted is dropped."""
            zero_gradients(self.model)
            counts, total = copy.copy(tally), 0.0
            for micro in batches:
                total += self._backward([live[m] for m in micro], denominator, counts, first=first)
            return total, counts

        total, tally = self.budget.run([s.length for s, _ in live], accumulate)
        norm, stepped = self.guard.step(total)
        tally.losses.append(total)
        tally.grad_norms.append(norm)
        tally.skipped += not stepped
        return tally

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
        self.accelerator.backward(loss)
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
        return completion_logprobs(
            self.model,
            [s.row for s in samples],
            temperature=self.temperature,
            banned_ids=self.banned_ids,
            pad_id=self.pad_id,
        )
