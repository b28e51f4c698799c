"""What an evaluation shows: a line or a bar while it goes on, and a table at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zppo.evaluate.rows import Row

_EVERY = 30.0  # seconds between lines in a file
_MOST_PARTS = 12  # figures of one benchmark that are shown beside its own


class Watch:
    """The progress of one benchmark: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console, name: str, expected: int) -> None:
        self._console, self._name, self._expected = console, name, expected
        self._counts: Counter[str] = Counter()
        self._done, self._said = 0, time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._expected, counts="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def take(self, row: Row) -> None:
        """Counts a row."""
        self._done += 1
        self._counts[row.by] += 1
        counts = ", ".join(f"{count:,} {by}" for by, count in sorted(self._counts.items()))
        if self._bar:
            self._bar.update(self._task, completed=self._done, counts=counts)
        elif time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            say(self._console, f"{self._name}: {self._done:,} of {self._expected:,} ({counts})")


def say(console: Console, text: str, style: str = "") -> None:
    """A line without markup and control characters: names and reasons come from elsewhere."""
    console.print(Text("".join(c if c.isprintable() else " " for c in text), style=style), soft_wrap=True)


def print_results(console: Console, state: Mapping[str, Any]) -> None:
    """The closing table: whose it is, benchmarks, families, and what was skipped."""
    say(console, f"{state['label']}, judged by {state['settings']['judge']}", "bold")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("benchmark")
    for name in ("score", "±", "rows", "rule", "judge", "no answer", "cut", "open"):
        table.add_column(name, justify="right")
    for each in state["benchmarks"]:
        counts = (each[name] for name in ("rows", "by_rule", "by_judge", "no_answer", "truncated", "open"))
        table.add_row(
            Text(each["name"]), points(each["value"]), points(each["error"]), *(f"{count:,}" for count in counts)
        )
    for name, family in state["families"].items():
        of = f"mean of {len(family['benchmarks'])} {name}"
        table.add_row(Text(of, style="bold"), points(family["value"]), points(family["error"]))
    console.print(table)
    for each in state["benchmarks"]:
        if parts := each["beside"]:
            figures = ", ".join(f"{name[:60]} {points(value)}" for name, value in parts.items())
            if len(parts) > _MOST_PARTS:
                figures = f"{len(parts)} figures of its parts are in eval.json"
            say(console, f"{each['name']}: {figures}", "dim")
    for each in state["skipped"]:
        say(console, f"skipped {each['why']}", "yellow")
    for each in state["benchmarks"]:
        if count := each.get("unreadable", 0):
            what = "1 row is" if count == 1 else f"{count:,} rows are"
            say(
                console,
                f"{each['name']}: {what} no part of it, since unreadable; the first: {each['unreadable_first']}",
                "yellow",
            )
        if count := each.get("left_out", 0):
            say(
                console,
                f"{each['name']}: {count:,} of {each['expected']:,} rows are left out of its figure, since they have pictures and the "
                f"model takes none ({each['why_left_out']})",
                "yellow",
            )
        if count := each.get("too_long", 0):
            say(
                console,
                f"{each['name']}: {count:,} of {each['rows']:,} rows are 0 since their question, with the room for the answer, is too long "
                "for the model's context: serve it with a longer one, or lower --max-tokens (and name another --output)",
                "yellow",
            )
    errors = sum(each["judge_errors"] for each in state["benchmarks"])
    say(
        console,
        "score: percent; ±: standard error, samples of one question counted as one; rule, judge: who decided; cut: stopped by the token "
        f"limit; open: not decided yet, {errors:,} of them since the judge failed",
        "dim",
    )


def points(value: float | None) -> str:
    """0.1234 -> 12.3, a dash where there is no number."""
    return "–" if value is None else f"{100 * value:.1f}"
