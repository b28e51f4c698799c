"""One row of a source -> what the corpus takes of it, or the reason why it does not fit."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from zppo.core.draws import draw_key
from zppo.core.types import IMAGE, JUDGE, RULE
from zppo.data.conversations import parsed
from zppo.data.corpora.mapping import CorpusFilters, CorpusSource, Kind, Names
from zppo.data.gold_checks import NOTHING
from zppo.data.local_files import Place
from zppo.data.rows import question_from_row
from zppo.errors import DataError
from zppo.images.store import check_whole, header_of

UNLISTED = "unlisted"
OTHER_SOURCE = "other_source"
NO_TEXT = "no_text"
NO_QUESTION = "no_question"
NO_ANSWER = "no_answer"
NO_PASS_RATE = "no_pass_rate"
PASS_RATE = "pass_rate"
KIND = "kind"
LONG_ANSWER = "long_answer"
UNREADABLE = "unreadable"
PLACES = "places"
NO_IMAGE = "no_image"
BROKEN_IMAGE = "broken_image"
SMALL_IMAGE = "small_image"
DUPLICATE = "duplicate"
LONG_PROMPT = "long_prompt"
UNSHOWABLE = "unshowable"
CAP = "cap"

REASONS: dict[str, str] = {
    UNLISTED: "sub-set not in the mapping",
    OTHER_SOURCE: "sub-set taken from another source",
    NO_TEXT: "text that is no UTF-8",
    NO_QUESTION: "no question",
    UNSHOWABLE: "question with a model's own token for pictures",
    NO_ANSWER: "no answer",
    KIND: "kind of answer that is left out",
    NO_PASS_RATE: "no pass rate",
    PASS_RATE: "pass rate too high",
    LONG_ANSWER: "answer too long",
    UNREADABLE: "question or answer that a run cannot read",
    NO_IMAGE: "no picture",
    PLACES: "places for pictures without one",
    BROKEN_IMAGE: "picture broken or too large",
    SMALL_IMAGE: "picture too small",
    DUPLICATE: "question and picture seen before",
    LONG_PROMPT: "prompt too long",
    CAP: "over the cap",
}
"""Why a row is not in the corpus, in the order in which it is looked at."""


# The tokens that stand for pictures in models' own vocabularies: a text with one of them would stop a run.
_MEDIA = re.compile(r"<\|\w*(?:image|video|audio|vision)\w*\|>", re.IGNORECASE)


class MisfitError(Exception):
    """The row does not fit; `reason` is a key of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CorpusRow(NamedTuple):
    """A row that fits, before it is drawn.

    Attributes:
        key: of its question and pictures; equal ones are duplicates.
        rank: a keyed draw over the same; the lowest of a sub-set are kept.
        answer: a text; several right answers are a list of texts in JSON, and `answer_list` says what they mean.
        pictures: the image files' bytes.
    """

    subset: str
    key: str
    rank: int
    prompt: str
    answer: str
    answer_list: str | None
    grading: str
    source: str
    source_id: str
    pass_rate: float | None
    pictures: tuple[bytes, ...]


Cell = Callable[[str], Any]
"""The value in a top-level column of the row at hand."""


def subset_name(cell: Cell, source: CorpusSource) -> str:
    """What the source calls the row's sub-set; "" for nothing."""
    value = _first(cell, source.columns.subset)
    return value.strip() if isinstance(value, str) else ""


