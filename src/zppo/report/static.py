"""The charts as files, drawn with matplotlib from the same data as the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zppo.report.charts import Chart, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, DIM, GRID = "#1b2230", "#5c6675", "#e6e9ee"


def write_figures(charts: Sequence[Chart], folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Write every chart as <folder>/<id>.<suffix> and return the paths.

    Args:
        suffixes: of png and svg, those that are wanted.
    """
    if not suffixes:
        return []
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_settings()):
        for chart in charts:
            for suffix in suffixes:
                path = folder / f"{chart.id}.{suffix}"
                # A figure of its own (its layout depends on what was drawn before), no date and a fixed salt: the same run, the same bytes.
                draw(chart).savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
                written.append(path)
    return written


def _settings() -> Any:
    # Names come from data: a dollar sign in one is no formula.
    return {"svg.hashsalt": "zppo", "text.parse_math": False, "font.size": 9, "axes.edgecolor": GRID, "text.color": INK}


def draw(chart: Chart) -> Figure:
    """One chart as a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = len(chart.series[0].x) if chart.kind == "hbar" else 0
    figure = Figure(figsize=(6.4, max(3.6, 1.4 + 0.32 * rows)), layout="constrained")
    axes = figure.add_subplot()
    {"line": _lines, "area": _area, "bar": _bars, "hbar": _hbars}[chart.kind](axes, chart)
    _dress(axes, chart)
    return figure


def _values(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if v is None else v for v in values]


def _lines(axes: Axes, chart: Chart) -> None:
    for series in chart.series:
        smooth = chart.smoothed(series)
        style: dict[str, Any] = {"color": series.colour, "linestyle": "--" if series.dash else "-"}
        if series.low:
            axes.fill_between(
                series.x, _values(series.low), _values(series.high), color=series.colour, alpha=0.15, linewidth=0
            )
        marker = "o" if len(series.x) < 30 else None
        faint = {"alpha": 0.35, "linewidth": 0.7} if smooth else {"label": series.name, "linewidth": 1.6}
        axes.plot(series.x, _values(series.y), marker=marker, markersize=3, **style, **faint)
        if smooth:
            axes.plot(series.x, _values(smooth), label=series.name, linewidth=1.8, **style)


def _area(axes: Axes, chart: Chart) -> None:
    stacks = [[v or 0.0 for v in series.y] for series in chart.series]
    colours, names = [s.colour for s in chart.series], [s.name for s in chart.series]
    axes.stackplot(chart.series[0].x, stacks, labels=names, colors=colours, alpha=0.85)
    axes.margins(x=0)


def _stacked(chart: Chart) -> list[tuple[Series, list[float], list[float]]]:
    """(series, heights, where they begin)."""
    below, result = [0.0] * len(chart.series[0].x), []
    for series in chart.series:
        heights = [v or 0.0 for v in series.y]
        result.append((series, heights, below))
        below = [b + h for b, h in zip(below, heights, strict=True)]
    return result


def _bars(axes: Axes, chart: Chart) -> None:
    for series, heights, below in _stacked(chart):
        axes.bar([str(x) for x in series.x], heights, bottom=below, color=series.colour, label=series.name, width=0.75)


def _hbars(axes: Axes, chart: Chart) -> None:
    for series, widths, left in _stacked(chart):
        axes.barh([str(x) for x in series.x], widths, left=left, color=series.colour, label=series.name, height=0.75)
    axes.invert_yaxis()


def _dress(axes: Axes, chart: Chart) -> None:
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
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            frameon=False,
            borderaxespad=0.2,
            handlelength=1.4,
            labelcolor=INK,
        )
