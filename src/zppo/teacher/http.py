"""One address that speaks the OpenAI chat-completions protocol: a request out, a reply in, trouble classified.

What a server sends is hostile input: replies are read up to a limit, every field is checked before it is used, and text that goes into
messages is cut, freed of control characters and of the key.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from zppo.http_client import httpx
from zppo.teacher.proxy import proxy_to, transport_to
from zppo.teacher.reply import Answer, Choice, Scrubber, error_within, is_hollow, refusal_within, split_content, what_came

OPENAI_HOST = "api.openai.com"
REPLY_BYTES = 1 << 16  # of a reply, whatever was asked for; tokens come on top
CONNECT_SECONDS = 10.0
BUSY = frozenset({408, 409, 425, 429, 503, 529})
PAYMENT = 402
ELSEWHERE = frozenset({401, PAYMENT, 403, 404})

_NO_CREDIT = {"insufficient_quota", "insufficient_balance", "insufficient_credits", "billing_not_active", "payment_required"}
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_MAGIC = {b"\x1f\x8b": "gzip", b"\x78\x01": "deflate", b"\x78\x5e": "deflate", b"\x78\x9c": "deflate", b"\x78\xda": "deflate"}
_ZSTD = b"\x28\xb5\x2f\xfd"
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

    def __init__(self, stream: Any, limit: int, encoding: str) -> None:
        self._stream, self._left, self._encoding = stream, limit, encoding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        unpack: Any = None
        async for part in self._from_a_start():
            if unpack is None:
                unpack = _unpacker(part, self._encoding)
            part = unpack(part, self._left + 1)
            self._left -= len(part)
            if self._left < 0:
                raise OversizedError
            yield part

    async def _from_a_start(self) -> AsyncIterator[bytes]:
        """The parts, the first of which is long enough to tell what it is."""
        start: bytes | None = b""
        async for part in self._stream:
            if start is not None:
                start += part
                if len(start) < len(_ZSTD):
                    continue
                part, start = start, None
            yield part
        if start:
            yield start

    async def aclose(self) -> None:
        await self._stream.aclose()


def _unpacker(start: bytes, encoding: str) -> Callable[[bytes, int], bytes]:
    """What unpacks a body that begins so, up to a length. The bytes tell it: some proxies pack and do not say so, or say so and do not.

    JSON begins with none of these bytes.

    Raises:
        CompressedError: by something else.
    """
    if start.startswith(_ZSTD):
        raise CompressedError("zstd")
    found = _MAGIC.get(start[:2], "")
    if not found and encoding == "deflate":
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress  # without its header, as some servers have it
    if not found and (not encoding or start.lstrip()[:1] in (b"{", b"[", b"<")):
        return lambda part, most: part
    return zlib.decompressobj(_GZIP_OR_ZLIB).decompress


async def _bound(response: Any) -> None:
    """Runs before the body of any reply is read, that of an error too. None was asked for that is compressed; some proxies do so anyway."""
    encoding = response.headers.get("content-encoding", "").lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise CompressedError(encoding)
    if encoding:
        del response.headers["content-encoding"]  # it is unpacked here, where the limit is known
    response.stream = _Bounded(response.stream, _limit.get(), encoding.replace("identity", ""))


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
        if isinstance(error, zlib.error) or isinstance(cause, zlib.error):
            return Trouble(
                f"{self.url}: the reply is packed and cannot be unpacked: {self._scrub.words(cause or error)}", fault=True, status=200
            )
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        if isinstance(error, openai.APIConnectionError):
            return Trouble(f"{self.url}: {self._scrub.words(cause or error) or type(cause).__name__}")
        # A reply that the client cannot take, or a request that cannot be made: whatever it is, the run goes on.
        return Trouble(f"{self.url}: {type(error).__name__}: {self._scrub.words(error)}", fault=True)

    def _refusal(self, error: openai.APIStatusError) -> Trouble:
        body, status = error.body, error.status_code
        if isinstance(body, list) and body and isinstance(body[0], dict):  # Google's form
            body = body[0].get("error") or body[0]
        if status == 400 and "api key" in str(body).lower():  # Google and xAI call a wrong key a bad request
            status = 401
        return self._error(status, body, error.response.headers, "" if status == error.status_code else f"status {error.status_code}")

    def _error(self, status: int, body: object, headers: Mapping[str, str], within: str = "") -> Trouble:
        """What an error in a reply says; `within` names the reply where its own status was another one."""
        given = body if isinstance(body, dict) else {}
        said = error_within(given) or body
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
        except (ValueError, RecursionError):
            reply = None
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if isinstance(reply, dict) and not choices and (error := reply.get("error") or (error_within(reply) and reply)):
            raise self._error_within(error)
        if not isinstance(choices, list) or all(is_hollow(choice) for choice in choices):
            # Such a server is out of order: it is tried again as one that answers 500, and rests as one.
            raise Trouble(f"{self.url}: {what_came(reply, content, self._scrub)}", fault=True, status=200)
        usage = reply["usage"] if isinstance(reply, dict) and "usage" in reply else None
        return Answer(tuple(self._choice(choice) for choice in choices), _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))

    def _error_within(self, error: object) -> Trouble:
        """An error in a reply whose status is 200, as gateways send those of the servers behind them."""
        given = [error.get(name) for name in ("code", "status", "type")] if isinstance(error, dict) else []
        said = [str(value).lower() for value in given if isinstance(value, int | str)]
        code = next((_STATUSES[word] for word in said if word in _STATUSES), 500)
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
        thoughts = bool(apart) or (isinstance(message, dict) and any(isinstance(t := message.get(n), str | list) and t for n in _THOUGHTS))
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
        known = _WITHOUT_TEXT.get(ended) if isinstance(ended, str) else None
        why = known or f"a choice without text (finish_reason {self._scrub.words(ended, 40)})"
        if isinstance(message, dict) and content is None:
            why = (
                f"the content of a choice is no text ({self._scrub.words(message.get('content'), 40)!r}): see what stands before the server"
            )
        return Choice(None, f"{self.url}: {why}", not known)


_WITHOUT_TEXT = {
    "content_filter": "a filter kept the text back (finish_reason content_filter): change the prompt or the filter, or take another model",
    "tool_calls": "the model calls a tool and says nothing (finish_reason tool_calls), and was given none: start its server without tools",
}
_WORDS = {
    400: "invalid_request_error invalid_argument bad_request badrequesterror context_length_exceeded",
    401: "invalid_api_key incorrect_api_key authentication_error unauthenticated unauthorized",
    403: "permission_error permission_denied forbidden",
    404: "model_not_found not_found_error not_found notfounderror",
    429: "rate_limit_exceeded rate_limit_error resource_exhausted",
    529: "overloaded_error overloaded",
}
_STATUSES = {str(code): code for code in range(400, 600)} | {word: code for code, words in _WORDS.items() for word in words.split()}
_THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")  # the fields of a message that servers put them into


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
