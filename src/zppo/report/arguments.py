"""What `zppo report`, `zppo compare` and `zppo inspect` take on the command line. The work is imported when a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FIGURE_FORMATS = ("png", "svg", "both", "none")
PORT = 8765


def add_commands(commands: Any) -> None:
    """Add the three commands to a parser's commands.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    report = commands.add_parser("report", help="a page that shows what a run did", description="Write report.html and figures/ of a run.")
    report.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    report.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run folder)")
    _add_figures(report)
    report.add_argument("--watch", action="store_true", help="serve the page on this machine while the run goes on")
    report.add_argument("--port", type=int, default=PORT, help=f"of --watch; 0 takes a free one (default: {PORT})")
    report.set_defaults(run=_report)

    compare = commands.add_parser(
        "compare", help="several runs side by side", description="Tables of several runs, paired over seeds where there are seeds."
    )
    compare.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="run folders")
    compare.add_argument("--html", action="store_true", help="write a page with curves on shared axes, and its figures")
    compare.add_argument("--out", metavar="FILE", type=Path, help="of --html (default: compare.html)")
    _add_figures(compare)
    compare.set_defaults(run=_compare)

    inspect = commands.add_parser(
        "inspect", help="the story of one question", description="Print every prompt, answer and verdict of one question of a run."
    )
    inspect.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    inspect.add_argument("question", metavar="QUESTION_ID", help="as in the data, or <file>:<row>; the report and buffer.jsonl name them")
    inspect.add_argument("--step", type=int, help="only this step")
    inspect.add_argument("--kind", help="only this kind of prompt: plain, bcq, ncq")
    inspect.add_argument("--full", action="store_true", help="show long texts whole")
    inspect.set_defaults(run=_inspect)


def _add_figures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figures", choices=FIGURE_FORMATS, default="png", help="format of the figure files (default: png)")


def _report(options: argparse.Namespace) -> None:
    from zppo.report.command import report_command

    report_command(options.folder, out=options.out, figures=options.figures, watch=options.watch, port=options.port)


def _compare(options: argparse.Namespace) -> None:
    from zppo.report.command import compare_command

    compare_command(options.folders, html=options.html, out=options.out, figures=options.figures)


def _inspect(options: argparse.Namespace) -> None:
    from zppo.report.command import inspect_command

    inspect_command(options.folder, options.question, step=options.step, kind=options.kind, full=options.full)
