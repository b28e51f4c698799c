"""One log goes through a step, from the first rollout to the last optimizer step: counts, seconds, warnings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class StepLog:
    """What one step (or one evaluation) has counted so far. It goes through the step and ends with it, so nothing has to be reset.

    Attributes:
        step: its number, which keys the step's draws. An evaluation has 0, so that its draws do not depend on when it is made.
        counts: numbers by name, the same in all processes that train together (but for the time that each waited for the teacher).
        own: numbers of this process's share; `Processes.gather_log` adds them up over the processes, into `counts`.
        seconds: by part of the step.
        warnings: what a person should know, by subject; of this process.
        errors: why the teacher, or the judge, could not serve a request (the last such reason).
        example: a right answer and a wrong one that was given, beside each other; "" where there is none.
        fault: why the run has to stop after this step; "" where it goes on.
        metrics: the line of metrics.jsonl, once the step is finished.
        watch: told what the step is at: a part, how much of it is done, of how much (0 where nobody counts).
    """

    step: int = 0
    counts: dict[str, float | None] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    example: str = ""
    fault: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    watch: Callable[[str, int, int], None] | None = None
    _known: dict[str, dict[Any, Any]] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def add(self, **counts: float) -> None:
        """Add to `counts`."""
        for name, value in counts.items():
            self.counts[name] = (self.counts.get(name) or 0.0) + value

    def add_own(self, **counts: float) -> None:
        """Add to `own`."""
        for name, value in counts.items():
            self.own[name] = self.own.get(name, 0.0) + value

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Count what happens inside towards a part of the step."""
        began = time.perf_counter()
        self.tell(part)
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def tell(self, part: str, done: int = 0, total: int = 0) -> None:
        """Tell `watch` what the step is at."""
        if self.watch is not None:
            with suppress(Exception):  # a step is worth more than what is shown of it
                self.watch(part, done, total)

    def elapsed(self) -> dict[str, float]:
        """Seconds by part, and of the whole step up to now."""
        return {**self.seconds, "step": time.perf_counter() - self._began}

    def note_error(self, who: str, reason: str) -> None:
        """Note why a request was not served; "" where it was."""
        if reason:
            self.errors[who] = reason

    def known(self, what: str) -> dict[Any, Any]:
        """What this step has worked out already and need not ask again: summaries, verdicts."""
        return self._known.setdefault(what, {})

    def resume_clock(self, seconds: Mapping[str, float]) -> None:
        """Start the clocks where those of a stopped step were."""
        self.seconds = {part: spent for part, spent in seconds.items() if part != "step"}
        self._began = time.perf_counter() - seconds.get("step", 0.0)
