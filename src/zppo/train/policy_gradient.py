"""The policy gradient: advantages -> I optimizer steps of the clipped surrogate (Alg. 1, l. 18; method.md sections 5 and 6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from zppo.config.settings import AdvantageSettings, LossSettings, TrainSettings
from zppo.core.advantages import group_advantages, two_step_advantages
from zppo.core.draws import keyed_random
from zppo.core.loss import clipped_surrogate
from zppo.core.metrics import mean
from zppo.core.minibatch import MicroBatch, deal_groups
from zppo.core.types import Group, Rollout
from zppo.distributed.parallel import ReplicatedWeights, zero_gradients
from zppo.engines.logprobs import Sharing, completion_logprobs, shared_logprobs
from zppo.errors import MemoryLimitError
from zppo.images.processor import ImageProcessor
from zppo.rollout.teacher import Pools
from zppo.teacher.compression import Source
from zppo.train.engine_checks import Gap, SamplerCheck
from zppo.train.optimizer_step import OptimizerStep, TokenBudget
from zppo.train.samples import Sample, Share, pack_length, packed, packs_of, samples_of, share_minibatch


@dataclass(slots=True)
class UpdateCounts:
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

    def plus(self, others: Sequence[UpdateCounts]) -> UpdateCounts:
        """With what other processes have counted of their rows; losses, norms and skipped updates are everybody's already."""
        summed = {name: sum(getattr(t, name) for t in (self, *others)) for name in _COUNTED}
        return replace(self, gap_max=max(t.gap_max for t in (self, *others)), **summed)

    def without_rows(self) -> UpdateCounts:
        """Losses, norms and skipped updates alone."""
        return UpdateCounts(losses=list(self.losses), grad_norms=list(self.grad_norms), skipped=self.skipped)

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
        return group_advantages(rewards, ids, graded=graded)
    return two_step_advantages(rewards, ids, settings.scope, graded=graded)


@dataclass(frozen=True, slots=True)
class PartialUpdate:
    """The update of a step between two of its I optimizer steps.

    Attributes:
        done: minibatches that are in the weights.
        tally: sums over them, of all processes.
        old: (T,) old log-probs of every rollout, of the weights before the first one.
    """

    done: int
    tally: UpdateCounts
    old: list[torch.Tensor]


