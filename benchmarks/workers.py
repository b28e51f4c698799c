"""Processes that are measured: each holds one trainer and takes one step when told, while all the others sleep.

Two trainers in one process would share allocator, caches and threads; two runs one after the other would meet different moods of the
machine. So every trainer lives in a process of its own, and the parent lets them step in turn.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Serve = Callable[[Connection, Any], None]
"""What a worker process runs: sends one message when it is ready, then one reply per message."""


class Worker:
    """A process that serves one trainer.

    Args:
        serve: a module-level function.
        config: its argument, pickled.
    """

    def __init__(self, serve: Serve, config: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_guarded, args=(serve, other, config), daemon=True)
        self._process.start()
        other.close()

    def ready(self) -> Any:
        """Waits until it is; what it has to say of itself."""
        return self._receive()

    def ask(self, message: Any) -> Any:
        """Its reply. RuntimeError with its traceback where it failed."""
        self._pipe.send(message)
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            kind, reply = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a worker process ended without a word") from None
        if kind == "failed":
            raise RuntimeError(f"a worker process failed:\n{reply}")
        return reply


@contextlib.contextmanager
def workers(**made: tuple[Serve, Any]) -> Iterator[dict[str, Worker]]:
    """Starts them all at once and waits until all are ready."""
    started = {name: Worker(serve, config) for name, (serve, config) in made.items()}
    try:
        for worker in started.values():
            worker.ready()
        yield started
    finally:
        for worker in started.values():
            worker.close()


def _guarded(serve: Serve, pipe: Connection, config: Any) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)  # trainers talk; what matters comes through the pipe
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    obey(serve, pipe, config)


def obey(serve: Serve, pipe: Connection, config: Any) -> None:
    """Serves until the other end is closed; what goes wrong is sent there."""
    try:
        serve(pipe, config)
    except EOFError:
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(("failed", traceback.format_exc()))


class Stopwatch:
    """Wall and processor seconds of a step and of its parts."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._parts: dict[str, float] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts what happens inside towards `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - began

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted towards `part`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return function(*args, **kwargs)

        return wrapped

    def seconds(self) -> dict[str, float]:
        """Parts, `step` (wall) and `cpu` of the step so far."""
        return {**self._parts, "step": time.perf_counter() - self._wall, "cpu": time.process_time() - self._cpu}


class PeakMemory:
    """Peak resident memory above that of now, bytes; Linux only."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.base = self._read("VmRSS")

    def above(self) -> int:
        """The peak since, above what was resident then."""
        return self._read("VmHWM") - self.base

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
