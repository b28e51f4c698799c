"""How questions are written: options in one shape, images where they belong."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zppo.core.types import IMAGE, Message
from zppo.evaluate.adapters.row import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABEL = re.compile(r"^\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*")
_MARK = re.compile(r"<image(?:[ _]?\d+)?>", re.IGNORECASE)
_NUMBERED = re.compile(r"<image[ _]?(\d+)>", re.IGNORECASE)


def bare_options(options: Sequence[str]) -> tuple[str, ...]:
    """Options without their letters, where every one of them carries its own (`A. `, `(A) `, `A) `)."""
    labels = [_LABEL.match(option) for option in options]
    if not all(label and (label[1] or label[2]) == LETTERS[i] for i, label in enumerate(labels) if i < len(LETTERS)):
        return tuple(option.strip() for option in options)
    return tuple(option[label.end() :].strip() for option, label in zip(options, labels, strict=True) if label)


def with_options(question: str, options: Sequence[str]) -> str:
    """The question and, a line each, its options as `A. text`; options that are but letters stand in a picture."""
    if tuple(options) == tuple(LETTERS[: len(options)]):
        return question
    lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join((question, *lines))


def letter_of(row: Row, field: str, index: int, count: int) -> str:
    """The letter of the option with this index, from 0."""
    if not 0 <= index < count:
        row.fail(field, f"is option {index} (the first is 0), and the row has {count}")
    return LETTERS[index]


def checked_options(row: Row, field: str, options: Sequence[str]) -> tuple[str, ...]:
    """Bare options; DataError for fewer than two, or more than there are letters."""
    if not 2 <= len(options) <= len(LETTERS):
        row.fail(field, f"has {len(options)} options; 2 to {len(LETTERS)} are expected")
    return bare_options(options)


def ask(row: Row, text: str, images: int = 0) -> tuple[Message, ...]:
    """One user's turn with so many images, at the text's own marks, in order, or, where it has none, all in front.

    A text without images may still say `<image>` (a question about HTML): that is no mark, and stays.
    """
    marks = len(_MARK.findall(text))
    if images and marks == images:
        text = _MARK.sub(IMAGE, text)
    elif images and marks:
        row.fail("question", f"has {marks} marks for images, and the row has {images} of these")
    elif images:
        text = "\n".join([IMAGE] * images + [text])
    return (Message("user", text),)


def numbered_images(text: str) -> tuple[str, tuple[int, ...]]:
    """Marks `<image 3>` as plain ones, and the numbers in the order in which they first stand; a later one is named in words."""
    order: list[int] = []

    def mark(match: re.Match[str]) -> str:
        number = int(match[1][:4])
        if number in order:
            return f"(image {order.index(number) + 1})"
        order.append(number)
        return IMAGE

    return _NUMBERED.sub(mark, text), tuple(order)
