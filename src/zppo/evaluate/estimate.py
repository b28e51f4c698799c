"""What an evaluation would cost, from what the registry knows; nothing is asked and nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zppo.errors import DataError, one_line
from zppo.evaluate.benchmark import Benchmark, Family
from zppo.evaluate.item import Item
from zppo.evaluate.load import load_items
from zppo.evaluate.protocol import EvalOptions
from zppo.evaluate.view import say

TEXT_TOKENS: Mapping[Family, int] = MappingProxyType({"vlm": 250, "llm": 350, "video": 250})
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


def estimate(benchmark: Benchmark, options: EvalOptions) -> Estimate:
    """The estimate of one benchmark: its rows counted where `--data` has them, else as the registry has it."""
    note = "gated: accept its terms and log in" if benchmark.gated else ""
    items: Sequence[Item] | None = None
    if options.data is not None:
        try:
            loaded = load_items(benchmark, options.data, clips=options.clips, limit=options.limit)
            items, bad = loaded.items, loaded.unreadable
            note = (
                f"{len(bad):,} {'row' if len(bad) == 1 else 'rows'} unreadable: {bad[0][:100].removeprefix(f'{benchmark.name}, ')}"
                if bad
                else ""
            )
        except DataError as error:  # it would be skipped
            note = one_line(error, 100).removeprefix(f"{benchmark.name}: ")
            return Estimate(benchmark, None, 0, 0, 0, 0, note)
    rows = len(items) if items is not None else benchmark.rows
    if rows is None:
        rows, note = 5_000, f"{note}; rows not counted, 5,000 taken".removeprefix("; ")
    if items is None and options.limit is not None:
        rows = min(rows, options.limit)
    asked = rows * options.samples
    if items is not None:
        pictures = sum(
            len(i.images) + (min(options.frames, len(i.frames)) if i.frames else options.frames * bool(i.video))
            for i in items
        )
        text = sum(len(i.asked) for i in items) // 4 + 60 * len(items)
    else:
        pictures = rows * {"vlm": 1, "llm": 0, "video": options.frames}[benchmark.family]
        text = rows * (TEXT_TOKENS[benchmark.family] + (_SUBTITLES if benchmark.name == "VMMES" else 0))
    share = JUDGED_SHARE if benchmark.judge == "judge" else 1.0
    return Estimate(
        benchmark,
        rows,
        pictures * options.samples,
        (text + pictures * (FRAME_TOKENS if benchmark.family == "video" else IMAGE_TOKENS)) * options.samples,
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
    totals = [
        sum(getattr(e, name) for e in estimates) for name in ("images", "tokens_in", "tokens_out", "judge_tokens")
    ]
    whole = f"{sum(e.rows or 0 for e in estimates):,}"
    hours = f"{sum(e.hours for e in estimates):.1f}"
    table.add_row(Text("all", style="bold"), whole, f"{totals[0]:,}", *map(_millions, totals[1:]), hours)
    console.print(table)
    for note, names in notes.items():
        say(console, f"{', '.join(names)}: {note}", "yellow")
    say(
        console,
        f"M: millions of tokens. Assumed: answers of {min(ANSWER_TOKENS, options.max_tokens):,} tokens, {options.samples} a question; "
        f"pictures of {IMAGE_TOKENS} tokens, {options.frames} of {FRAME_TOKENS} for a clip; the shared judge asked about "
        f"{JUDGED_SHARE:.0%} of rows, a benchmark's own about all, {JUDGE_TOKENS} tokens each; {ANSWER_SPEED:,} answer and "
        f"{PROMPT_SPEED:,} prompt tokens a second, which one GPU of 80 GB may do with a model of 2B under vLLM (not measured). "
        "Nothing was asked.",
        "dim",
    )


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.2f} M"
