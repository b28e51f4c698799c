"""The page of a comparison: curves on shared axes beside the tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zppo.report.charts import CYCLE, Chart, Series, numbers
from zppo.report.compare import Arm, Comparison, story_of
from zppo.report.figures import kind_name
from zppo.report.load import Run
from zppo.report.page_html import FOOTER, page, sections

CURVES = "Curves"

Curve = Callable[[Run], Mapping[int, float | None]]


def charts_of(arms: Sequence[Arm]) -> list[Chart]:
    """Curves on shared axes: means over the seeds of an arm, with a band from the lowest to the highest."""
    runs = [run for arm in arms for run in arm.runs.values()]
    levels = list(dict.fromkeys(level for run in runs for e in run.evaluations for level in e["by_level"]))
    kinds = list(dict.fromkeys(kind for run in runs for line in run.steps for kind in line["accuracy"]))

    def evaluation(level: str | None) -> Curve:
        return lambda run: {
            e["step"]: e["accuracy"] if level is None else e["by_level"].get(level) for e in run.evaluations
        }

    def metric(key: str) -> Curve:
        return lambda run: {line["step"]: line.get(key) for line in run.steps}

    def accuracy(kind: str) -> Curve:
        return lambda run: {line["step"]: line["accuracy"].get(kind) for line in run.steps}

    def graduated(run: Run) -> Mapping[int, float | None]:
        if not run.replays or not run.steps:
            return {}
        zone = story_of(run)
        return dict(zip(zone.steps.tolist(), zone.graduated_share[0].tolist(), strict=True))

    shares: dict[str, Any] = {"percent": True, "unit_range": True}
    charts = [
        _chart("held-out", "Held-out accuracy", arms, evaluation(None), smooth=False, **shares),
        *(_chart(f"held-out-{i}", f"Held-out accuracy: {level}", arms, evaluation(level), smooth=False, **shares)
          for i, level in enumerate(levels)),
        *(_chart(f"accuracy-{kind}", f"Accuracy of {kind_name(kind)} rollouts", arms, accuracy(kind), **shares) for kind in kinds),
        _chart("graduation", "Graduated of those admitted at 0%", arms, graduated, smooth=False, percent=True),
        _chart("buffer", "Questions in the buffer", arms, metric("buffer"), smooth=False, y_title="questions"),
        _chart("positive", "Positive advantages", arms, metric("positive_advantage_share"), percent=True),
        _chart("entropy", "Entropy", arms, metric("entropy"), y_title="nats a token"),
        _chart("lengths", "Completion length", arms, metric("completion_tokens_mean"), y_title="tokens"),
        _chart("grad-norm", "Gradient norm", arms, metric("grad_norm")),
    ]  # fmt: skip
    return [chart for chart in charts if not chart.empty]


def _chart(id: str, title: str, arms: Sequence[Arm], curve: Curve, **options: Any) -> Chart:
    series = []
    for index, arm in enumerate(arms):
        curves = [curve(run) for run in arm.runs.values()]
        steps = sorted(set.intersection(*(set(c) for c in curves)))
        columns = [[v for c in curves if (v := c[step]) is not None and not math.isnan(v)] for step in steps]
        several = len(curves) > 1
        series.append(Series(
            arm.name, steps, numbers(statistics.fmean(c) if c else None for c in columns), CYCLE[index % len(CYCLE)],
            hover=[f"{len(c)} runs" for c in columns] if several else (),
            low=numbers(min(c, default=None) for c in columns) if several else (),
            high=numbers(max(c, default=None) for c in columns) if several else (),
            dash=index >= len(CYCLE),
        ))  # fmt: skip
    caption = "Means over seeds; the band spans them." if any(len(arm.runs) > 1 for arm in arms) else ""
    return Chart(
        id, CURVES, title, tuple(s for s in series if any(v is not None for v in s.y)), caption=caption, **options
    )


def comparison_page(comparison: Comparison, charts: Sequence[Chart]) -> str:
    """The page of a comparison, self-contained."""
    count = sum(len(arm.runs) for arm in comparison.arms)
    payload = {
        "title": f"{count} runs compared",
        "outcome": comparison.outcome,
        "head": [(arm.name, ", ".join(run.name for run in arm.runs.values())) for arm in comparison.arms],
        "sections": sections(comparison.tables, charts),
        "index": None,
        "footer": FOOTER,
    }
    return page(payload, [])
