"""Where the images stand in a conversation: turns as texts and images, in order. All who show a conversation to a model go by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from zppo.core.types import IMAGE, ImageRef, Message
from zppo.errors import DataError

Part = str | ImageRef


class TurnParts(NamedTuple):
    """One turn: who speaks, and its texts and images in order. No text is empty, and no two texts are neighbours."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


def count_markers(messages: Sequence[Message]) -> int:
    """How many places for images a conversation's text holds."""
    return sum(message.content.count(IMAGE) for message in messages)


def message_parts(messages: Sequence[Message], images: Sequence[ImageRef]) -> list[TurnParts]:
    """The turns of a conversation as texts and images [zppo].

    The next image stands in place of each `IMAGE` marker; where there is no marker, all images stand at the start of the last user
    turn. Without images a marker is ordinary text.

    Raises:
        DataError: the number of markers is neither 0 nor that of the images, or there is no user turn to put them into.
    """
    markers = count_markers(messages) if images else 0
    if markers not in (0, len(images)):
        raise DataError(
            f"the text has {markers} {IMAGE} marker(s), and there are {len(images)} image(s): write as many as there are images, or none, "
            "and they stand before the question"
        )
    if markers:
        rest = iter(images)
        return [TurnParts(m.role, _placed(m.content.split(IMAGE), rest)) for m in messages]
    home = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1) if images else -1
    if images and home < 0:
        raise DataError(f"there are {len(images)} image(s) and no user turn that they could stand in; give the conversation one")
    return [TurnParts(m.role, (*(images if i == home else ()), *([m.content] if m.content else []))) for i, m in enumerate(messages)]


def last_turn_images(messages: Sequence[Message], images: Sequence[ImageRef]) -> tuple[ImageRef, ...]:
    """The images that stand in the last turn: what goes along where that turn alone is shown. DataError as in `message_parts`."""
    turns = message_parts(messages, images)
    return tuple(part for part in turns[-1].parts if isinstance(part, ImageRef)) if turns else ()


def _placed(texts: Sequence[str], images: Iterator[ImageRef]) -> tuple[Part, ...]:
    """The texts around a turn's markers, with the next images between them."""
    parts: list[Part] = [texts[0]]
    for text in texts[1:]:
        parts += [next(images), text]
    return tuple(part for part in parts if part)
