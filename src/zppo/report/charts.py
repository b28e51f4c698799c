"""The report's charts, from what a run folder holds (method.md section 9).

A chart is data: the page draws it with plotly, `zppo.report.page` the same one with matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import cycle
from typing import Any, Literal

import numpy as np

from zppo.core.types import BCQ, NCQ
from zppo.report.audits import FATES, MOST_VISITS, PAPER_BINS, MatchRow, ZoneStory, median, paper_buffer, paper_rows
from zppo.report.read_run import KindSums, Run, StepScan

# Okabe and Ito's colours, which differ for every kind of colour blindness.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE, GREY = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7F7F7F")
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, GREY)
# One colour per part of a batch on every chart; other kinds of prompts take the spare ones, which are Tol's.
KIND_COLOURS = {"plain": BLUE, "bcq": RED, "ncq": GREEN, "hint": PURPLE, "prefix": ORANGE}
_BATCH_COLOURS = {"easy": SKY, "hard": BLUE, "ungraded": GREY}
_TIME_COLOURS = {"sampling": BLUE, "teacher": ORANGE, "update": GREEN, "engine": SKY, "other": GREY}
SPARE = ("#882255", "#44AA99", "#999933", "#332288", "#DDCC77", "#AA4499")
INK = "#333333"
"""A line over all kinds; the page draws it in the colour of its text."""
LIGHT_GREEN, LIGHT_GREY = "#8CD0B9", "#C5CAD3"
_FATE_COLOURS = dict(zip(FATES, (GREY, LIGHT_GREEN, GREEN), strict=True))
_ELIGIBLE = {
    "easy": ("easy", SKY),
    "bcq": ("BCQ and NCQ", RED),
    "ncq": ("NCQ alone", GREEN),
    "unasked": ("teacher not asked", BLUE),
    "ungraded": ("ungraded", GREY),
}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
# Anchors of the ramp for entry bins, ordered from dark to light, as cividis is; the darkest can still be told from a dark page.
_RAMP = ((40, 100, 180), (98, 108, 126), (135, 134, 130), (178, 166, 118), (230, 199, 74))

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
        hover: a text per point, shown with x and y.
        low, high: bounds of a band around y.
        dash, marker: plotly's names of how its line is broken and of its points, which tell it from others without its colour.
    """

    name: str
    x: Sequence[Any]
    y: Sequence[float | None]
    colour: str
    hover: Sequence[str] = ()
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    dash: str = "solid"
    marker: str = "circle"


