"""The OpenAI protocol of chat completions: bodies of requests, their images, answers and errors.

A body is read strictly, and refused with the field, its value and what is allowed. Images are checked before anything else is done with
them, and kept for as long as the request lives.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse
from transformers import PreTrainedTokenizerBase

from zppo.core.types import IMAGE, ImageRef, Message
from zppo.engines.base import Completion, Sampling
from zppo.engines.chat import Chat
from zppo.errors import DataError, ModelError, one_line
from zppo.images.store import data_of, decode, header_of, keep


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: names the value, the cause and the mend.
        code: a short fixed name of the cause, for programs.
        param: the field of the request that is wrong, None where it is no field.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The protocol's class of errors that the status belongs to."""
        named = {401: "authentication_error", 429: "rate_limit_error"}
        return named.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def response(self) -> JSONResponse:
        """The whole answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """A `RequestError` as it was meant; anything else is a defect of the server, which says no more than its kind.

    A coroutine, since Starlette runs a plain function in a thread, and a server that ends at once would cancel what waits for that.
    """
    if not isinstance(error, RequestError):
        error = RequestError(500, f"the server failed on this request ({type(error).__name__}); its log says where", "defect")
    return error.response()


MOST_PIXELS = 1 << 25  # of an image: 100 MB when decoded
MOST_PIXELS_IN_ALL = 1 << 26  # of a request
DECODERS = 2  # at once
_LONGEST = 300  # characters of what is wrong with an image


@dataclass(frozen=True, slots=True)
class Taken:
    """The images of one request; `release` forgets them."""

    refs: tuple[ImageRef, ...] = ()
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class RequestImages:
    """Takes the images of requests.

    Attributes:
        folder: where they are kept meanwhile, each request's in a folder of its own.
        most: images of one request.
        text_only: why the model takes none; "" where it does.
        threads: decode them.
    """

    folder: Path
    most: int
    text_only: str = ""
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DECODERS, thread_name_prefix="zppo-serve-pictures"))

    def check(self, urls: Sequence[str]) -> None:
        """Whether so many images may come. RequestError (400) where not."""
        if urls and (self.text_only or not self.most):
            raise RequestError(
                400,
                f"the conversation has {len(urls)} image(s), and {self.text_only or 'this server takes none'}; send text alone",
                "images_refused",
                param="messages",
            )
        if len(urls) > self.most:
            raise RequestError(
                400, f"the conversation has {len(urls)} images; send at most {self.most}", "too_many_images", param="messages"
            )

    async def take(self, urls: Sequence[str]) -> Taken:
        """Decodes every image once, so that a broken one is refused here and does not fail a batch later.

        Raises:
            RequestError: (400) one is broken, too large, or no image.
        """
        if not urls:
            return Taken()
        return await asyncio.get_running_loop().run_in_executor(self.threads, self._take_all, urls)

    def _take_all(self, urls: Sequence[str]) -> Taken:
        folder = self.folder / uuid.uuid4().hex

        def release() -> None:
            shutil.rmtree(folder, ignore_errors=True)

        refs, left = [], MOST_PIXELS_IN_ALL
        try:
            for number, url in enumerate(urls, 1):
                ref, pixels = _take(url, f"{number} of the conversation", folder, left)
                refs.append(ref)
                left -= pixels
        except DataError as error:
            release()
            raise RequestError(400, one_line(error, _LONGEST), "invalid_image", param="messages") from None
        except BaseException:
            release()
            raise
        return Taken(tuple(refs), release)


def _take(url: str, name: str, folder: Path, left: int) -> tuple[ImageRef, int]:
    """An image and its pixels, of which `left` may still come. DataError where it cannot be used."""
    data = data_of(url)
    header = header_of(data, name)
    if header.width * header.height > MOST_PIXELS:
        raise DataError(f"the image {name} has {header.width:,} x {header.height:,} pixels; send one of at most {MOST_PIXELS:,} pixels")
    if header.width * header.height > left:
        raise DataError(
            f"the image {name} has {header.width:,} x {header.height:,} pixels, with those before it more than {MOST_PIXELS_IN_ALL:,} in "
            "all; send fewer, or smaller ones"
        )
    decode(data, name)
    return keep(data, folder), header.width * header.height


_CHATS = 16  # kept; clients choose the template arguments
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class LockedChat:
    """A model's chat behind a lock: fast tokenizers refuse to be used by two threads at once."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._chats: dict[str, Chat] = {}
        self._lock = threading.Lock()

    def encode(self, messages: Sequence[Message], template_args: Mapping[str, Any], images: Sequence[ImageRef] = ()) -> tuple[int, ...]:
        """Prompt ids of a conversation.

        Raises:
            ModelError: the template cannot render it, or does not take these arguments.
            DataError: a text holds what stands for an image.
        """
        with self._lock:
            return self._with(template_args).encode(messages, images)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens; think tags stay."""
        with self._lock:
            return self._chat.decode(ids)

    def settled(self, ids: Sequence[int]) -> int:
        """See `Chat.settled`."""
        with self._lock:
            return self._chat.settled(ids)

    def token(self, index: int) -> str:
        """One token as text, special ones too."""
        with self._lock:
            return self._chat.show([index])

    def _with(self, template_args: Mapping[str, Any]) -> Chat:
        if not template_args:
            return self._chat
        if self._chat.template is None:
            raise ModelError("this model has no chat template that could take arguments: leave chat_template_kwargs out")
        if reserved := sorted(_RESERVED & set(template_args)):
            raise ModelError(
                f"{', '.join(reserved)} is no argument of a chat template but of the tokenizer: leave it out of chat_template_kwargs"
            )
        key = json.dumps(template_args, sort_keys=True)
        if key not in self._chats:
            if len(self._chats) >= _CHATS:
                self._chats.clear()
            self._chats[key] = self._chat.with_arguments(template_args)
        return self._chats[key]


MAX_CHOICES = 128
MAX_STOPS = 16
_MAX_SEED = 2**63 - 1
_SHOWN = 80  # characters of a wrong value that an error repeats
_SAID = 5  # wrong fields that an error lists


@dataclass(frozen=True, slots=True)
class Content:
    """What a message says.

    Attributes:
        text: its text parts, with an `IMAGE` marker where an image part stood; neighbouring texts are joined by a line break, as vLLM does.
        images: `data:` URLs of its image parts, unread, in order.
    """

    text: str
    images: tuple[str, ...] = ()


def _read_content(given: Any) -> Any:
    """A text or a list of parts as `Content`; other kinds of values stay what they are and are refused by their type."""
    if isinstance(given, str):
        return Content(given)
    if not isinstance(given, list):
        return given
    pieces: list[str] = []
    images: list[str] = []
    for i, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and set(part) == {"type", "text"}:
            if not isinstance(part["text"], str):
                raise ValueError(f"the text of part {i} is {_show(part['text'])}")
            pieces.append(part["text"] if not pieces or pieces[-1] == IMAGE else f"\n{part['text']}")
        elif kind == "image_url" and set(part) == {"type", "image_url"}:
            images.append(_url(part["image_url"], i))
            pieces.append(IMAGE)
        else:
            known = kind in (None, "text", "image_url")
            cause = "" if known else f": it is of type {_show(kind)}, and this server reads texts and images"
            raise ValueError(f"part {i} is no text part and no image part{cause}")
    if images and "".join(pieces).count(IMAGE) != len(images):
        raise ValueError(f"its text holds {IMAGE}, which marks the place of an image; write it in another way")
    return Content("".join(pieces), tuple(images))


def _url(given: Any, part: int) -> str:
    """The URL of an image part, which holds the image itself: nothing is fetched and no file is read for a client."""
    url = given.get("url") if isinstance(given, dict) and set(given) <= {"url", "detail"} else None
    if not isinstance(url, str):
        raise ValueError(f'the image_url of part {part} is {_show(given)} and no {{"url": "data:..."}}')
    scheme = url.partition(":")[0].lower()
    if scheme != "data":
        raise ValueError(
            f"the image of part {part} is at {_show(url)}, and this server fetches nothing: send the image itself as a data: URL"
        )
    return url


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)


_SENT_BACK = ("refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content")


class RequestMessage(_Strict):
    """One message. The descriptions of fields, here and below, are what an error says to be allowed."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(lambda role: "system" if role == "developer" else role)] = (
        Field(description="system, user or assistant")
    )
    content: Annotated[Content, BeforeValidator(_read_content)] = Field(
        description='a text, or a list of parts {"type": "text", "text": "..."} and, in turns of the user, '
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
    )

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        """Fields of an answer that is sent back, and names, say nothing that this server could heed."""
        if not isinstance(given, dict):
            return given
        nothing = {name for name in _SENT_BACK if given.get(name) in (None, [], "")}
        nothing |= {"name"} if isinstance(given.get("name"), str | None) else set()
        return {name: value for name, value in given.items() if name not in nothing}

    @model_validator(mode="after")
    def _seen_by_the_user(self) -> RequestMessage:
        if self.content.images and self.role != "user":
            raise ValueError(f"images stand in turns of the user, not of the {self.role}")
        return self


