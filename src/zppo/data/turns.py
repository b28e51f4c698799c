"""Conversations as data sets write them -> messages, and the images that stand in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast, get_args, get_type_hints

from zppo.core.types import IMAGE, Message
from zppo.data.values import RowError, a, text_of

_ROLES: tuple[str, ...] = get_args(get_type_hints(Message)["role"])
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")


class Turns(NamedTuple):
    """What a conversation holds.

    Attributes:
        messages: its turns, the last one a user's; an `IMAGE` marker stands where an image part stood.
        images: what each image part holds, in order; None for a mere place (`{"type": "image"}`).
        answer: the last turn of a LLaVA conversation, which is the model's and is not shown; None in any other.
    """

    messages: tuple[Message, ...]
    images: list[object]
    answer: str | None = None


def turns_of(value: object) -> Turns:
    """A conversation: a list of {role, content}, or of {from, value} as LLaVA writes it. RowError where it is none."""
    if not isinstance(value, list) or not value:
        raise RowError(f"is {a(value)}; expected a list of {{role, content}} with at least one turn")
    images: list[object] = []
    llava = all(isinstance(turn, Mapping) and turn.get("role") is None and "from" in turn for turn in value)
    turns = [_from_llava(turn, number) for number, turn in enumerate(value, 1)] if llava else value
    messages = tuple(_message(turn, number, images) for number, turn in enumerate(turns, 1))
    answer = None
    if llava and len(messages) > 1 and messages[-1].role == "assistant":
        *rest, last = messages
        messages, answer = tuple(rest), last.content
    if messages[-1].role != "user":
        raise RowError(f"the last turn is the {messages[-1].role}'s; it must be the user's, who asks the question")
    return Turns(messages, images, answer)


def _from_llava(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    role = turn["from"] if isinstance(turn["from"], str) else ""
    if role not in _LLAVA_ROLES:
        raise RowError(f"turn {number} is from {turn['from']!r}; expected one of {', '.join(_LLAVA_ROLES)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role")}
    return {"role": _LLAVA_ROLES[role], "content": turn.get("value")} | rest


def _message(turn: object, number: int, images: list[object]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is {a(turn)}; expected {{role, content}}")
    extra = [key for key, value in turn.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise RowError(f"turn {number} has the key {extra[0]!r}; only role and content are supported")
    role = turn.get("role")
    if role not in _ROLES:
        raise RowError(f"turn {number} has the role {role!r}; expected one of {', '.join(_ROLES)}")
    if role == "system" and number > 1:
        raise RowError(f"turn {number} is a system turn; only the first turn may be one")
    try:
        return Message(cast(Any, role), _content(turn.get("content"), images))
    except RowError as fault:
        raise RowError(f"turn {number}, content: {fault}") from None


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
