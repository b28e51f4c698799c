"""What a run shows in the terminal: a live display, or plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from zppo.rollout.evaluation import Evaluation


def warn(console: Console, text: str) -> None:
    """Something that a person should know, in yellow; above the display where there is one."""
    console.print(Text(text, style="yellow"), highlight=False, soft_wrap=True)


def show(console: Console, text: str) -> None:
    """A line of text from elsewhere, as it is."""
    console.print(Text(text), highlight=False, soft_wrap=True)


def show_table(console: Console, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Text in columns."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(Text(name))
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(Whole(table))


class Whole:
    """A table of texts in which no word and no number is cut: what does not fit side by side follows below, each block with the first
    column."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        columns = self.table.columns
        texts = [[str(cell) for cell in (column.header, *column.cells, column.footer)] for column in columns]
        needed = [max(cell_len(word) for text in column for word in text.split() or [""]) for column in texts]
        whole = [max(cell_len(line) for text in column for line in text.splitlines() or [""]) for column in texts]
        between = 2 if self.table.box is None else 3
        width = options.max_width - (0 if self.table.box is None else 1)
        for block in _blocks(needed, width, between):
            widths = _widths([needed[i] for i in block], [whole[i] for i in block], width, between)
            part = copy(self.table)
            part.columns = [
                replace(columns[i], _index=place, width=wide, no_wrap=False, overflow="fold")
                for place, (i, wide) in enumerate(zip(block, widths, strict=True))
            ]
            yield part


