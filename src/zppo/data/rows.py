"""One row of a data file -> one question, or an error that names file, row and column."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast, get_args, get_type_hints

from zppo.core.types import RULE, Grading, ImageRef, Message, Question
from zppo.data.reading import Place
from zppo.errors import DataError

_ROLES: tuple[str, ...] = get_args(get_type_hints(Message)["role"])
_GRADINGS: tuple[str, ...] = get_args(Grading)
_NEAREST_SHOWN = 8


_GOLD_KEY = "ground_truth"  # where a column holds an object (VeRL's `reward_model`), the answer is under this key


class Columns(Protocol):
    """Which column holds what (`train.settings.ColumnSettings` is one); `a.b` is the value under b of the object in column a."""

    @property
    def prompt(self) -> str: ...
    @property
    def messages(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def images(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def grading(self) -> str: ...


class _RowError(Exception):
    """What is wrong with a value; the caller knows file, row and column."""


def column_names(columns: Columns) -> tuple[str, ...]:
    """Every column that is looked for."""
    return columns.prompt, columns.messages, columns.answer, columns.images, columns.id, columns.level, columns.grading


def question_from_row(data: object, columns: Columns, place: Place, answer_after: str | None = None) -> Question:
    """The question in a row; with `answer_after`, the gold is what follows its last occurrence. Raises DataError."""
    if not isinstance(data, Mapping):
        raise DataError(f"{place}: is {_a(data)}; every row must be an object with columns")
    column = ""
    try:
        column = columns.messages
        given = _value(data, column)
        messages = _messages(given) if given not in (None, "") else None
        column = columns.prompt
        if messages is None:
            messages = (Message("user", _prompt(data, columns)),)
        column = columns.answer
        gold = _answer(data, column, answer_after)
        column = columns.id
        identity = _label(_value(data, column)) or f"{place.name}:{place.row}"
        column = columns.level
        level = _label(_value(data, column))
        column = columns.grading
        grading = _grading(_value(data, column))
        column = columns.images
        images = _images(_value(data, column), place.folder)
    except _RowError as fault:
        raise DataError(f"{place}, column {column!r}: {fault}") from None
    return Question(id=identity, messages=messages, gold=gold, images=images, level=level, grading=grading)


def _value(data: Mapping[str, Any], column: str) -> Any:
    """What stands in a column, None for nothing; a name with dots that is no column leads into objects."""
    if column in data:
        return data[column]
    value: Any = data
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _prompt(data: Mapping[str, Any], columns: Columns) -> str:
    value = _value(data, columns.prompt)
    if value is None:
        raise _RowError(
            f"missing, and so is {columns.messages!r}; {_found(data)}. "
            "Name the columns of your file with data.columns.prompt or data.columns.messages"
        )
    if isinstance(value, list):
        raise _RowError(f"is {_a(value)}; a list of {{role, content}} is named with data.columns.messages")
    return _text(value)


def _answer(data: Mapping[str, Any], column: str, after: str | None) -> str:
    """The gold: a text, a number, a list of one of them, or an object that holds it under `ground_truth`."""
    value = _value(data, column)
    if isinstance(value, Mapping) and _GOLD_KEY in value:
        value = value[_GOLD_KEY]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        why = "is null" if column in data else f"missing; {_found(data)}. Name it with data.columns.answer"
        raise _RowError(f"{why} (every question needs a right answer)")
    if isinstance(value, Mapping):
        inside = ", ".join(f"{column}.{key}" for key in list(value)[:_NEAREST_SHOWN])
        raise _RowError(f"is an object; name the value in it with data.columns.answer ({inside or 'it is empty'})")
    if isinstance(value, list):
        raise _RowError(f"is {_a(value)}; a question has exactly one right answer, so give one text or number")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise _RowError(f"is {_a(value)}; an answer is a text or a number")
    gold = _number(value) if not isinstance(value, str) else _text(value).strip()
    return gold if after is None else _tail(gold, after)


def _tail(gold: str, after: str) -> str:
    _, mark, tail = gold.rpartition(after)
    if not mark or not tail.strip():
        shown = _a(gold if len(gold) <= 30 else f"...{gold[-27:]}")
        why = f"nothing follows {after!r} in it" if mark else f"holds no {after!r}"
        raise _RowError(f"{why} ({shown}); mend the row or data.answer_after")
    return tail.strip()


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _RowError(f"is {_a(value)}; expected a list of {{role, content}} with at least one turn")
    messages = tuple(_message(turn, number) for number, turn in enumerate(value, 1))
    if messages[-1].role != "user":
        raise _RowError(f"the last turn is the {messages[-1].role}'s; it must be the user's, who asks the question")
    return messages


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise _RowError(f"turn {number} is {_a(turn)}; expected {{role, content}}")
    extra = [key for key, value in turn.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise _RowError(f"turn {number} has the key {extra[0]!r}; only role and content are supported")
    role = turn.get("role")
    if role not in _ROLES:
        raise _RowError(f"turn {number} has the role {role!r}; expected one of {', '.join(_ROLES)}")
    if role == "system" and number > 1:
        raise _RowError(f"turn {number} is a system turn; only the first turn may be one")
    try:
        return Message(cast(Any, role), _content(turn.get("content")))
    except _RowError as fault:
        raise _RowError(f"turn {number}, content: {fault}") from None


def _content(value: object) -> str:
    """Text, or a list of text parts, which are joined."""
    if not isinstance(value, list):
        return _text(value)
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = repr(part.get("type")) if isinstance(part, Mapping) else _a(part)
            raise _RowError(
                f"a part of the kind {kind} is not supported, only text parts are; images go to the images column"
            )
        parts.append(_text(part.get("text"), empty=True))
    return _text("".join(parts))


def _images(value: object, folder: Path) -> tuple[ImageRef, ...]:
    if value is None or value == "":
        return ()
    if not isinstance(value, list):
        raise _RowError(f"is {_a(value)}; expected a list of paths")
    return tuple(_image(item, folder) for item in value)


def _image(item: object, folder: Path) -> ImageRef:
    if not isinstance(item, str) or not item.strip():
        raise _RowError(f"holds {_a(item)}; expected a list of paths")
    path = (folder / Path(item).expanduser()).absolute()
    try:
        return ImageRef(str(path), _sha256(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _RowError(
            f"the image {item!r} cannot be read at {path} ({reason}); paths are relative to the data file"
        ) from None


@lru_cache(maxsize=4096)
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(value: object, empty: bool = False) -> str:
    """A text that is not blank and that a tokenizer can encode."""
    if not isinstance(value, str):
        raise _RowError(f"is {_a(value)}; expected text")
    if not empty and not value.strip():
        raise _RowError("is empty; give it a text, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RowError(
            f"holds half of a surrogate pair at character {error.start + 1}, which no encoding can write"
        ) from None
    return value


def _label(value: object) -> str:
    """An id or a level as text; "" for none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise _RowError(f"is {_a(value)}; expected a text or a number")
    return _text(value, empty=True).strip() if isinstance(value, str) else _number(value)


def _grading(value: object) -> Grading:
    """Who grades the question; the rules where the column is missing, null or blank."""
    name = value.strip() if isinstance(value, str) else value
    if name is None or name == "":
        return RULE
    if name not in _GRADINGS:
        raise _RowError(
            f"is {_a(value)}; write {' or '.join(_GRADINGS)}, or name another column with data.columns.grading"
        )
    return cast(Grading, name)


def _number(value: int | float | Decimal) -> str:
    if not math.isfinite(value):
        raise _RowError(f"is {value}, which is no number")
    return str(value)


def _a(value: object) -> str:
    """A value in words, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def _found(data: Mapping[str, Any]) -> str:
    names = [repr(name) for name in data]
    more = f" and {len(names) - _NEAREST_SHOWN} more" if len(names) > _NEAREST_SHOWN else ""
    return f"the row has {', '.join(names[:_NEAREST_SHOWN]) or 'no columns'}{more}"