class StreamOptions(_Strict):
    """What a stream says beside the completions."""

    include_usage: bool = Field(False, description="true or false: the tokens, at the end of a stream")
    include_obfuscation: bool = Field(False, description="true or false: nothing is added either way")


def _as_whole(given: Any) -> Any:
    """JSON knows one kind of numbers: 1.0 is 1."""
    return int(given) if isinstance(given, float) and given.is_integer() and abs(given) <= 2**53 else given


Whole = Annotated[int, BeforeValidator(_as_whole)]


class Body(_Strict):
    """A whole request."""

    model: str = Field(description="the name that GET /v1/models lists")
    messages: list[RequestMessage] = Field(description="a list of one message or more", min_length=1)
    n: Whole = Field(1, ge=1, le=MAX_CHOICES, description=f"an integer from 1 to {MAX_CHOICES}")
    temperature: float = Field(1.0, ge=0, le=2, description="0 (greedy), or a number from 0.01 to 2")
    top_p: float = Field(1.0, ge=0, le=1, description="a number from 0 to 1")
    top_k: Whole = Field(0, ge=-1, le=2**31, description="a positive integer, or 0 or -1 for all tokens")
    min_p: float = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: float = Field(1.0, ge=0.1, le=10, description="a number from 0.1 to 10")
    max_tokens: Whole | None = Field(None, ge=1, description="a positive integer")
    max_completion_tokens: Whole | None = Field(None, ge=1, description="a positive integer")
    seed: Whole | None = Field(None, ge=-_MAX_SEED - 1, le=_MAX_SEED, description="an integer of 64 bits")
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = (
        Field(
            default_factory=list, max_length=MAX_STOPS, description=f"a text that is not empty, or a list of at most {MAX_STOPS} such texts"
        )
    )
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: Whole = Field(0, ge=0, le=0, description="0: only the log-prob of the drawn token itself is kept")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='{"include_usage": true or false}, of a stream')
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description='an object of arguments for the chat template, e.g. {"enable_thinking": false}'
    )

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the tokens that it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> int | None:
        """Most tokens of a completion; None: to the end of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def conversation(self) -> tuple[Message, ...]:
        """The messages as the engine's chat takes them."""
        return tuple(Message(turn.role, turn.content.text) for turn in self.messages)

    @property
    def images(self) -> tuple[str, ...]:
        """`data:` URLs of all images, in order."""
        return tuple(url for turn in self.messages for url in turn.content.images)

    def sampling(self, default_limit: int) -> Sampling:
        """How to draw; `default_limit` where the request gives none."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.limit or default_limit,
        )


_ALLOWED = {name: field.description for model in (Body, RequestMessage, StreamOptions) for name, field in model.model_fields.items()}


def read_body(raw: bytes) -> Body:
    """The request in a body.

    Raises:
        RequestError: (400) it is no JSON object, or fields are unknown, missing or wrong; the message names each.
    """
    given = _read_json(raw)
    if not isinstance(given, dict):
        raise RequestError(400, f"the body is {_show(given)}; send a JSON object with model and messages", "invalid_json")
    known = {name: value for name, value in given.items() if value is not None or name not in Body.model_fields}
    known = {name: value for name, value in known.items() if not _is_neutral(name, value)}
    try:
        body = Body.model_validate(known)
    except ValidationError as error:
        faults = [(list(e["loc"]), e["type"], e["input"], e["msg"]) for e in error.errors(include_url=False)]
        said = "; ".join(_fault(*fault) for fault in faults[:_SAID])
        more = f"; and {len(faults) - _SAID} more" if len(faults) > _SAID else ""
        loc, kind, *_ = faults[0]
        code = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(kind, "invalid_value")
        raise RequestError(400, said + more, code, param=_path(loc)) from None
    if 0 < body.temperature < 0.01:
        said = _fault(["temperature"], "value", body.temperature, "")
        raise RequestError(400, said, "invalid_value", param="temperature")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise RequestError(
            400,
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}: they mean the same; send one",
            "invalid_value",
            param="max_tokens",
        )
    return body


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "include_reasoning": (True, False),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "priority": (0,),
    "prompt_logprobs": (0, False),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"}, "text"),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields of the protocol, and of vLLM's, without a counterpart here -> the values with which they ask for nothing; null is one of each."""
