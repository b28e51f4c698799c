"""Conversations as data sets write them -> messages, with their images aside; and values of cells in words."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast, get_args, get_type_hints

from zppo.core.types import IMAGE, Message


class RowError(Exception):
    """What is wrong with a value; the caller knows file, row and column."""


def text_of(value: object, empty: bool = False) -> str:
    """A text that is not blank and that a tokenizer can encode. RowError where it is none."""
    if not isinstance(value, str):
        raise RowError(f"is {a(value)}; expected text")
    if not empty and not value.strip():
        raise RowError("is empty; give it a text, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"holds half of a surrogate pair at character {error.start + 1}, which no encoding can write") from None
    return value


def a(value: object) -> str:
    """A value in words, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


_ROLES: tuple[str, ...] = get_args(get_type_hints(Message)["role"])
_OTHER_ROLES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_NOTES = frozenset("name id timestamp date language model source finish_reason hash".split())
"""What chat APIs and exports of chats add to a turn, besides numbers and booleans (`weight`, `toxic`): nobody is shown it."""
_PRINTED = re.compile(r"\s*(?:array\()?\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
_MARKED = re.compile(r"\s*(<\|im_start\|>|<\|start_header_id\|>|<\|begin_of_text\|>|<start_of_turn>|(?:<s>\s*)?\[INST\])")
_MOST_TEXT = 1 << 24  # characters of a cell that is parsed
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")


class Turns(NamedTuple):
    """What a conversation holds.

    Attributes:
        messages: its turns, the last one a user's; an `IMAGE` marker stands where an image part stood.
        images: what each image part holds, in order; None for a mere place (`{"type": "image"}`).
        answer: what the model said last, in sets for supervised training; it is not shown. None where the user speaks last.
    """

    messages: tuple[Message, ...]
    images: list[object]
    answer: str | None = None


def is_conversation(value: object) -> bool:
    """Whether a cell, be it JSON text, is a list of turns."""
    value = _as_list(parsed(value))
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) and _role(turn) is not None for turn in value)


def turns_of(value: object) -> Turns:
    """A conversation: a list of {role, content}, or of {from, value} as ShareGPT writes it; also as JSON text.

    Raises:
        RowError: it is none.
    """
    value = _as_list(parsed(value))
    if not isinstance(value, list) or not value:
        check_printed(value)
        text = "; a text is named with data.columns.prompt" if isinstance(value, str) else ""
        raise RowError(f"is {a(value)}; expected a list of {{role, content}} with at least one turn{text}")
    images: list[object] = []
    numbered = list(enumerate(value, 1))
    answer = None
    if len(numbered) > 1 and _is_models(numbered[-1][1]):
        answer = _said(numbered.pop()[1])
    if len(numbered) > 1 and _is_empty_system(numbered[0][1]):
        del numbered[0]
    messages = tuple(_message(turn, number, images) for number, turn in numbered)
    if messages[-1].role != "user":
        what = "before the model's answer" if answer is not None else "the last turn"
        raise RowError(f"{what} is the {messages[-1].role}'s; it must be the user's, who asks the question")
    return Turns(messages, images, answer)


def check_printed(value: object) -> None:
    """Refuses a text that is a whole conversation: as numpy and pandas print arrays of objects, or in the marks of a chat template."""
    if isinstance(value, str) and _PRINTED.match(value):
        raise RowError("is a conversation as numpy or pandas print it, which cannot be read back; save the set as parquet or JSON lines")
    if isinstance(value, str) and (mark := _MARKED.match(value)):
        raise RowError(f"is a conversation in the marks of a chat template ({mark[1]}); write its turns as {{role, content}}, without them")


def _as_list(value: object) -> object:
    """By turns, a conversation that is an object of lists (`{"role": [...], "content": [...]}`), as `datasets` gives them."""
    if isinstance(value, Mapping) and any({role, content} <= set(value) for role, content in (("role", "content"), ("from", "value"))):
        columns = list(value.values())
        if all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1:
            return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    return value


def _role(turn: Mapping[str, Any]) -> Any:
    return turn.get("role") if turn.get("role") is not None else turn.get("from")


def _content_of(turn: Mapping[str, Any]) -> Any:
    if isinstance(parts := turn.get("parts"), list) and turn.get("content") is None:  # Gemini's and Vertex AI's
        return [{"type": "text", **part} if isinstance(part, Mapping) and "text" in part else part for part in parts]
    return turn.get("content") if turn.get("content") is not None else turn.get("value")


def _is_models(turn: object) -> bool:
    role = _role(turn) if isinstance(turn, Mapping) else None
    return isinstance(role, str) and _OTHER_ROLES.get(role, role) == "assistant"


def _said(turn: Mapping[str, Any]) -> str | None:
    """The text of the model's last turn; None where it has none, such as one that calls a tool."""
    content = _content_of(turn)
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) and content.strip() else None


def _message(turn: object, number: int, images: list[object]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {a(turn)}; expected {{role, content}}")
    for key, value in turn.items():
        # What has no meaning here; a tool call would have one.
        known = key in ("role", "content", "from", "value") or key in _NOTES or (key == "parts" and turn.get("content") is None)
        if not (known or value in (None, "", [], {}) or isinstance(value, int | float)):
            raise RowError(f"turn {number} has the key {key!r}; only role and content are supported")
    given = _role(turn)
    role = _OTHER_ROLES.get(given, given) if isinstance(given, str) else given
    if role not in _ROLES:
        what, expected = ("has the role", _ROLES) if turn.get("role") is not None else ("is from", (*_OTHER_ROLES, *_ROLES))
        raise RowError(f"turn {number} {what} {given!r}; expected one of {', '.join(expected)}")
    if role == "system" and number > 1:
        raise RowError(f"turn {number} is a system turn; only the first turn may be one")
    try:
        return Message(cast(Any, role), _content(_content_of(turn), images))
    except RowError as fault:
        raise RowError(f"turn {number}, content: {fault}") from None


def _is_empty_system(turn: object) -> bool:
    """A system turn without a text, which exports of chats begin with, says nothing."""
    if not isinstance(turn, Mapping) or _role(turn) not in ("system", "developer"):
        return False
    content = _content_of(turn)
    return content is None or content == [] or (isinstance(content, str) and not content.strip())


def parsed(value: object) -> object:
    """What a text holds that is a list or an object in JSON, or in Python's form as pandas writes it into tables; else the value itself."""
    if not isinstance(value, str) or len(value) > _MOST_TEXT or not value.strip().startswith(("[", "{")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found: object = read(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return value


def _content(value: object, images: list[object]) -> str:
    """Text, or a list of text and image parts, which are joined; what the image parts hold goes to `images`."""
    if not isinstance(value, list):
        return text_of(value)
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append(text_of(part.get("text"), empty=True))
        elif kind in ("image", "image_url"):
            images.append(next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None))
            parts.append(IMAGE)
        else:
            shown = repr(kind) if isinstance(part, Mapping) else a(part)
            raise RowError(f"a part of the kind {shown} is not supported; text, image and image_url parts are")
    return text_of("".join(parts))
