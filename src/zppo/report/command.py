"""What `zppo report`, `zppo compare` and `zppo inspect` take on the command line. The work is imported when a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zppo.errors import CheckpointError, SettingsError
from zppo.report.charts import Chart
from zppo.report.questions import nearest
from zppo.report.read_run import open_run, question_ids, step_of
from zppo.report.summary import Reader

FIGURE_FORMATS = ("png", "svg", "both", "none")
PORT = 8765


def add_commands(commands: Any, resolve: Callable[[str], str]) -> None:
    """Add the three commands to a parser's commands.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        resolve: names of models that are no folders -> folders.
    """
    report = commands.add_parser(
        "report", help="a page that shows what a run did", description="Write report.html and figures/ of a run."
    )
    report.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    report.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: the run folder)")
    _add_figures(report)
    report.add_argument("--watch", action="store_true", help="serve the page on this machine while the run goes on")
    report.add_argument("--port", type=int, default=PORT, help=f"of --watch; 0 takes a free one (default: {PORT})")
    report.set_defaults(run=lambda options: _report(options, resolve))

    compare = commands.add_parser(
        "compare",
        help="several runs side by side",
        description="Tables of several runs, paired over seeds where there are seeds.",
    )
    compare.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="run folders")
    compare.add_argument("--html", action="store_true", help="write a page with curves on shared axes, and its figures")
    compare.add_argument("--out", metavar="FILE", type=Path, help="of --html (default: compare.html)")
    _add_figures(compare)
    compare.set_defaults(run=_compare)

    inspect = commands.add_parser(
        "inspect",
        help="the story of one question",
        description="Print every prompt, answer and verdict of one question of a run.",
    )
    inspect.add_argument("folder", metavar="RUN", type=Path, help="the folder that `zppo train` printed")
    inspect.add_argument(
        "question", metavar="QUESTION_ID", help="as in the data, or <file>:<row>; the report and buffer.jsonl name them"
    )
    inspect.add_argument("--step", type=int, help="only this step")
    inspect.add_argument("--kind", help="only this kind of prompt: plain, bcq, ncq")
    inspect.add_argument("--full", action="store_true", help="show long texts whole")
    inspect.set_defaults(run=_inspect)


def _add_figures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--figures", choices=FIGURE_FORMATS, default="png", help="format of the figure files (default: png)"
    )


def _report(options: argparse.Namespace, resolve: Callable[[str], str]) -> None:
    from zppo.report.command import report_command

    report_command(
        options.folder,
        out=options.out,
        figures=options.figures,
        watch=options.watch,
        port=options.port,
        resolve=resolve,
    )


def _compare(options: argparse.Namespace) -> None:
    from zppo.report.command import compare_command

    compare_command(options.folders, html=options.html, out=options.out, figures=options.figures)


def _inspect(options: argparse.Namespace) -> None:
    from zppo.report.command import inspect_command

    inspect_command(options.folder, options.question, step=options.step, kind=options.kind, full=options.full)


SUFFIXES = {"png": ("png",), "svg": ("svg",), "both": ("png", "svg"), "none": ()}
PAGE, COMPARISON, FIGURES = "report.html", "compare.html", "figures"


def report_command(
    folder: Path,
    *,
    out: Path | None,
    figures: str,
    watch: bool,
    port: int,
    resolve: Callable[[str], str] = str,
    console: Console | None = None,
) -> None:
    """Write report.html and figures/ of a run, or serve the page while the run goes on.

    Args:
        out: the folder to write to; None is the run folder.
        figures: a key of `SUFFIXES`.
        watch, port: serve on loopback instead of writing.
        resolve: names of models -> folders, for their sizes.

    Raises:
        ZPPOError: the folder holds no run, or the place cannot be written or served.
    """
    console = console or Console()
    reader = Reader(folder, resolve)
    if watch:
        from zppo.report.page import serve

        serve(
            reader,
            port,
            lambda address: console.print(
                f"{address}  shows {folder}; Ctrl-C ends it", highlight=False, soft_wrap=True
            ),
        )
        return
    from zppo.report.page import report_page

    summary = reader.read()
    target = out or folder
    _write(target / PAGE, report_page(summary))
    _say(console, target / PAGE, f"{(target / PAGE).stat().st_size / 1e6:.1f} MB")
    _figures(console, summary.charts, target / FIGURES, figures)
    console.print(Text(summary.outcome), soft_wrap=True)


def compare_command(
    folders: Sequence[Path], *, html: bool, out: Path | None, figures: str, console: Console | None = None
) -> None:
    """Print the tables of a comparison of runs, and write its page where `html`.

    Args:
        out: where the page goes; None is ./compare.html.
        figures: a key of `SUFFIXES`, beside the page.

    Raises:
        ZPPOError: a folder holds no run, or fewer than two were named.
    """
    from zppo.report.compare import compare

    console = console or Console()
    comparison = compare(folders)
    for table in comparison.tables:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 3, 0, 0))
        for index, name in enumerate(table.columns):
            shown.add_column(Text(name), justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
        console.print(Text(table.caption, style="dim"), soft_wrap=True)
        console.print()
    if html:
        from zppo.report.compare import charts_of, comparison_page

        target, charts = out or Path(COMPARISON), charts_of(comparison.arms)
        _write(target, comparison_page(comparison, charts))
        _say(console, target, f"{target.stat().st_size / 1e6:.1f} MB")
        _figures(console, charts, target.parent / f"{target.stem}-{FIGURES}", figures)


def inspect_command(
    folder: Path, question_id: str, *, step: int | None, kind: str | None, full: bool, console: Console | None = None
) -> None:
    """Print one question's story.

    Raises:
        CheckpointError: the folder holds no run, or the run never asked this question.
    """
    from zppo.report.questions import load_stories, print_story

    run = open_run(folder)
    story = load_stories(run, {question_id: map(step_of, run.rollout_files)})[question_id]
    if not story["groups"]:
        known = question_ids(run)
        near = nearest(question_id, known)
        hint = (
            f"similar ones: {', '.join(near)}"
            if near
            else f"it asked {len(known):,} questions, such as {', '.join(known[:1]) or 'none'}"
        )
        raise CheckpointError(f"{folder} never asked a question {question_id!r}; {hint}")
    print_story(story, console or Console(), step=step, kind=kind, full=full)


def _figures(console: Console, charts: Sequence[Chart], folder: Path, figures: str) -> None:
    from zppo.report.page import write_figures

    try:
        written = write_figures(charts, folder, SUFFIXES[figures])
    except OSError as error:
        raise SettingsError(f"{folder} cannot be written ({error.strerror}): name another place with --out") from error
    if written:
        _say(console, folder, f"{len(written)} figures")


def _write(path: Path, text: str) -> None:
    """Write a page; it appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}): name another place with --out") from error


def _say(console: Console, path: Path, what: str) -> None:
    console.print(Text(str(path)).append(f"  {what}", style="dim"), soft_wrap=True)
