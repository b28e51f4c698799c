"""The training loop. `Trainer.step` is Algorithm 1, line by line; everything that it calls is testable without a model."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from zppo.config.settings import Settings
from zppo.core.metrics import accuracy_by_kind, composition, rollout_metrics
from zppo.core.replay import Changes, PromptReplayBuffer
from zppo.core.select import share_of
from zppo.core.types import Group, Question
from zppo.data.order import batch_ids
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.errors import Interrupted, MemoryLimitError, ZPPOError
from zppo.rollout.evaluation import Evaluation, evaluate
from zppo.rollout.grading import Scorer
from zppo.rollout.reformulated import Reformulator
from zppo.rollout.student import StudentSampler
from zppo.runs.display import Progress
from zppo.runs.log import RunLog
from zppo.runs.signals import Stop
from zppo.train.checkpointer import Checkpointer
from zppo.train.engine_checks import EngineCheck
from zppo.train.health_checks import HealthChecks, TimedScore
from zppo.train.mid_step import MidStep, StepRollouts
from zppo.train.policy_gradient import Learner, PartialUpdate, UpdateResult, UpdateStopped

MISSED = {
    "teacher_unreachable": "teacher rollouts without a reply",
    "compression_unreachable": "compressions without a reply",
    "compression_failed": "compressions refused (the answer or the form did not survive)",
    "hint_unreachable": "hints without a reply",
    "hint_failed": "hints refused (they gave the answer away, or had no form)",
    "bcq_raw_pairs": "BCQ prompts with uncompressed candidates",
    "judge_unreachable": "judge calls without a reply (ungraded)",
    "judge_malformed": "judge replies that were no verdict (wrong)",
    "too_long": "prompts over the context",
}
"""Metrics of help that a step could not get, in words; the closing table sums them."""


@dataclass(slots=True)
class Totals:
    """What a run has done so far; part of every checkpoint.

    `admitted`, `graduated` and `evicted` count buffer entries by their accuracy at admission.
    """

    rollouts: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    teacher_wait_seconds: float = 0.0
    judge_tokens: int = 0
    seconds: float = 0.0
    admitted: dict[str, int] = field(default_factory=dict)
    graduated: dict[str, int] = field(default_factory=dict)
    evicted: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)  # help that the teacher could not give

    def add_changes(self, changes: Changes) -> None:
        """Count what one buffer update did."""
        for counts, entries in (
            (self.admitted, changes.admitted),
            (self.graduated, changes.graduated),
            (self.evicted, changes.evicted),
        ):
            for entry in entries:
                counts[entry_bin(entry.accuracy)] = counts.get(entry_bin(entry.accuracy), 0) + 1


def entry_bin(accuracy: float) -> str:
    """The name of an entry-accuracy bin: 0.125 -> "12.5%"."""
    return f"{accuracy:.1%}".replace(".0%", "%")


class Trainer:
    """Runs the steps of one recipe over the parts that `zppo.train.run` put together.

    Attributes:
        done: steps that are finished.
        evaluated: the step of the last evaluation, -1 before the first.
        totals: sums over the run.
        mid_step: where the next step begins, None for its start.
        saved: (done, updates of the next step) of the checkpoint that was last written or loaded, None where there is none.
        folder: where that checkpoint is.
        stop: somebody's wish that the run stops.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        steps: int,
        questions: Sequence[Question],
        held_out: Sequence[Question],
        sampler: StudentSampler,
        zone: Reformulator,
        learner: Learner,
        guard: EngineCheck,
        rule: TimedScore,
        adviser: HealthChecks,
        buffer: PromptReplayBuffer,
        log: RunLog,
        progress: Progress,
        checkpoint: Checkpointer,
        stop: Stop,
        scorer: Scorer,
        service: Callable[[], Mapping[str, float]] = dict,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self.settings, self.steps = settings, steps
        self.questions, self.held_out = questions, held_out
        self.sampler, self.zone, self.learner = sampler, zone, learner
        self.guard, self.rule, self.adviser = guard, rule, adviser
        self.buffer, self.log, self.progress, self.checkpoint, self.stop = buffer, log, progress, checkpoint, stop
        self.scorer = scorer  # the roller's score: what it counts
        self.service = service  # what calling remote models took since it was last asked
        self.processes = processes
        self.method = settings.method.resolve()
        self.done, self.evaluated = 0, -1
        self.totals = Totals()
        self.mid_step: MidStep | None = None
        self.saved: tuple[int, int | None] | None = None
        self.folder: Path | None = None
        self._boundary: dict[str, Any] | None = None  # see `_facts`; None where the weights are between two steps

    def run(self) -> None:
        """All steps that are left, with evaluations and checkpoints on the way.

        Raises:
            Interrupted: `stop` wanted it. Between two updates the step is saved as far as it is; elsewhere see `rescue`.
        """
        with self.progress:
            if self.mid_step is None:
                self._boundary = self._facts()
                self._evaluate_if_due()
            while self.done < self.steps:
                self.checkpoint.check()
                self.step(self.done + 1)
                self._evaluate_if_due()
                every = self.settings.train.checkpoint_every
                if every and (self.done % every == 0 or self.done == self.steps):
                    with self.stop.shield():
                        self._save(self.state_dict(), None, beside=True)
            with self.stop.shield():
                self.checkpoint.wait()

    def step(self, step: int) -> None:
        """One step of Algorithm 1; one that was stopped between two updates goes on there."""
        mid_step, self.mid_step = self.mid_step, None
        collected = mid_step.collected if mid_step else self._collect(step)
        clock = Clock(collected.seconds)
        with self.stop.shield():
            self.guard.stale = True
            self._check_same(step, [*collected.plain, *collected.again])
            updated = self._learn(collected, mid_step.begun if mid_step else None, step, clock)
            if mid_step is None:
                collected = self._counted(collected, step)  # now, since distillation asks and grades in its update
            with clock("other"):
                held = {
                    g.question.id: entry.accuracy for g in collected.plain if (entry := self.buffer.get(g.question.id))
                }
                changes = self._update_buffer(collected.plain, step)
                self.totals.add_changes(changes)
                self.log.buffer(step, changes)
                self.log.rollouts(
                    step,
                    updated.groups,
                    updated.advantages.tolist(),
                    replayed=frozenset(collected.replayed),
                    entry_accuracy={e.question.id: e.accuracy for e in changes.admitted} | held,
                    show=self.sampler.renderer.chat.show_short,
                )
            self._report(step, collected, updated, changes, clock)
            self.done = step
            self._boundary = self._facts()
            if updated.fault:
                self._save(self.state_dict(), None)  # all processes are here, so that sharded weights can be saved too
                raise ZPPOError(updated.fault)

    def _collect(self, step: int) -> StepRollouts:
        """Rollouts, teacher, reformulated prompts and their rollouts (Alg. 1, l. 2-16); a wish to stop ends it at once."""
        clock = Clock()
        self.rule.take()  # what was graded before is none of this step's
        self.scorer.new_step()
        self.sampler.renderer.chat.new_step()
        with clock("engine"):
            self.guard.refresh(step - 1)
        new = self._new_questions(step)
        replayed = self._replayed_questions(new)
        with clock("sampling"):
            plain = self.sampler.roll([self.sampler.renderer.plain(q) for q in (*new, *replayed)], step)
        with clock("teacher"):
            asked_again = self.zone.build(plain, len(new), step)
        with clock("sampling"):
            again = self.sampler.roll(asked_again.prompts, step)
        graded, grading = self.rule.take()
        counts = {**self.processes.total({"graded_answers": float(graded)}), **self.guard.found}
        seconds = {**clock.seconds(), "grading": grading}  # a part of sampling and teacher
        return StepRollouts(len(new), tuple(q.id for q in replayed), plain, again, asked_again, counts, seconds)

    def _learn(self, collected: StepRollouts, begun: PartialUpdate | None, step: int, clock: Clock) -> UpdateResult:
        """I optimizer steps (Alg. 1, l. 18). Where the run has to stop between two of them, the step is saved there."""
        boundary, self._boundary = self._boundary, None
        try:
            with clock("update"):
                return self.learner.learn(collected.plain, collected.again, collected.zone.pools, step, begun)
        except MemoryLimitError:
            if self.processes.size == 1:
                self._boundary = boundary  # the weights have not moved
            raise
        except UpdateStopped as stopped:
            if begun is None:
                collected = self._counted(collected, step)
            if self.saved != (self.done, stopped.begun.done):
                self._save(self.state_dict(), MidStep(replace(collected, seconds=clock.seconds()), stopped.begun))
            raise stopped.cause or Interrupted(self.stop.signum or signal.SIGTERM) from None

    def _counted(self, collected: StepRollouts, step: int) -> StepRollouts:
        """With what grading and remote models took; what a person should know of it is said."""
        self._warn(f"step {step}")
        return replace(collected, counts={**collected.counts, **self._counts()})

    def _counts(self) -> dict[str, float]:
        """What grading and remote models took in all processes."""
        return self.processes.total({**self.scorer.metrics(), **self.service()})

    def rescue(self, *, together: bool) -> None:
        """Save the last step boundary, where no checkpoint has it yet and the weights are still there.

        For a run that ends before its time, by a signal or an error: what a step has sampled is lost, what it has learnt never.
        `together`: all processes of the run end here, as after a signal; otherwise the first one saves alone where it can.
        """
        with self.stop.ignored():
            self.checkpoint.wait()
        if self._boundary is not None and self.done > 0 and self.saved != (self.done, None):
            with self.stop.ignored():
                self._save(self._state_at(self._boundary), None, together=together)

    def weights_leave(self) -> None:
        """From now on the weights are no longer those of a step boundary: there is nothing to rescue."""
        self._boundary = None

    def evaluate(self) -> Evaluation | None:
        """Accuracy on the held-out questions with the current weights, logged; None where there are none."""
        if not self.held_out:
            return None
        self.guard.refresh(self.done)
        self.scorer.new_step()
        self.sampler.renderer.chat.new_step()
        result = evaluate(self.sampler, self.held_out, self.settings.eval)
        with self.stop.shield():
            self.log.metrics(self.done, "eval", asdict(result) | self.processes.total(self.scorer.metrics()))
            self.progress.evaluation(self.done, result)
            self._warn(f"evaluation at step {self.done}")
            self._advise(self.done, asdict(result))
            self.evaluated = self.done
            self._boundary = self._facts()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides weights and optimizer; JSON-ready."""
        return self._state_at(self._facts())

    def _facts(self) -> dict[str, Any]:
        """What a later step may have changed of a step boundary's state before the weights have moved.

        The buffer's entries are not in it: they change after the weights, and a copy of all of them in every step would take longer than
        the step where there are a million.
        """
        return {
            "draws": self.buffer.draws,
            "totals": asdict(self.totals),
            "learner": self.learner.state_dict(),
            "evaluated": self.evaluated,
        }

    def _state_at(self, boundary: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a step boundary that the weights are still at."""
        rest = {name: value for name, value in boundary.items() if name != "draws"}
        return {"buffer": {**self.buffer.state_dict(), "draws": boundary["draws"]}, **rest}

    def load(self, folder: Path, state: dict[str, Any], mid_step: MidStep | None) -> None:
        """Continue after a checkpoint: its folder, its state, and the step that it was made in, if any."""
        self.buffer.load_state_dict(state["buffer"])
        removed = "teacher_unused_tokens"  # checkpoints of earlier versions have it
        self.totals = Totals(**{name: value for name, value in state["totals"].items() if name != removed})
        self.learner.load_state_dict(state["learner"])
        self.done, self.evaluated, self.mid_step = state["step"], state["evaluated"], mid_step
        self.folder, self.saved = folder, (self.done, mid_step.begun.done if mid_step else None)

    def _save(
        self, state: Mapping[str, Any], mid_step: MidStep | None, *, together: bool = True, beside: bool = False
    ) -> None:
        self.log.sync()
        folder = self.checkpoint(self.done, state, mid_step, together, beside=beside)
        if folder is None:
            return
        self.folder = folder
        self.saved = (self.done, mid_step.begun.done if mid_step else None)

    def _evaluate_if_due(self) -> None:
        """Before training, and every so many steps; after training final/ is evaluated."""
        every = self.settings.eval.every
        due = self.done == 0 or (every and self.done % every == 0 and self.done < self.steps)
        if due and self.evaluated < self.done:
            self.evaluate()

    def _warn(self, when: str) -> None:
        """What a person should know about the grading of a step or an evaluation."""
        for text in dict.fromkeys(chain.from_iterable(self.processes.gather(self.scorer.warnings()))):
            self.progress.warning(f"{when}: {text}")

    def _advise(self, step: int, metrics: Mapping[str, Any]) -> None:
        for text in self.adviser.advice(step, metrics):
            self.progress.warning(text)

    def _new_questions(self, step: int) -> list[Question]:
        """X_new: a function of (seed, step)."""
        epochs = self.settings.train.epochs if self.settings.train.steps is None else None
        size = self.settings.rollout.batch_size
        indices = batch_ids(len(self.questions), size, self.settings.seed, step - 1, epochs)
        return [self.questions[i] for i in indices]

    def _replayed_questions(self, new: Sequence[Question]) -> list[Question]:
        """X_replay: drawn from the buffer minus X_new, on top of it (Alg. 1, l. 2)."""
        if not self.method.replay:
            return []
        return self.buffer.sample(share_of(self.settings.zone.rho_replay, len(new)), {q.id for q in new})

    def _check_same(self, step: int, groups: Sequence[Group]) -> None:
        """That every process is about to learn the same; with one process there is nothing to check."""
        if self.processes.size > 1:
            batch = [(g.kind, g.question.id, g.prompt.ids, [r.reward for r in g.rollouts]) for g in groups]
            # The entries follow from the groups of all steps, and each step's were compared.
            buffer = (len(self.buffer), self.buffer.draws, self.buffer.occupancy())
            self.processes.check_same(f"the groups and the buffer of step {step}", (batch, buffer))

    def _update_buffer(self, plain: Sequence[Group], step: int) -> Changes:
        """Admit, graduate, evict, by plain accuracy alone (Alg. 1, l. 19)."""
        if not self.method.replay:
            return Changes()
        return self.buffer.update([(g.question, g.accuracy) for g in plain if g.counts], step)

    def _buffer_metrics(self, changes: Changes) -> dict[str, Any]:
        return {
            "buffer": len(self.buffer),
            "buffer_by_entry": {entry_bin(a): n for a, n in self.buffer.occupancy().items()},
            "admitted": len(changes.admitted),
            "graduated": len(changes.graduated),
            "evicted": len(changes.evicted),
        }

    def _report(
        self, step: int, collected: StepRollouts, updated: UpdateResult, changes: Changes, clock: Clock
    ) -> None:
        """Totals, one line of metrics and one of progress."""
        zone = collected.zone
        if error := zone.teacher_error or updated.teacher_error:
            self.progress.warning(f"step {step}: the teacher could not serve every request: {error}")
        groups = [*collected.plain, *collected.again]
        replayed_slots = sum(g.question.id in collected.replayed for g in collected.again)
        tokens = sum(len(r.ids) for g in groups for r in g.rollouts)
        metrics: dict[str, Any] = {
            "accuracy": accuracy_by_kind(groups),
            "composition": composition(groups, self.settings.zone.threshold),
            "new_questions": collected.new,
            "replayed_questions": len(collected.replayed),
            "replayed_share_of_slots": replayed_slots / len(collected.again) if collected.again else None,
            **rollout_metrics([r for g in groups for r in g.rollouts], updated.advantages),
            **zone.metrics,
            **updated.metrics,
            **collected.counts,
            **self._buffer_metrics(changes),
        }
        uses = ("teacher", "compression", "hint")
        teacher_tokens = sum(int(metrics.get(f"{use}_completion_tokens", 0)) for use in uses)
        self.totals.student_tokens += tokens
        self.totals.teacher_tokens += teacher_tokens
        self.totals.teacher_wait_seconds += metrics.get("teacher_wait_seconds", 0.0)
        self.totals.judge_tokens += int(metrics.get("judge_completion_tokens", 0))
        for name in MISSED:
            self.totals.missed[name] = self.totals.missed.get(name, 0) + int(metrics.get(name) or 0)
        seconds = clock.seconds()
        self.totals.seconds += seconds["step"]
        metrics = {
            **metrics,
            "rollouts": sum(len(g.rollouts) for g in groups),
            "student_tokens": tokens,
            "prompt_tokens": sum((len(g.prompt.ids) + len(g.prompt.forced_ids)) * len(g.rollouts) for g in groups),
            "teacher_tokens": teacher_tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds["step"],
        }
        self.totals.rollouts += metrics["rollouts"]
        self.log.metrics(step, "step", metrics)
        self._advise(step, metrics)
        self.progress.step(step, metrics, self.totals)


class Clock:
    """Seconds by part of a step; `spent` by the part of it that came before."""

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self._parts = dict(spent or {})
        self._began = time.perf_counter() - self._parts.pop("step", 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts what happens inside towards `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds per part, and of the whole step so far."""
        return {**self._parts, "step": time.perf_counter() - self._began}
