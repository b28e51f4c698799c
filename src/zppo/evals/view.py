"""What an evaluation prints: a bar or lines while it goes on, a table at its end, and with --dry-run what it would cost.

That estimate is made from what the registry knows: nothing is asked and nothing is fetched.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zppo.errors import DataError, one_line
from zppo.evals.benchmark import Benchmark, Family
from zppo.evals.benchmark_rows import load_items
from zppo.evals.item import Item
from zppo.evals.options import EvalOptions
from zppo.evals.results import SampleResult
from zppo.runs.display import Whole

_EVERY = 30.0  # seconds between lines in a file
_MOST_PARTS = 12  # figures of one benchmark that are shown next to its own


class ProgressDisplay:
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def take(self, row: SampleResult) -> None:
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
    judge = state["settings"]["judge"]
    title = state["label"] + (f", judged by {judge}" if judge else ", no judge")
    if any(each["family"] == "video" for each in state["benchmarks"]):
        title += ", clips whole" if state["settings"]["video"] == "file" else f", clips as {state['settings']['frames']} pictures"
    say(console, title, "bold")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("benchmark")
    often = any(each.get("at_k") for each in state["benchmarks"])
    at_k = ("k", "pass@k", "maj@k") if often else ()
    for name in ("score", "±", "by box", *at_k, "rows", "rule", "judge", "no box", "cut", "open"):
        table.add_column(name, justify="right")
    for each in state["benchmarks"]:
        counts = (each[name] for name in ("rows", "by_rule", "by_judge", "no_answer", "truncated", "open"))
        shown = (points(each[name]) for name in ("value", "error", "by_box"))
        several = each.get("at_k")
        sampled = (str(each["samples"]), *(points(several[name]) for name in ("pass", "maj"))) if several else ("1", "", "")
        table.add_row(Text(each["name"]), *shown, *sampled[: len(at_k)], *(f"{count:,}" for count in counts))
    for name, family in state["families"].items():
        of = f"mean of {len(family['benchmarks'])} {name}"
        table.add_row(Text(of, style="bold"), *(points(family[name]) for name in ("value", "error", "by_box")))
    console.print(Whole(table))
    for each in state["benchmarks"]:
        if parts := each["beside"]:
            figures = ", ".join(f"{name[:60]} {points(value)}" for name, value in parts.items())
            if len(parts) > _MOST_PARTS:
                figures = f"{len(parts)} figures of its parts are in eval.json"
            say(console, f"{each['name']}: {figures}", "dim")
    for each in state["skipped"]:
        say(console, f"skipped {each['why']}", "yellow")
    for each in state["benchmarks"]:
        for warning in _warnings(each):
            say(console, f"{each['name']}: {warning}", "yellow")
    if often:
        say(
            console,
            "k: answers to each question; score is then avg@k, their mean; pass@k: one of them is right; maj@k: the one that most of them "
            "give is right",
            "dim",
        )
    errors = sum(each["judge_errors"] for each in state["benchmarks"])
    say(
        console,
        "score: percent; ±: standard error, samples of one question counted as one; by box: 0 for a reply without a box that can be read "
        "(no box), which a judge may find right; rule, judge: who decided; cut: stopped by the token limit; open: not decided yet, "
        f"{errors:,} of them since the judge failed",
        "dim",
    )


def _warnings(each: Mapping[str, Any]) -> list[str]:
    """What must be known beside a benchmark's figure: rows that are no part of it, or 0 for a reason of their own."""
    warnings = []
    if count := each.get("unreadable", 0):
        what = "1 row is" if count == 1 else f"{count:,} rows are"
        warnings.append(f"{what} no part of it, since unreadable; the first: {each['unreadable_first']}")
    if count := each.get("missing", 0):
        what = "1 question is" if count == 1 else f"{count:,} questions are"
        warnings.append(f"{what} no part of it, since a clip or picture is missing; the first: {each['missing_first']}")
    if count := each.get("left_out", 0):
        of = f"{count:,} of {each['expected']:,} rows are left out of its figure"
        warnings.append(f"{of}, since they have pictures and the model takes none ({each['why_left_out']})")
    if count := each.get("malformed", 0):
        warnings.append(
            f"{count:,} of {each['rows']:,} rows are 0 since the judge's verdict was malformed, and again after a reminder: "
            f"{_names(each['malformed_rows'])}; --strict judges them again"
        )
    if count := each.get("broken", 0):
        warnings.append(
            f"{count:,} of {each['rows']:,} rows are 0 since a clip or picture cannot be decoded: {_names(each['broken_rows'])} "
            f"({each['why_broken']}); --strict keeps them open"
        )
    if count := each.get("too_long", 0):
        warnings.append(
            f"{count:,} of {each['rows']:,} rows are 0 since their question, with the room for the answer, is too long "
            "for the model's context: serve it with a longer one, or lower --max-tokens (and name another --output)"
        )
    return warnings


def _names(ids: Sequence[str], most: int = 5) -> str:
    return ", ".join(ids[:most]) + ", ..." * (len(ids) > most)


def points(value: float | None) -> str:
    """0.1234 -> 12.3, a dash where there is no number."""
    return "–" if value is None else f"{100 * value:.1f}"


