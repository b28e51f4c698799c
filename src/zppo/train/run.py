"""A run from its start, or from a checkpoint, to its end: the loop over the steps, and what saves it where it ends before its time.

`train` starts a run, `resume` continues one.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from zppo.config.recipe import dump_recipe, load_recipe
from zppo.config.settings import PushSettings, Settings
from zppo.core.replay import PromptReplayBuffer
from zppo.distributed.launcher import check_shards, read_launch, started_by_slurm
from zppo.distributed.parallel import ReplicatedWeights, make_accelerator, make_weights
from zppo.errors import CheckpointError, CollapseError, DataError, EngineError, Interrupted, StorageError, ZPPOError, one_line
from zppo.images.store import read_bytes
from zppo.names import check_file, check_run_folder
from zppo.rollout.form_check import check_form
from zppo.rollout.frozen_models import load_frozen_models
from zppo.rollout.grading import rule_grading
from zppo.rollout.run_data import read_data
from zppo.runs import checkpoint
from zppo.runs.display import Progress, show, warn
from zppo.runs.files import FINAL, RECIPE, check_output, check_unclaimed, write_whole, writing
from zppo.runs.lock import locked
from zppo.runs.log import BUFFER, METRICS, read_lines
from zppo.runs.push import push_run
from zppo.runs.signals import Stop
from zppo.runs.trackers import TRACKERS, Trackers, tracking
from zppo.step_log import StepLog
from zppo.train.assemble import Assembled, assemble
from zppo.train.finish import finish
from zppo.train.health_checks import CollapseWatch, HealthChecks
from zppo.train.learner import UpdateStopped
from zppo.train.mid_step import MidStep, as_placed
from zppo.train.provenance import changes_since, check_student, keep_words
from zppo.train.trainer import total_steps


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint to continue from."""

    folder: Path
    state: dict[str, Any]

    @classmethod
    def find(cls, settings: Settings, run: Path, console: Console) -> ResumePoint | None:
        """The newest checkpoint that is whole, None where none was written yet; damaged newer ones are named and set aside.

        Raises:
            CheckpointError: all are damaged, or the newest whole one is of another student. Nothing was changed then.
            StorageError: a damaged one cannot be renamed.
        """
        folder, damaged = checkpoint.newest_good(run)
        if folder is None:
            return None
        state = checkpoint.load_state(folder)
        check_student(state, settings.student, folder)
        for path, problem in damaged.items():
            aside = checkpoint.set_aside(path)
            warn(console, f"{path} is damaged: {problem}. It is called {aside.name} from now on, and {folder.name} is used")
        return cls(folder, state)

    def load(self, loop: TrainingLoop, origin: Mapping[str, Any], console: Console) -> None:
        """Give the trainer its state, after a look at what has changed since; images are those of the questions as they were read now.

        Raises:
            CheckpointError: it belongs to another recipe, holds something else than a state, or an image of its questions is gone or
                has changed.
        """
        places = {image.sha256: image.uri for q in loop.trainer.questions for image in q.images}
        trainer = loop.trainer
        mid_step = MidStep.read(self.folder, int(self.state["step"]) + 1, places)
        try:
            notes = changes_since(self.state["origin"], origin, self.folder, mid_step=mid_step is not None)
            for question, *_ in self.state["buffer"]["entries"]:
                question["images"] = as_placed(question["images"], places)
            trainer.load_state_dict(self.state)
            loop.loaded(self.folder, mid_step)
            self._check_images(trainer.buffer, mid_step)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(checkpoint.unusable(self.folder / "state.json", error)) from error
        if notes:
            warn(console, f"since the checkpoint: {'; '.join(notes)}. The rest of the run goes by what is there now")

    def _check_images(self, buffer: PromptReplayBuffer, mid_step: MidStep | None) -> None:
        """A checkpoint holds references: the files behind them are looked at now and not when a question is replayed."""
        groups = [*mid_step.rollouts.plain, *mid_step.rollouts.reformulated] if mid_step else []
        questions = [*buffer.questions(), *(group.question for group in groups)]
        for image in {image.sha256: image for question in questions for image in question.images}.values():
            try:
                read_bytes(image)
            except DataError as error:
                raise CheckpointError(f"{self.folder} holds questions with images: {error}") from error


