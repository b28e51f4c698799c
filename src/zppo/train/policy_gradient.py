"""The policy gradient: advantages -> I optimizer steps of the clipped surrogate (Alg. 1, l. 18; method.md sections 5 and 6)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from zppo.config.settings import TOKENS_PER_MICROBATCH, Settings, TrainSettings
from zppo.core.advantages import advantages_as_sampled, spread_advantages, step_advantages, trivial
from zppo.core.credit import credited_groups
from zppo.core.draws import keyed_random
from zppo.core.loss import Surrogate, clipped_surrogate, shaped_surrogate
from zppo.core.minibatch import (
    MERGED_TOKENS,
    MicroBatch,
    Sample,
    Share,
    Sharing,
    deal_groups,
    pack_length,
    packed,
    pass_tokens,
    samples_of,
    share_minibatch,
)
from zppo.core.types import Group, Rollout
from zppo.engines.logprobs import ForwardPass
from zppo.engines.out_of_memory import TokenBudget, release
from zppo.errors import MemoryLimitError
from zppo.rollout.teacher import Pools
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.train.engine_checks import SamplerCheck
from zppo.train.learner import OptimizerStep, PartialUpdate, UpdateCounts, UpdateResult, UpdateStopped

Result = TypeVar("Result")

PROBE = 8
"""Rows that are scored to compare sampler and trainer where the first minibatch has none with a gradient."""


class PolicyGradient:
    """The clipped surrogate over all groups of a step.

    Args:
        settings: the recipe's; of them the method, the advantage estimator, the loss, minibatches and the seed.
        forward: the training forward of the student.
        optimizer: the optimizer steps.
        budget: tokens of a micro-batch.
        sampler_is_exact: whether `Rollout.logprobs` are old log-probs (old_logprobs: auto is resolved by the caller).
        check: compares them with the trainer's before the first optimizer step of each step; None for never.
        sharing: when rows of one prompt compute it once; None for never.
        respond: makes a rollout of a teacher response; None for methods without Teacher response.
    """

    def __init__(
        self,
        settings: Settings,
        forward: ForwardPass,
        optimizer: OptimizerStep,
        budget: TokenBudget,
        *,
        sampler_is_exact: bool,
        check: SamplerCheck | None = None,
        sharing: Sharing | None = None,
        respond: Callable[[Source], Rollout | None] | None = None,
    ) -> None:
        self.estimator, self.loss, self.seed = settings.estimator, settings.loss, settings.seed
        self.statistics = settings.advantage.statistics
        self.minibatches = settings.train.minibatches
        # Dynamic sampling, an extension: groups whose rewards are all equal leave the batch and its denominator.
        self.method = settings.method.resolve()
        self.drop_trivial = settings.drops_trivial
        self.forward, self.optimizer, self.budget = forward, optimizer, budget
        self.sampler_is_exact, self.check, self.sharing, self.respond = sampler_is_exact, check, sharing, respond
        self.weights, self.processes = optimizer.weights, optimizer.weights.processes

    def update(
        self, plain: Sequence[Group], reformulated: Sequence[Group], responses: Pools, log: StepLog, partial: PartialUpdate | None = None
    ) -> UpdateResult:
        """Advantages over the whole step, or its minibatches, then I optimizer steps; see `Learner.update`."""
        answered = [self._with_response(g, responses, log.step) for g in plain]
        groups, method = [*answered, *reformulated], self.method
        # Rivals alone: hinted rollouts in the plain group, or under the plain prompt. For all others these are the groups themselves.
        credited = groups
        if method.rearranges:
            credited = credited_groups(answered, reformulated, method.credit, method.grouping, seed=self.seed, step=log.step)
        kept = [g for g in credited if not (self.drop_trivial and trivial(g))]
        batches = self._deal(kept, log.step) if self.statistics == "minibatch" else ()
        advantages = step_advantages(kept, self.estimator, batches)
        self.optimizer_steps(kept, advantages, log, partial)
        if self.respond is not None:
            replaced = sum(a is not b for a, b in zip(groups, plain, strict=False))
            log.counts["teacher_responses_in_groups"] = float(replaced)
        if method.rearranges:
            log.counts["hinted_rollouts_in_plain_groups"] = float(sum(r.drawn is not None for g in credited for r in g.rollouts))
        spread = (advantages_as_sampled if method.rearranges else spread_advantages)(groups, kept, advantages)
        return UpdateResult(groups, spread, self.optimizer.fault)

    @property
    def trusts_sampler(self) -> bool:
        """Whether the sampler's log-probs are old log-probs now."""
        return self.sampler_is_exact and not (self.check and self.check.refused)

    def optimizer_steps(
        self, groups: Sequence[Group], advantages: torch.Tensor, log: StepLog, partial: PartialUpdate | None = None
    ) -> None:
        """I optimizer steps over whole groups; every rollout token is used once. The log gets the metrics of the update.

        Args:
            partial: where the update of this step, of the same groups, was left; None: from its start.

        Raises:
            UpdateStopped: one of the processes was asked to stop; or memory ran out, and there is only this one.
            MemoryLimitError: memory ran out before the first optimizer step, or in one of several processes.
        """
        # Whole groups are dealt to minibatches, and the groups of a minibatch to the processes.
        how, truncated = self.method, self.loss.mask_truncated
        samples = samples_of(groups, advantages, mask_truncated=truncated, credit=how.credit, gamma=how.gamma)
        deals = self._deal(groups, log.step)
        mine = [share_minibatch(samples, dealt, rank=self.processes.rank, size=self.processes.size) for dealt in deals]
        rows = [row for share in mine for row in share.rows]
        # Old log-probs are those of the weights before the first optimizer step, for all of the step's rows.
        if partial:
            tally = partial.tally if self.processes.main else partial.tally.without_rows()
            lines = iter(partial.old)
            known = {(g, i): next(lines) for g, group in enumerate(samples) for i in range(len(group))}
            old = {row: known[row] for row in rows}
        else:
            tally = UpdateCounts(fallback=int(self.sampler_is_exact and not self.trusts_sampler))
            old = self._old_logprobs(samples, rows, tally)
        for index in range(partial.done if partial else 0, len(deals)):
            if self.processes.any(self.processes.stop.wanted):
                raise UpdateStopped(self._partial(index, tally, samples, old))
            minibatch = [s for g in deals[index] for s in samples[g]]
            log.tell("update", index + 1, len(deals))
            try:
                loss, counts = self._gradients(minibatch, mine[index], samples, old, tally, first=index == 0)
                if index == 0 and self._refuses(log, counts, samples, minibatch):
                    # The weights have not moved yet: a forward pass still gives old log-probs.
                    tally.fallback, (tally.gap_sum, tally.gap_max, tally.gap_tokens) = 1, counts.gap
                    old = self._old_logprobs(samples, rows, tally)
                    loss, counts = self._gradients(minibatch, mine[index], samples, old, tally, first=False)
            except MemoryLimitError as error:
                if self.processes.size > 1:
                    raise  # the others wait for its gradients
                # There was no optimizer step: the weights are those before this minibatch.
                raise UpdateStopped(self._partial(index, tally, samples, old), error) from error
            tally = counts
            loss, norm, moved = self.optimizer.step(loss)
            tally.losses, tally.grad_norms = [*tally.losses, loss], [*tally.grad_norms, norm]
            tally.skipped += not moved
        first, *others = self.processes.gather(tally)
        log.counts |= {**first.plus(others).metrics(), "tokens_per_microbatch": float(self.budget.tokens)}

    def _deal(self, groups: Sequence[Group], step: int) -> list[list[int]]:
        """Indices of groups per minibatch."""
        return deal_groups(len(groups), self.minibatches, seed=self.seed, step=step)

    def _partial(
        self, done: int, tally: UpdateCounts, samples: Sequence[Sequence[Sample]], old: Mapping[tuple[int, int], torch.Tensor]
    ) -> PartialUpdate:
        """What all processes together know after `done` minibatches."""
        parts = self.processes.gather((tally, dict(old)))
        known = {row: line for _, lines in parts for row, line in lines.items()}
        every = [known.get((g, i), s.sampled_logprobs) for g, group in enumerate(samples) for i, s in enumerate(group)]
        return PartialUpdate(done, parts[0][0].plus([other for other, _ in parts[1:]]), every)

    def _old_logprobs(
        self, samples: Sequence[Sequence[Sample]], rows: Sequence[tuple[int, int]], tally: UpdateCounts
    ) -> dict[tuple[int, int], torch.Tensor]:
        """(T,) per row, given as (group, rollout): the sampler's, or of a forward pass."""
        result = {(g, i): samples[g][i].sampled_logprobs for g, i in rows}
        unknown = [(g, i) for g, i in rows if samples[g][i].foreign or not (self.trusts_sampler or samples[g][i].fixed)]
        asked = [samples[g][i].scored for g, i in unknown]
        tally.old_needed += sum(_needed(asked, micro) for micro in self._split(asked))

        def score(batches: list[MicroBatch]) -> None:
            most = max(self.processes.gather(len(batches))) if self.weights.sharded else 0
            for micro in batches:
                logprobs, _ = self._logprobs(asked, micro)
                for (g, i), line in zip([unknown[m] for m in micro.rows], logprobs.float().cpu(), strict=True):
                    result[g, i] = line[: samples[g][i].tokens].clone()  # a view is sent with its whole batch
            for _ in range(most - len(batches)):  # a process without a row left takes part in the passes of the others
                shortest = min((s for group in samples for s in group), key=lambda s: s.length)
                self._logprobs([shortest], MicroBatch([[0]], shortest.length))

        if self.processes.any(bool(unknown)):
            with torch.no_grad(), self.weights.scoring():
                self._in_micro_batches(asked, score)
        return result

    def _refuses(self, log: StepLog, counts: UpdateCounts, samples: Sequence[Sequence[Sample]], first_minibatch: Sequence[Sample]) -> bool:
        """Whether the sampler's log-probs are not the trainer's, before the first optimizer step; all processes agree.

        The gap is measured on the first minibatch, whose forward pass is needed anyway. If it has no row with a gradient, up to PROBE
        others are scored: after the optimizer step it would be too late.
        """
        if self.check is None or not self.trusts_sampler:
            return False
        if not any(s.live and s.comparable for s in first_minibatch):
            self._probe([s for group in samples for s in group if s.live and s.comparable][:PROBE], counts)
        return self.check.refuses(log.step, counts.gap)

    def _probe(self, rows: Sequence[Sample], counts: UpdateCounts) -> None:
        """Counts the gap of rows that every process scores."""

        def score(batches: list[MicroBatch]) -> list[torch.Tensor]:
            return [_gap(*self._logprobs(rows, micro), [rows[m] for m in micro.rows]) for micro in batches]

        with torch.no_grad(), self.weights.scoring():
            parts = self._in_micro_batches(rows, score) if rows else []
        for part in parts if self.processes.main else ():
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
            self.optimizer.zero_gradients()
            counts = copy.copy(tally)
            sums = [self._backward(live, known, micro, denominator, counts, first=first) for micro in batches]
            others = share.others if self.weights.sharded else []
            passes = [len(self._split([samples[g][i] for g, i in rows])) for rows in others]
            for _ in range(max(passes, default=0) - len(batches)):
                self.optimizer.idle(self.forward, next(s.row for s in minibatch if s.live))
            return counts.add(sums), counts

        return self._in_micro_batches(live, accumulate)

    def _backward(
        self, live: Sequence[Sample], old: Sequence[torch.Tensor], micro: MicroBatch, denominator: int, tally: UpdateCounts, *, first: bool
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; sums over it (`UpdateCounts.add`) that stay on the device: reading would wait."""
        samples = [live[m] for m in micro.rows]
        logprobs, mask = self._logprobs(live, micro)
        surrogate = self._surrogate(logprobs, _padded([old[m] for m in micro.rows], logprobs.device), samples)
        loss = surrogate.loss.where(mask, 0.0).sum() / denominator
        self.optimizer.accelerator.backward(loss)
        tally.tokens += sum(s.tokens for s in samples)
        tally.needed += _needed(live, micro)
        tally.computed += micro.padded
        clips = [(clip & mask).sum() for clip in surrogate[1:]]
        sums = torch.stack([loss.detach(), *clips]).float()
        # Before any update of this step: what the sampler said against what the trainer says.
        return torch.cat([sums, _gap(logprobs, mask, samples)]) if first else sums

    def _surrogate(self, logprobs: torch.Tensor, old: torch.Tensor, samples: Sequence[Sample]) -> Surrogate:
        """Loss per token and what was clipped, (B, T) each."""
        advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32).to(logprobs.device, non_blocking=True)
        low, high, dual = self.loss.clip_low, self.loss.clip_high, self.loss.dual_clip
        surrogate = clipped_surrogate(logprobs, old, advantages, clip_low=low, clip_high=high, dual_clip=dual)
        gamma = next((s.gamma for s in samples if s.gamma is not None), None)
        if gamma is None:
            return surrogate
        own = torch.tensor([s.gamma is None for s in samples])[:, None].to(logprobs.device, non_blocking=True)
        loss = surrogate.loss.where(own, shaped_surrogate(logprobs, old, advantages, gamma))
        return Surrogate(loss, *(clip & own for clip in surrogate[1:]))

    def _split(self, rows: Sequence[Sample]) -> list[MicroBatch]:
        """Micro-batches of rows: packs that share a prompt apart from single rows, which need no attention mask."""
        packs = packed(rows, self.sharing, self.budget.tokens) if self.sharing else [[i] for i in range(len(rows))]
        kinds = [pack for pack in packs if len(pack) > 1], [pack for pack in packs if len(pack) == 1]
        return [m for kind in kinds for m in self.budget.split([pack_length(rows, pack) for pack in kind], kind)]

    def _in_micro_batches(self, rows: Sequence[Sample], work: Callable[[list[MicroBatch]], Result]) -> Result:
        """`work` on micro-batches of rows.

        Where memory runs out, all of it is done again with smaller micro-batches, so it must start from nothing: what a failed
        micro-batch has already added to a gradient cannot be separated from the rest of it.
        """
        while True:
            batches = self._split(rows)
            try:
                with self.weights.together(), self.optimizer.gradients():
                    result = work(batches)
            except RuntimeError as error:
                self.budget.shrink(error, batches, max((s.length for s in rows), default=0), self.weights.of_all)
            else:
                self.budget.fits()
                return result
            release()  # outside of the handler, which holds the tensors of the failed attempt

    def _logprobs(self, samples: Sequence[Sample], micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (B, T) and completion mask of `micro.rows`."""
        if len(micro.rows) > len(micro.packs):
            return self.forward.shared_logprobs([s.row for s in samples], micro.packs)
        with self.optimizer.accelerator.autocast():  # the vision tower is called by itself
            return self.forward.logprobs([samples[m].row for m in micro.rows])

    def state_dict(self) -> dict[str, int]:
        return {
            "skipped_in_a_row": self.optimizer.skipped_in_a_row,
            **self.budget.state_dict(),
            **(self.check.state_dict() if self.check else {}),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.optimizer.skipped_in_a_row = state["skipped_in_a_row"]
        self.budget.load_state_dict(state)
        if self.check:
            self.check.load_state_dict(state)

    def _with_response(self, group: Group, responses: Pools, step: int) -> Group:
        """A correct teacher response in the place of a wrong rollout, both drawn uniformly, as if the student had sampled it; where all
        questions get one, right or wrong, in the place of any (LUFFY)."""
        pool = responses.get(group.question.id, ()) if self.respond is not None else ()
        wrong = [i for i, r in enumerate(group.rollouts) if (r.graded and not r.correct) or self.method.helped == "every"]
        if self.respond is None or not pool or not wrong:
            return group
        rng = keyed_random(self.seed, "teacher-response", step, group.question.id)
        rollout, place = self.respond(rng.choice(pool)), rng.choice(wrong)
        if rollout is None:
            return group
        return replace(group, rollouts=(*group.rollouts[:place], rollout, *group.rollouts[place + 1 :]))


def _needed(rows: Sequence[Sample], micro: MicroBatch) -> int:
    """Tokens of a micro-batch without padding; a shared prompt counts once."""
    return sum(pack_length(rows, pack) for pack in micro.packs)


def _padded(lines: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """(B, T) of tensors on the CPU, without waiting for what the device has still to do."""
    return torch.nn.utils.rnn.pad_sequence(list(lines), batch_first=True).to(device, non_blocking=True)


def _gap(logprobs: torch.Tensor, mask: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """(3,) float32: sum, largest and number of the differences between sampler and trainer, over tokens that a sampler knows."""
    said = [s.sampled_logprobs if s.comparable else s.sampled_logprobs.new_full((s.tokens,), torch.nan) for s in samples]
    gap = (logprobs.detach() - _padded(said, logprobs.device)).abs()
    known = mask & ~gap.isnan()
    gap = gap.where(known, 0.0)
    return torch.stack([gap.sum(), gap.max(), known.sum()]).float()


def make_budget(train: TrainSettings, say: Callable[[str], None] | None = None, *, gpu: bool = False, width: int = 1) -> TokenBudget:
    """The budget of a recipe, for a model of this width."""
    adaptive = train.tokens_per_microbatch == "auto"
    tokens = TOKENS_PER_MICROBATCH if train.tokens_per_microbatch == "auto" else train.tokens_per_microbatch
    merged = None if gpu else MERGED_TOKENS
    return TokenBudget(tokens, adaptive=adaptive, say=say, overhead=pass_tokens(width, gpu=gpu), merged=merged)
