"""Requests that wait are decoded together, by one thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from zppo.engines.base import Completion, Engine, SampleRequest, Sampling, Watcher
from zppo.engines.out_of_memory import sample_in_halves

_LINGER, _LONGEST_LINGER = 0.01, 0.1  # seconds without an arrival before a batch starts; seconds in all


class QueueFullError(Exception):
    """Too many requests wait; `retry_after` seconds from now it may be better."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(waiting)
        self.waiting, self.retry_after = waiting, retry_after


class DecodingError(Exception):
    """A request that could not be decoded; the message says why."""


class StoppedError(DecodingError):
    """The server ended first."""


class _Abandoned(BaseException):
    """No client waits for the batch any more. No `Exception`: it must not be taken for a failed batch and tried again in halves."""


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way.

    Attributes:
        future: gets its completions, or `DecodingError`.
        tell: called in the engine's thread with a step, from 0, and the (choice, token) that were drawn. A batch that fails is tried again
            in parts, and tells again from step 0.
        gone: nobody waits for it.
    """

    request: SampleRequest
    sampling: Sampling
    tell: Callable[[int, Sequence[tuple[int, int]]], None] | None = None
    future: Future[list[Completion]] = field(default_factory=Future)
    gone: bool = False


class Batcher:
    """A queue before an engine.

    The oldest request is decoded next, and with it those that wait with the same sampling settings, in order of arrival. Draws are
    keyed by request, so company changes nothing but speed. A batch is finished before the next one starts.

    Args:
        engine: used by one thread only.
        max_rows: completions in a batch; a single request may have more and is left to the engine to split.
        max_tokens: cached tokens in a batch, counted as rows * (longest prompt + new-token limit); None for no limit.
        max_queue: requests that may wait.

    Attributes:
        closed: nothing is decoded any more: `stop` or `close` was called, or the thread ended.
    """

    def __init__(self, engine: Engine, *, max_rows: int, max_tokens: int | None = None, max_queue: int) -> None:
        self._engine, self._max_rows, self._max_tokens, self._max_queue = engine, max_rows, max_tokens, max_queue
        self._waiting: deque[Job] = deque()
        self._batch: list[Job] = []
        self._changed = threading.Condition()
        self.closed = False
        self._seconds = 1.0  # that the last batch took
        self._thread = threading.Thread(target=self._work, name="zppo-serve-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """(requests that wait, requests in the batch)."""
        return len(self._waiting), len(self._batch)

    def submit(
        self, request: SampleRequest, sampling: Sampling, tell: Callable[[int, Sequence[tuple[int, int]]], None] | None = None
    ) -> Job:
        """Queues a request; `tell` is that of its `Job`.

        Raises:
            QueueFullError: `max_queue` requests wait.
            StoppedError: the batcher was closed.
        """
        with self._changed:
            if self.closed:
                raise StoppedError("the server is stopping")
            if len(self._waiting) >= self._max_queue:
                raise QueueFullError(len(self._waiting), min(60, max(1, round(self._seconds))))
            job = Job(request, sampling, tell)
            job.future.set_running_or_notify_cancel()  # from here on only the batcher ends it
            self._waiting.append(job)
            self._changed.notify()
        return job

    def abandon(self, job: Job) -> None:
        """The client went away: a waiting request is dropped; rows in a batch end at the next token, and so does a batch of none else."""
        with self._changed:
            job.gone = True
            waiting = job in self._waiting
            if waiting:
                self._waiting.remove(job)
        if waiting:
            _give_up([job])  # its callbacks tidy up

    def watch(self, seats: Sequence[tuple[SampleRequest, int]]) -> Watcher:
        """For the engine's `watch`: streams are told of their tokens, and rows without a waiting client end."""
        if threading.current_thread() is not self._thread:
            return lambda number, drawn: ()  # somebody else samples
        self.check()
        jobs = {id(job.request): job for job in self._batch}
        owners = [jobs[id(request)] for request, _ in seats]
        streamed = any(job.tell for job in owners)
        ended: set[int] = set()

        def step(number: int, drawn: Callable[[], list[tuple[int, int]]]) -> Collection[int]:
            self.check()
            told: dict[Job, list[tuple[int, int]]] = {}
            for row, token in drawn() if streamed else ():
                told.setdefault(owners[row], []).append((seats[row][1], token))
            for job, tokens in told.items():
                if job.tell is not None and not job.gone:
                    job.tell(number, tokens)
            new = {row for row, job in enumerate(owners) if job.gone} - ended
            ended.update(new)
            return new

        return step

    def check(self) -> None:
        """To be called before every step of the model; ends a batch without a waiting client, by an exception for `_work`."""
        if threading.current_thread() is self._thread and (self.closed or all(job.gone for job in self._batch)):
            raise _Abandoned

    def stop(self) -> None:
        """Ends the thread at the model's next step; requests that are not done fail with `StoppedError`. Safe in a signal handler."""
        self.closed = True

    def close(self, timeout: float | None = None) -> None:
        """`stop`, and wait up to `timeout` seconds until it has happened."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        try:
            while self._take():
                self._decode()
        finally:  # whatever ends the thread: no request is left waiting, and no new one is taken
            with self._changed:
                self.closed = True
                _give_up([*self._batch, *self._waiting])
                self._batch, self._waiting = [], deque()

    def _decode(self) -> None:
        start = time.monotonic()
        try:
            requests = [job.request for job in self._batch]
            outcomes = sample_in_halves(self._engine, requests, self._batch[0].sampling)
        except _Abandoned:  # by its clients, or by the end of the server
            _give_up(self._batch)
            return
        finally:
            self._seconds = time.monotonic() - start
        for job, outcome in zip(self._batch, outcomes, strict=True):
            if isinstance(outcome, str):
                job.future.set_exception(DecodingError(outcome))
            else:
                job.future.set_result(outcome)

    def _take(self) -> bool:
        """Moves the next batch out of the queue; False once the batcher is closed."""
        with self._changed:
            self._batch = []
            while not self._batch:  # all that waited may have gone away meanwhile
                self._changed.wait_for(lambda: self._waiting or self.closed)
                self._linger(lambda: self.closed or sum(len(job.request.keys) for job in self._waiting) >= self._max_rows)
                if self.closed:
                    return False
                self._batch = self._choose()
            for job in self._batch:
                self._waiting.remove(job)
        return True

    def _linger(self, enough: Callable[[], bool]) -> None:
        """Lets requests that arrive at the same moment come in, so that the first of them is not decoded alone."""
        end = time.monotonic() + _LONGEST_LINGER
        while not enough() and time.monotonic() < end:
            count = len(self._waiting)
            self._changed.wait(_LINGER)
            if len(self._waiting) == count:
                return

    def _choose(self) -> list[Job]:
        batch: list[Job] = []
        rows = longest = 0
        for job in self._waiting:
            if batch and job.sampling != batch[0].sampling:
                continue
            rows, longest = rows + len(job.request.keys), max(longest, len(job.request.prompt_ids))
            cached = rows * (longest + job.sampling.max_new_tokens)
            if batch and (rows > self._max_rows or (self._max_tokens is not None and cached > self._max_tokens)):
                break
            batch.append(job)
        return batch


def _give_up(jobs: list[Job]) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(StoppedError("the server is stopping"))