def fit_row(cell: Cell, name: str, source: CorpusSource, subset: str, filters: CorpusFilters, seed: int) -> CorpusRow:
    """What the corpus takes of a row. Texts are looked at first, pictures last: they are large.

    Args:
        name: of the source.
        subset: canonical.

    Raises:
        MisfitError: it does not fit.
    """
    columns = source.columns
    prompt = _first(cell, columns.question)
    if not isinstance(prompt, str) or not prompt.replace(IMAGE, "").strip():
        raise MisfitError(NO_QUESTION)
    if _MEDIA.search(prompt):
        raise MisfitError(UNSHOWABLE)
    kind = _kind(cell, source)
    raw = _text(_first(cell, columns.answer))
    if not raw or raw in NOTHING:
        raise MisfitError(NO_ANSWER)
    if kind == "drop":
        raise MisfitError(KIND)
    rate = _pass_rate(cell, columns.pass_rate, filters.max_pass_rate)
    if len(raw) > filters.max_answer_characters:
        raise MisfitError(LONG_ANSWER)
    answer, how = _answer(raw, kind)
    _check_readable(prompt, answer, how)
    pictures = _pictures(_first(cell, columns.images))
    if prompt.count(IMAGE) not in (0, len(pictures)):
        raise MisfitError(PLACES)
    for picture in pictures:
        _check_picture(picture, filters.min_image_side)
    seen = " ".join(prompt.replace(IMAGE, " ").split()), *(hashlib.sha256(picture).hexdigest() for picture in pictures)
    return CorpusRow(
        subset=subset,
        key=hashlib.sha256("\x1f".join(seen).encode("utf-8", "surrogatepass")).hexdigest()[:32],
        rank=draw_key(seed, subset, *seen),
        prompt=prompt,
        answer=answer,
        answer_list=how,
        grading=JUDGE if kind == "judge" else RULE,
        source=name,
        source_id=_text(_first(cell, columns.id)),
        pass_rate=rate,
        pictures=pictures,
    )


def _first(cell: Cell, names: Names) -> Any:
    """The first of several columns that is not null or blank."""
    for name in names:
        value = cell(name)
        if value is None and "." in name:
            root, *parts = name.split(".")
            value = cell(root)
            for part in parts:
                value = parsed(value)
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return value
    return None


def _text(value: object) -> str:
    """A text or a number as text; "" for nothing and for what is neither."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, list) and value and all(map(_text, value)) else ""
    return str(value)


def _kind(cell: Cell, source: CorpusSource) -> Kind | None:
    value = _first(cell, source.columns.kind)
    return source.kinds.get(value.strip().casefold()) if isinstance(value, str) else None


def _pass_rate(cell: Cell, names: Names, most: float) -> float | None:
    """The pass rate, a number or a text that is one; None where the source has none."""
    if not names:
        return None
    try:
        rate = float(_text(_first(cell, names)))
    except ValueError:
        raise MisfitError(NO_PASS_RATE) from None
    if not math.isfinite(rate):
        raise MisfitError(NO_PASS_RATE)
    if rate > most:
        raise MisfitError(PASS_RATE)
    return rate


def _answer(raw: str, kind: Kind | None) -> tuple[str, str | None]:
    """The answer as the corpus has it, and what several right answers mean."""
    if kind not in ("any", "ordered"):
        return raw, None
    found = parsed(raw)
    items = [text for item in found if (text := _text(item))] if isinstance(found, list) else []
    items = items if kind == "ordered" else list(dict.fromkeys(items))
    if isinstance(found, list) and not items:
        raise MisfitError(NO_ANSWER)
    if len(items) < 2:
        return (items[0] if items else raw), None
    return json.dumps(items, ensure_ascii=False), kind


class _Written(NamedTuple):
    """The columns of the corpus, which are those that `data.columns` has by default."""

    prompt: str = "prompt"
    messages: str = "messages"
    answer: str = "answer"
    images: str = "images"
    id: str = "id"
    level: str = "level"
    grading: str = "grading"
    answer_list: str = "answer_list"
    choices: str = "choices"
    extra: tuple[str, ...] = ()
    solution: str = ""


def _check_readable(prompt: str, answer: str, how: str | None) -> None:
    """Whether a run reads the row as it will be written: one that it cannot read would stop it."""
    try:
        row = {"id": "row", "prompt": prompt, "answer": answer, "answer_list": how}
        question_from_row(row, _Written(), Place("the corpus", "row", 1, Path()))
    except DataError:
        raise MisfitError(UNREADABLE) from None


def _pictures(value: object) -> tuple[bytes, ...]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    found = tuple(item.get("bytes") if isinstance(item, Mapping) else item for item in items)
    if not found or not all(isinstance(data, bytes) and data for data in found):
        raise MisfitError(NO_IMAGE)
    return found  # type: ignore[return-value]


def _check_picture(data: bytes, least: int) -> None:
    try:
        header = header_of(data, "of the row")
        if min(header.width, header.height) < least:
            raise MisfitError(SMALL_IMAGE)
        check_whole(data, "of the row")
    except DataError:
        raise MisfitError(BROKEN_IMAGE) from None
