"""`zppo train`, `zppo resume`, `zppo methods`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zppo.api import ADDRESSES, TrainedRun, resume, start
from zppo.errors import SettingsError, ZPPOError

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands
    from zppo.config.settings import Settings
    from zppo.core.types import Question

_TRAIN_FLAGS = ("-h", "--help", "--dry-run", "--for-gpu", "--no-code")
_NO_CODE = "end with an error where the recipe names code of its own (grading.reward, reformulations); see SECURITY.md"


def add_train(commands: Subcommands) -> None:
    """`train`, `resume` and `methods`."""
    train = commands.add_parser(
        "train",
        usage="zppo train RECIPE [--dry-run [--for-gpu=GB]] [--key=value ...] [--no-code]",
        help="train a student by a recipe",
        description="Train a student by a recipe. Any setting can be given as --key=value and wins over the recipe.",
        allow_abbrev=False,
    )
    train.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a YAML file, or the name of one that comes with zppo: see `zppo recipes`"
    )
    train.add_argument("--dry-run", action="store_true", help="resolve everything and print the plan; no model is loaded")
    train.add_argument(
        "--for-gpu", type=_gigabytes, metavar="GB", help="with --dry-run: plan for a GPU with so much memory, not for this machine"
    )
    train.add_argument("--no-code", action="store_true", help=_NO_CODE)
    train.set_defaults(run=_train, several=True)
    train.more = _settings_help

    again = commands.add_parser("resume", help="continue a run after its newest checkpoint")
    again.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    again.add_argument("--no-code", action="store_true", help=_NO_CODE)
    again.set_defaults(run=_resume, takes_settings=True, several=True)

    commands.add_parser("methods", help="list the methods that can train").set_defaults(run=_methods)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what argparse reads, `--key=value` and `--key value` overrides), each in order.

    Raises:
        SettingsError: one resembles a flag.
    """
    ours: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for token in rest:
        if not token.startswith("--") or token.partition("=")[0] in _TRAIN_FLAGS:
            ours.append(token)
            continue
        name = token.partition("=")[0]
        if flag := difflib.get_close_matches(name, _TRAIN_FLAGS, 1, 0.8):
            raise SettingsError(f"there is no {name}; the nearest one is {flag[0]}")
        overrides.append(token)
        if "=" not in token:
            value = next(rest, None)
            if value is not None and value.partition("=")[0] in _TRAIN_FLAGS:
                ours.append(value)
            elif value is not None:
                overrides.append(value)
    return ours, overrides


def _gigabytes(text: str) -> float:
    with suppress(ValueError):
        if 0 < (number := float(text.upper().removesuffix("GB"))) < 2000:  # more is a number of megabytes
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no size of a GPU in gigabytes, such as 24 or 80")


def _settings_help() -> str:
    from zppo.config.help import help_text

    return help_text()


def _resume(options: argparse.Namespace) -> None:
    # What does not begin with a dash is the value of what stands before it.
    names = [token.partition("=")[0] for i, token in enumerate(options.overrides) if token.startswith("-") or i == 0]
    if not all(name.removeprefix("--") in ADDRESSES for name in names):
        raise SettingsError(
            f"zppo resume takes no settings ({' '.join(options.overrides)}) but addresses ({', '.join(ADDRESSES)}): it goes on with those "
            f"in {options.folder / 'recipe.yaml'}. Edit them there: train.steps and epochs, learning rates, betas, eps, weight decay and "
            "teachers' addresses act, and what cannot be changed is refused (docs/runs.md)"
        )
    _say_change(resume(options.folder, code=not options.no_code, addresses=options.overrides))


def _say_change(run: TrainedRun) -> None:
    """Whether the held-out questions are enough to tell after from before."""
    from zppo.distributed.launcher import rank_of
    from zppo.report.read_run import open_run
    from zppo.report.summary import change

    with suppress(ZPPOError):
        if not rank_of() and (words := change(open_run(run.folder))):
            print(f"held-out accuracy, after minus before: {words}")


