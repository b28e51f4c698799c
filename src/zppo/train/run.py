"""What a finished run leaves: final/ with a model card, and the closing table.

How a run goes on after an end that came too early: the checkpoint to start from, the state to save, the words to leave.

`train` starts a run, `resume` continues one.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from zppo import __version__
from zppo.config.recipe import dump_recipe, load_recipe
from zppo.config.settings import LoraSettings, Settings
from zppo.core.replay import PromptReplayBuffer
from zppo.distributed.launcher import read_launch
from zppo.distributed.parallel import make_accelerator, make_weights
from zppo.engines.chat import Chat
from zppo.engines.vllm import VLLMEngine
from zppo.errors import CheckpointError, DataError, EngineError, Interrupted, StorageError
from zppo.images.store import read_bytes
from zppo.models.student import Student, load_model
from zppo.rollout.evaluation import Evaluation, evaluate
from zppo.rollout.frozen_models import load_frozen_models
from zppo.rollout.grading import scoring
from zppo.rollout.questions import read_data
from zppo.runs import checkpoint
from zppo.runs.checkpoint import Savable
from zppo.runs.display import warn
from zppo.runs.files import PARTIAL, RECIPE, check_output, sync, write_whole, writing
from zppo.runs.log import METRICS, read_lines
from zppo.runs.signals import Stop
from zppo.runs.trackers import Trackers, tracking
from zppo.train.build import Assembled, assemble, make_engine
from zppo.train.mid_step import MidStep, as_placed
from zppo.train.provenance import changes_since, check_student
from zppo.train.trainer import MISSED, Totals, Trainer, entry_bin

FINAL = "final"
ADAPTER = "adapter"  # in final/, where adapters were trained


def save_final(run: Path, student: Student, weights: Savable, chat: Chat) -> Path:
    """final/: weights in fp32, tokenizer, generation config; loads with `AutoModelForCausalLM.from_pretrained`.

    A student that was trained on images keeps its vision tower and processor, and loads with `AutoModelForImageTextToText`.

    Adapters are merged into the weights, for good; by themselves they are in final/adapter/. Without adapters `weights` is saved.

    Returns:
        The folder that it is in until `finish_final` gives it its name.

    Raises:
        StorageError: the disk refuses.
    """
    folder = run / f"{FINAL}{PARTIAL}"
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if student.adapters:
            student.adapters.save_pretrained(folder / ADAPTER)
            weights = student.adapters.merge()
        weights.save_pretrained(folder)
        chat.tokenizer.chat_template = chat.template  # what the student was trained with
        chat.tokenizer.save_pretrained(folder)
        for name, content in chat.image_processor.files.items() if chat.image_processor is not None else ():
            (folder / name).write_bytes(content)
    return folder


def finish_final(run: Path, folder: Path) -> Path:
    """Give the folder of `save_final` its name: from now on the run is finished."""
    target = run / FINAL
    with writing(target):
        for path in (*folder.rglob("*"), folder):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
        sync(run)
    return target


def write_model_card(
    folder: Path,
    *,
    name: str,
    method: str,
    student: str,
    recipe: str,
    lora: LoraSettings | None,
    before: Evaluation | None,
    after: Evaluation | None,
    totals: Totals,
) -> None:
    """README.md of final/: what was trained how, with which result."""
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{', '.join(dict.fromkeys(('zppo', method)))}]",
        "---",
        "",
        f"# {name}",
        "",
        f"`{student}`, post-trained with `{method}` by zppo {__version__}, an independent implementation of",
        "[Zone of Proximal Policy Optimization](https://arxiv.org/abs/2606.18216).",
        *_lora_lines(lora, student),
        "Check the licences of the base model and of the training data before you share it.",
        "",
        f"{_work(totals)}.",
        "",
    ]
    if before and after:
        lines += ["## Held-out accuracy, plain prompts", "", "| level | before | after |", "|---|---|---|"]
        lines += [f"| {level} | {old} | {new} |" for level, old, new in _levels(before, after)]
        lines += [
            "",
            f"{after.count} completions, after training evaluated from this folder.{_left_out(before, after)}",
            "",
        ]
    lines += ["## Recipe", "", "```yaml", recipe.rstrip(), "```", ""]
    with writing(folder / "README.md"):
        (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def closing_table(
    console: Console,
    run: Path,
    *,
    group_size: int,
    threshold: float,
    before: Evaluation | None,
    after: Evaluation | None,
    totals: Totals,
    replay: bool,
) -> None:
    """Held-out accuracy before and after, graduated/admitted by entry bin, what help was missed, where the files are."""
    if before and after:
        console.print("\nheld-out accuracy, plain prompts")
        table = Table("level", "before", "after")
        for row in _levels(before, after):
            table.add_row(*row)
        console.print(table)
        if note := _left_out(before, after):
            console.print(note.strip())
    if replay:
        console.print("\nprompt replay buffer")
        table = Table("entry accuracy", "admitted", "graduated", "evicted", "graduated/admitted")
        for correct in range(group_size + 1):
            if correct / group_size < threshold:
                name = entry_bin(correct / group_size)
                admitted, graduated = totals.admitted.get(name, 0), totals.graduated.get(name, 0)
                share = f"{graduated / admitted:.0%}" if admitted else "-"
                table.add_row(name, str(admitted), str(graduated), str(totals.evicted.get(name, 0)), share)
        console.print(table)
    missed = {name: count for name, count in totals.missed.items() if count}
    if missed:
        console.print("help that was missed: " + ", ".join(f"{n:,} {MISSED[name]}" for name, n in missed.items()))
    console.print(f"\n{_work(totals)}", highlight=False)
    files: Mapping[str, str] = {
        "final/": "the trained student",
        "metrics.jsonl": "one line a step",
        "rollouts/": "every completion",
        "buffer.jsonl": "who came and went",
        "recipe.yaml": "the recipe, resolved",
    }
    for name, what in files.items():
        if not (run / name).exists():
            continue
        console.print(f"  {run / name}  [dim]{what}[/dim]", highlight=False, soft_wrap=True)
    console.print(f"`zppo report {run}` makes a page of it", highlight=False, soft_wrap=True)


def _lora_lines(lora: LoraSettings | None, student: str) -> list[str]:
    if lora is None:
        return []
    return [
        f"Low-rank adapters (rank {lora.rank}, alpha {lora.alpha:g}) were trained and are merged into the weights of this folder;",
        f"by themselves, for `peft` on top of `{student}`, they are in `{ADAPTER}/`.",
    ]


def _work(totals: Totals) -> str:
    judged = f", {totals.judge_tokens:,} judge tokens" if totals.judge_tokens else ""
    waited = f", {totals.teacher_wait_seconds:,.0f} s of them waiting for the teacher" if totals.teacher_tokens else ""
    return (
        f"{totals.rollouts:,} rollouts, {totals.student_tokens:,} student tokens, {totals.teacher_tokens:,} teacher tokens{judged} "
        f"in {totals.seconds:,.0f} s{waited}"
    )


def _left_out(before: Evaluation, after: Evaluation) -> str:
    """How many completions have no verdict; "" where all have one."""
    if not (before.ungraded or after.ungraded):
        return ""
    return (
        f" Left out, since the judge could not be reached: {before.ungraded:,} of {before.count:,} completions before training, "
        f"{after.ungraded:,} of {after.count:,} after."
    )


def _levels(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str]]:
    rows = [
        (level, f"{before.by_level.get(level, float('nan')):.3f}", f"{value:.3f}")
        for level, value in after.by_level.items()
    ]
    return [*rows, ("all", f"{before.accuracy:.3f}", f"{after.accuracy:.3f}")]


@dataclass(frozen=True, slots=True)
class Start:
    """A checkpoint to continue from."""

    folder: Path
    state: dict[str, Any]

    @classmethod
    def find(cls, settings: Settings, run: Path, console: Console) -> Start | None:
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
            warn(
                console,
                f"{path} is damaged: {problem}. It is called {aside.name} from now on, and {folder.name} is used",
            )
        return cls(folder, state)

    def load(self, parts: Assembled, console: Console) -> None:
        """Give the trainer its state, after a look at what has changed since; images are those of the questions as they were read now.

        Raises:
            CheckpointError: it belongs to another recipe, holds something else than a state, or an image of its questions is gone or
                has changed.
        """
        places = {image.sha256: image.uri for q in parts.trainer.questions for image in q.images}
        mid_step = MidStep.read(self.folder, places)
        try:
            notes = changes_since(self.state["origin"], parts.origin, self.folder, mid_step=mid_step is not None)
            for question, *_ in self.state["buffer"]["entries"]:
                question["images"] = as_placed(question["images"], places)
            parts.trainer.load(self.folder, self.state, mid_step)
            self._check_images(parts.trainer.buffer, mid_step)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(checkpoint.unusable(self.folder / "state.json", error)) from error
        if notes:
            warn(console, f"since the checkpoint: {'; '.join(notes)}. The rest of the run goes by what is there now")

    def _check_images(self, buffer: PromptReplayBuffer, mid_step: MidStep | None) -> None:
        """A checkpoint holds references: the files behind them are looked at now and not when a question is replayed."""
        groups = [*mid_step.collected.plain, *mid_step.collected.again] if mid_step else []
        questions = [*buffer.questions(), *(group.question for group in groups)]
        for image in {image.sha256: image for question in questions for image in question.images}.values():
            try:
                read_bytes(image)
            except DataError as error:
                raise CheckpointError(f"{self.folder} holds questions with images: {error}") from error


def rescue(run: Path, trainer: Trainer, error: BaseException, console: Console) -> None:
    """Save what was trained before the run ends by `error`; where that fails it is said, and the error stays what it is.

    Raises:
        StorageError: somebody wanted to stop the run, and it cannot be saved.
    """
    if isinstance(error, StorageError):
        return  # the same disk would refuse again
    say = partial(warn, console)
    try:
        together = trainer.processes.size == 1 or isinstance(
            error, Interrupted | EngineError
        )  # the guard stops all of them
        trainer.rescue(together=together)
    except Exception as failed:
        if isinstance(error, KeyboardInterrupt) and isinstance(failed, StorageError):
            raise failed from error
        say(f"the run after step {trainer.done} could not be saved: {failed}")
    if not isinstance(error, KeyboardInterrupt):
        say(way_on(run))


def way_on(run: Path) -> str:
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


def resume(run: Path, console: Console | None = None, stop: Stop | None = None) -> Path:
    """Continue a run after its newest checkpoint that is whole; returns the run folder.

    What was written after the checkpoint is taken back and done again; on a CPU with an in-process teacher with the same result.
    Damaged newer checkpoints are named and set aside.

    Raises:
        CheckpointError: the folder holds no run, no checkpoint of it is whole, or it belongs to another recipe.
        StorageError, Interrupted: as in `train`.
    """
    if not (run / RECIPE).exists():
        raise CheckpointError(
            f"{run} holds no run: there is no {RECIPE} in it. Name the folder that `zppo train` printed"
        )
    console = console or Console()
    settings = load_recipe(run / RECIPE, []).model_copy(update={"output": run})
    if (run / FINAL / "README.md").exists():
        console.print(f"{run} is finished already; its student is in {run / FINAL}", soft_wrap=True)
        return run
    return _run(settings, run, console, stop or Stop(), resumed=True)


def _run(settings: Settings, run: Path, console: Console, stop: Stop, *, resumed: bool) -> Path:
    transformers_logging.disable_progress_bar()  # our own display is live
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    try:
        launch = read_launch()
        accelerator = make_accelerator(settings, launch)
        weights = make_weights(settings, accelerator, launch, stop)
        processes = weights.processes
        run = processes.gather(run)[0]  # its name has the time in it
        settings = settings.model_copy(update={"output": run})
        if not processes.main:
            console = Console(quiet=True, force_terminal=False)
        names = settings.train.trackers if processes.main else ()
        trackers = Trackers(names, settings.train.tracker_project, run, partial(warn, console))
        trackers.check()
        start = processes.gather(Start.find(settings, run, console) if resumed and processes.main else None)[0]
        data = read_data(settings, sharded=weights.sharded)
        with (
            scoring(settings) as score,
            load_frozen_models(settings, accelerator, console, data.seeing) as frozen_models,
            tracking(trackers),
        ):
            folder = start.folder if start else None
            parts = assemble(settings, data, run, folder, score, frozen_models, accelerator, weights, console, stop)
            if start:
                start.load(parts, console)
            with stop.shield():
                _open(settings, run, parts.trainer, trackers, console, resumed=resumed)
                if processes.size > 1:
                    console.print(f"{processes.size} processes, {weights.kind}")
            console.print("accuracies of rollouts are running means over about ten steps", style="dim")
            with processes.uninterrupted():
                try:
                    parts.trainer.run()
                    _finish(settings, run, parts, console, bf16=accelerator.mixed_precision == "bf16")
                except BaseException as error:
                    rescue(
                        run, parts.trainer, error, console
                    )  # before anything else is closed: there may be little time
                    raise
        processes.wait()
        accelerator.end_training()
        return run
    except StorageError as error:
        told = way_on(run)
        raise StorageError(f"{error}. {told[:1].upper()}{told[1:]}") from error
    except KeyboardInterrupt as error:
        name = signal.Signals(error.signum).name if isinstance(error, Interrupted) else "interrupted"
        console.print(Text(f"{name}: {way_on(run)}"), soft_wrap=True, highlight=False)
        raise


def _open(
    settings: Settings, run: Path, trainer: Trainer, trackers: Trackers, console: Console, *, resumed: bool
) -> None:
    """Make the run folder, or take back what was written after the checkpoint."""
    if resumed:
        step = trainer.done if trainer.folder else -1
        trainer.log.rewind(step, trainer.evaluated)
        trackers.start(step)
        far = f" and {trainer.mid_step.begun.done} updates of the next" if trainer.mid_step else ""
        console.print(f"resumed after step {trainer.done} of {trainer.steps}{far}")
    else:
        trackers.start()
        if trainer.processes.main:
            with writing(run):
                run.mkdir(parents=True, exist_ok=True)
            write_whole(run / RECIPE, dump_recipe(settings))  # before all else: what has a recipe can be resumed
        trainer.log.open()
        console.print(f"run folder: {run}", soft_wrap=True, highlight=False)
    trainer.log.listener = trackers.log


def _finish(settings: Settings, run: Path, parts: Assembled, console: Console, *, bf16: bool) -> None:
    """Save final/, evaluate it freshly from the disk, write its card and print the closing table."""
    trainer, processes = parts.trainer, parts.weights.processes
    if parts.student.adapters:
        trainer.rescue(together=True)  # for runs without checkpoints
        trainer.weights_leave()  # they are merged, for good
    saved = parts.weights.saved(parts.student)
    folder = processes.gather(save_final(run, parts.student, saved, parts.chat) if processes.main else run)[0]
    after = None
    if trainer.held_out:
        fresh = load_model(
            folder,
            dtype=torch.float32,
            attention=settings.student.attention,
            images=parts.chat.image_processor is not None,
        )
        torch.nn.Module.to(fresh, parts.student.model.device)
        trainer.scorer.new_step()
        engine = trainer.sampler.engine
        if isinstance(engine, VLLMEngine):
            engine.take(fresh)
        else:
            engine = make_engine(settings, fresh, parts.chat, torch.bfloat16 if bf16 else None)
        after = evaluate(replace(trainer.sampler, engine=engine, whole=nullcontext), trainer.held_out, settings.eval)
        with trainer.stop.shield():
            trainer.log.metrics(trainer.done, "final", asdict(after) | processes.total(trainer.scorer.metrics()))
    if not processes.main:
        return
    before = _evaluation_at_start(run)
    with trainer.stop.ignored():  # it is finished, whoever asks it to stop now
        write_model_card(
            folder,
            name=run.name,
            method=trainer.method.name,
            student=settings.student.model,
            recipe=dump_recipe(settings),
            lora=settings.train.lora,
            before=before,
            after=after,
            totals=trainer.totals,
        )
        finish_final(run, folder)
    closing_table(
        console,
        run,
        group_size=settings.rollout.group_size,
        threshold=settings.zone.threshold,
        before=before,
        after=after,
        totals=trainer.totals,
        replay=trainer.method.replay,
    )


def _evaluation_at_start(run: Path) -> Evaluation | None:
    for record in read_lines(run / METRICS):
        if record["event"] == "eval" and record["step"] == 0:
            found = {name: record[name] for name in Evaluation.__slots__ if name in record}
            return Evaluation(
                **found | {"accuracy": float("nan") if record["accuracy"] is None else record["accuracy"]}
            )
    return None
