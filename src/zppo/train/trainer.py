"""Training: `Trainer.step` is Algorithm 1, line by line. What goes around a step (signals, checkpoints, the display) is in `train.run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zppo.config.settings import Settings
from zppo.core.advantages import trivial
from zppo.core.draws import keyed_random
from zppo.core.metrics import accuracy_by_kind, composition, eligibility, groups_with_gradient, reward_means, rollout_metrics, wrong_example
from zppo.core.replay import Changes
from zppo.core.types import Group, Prompt, Question
from zppo.data.order import batch_ids, steps_per_epochs
from zppo.errors import ClusterError, MemoryLimitError
from zppo.rollout.evaluation import Evaluation, evaluate_held_out
from zppo.rollout.rewards import CALLS, METRIC
from zppo.rollout.run_data import RunData
from zppo.rollout.step_parts import Parts
from zppo.rollout.student import StudentSampler
from zppo.runs.log import RunLog, usage
from zppo.step_log import StepLog
from zppo.teacher.hints import BY_GOLD
from zppo.train.engine_checks import EngineCheck
from zppo.train.learner import Learner, PartialUpdate, UpdateResult, UpdateStopped
from zppo.train.mid_step import MidStep, StepRollouts

MISSED = {
    "teacher_unreachable": "teacher rollouts without a reply",
    "compression_unreachable": "compressions without a reply",
    "compression_failed": "compressions refused (the answer or the form did not survive, or they repeat the instructions)",
    "hint_unreachable": "hints without a reply",
    "hint_failed": "hints refused (they gave the answer away, had no form, or repeat the instructions)",
    "bcq_raw_pairs": "BCQ prompts with uncompressed candidates",
    "judge_unreachable": "judge calls without a reply (ungraded)",
    "judge_malformed": "judge replies that were no verdict (wrong)",
    "reward_timeouts": "completions without a reward in time (ungraded)",
    "reward_without": "completions that no reward function applied to (ungraded)",
    "too_long": "prompts over the context",
}
"""Metrics of what a step had to do without, in words; the closing table sums them."""


REFILLS = 10
"""Times that a step samples further questions, at most: `max_num_gen_batches` of verl's recipe of DAPO."""


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
    missed: dict[str, int] = field(default_factory=dict)  # what had to be done without, by the names of MISSED
    hint_leaks: dict[str, int] = field(default_factory=dict)  # hints that gave the answer away, by right answer

    def add(self, metrics: Mapping[str, Any], changes: Changes) -> None:
        """Count one step: its metrics, and what its buffer update did."""
        self.rollouts += metrics["rollouts"]
        self.student_tokens += metrics["student_tokens"]
        self.teacher_tokens += metrics["teacher_tokens"]
        self.teacher_wait_seconds += metrics.get("teacher_wait_seconds", 0.0)
        self.judge_tokens += int(metrics.get("judge_completion_tokens", 0))
        self.seconds += metrics["seconds"]["step"]
        for name in MISSED:
            self.missed[name] = self.missed.get(name, 0) + int(metrics.get(name) or 0)
        for gold, count in metrics.get("hint_leaked_by_gold", ()):
            self.hint_leaks[gold] = self.hint_leaks.get(gold, 0) + count
        for counts, entries in ((self.admitted, changes.admitted), (self.graduated, changes.graduated), (self.evicted, changes.evicted)):
            for entry in entries:
                counts[entry_bin(entry.accuracy)] = counts.get(entry_bin(entry.accuracy), 0) + 1


def entry_bin(accuracy: float) -> str:
    """The name of an entry-accuracy bin: 0.125 -> "12.5%"."""
    return f"{accuracy:.1%}".replace(".0%", "%")


