"""`zppo lab`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from zppo.errors import SettingsError

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands


def add_lab(commands: Subcommands) -> None:
    """`lab build`, `lab questions`, `lab levels`, `lab study` and `lab scorecard`."""
    _add_lab(commands.add_parser("lab", help="the bundled tiny world: its questions and models"))


def _add_lab(lab: argparse.ArgumentParser) -> None:
    commands = lab.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="make the student and the teacher of a world anew")
    build.add_argument("world", metavar="WORLD", help="unreachable, reachable, elsewhere, vision, or a settings file of your own")
    build.add_argument("--out", type=Path, metavar="DIR", help="where to put them (default: runs/lab/WORLD)")
    build.add_argument("--seed", type=int, default=0, help="of corpus and weights (default: 0)")
    build.add_argument("--steps", type=int, help="fewer pretraining steps than the world asks for")
    build.add_argument("--no-teacher", action="store_true", help="the student alone, where the teacher of a like world serves")
    build.set_defaults(run=_lab_build)
    questions = commands.add_parser("questions", help="show some questions of a world")
    questions.add_argument("--world", default="unreachable", help="default: unreachable")
    questions.add_argument("--level", help="a level by name, or by number from 1 (default: all)")
    questions.add_argument("--split", choices=("train", "test", "seen", "study"), default="train", help="default: train")
    questions.add_argument("--n", type=int, default=5, help="how many (default: 5)")
    questions.set_defaults(run=_lab_questions)
    levels = commands.add_parser("levels", help="what a world's pretrained models can do, by level, before any run")
    levels.add_argument("world", metavar="WORLD", help="a bundled world of text")
    levels.add_argument("--samples", type=int, default=64, help="of every question of the hardest level (default: 64)")
    levels.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    levels.set_defaults(run=_lab_levels)
    study = commands.add_parser("study", help="run a grid of methods, seeds and students, and print its tables")
    study.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="lab recipes; none: print the tables of --rows")
    study.add_argument("--methods", default="grpo-replay,zppo,zppo-placebo", help="comma-separated; NAME-matched takes ZPPO's rollouts")
    study.add_argument("--seeds", default="0-2", help="e.g. 0-7 or 0,3,5 (default: 0-2)")
    study.add_argument("--students", default="", help="comma-separated models instead of the recipes' own")
    study.add_argument("--rows", type=Path, default=Path("runs/study.jsonl"), help="one line per finished run; appended to")
    study.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each (default: cores)")
    study.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all runs; may be repeated")
    study.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    study.set_defaults(run=_lab_study)
    card = commands.add_parser("scorecard", help="the paper's claims one by one: run what their verdicts need, and print them")
    card.add_argument("--claims", default="", metavar="N,N", help="some of the claims by number (default: all)")
    card.add_argument("--seeds", help="of every run (default: 10-17)")
    card.add_argument("--rows", type=Path, default=Path("runs/scorecard.jsonl"), help="one line per finished run; appended to")
    card.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each (default: cores)")
    card.add_argument("--print", action="store_true", help="run nothing: print what the rows say")
    card.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    card.set_defaults(run=_lab_scorecard)


def _lab_build(options: argparse.Namespace) -> None:
    from zppo.lab.make_models import build_command

    build_command(options.world, options.out, options.seed, options.steps, with_teacher=not options.no_teacher)


def _lab_questions(options: argparse.Namespace) -> None:
    from zppo.lab.questions import questions_command

    questions_command(options.world, options.level, options.n, options.split)


def _lab_levels(options: argparse.Namespace) -> None:
    from zppo.lab.levels import levels_command

    levels_command(options.world, options.samples, markdown=options.markdown)


def _lab_study(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.lab.study import grid, print_study, run_study
    from zppo.sweep import parse_seeds

    console, failed = Console(), 0
    if options.recipes:
        students = [s for s in options.students.split(",") if s]
        cells = list(grid(options.recipes, options.methods.split(","), parse_seeds(options.seeds), students))
        extra = [f"--{setting}" for setting in options.set]
        failed = run_study(cells, options.rows, jobs=max(1, options.jobs), work=Path("runs/study"), extra=extra, console=console)
    print_study(options.rows, console, markdown=options.markdown)
    if failed:
        raise SettingsError(f"{failed} runs failed; the same command runs them again")


def _lab_scorecard(options: argparse.Namespace) -> None:
    from rich.console import Console

    from zppo.lab.scorecard import CLAIMS, SEEDS, print_scorecard, run_scorecard

    numbers, console, failed = [n for n in options.claims.split(",") if n] or list(CLAIMS), Console(), 0
    if not options.print:
        failed = run_scorecard(numbers, options.seeds or SEEDS, options.rows, jobs=max(1, options.jobs), console=console)
    print_scorecard(options.rows, numbers, console, markdown=options.markdown)
    if failed:
        raise SettingsError(f"{failed} runs failed; the same command runs them again")