_LABELS = ("prompt_cache_key", "safety_identifier", "user")  # any text: who asks changes nothing


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a field that this server does not have asks for nothing. RequestError (400) where it asks for something."""
    if name in _LABELS and isinstance(value, str | None):
        return True
    if value is None:
        return name not in Body.model_fields  # null of a field that is not here asks for nothing
    if name not in _NEUTRAL:
        return False
    if any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name]):
        return True
    allowed = " or ".join(json.dumps(neutral) for neutral in _NEUTRAL[name])
    raise RequestError(400, f"{name} is {_show(value)}, which this server cannot do; it takes {allowed}", "unknown_field", param=name)


def _read_json(raw: bytes) -> Any:
    def no_number(text: str) -> NoReturn:
        raise ValueError(f"{text} is no JSON number")

    try:
        given = json.loads(raw.decode("utf-8"), parse_constant=no_number)
        json.dumps(given, ensure_ascii=False).encode("utf-8")  # a lone surrogate is text for no tokenizer
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise RequestError(400, f"the body holds text that is not Unicode ({error.reason}); send UTF-8", "invalid_json") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply; send a plain request", "invalid_json") from None
    except ValueError as error:
        raise RequestError(400, f"the body is no JSON: {error}; send a JSON object", "invalid_json") from None
    return given


def _fault(loc: list[str | int], kind: str, value: Any, cause: str) -> str:
    """One wrong field in words."""
    path = _path(loc)
    if kind == "extra_forbidden":
        own = StreamOptions if loc[0] == "stream_options" else RequestMessage
        fields = Body.model_fields if len(loc) == 1 else own.model_fields
        return f"{path} is no field that this server knows; it knows {', '.join(fields)}"
    allowed = _ALLOWED[next(part for part in reversed(loc) if isinstance(part, str) and part in _ALLOWED)]
    if kind == "missing":
        return f"{path} is missing; it must be {allowed}"
    why = f" ({cause.removeprefix('Value error, ')})" if kind == "value_error" else ""
    return f"{path} is {_show(value)}{why}; it must be {allowed}"


def _path(loc: list[str | int]) -> str:
    """["messages", 0, "role"] -> messages[0].role"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{shorten(part)}" for part in loc)
    return text.removeprefix(".")


