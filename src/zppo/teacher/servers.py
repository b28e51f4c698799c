"""The addresses of one teacher: spread by load, retry with back-off, fail over, come back, give up in time [zppo]."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zppo.teacher.http import Trouble, Wire
from zppo.teacher.reply import Answer

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
LONGEST_REST = 300.0
FAULTS = 6  # faulty answers to one request, while others are served, after which it is given up
PING_SECONDS = 30.0
LOOK_SECONDS = 1.0  # that a call waits for a ping, where the teacher is down
PROBATION_SECONDS = 10.0  # of failures, after which one that was down and answers pings alone counts as down again
SILENCE_SECONDS = 10.0  # without any success, after which it is said that requests are tried again


def backoff(times: int) -> float:
    """Seconds to wait after so many failures in a row (1, 2, ...): doubling, bounded, with jitter so that clients do not retry in step."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(times - 1, 30)) * random.uniform(0.5, 1.0)


@dataclass(slots=True)
class Service:
    """What serving took.

    Attributes:
        requests: HTTP requests that were sent, retries included.
        retries: of these, second and further attempts.
        given_up: requests that got no usable reply in the end.
        short: replies with fewer choices than asked for.
        oversized: replies that were cut off because of their length.
        waited_seconds: time during which at least one request waited for its next attempt.
    """

    requests: int = 0
    retries: int = 0
    given_up: int = 0
    short: int = 0
    oversized: int = 0
    waited_seconds: float = 0.0


