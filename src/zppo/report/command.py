"""What `zppo report`, `zppo compare` and `zppo inspect` take on the command line. The work is imported when a command runs.

The commands `zppo report`, `zppo compare` and `zppo inspect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zppo.errors import CheckpointError, SettingsError
from zppo.report.charts import Chart
from zppo.report.questions import nearest
from zppo.report.read_run import open_run, question_ids, step_of
from zppo.report.summary import Reader

SUFFIXES = {"png": ("png",), "svg": ("svg",), "both": ("png", "svg"), "none": ()}
PAGE, COMPARISON, FIGURES = "report.html", "compare.html", "figures"


def report_command(folder: Path, *, out: Path | None, figures: str, watch: bool, port: int, console: Console | None = None) -> None:
    """Write report.html and figures/ of a run, or serve the page while the run goes on.

    Args:
        out: the folder to write to; None is the run folder.
        figures: a key of `SUFFIXES`.
        watch, port: serve on loopback instead of writing.

    Raises:
        ZPPOError: the folder holds no run, or the place cannot be written or served.
    """
    console = console or Console()
    reader = Reader(folder)
    if watch:
        from zppo.report.page import serve

        serve(reader, port, lambda address: console.print(f"{address}  shows {folder}; Ctrl-C ends it", highlight=False, soft_wrap=True))
        return
    from zppo.report.page import report_page

    summary = reader.read()
    target = out or folder
    _write(target / PAGE, report_page(summary))
    _say(console, target / PAGE, f"{(target / PAGE).stat().st_size / 1e6:.1f} MB")
    _figures(console, summary.charts, target / FIGURES, figures)
    console.print(Text(summary.outcome), soft_wrap=True)


def compare_command(folders: Sequence[Path], *, html: bool, out: Path | None, figures: str, console: Console | None = None) -> None:
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
            f"similar ones: {', '.join(near)}" if near else f"it asked {len(known):,} questions, such as {', '.join(known[:1]) or 'none'}"
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
