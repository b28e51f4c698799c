"""Questions from files, folders, the hub, generators, or a registered source such as the lab; errors name source, row and column."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

from zppo.core.types import Question
from zppo.data import hub
from zppo.data import reasoning_gym as gym
from zppo.data.files import Place, Reading, Rows, file_rows
from zppo.data.hub import folder_rows
from zppo.data.images import Pictures
from zppo.data.rows import USUAL_IMAGES, Columns, has_column, not_looked_at, question_from_row, unused_images
from zppo.errors import DataError

SourceFn = Callable[[str], Sequence[Question]]

_SCHEME = re.compile(r"^([a-z][a-z0-9_]+):(?!//)")
_SOURCES: dict[str, SourceFn] = {}


def register_source(scheme: str, load: SourceFn) -> None:
    """Makes `<scheme>:<rest>` a source of questions: `load(rest)` returns them. A later registration replaces an earlier one.

    Storeys above the data (the lab) come in this way, so that nothing here imports them.
    """
    if not _SCHEME.match(f"{scheme}:"):
        raise ValueError(f"{scheme!r} is no scheme: at least two of a-z, 0-9 and _, a letter first")
    _SOURCES[scheme] = load


def has_scheme(source: str) -> bool:
    """Whether a source (or model name) is of the form `<scheme>:<rest>` and so no path."""
    return _SCHEME.match(source) is not None


def load_questions(
    source: str, columns: Columns, limit: int | None = None, reading: Reading | None = None
) -> list[Question]:
    """Questions of a source, in its order, the first `limit` of them; no more rows than that are read.

    A source is a file (JSON lines, JSON, CSV, parquet), a folder (of such files, or what `save_to_disk` of `datasets` wrote),
    `hub:owner/name`, `reasoning_gym:<task>`, or a registered one. They are held in memory: which questions a step trains on is a
    function of (seed, step) over all of them (`data.order`). A row without an id is named `<file name>:<row>`. Images become references
    (`data.images`).

    Raises:
        DataError: source missing, empty, unreadable or of an unknown kind; a row that is no question; an image that cannot be used;
            an id that stands twice; a column of images that no row has, or one that nobody would look at.
        StorageError: the cache of images cannot be written.
    """
    reading = reading or Reading()
    scheme, _, rest = source.partition(":")
    if has_scheme(source) and scheme != hub.SCHEME:
        given = gym.gym_questions(rest, reading) if scheme == gym.SCHEME else _registered(source)
        questions = list(islice(given, limit))
    else:
        questions = _from_rows(source, _rows(source, columns, reading), columns, limit, reading)
    if not questions:
        raise DataError(f"{source}: holds no questions; it needs at least one")
    return questions


def _rows(source: str, columns: Columns, reading: Reading) -> Rows:
    if has_scheme(source):
        return hub.hub_rows(source.partition(":")[2], reading, columns)
    path = Path(source).expanduser()
    return folder_rows(path, reading, columns) if path.is_dir() else file_rows(path)


def _from_rows(source: str, rows: Rows, columns: Columns, limit: int | None, reading: Reading) -> list[Question]:
    questions, seen = [], dict[str, Place]()
    pictures, named, unused = Pictures(reading.image_cache), not columns.images, ""
    for place, data in islice(rows, limit):
        question = question_from_row(data, columns, place, reading.answer_after, pictures)
        if question.id in seen:
            raise DataError(
                f"{_both(seen[question.id], place)}, column {columns.id!r}: both have the id {question.id!r}; "
                "give every question an id of its own, or name another column in data.columns.id"
            )
        seen[question.id] = place
        questions.append(question)
        named = named or has_column(data, columns.images)
        unused = unused or unused_images(data, columns)
    if questions and not named and not any(question.images for question in questions):
        _check_blind(source, columns, unused, reading)
    return questions


def _check_blind(source: str, columns: Columns, unused: str, reading: Reading) -> None:
    """Whether questions without the images column are meant to have none: a run that looks away learns all the same [zppo]."""
    if unused:
        raise DataError(not_looked_at(source, unused, columns))
    # Held-out questions may have none where those to train on have some, and share the names of the columns.
    if columns.images != USUAL_IMAGES and not reading.held_out:
        raise DataError(
            f"{source}: no row has the column {columns.images!r} that data.columns.images names; mend the name, or write '' to leave "
            "images out"
        )


def _both(first: Place, second: Place) -> str:
    if first.source == second.source:
        return f"{first.source}, rows {first.row} and {second.row}"
    return f"{first} and {second}"


def drop_long(
    questions: Sequence[Question], length: Callable[[Question], int], limit: int
) -> tuple[list[Question], int]:
    """The questions whose plain prompt has at most `limit` tokens (`length` counts them), and how many were dropped."""
    kept = [question for question in questions if length(question) <= limit]
    return kept, len(questions) - len(kept)


def _registered(source: str) -> Iterable[Question]:
    scheme, _, rest = source.partition(":")
    if scheme not in _SOURCES:
        known = ", ".join(sorted(f"{name}:" for name in (*_SOURCES, hub.SCHEME, gym.SCHEME)))
        raise DataError(
            f"{source!r}: {scheme!r} is no source of questions (known: {known}); for a file of that name write ./{source}"
        )
    return _SOURCES[scheme](rest)
