"""An answer as server-sent events, for clients that ask for a stream: text as it is decoded."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any

import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from zppo.serve.protocol import LockedChat, RequestError

DONE = b"data: [DONE]\n\n"
PAUSE = 0.03  # seconds between the pieces of a stream: nobody reads faster, and the decoding thread is left alone
_CUT = "\ufffd"  # how a tokenizer shows a character of which bytes are missing


class TextSoFar:
    """The text of a choice while its tokens come.

    A few tokens are decoded at a time, with those before them, whose text is known: so a tokenizer that puts or leaves out a space at the
    beginning does so in both.

    Args:
        words: decodes.
        stop: the text ends before the first of these.

    Attributes:
        sent: characters that were given.
    """

    def __init__(self, words: LockedChat, stop: Sequence[str]) -> None:
        self._words, self._stop = words, stop
        self.sent = 0
        self._before, self._read = 0, 0  # places of tokens: from the first on is decoded, up to the second the text is known
        self._held = ""  # text that could be a part of a stop text
        self._stopped = False

    def more(self, ids: Sequence[int]) -> str:
        """Text that is new and stays, whatever comes.

        Args:
            ids: all tokens so far.
        """
        ids = ids[: self._words.settled(ids)]
        if self._stopped or len(ids) <= self._read:
            return ""
        known, whole = self._words.decode(ids[self._before : self._read]), self._words.decode(ids[self._before :])
        if whole.endswith(_CUT) or not whole.startswith(known):  # within a character; the end of the answer has it in any case
            return ""
        new = whole[len(known) :]
        self._before, self._read = self._read if new else self._before, len(ids)  # never from tokens without a text
        self._held += new
        found = min((place for stop in self._stop if (place := self._held.find(stop)) >= 0), default=len(self._held))
        safe = min([found, *(_begun(self._held, stop) for stop in self._stop)])
        self._stopped = safe == found < len(self._held)
        text, self._held = self._held[:safe], self._held[safe:]
        self.sent += len(text)
        return text


def _begun(text: str, stop: str) -> int:
    """Where a stop text may have begun at the end of a text; the text's length where not."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return len(text) - next((n for n in lengths if text.endswith(stop[:n])), 0)


class TokenFeed:
    """Tokens on their way from the engine's thread to a stream."""

    def __init__(self, words: LockedChat, choices: int, stop: Sequence[str]) -> None:
        """To be made where an event loop runs."""
        self._ids: list[list[int]] = [[] for _ in range(choices)]
        self._texts = [TextSoFar(words, stop) for _ in range(choices)]
        self._loop, self._new = asyncio.get_running_loop(), asyncio.Event()

    def __len__(self) -> int:
        """Choices."""
        return len(self._ids)

    def tell(self, step: int, drawn: Sequence[tuple[int, int]]) -> None:
        """For `Job.tell`. Tokens that come again are passed over: a draw is keyed, and gives the same."""
        for choice, token in drawn:
            if step == len(self._ids[choice]):
                self._ids[choice].append(token)
        try:
            self._loop.call_soon_threadsafe(self._new.set)
        except RuntimeError:  # the server has ended
            return

    async def wait(self) -> bool:
        """Until there is a token that `pieces` has not seen."""
        return await self._new.wait()

    async def pieces(self) -> list[tuple[int, str]]:
        """(choice, text) that have come since the last call."""
        self._new.clear()
        return await anyio.to_thread.run_sync(self._take)

    def _take(self) -> list[tuple[int, str]]:
        return [(i, text) for i, ids in enumerate(self._ids) if (text := self._texts[i].more(ids[:]))]

    def rest(self, choice: int, text: str) -> str:
        """What of the whole text of a choice was not given yet."""
        return text[self._texts[choice].sent :]


def event(data: object) -> bytes:
    """One event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class EventStream(Response):
    """A stream: it begins at once, with who speaks; text comes as it is decoded, then why each choice ended, and the tokens if asked for.

    Log-probs come with the end of their choice. Errors that come after the beginning are events with the protocol's `error`.
    """

    media_type = "text/event-stream"

    def __init__(self, answered: Awaitable[dict[str, Any] | None], feed: TokenFeed, model: str, usage: bool) -> None:
        """`answered` is the whole answer, None where the client is gone; it raises `RequestError` where there is none."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answered, self._feed, self._usage = answered, feed, usage
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        if usage:
            self._head |= {"usage": None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send(send, [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self._feed))])
        answered = asyncio.ensure_future(self._answered)
        try:
            try:
                await self._send_texts(send, answered)
            except asyncio.CancelledError:
                answered.cancel()  # it knows whether the server ends
            answer = await answered
        except RequestError as error:
            said = event({"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}})
        else:
            said = b"" if answer is None else b"".join(map(event, self._ends(answer)))
        finally:
            answered.cancel()
        await send({"type": "http.response.body", "body": said + DONE, "more_body": False})

    async def _send_texts(self, send: Send, answered: asyncio.Future[dict[str, Any] | None]) -> None:
        """Until the answer is there."""
        while not answered.done():
            token = asyncio.ensure_future(self._feed.wait())
            both: list[asyncio.Future[Any]] = [token, answered]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                token.cancel()
            if not answered.done():
                await self._send(send, [self._chunk(choice, {"content": text}) for choice, text in await self._feed.pieces()])
                await asyncio.wait([answered], timeout=PAUSE)

    async def _send(self, send: Send, chunks: Sequence[dict[str, Any]]) -> None:
        if chunks:
            await send({"type": "http.response.body", "body": b"".join(map(event, chunks)), "more_body": True})

    def _ends(self, answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What is left of an answer, as `serve.protocol.answer` makes it."""
        for choice in answer["choices"]:
            index, text = choice["index"], self._feed.rest(choice["index"], choice["message"]["content"])
            if text or choice["logprobs"]:
                yield self._chunk(index, {"content": text}, logprobs=choice["logprobs"])
            yield self._chunk(index, {}, choice["finish_reason"])
        if self._usage:
            yield self._head | {"choices": [], "usage": answer["usage"]}

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return self._head | {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]}