def _widths(needed: Sequence[int], whole: Sequence[int], width: int, between: int) -> list[int]:
    """Of columns side by side: what their longest words need, and what is left shared out among those whose cells are longer."""
    widths, spare = list(needed), width - sum(needed) - between * len(needed)
    modest_first = sorted(range(len(needed)), key=lambda i: whole[i] - needed[i])
    for sharers, i in zip(range(len(needed), 0, -1), modest_first, strict=True):
        more = max(0, min(whole[i] - needed[i], spare // sharers))
        widths[i], spare = widths[i] + more, spare - more
    return widths


def _blocks(needed: Sequence[int], width: int, between: int) -> list[list[int]]:
    """Columns that fit side by side without breaking a word; of a wider table several blocks, each with the first column."""
    blocks = [[0]]
    for i in range(1, len(needed)):
        if len(blocks[-1]) > 1 and sum(needed[j] + between for j in [*blocks[-1], i]) > width:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


@contextmanager
def steady_output() -> Iterator[None]:
    """Inside, a standard stream that cannot be written any more costs the display alone: what is behind it goes nowhere from then on.

    The reader of a pipe has gone (`| head`, a `tee` that died), the terminal was closed, the disk of a log file is full. Streams that are
    no files (notebooks) stay as they are.
    """
    with suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # one that was closed at the start would be a file of the run
            pass
        os.close(handle)
    before = sys.stdout, sys.stderr
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        with suppress(OSError, AttributeError, ValueError):
            if stream.fileno() == number:
                setattr(sys, name, _Steady(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Steady):
                stream.flush()
        sys.stdout, sys.stderr = before


class _Steady:
    """A standard stream whose writes do not fail."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._harmless():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._harmless():
            self._stream.flush()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)  # for what other libraries write there, and for what is still in its buffer
            os.close(nowhere)
            if number == 1:
                with suppress(OSError):
                    os.write(2, f"nothing can be shown any more ({error}): the run goes on without a display\n".encode())


@contextmanager
def busy(console: Console, text: str) -> Iterator[None]:
    """Says what goes on inside: beside a spinner that goes away, or as a plain line where there is no terminal."""
    if console.is_terminal:
        with console.status(Text(text, style="dim")):
            yield
    else:
        console.print(f"{text} ...", highlight=False, soft_wrap=True)
        yield


_PARTS = {
    "engine": "giving the sampler the weights",
    "sampling": "sampling",
    "teacher": "asking the teacher",
    "update": "updating the weights",
    "other": "writing",
}
"""Parts of a step in words."""


class Progress:
    """Shows what a run does from its first second to its last evaluation: what it is at, and a table of its steps.

    Args:
        console: where to; a console that is no terminal gets a plain line for each thing that is begun, and one every few seconds.
    """

    PLAIN_LINE_SECONDS = 2.0
    STILL_SECONDS = 30.0
    """Seconds after which something long says in a plain line how far it is."""

    def __init__(self, console: Console) -> None:
        self.console, self.steps, self.replay = console, 0, False
        self.kinds: tuple[str, ...] = ("plain",)
        self._began: tuple[float, int] | None = None
        self._last_line = float("-inf")
        self._evaluates, self._evaluation_seconds = False, 0.0
        self._means: dict[str, float] = {}
        self._steps: dict[str, int] = {}  # behind each mean
        self._table: RenderableType | None = None
        self._at, self._detail, self._since = "", "", time.monotonic()
        self._spinner = Spinner("dots", style="dim")
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True) if live else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Take the display away."""
        if self._live:
            self._live.stop()

    def plan(self, steps: int, kinds: tuple[str, ...], *, replay: bool, evaluates: bool = False) -> None:
        """What the table will show.

        Args:
            steps: steps of the whole run.
            kinds: kinds of prompts whose accuracy is shown, plain first.
            replay: whether there is a buffer to show.
            evaluates: whether the run ends with an evaluation.
        """
        self.steps, self.kinds, self.replay, self._evaluates = steps, kinds, replay, evaluates

    def doing(self, text: str) -> None:
        """Something begins, and what was before has ended."""
        self._begin(text)
        if not self._live:
            self.console.print(Text(f"{text} ..."), highlight=False, soft_wrap=True)

    def at_step(self, step: int) -> None:
        """A step begins; it has no plain line of its own."""
        self._begin(f"step {step}")

    def _begin(self, text: str) -> None:
        self._at, self._detail, self._since = text, "", time.monotonic()

    def part(self, name: str, done: int = 0, total: int = 0) -> None:
        """A part of a step or an evaluation begins, or has come so far. `StepLog` calls it, in any thread."""
        if name not in _PARTS:
            return
        self._detail = _PARTS[name] + (f" {done:,} of {total:,}" if total else "")
        now = time.monotonic()
        if not self._live and now - max(self._since, self._last_line) >= self.STILL_SECONDS:
            self._last_line = now
            self.console.print(self._activity(), highlight=False, soft_wrap=True)

    def _activity(self) -> Text:
        detail = f": {self._detail}" if self._detail else ""
        return Text(f"{self._at}{detail}  {_clock(time.monotonic() - self._since)}", style="dim")

    def _render(self) -> RenderableType:
        parts = [self._table] if self._table is not None else []
        if self._at:
            self._spinner.update(text=self._activity())
            parts.append(self._spinner)
        return Group(*parts)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """A held-out result, of the evaluation that was begun last."""
        self._evaluation_seconds = time.monotonic() - self._since
        levels = "  ".join(f"{name} {value:.3f}" for name, value in result.by_level.items())
        text = f"held-out accuracy at step {step}: {result.accuracy:.3f}  {levels}".rstrip()
        if result.ungraded:
            text += f"  ({result.ungraded:,} of {result.count:,} completions ungraded, left out)"
        self.console.print(Text(text), highlight=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        """Something that a person should know; shown above the display."""
        warn(self.console, text)

    def step(self, step: int, metrics: Mapping[str, Any], totals: Any) -> None:
        """The metrics of a finished step; accuracies are shown as running means over about ten steps."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now - metrics["seconds"]["step"], step - 1)
        for kind, value in metrics["accuracy"].items():
            count = self._steps[kind] = self._steps.get(kind, 0) + 1
            before = self._means.get(kind, 0.0)
            # Weights that fall by a tenth a step, over their sum: the first step alone does not set where the mean begins.
            self._means[kind] = before + 0.1 / (1 - 0.9**count) * (value - before)
        per_step = (now - self._began[0]) / (step - self._began[1])
        left = self._left(step, per_step)
        facts = self._facts(metrics, totals)
        if self._live:
            self._table = self._panel(step, left, facts)
        elif now - self._last_line >= self.PLAIN_LINE_SECONDS or step == self.steps:
            self._last_line = now
            line = "  ".join(f"{name} {value}" for name, value in facts)
            self.console.print(Text(f"step {step}/{self.steps}  {line}  {left}"), highlight=False, soft_wrap=True)

    def _left(self, step: int, per_step: float) -> str:
        """How long the run still takes, its last evaluation counted as long as the newest one."""
        seconds = (self.steps - step) * per_step + self._evaluation_seconds * self._evaluates
        if not self._evaluates or (step < self.steps and self._evaluation_seconds):
            return f"left {_clock(seconds)}"
        if step == self.steps:
            return "left: the last evaluation" + (f", {_clock(seconds)}" if self._evaluation_seconds else "")
        return f"left {_clock(seconds)} and the last evaluation"

    def _facts(self, metrics: Mapping[str, Any], totals: Any) -> list[tuple[str, str]]:
        facts = [(kind, f"{self._means[kind]:.2f}" if kind in self._means else "-") for kind in self.kinds]
        if self.replay:
            facts.append(("buffer", str(metrics["buffer"])))
            facts.append(("graduated", f"{sum(totals.graduated.values())}/{sum(totals.admitted.values())}"))
            facts.append(("evicted", str(sum(totals.evicted.values()))))
        if "groups" in metrics:  # by advantages
            live, of = metrics["groups_with_gradient"], metrics["groups"]
            facts.append(("gradient", f"{live} of {of}" if live else f"none of {of}"))
        facts.append(("tokens/s", f"{metrics['tokens_per_second']:,.0f}"))
        return facts

    def _panel(self, step: int, left: str, facts: list[tuple[str, str]]) -> RenderableType:
        table = Table.grid(padding=(0, 3))
        for _ in facts:
            table.add_column(justify="left")
        table.add_row(*(Text(name, style="dim") for name, _ in facts))
        table.add_row(*(Text(value, style="bold") for _, value in facts))
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(f"step {step}/{self.steps}"), ProgressBar(total=max(1, self.steps), completed=step, width=40), Text(left))
        return Group(head, table)


def _clock(seconds: float) -> str:
    """12 -> "0:12", 3723 -> "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
