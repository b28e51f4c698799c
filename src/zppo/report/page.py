"""`zppo report`: the page of a run, one HTML file that loads nothing, and its charts as figures.

Figures are drawn with matplotlib from the same data as the page's charts, which plotly draws.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from zppo import __version__
from zppo.errors import SettingsError
from zppo.report.charts import ChartSpec
from zppo.report.read_run import RECIPE
from zppo.report.stories import load_lines, stratified, to_index, trimmed, with_images
from zppo.report.summary import Reader, Summary
from zppo.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, DIM, GRID = "#1b2230", "#5c6675", "#e6e9ee"
PAGE, FIGURES = "report.html", "figures"


def report_command(folder: Path, *, out: Path | None, suffixes: Sequence[str], console: Console | None = None) -> None:
    """Write report.html and figures/ of a run.

    Args:
        out: the folder to write to; None is the run folder.
        suffixes: of png and svg, the wanted formats of the figures.

    Raises:
        ZPPOError: the folder holds no run, or the place cannot be written.
    """
    console = console or Console()
    summary, target = Reader(folder).read(), out or folder
    write_page(console, report_page(summary), target / PAGE, summary.charts, target / FIGURES, suffixes)
    console.print(Text(summary.outcome), soft_wrap=True)
    for warning in summary.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    for problem in summary.left_out.values():
        console.print(Text(f"left out: {problem}", style="yellow"), soft_wrap=True)


def write_page(console: Console, text: str, path: Path, charts: Sequence[ChartSpec], figures: Path, suffixes: Sequence[str]) -> None:
    """Write a page, which appears whole or not at all, and its figures. SettingsError where one of the places cannot be written."""

    def say(place: Path, what: str) -> None:
        console.print(Text(str(place.absolute())).append(f"  {what}", style="dim"), soft_wrap=True)

    place = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        say(path, f"{path.stat().st_size / 1e6:.1f} MB")
        place = figures
        written = write_figures(charts, figures, suffixes)
    except OSError as error:
        raise SettingsError(f"{place} cannot be written ({error.strerror}): name another place with --out") from error
    if written:
        say(figures, f"{len(written)} figures")


def write_figures(charts: Sequence[ChartSpec], folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Write every chart as <folder>/<id>.<suffix> and return the paths.

    Args:
        suffixes: of png and svg, those that are wanted.
    """
    if not suffixes:
        return []
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Names come from data: a dollar sign in one is no formula.
    style: Any = {"svg.hashsalt": "zppo", "text.parse_math": False, "font.size": 9, "axes.edgecolor": GRID, "text.color": INK}
    with matplotlib.rc_context(style):
        for chart in charts:
            for suffix in suffixes:
                path = folder / f"{chart.id}.{suffix}"
                # A figure of its own (its layout depends on what was drawn before), no date and a fixed salt: the same run, the same bytes.
                draw(chart).savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
                written.append(path)
    return written


def draw(chart: ChartSpec) -> Figure:
    """One chart as a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = len(chart.series[0].x) if chart.kind == "hbar" else 0
    figure = Figure(figsize=(6.4, max(3.6, 1.4 + 0.32 * rows)), layout="constrained")
    axes = figure.add_subplot()
    {"line": _lines, "area": _area, "bar": _bars, "hbar": _bars}[chart.kind](axes, chart)
    _dress(axes, chart)
    return figure


def _values(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if v is None else v for v in values]


# What plotly calls them, and matplotlib.
_DASHES = {"solid": "-", "dash": (0, (6, 2.5)), "dot": (0, (1.2, 1.8)), "dashdot": (0, (6, 2, 1.2, 2)), "longdash": (0, (11, 3))}
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "x", "cross": "P", "star": "*"}


def _lines(axes: Axes, chart: ChartSpec) -> None:
    for series in chart.series:
        smooth = chart.smoothed(series)
        style: dict[str, Any] = {"color": series.colour, "linestyle": _DASHES[series.dash]}
        if series.low:
            axes.fill_between(series.x, _values(series.low), _values(series.high), color=series.colour, alpha=0.15, linewidth=0)
        marker = _MARKERS[series.marker] if len(series.x) < 30 else None
        faint: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.7, "linestyle": "-"} if smooth else {"label": series.name, "linewidth": 1.6}
        axes.plot(series.x, _values(series.y), marker=marker, markersize=3.5, **{**style, **faint})
        if smooth:
            axes.plot(series.x, _values(smooth), label=series.name, linewidth=1.8, **style)


def _area(axes: Axes, chart: ChartSpec) -> None:
    stacks = [[v or 0.0 for v in series.y] for series in chart.series]
    colours, names = [s.colour for s in chart.series], [s.name for s in chart.series]
    axes.stackplot(chart.series[0].x, stacks, labels=names, colors=colours, alpha=0.85)
    axes.margins(x=0)


def _bars(axes: Axes, chart: ChartSpec) -> None:
    """Stacked bars, upright or lying."""
    below = [0.0] * len(chart.series[0].x)
    for series in chart.series:
        names, sizes = [str(x) for x in series.x], [v or 0.0 for v in series.y]
        if chart.kind == "bar":
            axes.bar(names, sizes, bottom=below, color=series.colour, label=series.name, width=0.75)
        else:
            axes.barh(names, sizes, left=below, color=series.colour, label=series.name, height=0.75)
        below = [b + size for b, size in zip(below, sizes, strict=True)]
    if chart.kind == "hbar":
        axes.invert_yaxis()


def _dress(axes: Axes, chart: ChartSpec) -> None:
    """Title, axes, grid, legend."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    flat = chart.kind == "hbar"
    # Above the plot: the title, and under it the legend in as many rows as it takes.
    columns = len(chart.series) if sum(len(s.name) + 6 for s in chart.series) < 75 else 2
    rows = math.ceil(len(chart.series) / columns) if len(chart.series) > 1 else 0
    axes.set_title(chart.title, loc="left", fontweight="bold", pad=10 + 15 * rows)
    value = axes.xaxis if flat else axes.yaxis
    (axes.set_xlabel if flat else axes.set_ylabel)(chart.y_title, color=DIM)
    (axes.set_ylabel if flat else axes.set_xlabel)(chart.x_title, color=DIM)
    if chart.percent:
        value.set_major_formatter(PercentFormatter(1.0))
    if chart.unit_range:
        (axes.set_xlim if flat else axes.set_ylim)(0, 1)
    elif not flat and chart.kind != "line":
        axes.set_ylim(bottom=0)
    if chart.kind in ("line", "area"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="both" if chart.kind in ("line", "area") else "x" if flat else "y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=DIM)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if rows:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderaxespad=0.2, handlelength=1.4, labelcolor=INK
        )


