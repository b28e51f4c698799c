"""Work that goes on beside the sampling: a queue, and the threads that work it off."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from zppo.teacher.base import Cancelled

T = TypeVar("T")

LEAVE_SECONDS = 1.0
"""A run that ends by an error waits so long for its threads; they are daemons."""


class Lane(Generic[T]):
    """Threads that work off what is put in, first come first served.

    What a thread raises is kept, nothing further is begun, and the next call of `put`, `drain` or `check` raises it in the caller's
    thread: an error in the background ends the run as one in the foreground does. `Cancelled` ends one call of `work` and is no error.

    Args:
        name: of the threads.
        work: takes what waits, at most `most` items of it at once.
        threads: most calls of `work` at the same time.
        most: None for all that waits.
    """

    def __init__(
        self, name: str, work: Callable[[list[T]], None], *, threads: int = 1, most: int | None = None
    ) -> None:
        self._name, self._work, self._most, self._limit = name, work, most, threads
        self._waiting: deque[T] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """One more thing to do; raises what a thread has raised. Nothing happens once the lane is closed."""
        with self._changed:
            self._raise()
            if self._closed:
                return
            self._waiting.append(item)
            if len(self._waiting) > self._idle and len(self._threads) < self._limit:
                self._threads.append(threading.Thread(target=self._run, name=self._name, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def drain(self) -> None:
        """Waits until all is done; raises what a thread has raised."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or (not self._waiting and self._idle == len(self._threads))
            )
            self._raise()

    def check(self) -> None:
        """Raises what a thread has raised."""
        with self._changed:
            self._raise()

    def close(self, hasten: Callable[[], None] = lambda: None, *, timeout: float | None = None) -> None:
        """Drops what waits and ends the threads, each when what it is at is done.

        Args:
            hasten: called again and again until they have ended.
            timeout: seconds after which a thread is left to itself; None to wait for all.
        """
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < end:
            hasten()
            for thread in self._threads:
                thread.join(0.05)

    def _run(self) -> None:
        while (items := self._take()) is not None:
            try:
                self._work(items)
            except Cancelled:
                pass
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._waiting.clear()
                    self._changed.notify_all()

    def _take(self) -> list[T] | None:
        """What waits, as soon as something does; None once the lane is closed."""
        with self._changed:
            self._idle += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._idle -= 1
            if self._closed:
                return None
            count = len(self._waiting) if self._most is None else min(self._most, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


@contextmanager
def lane(name: str, work: Callable[[list[T]], None]) -> Iterator[Lane[T]]:
    """One thread for the length of the context; what comes out of it otherwise than by the end of the context is waited for shortly."""
    made = Lane(name, work)
    try:
        yield made
    except BaseException:
        made.close(timeout=LEAVE_SECONDS)
        raise
    made.close()
