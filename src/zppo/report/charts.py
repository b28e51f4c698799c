"""Charts as data: the page draws them with plotly, `zppo.report.static` the same ones with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Okabe and Ito's colours, told apart with every kind of colour blindness.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#7F7F7F",
)
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)
KIND_COLOURS = {"plain": BLUE, "bcq": RED, "ncq": GREEN}
# Anchors of the ramp for entry bins, ordered from dark to light, as cividis is.
_RAMP = ((0, 48, 111), (79, 89, 108), (124, 123, 120), (173, 160, 112), (230, 199, 74))

SMOOTH_FROM = 40
"""Lines with fewer points are drawn as they are."""

Kind = Literal["line", "area", "bar", "hbar"]


@dataclass(frozen=True, slots=True)
class Series:
    """One trace.

    Attributes:
        name: for the legend.
        x: numbers, or names of bars.
        y: values; None is a gap.
        colour: CSS hex.
        hover: a text per point beside x and y.
        low, high: bounds of a band around y.
        dash: drawn dashed.
    """

    name: str
    x: Sequence[Any]
    y: Sequence[float | None]
    colour: str
    hover: Sequence[str] = ()
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    dash: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        id: its file name and its anchor.
        section: where on the page it stands.
        title, caption: what it shows; how to read it.
        kind: line, area (stacked), bar or hbar (stacked, horizontal).
        x_title, y_title: axis titles.
        percent: y is a share and shown in percent.
        smooth: a running mean may be drawn over the values of a line.
        unit_range: y runs from 0 to 1.
    """

    id: str
    section: str
    title: str
    series: tuple[Series, ...]
    kind: Kind = "line"
    caption: str = ""
    x_title: str = "step"
    y_title: str = ""
    percent: bool = False
    smooth: bool = True
    unit_range: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(value is not None for series in self.series for value in series.y)

    def smoothed(self, series: Series) -> list[float | None] | None:
        """A centred mean over about a twentieth of a line's values, to be drawn over them; None where there are too few."""
        if self.kind != "line" or not self.smooth or len(series.y) < SMOOTH_FROM:
            return None
        half = round(len(series.y) / 40)
        near = ([v for v in series.y[max(0, i - half) : i + half + 1] if v is not None] for i in range(len(series.y)))
        return [
            sum(values) / len(values) if values and y is not None else None
            for values, y in zip(near, series.y, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with six digits; `mean` of a series is its smoothed line."""
        own = {name: getattr(self, name) for name in Chart.__slots__ if name != "series"}
        series = [
            {"mean": _plain(self.smoothed(s) or ()), **{name: _plain(getattr(s, name)) for name in Series.__slots__}}
            for s in self.series
        ]
        return {**own, "series": series}


def numbers(values: Iterable[Any]) -> list[float | None]:
    """Values for a trace: what is missing or not finite becomes None."""
    return [None if v is None or not math.isfinite(v) else float(v) for v in values]


def ramp(count: int) -> list[str]:
    """Colours for ordered classes, dark to light, told apart in grey as well."""
    colours = []
    for i in range(count):
        at = i * (len(_RAMP) - 1) / max(1, count - 1)
        low = min(int(at), len(_RAMP) - 2)
        mixed = (round(a + (b - a) * (at - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
        colours.append("#{:02X}{:02X}{:02X}".format(*mixed))
    return colours


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool):
        return value
    numbers = (v.item() if hasattr(v, "item") else v for v in value)
    return [float(f"{v:.6g}") if isinstance(v, float) else v for v in numbers]
