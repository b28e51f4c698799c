"""Images as they are sent to a teacher's servers: made in threads, once for the completions and repeats of a request.

The teacher on a server: any OpenAI-compatible chat-completions address, or several of them.

`complete` is a plain blocking call. Behind it one thread runs an event loop, in which every request is sent under one cap, retried with
back-off while the teacher may come back, and given up when it does not: the reply then says why, and the run goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from zppo.core.parts import TurnParts, message_parts
from zppo.core.types import ImageRef, Message
from zppo.errors import ZPPOError
from zppo.images.store import PixelLimits, request_url
from zppo.prompts.neutralise import IMAGE_TEXTS
from zppo.step_log import StepLog
from zppo.teacher.http import OPENAI_HOST, REPLY_BYTES, Trouble, Wire
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling
from zppo.teacher.reply import Answer, Choice, sound
from zppo.teacher.servers import Servers, backoff
from zppo.teacher.startup_check import PING_IMAGE, PING_WORDS, Names, check_images, check_servers

ENCODERS = 4  # images decoded at once, of up to 200 MB each
MOST_HELD = 64 << 20  # characters that are kept for requests to come, besides those of the requests under way


class Sending:
    """Makes `data:` URLs of images, and keeps the last ones: a server that gives one choice at a time is sent an image G_T times.

    Of one event loop.

    Args:
        limits: of the pixels of an image.
        most: characters of URLs that are kept.
    """

    def __init__(self, limits: PixelLimits, most: int = MOST_HELD) -> None:
        self._limits, self._most = limits, most
        self._encoding = asyncio.Semaphore(ENCODERS)
        self._making: dict[ImageRef, asyncio.Task[str]] = {}
        self._kept: OrderedDict[ImageRef, str] = OrderedDict()

    async def url(self, ref: ImageRef) -> str:
        """The image as it is sent. DataError as `request_url`."""
        if ref in self._kept:
            self._kept.move_to_end(ref)
            return self._kept[ref]
        if ref not in self._making:
            self._making[ref] = asyncio.create_task(self._make(ref))
        return await asyncio.shield(self._making[ref])  # others may wait for it where one is cancelled

    async def _make(self, ref: ImageRef) -> str:
        try:
            async with self._encoding:
                made = self._kept[ref] = await asyncio.to_thread(request_url, ref, self._limits)
        finally:
            del self._making[ref]
        while sum(map(len, self._kept.values())) > self._most:
            self._kept.popitem(last=False)
        return made


TOKEN_BYTES = 256  # of a reply, for each token: JSON escapes, and thoughts in a field of their own
TURNS = 3  # so often a choice is asked for that does not come
PING = (Message("user", PING_WORDS),)
PING_TOKENS = 16
OFFICIAL_PING_TOKENS = 1024  # OpenAI's models that think answer 400 where the limit leaves no room for it

T = TypeVar("T")


@dataclass(slots=True)
class _Got:
    """What one request has got so far."""

    texts: list[str | None]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: list[str] = field(default_factory=list)

    def reply(self) -> TeacherReply:
        missing = any(text is None for text in self.texts)
        return TeacherReply(
            tuple(self.texts),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            error=self.errors[-1] if missing and self.errors else "",
        )


class RemoteTeacher:
    """A `Teacher` over HTTP. What cannot be served gets a reply that says why; nothing is raised.

    `think_open` of its replies is False: a server that splits thoughts off puts the answer alone into `content`, and one that does not
    leaves the closing tag in it.

    Attributes:
        model: the name that the servers know it by.
        servers: its addresses and what serving took; belongs to the teacher's thread.
        one_by_one: a request asks for one choice, because a server does not give several; the start-up check finds that out.
        special_texts: what its tokenizer takes for control tokens is not known (the student's are neutralised): the image tokens of
            common families alone, since a server refuses a prompt with a place too many.
    """

    special_texts: tuple[str, ...] = IMAGE_TEXTS

    def __init__(
        self,
        model: str,
        base_urls: Sequence[str],
        *,
        key: str = "",
        concurrency: int = 64,
        deadline: float = 600.0,
        retry_for: float = 600.0,
        names: Names = Names(),  # noqa: B008 - frozen
        limits: PixelLimits = PixelLimits(),  # noqa: B008 - frozen
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Starts the thread; nothing is sent.

        Args:
            model: as the servers name it.
            base_urls: at least one; mostly ending in /v1.
            key: the bearer key; "" for servers that want none.
            concurrency: requests under way at once, over all addresses.
            deadline: seconds for one attempt, to the last byte of its reply.
            retry_for: seconds for which a request is tried again, and without any success after which the teacher counts as down.
            names: for messages of `check`.
            limits: fewest and most pixels of an image that is sent.
            warn: takes what `check` found and the run can do without, and that nothing is served, or is again; called in any thread.
        """
        self.model = model
        self._names, self._warn, self._key_given = names, warn, bool(key)
        self._told: set[str] = set()
        wires = [Wire(url, key, deadline, concurrency) for url in base_urls]
        self.servers = Servers(wires, retry_for, lambda text: warn(f"{names.section}.base_urls: {text}"))
        self._counted, self._counting = asdict(self.servers.service), threading.Lock()
        self.one_by_one = False
        self._official = any(urlsplit(url).hostname == OPENAI_HOST for url in base_urls)
        self._slots = asyncio.Semaphore(concurrency)
        self._sending = Sending(limits)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"RemoteTeacher({self.model!r}, {[a.wire.url for a in self.servers.addresses]})"

    def check(self, how: TeacherSampling, use: str = "", n: int = 1) -> None:
        """Sends every address a small completion with the fields of one use, so that mistakes show at start-up.

        An address that cannot be reached while another can is a warning. Whether all give several choices to one request is remembered.

        Args:
            use: its section in the recipe, for messages.
            n: choices that a request of this use asks for.

        Raises:
            TeacherError: no address can be reached, or one refuses key, model or fields.
        """
        counts = [1, n] if n > 1 and how.sampling.temperature > 0 else [1]
        few = OFFICIAL_PING_TOKENS if self._official else PING_TOKENS
        bodies = [self.body(PING, count, 0, how, few) for count in counts]
        whole = self.body(PING, 1, 0, how) if how.sampling.max_new_tokens > few else None
        wires = [address.wire for address in self.servers.addresses]
        found = self.run(check_servers(wires, bodies, use, self._names, self._key_given, whole))
        self.one_by_one = self.one_by_one or not found.several
        for reason in found.unreachable:
            self._say_once(f"{reason}; the run starts without this address", reason.partition(": ")[0])
        for note in found.notes:
            self._say_once(note)

    def _say_once(self, text: str, subject: str = "") -> None:
        """A warning about the servers; about a `subject` the first one alone."""
        if (subject or text) not in self._told:
            self._told.add(subject or text)
            self._warn(f"{self._names.section}.base_urls: {text}")

    def check_images(self, how: TeacherSampling, count: int, use: str = "") -> None:
        """Sends every address a small completion about `count` small images, the most that a question of the run has.

        Raises:
            TeacherError: one refuses them.
        """
        few = OFFICIAL_PING_TOKENS if self._official else PING_TOKENS
        parts = [{"type": "image_url", "image_url": {"url": PING_IMAGE}}] * count + [{"type": "text", "text": PING[0].content}]
        body = self.body(PING, 1, 0, how, few) | {"messages": [{"role": "user", "content": parts}]}
        wires = [address.wire for address in self.servers.addresses]
        self.run(check_images(wires, body, count, use, self._names))

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        """Replies in the order of the requests, when all are served or given up; `log` gets the counts of `Service` as remote_*, of
        all that was served since a log got them last: what was begun too.

        `len(keys)` completions are asked for in one request, with a seed that follows from the keys, so that a server that honours
        seeds repeats itself. At temperature 0 one completion serves all keys of a request.
        """
        replies = self.run(self._complete(requests, how)) if requests else []
        if log is not None:
            with self._counting:
                before, self._counted = self._counted, asdict(self.servers.service)
                log.add_own(**{f"remote_{name}": float(now - before[name]) for name, now in self._counted.items()})
        return replies

    def begin(self, request: TeacherRequest, how: TeacherSampling) -> Future[TeacherReply]:
        """The reply to one request, when it is there; cancelling it breaks the request off. Any thread may call it."""

        async def one() -> TeacherReply:
            return (await self._complete([request], how))[0]

        return asyncio.run_coroutine_threadsafe(one(), self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, done in the teacher's thread; an interruption here ends it there. Any thread may call it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends what is under way, the connections and the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def body(
        self,
        messages: Sequence[Message],
        n: int,
        seed: int,
        how: TeacherSampling,
        most_tokens: int | None = None,
        *,
        images: Sequence[ImageRef] = (),
        urls: Mapping[ImageRef, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """The JSON of one request.

        temperature and top_p are always sent, since servers have defaults of their own; top_k where it is on; template arguments as
        `chat_template_kwargs`, the name that vLLM and SGLang read. `how.extra_body` wins over everything (and is the way to min_p and
        penalties); None leaves a field out.

        Args:
            n: choices.
            most_tokens: a lower token limit than the sampling's.
            images: of the conversation, in order.
            urls: each of them as it is sent.

        Raises:
            DataError: the images do not fit the conversation's markers.
        """
        s = how.sampling
        tokens = s.max_new_tokens if most_tokens is None else min(most_tokens, s.max_new_tokens)
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [_turn(turn, urls) for turn in message_parts(messages, images)],
            "n": n,
            "seed": seed,
            "temperature": s.temperature,
            "top_p": s.top_p,
            # OpenAI's newer models refuse the old name, others do not know the new one.
            "max_completion_tokens" if self._official else "max_tokens": tokens,
        }
        if s.top_k:
            fields["top_k"] = s.top_k
        if how.template_args:
            fields["chat_template_kwargs"] = dict(how.template_args)
        fields |= how.extra_body
        return {name: value for name, value in fields.items() if value is not None}

    async def _complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling) -> list[TeacherReply]:
        got = [_Got([None] * len(request.keys)) for request in requests]
        down = await self.servers.still_down(self.body(PING, 1, 0, how, PING_TOKENS), REPLY_BYTES)
        async with asyncio.TaskGroup() as group:
            for request, mine in zip(requests, got, strict=True):
                if down:
                    self._give_up(mine, down)
                else:
                    places = tuple(range(len(request.keys)))
                    group.create_task(self._serve(group, request, how, mine, places, 1))
        return [mine.reply() for mine in got]

    async def _serve(
        self, group: asyncio.TaskGroup, request: TeacherRequest, how: TeacherSampling, got: _Got, places: tuple[int, ...], turn: int
    ) -> None:
        """Asks for the completions of the keys at `places`; those that do not come are asked for again one by one."""
        greedy = how.sampling.temperature == 0
        n = 1 if greedy else len(places)
        async with self._slots:
            if n > 1 and self.one_by_one:
                answer = None
            else:
                seed = seed_of([request.keys[place] for place in places])
                try:
                    urls = {ref: await self._sending.url(ref) for ref in dict.fromkeys(request.images)}
                    body = self.body(request.messages, n, seed, how, images=request.images, urls=urls)
                    answer = await self.servers.ask(body, REPLY_BYTES + TOKEN_BYTES * n * how.sampling.max_new_tokens)
                except Trouble as trouble:
                    self.servers.service.oversized += trouble.oversized
                    self._give_up(got, trouble.reason)
                    return
                except ZPPOError as error:  # an image that is gone; the run goes on without this request
                    self._give_up(got, str(error))
                    return
        if answer is None:
            missing = list(places)
        else:
            missing = self._take(answer, got, places, n)
            if turn == TURNS and missing:
                self._give_up(got, got.errors[-1])
                return
            self.servers.service.retries += len(missing) if not greedy else bool(missing)
            if len(missing) == len(places):
                await self.servers.wait(backoff(turn))
            turn += 1
        for again in [tuple(missing)] if greedy and missing else [(place,) for place in missing]:
            group.create_task(self._serve(group, request, how, got, again, turn))

    def _take(self, answer: Answer, got: _Got, places: tuple[int, ...], n: int) -> list[int]:
        """Puts the choices where they belong; the places of those that may be asked for again."""
        got.prompt_tokens += answer.prompt_tokens
        got.completion_tokens += answer.completion_tokens
        choices = list(answer.choices[:n])
        if len(choices) < n:
            self.servers.service.short += 1
            choices += [Choice(None, "the server gave fewer choices than it was asked for", True)] * (n - len(choices))
        missing = []
        for place, choice in zip(places, choices if n == len(places) else choices * len(places), strict=True):
            got.texts[place] = choice.text
            if choice.text is not None and choice.why:
                self._say_once(choice.why)
            if choice.text is None:
                got.errors.append(choice.why)
                missing += [place] if choice.again else []
        self.servers.service.given_up += any(choice.text is None and not choice.again for choice in choices)
        return missing

    def _give_up(self, got: _Got, reason: str) -> None:
        got.errors.append(reason)
        self.servers.service.given_up += 1

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*(a.wire.close() for a in self.servers.addresses), return_exceptions=True)
        await self._loop.shutdown_asyncgens()


def _turn(turn: TurnParts, urls: Mapping[ImageRef, str]) -> dict[str, Any]:
    """A turn as the protocol has it: a text, or a list of parts where there are images in it."""
    if all(isinstance(part, str) for part in turn.parts):
        return {"role": turn.role, "content": sound("".join(map(str, turn.parts)))}
    content: list[dict[str, Any]] = [
        {"type": "text", "text": sound(part)} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": urls[part]}}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def seed_of(keys: Sequence[int]) -> int:
    """A seed in 31 bits, which every server takes, from the keys of a request."""
    digest = hashlib.blake2b(",".join(map(str, keys)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
