"""Killable workers for answers that need algebra: the pool as its callers use it, and the host process that owns the workers.

The caller's side starts a host, asks it over pipes, gives up in time and starts another one; it is safe in threads and after a fork. Why a
process between caller and workers: workers must not inherit what the caller has loaded (torch, a CUDA context), must not run the caller's
main script again, must start from any thread and from daemonic processes, and must end with their caller. The host reads JSON lines,
`{"id", "gold", "answer", "rounded_golds", "timeout"}` or `{"id", "pattern", "text", "timeout"}`, and writes JSON lines, `{"ready": true}`
once, then `{"id", "outcome"}`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, TypeVar

from zppo.errors import ZPPOError

_START_LIMIT = 60.0  # seconds for the libraries to load on a machine that is busy
_SLACK = 0.7  # seconds beyond a deadline after which a host that is silent counts as hung
_LEAST_TIME = 2.0  # seconds that an answer gets however long the start took
_END_LIMIT = 3.0  # seconds for a host to stop its workers
DEADLINE = 3.0  # seconds for one answer
MEMORY_LIMIT = 1 << 30  # bytes of address space for a worker; sympy itself needs about a fifth of it
LITTLE = 0.2  # of the deadline
_IN_A_GROUP = 2  # time-outs of one group after which its other answers are not tried
IN_A_STEP = 8  # time-outs per worker after which answers get little time, and a group one time-out
_STARTS = 3  # hosts that one question may see end before it counts as an error
_TASKS_PER_WORKER = 1000  # then a fresh worker takes its place: caches of sympy only grow
_WORKER_MODULE = "zppo.grading.worker"
_COMMAND = (
    "import sys; sys.path[:0] = sys.argv[3:]; from zppo.grading.workers import run_host; "
    "run_host(workers=int(sys.argv[1]), memory_limit=int(sys.argv[2]))"
)


FOUND = "="
"""How the outcome of a search begins that found something, which follows."""

Row = TypeVar("Row", bound=Hashable)


@dataclass(slots=True)
class TimeOuts:
    """The time-outs of one step: what bounds the time that hostile answers can take, without a clock [zppo].

    What is tried depends on the answers of the step, their order and which of them time out, not on what is remembered from earlier
    steps; and, as long as the step has few time-outs, not on how the answers come in calls.

    Attributes:
        asked: (group, what a worker was asked) -> outcome.
        by_group: time-outs by group.
        untried: answers that were wrong at once, because their group had taken too long already.
    """

    asked: dict[tuple[Hashable, tuple[str, str]], str] = field(default_factory=dict)
    by_group: Counter[Hashable] = field(default_factory=Counter)
    untried: int = 0

    @property
    def total(self) -> int:
        """Time-outs of all groups."""
        return self.by_group.total()

    def note(self, group: Hashable, asked: tuple[str, str], outcome: str) -> None:
        """Take note of an outcome; what was asked about already counts once."""
        if (group, asked) not in self.asked:
            self.asked[group, asked] = outcome
            self.by_group[group] += outcome == "timeout"

    def next_wave(self, waiting: Iterable[tuple[Row, Hashable]], in_a_step: int) -> tuple[list[Row], list[Row]]:
        """The rows that are asked about at the same time, and those that are not tried, which are counted.

        An answer is tried if fewer than `_IN_A_GROUP` of those of its group before it timed out. So at most as many of a group are asked
        about at once as may still time out, and of all of them as many as the step may have.

        Args:
            waiting: rows that take a worker, with their groups, in order.
            in_a_step: time-outs after which a group has one.
        """
        room = in_a_step - self.total
        each = _IN_A_GROUP if room > 0 else 1
        wave, given_up, asked = list[Row](), list[Row](), dict[Hashable, int]()
        for row, group in waiting:
            if len(wave) >= room > 0:
                break
            left = each - self.by_group[group]
            if left <= 0:
                given_up.append(row)
            elif asked.get(group, 0) < left:
                asked[group] = asked.get(group, 0) + 1
                wave.append(row)
        self.untried += len(given_up)
        return wave, given_up


class _HostEndedError(Exception):
    """The host process ended with questions open."""


class _Host:
    """One running host process and the questions that it has not answered yet."""

    def __init__(self, workers: int, memory_limit: int) -> None:
        self.owner = os.getpid()
        self.heard = time.monotonic()  # when it last sent a reply, or was last idle
        self._open: dict[int, Future[str]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._alive = True
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        paths = [p for p in sys.path if p]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(workers), str(memory_limit), *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C in a terminal is the caller's to handle
        )
        threading.Thread(target=self._listen, name="zppo-grading", daemon=True).start()
        self._ready.wait(_START_LIMIT)
        if not self._alive or not self._ready.is_set():
            self.close()
            raise ZPPOError(
                f"the grading worker did not start with {sys.executable!r}: {self._last_words()}. "
                "Check that latex2sympy2_extended and pebble import in this environment and that memory is left."
            )

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    @property
    def usable(self) -> bool:
        return self._alive and os.getpid() == self.owner

    def _listen(self) -> None:
        """Reader thread: hand each reply to the call that waits for it; at the end wake all of them."""
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdout as replies:
            for line in replies:
                message = json.loads(line)
                self.heard = time.monotonic()
                if "ready" in message:
                    self._ready.set()
                    continue
                with self._lock:
                    future = self._open.pop(message["id"], None)
                if future is not None:
                    future.set_result(message["outcome"])
        with self._lock:
            self._alive = False
            orphans, self._open = list(self._open.values()), {}
        for future in orphans:
            future.set_exception(_HostEndedError())
        self._ready.set()

    def ask(self, task: Mapping[str, Any], timeout: float) -> Future[str]:
        """Send one question; the future holds "equal", "different", what was found, "timeout" or "error"."""
        future: Future[str] = Future()
        with self._lock:
            if not self._alive:
                raise _HostEndedError
            self._count += 1
            if not self._open:
                self.heard = time.monotonic()
            self._open[self._count] = future
            request = {"id": self._count, **task, "timeout": timeout}
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
                self._process.stdin.flush()
            except (OSError, ValueError) as error:
                self._open.pop(self._count, None)
                raise _HostEndedError from error
        return future

    def close(self, kill: bool = False) -> None:
        """End the process, and its workers with it; calls that wait get an error. In a forked child: leave the parent's alone."""
        if os.getpid() != self.owner:
            return
        if kill:
            self._process.kill()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()  # the host stops its workers and ends
        try:
            self._process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class WorkerPool:
    """Killable workers for what the typed rules leave open.

    Args:
        deadline: seconds that one answer may take.
        workers: processes.
        memory_limit: address space of each, bytes.
        rounded_golds: see `zppo.grading.equality.compare`.
    """

    def __init__(self, deadline: float, workers: int, memory_limit: int, rounded_golds: bool = True) -> None:
        self._deadline = deadline
        self._rounded_golds = rounded_golds
        self._workers = workers
        self._memory_limit = memory_limit
        self._current: _Host | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def _host(self) -> _Host:
        """The running host; started on first use, after its end, and in a forked child."""
        if self._pid != os.getpid():  # a fork may have copied the lock while another thread held it
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            if self._current is None or not self._current.usable:
                self._current = _Host(self._workers, self._memory_limit)
                weakref.finalize(self, self._current.close)  # also when the interpreter ends
            return self._current

    def _drop(self, host: _Host) -> None:
        with self._lock:
            if self._current is host:
                self._current = None
        host.close(kill=True)

    def _wait(self, host: _Host, future: Future[str]) -> str:
        """Outcome of `future`. A host without a reply for longer than a deadline is killed, and the answer timed out."""
        while True:
            patience = host.heard + self._deadline + _SLACK - time.monotonic()
            try:
                return future.result(timeout=max(patience, 0.01))
            except FutureTimeoutError:
                if time.monotonic() >= host.heard + self._deadline + _SLACK:
                    self._drop(host)
                    return "timeout"

    def compare(self, pairs: Sequence[tuple[str, str]], part: float = 1.0) -> list[str]:
        """For each (gold, answer), in order: "equal", "different", "timeout", or "error" where the worker died.

        Args:
            pairs: what is compared.
            part: of the deadline that each may take.

        Raises:
            ZPPOError: workers cannot be started at all.
        """
        return self._ask([{"gold": gold, "answer": answer, "rounded_golds": self._rounded_golds} for gold, answer in pairs], part)

    def search(self, pattern: str, texts: Sequence[str], part: float = 1.0) -> list[str]:
        """For each text, in order: `FOUND` and what the group of the pattern's last match holds, "none", "timeout" or "error".

        Args, Raises: as of `compare`.
        """
        return self._ask([{"pattern": pattern, "text": text} for text in texts], part)

    def _ask(self, tasks: Sequence[Mapping[str, Any]], part: float) -> list[str]:
        outcomes: list[str] = ["error"] * len(tasks)
        left = list(range(len(tasks)))
        for _ in range(_STARTS):
            began = time.monotonic()
            host = self._host()
            deadline = part * self._deadline
            timeout = max(min(_LEAST_TIME, deadline), deadline - (time.monotonic() - began))
            asked: list[tuple[int, Future[str]]] = []
            try:
                for index in left:
                    asked.append((index, host.ask(tasks[index], timeout)))
            except _HostEndedError:
                self._drop(host)  # else the next round could meet the same host, whose end its listener has yet to see
            for index, future in asked:
                with contextlib.suppress(_HostEndedError):
                    outcomes[index] = self._wait(host, future)
                    left.remove(index)
            if not left:
                break
        return outcomes

    def close(self) -> None:
        """End the workers. The pool can be used again; it then starts new ones."""
        with self._lock:
            host, self._current = self._current, None
        if host is not None:
            host.close()


