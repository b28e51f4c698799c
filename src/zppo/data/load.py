"""Questions from files, folders, the hub, generators, or a source above such as the lab; errors name source, row and column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from zppo.core.types import Question
from zppo.data import hub
from zppo.data import reasoning_gym as gym
from zppo.data.gold_checks import GoldChecks
from zppo.data.hub import folder_rows
from zppo.data.local_files import Place, Rows, SourceSettings, file_rows
from zppo.data.rows import USUAL_IMAGES, Columns, RowImages, has_column, not_looked_at, question_from_row, unused_images
from zppo.errors import DataError
from zppo.names import QUESTIONS, load_object, scheme_of


def load_questions(
    source: str,
    columns: Columns,
    limit: int | None = None,
    reading: SourceSettings | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Question]:
    """Questions of a source, in its order, the first `limit` of them; no more rows than that are read.

    A source is a file (JSON lines, JSON, CSV, parquet), a folder (of such files, or what `save_to_disk` of `datasets` wrote),
    `hub:owner/name`, `reasoning_gym:<task>`, or one of `names.QUESTIONS`. They are held in memory: which questions a step trains on is a
    function of (seed, step) over all of them (`data.order`). A row without an id is named `<file name>:<row>`. Images become references
    (`data.rows`). `warn` is told of right answers that the rules could never find in a box (`data.gold_checks`).

    Raises:
        DataError: source missing, empty, unreadable or of an unknown kind; a row that is no question; an image that cannot be used;
            an id that stands twice; a column of images that no row has, or one that would not be looked at.
        StorageError: the cache of images cannot be written.
    """
    reading = reading or SourceSettings()
    scheme, rest = scheme_of(source), source.partition(":")[2]
    if scheme and scheme != hub.SCHEME:
        given = gym.gym_questions(rest, reading) if scheme == gym.SCHEME else _from_above(source, scheme)
        questions = list(islice(given, limit))
    else:
        if scheme:
            rows = hub.hub_rows(rest, reading, columns)
        else:
            path = Path(source).expanduser()
            rows = folder_rows(path, reading, columns) if path.is_dir() else file_rows(path)
        questions = questions_of_rows(source, rows, columns, limit, reading, warn)
    if not questions:
        raise DataError(f"{source}: holds no questions; it needs at least one")
    return questions


def questions_of_rows(
    source: str, rows: Rows, columns: Columns, limit: int | None, reading: SourceSettings, warn: Callable[[str], None] | None = None
) -> list[Question]:
    """The questions of the first `limit` rows, however they were read; errors and warnings as of `load_questions`."""
    questions, seen, golds = [], dict[str, Place](), GoldChecks()
    pictures, named, unused = RowImages(reading.image_cache), not columns.images, ""
    for place, data in islice(rows, limit):
        question = question_from_row(data, columns, place, reading.answer_after, pictures, reading.answer_list)
        if question.id in seen:
            first = seen[question.id]
            both = f"{first.source}, rows {first.row} and {place.row}" if first.source == place.source else f"{first} and {place}"
            raise DataError(
                f"{both}, column {columns.id!r}: both have the id {question.id!r}; "
                "give every question an id of its own, or name another column in data.columns.id"
            )
        seen[question.id] = place
        questions.append(question)
        if warn is not None:
            golds.look(question, place, columns.answer)
        named = named or has_column(data, columns.images)
        unused = unused or unused_images(data, columns)
    if questions and not named and not any(question.images for question in questions):
        _check_blind(source, columns, unused, reading)
    if warn is not None:
        golds.tell(warn)
    return questions


def listed_questions(rows: Iterable[Mapping[str, Any]], name: str, columns: Columns, reading: SourceSettings) -> list[Question]:
    """The questions of rows that are in memory (a `datasets.Dataset`, a list); the prompt may be a list of turns, as TRL has it.

    Args:
        name: what messages call them; a row without an id is called `<name>:<row>`.

    Raises:
        DataError: as of `load_questions`.
    """
    read = ({**row, columns.messages: row[columns.prompt]} if isinstance(row.get(columns.prompt), list) else row for row in rows)
    placed = ((Place(name, name, number, Path.cwd()), row) for number, row in enumerate(read, 1))
    return questions_of_rows(name, placed, columns, None, reading)


def _check_blind(source: str, columns: Columns, unused: str, reading: SourceSettings) -> None:
    """Whether questions without the images column are meant to have none: a run that looks away learns all the same [zppo]."""
    if unused:
        raise DataError(not_looked_at(source, unused, columns))
    # Held-out questions may have none where those to train on have some, and share the names of the columns.
    if columns.images != USUAL_IMAGES and not reading.held_out:
        raise DataError(
            f"{source}: no row has the column {columns.images!r} that data.columns.images names; mend the name, or write '' to leave "
            "images out"
        )


def drop_long(questions: Sequence[Question], length: Callable[[Question], int], limit: int) -> tuple[list[Question], int]:
    """The questions whose plain prompt has at most `limit` tokens (`length` counts them), and how many were dropped."""
    kept = [question for question in questions if length(question) <= limit]
    return kept, len(questions) - len(kept)


def _from_above(source: str, scheme: str) -> Iterable[Question]:
    if scheme not in QUESTIONS:
        known = ", ".join(sorted(f"{name}:" for name in (*QUESTIONS, hub.SCHEME, gym.SCHEME)))
        raise DataError(f"{source!r}: {scheme!r} is no source of questions (known: {known}); for a file of that name write ./{source}")
    found: Iterable[Question] = load_object(QUESTIONS[scheme], "source of questions", DataError)(source)
    return found