class UpdateStopped(Exception):  # noqa: N818 - nothing went wrong
    """The run shall stop, and the update of a step waits at `begun`; the weights are those between two optimizer steps.

    Attributes:
        cause: the error that ends the run; None where somebody wants it to stop.
    """

    def __init__(self, begun: PartialUpdate, cause: MemoryLimitError | None = None) -> None:
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
        image_processor: how the model sees the images of prompts; None for one that reads text only.
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
        weights: ReplicatedWeights | None = None,
        image_processor: ImageProcessor | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.image_processor = (
            model,
            optimizer,
            accelerator,
            image_processor,
        )
        self.train, self.loss, self.seed = train, loss, seed
        self.temperature, self.banned_ids, self.pad_id = temperature, banned_ids, pad_id
        self.sampler_is_exact, self.check, self.stop = sampler_is_exact, check, stop
        self.budget = budget or TokenBudget(train.tokens_per_microbatch)
        self.weights, self.sharing = weights or ReplicatedWeights(), sharing
        self.guard = OptimizerStep(optimizer, accelerator, train.max_grad_norm, self.weights)

    @property
    def trusts_sampler(self) -> bool:
        """Whether the sampler's log-probs are old log-probs now."""
        return self.sampler_is_exact and not (self.check and self.check.refused)

    def update(
        self, groups: Sequence[Group], advantages: torch.Tensor, step: int, begun: PartialUpdate | None = None
    ) -> dict[str, float | None]:
        """I optimizer steps over whole groups; every rollout token is used once. Returns the metrics of the update.

        Args:
            begun: where the update of this step, of the same groups, was left; None: from its start.

        Raises:
            UpdateStopped: `stop` said so, in one of the processes; or memory ran out, and there is only this one.
            MemoryLimitError: memory ran out before the first optimizer step, or in one of several processes.
        """
        samples = samples_of(groups, advantages, mask_truncated=self.loss.mask_truncated)
        processes = self.weights.processes
        deals = deal_groups(len(groups), self.train.minibatches, seed=self.seed, step=step)
        mine = [share_minibatch(samples, dealt, rank=processes.rank, size=processes.size) for dealt in deals]
        rows = [row for share in mine for row in share.rows]
        if begun:
            tally = begun.tally if processes.main else begun.tally.without_rows()
            lines = iter(begun.old)
            known = {(g, i): next(lines) for g, group in enumerate(samples) for i in range(len(group))}
            old = {row: known[row] for row in rows}
        else:
            tally = UpdateCounts(fallback=int(self.sampler_is_exact and not self.trusts_sampler))
            old = self._old_logprobs(samples, rows, tally)
        for index in range(begun.done if begun else 0, len(deals)):
            if processes.any(self.stop()):
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
                if processes.size > 1:
                    raise  # the others wait for its gradients
                # There was no optimizer step: the weights are those before this minibatch.
                raise UpdateStopped(self._begun(index, tally, samples, old), error) from error
        first, *others = processes.gather(tally)
        return {**first.plus(others).metrics(), "tokens_per_microbatch": float(self.budget.tokens)}

    def _begun(
        self,
        done: int,
        tally: UpdateCounts,
        samples: Sequence[Sequence[Sample]],
        old: Mapping[tuple[int, int], torch.Tensor],
    ) -> PartialUpdate:
        """What all processes together know after `done` minibatches."""
        parts = self.weights.processes.gather((tally, dict(old)))
        known = {row: line for _, lines in parts for row, line in lines.items()}
        every = [known.get((g, i), s.sampled_logprobs) for g, group in enumerate(samples) for i, s in enumerate(group)]
        return PartialUpdate(done, parts[0][0].plus([other for other, _ in parts[1:]]), every)

    def _old_logprobs(
        self, samples: Sequence[Sequence[Sample]], rows: Sequence[tuple[int, int]], tally: UpdateCounts
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

        if self.weights.processes.any(bool(unknown)):
            with torch.no_grad(), self.weights.whole():
                self._in_micro_batches(asked, score)
        return result

    def _refuses(
        self, step: int, counts: UpdateCounts, samples: Sequence[Sequence[Sample]], computed: Sequence[Sample]
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

    def _probe(self, rows: Sequence[Sample], counts: UpdateCounts) -> None:
        """Counts the gap of rows that every process scores."""

        def score(batches: list[MicroBatch]) -> list[torch.Tensor]:
            return [_gap(*self._forward(rows, micro), [rows[m] for m in micro.rows]) for micro in batches]

        with torch.no_grad(), self.weights.whole():
            parts = self._in_micro_batches(rows, score) if rows else []
        for part in parts if self.weights.processes.main else ():
            counts.add_gap(*part.tolist())

    def _gradients(
        self,
        minibatch: Sequence[Sample],
        share: Share,
        samples: Sequence[Sequence[Sample]],
        old: Mapping[tuple[int, int], torch.Tensor],
        tally: UpdateCounts,
        *,
        first: bool,
    ) -> tuple[float, UpdateCounts]:
        """Gradients of a minibatch: token-level mean over all of it, rows without gradient only in the denominator.

        Args:
            share: this process's rows, with their old log-probs in `old`.

        Returns:
            What this process's rows add to the loss, and the tally with them.
        """
        live, known = [samples[g][i] for g, i in share.rows], [old[row] for row in share.rows]
        denominator = sum(s.tokens for s in minibatch if s.counted)

        def accumulate(batches: list[MicroBatch]) -> tuple[float, UpdateCounts]:
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

    def _step(self, total: float, tally: UpdateCounts) -> UpdateCounts:
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
        tally: UpdateCounts,
        *,
        first: bool,
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; sums over it (`UpdateCounts.add`) that stay on the device: reading would wait."""
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
            return completion_logprobs(
                self.model, [rows[m].row for m in micro.rows], image_processor=self.image_processor, **how
            )


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


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What a step did to the weights.

    Attributes:
        groups: what was learnt from, plain groups first; the rollout log holds these.
        advantages: (N,) of their rollouts; 0 where none is used.
        metrics: numbers for the run log.
        teacher_error: why the teacher could not serve a request that learning needed; "" where it served all.
        fault: why the run has to stop after this step; "" where it goes on.
    """

    groups: list[Group]
    advantages: torch.Tensor
    metrics: dict[str, float | None]
    teacher_error: str = ""
    fault: str = ""


class Learner(Protocol):
    """Turns the groups of a step into optimizer steps."""

    def learn(
        self,
        plain: Sequence[Group],
        again: Sequence[Group],
        pools: Pools,
        step: int,
        begun: PartialUpdate | None = None,
    ) -> UpdateResult:
        """Learn from plain groups, reformulated groups and correct teacher responses.

        Args:
            begun: where `UpdateStopped` left the same step; None: from its start.

        Raises:
            UpdateStopped: the run shall stop, and the learner is between two optimizer steps.
            MemoryLimitError: memory ran out; in one process only before the first optimizer step.
        """
        ...

    def state_dict(self) -> dict[str, int]:
        """What the next step depends on, besides weights and optimizer; JSON-ready."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state."""
        ...


class PolicyGradient:
    """The clipped surrogate over all groups of a step.

    Args:
        updater: the optimizer steps.
        advantage: how advantages are computed.
        respond: makes a rollout of a teacher response; None for methods without Teacher response.
        drop_trivial: leave groups whose rewards are all equal out of the batch and its denominator (dynamic sampling after
            reformulation, an extension).
        seed: keys the draws.
    """

    def __init__(
        self,
        updater: Updater,
        advantage: AdvantageSettings,
        *,
        respond: Callable[[Source], Rollout | None] | None,
        drop_trivial: bool,
        seed: int,
    ) -> None:
        self.updater, self.advantage, self.respond = updater, advantage, respond
        self.drop_trivial, self.seed = drop_trivial, seed

    def learn(
        self,
        plain: Sequence[Group],
        again: Sequence[Group],
        pools: Pools,
        step: int,
        begun: PartialUpdate | None = None,
    ) -> UpdateResult:
        """Advantages over the whole step, then I optimizer steps."""
        groups = [*(self._with_response(g, pools, step) for g in plain), *again]
        replaced = sum(a is not b for a, b in zip(groups, plain, strict=False))
        kept = [g for g in groups if not (self.drop_trivial and trivial(g))]
        inside = advantages_of(kept, self.advantage)
        metrics = self.updater.update(kept, inside, step, begun)
        if self.respond is not None:
            metrics["teacher_responses_in_groups"] = float(replaced)
        return UpdateResult(groups, self._spread(groups, kept, inside), metrics, fault=self.updater.guard.fault)

    def state_dict(self) -> dict[str, int]:
        checked = self.updater.check.state_dict() if self.updater.check else {}
        return {
            "skipped_in_a_row": self.updater.guard.skipped_in_a_row,
            **self.updater.budget.state_dict(),
            **checked,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updater.guard.skipped_in_a_row = state["skipped_in_a_row"]
        self.updater.budget.load_state_dict(state)
        if self.updater.check:
            self.updater.check.load_state_dict(state)

    def _with_response(self, group: Group, pools: Pools, step: int) -> Group:
        """A correct teacher response in the place of a wrong rollout, both drawn uniformly, as if the student had sampled it."""
        pool = pools.get(group.question.id, ()) if self.respond is not None else ()
        wrong = [i for i, r in enumerate(group.rollouts) if r.graded and not r.correct]
        if self.respond is None or not pool or not wrong:
            return group
        rng = keyed_random(self.seed, "teacher-response", step, group.question.id)
        rollout, place = self.respond(rng.choice(pool)), rng.choice(wrong)
        if rollout is None:
            return group
        return replace(group, rollouts=(*group.rollouts[:place], rollout, *group.rollouts[place + 1 :]))

    @staticmethod
    def _spread(groups: Sequence[Group], kept: Sequence[Group], inside: torch.Tensor) -> torch.Tensor:
        """Advantages of all rollouts, 0 for those of groups that left."""
        values, held = iter(inside.tolist()), {id(g) for g in kept}
        return torch.tensor([next(values) if id(g) in held else 0.0 for g in groups for _ in g.rollouts])


def trivial(group: Group) -> bool:
    """Whether all graded rewards of a group are equal: it is all-right or all-wrong."""
    return len({r.reward for r in group.graded}) <= 1