TEXT_TOKENS: Mapping[Family, int] = MappingProxyType({"vlm": 250, "llm": 350, "video": 250, "own": 350})
IMAGE_TOKENS = 800
"""Of a picture: the protocol's limits are 256 and 1,280 tokens of 32 x 32 pixels."""
FRAME_TOKENS = 300
"""Of a picture of a clip, which is mostly small."""
ANSWER_TOKENS = 3_000
"""Of an answer; the limit is 12,288, and models that think long come near it."""
JUDGED_SHARE = 0.15
"""Of rows with rules of their own; those of a benchmark with its own judge count whole."""
JUDGE_TOKENS = 700
ANSWER_SPEED, PROMPT_SPEED = 5_000, 50_000
"""Tokens a second of one GPU of 80 GB with a model of 2B and vLLM under load: assumed, not measured."""
_SUBTITLES = 4_000  # tokens of all subtitles of a clip


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one benchmark would take; tokens of all its rows."""

    benchmark: Benchmark
    rows: int | None
    images: int
    tokens_in: int
    tokens_out: int
    judge_tokens: int
    note: str

    @property
    def hours(self) -> float:
        """On one GPU, at the assumed speeds; the judge's own time is not in it."""
        return (self.tokens_out / ANSWER_SPEED + self.tokens_in / PROMPT_SPEED) / 3600


def estimate_benchmark(benchmark: Benchmark, options: EvalOptions) -> Estimate:
    """The estimate of one benchmark: its rows counted where they are on this machine, else as the registry has it."""
    note = "gated: accept its terms and log in" if benchmark.gated else ""
    items: Sequence[Item] | None = None
    if options.data is not None or benchmark.reader is not None:
        try:
            loaded = load_items(benchmark, options.data, clips=options.clips, limit=options.limit)
            items, bad = loaded.items, loaded.unreadable or loaded.missing
            what = "unreadable" if loaded.unreadable else "without their clip"
            first = bad[0][:100].removeprefix(f"{benchmark.name}, ").removeprefix(f"{benchmark.name}: ") if bad else ""
            note = f"{len(bad):,} {'row' if len(bad) == 1 else 'rows'} {what}: {first}" if bad else ""
        except DataError as error:  # it would be skipped
            note = one_line(error, 100).removeprefix(f"{benchmark.name}: ")
            return Estimate(benchmark, None, 0, 0, 0, 0, note)
    rows = len(items) if items is not None else benchmark.rows
    if rows is None:
        rows, note = 5_000, f"{note}; rows not counted, 5,000 taken".removeprefix("; ")
    if items is None and options.limit is not None:
        rows = min(rows, options.limit)
    samples = options.samples_of(benchmark.name)
    asked = rows * samples
    if items is not None:
        pictures = sum(len(i.images) + (min(options.frames, len(i.frames)) if i.frames else options.frames * bool(i.video)) for i in items)
        text = sum(len(i.asked) for i in items) // 4 + 60 * len(items)
    else:
        pictures = rows * {"vlm": 1, "llm": 0, "video": options.frames, "own": 0}[benchmark.family]
        text = rows * (TEXT_TOKENS[benchmark.family] + (_SUBTITLES if benchmark.name == "VMMES" else 0))
    share = 0.0 if not benchmark.judged else JUDGED_SHARE if benchmark.judge == "judge" else 1.0
    return Estimate(
        benchmark,
        rows,
        pictures * samples,
        (text + pictures * (FRAME_TOKENS if benchmark.family == "video" else IMAGE_TOKENS)) * samples,
        asked * min(ANSWER_TOKENS, options.max_tokens),
        int(asked * share * JUDGE_TOKENS),
        note,
    )


def print_estimates(console: Console, estimates: Sequence[Estimate], options: EvalOptions) -> None:
    """The plan of `--dry-run`, with its assumptions."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("benchmark")
    for name in ("rows", "images", "prompts", "answers", "judge", "GPU hours"):
        table.add_column(name, justify="right")
    notes: dict[str, list[str]] = {}
    for e in estimates:
        rows = "?" if e.rows is None else f"{e.rows:,}"
        numbers = (f"{e.images:,}", *map(_millions, (e.tokens_in, e.tokens_out, e.judge_tokens)))
        table.add_row(e.benchmark.name, rows, *numbers, f"{e.hours:.2f}")
        if e.note:
            notes.setdefault(e.note, []).append(e.benchmark.name)
    often = " or ".join(map(str, sorted({options.samples_of(e.benchmark.name) for e in estimates})))
    totals = [sum(getattr(e, name) for e in estimates) for name in ("images", "tokens_in", "tokens_out", "judge_tokens")]
    whole = f"{sum(e.rows or 0 for e in estimates):,}"
    hours = f"{sum(e.hours for e in estimates):.1f}"
    table.add_row(Text("all", style="bold"), whole, f"{totals[0]:,}", *map(_millions, totals[1:]), hours)
    console.print(Whole(table))
    for note, names in notes.items():
        say(console, f"{', '.join(names)}: {note}", "yellow")
    say(
        console,
        f"M: millions of tokens. Assumed: answers of {min(ANSWER_TOKENS, options.max_tokens):,} tokens, {often} a question; "
        f"pictures of {IMAGE_TOKENS} tokens, {options.frames} of {FRAME_TOKENS} for a clip; the shared judge asked about "
        f"{JUDGED_SHARE:.0%} of rows, a benchmark's own about all, {JUDGE_TOKENS} tokens each; {ANSWER_SPEED:,} answer and "
        f"{PROMPT_SPEED:,} prompt tokens a second, which one GPU of 80 GB may do with a model of 2B under vLLM (not measured). "
        "Nothing was asked.",
        "dim",
    )


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.2f} M"