class TrainingLoop:
    """The steps of a run, with evaluations and checkpoints on the way.

    Attributes:
        mid_step: where the next step goes on, None for its start.
        folder: of the checkpoint that was last written or loaded.
    """

    def __init__(self, settings: Settings, parts: Assembled, progress: Progress) -> None:
        self.settings, self.trainer, self.checkpointer = settings, parts.trainer, parts.checkpointer
        kinds = ("plain", *(r.kind for r in self.trainer.parts.reformulator.reformulations))
        self.progress = progress
        progress.plan(self.trainer.steps, kinds, replay=self.trainer.method.replay, evaluates=bool(self.trainer.held_out))
        self.trainer.watch = self.progress.part
        self.health, self.collapse = HealthChecks.of(settings), CollapseWatch.of(settings)
        self.stop = self.trainer.processes.stop
        self.mid_step: MidStep | None = None
        self.folder: Path | None = None
        self._unshown = False  # that something could not be shown has been said
        self._saved: tuple[int, int | None] | None = None  # steps and updates of the next one that are in that checkpoint

    def run(self) -> None:
        """All steps that are left.

        Raises:
            Interrupted: the run was asked to stop. Between two updates the step is saved as far as it is; elsewhere see `save_last_step`.
        """
        trainer, every = self.trainer, self.settings.train.checkpoint_every
        if self.mid_step is None:
            trainer.boundary = trainer.snapshot()
            self._evaluate_if_due()
        while trainer.done < trainer.steps:
            self.checkpointer.check()
            with self._harmless():
                self.progress.at_step(trainer.done + 1)
            log = self._step()
            with self.stop.shield():
                self._show(log)
                if log.fault:
                    self._save(trainer.state_dict())  # all processes are here, so that sharded weights can be saved too
                    raise ZPPOError(log.fault)
                self._stop_if_collapsed(log)
            self._evaluate_if_due()
            if every and (trainer.done % every == 0 or trainer.done == trainer.steps):
                with self.stop.shield():
                    self._save(trainer.state_dict(), later=True)
        with self.stop.shield():
            self.checkpointer.wait()

    def _step(self) -> StepLog:
        """The next step; one that was stopped between two updates goes on there, and one that is stopped there is saved."""
        trainer = self.trainer
        mid_step, self.mid_step = self.mid_step, None
        trainer.student.renderer.chat.forget_images()
        try:
            if mid_step is not None:
                mid_step.log.watch = trainer.watch
                return trainer.update(mid_step.rollouts, mid_step.log, mid_step.partial)
            return trainer.step(trainer.done + 1)
        except UpdateStopped as stopped:
            with self.stop.ignored():
                if stopped.mid_step and self._saved != (trainer.done, stopped.partial.done):
                    with self._harmless():
                        self._show_warnings(stopped.mid_step.log)
                    self._save(trainer.state_dict(), stopped.mid_step)
            raise stopped.cause or Interrupted(self.stop.signum or signal.SIGTERM) from None

    def _evaluate_if_due(self) -> None:
        """Before training, and every so many steps; after training final/ is evaluated."""
        trainer, every = self.trainer, self.settings.eval.every
        due = trainer.done == 0 or (every and trainer.done % every == 0 and trainer.done < trainer.steps)
        if not (due and trainer.evaluated < trainer.done and trainer.held_out):
            return
        trainer.student.renderer.chat.forget_images()
        with self._harmless():
            self.progress.doing(f"evaluating on {len(trainer.held_out):,} held-out questions")
        result, log = trainer.evaluate()
        with self.stop.shield(), self._harmless():
            self.progress.evaluation(trainer.done, result)
            self._show_warnings(log)
            self._advise(asdict(result))

    def _show(self, log: StepLog) -> None:
        with self._harmless():
            self._show_warnings(log)
            if error := log.errors.get("teacher"):
                self.progress.warning(f"step {log.step}: the teacher could not serve every request: {error}")
            self._advise(log.metrics, log.example)
        with self._harmless():
            self.progress.step(log.step, log.metrics, self.trainer.totals)

    def _stop_if_collapsed(self, log: StepLog) -> None:
        """Ends a run that died, with the newest good checkpoint as the one that a resume goes on from.

        Raises:
            CollapseError: it has died, and `train.stop_on_collapse` is on.
        """
        self.collapse.see(log.step, log.metrics)
        self.checkpointer.good = self.collapse.good
        # The first process decides: after a resume the others may have read a log that was still to be cut.
        if self.settings.train.stop_on_collapse and self.trainer.processes.gather(self.collapse.steps is not None)[0]:
            self.trainer.boundary = None  # nothing that is worth to be saved
            self.folder = self.checkpointer.back_to_good()
            raise CollapseError(self.collapse.text(log.metrics, self.settings, self.folder))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """An error while something is shown is said once; the run is worth more than its display."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if not self._unshown:
                self._unshown = True
                with suppress(Exception, SystemExit):
                    self.progress.warning(
                        f"what step {self.trainer.done} did could not be shown ({type(error).__name__}: {error}); the run goes on"
                    )

    def _show_warnings(self, log: StepLog) -> None:
        """What a person should know about the grading of a step or an evaluation."""
        when = f"step {log.step}" if log.step else f"evaluation at step {self.trainer.done}"
        for text in log.warnings.values():
            self.progress.warning(f"{when}: {text}")
        log.warnings.clear()

    def _advise(self, metrics: Mapping[str, Any], example: str = "") -> None:
        for text in self.health.advice(self.trainer.done, metrics, example):
            self.progress.warning(text)

    def _save(self, state: Mapping[str, Any], mid_step: MidStep | None = None, *, together: bool = True, later: bool = False) -> None:
        trainer = self.trainer
        trainer.run_log.sync()
        folder = self.checkpointer(trainer.done, state, mid_step, together=together, later=later)
        if folder is not None:
            self.folder, self._saved = folder, (trainer.done, mid_step.partial.done if mid_step else None)

    def loaded(self, folder: Path, mid_step: MidStep | None) -> None:
        """The trainer has the state of a checkpoint."""
        self.folder, self.mid_step = folder, mid_step
        self._saved = (self.trainer.done, mid_step.partial.done if mid_step else None)

    def save_last_step(self, *, together: bool) -> None:
        """Save the last step boundary, where no checkpoint has it yet and the weights are still there.

        For a run that ends before its time, by a signal or an error: what a step has sampled is lost. After an error inside an update
        the weights are those of no step, and the last checkpoint counts.
        `together`: all processes of the run end here, as after a signal; otherwise the first one saves alone where it can.
        """
        trainer = self.trainer
        with self.stop.ignored():
            self.checkpointer.wait()
            if trainer.boundary is not None and trainer.done > 0 and self._saved != (trainer.done, None):
                self._save(trainer.state_at(trainer.boundary), together=together)


def rescue(run: Path, loop: TrainingLoop, error: BaseException, console: Console) -> None:
    """Save what was trained before the run ends by `error`; where that fails it is said, and the error stays what it is.

    Raises:
        StorageError: the run was asked to stop, and it cannot be saved.
    """
    if isinstance(error, StorageError):
        return  # the same disk would refuse again
    say = partial(warn, console)
    try:
        # All processes stop together for a signal, and where an engine does not hold the weights.
        together = loop.trainer.processes.size == 1 or isinstance(error, Interrupted | EngineError)
        loop.save_last_step(together=together)
    except Exception as failed:
        if isinstance(error, KeyboardInterrupt) and isinstance(failed, StorageError):
            raise failed from error
        say(f"the run after step {loop.trainer.done} could not be saved: {one_line(failed)}")
    if not isinstance(error, KeyboardInterrupt):
        say(resume_hint(run))


def resume_hint(run: Path) -> str:
    """What is saved and how it goes on: the last words of a run that ends before its time."""
    if not (run / RECIPE).exists():
        return "the run ended before anything was written"
    if saved := checkpoint.existing(run):
        return f"the run is saved in {saved[-1]}; continue with `zppo resume {run}`"
    return f"no step was saved yet; `zppo resume {run}` starts over"


def train(settings: Settings, recipe_name: str, console: Console | None = None, stop: Stop | None = None) -> Path:
    """Train by a recipe from the start; returns the run folder.

    Everything is checked and loaded before the folder is made. `stop` ends the run where nothing is lost by it.

    Raises:
        ZPPOError: something is wrong with recipe, data, models or templates, or the folder holds a run already.
        StorageError: the disk refuses; what was saved before is whole.
        Interrupted: `stop` wanted it; what was trained is saved.
    """
    run = settings.output or Path("runs") / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(run)
    return _run(settings.model_copy(update={"output": run}), run, console or Console(), stop or Stop(), resumed=False)


def resume(run: Path, console: Console | None = None, stop: Stop | None = None, addresses: Sequence[str] | Mapping[str, Any] = ()) -> Path:
    """Continue a run after its newest checkpoint that is whole; returns the run folder.

    What was written after the checkpoint is taken back and done again; on a CPU with an in-process teacher with the same result.
    Damaged newer checkpoints are named and set aside. `addresses` are overrides of where servers answer, for this start alone.

    Raises:
        CheckpointError: the folder holds no run, no checkpoint of it is whole, or it belongs to another recipe.
        StorageError, Interrupted: as in `train`.
    """
    if not (run / RECIPE).exists():
        raise CheckpointError(f"{run} holds no run: there is no {RECIPE} in it. Name the folder that `zppo train` printed")
    console = console or Console()
    check_run_folder(run)
    for name in (METRICS, BUFFER, TRACKERS):
        check_file(run / name, CheckpointError)  # what is written after a checkpoint is taken back in them
    settings = load_recipe(run / RECIPE, addresses).model_copy(update={"output": run})
    if (run / FINAL / "README.md").exists() and not _has_more_steps(settings, run):
        console.print(f"{run} is finished already; its student is in {run / FINAL}", soft_wrap=True)
        return run
    return _run(settings, run, console, stop or Stop(), resumed=True)


def _has_more_steps(settings: Settings, run: Path) -> bool:
    """Whether the recipe of a finished run asks for more steps than its newest checkpoint has; it is trained on from there."""
    for folder in reversed(checkpoint.existing(run)):
        check_file(folder / checkpoint.STATE, CheckpointError)
        with suppress(CheckpointError, KeyError, TypeError, ValueError):  # the one before is used then
            state = checkpoint.load_state(folder)
            return total_steps(settings, int(state["origin"]["questions"]["count"])) > int(state["step"])
    return False


def _run(settings: Settings, run: Path, console: Console, stop: Stop, *, resumed: bool) -> Path:
    transformers_logging.disable_progress_bar()  # our own display is live
    try:
        with ExitStack() as held:
            # Processes first: only the first of them prints, writes, and decides where to start.
            launch = read_launch()
            check_shards(settings.train, launch, settings.method.resolve().loss)
            if launch.rank == 0 and (meeting := started_by_slurm()):
                where = f"{meeting['MASTER_ADDR']}:{meeting['MASTER_PORT']}"
                console.print(f"srun started {launch.processes} processes; they meet at {where}", style="dim", soft_wrap=True)
            accelerator = make_accelerator(settings, launch)
            weights = make_weights(settings, accelerator, launch, stop)
            run = weights.processes.gather(run)[0]  # its name has the time in it
            settings = settings.model_copy(update={"output": run})
            if not weights.processes.main:
                console = Console(quiet=True, force_terminal=False)
            elif resumed:
                held.enter_context(locked(run, partial(warn, console)))
            _go(settings, run, console, accelerator, weights, held, resumed=resumed)
        accelerator.end_training()
        return run
    except StorageError as error:
        last_words = resume_hint(run)
        raise StorageError(f"{error}. {last_words[:1].upper()}{last_words[1:]}") from error
    except KeyboardInterrupt as error:
        name = signal.Signals(error.signum).name if isinstance(error, Interrupted) else "interrupted"
        console.print(Text(f"{name}: {resume_hint(run)}"), soft_wrap=True, highlight=False)
        raise


def _go(
    settings: Settings, run: Path, console: Console, accelerator: Accelerator, weights: ReplicatedWeights, held: ExitStack, *, resumed: bool
) -> None:
    """The run from its data to its end; a new one takes the lock of its folder into `held` when it makes it."""
    processes = weights.processes
    names = settings.train.trackers if processes.main else ()
    trackers = Trackers(names, settings.train.tracker_project, run, partial(warn, console), settings.train.tracker_completions)
    trackers.check()
    start = processes.gather(ResumePoint.find(settings, run, console) if resumed and processes.main else None)[0]
    # Everything is loaded and checked before the run folder is made, or changed.
    with Progress(console) as progress, rule_grading(settings) as rule, ExitStack() as stack:
        progress.doing(f"reading the questions of {settings.data.train_name}")
        data = read_data(settings, warn=progress.warning, say=partial(show, console))
        frozen_models = stack.enter_context(
            load_frozen_models(settings, accelerator.device, data.image_inputs, doing=progress.doing, warn=progress.warning)
        )
        stack.enter_context(tracking(trackers))
        folder = start.folder if start else None
        parts = assemble(settings, data, run, folder, rule, frozen_models, accelerator, weights, progress)
        loop = TrainingLoop(settings, parts, progress)
        if start:
            start.load(loop, parts.origin, console)
        # From here on the folder is a run that can be resumed.
        with processes.stop.shield():
            _open(settings, run, loop, trackers, console, held, resumed=resumed)
            if processes.size > 1:
                console.print(f"{processes.size} processes, {weights.kind}")
        console.print("accuracies of rollouts are running means over about ten steps", style="dim")
        with processes.uninterrupted():
            try:
                if not resumed:
                    _check_form(settings, loop, progress)
                loop.run()
                if parts.student.adapters:  # they are merged now, for good: runs without checkpoints are saved before
                    loop.save_last_step(together=True)
                    loop.trainer.boundary = None
                finish(settings, run, parts, progress, bf16=accelerator.mixed_precision == "bf16")
            except BaseException as error:
                rescue(run, loop, error, console)  # before anything else is closed: there may be little time
                raise
    processes.wait()
    parts.close()
    if settings.push is not None and processes.main:
        _push(settings.push, run, console)


def _push(push: PushSettings, run: Path, console: Console) -> None:
    """The student on the hub; what goes wrong there costs the run nothing."""
    try:
        console.print(f"pushing {run / FINAL} to {push.repo} ...", style="dim", soft_wrap=True)
        console.print(f"pushed: {push_run(run, push.repo, private=push.private)}", highlight=False, soft_wrap=True)
    except ZPPOError as error:
        warn(console, f"warning: {error}")
    except KeyboardInterrupt:
        warn(console, f"interrupted: the run is finished, and not pushed. `zppo push {run} --repo {push.repo}` does it")


def _check_form(settings: Settings, loop: TrainingLoop, progress: Progress) -> None:
    """Says whether answers can be read off a few completions; not where the user's own function reads them, or nothing is trained."""
    trainer = loop.trainer
    if settings.grading.reward or not trainer.steps:
        return
    progress.doing("looking at a few completions")
    found = check_form(trainer.student, trainer.questions, settings.answer_form)
    if found is not None and trainer.processes.main:
        if found.low:
            progress.warning(found.text(settings.answer_form))
        else:
            show(progress.console, found.text(settings.answer_form))