MOST_STORIES = 300
MOST_BYTES = 25_000_000
FOOTER = (
    "Made by zppo from the files of the run. Charts: plotly.js, formulas: KaTeX, markdown: markdown-it, all under the MIT licence. "
    "Rows of the paper: arXiv 2606.18216. In the charts drag to zoom, double-click to go back."
)


def report_page(summary: Summary, *, most_stories: int = MOST_STORIES, most_bytes: int = MOST_BYTES) -> str:
    """The page of a run as a file, with at most so many stories, and at most so many bytes in all as far as stories decide it."""
    chosen = stratified(summary.lines.values(), most_stories)
    left = most_bytes - len(page(run_payload(summary, [], ""), []).encode()) - 1000 * len(chosen)
    share = max(20_000, 4 * left // max(1, len(chosen)))  # one long story may take four times its share
    loaded = load_lines(summary.run, chosen, summary.left_out)  # a file may be damaged in its completions alone
    held: dict[str, str] = {}
    for line in chosen:
        text = packed(script_json(trimmed(with_images(loaded[line.key], share // 2), share)))
        if len(text) > left:
            continue
        left -= len(text)
        held[line.key] = text
    index = [to_index(line, summary.run) for key, line in summary.lines.items() if key in held]
    stories = [held[line["key"]] for line in index]
    note = (
        f"This file holds {len(stories):,} of the run's {len(summary.lines):,} questions, spread over kinds of prompts, entry bins and "
        f"audit classes, held-out ones among them (at most {most_stories:,}, and {most_bytes / 1e6:,.0f} MB in all). zppo report RUN "
        "--watch shows every question, zppo inspect RUN QUESTION_ID one of them in the terminal."
    )
    return page(run_payload(summary, index, note), stories)


def run_payload(summary: Summary, index: Sequence[Mapping[str, Any]], note: str) -> dict[str, Any]:
    """What the page of a run shows: its head, tables, charts, and the questions of `index`, with a note about these."""
    return {
        "title": summary.run.name,
        "outcome": summary.outcome,
        "warnings": summary.warnings,
        "head": list(summary.head.items()),
        "sections": sections(summary.tables, summary.charts),
        "index": index,
        "questions": len(summary.lines),
        "note": note,
        "recipe": (summary.run.folder / RECIPE).read_text(encoding="utf-8"),
        "footer": FOOTER,
    }


def sections(tables: Sequence[Table], charts: Sequence[ChartSpec]) -> list[dict[str, Any]]:
    """Tables and charts by section, sections in order of first appearance."""
    names = dict.fromkeys([*(c.section for c in charts), *(t.section for t in tables)])
    return [
        {
            "name": name,
            "tables": [t.to_dict() for t in tables if t.section == name],
            "charts": [c.to_dict() for c in charts if c.section == name],
        }
        for name in names
    ]


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no `<` in it, so nothing in it can end the element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c").encode("utf-8", "replace").decode()


def packed(text: str) -> str:
    """A story as a page holds it: gzip in base64, a tenth of the lab's JSON, and nothing that could end its element."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


CHARTING, TYPESETTING = ("plotly-basic.min.js",), ("katex.min.js", "markdown-it.min.js")
"""Other people's scripts, in page/vendor/; NOTICE names them. Plotly's basic build knows lines, areas, bars and pies."""


def page(data: Mapping[str, Any], stories: Sequence[str], mode: str = "file") -> str:
    """The page.

    Args:
        data: what charts.js draws.
        stories: as `packed` makes them, in the order of the payload's index.
        mode: "file" holds its stories; "watch" asks a server for them and for news.
    """
    folder = files("zppo.report") / "page"
    own = [(folder / name).read_text(encoding="utf-8") for name in ("charts.js", "texts.js", "stories.js", "start.js")]
    # Only a page with completions draws formulas and markdown. No text of theirs may end or open a script element.
    vendored = [*CHARTING, *(TYPESETTING if data["index"] is not None else ())]
    others = [(folder / "vendor" / name).read_text(encoding="utf-8") for name in vendored]
    scripts = [*(text.replace("<!--", "\\x3c!--").replace("</script", "\\x3c/script") for text in others), *own]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((folder / "page.html").read_text(encoding="utf-8")).render(
        title=data["title"],
        mode=mode,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        connect=Markup("'self'" if mode == "watch" else "'none'"),
        hashes=Markup(" ".join(map(_hash, scripts))),
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        data=Markup(script_json(data)),
        stories=map(Markup, stories),
        scripts=list(map(Markup, scripts)),
    )


def _hash(script: str) -> str:
    """A script as a content security policy names it: nothing else runs on the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