@dataclass(slots=True)
class Address:
    """One address and how it is doing.

    Attributes:
        outstanding, sent: calls that are under way, and calls in all.
        failures: rests in a row without a success between them.
        resting_until: it failed; others are preferred until then.
        closed_until: it asked not to be called before then (Retry-After); it asked at `closed_at`.
    """

    wire: Wire
    outstanding: int = 0
    sent: int = 0
    failures: int = 0
    resting_until: float = 0.0
    closed_until: float = 0.0
    closed_at: float = 0.0

    def ready(self, now: float) -> bool:
        """Whether it takes calls; one that failed takes one at a time after its rest, until one succeeds."""
        return now >= max(self.resting_until, self.closed_until) and not (self.failures and self.outstanding)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts a call while it is under way."""
        self.outstanding += 1
        self.sent += 1
        try:
            yield
        finally:
            self.outstanding -= 1

    def failed(self, now: float, took: float, wait: float) -> None:
        """A call failed after `took` seconds: rest so long at least, for trying again would cost that. `wait` is what it asked for."""
        if now >= self.resting_until:  # of calls that fail together, the first counts
            self.failures += 1
            self.resting_until = now + max(backoff(self.failures), min(took, LONGEST_REST))
        if wait:
            self.closed_until, self.closed_at = max(self.closed_until, now + wait), now

    def served(self, started: float) -> None:
        """A call succeeded; one that began after the address had asked to wait shows that it is open before the time it gave."""
        self.failures, self.resting_until = 0, 0.0
        if started > self.closed_at:
            self.closed_until = 0.0


class Servers:
    """Sends requests to the best address and tries again while that may help.

    The teacher counts as down when nothing has succeeded for `retry_for` seconds of trying. Requests that wait their turn are given up
    then, so that a dead teacher costs a step that time once, not once per request. From then on it rests until a ping succeeds: pings go
    out in the background, with rests between them, and only the call that begins to look waits, a second at most. Used from one event loop.
    """

    def __init__(self, wires: Sequence[Wire], retry_for: float, tell: Callable[[str], None] = lambda text: None) -> None:
        """`tell` takes what a person who waits should know: nothing is served, and is served again."""
        self.addresses = tuple(Address(wire) for wire in wires)
        self.service = Service()
        self._retry_for, self._tell, self._told = retry_for, tell, False
        self._served = time.monotonic()  # the last success
        self._failing_since: float | None = None  # no success since then
        self._reason = ""  # of the last failure
        self._looking: asyncio.Task[None] | None = None  # whether it is back
        self._probation = False  # it was down, and has answered nothing but pings since
        self._waiting = 0
        self._waiting_since = 0.0

    async def ask(self, body: Mapping[str, Any], limit: int) -> Answer:
        """The reply to one request, of at most `limit` bytes. Raises `Trouble` where it is given up."""
        refused: dict[str, Trouble] = {}  # by address
        first: float | None = None  # its first failure
        attempts = faults = 0
        while address := self._pick(refused):
            if not attempts:
                self._raise_if_down()
                await self._until_open(address)
                self._raise_if_down()
            attempts += 1
            trouble, started = await self._attempt(address, body, limit, again=attempts > 1)
            if isinstance(trouble, Answer):
                return trouble
            now = time.monotonic()
            if trouble.elsewhere:
                refused[address.wire.url] = trouble
                continue
            if not trouble.again:
                raise trouble
            first = now if first is None else first
            faults += trouble.fault
            self._failed(address, trouble, now, started)
            left = min(self._left(now), first + self._retry_for - now)
            if left <= 0 or (faults >= FAULTS and self._served > first):
                raise trouble
            if not any(other.ready(now) for other in self.addresses if other.wire.url not in refused):
                await self.wait(min(max(backoff(attempts), trouble.wait), left))
        raise list(refused.values())[-1]

    async def still_down(self, body: Mapping[str, Any], limit: int) -> str:
        """Why the teacher is down; "" where it is not. While it is, it is pinged with `body`."""
        if self._left(time.monotonic()) > 0:
            return ""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._until_back(body, limit))
            await asyncio.wait({self._looking}, timeout=LOOK_SECONDS)
        return self._down_words() if self._failing_since is not None else ""

    async def _until_back(self, body: Mapping[str, Any], limit: int) -> None:
        """Pings all addresses until one is there; the rests between grow, and last at least as long as a ping takes to fail.

        Where nothing is there that could answer, and that shows at once, a ping costs nothing: the next call looks again.
        """
        times = 0
        while self._failing_since is not None:
            started, troubles, times = time.monotonic(), list[Trouble](), times + 1
            pings = [asyncio.create_task(self._ping(address, body, limit)) for address in self.addresses]
            for ping in asyncio.as_completed(pings):
                trouble = await ping
                if trouble is None:
                    for other in pings:
                        other.cancel()
                    return
                troubles.append(trouble)
            took = time.monotonic() - started
            if took < LOOK_SECONDS and all(trouble.status is None and not trouble.fault for trouble in troubles):
                return
            asked = min(trouble.wait for trouble in troubles)
            await asyncio.sleep(max(backoff(times), min(max(took, asked), LONGEST_REST)))

    async def _ping(self, address: Address, body: Mapping[str, Any], limit: int) -> Trouble | None:
        """Why an address is not back."""
        started = time.monotonic()
        try:
            await address.wire.chat(body, limit, PING_SECONDS)
        except Trouble as trouble:
            if trouble.again:
                return trouble
        self._succeeded(address, started)
        self._probation = True
        return None

    async def wait(self, seconds: float) -> None:
        """Sleeps, and counts it."""
        if not self._waiting:
            self._waiting_since = time.monotonic()
        self._waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self.service.waited_seconds += time.monotonic() - self._waiting_since

    async def _attempt(self, address: Address, body: Mapping[str, Any], limit: int, *, again: bool) -> tuple[Answer | Trouble, float]:
        """What one attempt gave, and when it began."""
        started = time.monotonic()
        self.service.requests += 1
        self.service.retries += again
        try:
            with address.call():
                answer = await address.wire.chat(body, limit)
        except Trouble as trouble:
            if not trouble.again and not trouble.elsewhere:
                self._succeeded(address, started)  # it is there, and dislikes this request
            return trouble, started
        self._succeeded(address, started)
        return answer, started

    def _pick(self, refused: Collection[str]) -> Address | None:
        """The least busy address that is ready, else the one that will be first; None where all refused."""
        now = time.monotonic()
        left = [a for a in self.addresses if a.wire.url not in refused]
        if ready := [a for a in left if a.ready(now)]:
            return min(ready, key=lambda a: (a.outstanding, a.sent))
        return min(left, key=lambda a: (max(a.resting_until, a.closed_until), a.outstanding), default=None)

    async def _until_open(self, address: Address) -> None:
        """A new request respects what an address has asked others to wait."""
        closed = address.closed_until - time.monotonic()
        if closed > 0:
            await self.wait(min(closed + random.uniform(0, FIRST_WAIT), self._retry_for))

    def _failed(self, address: Address, trouble: Trouble, now: float, started: float) -> None:
        address.failed(now, now - started, trouble.wait)
        self._reason = trouble.reason
        if self._failing_since is None:
            self._failing_since = max(started, self._served)
        silent = now - self._failing_since
        if not self._told and SILENCE_SECONDS <= silent < self._retry_for:
            self._told = True
            self._tell(f"no reply for {silent:.0f} s, tried again for up to {self._retry_for:g} s: {trouble.reason}")

    def _succeeded(self, address: Address, started: float) -> None:
        address.served(started)
        self._served, self._failing_since, self._probation = time.monotonic(), None, False
        if self._told:
            self._told = False
            self._tell(f"{address.wire.url} replies again")

    def _left(self, now: float) -> float:
        """Seconds until the teacher counts as down."""
        patience = min(self._retry_for, PROBATION_SECONDS) if self._probation else self._retry_for
        return patience - (now - self._failing_since) if self._failing_since is not None else float("inf")

    def _raise_if_down(self) -> None:
        if self._left(time.monotonic()) <= 0:
            raise Trouble(self._down_words())

    def _down_words(self) -> str:
        seconds = time.monotonic() - (self._failing_since or 0.0)
        return f"unreachable for {seconds:.0f} s: {self._reason}"
