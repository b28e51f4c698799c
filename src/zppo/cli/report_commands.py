"""`zppo report`, `compare`, `inspect`, `bootstrap`, `cost`: what looks at runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from zppo.errors import SettingsError

if TYPE_CHECKING:
    from zppo.cli.command_parser import Subcommands

_FIGURES = {"png": ("png",), "svg": ("svg",), "both": ("png", "svg"), "none": ()}
_PORT = 8765  # of `--watch`


def add_report(commands: Subcommands) -> None:
    """`report`, `compare`, `inspect`, `bootstrap` and `cost`."""
    _add_bootstrap(commands.add_parser("bootstrap", help="how sure the differences between methods over benchmarks are"))
    _add_cost(commands.add_parser("cost", help="FLOPs of a recipe or a run, part by part"))
    _add_report(
        commands.add_parser("report", help="a page that shows what a run did", description="Write report.html and figures/ of a run.")
    )
    _add_compare(
        commands.add_parser(
            "compare", help="several runs side by side", description="Tables of several runs, paired over seeds where there are seeds."
        )
    )
    _add_inspect(
        commands.add_parser(
            "inspect", help="the story of one question", description="Print every prompt, answer and verdict of one question of a run."
        )
    )


def _add_bootstrap(bootstrap: argparse.ArgumentParser) -> None:
    bootstrap.add_argument(
        "tables",
        metavar="TABLE.csv",
        type=Path,
        nargs="+",
        help="columns scale, method, family, benchmark, accuracy (percent); or eval.json files of `zppo eval`",
    )
    bootstrap.add_argument("--minuend", metavar="METHOD", help="only this method minus each other one (default: every pair)")
    bootstrap.add_argument("--resamples", type=int, default=10_000, help="default: 10000")
    bootstrap.add_argument("--seed", type=int, default=0, help="of the resamples (default: 0)")
    bootstrap.add_argument("--csv", type=Path, metavar="OUT", help="write the intervals to this file too")
    bootstrap.set_defaults(run=_bootstrap)


def _add_cost(cost: argparse.ArgumentParser) -> None:
    cost.add_argument("target", nargs="?", type=Path, metavar="RECIPE|RUN", help="a recipe (planned) or a run folder (as run)")
    cost.add_argument("--paper", action="store_true", help="the paper's figures (Tab. 9) next to a count from its sizes")
    cost.add_argument("--student-params", metavar="N", help="0.8e9 or 0.8B; by default found in the checkpoint or the model's name")
    cost.add_argument("--teacher-params", metavar="N", help="the same for the teacher")
    cost.add_argument("--judge-params", metavar="N", help="the same for a judge that is not the teacher")
    of_recipe = cost.add_argument_group("of a recipe; without them, the most that it can cost")
    of_recipe.add_argument("--mean-prompt", type=float, metavar="TOKENS", help="plain prompts")
    of_recipe.add_argument("--mean-completion", type=float, metavar="TOKENS", help="student rollouts")
    of_recipe.add_argument("--mean-teacher-completion", type=float, metavar="TOKENS", help="teacher rollouts")
    of_recipe.add_argument("--hard-share", type=float, default=1.0, metavar="SHARE", help="of plain questions that are hard")
    of_recipe.add_argument("--solved-share", type=float, default=1.0, metavar="SHARE", help="of hard questions that the teacher solves")
    of_recipe.add_argument("--live-share", type=float, default=1.0, metavar="SHARE", help="of tokens in rows whose advantage is not 0")
    of_recipe.add_argument("--questions", type=int, metavar="N", help="training questions, instead of reading data.train")
    of_recipe.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; may be repeated")
    cost.set_defaults(run=_cost)


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    report.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run folder)")
    _add_figures(report)
    _add_watch(report)
    report.set_defaults(run=_report)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="run folders")
    compare.add_argument("--html", action="store_true", help="write a page with curves on shared axes, and its figures")
    compare.add_argument("--out", metavar="FILE", type=Path, help="of --html (default: compare.html)")
    compare.add_argument("--csv", metavar="FILE", type=Path, help="a line per run and quantity; - is stdout, without the tables")
    compare.add_argument("--json", metavar="FILE", type=Path, help="arms, settings that differ, results, pairs; - as for --csv")
    _add_figures(compare)
    _add_watch(compare)
    compare.set_defaults(run=_compare)


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument(
        "folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed, or the completions.parquet of `zppo data measure`"
    )
    inspect.add_argument("question", metavar="QUESTION_ID", help="as in the data, or <file>:<row>; the report and buffer.jsonl name them")
    inspect.add_argument("--step", type=int, help="only this step")
    inspect.add_argument("--kind", help="only this kind of prompt: plain, bcq, ncq")
    inspect.add_argument("--full", action="store_true", help="show long texts whole")
    inspect.set_defaults(run=_inspect)


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", action="store_true", help="serve the page on this machine, and follow what is written")
    parser.add_argument("--port", type=int, default=_PORT, help=f"of --watch; 0 takes a free one (default: {_PORT})")


def _add_figures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figures", choices=tuple(_FIGURES), default="png", help="format of the figure files (default: png)")


def _bootstrap(options: argparse.Namespace) -> None:
    from zppo.report.bootstrap import bootstrap_command

    bootstrap_command(options.tables, minuend=options.minuend, resamples=options.resamples, seed=options.seed, out=options.csv)


def _report(options: argparse.Namespace) -> None:
    if options.watch:
        from zppo.report.watch import watch_run

        watch_run(options.folder, options.port)
        return
    from zppo.report.page import report_command

    report_command(options.folder, out=options.out, suffixes=_FIGURES[options.figures])


def _compare(options: argparse.Namespace) -> None:
    if options.watch:
        from zppo.report.watch import watch_comparison

        watch_comparison(options.folders, options.port)
        return
    from zppo.report.compare import compare_command

    given = {"csv": options.csv, "json": options.json}
    compare_command(options.folders, html=options.html, out=options.out, suffixes=_FIGURES[options.figures], **given)


def _inspect(options: argparse.Namespace) -> None:
    from zppo.report.stories import inspect_command

    inspect_command(options.folder, options.question, step=options.step, kind=options.kind, full=options.full)


def _cost(options: argparse.Namespace) -> None:
    from zppo.planning.flops import Assumptions
    from zppo.planning.model_shapes import parse_size
    from zppo.report.cost import cost_command, paper_command

    if options.target is None and not options.paper:
        raise SettingsError("zppo cost needs a recipe or a run folder: zppo cost RECIPE|RUN, or zppo cost --paper")
    if options.target is not None:
        assumed = Assumptions(
            prompt=options.mean_prompt,
            completion=options.mean_completion,
            teacher_completion=options.mean_teacher_completion,
            hard=options.hard_share,
            solved=options.solved_share,
            live=options.live_share,
        )
        sizes = {name: getattr(options, f"{name}_params") for name in ("student", "teacher", "judge")}
        given = {name: parse_size(size) for name, size in sizes.items() if size}
        cost_command(options.target, [f"--{text}" for text in options.set], assumed, given, options.questions)
    if options.paper:
        paper_command()
