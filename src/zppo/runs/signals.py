"""Stopping a run from outside: SIGTERM, SIGHUP and Ctrl-C are granted where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from zppo.errors import Interrupted

REPEAT_SECONDS = 1.0
"""A second Ctrl-C within this time is the same one: launchers pass on what the terminal has sent already."""

_SHOW_CURSOR = b"\x1b[?25h"


class Stop:
    """A request that the run stops: a signal, or Ctrl-C.

    It takes effect at once, by `Interrupted`, wherever the code is not shielded: sampling, the teacher and evaluations can be left in
    the middle. Inside `shield` (updates, files) it waits: until the shield ends, or until the update asks `wanted` between two of its
    optimizer steps.

    Attributes:
        signum: the signal, None while there is no request.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._shields = 0

    @property
    def wanted(self) -> bool:
        """Whether the run was asked to stop."""
        return self.signum is not None

    def request(self, signum: int = signal.SIGTERM) -> None:
        """Ask the run to stop at its next safe point; the first request counts."""
        self.signum = signum if self.signum is None else self.signum

    def check(self) -> None:
        """A safe point.

        Raises:
            Interrupted: there is a request, and no shield is up.
        """
        if self.signum is not None and not self._shields:
            raise Interrupted(self.signum)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What happens inside is finished first; a request that came meanwhile takes effect at the end."""
        with self.ignored():
            yield
        self.check()

    @contextmanager
    def exposed(self) -> Iterator[None]:
        """Inside, no shield is up: a request takes effect at once, one that came before at the start."""
        shields, self._shields = self._shields, 0
        try:
            self.check()
            yield
        finally:
            self._shields = shields

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """As `shield`, and nothing is granted at the end."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1


@contextmanager
def catch_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C become requests to `stop`; a second Ctrl-C ends the process at once, with exit status 130.

    SIGHUP stays ignored where it was (`nohup`). Only in the main thread; elsewhere nothing is caught. The handlers that were there before
    come back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = float("-inf")

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        now, repeated = time.monotonic(), stop.wanted
        if repeated and signum == signal.SIGINT and now - asked > REPEAT_SECONDS:
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)  # the live display has hidden it
            os._exit(128 + signum)
        stop.request(signum)
        if not repeated:  # written past Python's buffers, which the interrupted code may be in the middle of
            asked = now
            again = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            _say(f"\n{signal.Signals(signum).name}: stopping as soon as nothing is lost by it{again}\n")
            stop.check()  # not for a repeated one: it would end what saves the run

    caught = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, handle) for signum in caught}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal is gone
        os.write(2, text.encode())