@dataclass(frozen=True, slots=True)
class ChartSpec:
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
        return [sum(values) / len(values) if values and y is not None else None for values, y in zip(near, series.y, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with six digits; `mean` of a series is its smoothed line."""
        own = {name: getattr(self, name) for name in ChartSpec.__slots__ if name != "series"}
        series = [
            {"mean": _plain(self.smoothed(s) or ()), **{name: _plain(getattr(s, name)) for name in Series.__slots__}} for s in self.series
        ]
        return {**own, "series": series}


def numbers(values: Iterable[Any]) -> list[float | None]:
    """Values for a trace: what is missing or not finite becomes None."""
    return [None if v is None or not math.isfinite(v) else float(v) for v in values]


def ramp(count: int) -> list[str]:
    """Colours for ordered classes, dark to light, which differ in grey as well."""
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


DYNAMICS, ZONE, AUDITS = "Dynamics", "The zone", "Audits"


def kind_colours(kinds: Iterable[str]) -> dict[str, str]:
    """A colour per kind of prompt, the same on every chart of a run: known kinds have theirs, any other takes the next that is left."""
    spare = cycle(SPARE)
    return {kind: KIND_COLOURS.get(kind) or next(spare) for kind in kinds}


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and points of the line at this place in a chart: lines differ without their colours too."""
    return {"colour": CYCLE[index % len(CYCLE)], "dash": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}


def kind_name(kind: str) -> str:
    """bcq -> BCQ; plain and kinds of one's own as they are."""
    return kind.upper() if kind in (BCQ, NCQ) else kind


def charts_of(run: Run, scans: Sequence[StepScan], matches: Sequence[MatchRow], zone: ZoneStory | None) -> list[ChartSpec]:
    """Every chart that has something to show, in the order of the page; `matches` are the rows of the candidate-match audit."""
    shown = (kind for scan in scans for kind in scan.kinds)
    composed = (name for line in run.steps for name in line["composition"] if name not in _BATCH_COLOURS)
    colours = kind_colours(dict.fromkeys([*shown, *composed]))
    charts = [*_outcome(run), *_by_kind(scans, colours), *_by_step(run, colours), *_zone(zone), *_audits(matches)]
    return [chart for chart in charts if not chart.empty]


def _outcome(run: Run) -> list[ChartSpec]:
    """Held-out accuracy by level."""
    evaluations = [e for e in run.evaluations if e["event"] == "eval"]
    finals = [e for e in run.evaluations if e["event"] == "final"]
    seen = [*evaluations, *finals]
    levels = list(dict.fromkeys(level for e in seen for level in e["by_level"]))
    x = [e["step"] for e in seen]
    series = [Series(level, x, numbers(e["by_level"].get(level) for e in seen), **line_style(i)) for i, level in enumerate(levels)]
    series.append(Series("all", x, numbers(e["accuracy"] for e in seen), INK if levels else BLUE))
    caption = "Plain prompts on held-out questions." + (" The last point is a fresh evaluation of final/." if finals else "")
    options: dict[str, Any] = {"percent": True, "smooth": False, "unit_range": True}
    return [ChartSpec("held-out", DYNAMICS, "Held-out accuracy", tuple(series), caption=caption, **options)]


def _by_kind(scans: Sequence[StepScan], colours: Mapping[str, str]) -> list[ChartSpec]:
    """What the rollout files say, per kind of prompt."""
    kinds = list(dict.fromkeys(kind for scan in scans for kind in scan.kinds))

    def series(value: Any, together: bool = False) -> tuple[Series, ...]:
        result = []
        for kind in kinds:
            rows = [(scan.step, scan.kinds[kind]) for scan in scans if kind in scan.kinds]
            hover = [f"{sums.rollouts:,} rollouts" for _, sums in rows]
            values = numbers(value(sums) for _, sums in rows)
            result.append(Series(kind_name(kind), [step for step, _ in rows], values, colours[kind], hover=hover))
        if together and len(kinds) > 1:
            sums = [_added(scan.kinds.values()) for scan in scans]
            hover = [f"{each.rollouts:,} rollouts" for each in sums]
            result.append(Series("all", [scan.step for scan in scans], numbers(map(value, sums)), INK, hover=hover))
        return tuple(result)

    def share(part: str, of: str = "rollouts") -> Any:
        return lambda sums: getattr(sums, part) / getattr(sums, of) if getattr(sums, of) else None

    def entropy(sums: KindSums) -> float | None:
        return sums.entropy / sums.entropies if sums.entropies else None

    return [
        ChartSpec("accuracy", DYNAMICS, "Accuracy of rollouts", series(share("correct", "graded")), percent=True, unit_range=True,
              caption="Share of right rollouts among those with a verdict, by kind of prompt."),
        ChartSpec("positive", DYNAMICS, "Positive advantages", series(share("positive", "graded"), together=True), percent=True,
              caption="Share of rollouts whose advantage is above 0."),
        ChartSpec("entropy", DYNAMICS, "Entropy of the sampling distribution", series(entropy, together=True), y_title="nats a token",
              caption="Mean over the tokens of a rollout, then over rollouts."),
        ChartSpec("lengths", DYNAMICS, "Completion length", series(share("tokens")), y_title="tokens",
              caption="Mean over rollouts, those that the limit cut included."),
        ChartSpec("truncated", DYNAMICS, "Cut by the token limit", series(share("truncated")), percent=True,
              caption="Share of rollouts that the token limit stopped."),
        ChartSpec("no-answer", DYNAMICS, "Without an answer", series(share("no_answer")), percent=True,
              caption="Share of rollouts from which no answer could be extracted."),
    ]  # fmt: skip


def _added(kinds: Iterable[KindSums]) -> KindSums:
    parts = list(kinds)
    return KindSums(**{field.name: sum(getattr(sums, field.name) for sums in parts) for field in fields(KindSums)})


def _eligible(run: Run, x: Sequence[int]) -> list[ChartSpec]:
    """Before the caps: what could be made of the questions of each step. Only where a teacher was asked for candidates."""
    logged = [line.get("eligibility") for line in run.steps]
    if not any(parts and ("bcq" in parts or "ncq" in parts) for parts in logged):
        return []
    series = tuple(
        Series(name, x, numbers(None if parts is None else parts.get(key, 0.0) for parts in logged), colour)
        for key, (name, colour) in _ELIGIBLE.items()
        if any(parts and parts.get(key) for parts in logged)
    )
    caption = (
        "Shares of the questions asked plainly, before the batch's caps (Fig. 5a): every hard one could give NCQ, those with a "
        "correct teacher response BCQ too."
    )
    if any(parts and parts.get("unasked") for parts in logged):
        caption += " The teacher was not asked about the hard questions that no slot was left for; teacher.ask: all asks about all of them."
    if missing := sum(parts is None for parts in logged):
        caption += f" {missing:,} steps are empty: an older version made them, and did not log it."
    options: dict[str, Any] = {"percent": True, "unit_range": True, "caption": caption}
    return [ChartSpec("eligibility", DYNAMICS, "What could be asked again", series, "area", **options)]


def _by_step(run: Run, colours: Mapping[str, str]) -> list[ChartSpec]:
    """What metrics.jsonl says about each step."""
    x = [line["step"] for line in run.steps]

    def one(name: str, key: str, colour: str) -> Series:
        return Series(name, x, numbers(line.get(key) for line in run.steps), colour)

    def ratio(name: str, part: str, of: str, colour: str) -> Series:
        pairs = [(line.get(part), line.get(of)) for line in run.steps]
        hover = [f"{a:,.0f} of {b:,.0f}" if a is not None and b else "" for a, b in pairs]
        return Series(name, x, numbers(a / b if a is not None and b else None for a, b in pairs), colour, hover=hover)

    # A method without a teacher or a judge has no chart of them.
    asked = any(line.get("teacher_rollouts") for line in run.steps)
    judged = any(line.get("judge_asked") for line in run.steps)
    teacher = (
        ratio("rollouts right", "teacher_correct", "teacher_rollouts", GREEN),
        ratio("questions never solved", "teacher_solved_none", "teacher_questions", ORANGE),
        ratio("summaries refused", "compression_failed", "compression_asked", RED),
        ratio("BCQ uncompressed", "bcq_raw_pairs", "bcq_prompts", PURPLE),
    )
    functions = dict.fromkeys(name for line in run.steps for name in line.get("rewards", {}))  # the user's
    rewards = tuple(
        Series(name, x, numbers(line.get("rewards", {}).get(name) for line in run.steps), **line_style(i))
        for i, name in enumerate(functions)
    )
    missing = ChartSpec(
        "teacher-missing", DYNAMICS, "Help that did not come",
        (
            one("rollouts", "teacher_unreachable", RED),
            one("summaries", "compression_unreachable", ORANGE),
            one("too long prompts", "too_long", PURPLE),
            *([one("verdicts", "judge_unreachable", BLUE)] if judged else []),
        ),
        y_title="count", smooth=False, caption="Rollouts, summaries and verdicts that got no reply; prompts beyond the student's context.",
    )  # fmt: skip
    return [
        ChartSpec("loss", DYNAMICS, "Loss", (one("loss", "loss", BLUE),),
              caption="Token-level clipped surrogate, mean over the step's updates; its level says little, jumps say a lot."),
        ChartSpec("grad-norm", DYNAMICS, "Gradient norm", (one("gradient norm", "grad_norm", BLUE),), caption="Before clipping."),
        ChartSpec("clip", DYNAMICS, "Clipped tokens", (
            one("below", "clip_low_share", BLUE), one("above", "clip_high_share", RED), one("dual clip", "clip_dual_share", PURPLE)),
            percent=True, caption="Share of trained tokens whose ratio left the clip range."),
        ChartSpec("rewards", DYNAMICS, "Reward functions", rewards,
                  caption="What each of your functions gave, its weight not counted: mean over the rollouts that it applied to."),
        ChartSpec("composition", DYNAMICS, "Composition of the batch", _parts(
            run.steps, "composition", {**_BATCH_COLOURS, **colours}), "area", percent=True, unit_range=True,
            caption="Shares of the step's groups, after the caps: easy and hard questions asked plainly, and questions asked again."),
        *_eligible(run, x),
        *([ChartSpec("teacher", DYNAMICS, "Teacher health", teacher, percent=True, unit_range=True,
                 caption="How often the teacher was right, and how often its summaries could not be used.")] if asked else []),
        *([ChartSpec("judge", DYNAMICS, "Judge", (
            ratio("judged correct", "judge_correct", "judge_asked", GREEN), ratio("no verdict", "judge_malformed", "judge_asked", RED)),
            percent=True, unit_range=True, caption="Of the completions that the judge was asked about; no verdict counts as wrong.")]
          if judged else []),
        *([missing] if any(v for s in missing.series for v in s.y) else []),
        ChartSpec("seconds", DYNAMICS, "Time of a step", _parts(
            run.steps, "seconds", _TIME_COLOURS, without=("step", "grading")), "area", y_title="seconds",
            caption="Where the wall clock of a step goes; grading is a part of sampling and of the teacher's time."),
        *_system(run, x),
        *([ChartSpec("waited", DYNAMICS, "Waiting for the teacher", (one("waited", "teacher_wait_seconds", ORANGE),), y_title="seconds",
                 caption="Seconds of each step in which it could do nothing but wait for the teacher's replies.")]
          if any(line.get("teacher_wait_seconds") for line in run.steps) else []),
    ]  # fmt: skip


def _system(run: Run, x: Sequence[int]) -> list[ChartSpec]:
    """Memory of the machine and its GPU, and the GPU's load; runs of older versions say nothing of it."""

    def series(names: Mapping[str, tuple[str, str]]) -> tuple[Series, ...]:
        found = {key: numbers(line.get("system", {}).get(key) for line in run.steps) for key in names}
        return tuple(
            Series(*(names[key][0], x, values, names[key][1])) for key, values in found.items() if any(v is not None for v in values)
        )

    memory = {
        "memory_gib": ("run", BLUE),
        "gpu_memory_gib": ("GPU, all that is taken", RED),
        "gpu_torch_peak_gib": ("GPU, torch's peak", ORANGE),
    }
    return [
        ChartSpec("memory", DYNAMICS, "Memory", series(memory), y_title="GiB", smooth=False,
              caption="Of the run's processes, and of the GPU where there is one, at the end of each step."),
        ChartSpec("gpu-load", DYNAMICS, "GPU load", series({"gpu_utilisation": ("computing", GREEN)}), percent=True, unit_range=True,
              caption="Share of the last second before the end of each step in which the GPU computed."),
    ]  # fmt: skip


def _parts(lines: Sequence[Mapping[str, Any]], key: str, colours: Mapping[str, str], without: Sequence[str] = ()) -> tuple[Series, ...]:
    """Series of a metric that is a mapping; its known parts first, in the order of `colours`, parts that are always 0 left out."""
    found = dict.fromkeys(name for line in lines for name, value in line[key].items() if value)
    names = [*(n for n in colours if n in found), *(n for n in found if n not in colours and n not in without)]
    x = [line["step"] for line in lines]
    spare = dict(zip((n for n in names if n not in colours), cycle(SPARE), strict=False))
    return tuple(Series(kind_name(n), x, numbers(line[key].get(n, 0.0) for line in lines), colours.get(n) or spare[n]) for n in names)


def _zone(zone: ZoneStory | None) -> list[ChartSpec]:
    if zone is None or not zone.admitted.any():
        return []
    colours, x = ramp(len(zone.names)), zone.steps.tolist()
    admitted, graduated = np.cumsum(zone.admitted, axis=1), np.cumsum(zone.graduated, axis=1)
    occupancy = tuple(Series(name, x, numbers(row), colour) for name, row, colour in zip(zone.names, zone.occupancy, colours, strict=True))
    shares = tuple(
        Series(name, x, numbers(row), colour, hover=[f"{g:,} of {a:,}" for g, a in zip(out, into, strict=True)])
        for name, row, out, into, colour in zip(zone.names, zone.graduated_share, graduated, admitted, colours, strict=True)
    )
    return [
        ChartSpec("occupancy", ZONE, "Questions in the buffer", occupancy, "area", y_title="questions",
              caption="By plain accuracy at admission."),
        ChartSpec("graduation", ZONE, "Graduated of those admitted", shares, percent=True, smooth=False,
              caption="Up to each step, by plain accuracy at admission; the numbers appear under the pointer."),
        _left(zone, x),
        _bars("graduates", "Graduates", zone.names, {"graduated": zone.graduated.sum(axis=1)}, colours={"graduated": GREEN},
              caption="Entries that graduated, by plain accuracy at admission."),
        graduate_shares({"this run": {name: graduated for name, _, graduated, _ in zone.totals()[:-1]}}, ZONE),
        _bars("fate", "Fate of those that left", zone.names,
              {"graduated": zone.graduated.sum(axis=1), "evicted": zone.evicted.sum(axis=1)}, normed=True,
              colours={"graduated": GREEN, "evicted": ORANGE}, caption="Shares of the entries that left the buffer."),
        _visits(zone),
        _waiting(zone, colours),
    ]  # fmt: skip


def _bars(
    id: str, title: str, names: Sequence[str], parts: Mapping[str, Sequence[float]], *, colours: Mapping[str, str], caption: str,
    normed: bool = False, x_title: str = "plain accuracy at admission",
) -> ChartSpec:  # fmt: skip
    """Stacked bars, in counts or as shares of each bar."""
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    series = []
    for part, values in parts.items():
        shown = [v / t if t else None for v, t in zip(values, totals, strict=True)] if normed else values
        hover = [f"{v:,} of {t:,}" for v, t in zip(values, totals, strict=True)]
        series.append(Series(part, list(names), numbers(shown), colours[part], hover=hover))
    y_title = "" if normed else "entries"
    return ChartSpec(id, ZONE, title, tuple(series), "bar", caption, x_title, y_title, percent=normed, unit_range=normed)


def _left(zone: ZoneStory, x: Sequence[int]) -> ChartSpec:
    """Of the entries that left so far, those that graduated and those that were evicted; the paper's, as they stood at the end."""
    left = zone.left.sum(axis=0)
    series = [
        Series(name, x, numbers(n / t if t else None for n, t in zip(part, left, strict=True)), colour,
               hover=[f"{n:,} of {t:,}" for n, t in zip(part, left, strict=True)])
        for name, part, colour in zip(("graduated", "evicted"), zone.left, (GREEN, ORANGE), strict=True)
    ]  # fmt: skip
    for (source, values), colour in zip(((s, v) for s, v in paper_buffer().items() if "evicted in all" in v), (PURPLE, GREY), strict=False):
        graduated, evicted = values["graduated in all"], values["evicted in all"]
        share = graduated / (graduated + evicted)
        hover = [f"{graduated:,.0f} of {graduated + evicted:,.0f}"] * 2
        series.append(Series(source, [x[0], x[-1]], [share, share], colour, hover=hover, dash="dot"))
    caption = (
        "Shares of the entries that left the buffer up to each step (Figs. 5b and 23); dotted: what graduated in the paper's runs by their "
        "end."
    )
    options: dict[str, Any] = {"percent": True, "smooth": False, "unit_range": True, "caption": caption}
    return ChartSpec("left", ZONE, "Graduated against evicted", tuple(series) if left[-1] else (), **options)


def graduate_shares(graduates: Mapping[str, Mapping[str, int]], section: str) -> ChartSpec:
    """What graduates were at admission, as shares: a bar for each row that has any, and for what the paper tells (Figs. 21, 24).

    Args:
        graduates: how many by the bin's name, by the row's.
    """
    totals = {name: sum(counts.values()) for name, counts in graduates.items()}
    bars: dict[str, Mapping[str, float | None]] = {
        row: {bin: n / totals[row] for bin, n in counts.items()} for row, counts in graduates.items() if totals[row]
    }
    names = tuple(dict.fromkeys(bin for parts in bars.values() for bin in parts))
    rest = "above, not told apart"
    for source, values in paper_buffer().items() if names == PAPER_BINS else ():
        known = {bin: _paper_share(values, bin) for bin in PAPER_BINS[:2]}
        bars[source] = {**known, rest: 1 - sum(share or 0.0 for share in known.values())}
    series = tuple(
        Series(bin, list(bars), numbers(parts.get(bin) for parts in bars.values()), colour)
        for bin, colour in zip((*names, rest), (*ramp(len(names)), LIGHT_GREY), strict=True)
    )
    caption = "Shares of the entries that graduated, by plain accuracy at admission."
    options: dict[str, Any] = {"x_title": "", "y_title": "share of graduates", "percent": True, "unit_range": True, "caption": caption}
    shown = tuple(s for s in series if any(v is not None for v in s.y))
    return ChartSpec("graduate-shares", section, "Composition of graduates", shown, "hbar", **options)


def _paper_share(values: Mapping[str, float], bin: str) -> float | None:
    """The share of a bin among graduates, as the paper says it or as its counts do."""
    count, total = values.get(f"graduated from {bin}"), values.get("graduated in all")
    return count / total if count is not None and total else values.get(f"share of graduates from {bin}")


def _visits(zone: ZoneStory) -> ChartSpec:
    """The three fates by number of visits (Fig. 24); the many at the end are one bar."""
    names = [f"{n}{'+' if n == MOST_VISITS else ''} ({sum(parts):,})" for n, parts in zone.fates.items()]
    parts = dict(zip(FATES, zip(*zone.fates.values(), strict=True), strict=True)) if zone.fates else {}
    caption = "Entries by how often they were asked plainly since admission; those that are still in the buffer count."
    if zone.unvisited:
        caption += f" {zone.unvisited:,} were not asked again, and are in no bar."
    return _bars(
        "visits", "Fate by number of visits", names, parts, colours=_FATE_COLOURS, caption=caption, x_title="visits (entries)", normed=True
    )


def _waiting(zone: ZoneStory, colours: Sequence[str]) -> ChartSpec:
    """How long graduates waited: share of a bin's graduates that took at most so many steps."""
    series = []
    for name, waits, colour in zip(zone.names, zone.waits, colours, strict=True):
        if waits:
            values, counts = np.unique(waits, return_counts=True)
            done = np.cumsum(counts)
            hover = [f"{d:,} of {done[-1]:,}" for d in done]
            label = f"{name} (median {median(waits):g})"
            series.append(Series(label, values.tolist(), numbers(done / done[-1]), colour, hover=hover))
    return ChartSpec("waiting", ZONE, "Time to graduation", tuple(series), x_title="steps since admission", percent=True, smooth=False,
                 unit_range=True, caption="Share of graduates that took at most so many steps, by accuracy at admission.")  # fmt: skip


def _audits(matches: Sequence[MatchRow]) -> list[ChartSpec]:
    papers = paper_rows()
    words = {
        BCQ: ("Whose answer BCQ rollouts give", "the right candidate's", "the wrong candidate's"),
        NCQ: ("Whose answer NCQ rollouts give", "the teacher's, unseen", "a listed wrong one"),
    }
    caption = "This run beside the students of the paper (Tabs. 16 and 17). Answers compared after normalisation."
    charts = []
    for kind, (title, positive, negative) in words.items():
        rows = [row for row in matches if row.kind == kind and row.rollouts]
        if not rows:
            continue
        rows += [row for row in papers if row.kind == kind]
        names, hover = [f"{row.source} · {row.subset}" for row in rows], [f"{row.rollouts:,} rollouts" for row in rows]
        series = tuple(
            Series(label, names, numbers(getattr(row, field) for row in rows), colour, hover=hover)
            for label, field, colour in ((positive, "positive", GREEN), (negative, "negative", RED), ("another or none", "other", GREY))
        )
        options: dict[str, Any] = {"x_title": "", "y_title": "share of rollouts", "percent": True, "unit_range": True}
        charts.append(ChartSpec(f"match-{kind}", AUDITS, title, series, "hbar", caption, **options))
    return charts
