"""What turns the groups of a step into optimizer steps: what all learners have in common, and how an update can be left in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from zppo.core.metrics import mean
from zppo.core.types import Group, Row
from zppo.distributed.parallel import ReplicatedWeights, zero_gradients
from zppo.engines.logprobs import ForwardPass
from zppo.engines.packed_linear import trained_linears
from zppo.errors import MemoryLimitError
from zppo.rollout.teacher import Pools
from zppo.step_log import StepLog
from zppo.train.engine_checks import Gap

if TYPE_CHECKING:
    from zppo.train.mid_step import MidStep

MOST_SKIPPED_UPDATES = 3


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What a step did to the weights; its numbers stand in the step's log.

    Attributes:
        groups: what was learnt from, plain groups first; the rollout log holds these.
        advantages: (N,) of their rollouts; 0 where none is used.
        fault: why the run has to stop after this step; "" where it goes on.
    """

    groups: list[Group]
    advantages: torch.Tensor
    fault: str = ""


class Learner(Protocol):
    """Turns the groups of a step into optimizer steps."""

    def update(
        self, plain: Sequence[Group], reformulated: Sequence[Group], responses: Pools, log: StepLog, partial: PartialUpdate | None = None
    ) -> UpdateResult:
        """Learn from plain groups, reformulated groups and correct teacher responses (Alg. 1, l. 18).

        Args:
            partial: where `UpdateStopped` left the same step; None: from its start.

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


class OptimizerStep:
    """Clips the gradient norm and steps, unless loss or norm is not finite: then the update is skipped.

    Args:
        model, optimizer: as `accelerator.prepare` returned them; weights in fp32, autocast is the accelerator's.
        max_norm: of the gradient; None: it is not clipped.
        weights: how the weights lie over the processes.

    Attributes:
        skipped_in_a_row: part of a checkpoint.
        fault: why the run has to stop after this step: too many skipped updates in a row; "" as long as there is no reason.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        max_norm: float | None,
        weights: ReplicatedWeights | None = None,
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.max_norm = math.inf if max_norm is None else max_norm
        self.weights = weights or ReplicatedWeights()
        self.skipped_in_a_row, self.fault = 0, ""

    def gradients(self) -> AbstractContextManager[None]:
        """Around the forward and backward passes of an optimizer step."""
        return trained_linears(self.model)

    def zero_gradients(self) -> None:
        """Gradients of all trainable parameters as zeros."""
        zero_gradients(self.model)

    def idle(self, forward: ForwardPass, row: Row) -> None:
        """A pass that adds nothing: where weights are sharded, a process without a row left takes part in those of the others.

        Without a picture, since what sees is not sharded.

        Args:
            row: any; its first completion token is all that is computed.
        """
        token = torch.as_tensor(row.completion_ids)[:1]
        with self.accelerator.autocast():
            logprobs, mask = forward.logprobs([Row(token, token)])
        self.accelerator.backward(logprobs.masked_fill(mask, 0.0).sum())

    def step(self, loss: float) -> tuple[float, float, bool]:
        """Loss of all processes together, gradient norm before clipping, and whether the weights moved; gradients are 0 afterwards.

        Args:
            loss: what this process's rows add to the loss.
        """
        loss = sum(self.weights.processes.gather(loss))
        norm, moved = self._move(finite=math.isfinite(loss))
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED_UPDATES:
            self.fault = (
                f"loss {loss} and gradient norm {norm}: {self.skipped_in_a_row} updates in a row were not finite. The weights are "
                "unchanged since the last finite update. Lower train.learning_rate, or look for odd rewards in the rollout log"
            )
        return loss, norm, moved

    def _move(self, *, finite: bool) -> tuple[float, bool]:
        """Gradient norm before clipping, and whether the weights moved."""
        return self.weights.step(self.optimizer, self.accelerator, self.max_norm, finite=finite)


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
        """Counts what `PolicyGradient._backward` gave for each micro-batch, read at once; returns their loss.

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
    """The run shall stop, and the update of a step waits at `partial`; the weights are those between two optimizer steps.

    Attributes:
        mid_step: the step as far as it is; its trainer sets it.
        cause: the error that ends the run; None where the run was asked to stop.
    """

    def __init__(self, partial: PartialUpdate, cause: MemoryLimitError | None = None) -> None:
        super().__init__(f"stopped after {partial.done} updates")
        self.partial, self.cause = partial, cause
        self.mid_step: MidStep | None = None
