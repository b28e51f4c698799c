"""One question of a benchmark, ready to be asked: the same shape for all 31 of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zppo.core.types import IMAGE, Message, Question
from zppo.errors import DataError
from zppo.prompts import PromptBook

Media = bytes | Path
"""A picture: its encoded bytes (PNG, JPEG, ...), or the file that holds them."""

Kind = Literal[
    "choice", "number", "text", "precision", "grid", "anls", "ocr", "judged", "graded", "criterion"
]  # fmt: skip
"""What kind of answer is expected, and so who scores it.

- choice: the letter of one of `Item.options`; letters with commas between where several are asked for.
- number, text: a short answer; the project's own rules, then the shared judge.
- precision: a number, right to the decimals in `facts["precision"]` (MathVista).
- grid: the numbers of the gold in their order, whatever stands between them (VLMs-are-Blind).
- anls: a text of a document, by edit distance to the best of several golds (InfographicVQA).
- ocr: the metric that `facts["task"]` asks for (OCRBench v2).
- judged: the benchmark's own judge says correct or wrong (CharXiv, HLE, MMVU, options or none).
- graded: the benchmark's own judge gives 0 to 1 (MM-Vet).
- criterion: the judge answers a yes/no question about the response (MultiChallenge).
"""


@dataclass(frozen=True, slots=True)
class Item:
    """A question of a benchmark.

    Attributes:
        id: stable and unique in its benchmark; resuming and comparing runs go by it.
        benchmark: its name in the registry.
        messages: the conversation that asks it, the last turn a user's, images at their marks (`core.types.IMAGE`), without any directive
            on how to reason or how to write the answer; `conversation` adds the shared one.
        gold: the right answer, or all that are accepted.
        kind: what is expected; see `Kind`.
        images: its images, in the order of their marks.
        frames: of a video that comes as pictures, in time order; shown before the text.
        video: of a video that comes as a file; shown before the text. At most one of `frames` and `video` is given.
        places: folders in which the set has `video`, where its name alone does not say which clip it is.
        clip: (start, end) in seconds where only a part of `video` belongs to the question.
        rate: pictures a second of a `video` that is a folder of pictures; None where it is not known.
        options: texts of the options, A first, where there are some.
        facts: what else scorers and breakdowns need (precision, variant, category, ...).

    Raises:
        DataError: marks and images differ in number, or there is no gold.
    """

    id: str
    benchmark: str
    messages: tuple[Message, ...]
    gold: str | tuple[str, ...]
    kind: Kind
    images: tuple[Media, ...] = ()
    frames: tuple[Media, ...] = ()
    video: Path | None = None
    places: tuple[str, ...] = ()
    clip: tuple[float, float] | None = None
    rate: float | None = None
    options: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        marks = sum(message.content.count(IMAGE) for message in self.messages)
        if self.images and marks != len(self.images):
            raise DataError(f"{self.benchmark}, question {self.id!r}: has {marks} marks {IMAGE} and {len(self.images)} images")
        if not self.golds:
            raise DataError(f"{self.benchmark}, question {self.id!r}: has no right answer")

    @property
    def golds(self) -> tuple[str, ...]:
        """All accepted answers."""
        return (self.gold,) if isinstance(self.gold, str) else self.gold

    @property
    def asked(self) -> str:
        """The conversation as one text, for a judge."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)


def conversation(item: Item, book: PromptBook) -> tuple[Message, ...]:
    """The item's messages with the shared closing instruction (method.md sections 7 and 10).

    Raises:
        DataError: the conversation does not end with a user's turn.
    """
    return book.plain(Question(id=item.id, messages=item.messages, gold=item.golds[0]))
