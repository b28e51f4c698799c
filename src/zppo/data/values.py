"""Values of a row: texts, and how messages name what is none."""

from __future__ import annotations

from collections.abc import Mapping


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
        raise RowError(
            f"holds half of a surrogate pair at character {error.start + 1}, which no encoding can write"
        ) from None
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
