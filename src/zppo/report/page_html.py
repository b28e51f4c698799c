"""One self-contained HTML page: data, styles, plotly and our scripts in one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from zppo import __version__
from zppo.report.charts import Chart
from zppo.report.load import RECIPE
from zppo.report.questions import stratified, to_index
from zppo.report.stories import load_stories, trimmed
from zppo.report.summary import Summary
from zppo.report.tables import Table
from zppo.report.thumbnails import with_images

MOST_STORIES = 300
MOST_BYTES = 25_000_000
FOOTER = (
    "Made by zppo from the files of the run. Charts: plotly.js, MIT licence. Rows of the paper: arXiv 2606.18216. "
    "In the charts drag to zoom, double-click to go back."
)


def report_page(summary: Summary, *, most_stories: int = MOST_STORIES, most_bytes: int = MOST_BYTES) -> str:
    """The page of a run as a file, with at most so many stories, and at most so many bytes in all as far as stories decide it."""
    chosen = stratified(summary.lines.values(), most_stories)
    left = most_bytes - len(page(_payload(summary, [], ""), []).encode()) - 1000 * len(chosen)
    share = max(20_000, 4 * left // max(1, len(chosen)))  # one long story may take four times its share
    loaded = load_stories(summary.run, {line.id: line.steps for line in chosen})
    index, stories = [], []
    for line in chosen:
        text = script_json(trimmed(with_images(loaded[line.id], share // 2), share))
        if (size := len(text.encode())) > left:
            continue
        left -= size
        index.append(to_index(line, summary.run))
        stories.append(text)
    note = (
        f"This file holds {len(stories):,} of the run's {len(summary.lines):,} questions, spread over kinds of prompts, entry bins and "
        f"audit classes (at most {most_stories:,}, and {most_bytes / 1e6:,.0f} MB in all). zppo report RUN --watch shows every question, "
        "zppo inspect RUN QUESTION_ID one of them in the terminal."
    )
    return page(_payload(summary, index, note), stories)


def watch_payload(summary: Summary, stamp: str) -> dict[str, Any]:
    """What the page of a run that goes on asks its server for: everything but the stories, and every question."""
    note = f"All {len(summary.lines):,} questions that were asked so far; stories are read from the rollout files."
    index = [to_index(line, summary.run) for line in summary.lines.values()]
    return {**_payload(summary, index, note), "stamp": stamp, "finished": summary.run.finished}


def _payload(summary: Summary, index: Sequence[Mapping[str, Any]], note: str) -> dict[str, Any]:
    return {
        "title": summary.run.name,
        "outcome": summary.outcome,
        "head": list(summary.head.items()),
        "sections": sections(summary.tables, summary.charts),
        "index": index,
        "questions": len(summary.lines),
        "note": note,
        "recipe": (summary.run.folder / RECIPE).read_text(encoding="utf-8"),
        "footer": FOOTER,
    }


def sections(tables: Sequence[Table], charts: Sequence[Chart]) -> list[dict[str, Any]]:
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
    return (
        json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .encode("utf-8", "replace")
        .decode()
    )


def page(data: Mapping[str, Any], stories: Sequence[str], mode: str = "file") -> str:
    """The page.

    Args:
        data: what charts.js draws.
        stories: JSON texts of `script_json`, in the order of the payload's index.
        mode: "file" holds its stories; "watch" asks a server for them and for news.
    """
    from plotly.offline import get_plotlyjs

    folder = files("zppo.report") / "page"
    scripts = [(folder / name).read_text(encoding="utf-8") for name in ("charts.js", "stories.js", "start.js")]
    plotly = get_plotlyjs()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((folder / "page.html").read_text(encoding="utf-8")).render(
        title=data["title"],
        mode=mode,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        connect=Markup("'self'" if mode == "watch" else "'none'"),
        hashes=Markup(" ".join(map(_hash, (plotly, *scripts)))),
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        data=Markup(script_json(data)),
        stories=map(Markup, stories),
        plotly=Markup(plotly),
        scripts=list(map(Markup, scripts)),
    )


def _hash(script: str) -> str:
    """A script as a content security policy names it: nothing else runs on the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