def _train(options: argparse.Namespace) -> None:
    from zppo.config.bundled import find_recipe
    from zppo.config.recipe import load_recipe, refuse_code

    if options.recipe is None:
        raise SettingsError(
            "zppo train needs a recipe: zppo train RECIPE [--key=value ...]; `zppo recipes` lists those that come with zppo, "
            "`zppo init NAME` copies one"
        )
    settings = load_recipe(options.recipe, options.overrides)
    if options.no_code:
        refuse_code(settings, options.recipe)
    if options.for_gpu and not options.dry_run:
        raise SettingsError("--for-gpu plans a run for another machine: give it with --dry-run")
    if options.for_gpu and settings.train.device == "cpu":
        raise SettingsError("--for-gpu: with train.device=cpu the run leaves every GPU alone; leave one of them out")
    name = find_recipe(options.recipe).stem
    if options.dry_run:
        from rich.console import Console

        from zppo.distributed.launcher import check_shards, rank_of, read_launch
        from zppo.planning.dry_run import check_student_context, make_plan, memory_rows, render_plan
        from zppo.planning.machine import find_machine, gpu_of
        from zppo.planning.memory import within
        from zppo.planning.needed import check_files, fetch_configs, missing_rows
        from zppo.planning.prompt_lengths import prompt_tokens
        from zppo.prompts.book import PromptBook
        from zppo.rollout.data import count_judged, load_questions_of
        from zppo.rollout.examples import example_turns
        from zppo.rollout.rewards import make_rewards
        from zppo.runs.display import warn

        console = Console(quiet=bool(rank_of()))
        launch = read_launch()
        check_shards(settings.train, launch, settings.method.resolve().loss)
        check_files(settings)
        unreached = fetch_configs(settings)
        sources: list[str] = []
        loaded = load_questions_of(settings, partial(warn, console), sources.append)
        train, held_out = loaded.mixture.questions, loaded.held_out
        check_student_context(settings)
        book = PromptBook(settings.prompts, form=settings.answer_form)
        shown = example_turns(settings, loaded.examples, book, lambda text: text)
        _check_images(settings, train, held_out)
        folder = str(settings.output or Path("runs") / f"{name}-<date>-<time>")
        if settings.grading.rewards:
            make_rewards(settings.grading).check_columns([*train, *held_out])
        judged, eval_judged = count_judged(settings, train), count_judged(settings, held_out)
        seeing, eval_seeing = (sum(bool(q.images) for q in part) for part in (train, held_out))
        plan = make_plan(
            settings, len(train), len(held_out), judged=judged, eval_judged=eval_judged, seeing=seeing, eval_seeing=eval_seeing
        )
        asked = [*train, *held_out]
        images = max((len(q.images) for q in asked), default=0)
        lengths = prompt_tokens(settings, asked, shown)
        machine = gpu_of(options.for_gpu) if options.for_gpu else find_machine(settings.train.device)
        counted = within(settings, asked, len(train), shown)
        memory = memory_rows(counted, machine, images=images, shortest=lengths.shortest, processes=launch.processes)
        absent = [*unreached, *missing_rows(settings, gpu=machine is not None and machine.gpu)]
        console.print(render_plan(settings, plan, options.recipe, folder, memory, sources, absent, lengths))
        return
    _say_change(start(settings, name))


def _check_images(settings: Settings, train: list[Question], held_out: list[Question]) -> None:
    """Whether the student of a dry run can be shown the images of its questions, where its config.json is on this machine."""
    from zppo.planning.model_shapes import config_file

    if any(q.images for q in (*train, *held_out)) and config_file(settings.student.model) is not None:
        from zppo.rollout.run_data import check_images, first_with_images  # it imports torch

        if first := first_with_images(settings, train, held_out):
            check_images(settings, *first)


def _methods(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.config.methods import METHODS
    from zppo.runs.display import show_table

    console = Console()
    lines = [(row.name, "yes" if row.replay else "-", row.gradient, row.paper) for row in METHODS.values()]
    show_table(console, ("method", "replay", "what enters the gradient", "in the paper"), lines)
    console.print()
    console.print("replay: hard questions are asked again in later steps.")
    for words in dict.fromkeys(row.advantages for row in METHODS.values() if not row.distils):
        named = [row.name for row in METHODS.values() if row.advantages == words]
        whose = "the rows of the paper that do not distil" if words == METHODS["zppo"].advantages else ", ".join(named)
        console.print(f"advantages of {whose}: {words}.")