class Trainer:
    """Takes the steps of one recipe.

    Args:
        settings: the recipe's.
        data: training and held-out questions.
        parts: the pieces of a step: reformulation, buffer.
        student: samples the student's rollouts and grades them.
        learner: the policy gradient, or distillation.
        engine_check: brings the sampling engine up to the weights, and checks it.
        run_log: the files of the run folder.

    Attributes:
        steps: steps of the whole run; `done`: those that are finished.
        buffer: the prompt replay buffer.
        evaluated: the step of the last evaluation, -1 before the first.
        totals: sums over the run.
        watch: told what a step or an evaluation is at (`StepLog.watch`).
        boundary: what a rescue needs of the last step boundary, see `snapshot`; None where the weights are between two steps.
    """

    def __init__(
        self,
        settings: Settings,
        data: RunData,
        parts: Parts,
        student: StudentSampler,
        learner: Learner,
        engine_check: EngineCheck,
        run_log: RunLog,
    ) -> None:
        self.settings, self.zone, self.method = settings, settings.zone, settings.method.resolve()
        self.questions, self.held_out = data.train, data.held_out
        self.parts, self.student, self.learner = parts, student, learner
        self.engine_check, self.run_log, self.processes = engine_check, run_log, student.processes
        self.buffer = parts.buffer
        self.steps = total_steps(settings, len(self.questions))
        self.done, self.evaluated = 0, -1
        self.totals = Totals()
        self.watch: Callable[[str, int, int], None] | None = None
        self.boundary: dict[str, Any] | None = None

    def step(self, step: int) -> StepLog:
        """One step of Algorithm 1. A signal ends the sampling at once, and the update between two of its optimizer steps.

        Returns:
            What the step has logged.

        Raises:
            UpdateStopped: the update was left half-way; `update` goes on from its `mid_step`.
        """
        log = StepLog(step, watch=self.watch)
        self._sync_engine(log)  # the engine samples from the weights of the last step
        new = self._new_questions(step)
        replayed = self.parts.replayed(new)  # line 2
        plain = self.student.rollout(self._plain_prompts([*new, *replayed]), log)  # line 2
        plain += self._refill(plain, log)  # none, but for DAPO
        hard = self.parts.hard(plain, step)  # the hard set (line 4), sorted for line 6
        # The teacher (line 4), pre-cap (6), BCQ and NCQ (8-10), post-cap (13-15).
        again = self.parts.reformulate(hard, len(new), log)
        reformulated = self.student.rollout(again.prompts, log)  # line 16
        return self.update(StepRollouts(len(new), ids_of(replayed), plain, reformulated, again.responses), log)

    def update(self, rollouts: StepRollouts, log: StepLog, partial: PartialUpdate | None = None) -> StepLog:
        """The second half of a step: weights and buffer (Alg. 1, l. 18 and 19). `partial` is where the update was left, if it was."""
        with self.processes.stop.ignored():  # a signal waits here until nothing is lost by it
            groups = [*rollouts.plain, *rollouts.reformulated]
            self._check_same(log.step, groups)
            with log.time("engine"):  # what it says of some rollouts now is held against what it says after the update
                self.engine_check.before_update(log.step, groups)
            updated = self._learn(rollouts, log, partial)  # line 18: advantages, I optimizer steps
            changes = self.parts.remember(rollouts.plain, log.step)  # line 19
            self.done = log.step
            self.boundary = self.snapshot()  # the weights are those of this step, whatever becomes of its report
            self._record(rollouts, updated, changes, log)
            self.boundary = self.snapshot()
        return log

    def evaluate(self) -> tuple[Evaluation, StepLog]:
        """Accuracy on the held-out questions with the current weights."""
        self.engine_check.refresh(self.done)
        log = StepLog(watch=self.watch)
        result, groups = evaluate_held_out(self.student, self.held_out, self.settings.eval, log)
        with self.processes.stop.ignored():
            self.log_evaluation("eval", result, groups, log)
            self.evaluated = self.done
            self.boundary = self.snapshot()
        return result, log

    def log_evaluation(self, event: str, result: Evaluation, groups: Sequence[Group], log: StepLog) -> None:
        """Its completions and a line of metrics.jsonl: `event` is eval, or final where the student was loaded from final/."""
        self.processes.gather_log(log)
        counts = {name: n for name, n in _counts(log).items() if name != "graded_answers"}
        log.metrics = asdict(result) | _reward_metrics(groups, log) | counts
        self.run_log.held_out(self.done, event, groups, show=self.student.renderer.chat.show_short)
        self.run_log.metrics(self.done, event, log.metrics)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides weights and optimizer; JSON-ready."""
        return self.state_at(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """State at the end of a step that the next one may change before its first optimizer step.

        The buffer's entries are not in it: they change after the weights, and a copy of all of them in every step would take longer than
        the step where there are a million.
        """
        return {
            "draws": self.buffer.draws,
            "totals": asdict(self.totals),
            "learner": self.learner.state_dict(),
            "evaluated": self.evaluated,
        }

    def state_at(self, boundary: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a step boundary that the weights are still at."""
        rest = {name: value for name, value in boundary.items() if name != "draws"}
        return {"buffer": {**self.buffer.state_dict(), "draws": boundary["draws"]}, **rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a checkpoint."""
        self.buffer.load_state_dict(state["buffer"])
        self.buffer.seed = self.settings.seed  # the recipe may have been edited
        removed = "teacher_unused_tokens"  # checkpoints of earlier versions have it
        self.totals = Totals(**{name: value for name, value in state["totals"].items() if name != removed})
        self.learner.load_state_dict(state["learner"])
        self.done, self.evaluated = state["step"], state["evaluated"]

    def _sync_engine(self, log: StepLog) -> None:
        """Bring the sampling engine up to the weights, and compare the two."""
        with log.time("engine"):
            log.add(**self.engine_check.refresh(log.step - 1))

    def _plain_prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        return [self.student.renderer.plain(question) for question in questions]

    def _refill(self, plain: Sequence[Group], log: StepLog) -> list[Group]:
        """Groups of further questions in the place of all-right and all-wrong ones, until none is missing (DAPO, arXiv 2503.14476, Eq. 11).

        Up to `REFILLS` times so many are asked about as are missing, drawn by (seed, step, time) from those that this step has not asked
        about [zppo]: nothing is sampled in vain, and the order of the data stays what it is.
        """
        added: list[Group] = []
        if not self.method.refill:
            return added
        for turn in range(REFILLS):
            asked = {g.question.id for g in (*plain, *added)}
            left = [question for question in self.questions if question.id not in asked]
            missing = len(plain) - sum(not trivial(g) for g in (*plain, *added))
            drawn = keyed_random(self.settings.seed, "refill", log.step, turn).sample(left, min(missing, len(left)))
            if not drawn:
                break
            added += self.student.rollout(self._plain_prompts(drawn), log)
        log.counts["refilled_questions"] = float(len(added))
        return added

    def _new_questions(self, step: int) -> list[Question]:
        """X_new: a function of (seed, step)."""
        epochs = self.settings.train.epochs if self.settings.train.steps is None else None
        size = self.settings.rollout.batch_size
        indices = batch_ids(len(self.questions), size, self.settings.seed, step - 1, epochs)
        return [self.questions[i] for i in indices]

    def _check_same(self, step: int, groups: Sequence[Group]) -> None:
        """That every process is about to learn the same; with one process there is nothing to check."""
        if self.processes.size > 1:
            batch = [(g.kind, g.question.id, g.prompt.ids, [r.reward for r in g.rollouts]) for g in groups]
            # The entries follow from the groups of all steps, and each step's were compared.
            buffer = (len(self.buffer), self.buffer.draws, self.buffer.occupancy())
            self.processes.check_same(f"the groups and the buffer of step {step}", (batch, buffer))

    def _learn(self, rollouts: StepRollouts, log: StepLog, partial: PartialUpdate | None) -> UpdateResult:
        """The update, and the counts of all processes in the log; where it is left between two optimizer steps, what to go on from."""
        boundary, self.boundary = self.boundary, None
        self.processes.gather_log(log)
        graded = log.counts.get("graded_answers")
        try:
            with log.time("update"):
                updated = self.learner.update(rollouts.plain, rollouts.reformulated, rollouts.responses, log, partial)
            self.engine_check.trained(log.counts)
        except (MemoryLimitError, ClusterError):
            if self.processes.size == 1:
                self.boundary = boundary  # the weights have not moved, or a cluster has kept those of the step before
            raise
        except UpdateStopped as stopped:
            stopped.mid_step = MidStep(rollouts, log, stopped.partial)
            raise
        self.processes.gather_log(log)  # off-policy distillation asks the teacher in its update
        log.counts["graded_answers"] = graded  # as ever: without the responses that were graded there
        return updated

    def _record(self, rollouts: StepRollouts, updated: UpdateResult, changes: Changes, log: StepLog) -> None:
        """The step in the run folder: buffer.jsonl, rollouts/, a line of metrics.jsonl; and in the totals of the run."""
        with log.time("other"):
            left = (*changes.admitted, *changes.graduated, *changes.evicted)
            held = [entry for g in rollouts.plain if (entry := self.buffer.get(g.question.id))]
            self.run_log.buffer(log.step, changes)
            self.run_log.rollouts(
                log.step,
                updated.groups,
                updated.advantages.tolist(),
                replayed=frozenset(rollouts.replayed),
                entry_accuracy={entry.question.id: entry.accuracy for entry in (*left, *held)},
                show=self.student.renderer.chat.show_short,
            )
        log.metrics = step_metrics(rollouts, updated, log, self.zone.threshold) | {
            "buffer": len(self.buffer),
            "buffer_by_entry": {entry_bin(a): n for a, n in self.buffer.occupancy().items()},
            "admitted": len(changes.admitted),
            "graduated": len(changes.graduated),
            "evicted": len(changes.evicted),
            "system": usage(),
        }
        self.totals.add(log.metrics, changes)
        self.run_log.metrics(log.step, "step", log.metrics)
        log.example = wrong_example([*rollouts.plain, *rollouts.reformulated])
        if updated.fault:
            log.fault = updated.fault


def ids_of(questions: Sequence[Question]) -> tuple[str, ...]:
    """Ids in the order of the questions."""
    return tuple(question.id for question in questions)


def total_steps(settings: Settings, questions: int) -> int:
    """Steps of a whole run."""
    if settings.train.steps is not None:
        return settings.train.steps
    return steps_per_epochs(questions, settings.rollout.batch_size, settings.train.epochs)


def step_metrics(rollouts: StepRollouts, updated: UpdateResult, log: StepLog, threshold: float) -> dict[str, Any]:
    """What metrics.jsonl says of a step, but for the buffer (method.md section 9)."""
    groups = [*rollouts.plain, *rollouts.reformulated]
    replayed_slots = sum(g.question.id in rollouts.replayed for g in rollouts.reformulated)
    tokens = sum(len(r.ids) for g in groups for r in g.rollouts)
    written = (*(f"{use}_completion_tokens" for use in ("teacher", "compression", "hint")), "teacher_unused_tokens")
    seconds = log.elapsed()
    return {
        "accuracy": accuracy_by_kind(groups),
        "composition": composition(groups, threshold),
        "eligibility": eligibility(rollouts.plain, rollouts.responses, threshold),
        "new_questions": rollouts.new,
        "replayed_questions": len(rollouts.replayed),
        "replayed_share_of_slots": replayed_slots / len(rollouts.reformulated) if rollouts.reformulated else None,
        **rollout_metrics([r for g in groups for r in g.rollouts], updated.advantages),
        **({} if "distilled_completions" in log.counts else _gradient(updated)),
        **_reward_metrics(groups, log),
        **_by_gold(_counts(log)),
        "rollouts": sum(len(g.rollouts) for g in groups),
        "student_tokens": tokens,
        "prompt_tokens": sum((len(g.prompt.ids) + len(g.prompt.forced_ids)) * len(g.rollouts) for g in groups),
        "teacher_tokens": sum(int(log.counts.get(name) or 0) for name in written),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds["step"],
    }


def _gradient(updated: UpdateResult) -> dict[str, int]:
    """How many groups a step by advantages learnt from, of how many."""
    return {"groups": len(updated.groups), "groups_with_gradient": groups_with_gradient(updated.groups, updated.advantages)}


def _reward_metrics(groups: Sequence[Group], log: StepLog) -> dict[str, dict[str, float]]:
    """What the user's reward functions gave, and what they reported, by name; nothing where there are none."""
    means = reward_means([r for g in groups for r in g.rollouts])
    sums = {name.removeprefix(METRIC): value or 0.0 for name, value in log.counts.items() if name.startswith(METRIC)}
    reported = {name: value / (log.counts.get(CALLS + name) or 1.0) for name, value in sums.items()}
    return {name: values for name, values in (("rewards", means), ("reward_metrics", reported)) if values}


def _counts(log: StepLog) -> dict[str, float | None]:
    """The counts of a step, without those that `_reward_metrics` makes means of."""
    return {name: n for name, n in log.counts.items() if not name.startswith((METRIC, CALLS))}


def _by_gold(counts: Mapping[str, float | None]) -> dict[str, Any]:
    """The counts of a step, those of hints that gave a right answer away as one list of [right answer, hints], most first."""
    named = {name: value for name, value in counts.items() if not name.startswith(BY_GOLD)}
    if "hint_leaked" not in named:
        return named
    leaked = [(name.removeprefix(BY_GOLD), int(value or 0)) for name, value in counts.items() if name.startswith(BY_GOLD)]
    return named | {"hint_leaked_by_gold": sorted(leaked, key=lambda pair: (-pair[1], pair[0]))}
