"""`zppo sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands


def add_sweep(commands: Subcommands) -> None:
    """`sweep`."""
    sweep = commands.add_parser(
        "sweep",
        usage="zppo sweep RECIPE --vary KEY=VALUE,VALUE,... [--vary ...] [--seeds 0-2] [--jobs N] [options] [--key=value ...]",
        help="a recipe with settings varied, under several seeds, and their comparison",
        description="Run every combination of varied settings under every seed. The same command goes on where it stopped; at the end "
        "the runs are compared. A setting for all runs is given as --key=value.",
        allow_abbrev=False,
    )
    sweep.add_argument("recipe", type=Path, metavar="RECIPE", help="as for zppo train")
    sweep.add_argument("--vary", action="append", default=[], metavar="KEY=VALUES", help="e.g. train.minibatches=1,4,8,16; may be repeated")
    sweep.add_argument("--seeds", help="e.g. 0-7 or 0,3,5 (default: the recipe's own)")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each on a GPU of its own where there are several")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="folder of the sweep (default: runs/sweep-RECIPE)")
    sweep.add_argument("--launcher", default="", metavar="WORDS", help="starts a run, e.g. 'torchrun --nproc_per_node 8 -m'")
    sweep.add_argument("--cell", type=int, metavar="N", help="only run N, counted from 0")
    shows = sweep.add_mutually_exclusive_group()
    shows.add_argument("--dry-run", dest="show", action="store_const", const="plan", default="", help="list the runs and their states")
    shows.add_argument("--slurm", dest="show", action="store_const", const="slurm", help="print the lines of a SLURM array")
    sweep.set_defaults(run=_sweep, takes_settings=True)


def _sweep(options: argparse.Namespace) -> None:
    from zppo.sweep import sweep_command

    sweep_command(
        options.recipe, options.vary, seeds=options.seeds, overrides=options.overrides, out=options.out, jobs=max(1, options.jobs),
        launcher=options.launcher, cell=options.cell, show=options.show,
    )  # fmt: skip
