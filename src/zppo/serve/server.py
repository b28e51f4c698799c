"""The HTTP side: routes, keys, limits."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zppo.core.draws import draw_key
from zppo.core.types import ImageRef
from zppo.engines.base import Completion, SampleRequest
from zppo.errors import DataError, ModelError, one_line
from zppo.serve.batcher import Batcher, DecodingError, Job, QueueFullError, StoppedError
from zppo.serve.events import EventStream, TokenFeed
from zppo.serve.protocol import Body, LockedChat, RequestError, RequestImages, answer, answer_error, read_body, shorten

_LOG = logging.getLogger("zppo.serve")
_LONGEST = 500  # characters of another part's message
_NO_CONTEXT = 4096  # new tokens where neither request nor model sets a limit
_DRAINED, _DRAIN_SECONDS = 1 << 28, 10.0  # bytes and seconds of a refused body that are read
_OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class ChatServer:
    """What the routes work with.

    Attributes:
        model: name that the model is served under.
        context: tokens of prompt and completion together; None for no limit.
        key: what a client must send; None admits every client that reaches the server.
        loopback: without a key, only requests that are addressed to this machine by a name of its own are answered: a page of another site
            could point a name of its own at this address.
        max_body: bytes of a request.
        pictures: takes the images of requests.
    """

    model: str
    words: LockedChat
    batcher: Batcher
    pictures: RequestImages
    context: int | None
    key: str | None = None
    loopback: bool = True
    max_body: int = 8 << 20

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        try:
            return await self._chat(request)
        except asyncio.CancelledError:
            if not self.batcher.closed:
                raise
            raise _stopping(StoppedError("the server is stopping")) from None

    async def _chat(self, request: Request) -> Response:
        try:
            self._admit(request)
            body = read_body(await self._read(request))
        except RequestError:
            await _drain(request)
            raise
        if body.model != self.model:
            raise RequestError(
                404, f"there is no model {shorten(body.model)!r} here; this server has {self.model!r}", "model_not_found", param="model"
            )
        self.pictures.check(body.images)
        taken = await self.pictures.take(body.images)
        try:
            prompt = await anyio.to_thread.run_sync(self._encode, body, taken.refs)
            feed = TokenFeed(self.words, body.n, body.stop) if body.stream else None
            job = self._submit(body, prompt, taken.refs, feed)
        except BaseException:
            taken.release()
            raise
        job.future.add_done_callback(lambda _: taken.release())  # the engine reads them until then
        answered = self._answered(request, job, body, len(prompt))
        if feed is not None:
            return EventStream(answered, feed, self.model, body.usage_in_stream)
        whole = await answered
        return Response(status_code=499) if whole is None else JSONResponse(whole)  # a client that is gone reads nothing

    async def _answered(self, request: Request, job: Job, body: Body, prompt_tokens: int) -> dict[str, Any] | None:
        """The body of the answer; None where the client is gone. Raises a `RequestError` where there is none."""
        try:
            completions = await _completed(self.batcher, job, request)
        except StoppedError as error:
            raise _stopping(error) from None
        except DecodingError as error:
            _LOG.warning("a request of %d tokens could not be decoded: %s", prompt_tokens, error)
            raise RequestError(500, f"this request could not be decoded: {one_line(error, _LONGEST)}", "decoding_failed") from None
        if completions is None:
            return None
        return await anyio.to_thread.run_sync(lambda: answer(self.words, self.model, prompt_tokens, completions, body))

    def _submit(self, body: Body, prompt: tuple[int, ...], images: tuple[ImageRef, ...], feed: TokenFeed | None) -> Job:
        """Queues a request. Raises a `RequestError` where it cannot be."""
        seed = secrets.randbits(63) if body.seed is None else body.seed
        keys = tuple(draw_key(seed, "serve", i) for i in range(body.n))
        try:
            sampling = body.sampling(self.context or _NO_CONTEXT)
            return self.batcher.submit(SampleRequest(prompt, keys, images), sampling, feed.tell if feed is not None else None)
        except QueueFullError as error:
            raise RequestError(
                429,
                f"{error.waiting} requests wait already; try again in {error.retry_after} s, or with fewer at a time",
                "queue_full",
                headers={"Retry-After": str(error.retry_after)},
            ) from None
        except StoppedError as error:
            raise _stopping(error) from None

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        self._admit(request)
        entry = {"id": self.model, "object": "model", "created": _STARTED, "owned_by": "zppo", "max_model_len": self.context}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, _: Request) -> Response:
        """GET /health, without a key: how many requests wait and are decoded; 503 at the end."""
        waiting, decoding = self.batcher.load
        status, closed = ("stopping", True) if self.batcher.closed else ("ok", False)
        return JSONResponse({"status": status, "waiting": waiting, "decoding": decoding}, 503 if closed else 200)

    def _admit(self, request: Request) -> None:
        """Raises a `RequestError` unless the request may be answered."""
        if self.key is not None:
            scheme, _, sent = request.headers.get("authorization", "").partition(" ")
            # Digests have one length, so the comparison takes one time.
            same = hmac.compare_digest(*(hashlib.sha256(key.encode()).digest() for key in (sent.strip(), self.key)))
            if scheme.lower() != "bearer" or not same:
                raise RequestError(
                    401,
                    "the key is missing or wrong; send the server's key as `Authorization: Bearer KEY`",
                    "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif self.loopback and _host(request) not in _OWN_NAMES:
            raise RequestError(403, f"this server answers to {', '.join(_OWN_NAMES)} only, unless it has a key", "foreign_host")

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, f"the content type is {kind[:80]!r}; send application/json", "wrong_content_type")
        length = request.headers.get("content-length", "0")
        too_large = RequestError(413, f"the body has more than {self.max_body} bytes; send a smaller one", "body_too_large")
        if length.isdecimal() and int(length) > self.max_body:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body:
                raise too_large
        return bytes(body)

    def _encode(self, body: Body, images: tuple[ImageRef, ...]) -> tuple[int, ...]:
        """Prompt ids that leave room for what is asked for."""
        try:
            prompt = self.words.encode(body.conversation(), body.chat_template_kwargs, images)
        except DataError as error:
            raise RequestError(400, one_line(error, _LONGEST), "invalid_value", param="messages") from None
        except ModelError as error:
            field = "chat_template_kwargs" if body.chat_template_kwargs else "messages"
            raise RequestError(400, one_line(error, _LONGEST), "template_refused", param=field) from None
        needed = len(prompt) + (body.limit or 1)
        if self.context is not None and needed > self.context:
            asked = f" and {body.limit} new ones are asked for" if body.limit else ""
            raise RequestError(
                400,
                f"the prompt has {len(prompt)} tokens{asked}, and the model's context holds {self.context}; send a shorter "
                "conversation or ask for fewer tokens",
                "context_length_exceeded",
                param="messages" if len(prompt) >= self.context or not body.limit else "max_tokens",
            )
        return prompt


def _stopping(error: StoppedError) -> RequestError:
    return RequestError(503, f"{error}; try again later", "stopping", headers={"Retry-After": "5"})


async def _drain(request: Request) -> None:
    """Reads on after a refusal: a client that is still sending sees the answer only then, and else a broken connection."""
    left = _DRAINED
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # the last: it was read to its end
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in request.stream():
                left -= len(chunk)
                if left < 0:
                    return


_STARTED = int(time.time())


async def _completed(batcher: Batcher, job: Job, request: Request) -> list[Completion] | None:
    """The completions of a job; None where the client went away first, and then the job is given up.

    StoppedError where the server ends before it.
    """
    done = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(request.receive())  # the body is read: what comes is the end of the connection
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        return await done if done.done() else None
    except asyncio.CancelledError:  # told twice to end: the loop goes before the batch does
        if not batcher.closed:
            raise
        raise StoppedError("the server is stopping") from None
    finally:
        gone.cancel()
        if not done.done():
            batcher.abandon(job)
            done.cancel()


def _host(request: Request) -> str:
    """The name that a request is addressed to, without the port."""
    host = request.headers.get("host", "")
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0].lower()


async def _answer_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = "POST /v1/chat/completions, GET /v1/models, GET /health"
    said = f"{request.method} {request.url.path[:80]} is not served ({error.detail}); there are {routes}"
    return RequestError(error.status_code, said, "no_such_route", headers=error.headers).response()


async def _client_left(*_: object) -> Response:
    return Response(status_code=499)


def make_app(service: ChatServer) -> Starlette:
    """The application over a service."""
    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/models", service.models, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: _answer_route,
            ClientDisconnect: _client_left,
            RequestError: answer_error,
            Exception: answer_error,
        },
    )
