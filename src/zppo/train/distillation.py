"""Distillation, what ZPPO is measured against: divergence from the teacher on its own or on the student's completions (Algs. 2, 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from zppo.config.settings import TrainSettings
from zppo.core.loss import jensen_shannon
from zppo.core.minibatch import MicroBatch, shares
from zppo.core.types import Group, Rollout
from zppo.distributed.parallel import ReplicatedWeights, zero_gradients
from zppo.engines.logprobs import Row, image_inputs
from zppo.images.processor import ImageProcessor
from zppo.rollout.teacher import Pools, TeacherSampler
from zppo.teacher.compression import Source
from zppo.train.optimizer_step import OptimizerStep, TokenBudget
from zppo.train.policy_gradient import PartialUpdate, UpdateResult


def completion_logits(
    model: nn.Module, rows: Sequence[Row], pad_id: int, image_processor: ImageProcessor | None = None
) -> torch.Tensor:
    """(N, V) logits of the N completion tokens of all rows, in the order of rows and tokens."""
    device = next(model.parameters()).device
    lengths = [(len(row.prompt_ids), len(row.completion_ids)) for row in rows]
    ids = [torch.tensor([*row.prompt_ids, *row.completion_ids]) for row in rows]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device)
    first = min(prompt for prompt, _ in lengths)
    inputs = padded[:, :-1]
    seen = image_inputs(model, image_processor, rows, inputs)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=padded.shape[1] - first, **seen).logits
    return torch.cat([row[p - first : p - first + c] for row, (p, c) in zip(logits, lengths, strict=True)])


class Distillation:
    """One optimizer step per rollout step on the mean per-token Jensen-Shannon divergence.

    Args:
        model, optimizer: as `accelerator.prepare` returned them.
        teacher: the teacher's network, which shares the student's tokenizer.
        teacher_sampler: gives correct teacher responses (Alg. 2); None to learn on the student's rollouts (Alg. 3).
        respond: makes a completion of a teacher response, None where it is too long.
        budget: tokens of a micro-batch; None for the setting's.
        weights: how the student's weights lie over the processes.
        image_processor, teacher_image_processor: how the two see the images of prompts, alike; None for text only.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        teacher: nn.Module,
        teacher_sampler: TeacherSampler | None,
        respond: Callable[[Source], Rollout | None],
        train: TrainSettings,
        pad_id: int,
        budget: TokenBudget | None = None,
        weights: ReplicatedWeights | None = None,
        image_processor: ImageProcessor | None = None,
        teacher_image_processor: ImageProcessor | None = None,
    ) -> None:
        self.model, self.accelerator, self.teacher = model, accelerator, teacher
        self.image_processor, self.teacher_image_processor = image_processor, teacher_image_processor
        self.teacher_sampler, self.respond, self.train, self.pad_id = teacher_sampler, respond, train, pad_id
        self.budget = budget or TokenBudget(train.tokens_per_microbatch)
        self.weights = weights or ReplicatedWeights()
        self.guard = OptimizerStep(optimizer, accelerator, train.max_grad_norm, self.weights)

    def learn(
        self,
        plain: Sequence[Group],
        again: Sequence[Group],
        pools: Pools,
        step: int,
        begun: PartialUpdate | None = None,
    ) -> UpdateResult:
        """The student's rollouts are learnt from on-policy, and only counted off-policy; advantages are 0.

        There is one optimizer step, so nothing can stop in between: `begun` is always None.
        """
        rows = self._teacher_rows(plain, step) if self.teacher_sampler is not None else _student_rows(plain)
        lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
        # Without a correct response there is nothing to learn, and no step.
        loss, norm, stepped, computed = self._update(rows, lengths) if rows else (None, None, False, 0)
        groups = [*plain, *again]
        metrics: dict[str, float | None] = {
            "loss": loss,
            "grad_norm": norm,
            "optimizer_steps": float(stepped),
            "skipped_updates": float(bool(rows) and not stepped),
            "distilled_completions": float(len(rows)),
            "train_tokens_needed": float(sum(lengths)),
            "train_tokens_computed": float(computed),
            "logprob_tokens": 0.0,
            "tokens_per_microbatch": float(self.budget.tokens),
            **(self.teacher_sampler.metrics() if self.teacher_sampler is not None else {}),
        }
        error = self.teacher_sampler.error if self.teacher_sampler is not None else ""
        return UpdateResult(groups, torch.zeros(sum(len(g.rollouts) for g in groups)), metrics, error, self.guard.fault)

    def state_dict(self) -> dict[str, int]:
        return {"skipped_in_a_row": self.guard.skipped_in_a_row, **self.budget.state_dict()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.guard.skipped_in_a_row = state["skipped_in_a_row"]
        self.budget.load_state_dict(state)

    def _teacher_rows(self, plain: Sequence[Group], step: int) -> list[Row]:
        """The correct ones of G_T fresh responses per question (Alg. 2); a question without one is skipped."""
        assert self.teacher_sampler is not None
        self.teacher_sampler.new_step()
        pools = self.teacher_sampler.ask([g.question for g in plain], step)
        made = ((g, self.respond(source)) for g in plain for source in pools[g.question.id])
        return [Row(g.prompt.ids, tuple(r.ids.tolist()), g.prompt.images) for g, r in made if r is not None]

    def _update(self, rows: Sequence[Row], lengths: Sequence[int]) -> tuple[float, float, bool, int]:
        """One optimizer step over all rows, of which this process does its share: loss, gradient norm, whether it stepped, tokens."""
        processes = self.weights.processes
        tokens = sum(len(row.completion_ids) for row in rows)
        parts = shares(lengths, processes.size)
        own = parts[processes.rank]

        def accumulate(batches: list[MicroBatch]) -> tuple[float, int]:
            zero_gradients(self.model)  # an attempt that runs out of memory leaves nothing
            total = sum(self._backward([rows[own[m]] for m in micro.rows], tokens) for micro in batches)
            if self.weights.sharded:  # a process without a row left takes part in the passes of the others
                most = max(len(self.budget.split([lengths[i] for i in part])) for part in parts)
                for _ in range(most - len(batches)):
                    self._idle(min(rows, key=lambda row: len(row.prompt_ids) + len(row.completion_ids)))
            return total, sum(micro.padded for micro in batches)

        total, computed = self.budget.run([lengths[i] for i in own], accumulate)
        loss, norm, stepped = self.guard.step(total)
        return loss, norm, stepped, sum(processes.gather(computed))

    def _idle(self, row: Row) -> None:
        """A pass that adds nothing."""
        logits = completion_logits(self.model, [row], self.pad_id, self.image_processor)
        self.accelerator.backward(logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0).sum())

    def _backward(self, rows: Sequence[Row], tokens: int) -> float:
        with torch.no_grad():
            wanted = completion_logits(self.teacher, rows, self.pad_id, self.teacher_image_processor)
        with self.accelerator.autocast():  # the vision tower is called by itself
            logits = completion_logits(self.model, rows, self.pad_id, self.image_processor)
        size = min(logits.shape[-1], wanted.shape[-1])  # embeddings may be padded to different sizes
        loss = jensen_shannon(logits[..., :size], wanted[..., :size].to(logits.device)).sum() / tokens
        self.accelerator.backward(loss)
        return float(loss.detach())


def _student_rows(plain: Sequence[Group]) -> list[Row]:
    return [
        Row(g.prompt.ids + g.prompt.forced_ids, tuple(r.ids.tolist()), g.prompt.images)
        for g in plain
        for r in g.rollouts
    ]
