"""`train` starts a run, `resume` continues one."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from zppo.errors import CheckpointError
from zppo.train import checkpoint
from zppo.train.assemble import Assembled, assemble, make_accelerator, make_engine
from zppo.train.evaluate import Evaluation, evaluate
from zppo.train.final import FINAL, closing_table, save_final, write_model_card
from zppo.train.models import load_model
from zppo.train.plan import RECIPE, check_output
from zppo.train.progress import warn
from zppo.train.recipe import dump_recipe, load_recipe
from zppo.train.runlog import METRICS, read_lines
from zppo.train.scoring import scoring
from zppo.train.settings import Settings
from zppo.train.teachers import staffing
from zppo.train.trackers import Trackers, tracking


def train(settings: Settings, recipe_name: str, console: Console | None = None) -> Path:
    """Train by a recipe from the start; returns the run folder.

    Everything is checked and loaded before the folder is made.

    Raises:
        ZPPOError: something is wrong with recipe, data, models or templates, or the folder holds a run already.
    """
    run = settings.output or Path("runs") / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(run)
    return _run(settings.model_copy(update={"output": run}), run, None, console or Console(), resumed=False)


def resume(run: Path, console: Console | None = None) -> Path:
    """Continue a run after its newest checkpoint; returns the run folder.

    What was written after the checkpoint is taken back and done again; on a CPU with an in-process teacher with the same result.

    Raises:
        CheckpointError: the folder holds no run, or its checkpoint cannot be read.
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
    whole = checkpoint.existing(run)
    return _run(settings, run, whole[-1] if whole else None, console, resumed=True)


def _run(settings: Settings, run: Path, start: Path | None, console: Console, *, resumed: bool) -> Path:
    transformers_logging.disable_progress_bar()  # our own display is live
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    accelerator = make_accelerator(settings)
    trackers = Trackers(settings.train.trackers, settings.train.tracker_project, run, partial(warn, console))
    trackers.check()
    with scoring(settings) as score, staffing(settings, accelerator, console) as staff, tracking(trackers):
        parts = assemble(settings, run, start, score, staff, accelerator, console)
        trainer = parts.trainer
        if start:
            trainer.load_state_dict(checkpoint.load_state(start))
        if resumed:
            trainer.log.rewind(trainer.done if start else -1)
            trackers.start(trainer.done if start else -1)
            console.print(f"resumed after step {trainer.done} of {trainer.steps}")
        else:
            trackers.start()
            trainer.log.open()
            (run / RECIPE).write_text(dump_recipe(settings), encoding="utf-8")
            console.print(f"run folder: {run}", soft_wrap=True, highlight=False)
        trainer.log.listener = trackers.log
        if not start:
            trainer.evaluate()
        console.print("accuracies of rollouts are running means over about ten steps", style="dim")
        try:
            trainer.run()
        except KeyboardInterrupt:
            console.print(
                f"stopped; `zppo resume {run}` continues after the newest checkpoint", soft_wrap=True, highlight=False
            )
            raise
        return _finish(settings, run, parts, console, bf16=accelerator.mixed_precision == "bf16")


def _finish(settings: Settings, run: Path, parts: Assembled, console: Console, *, bf16: bool) -> Path:
    """Save final/, evaluate it freshly from the disk, write its card and print the closing table."""
    trainer = parts.trainer
    folder = save_final(run, parts.student, parts.chat)
    after = None
    if trainer.held_out:
        fresh = load_model(folder, dtype=torch.float32, attention=settings.student.attention)
        torch.nn.Module.to(fresh, parts.student.model.device)
        trainer.scorer.new_step()
        after = evaluate(
            replace(trainer.roller, engine=make_engine(settings, fresh, parts.chat, torch.bfloat16 if bf16 else None)),
            trainer.held_out,
            settings.eval,
        )
        trainer.log.metrics(trainer.done, "final", asdict(after) | trainer.scorer.metrics())
    before = _evaluation_at_start(run)
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
    return run


def _evaluation_at_start(run: Path) -> Evaluation | None:
    for record in read_lines(run / METRICS):
        if record["event"] == "eval" and record["step"] == 0:
            found = {name: record[name] for name in Evaluation.__slots__ if name in record}
            return Evaluation(
                **found | {"accuracy": float("nan") if record["accuracy"] is None else record["accuracy"]}
            )
    return None