def _start_worker(memory_limit: int) -> None:
    from zppo.grading.worker import limit_worker  # imported by the workers only: the host does not load sympy

    limit_worker(memory_limit)


def _compare(gold: str, answer: str, rounded_golds: bool, deadline: float) -> bool:
    from zppo.grading.worker import compare_in_worker

    return compare_in_worker(gold, answer, rounded_golds, deadline)


def _search(pattern: str, text: str, deadline: float) -> str | None:
    from zppo.grading.worker import search_in_worker

    return search_in_worker(pattern, text, deadline)


def _context() -> Any:
    """Fork from a server that has the libraries loaded: a killed worker is replaced within milliseconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_WORKER_MODULE])
    return context


def _outcome(future: Future[Any]) -> str:
    """The word for the verdict of a finished task."""
    if future.cancelled():
        return "error"
    error = future.exception()
    if error is None:
        result = future.result()
        if isinstance(result, bool):
            return "equal" if result else "different"
        return "none" if result is None else f"{FOUND}{result}"
    return "timeout" if isinstance(error, FutureTimeoutError) else "error"


def run_host(workers: int, memory_limit: int) -> None:
    """The host process: answers requests on standard input until it closes, then end the workers. Never returns.

    Args:
        workers: number of worker processes.
        memory_limit: address space of each, bytes.
    """
    from pebble import ProcessPool  # by the host only: callers do without

    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # workers inherit 0 and 1: they must not hold the caller's pipes
    os.dup2(2, 1)
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    lock = threading.Lock()

    def reply(message: dict[str, Any]) -> None:
        with lock:
            replies.write(json.dumps(message).encode("ascii") + b"\n")
            replies.flush()

    def answered(number: int, done: Future[Any]) -> None:
        reply({"id": number, "outcome": _outcome(done)})

    pool = ProcessPool(workers, _TASKS_PER_WORKER, _start_worker, (memory_limit,), _context())
    pool.schedule(bool).result()  # a worker answers
    reply({"ready": True})

    for line in requests:
        request = json.loads(line)
        names = ("pattern", "text") if "pattern" in request else ("gold", "answer", "rounded_golds")
        arguments = (*(request[name] for name in names), request["timeout"])
        try:
            future = pool.schedule(_search if "pattern" in request else _compare, arguments, timeout=request["timeout"])
        except RuntimeError:
            break  # the pool broke: ending tells the caller, who starts another host
        future.add_done_callback(partial(answered, request["id"]))
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join(timeout=1)
    os._exit(0)  # nothing of a hostile task may delay the end
