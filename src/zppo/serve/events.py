"""An answer as server-sent events, for clients that ask for a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from zppo.serve.protocol import RequestError

DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def events_begun(model: str, n: int) -> list[dict[str, Any]]:
    """The first chunks, which say who speaks: a client sees that its request was taken."""
    head = _head(f"chatcmpl-{uuid.uuid4().hex}", model, int(time.time()))
    return [head | {"choices": [_choice(index, {"role": "assistant", "content": ""})]} for index in range(n)]


def events_of(answer: dict[str, Any], identity: str, usage: bool) -> Iterator[dict[str, Any]]:
    """The chunks of a whole answer: the text of each choice, then why it ended; with `usage` the tokens at the end.

    Args:
        answer: as `serve.protocol.answer` makes it.
        identity: of the chunks before.
    """
    head = _head(identity, answer["model"], answer["created"])
    more = {"usage": None} if usage else {}
    for choice in answer["choices"]:
        text = _choice(choice["index"], {"content": choice["message"]["content"]}, logprobs=choice["logprobs"])
        yield head | {"choices": [text]} | more
        yield head | {"choices": [_choice(choice["index"], {}, choice["finish_reason"])]} | more
    if usage:
        yield head | {"choices": [], "usage": answer["usage"]}


class EventStream(Response):
    """A stream: it begins at once, and the text comes when the batch has ended, in one piece a choice [zppo].

    Errors that come after the beginning are events with the protocol's `error`.
    """

    media_type = "text/event-stream"

    def __init__(self, answered: Awaitable[dict[str, Any] | None], begun: Callable[[], list[dict[str, Any]]], usage: bool) -> None:
        """`answered` is the whole answer, None where the client is gone; it raises `RequestError` where there is none."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answered, self._begun, self._usage = answered, begun, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        begun = self._begun()
        await send({"type": "http.response.body", "body": b"".join(map(event, begun)), "more_body": True})
        try:
            answer = await self._answered
        except RequestError as error:
            said = event({"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}})
        else:
            said = b"" if answer is None else b"".join(map(event, events_of(answer, begun[0]["id"], self._usage)))
        await send({"type": "http.response.body", "body": said + DONE, "more_body": False})


def _head(identity: str, model: str, created: int) -> dict[str, Any]:
    return {"id": identity, "object": "chat.completion.chunk", "created": created, "model": model}


def _choice(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
