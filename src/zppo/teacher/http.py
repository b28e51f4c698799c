"""One address that speaks the OpenAI chat-completions protocol: a request out, a reply in, trouble classified.

What a server sends is hostile input: replies are read up to a limit, every field is checked before it is used, and text that goes into
messages is cut, freed of control characters and of the key.

The addresses of one teacher: spread by load, retry with back-off, fail over, come back, give up in time [zppo].
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import openai

try:  # the HTTP client that the openai package stands on
    import httpx2 as httpx
except ImportError:  # its older versions
    import httpx  # type: ignore[no-redef]

OPENAI_HOST = "api.openai.com"
REPLY_BYTES = 1 << 16  # of a reply, whatever was asked for; tokens come on top
REASON_CHARACTERS = 300
CONNECT_SECONDS = 10.0
BUSY = frozenset({408, 409, 425, 429, 503})
ELSEWHERE = frozenset({401, 403, 404})
SHORTEST_SECRET = 8  # characters; a shorter key could be a word of an honest completion

_BASE64 = re.compile(r"(data:[\w/+.;=-]{1,60}?base64,)?([A-Za-z0-9+/]{60,}={0,2})")

_limit: ContextVar[int] = ContextVar("_limit")  # bytes of a reply, set by the task that asks


class OversizedError(Exception):
    """A reply is longer than anything that was asked for."""


class RedirectError(Exception):
    """A server sends a request on to another origin."""


@dataclass(eq=False)
class Trouble(Exception):  # noqa: N818 - mostly weather, no error of anybody's
    """Why one attempt gave no reply.

    Attributes:
        reason: in words, harmless to print.
        again: another attempt may help.
        elsewhere: this address refuses; another one may not.
        fault: the server answered, but wrongly: asking for the same again and again is of little use.
        wait: seconds that the server asked for.
        status: of HTTP, None where there was no answer.
        oversized: the reply was too long.
        moved: it sends requests on to another origin.
    """

    reason: str
    again: bool = True
    elsewhere: bool = False
    fault: bool = False
    wait: float = 0.0
    status: int | None = None
    oversized: bool = False
    moved: bool = False

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion; `text` is None where there is none, `why` says why, `again` whether asking again may help."""

    text: str | None
    why: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply: its choices, and the tokens that the server says it took."""

    choices: tuple[Choice, ...]
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Scrubber:
    """Takes the key out of texts, and makes a server's words fit to print."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "Scrubber()"

    def words(self, value: object, limit: int = REASON_CHARACTERS) -> str:
        """One line of at most `limit` characters without control characters, without the key and without images."""
        text = str(value)
        if self._key:  # before any cut, which could leave a piece of it
            text = text.replace(self._key, "[key]")
        text = _BASE64.sub(_without_data, text)[: 100 * limit]  # a refused request comes back in some errors, images and all
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= limit else f"{text[:limit]}..."

    def completion(self, text: str) -> str:
        """A completion that can be written to any file: no lone surrogates, and no key if the server echoes it."""
        text = sound(text)
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else text


def _without_data(found: re.Match[str]) -> str:
    """`[data]` for what is encoded data; a long word that merely could be some stays."""
    head, body = found.groups()
    mixed = head or (not body.isupper() and not body.islower() and any(c.isdigit() for c in body))
    return "[data]" if mixed else found[0]


