"""Distillation, what ZPPO is measured against: divergence from the teacher on its own or on the student's completions (Algs. 2, 3), or from
the student itself that is shown more (SDPO, OPSD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from zppo.core.draws import keyed_random
from zppo.core.minibatch import MicroBatch, shares
from zppo.core.types import Draft, Group, Prompt, Rollout, Row
from zppo.engines.chat import THINK_CLOSE
from zppo.engines.logprobs import ForwardPass
from zppo.engines.out_of_memory import TokenBudget, release
from zppo.prompts.book import PRIVILEGED
from zppo.rollout.student import PromptRenderer
from zppo.rollout.teacher import Pools, TeacherSampler
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.train.learner import OptimizerStep, PartialUpdate, UpdateResult


@dataclass(frozen=True, slots=True)
class Weighted:
    """A row, what each of its tokens weighs beside the mean over all tokens of a step: 1 is that mean; and what the teacher reads.

    `seen` has the same completion behind another prompt, where student and teacher are shown different ones.
    """

    row: Row
    weight: float
    seen: Row | None = None

    @property
    def length(self) -> int:
        return len(self.row.prompt_ids) + len(self.row.completion_ids)

    @property
    def read(self) -> Row:
        """What the teacher reads."""
        return self.seen or self.row

    @property
    def longest(self) -> int:
        """Tokens of the longer one."""
        return max(len(row.prompt_ids) + len(row.completion_ids) for row in (self.row, self.read))


@dataclass(frozen=True, slots=True)
class Privileged:
    """The prompts of a student that teaches itself: each shows a right response to the question.

    Attributes:
        renderer: its words (`prompts.privileged`).
        teaches: a correct teacher response is shown (OPSD), drawn uniformly; else the first right rollout of the group that is another one
            (SDPO), without its thoughts where it has something behind them.
        context: positions of the student; None: unbounded.
        seed: keys the draws.
    """

    renderer: PromptRenderer
    teaches: bool
    context: int | None
    seed: int

    def prompt(self, group: Group, rollout: Rollout, responses: Pools, step: int) -> Prompt | None:
        """The prompt behind which a rollout is read again; None where there is nothing to show, or it is too long."""
        pool = responses.get(group.question.id, ()) if self.teaches else ()
        texts = [r.text for r in group.graded if r.correct and r is not rollout and not self.teaches]
        if pool:
            texts = [keyed_random(self.seed, "privileged", step, group.question.id).choice(pool).text]
        if not texts:
            return None
        shown = texts[0].rsplit(THINK_CLOSE, 1)[-1].strip() or texts[0]
        prompt = self.renderer.reformulated(Draft(PRIVILEGED, group.question, {"solution": shown}))
        fits = self.context is None or len(prompt.ids) + len(rollout.ids) <= self.context
        return prompt if fits else None


class Distillation:
    """One optimizer step per rollout step on the per-token Jensen-Shannon divergence.

    Off-policy (Alg. 2, l. 10): the mean over the tokens of a response, over the N_x correct responses of a question, over the questions
    that have one. On-policy (Alg. 3, l. 6): the mean over all tokens of the student's rollouts, as in the surrogate's loss [zppo].
    By itself: the same, over the rollouts for which there is a right response to show, from the student's own distribution behind a
    prompt with that response: another right rollout of the group (SDPO, arXiv 2601.20802, without feedback), or a teacher's (OPSD,
    arXiv 2601.18734). The teacher's weights are the student's current ones ("live" in TRL's words), without gradients.

    Args:
        forward, teacher: the training forward of the student and the teacher's, which share a tokenizer.
        optimizer: the optimizer step.
        budget: tokens of a micro-batch.
        respond: makes a completion of a teacher response, None where it is too long.
        teacher_sampler: gives correct teacher responses (Alg. 2); None to learn on the student's rollouts (Alg. 3).
        privileged: what the student is shown that teaches itself; None where there is a teacher.
    """

    def __init__(
        self,
        forward: ForwardPass,
        teacher: ForwardPass,
        optimizer: OptimizerStep,
        budget: TokenBudget,
        *,
        respond: Callable[[Source], Rollout | None],
        teacher_sampler: TeacherSampler | None,
        privileged: Privileged | None = None,
    ) -> None:
        self.forward, self.teacher, self.optimizer, self.budget = forward, teacher, optimizer, budget
        self.respond, self.teacher_sampler = respond, teacher_sampler
        self.privileged = privileged
        self.weights, self.processes = optimizer.weights, optimizer.weights.processes

    def update(
        self, plain: Sequence[Group], reformulated: Sequence[Group], responses: Pools, log: StepLog, partial: PartialUpdate | None = None
    ) -> UpdateResult:
        """The student's rollouts are learnt from on-policy, and only counted off-policy; advantages are 0.

        There is one optimizer step, so nothing can stop in between: `partial` is always None.
        """
        rows = _student_rows(plain)
        if self.teacher_sampler is not None:
            rows = self._teacher_rows(self.teacher_sampler, plain, log)
        if self.privileged is not None:
            rows = self._privileged_rows(self.privileged, plain, responses, log.step)
        lengths, needed = [each.longest for each in rows], sum(each.length for each in rows)
        # Without a correct response there is nothing to learn, and no step.
        loss, norm, moved, computed = self._optimizer_step(rows, lengths) if rows else (None, None, False, 0)
        log.counts |= {
            "loss": loss,
            "grad_norm": norm,
            "optimizer_steps": float(moved),
            "skipped_updates": float(bool(rows) and not moved),
            "distilled_completions": float(len(rows)),
            "train_tokens_needed": float(needed),
            "train_tokens_computed": float(needed + computed - sum(lengths)),  # and padding
            "logprob_tokens": float(sum(lengths)) if self.privileged is not None else 0.0,
            "tokens_per_microbatch": float(self.budget.tokens),
        }
        groups = [*plain, *reformulated]
        return UpdateResult(groups, torch.zeros(sum(len(g.rollouts) for g in groups)), self.optimizer.fault)

    def state_dict(self) -> dict[str, int]:
        return {"skipped_in_a_row": self.optimizer.skipped_in_a_row, **self.budget.state_dict()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.optimizer.skipped_in_a_row = state["skipped_in_a_row"]
        self.budget.load_state_dict(state)

    def _teacher_rows(self, sampler: TeacherSampler, plain: Sequence[Group], log: StepLog) -> list[Weighted]:
        """The correct ones of G_T fresh responses per question (Alg. 2); a question without one is skipped."""
        pools = sampler.ask([g.question for g in plain], log)
        made = [(g, [r for source in pools[g.question.id] if (r := self.respond(source)) is not None]) for g in plain]
        questions = [(g, [Row(g.prompt.ids, tuple(r.ids.tolist()), g.prompt.images) for r in found]) for g, found in made if found]
        tokens = sum(len(row.completion_ids) for _, rows in questions for row in rows)
        return [Weighted(row, tokens / (len(questions) * len(rows) * len(row.completion_ids))) for _, rows in questions for row in rows]

    def _privileged_rows(self, privileged: Privileged, plain: Sequence[Group], responses: Pools, step: int) -> list[Weighted]:
        """The rollouts for which there is a right response to show, and how the teacher reads them."""
        found = [(g, r, privileged.prompt(g, r, responses, step)) for g in plain for r in g.rollouts]
        rows = [(g, p, tuple(r.ids.tolist())) for g, r, p in found if p is not None]
        return [Weighted(Row(g.prompt.ids, ids, g.prompt.images), 1.0, Row(p.ids, ids, p.images)) for g, p, ids in rows]

    def _optimizer_step(self, rows: Sequence[Weighted], lengths: Sequence[int]) -> tuple[float, float, bool, int]:
        """One optimizer step over all rows, of which this process does its share: loss, gradient norm, whether it moved, tokens."""
        tokens = sum(len(each.row.completion_ids) for each in rows)
        parts = shares(lengths, self.processes.size)
        own = parts[self.processes.rank]
        while True:
            batches = self.budget.split([lengths[i] for i in own])
            try:
                with self.weights.together(), self.optimizer.gradients():
                    total = self._gradients(rows, lengths, parts, batches, tokens)
            except RuntimeError as error:
                self.budget.shrink(error, batches, max((lengths[i] for i in own), default=0), self.weights.of_all)
            else:
                self.budget.fits()
                break
            release()  # outside of the handler, which holds the tensors of the failed attempt
        loss, norm, moved = self.optimizer.step(total)
        return loss, norm, moved, sum(self.processes.gather(sum(micro.padded for micro in batches)))

    def _gradients(
        self, rows: Sequence[Weighted], lengths: Sequence[int], parts: Sequence[Sequence[int]], batches: Sequence[MicroBatch], tokens: int
    ) -> float:
        """Gradients of this process's micro-batches, from nothing; returns what they add to the loss."""
        own = parts[self.processes.rank]
        self.optimizer.zero_gradients()
        total = sum(self._backward([rows[own[m]] for m in micro.rows], tokens) for micro in batches)
        if self.weights.sharded:  # a process without a row left takes part in the passes of the others
            most = max(len(self.budget.split([lengths[i] for i in part])) for part in parts)
            for _ in range(most - len(batches)):
                self.optimizer.idle(self.forward, rows[0].row)
        return total

    def _backward(self, weighted: Sequence[Weighted], tokens: int) -> float:
        rows = [each.row for each in weighted]
        own = self.optimizer.accelerator.autocast() if self.privileged is not None else nullcontext()
        with own:  # the student's weights; a teacher's have a type of their own
            wanted = self.teacher.late([each.read for each in weighted])
        with self.optimizer.accelerator.autocast():  # the vision tower is called by itself
            divergence = self.forward.divergence(rows, wanted)
        weights = torch.tensor([each.weight for each in weighted]).repeat_interleave(torch.tensor([len(r.completion_ids) for r in rows]))
        loss = (divergence * weights.to(divergence.device)).sum() / tokens
        self.optimizer.accelerator.backward(loss)
        return float(loss.detach())


def _student_rows(plain: Sequence[Group]) -> list[Weighted]:
    rows = (Row(g.prompt.ids + g.prompt.forced_ids, tuple(r.ids.tolist()), g.prompt.images) for g in plain for r in g.rollouts)
    return [Weighted(row, 1.0) for row in rows]
