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
import time
import zlib
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

from zppo.teacher.proxy import proxy_to, transport_to
from zppo.teacher.reply import Answer, Choice, Scrubber, refusal_within, split_content

OPENAI_HOST = "api.openai.com"
REPLY_BYTES = 1 << 16  # of a reply, whatever was asked for; tokens come on top
CONNECT_SECONDS = 10.0
BUSY = frozenset({408, 409, 425, 429, 503, 529})
PAYMENT = 402
ELSEWHERE = frozenset({401, PAYMENT, 403, 404})

_NO_CREDIT = {"insufficient_quota", "insufficient_balance", "insufficient_credits", "billing_not_active", "payment_required"}
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_limit: ContextVar[int] = ContextVar("_limit")  # bytes of a reply, set by the task that asks


class OversizedError(Exception):
    """A reply is longer than anything that was asked for."""


class RedirectError(Exception):
    """A server sends a request on to another origin."""


class CompressedError(Exception):
    """A reply is compressed in a way that is not read; the message names it."""


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


class _Bounded(httpx.AsyncByteStream):
    """A reply's body that stops at a limit of bytes, unpacked ones where it is packed."""

    def __init__(self, stream: Any, limit: int, packed: bool) -> None:
        self._stream, self._left = stream, limit
        self._unpack = zlib.decompressobj(_GZIP_OR_ZLIB) if packed else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            if self._unpack is not None:
                part = self._unpack.decompress(part, self._left + 1)
            self._left -= len(part)
            if self._left < 0:
                raise OversizedError
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: Any) -> None:
    """Runs before the body of any reply is read, that of an error too. None was asked for that is compressed; some proxies do so anyway."""
    encoding = response.headers.get("content-encoding", "").lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise CompressedError(encoding)
    packed = encoding not in ("", "identity")
    if packed:
        del response.headers["content-encoding"]  # it is unpacked here, where the limit is known
    response.stream = _Bounded(response.stream, _limit.get(), packed)


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

        Raises:
            SettingsError: the environment names a proxy that cannot be used.
        """
        self.url = url
        proxy = proxy_to(url)
        self._way = f" (through {proxy}; {proxy.around})" if proxy else ""
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
                transport=transport_to(proxy, httpx.Limits(max_connections=connections + 1, max_keepalive_connections=connections)),
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
        try:
            content = await self._call(
                lambda: self._client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=extra
                ),
                limit,
                deadline,
            )
            return self._read(content)
        except Trouble as trouble:
            trouble.reason += self._way  # it may be the proxy that speaks
            raise

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
            return Trouble(f"{self.url}: the reply is longer than {limit:,} bytes", again=False, oversized=True)
        if moved := next((e for e in (error, cause) if isinstance(e, RedirectError)), None):
            return Trouble(f"{self.url}: {self._scrub.words(moved)}", again=False, elsewhere=True, moved=True)
        if packed := next((e for e in (error, cause) if isinstance(e, CompressedError)), None):
            return Trouble(
                f"{self.url}: the reply is compressed ({self._scrub.words(packed, 40)}), and was asked for as it is; turn compression off "
                "in the server, or in the proxy before it",
                again=False,
            )
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        if isinstance(error, openai.APIConnectionError):
            return Trouble(f"{self.url}: {self._scrub.words(cause or error) or type(cause).__name__}")
        # A reply that the client cannot take, or a request that cannot be made: whatever it is, the run goes on.
        return Trouble(f"{self.url}: {type(error).__name__}: {self._scrub.words(error)}", fault=True)

    def _refusal(self, error: openai.APIStatusError) -> Trouble:
        return self._error(error.status_code, error.body, error.response.headers)

    def _error(self, status: int, body: object, headers: Mapping[str, str], within: str = "") -> Trouble:
        """What an error in a reply says; `within` names the reply where its own status was another one."""
        given = body if isinstance(body, dict) else {}
        said = given.get("message") or given.get("detail") or body
        reason = f"{self.url}: {within or f'status {status}'}: {self._scrub.words(said or '(no reason given)')}"
        if _NO_CREDIT & {given.get(name) for name in ("code", "type") if isinstance(given.get(name), str)}:
            status = PAYMENT  # OpenAI calls it 429, and it does not pass
        busy = status in BUSY
        return Trouble(
            reason,
            again=busy or status >= 500,
            elsewhere=status in ELSEWHERE,
            fault=status == 500,
            wait=retry_after(headers) if busy or status >= 500 else 0.0,
            status=status,
        )

    def _read(self, content: bytes) -> Answer:
        try:
            reply = json.loads(content)
            if isinstance(reply, dict) and not reply.get("choices"):
                named = reply.get("object") == "error" or ("choices" not in reply and reply.keys() & {"detail", "message"})
                if reply.get("error") or named:
                    raise self._error_within(reply.get("error") or reply)
            choices = reply["choices"]
            if not isinstance(choices, list):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            start = self._scrub.words(content.decode("utf-8", "replace"), 80)
            raise Trouble(f"{self.url}: the reply is no chat completion: {start!r}", fault=True, status=200) from None
        usage = reply.get("usage")
        return Answer(tuple(self._choice(choice) for choice in choices), _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))

    def _error_within(self, error: object) -> Trouble:
        """An error in a reply whose status is 200, as gateways send those of the servers behind them."""
        code = error.get("code") if isinstance(error, dict) else None
        code = int(code) if isinstance(code, int | str) and str(code) in _STATUSES else 500
        return self._error(code, error, {}, f"an error in a reply of status 200 (code {code})")

    def _choice(self, choice: object) -> Choice:
        """The text of a choice. Nothing but `content` is read: thoughts in a field of their own are no part of the answer.

        An empty text is a completion only where the model stopped by itself. Where the token limit or a filter ended it, there is
        none, and asking again would give none; without a reason to end, the choice is broken and may be asked for again [zppo].
        """
        choice = choice if isinstance(choice, dict) else {}
        message = choice.get("message")
        ended = choice.get("finish_reason")
        content, apart = split_content(message.get("content")) if isinstance(message, dict) else (None, "")
        if content and (content.strip() or ended != "stop"):
            return Choice(self._scrub.completion(content))
        thoughts = bool(apart) or (isinstance(message, dict) and any(isinstance(t := message.get(n), str) and t for n in _THOUGHTS))
        if error := choice.get("error"):
            return Choice(None, str(self._error_within(error)), True)
        if isinstance(message, dict) and (refusal := message.get("refusal") or refusal_within(message.get("content"))):
            return Choice(
                None, f"{self.url}: the model refuses: {self._scrub.words(refusal, 100)!r}; change the prompt, or take another model"
            )
        if ended == "stop" and isinstance(message, dict) and content is not None:
            why = (
                f"{self.url}: a reply has thoughts and no text. Where most have: start the server with the --reasoning-parser of its model "
                "or without one, or turn thinking off in template_args"
            )
            return Choice(self._scrub.completion(content), why if thoughts else "", thoughts=thoughts)
        if ended == "length":
            return Choice(
                None,
                f"{self.url}: the token limit was used up before any text came (thinking?): raise max_new_tokens of this use, "
                "or turn thinking off in its template_args",
                thoughts=thoughts,
            )
        known = ended in ("content_filter", "tool_calls")
        return Choice(None, f"{self.url}: a choice without text (finish_reason {self._scrub.words(ended, 40)})", not known)


_STATUSES = frozenset(map(str, range(400, 600)))
_THOUGHTS = ("reasoning_content", "reasoning")  # the fields of a message that servers put them into


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