def _open(
    settings: Settings, run: Path, loop: TrainingLoop, trackers: Trackers, console: Console, held: ExitStack, *, resumed: bool
) -> None:
    """Make the run folder, or take back what was written after the checkpoint."""
    trainer = loop.trainer
    if resumed:
        step = trainer.done if loop.folder else -1
        trainer.run_log.rewind(step, trainer.evaluated)
        for line in read_lines(run / METRICS):
            if line["event"] == "step":
                loop.health.remember(line)
                loop.collapse.see(line["step"], line)
        loop.checkpointer.good = loop.collapse.good
        trackers.start(step)
        far = f" and {loop.mid_step.partial.done} updates of the next" if loop.mid_step else ""
        console.print(f"resumed after step {trainer.done} of {trainer.steps}{far}")
    else:
        trackers.start()
        if trainer.processes.main:
            with writing(run):
                run.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run, partial(warn, console)))
            check_unclaimed(run)  # another one may have begun there while the models were loaded
            write_whole(run / RECIPE, dump_recipe(keep_words(settings, run)))  # before all else: what has a recipe can be resumed
        trainer.run_log.open()
        console.print(f"run folder: {run}", soft_wrap=True, highlight=False)
    if trackers.names:
        trainer.run_log.listener, trainer.run_log.reader = trackers.log, trackers.log_completions