def _show(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=repr))


def shorten(text: str) -> str:
    """A text from a request, for an error that repeats it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def answer(words: LockedChat, model: str, prompt_tokens: int, completions: Sequence[Completion], body: Body) -> dict[str, Any]:
    """The body of an answer.

    `usage` counts what was decoded: end tokens, and what stood behind a stop text, too.

    Args:
        model: name that the model is served under.
        prompt_tokens: length of the prompt.
        completions: one per choice.
        body: of the request; a text ends before the first of its stop texts.
    """
    generated = sum(len(completion.ids) for completion in completions)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(words, i, completion, body.stop, body.logprobs) for i, completion in enumerate(completions)],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": generated, "total_tokens": prompt_tokens + generated},
    }


def _choice(words: LockedChat, index: int, completion: Completion, stop: Sequence[str], logprobs: bool) -> dict[str, Any]:
    ids = completion.ids.tolist()
    text = words.decode(ids)
    stops = [place for place in (text.find(s) for s in stop) if place >= 0]
    if stops:
        text = text[: min(stops)]
        ids = ids[: _tokens_to_stop(words, ids, stop)]
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": {"content": _tokens(words, ids, completion.logprobs.tolist()), "refusal": None} if logprobs else None,
        "finish_reason": "length" if completion.truncated and not stops else "stop",
    }


def _tokens_to_stop(words: LockedChat, ids: Sequence[int], stop: Sequence[str]) -> int:
    """How many tokens it takes until a stop text is complete."""

    def complete(count: int) -> bool:
        text = words.decode(ids[:count])
        return any(s in text for s in stop)

    return bisect_left(range(len(ids)), True, key=complete)


def _tokens(words: LockedChat, ids: Sequence[int], logprobs: Sequence[float]) -> list[dict[str, Any]]:
    """The protocol's list of tokens; `bytes` is null for a token that is a part of a character."""
    listed = []
    for index, logprob in zip(ids, logprobs, strict=False):
        text = words.token(index)
        listed.append({"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode()), "top_logprobs": []})
    return listed
