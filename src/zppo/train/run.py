"""`train` starts a run, `resume` continues one."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from zppo.config.recipe import dump_recipe, load_recipe
from zppo.config.settings import Settings
from zppo.distributed.launcher import read_launch
from zppo.distributed.parallel import make_accelerator, make_weights
from zppo.engines.vllm import VLLMEngine
from zppo.errors import CheckpointError, Interrupted, StorageError
from zppo.models.student import load_model
from zppo.rollout.evaluation import Evaluation, evaluate
from zppo.rollout.frozen_models import staffing
from zppo.rollout.grading import scoring
from zppo.rollout.questions import read_data
from zppo.runs.display import warn
from zppo.runs.files import RECIPE, check_output, write_whole, writing
from zppo.runs.log import METRICS, read_lines
from zppo.runs.signals import Stop
from zppo.runs.trackers import Trackers, tracking
from zppo.train.assemble import Assembled, assemble, make_engine
from zppo.train.final import FINAL, closing_table, finish_final, save_final, write_model_card
from zppo.train.recover import Start, rescue, way_on
from zppo.train.trainer import Trainer


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
        team = weights.team
        run = team.gather(run)[0]  # its name has the time in it
        settings = settings.model_copy(update={"output": run})
        if not team.main:
            console = Console(quiet=True, force_terminal=False)
        names = settings.train.trackers if team.main else ()
        trackers = Trackers(names, settings.train.tracker_project, run, partial(warn, console))
        trackers.check()
        start = team.gather(Start.find(settings, run, console) if resumed and team.main else None)[0]
        data = read_data(settings, sharded=weights.sharded)
        with (
            scoring(settings) as score,
            staffing(settings, accelerator, console, data.seeing) as staff,
            tracking(trackers),
        ):
            folder = start.folder if start else None
            parts = assemble(settings, data, run, folder, score, staff, accelerator, weights, console, stop)
            if start:
                start.load(parts, console)
            with stop.shield():
                _open(settings, run, parts.trainer, trackers, console, resumed=resumed)
                if team.size > 1:
                    console.print(f"{team.size} processes, {weights.kind}")
            console.print("accuracies of rollouts are running means over about ten steps", style="dim")
            with team.uninterrupted():
                try:
                    parts.trainer.run()
                    _finish(settings, run, parts, console, bf16=accelerator.mixed_precision == "bf16")
                except BaseException as error:
                    rescue(
                        run, parts.trainer, error, console
                    )  # before anything else is closed: there may be little time
                    raise
        team.wait()
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
        far = f" and {trainer.halfway.begun.done} updates of the next" if trainer.halfway else ""
        console.print(f"resumed after step {trainer.done} of {trainer.steps}{far}")
    else:
        trackers.start()
        if trainer.team.main:
            with writing(run):
                run.mkdir(parents=True, exist_ok=True)
            write_whole(run / RECIPE, dump_recipe(settings))  # before all else: what has a recipe can be resumed
        trainer.log.open()
        console.print(f"run folder: {run}", soft_wrap=True, highlight=False)
    trainer.log.listener = trackers.log


def _finish(settings: Settings, run: Path, parts: Assembled, console: Console, *, bf16: bool) -> None:
    """Save final/, evaluate it freshly from the disk, write its card and print the closing table."""
    trainer, team = parts.trainer, parts.weights.team
    if parts.student.adapters:
        trainer.rescue(together=True)  # for runs without checkpoints
        trainer.weights_leave()  # they are merged, for good
    saved = parts.weights.saved(parts.student)
    folder = team.gather(save_final(run, parts.student, saved, parts.chat) if team.main else run)[0]
    after = None
    if trainer.held_out:
        fresh = load_model(
            folder,
            dtype=torch.float32,
            attention=settings.student.attention,
            images=parts.chat.sight is not None,
        )
        torch.nn.Module.to(fresh, parts.student.model.device)
        trainer.scorer.new_step()
        engine = trainer.roller.engine
        if isinstance(engine, VLLMEngine):
            engine.take(fresh)
        else:
            engine = make_engine(settings, fresh, parts.chat, torch.bfloat16 if bf16 else None)
        after = evaluate(replace(trainer.roller, engine=engine, whole=nullcontext), trainer.held_out, settings.eval)
        with trainer.stop.shield():
            trainer.log.metrics(trainer.done, "final", asdict(after) | team.total(trainer.scorer.metrics()))
    if not team.main:
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