def sound(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 file takes, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _Bounded(httpx.AsyncByteStream):
    """A reply's body that stops at a limit of bytes."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._left = stream, limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            self._left -= len(part)
            if self._left < 0:
                raise OversizedError
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: Any) -> None:
    """Runs before the body of any reply is read, that of an error too. A compressed body could unpack to anything: none was asked for."""
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise OversizedError
    response.stream = _Bounded(response.stream, _limit.get())


async def within_origin(response: Any) -> None:
    """A hook that runs before a redirect is followed: prompts, images and the key go to the origin that a person has named, nowhere else.

    Raises:
        RedirectError: the redirect leaves it; the message names both.
    """
    if response.has_redirect_location:
        here = response.request.url
        there = here.join(response.headers["location"])
        if _origin(there) != _origin(here):
            raise RedirectError(f"{_shown(here)} sends requests on to {_shown(there)}, and zppo follows to no other origin")


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _shown(url: Any) -> str:
    """Scheme, host, port and path: what else a server puts there is no business of a message."""
    return str(url.copy_with(username=None, password=None, query=None, fragment=None))


class Wire:
    """The client of one address. Its methods raise nothing but `Trouble` (and cancellation)."""

    def __init__(self, url: str, key: str, deadline: float, connections: int) -> None:
        """Opens nothing yet.

        Args:
            url: base address, mostly ending in /v1.
            key: sent as bearer; "" sends "EMPTY", which servers that want none ignore.
            deadline: seconds for one whole call.
            connections: most at once.
        """
        self.url = url
        self._scrub = Scrubber(key)
        self._deadline = deadline
        self._client = openai.AsyncOpenAI(
            api_key=key or "EMPTY",
            base_url=url,
            max_retries=0,
            timeout=openai.Timeout(deadline, connect=min(CONNECT_SECONDS, deadline)),
            default_headers={"Accept-Encoding": "identity"},
            http_client=openai.DefaultAsyncHttpxClient(
                event_hooks={"response": [_bound, within_origin]},
                limits=httpx.Limits(max_connections=connections + 1, max_keepalive_connections=connections),
            ),
        )

    def __repr__(self) -> str:
        return f"Wire({self.url!r})"

    async def close(self) -> None:
        """Closes its connections."""
        await self._client.close()

    async def chat(self, body: Mapping[str, Any], limit: int, deadline: float | None = None) -> Answer:
        """One chat completion.

        Args:
            body: the JSON of the request.
            limit: bytes of the reply.
            deadline: seconds, where not the wire's own.
        """
        extra = {name: value for name, value in body.items() if name not in ("model", "messages")}
        content = await self._call(
            lambda: self._client.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=extra
            ),
            limit,
            deadline,
        )
        return self._read(content)

    async def models(self, limit: int = 1 << 20, deadline: float = 10.0) -> list[str]:
        """Names of the models that are served; empty where the server does not say."""
        return list(await self.contexts(limit, deadline))

    async def contexts(self, limit: int = 1 << 20, deadline: float = 10.0) -> dict[str, int | None]:
        """Models that are served -> tokens of their context, None where the server does not say; empty where it names none."""
        try:
            content = await self._call(lambda: self._client.models.with_raw_response.list(), limit, deadline)
            listed = json.loads(content)["data"]
            return {self._scrub.words(m["id"], 100): _count(m, "max_model_len") or None for m in listed}
        except (Trouble, ValueError, KeyError, TypeError, RecursionError):
            return {}

    async def _call(self, send: Any, limit: int, deadline: float | None) -> bytes:
        """The body of a reply, within the limits."""
        seconds = self._deadline if deadline is None else deadline
        _limit.set(limit)
        try:
            async with asyncio.timeout(seconds):  # the client's own time-outs start anew with every byte
                return bytes((await send()).content)
        except TimeoutError:
            raise Trouble(f"{self.url}: no whole reply within {seconds:g} s") from None
        except Exception as error:
            raise self._trouble(error, limit) from None  # the chain would hold the request's headers

    def _trouble(self, error: Exception, limit: int) -> Trouble:
        cause = error.__cause__
        if isinstance(error, OversizedError) or isinstance(cause, OversizedError):
            reason = f"{self.url}: the reply is compressed or longer than {limit:,} bytes"
            return Trouble(reason, again=False, oversized=True)
        if moved := next((e for e in (error, cause) if isinstance(e, RedirectError)), None):
            return Trouble(f"{self.url}: {self._scrub.words(moved)}", again=False, elsewhere=True, moved=True)
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        if isinstance(error, openai.APIConnectionError):
            return Trouble(f"{self.url}: {self._scrub.words(cause or error) or type(cause).__name__}")
        # A reply that the client cannot take, or a request that cannot be made: whatever it is, the run goes on.
        return Trouble(f"{self.url}: {type(error).__name__}: {self._scrub.words(error)}", fault=True)

    def _refusal(self, error: openai.APIStatusError) -> Trouble:
        status = error.status_code
        body = error.body
        said = (body.get("message") or body.get("detail") or body) if isinstance(body, dict) else body
        reason = f"{self.url}: status {status}: {self._scrub.words(said or '(no reason given)')}"
        busy = status in BUSY
        return Trouble(
            reason,
            again=busy or status >= 500,
            elsewhere=status in ELSEWHERE,
            fault=status == 500,
            wait=retry_after(error.response.headers) if busy or status >= 500 else 0.0,
            status=status,
        )

    def _read(self, content: bytes) -> Answer:
        try:
            reply = json.loads(content)
            choices = reply["choices"]
            if not isinstance(choices, list):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            start = self._scrub.words(content.decode("utf-8", "replace"), 80)
            raise Trouble(f"{self.url}: the reply is no chat completion: {start!r}", fault=True) from None
        usage = reply.get("usage")
        return Answer(tuple(self._choice(choice) for choice in choices), _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))

    def _choice(self, choice: object) -> Choice:
        """The text of a choice. Nothing but `content` is read: thoughts in a field of their own are no part of the answer.

        An empty text is a completion only where the model stopped by itself. Where the token limit or a filter ended it, there is
        none, and asking again would give none; without a reason to end, the choice is broken and may be asked for again [zppo].
        """
        message = choice.get("message") if isinstance(choice, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        ended = choice.get("finish_reason") if isinstance(choice, dict) else None
        if isinstance(content, str) and content:
            return Choice(self._scrub.completion(content))
        if ended == "stop" and isinstance(message, dict) and content in ("", None):
            return Choice("")
        if ended == "length":
            return Choice(
                None,
                f"{self.url}: the token limit was used up before any text came (thinking?): raise max_new_tokens of this use, "
                "or turn thinking off in its template_args",
            )
        known = ended in ("content_filter", "tool_calls")
        return Choice(None, f"{self.url}: a choice without text (finish_reason {self._scrub.words(ended, 40)})", not known)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a reply's headers ask to wait: Retry-After in seconds or as a date, or its form in milliseconds; 0 where none."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return 0.0


def _count(usage: object, name: str) -> int:
    """A token count of `usage`, 0 where it is none."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else 0


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
