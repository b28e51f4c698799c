"""Questions from files, folders, the hub, generators, or a source above such as the lab; errors name source, row and column."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from zppo.core.types import Question
from zppo.data import hub
from zppo.data import reasoning_gym as gym
from zppo.data.corpora import CORPORA
from zppo.data.gold_checks import GoldChecks
from zppo.data.hub import folder_rows
from zppo.data.local_files import Place, Rows, SourceSettings, file_rows
from zppo.data.mixture import Part, PartRead, as_row, question_key, row_of
from zppo.data.row_filters import RowFilters
from zppo.data.rows import USUAL_IMAGES, Columns, RowImages, has_column, not_looked_at, question_from_row, row_id, unused_images
from zppo.errors import DataError
from zppo.images.store import shown_size
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
    return read_part(Part(source, "", reading or SourceSettings(), columns, limit), warn).questions


def read_part(
    part: Part, warn: Callable[[str], None] | None = None, *, held_out: Collection[bytes] = (), keep_rows: bool = False
) -> PartRead:
    """What a source of a recipe has after its filters; caps and copies are for all sources together (`data.mixture`).

    Args:
        held_out: keys (`data.mixture.question_key`) of the held-out questions, for filters that ask.
        keep_rows: keep the row of each question as well (`data.mixture.row_of`).

    Raises:
        DataError: as `load_questions`; no row passes, a filter names a column that there is not, or compares what has no order.
        StorageError: the cache of images cannot be written.
    """
    source, reading, columns = part.source, part.reading, part.columns
    scheme, rest = scheme_of(source), source.partition(":")[2]
    if scheme and scheme != hub.SCHEME:
        given = gym.gym_questions(rest, reading) if scheme == gym.SCHEME else _from_above(source, scheme)
        found = _from_questions(part, given, held_out, keep_rows)
    else:
        wanted = None if keep_rows or part.filters else ()  # which other columns of a set are read
        if scheme:
            rows = hub.hub_rows(rest, reading, columns, wanted)
        else:
            check_there(source)
            path = Path(source).expanduser()
            rows = folder_rows(path, reading, columns, wanted) if path.is_dir() else file_rows(path)
        found = _from_rows(part, rows, warn, held_out, keep_rows)
    if not found.rows:
        raise DataError(f"{source}: holds no questions; it needs at least one")
    if not found.questions:
        lost = ", ".join(f"{count:,} by {text}" + (f" ({null:,} of them null)" if null else "") for text, count, null in found.dropped)
        raise DataError(f"{source}: none of its {found.rows:,} rows passes the filters ({lost}); mend data.filters")
    return found


def check_there(source: str) -> None:
    """Whether a source that is a path is there. DataError where it is not; it says how a known corpus is built."""
    path = Path(source).expanduser()
    if scheme_of(source) or path.exists():
        return
    if path.name in CORPORA:
        raise DataError(f"{source}: is not there yet; build it with `zppo data build {path.name} --out data/{path.name}` (docs/corpus.md)")
    file_rows(path)


def _from_questions(part: Part, given: Iterable[Question], held_out: Collection[bytes], keep_rows: bool) -> PartRead:
    """Of a source that gives questions, not rows."""
    filters, questions, passed_over, rows = RowFilters(part.filters), list[Question](), set[str](), list[dict[str, Any]]()
    number = 0
    for number, question in enumerate(islice(given, part.limit), 1):
        data = as_row(question, part.columns) if keep_rows or part.filters else {}
        if filters.passes(data, Place(part.source, part.name, number, Path()), partial(_derived, question, held_out)):
            questions.append(question)
            rows += [data] if keep_rows else []
        else:
            passed_over.add(question.id)
    filters.check(part.source)
    return PartRead(questions, number, filters.dropped, frozenset(passed_over), rows)


def _from_rows(part: Part, rows: Rows, warn: Callable[[str], None] | None, held_out: Collection[bytes], keep_rows: bool) -> PartRead:
    reading, columns = part.reading, part.columns
    questions, seen, golds = list[Question](), dict[str, Place](), GoldChecks()
    filters, passed_over, kept = RowFilters(part.filters), set[str](), list[dict[str, Any]]()
    pictures, named, unused, count = RowImages(reading.image_cache), not columns.images, "", 0
    unseen = {name: column for name in _MAY_LACK if (column := getattr(columns, name)) not in ("", name)}
    for place, data in islice(rows, part.limit):
        count += 1
        make = cache(partial(question_from_row, data, columns, place, reading.answer_after, pictures, reading.answer_list))
        if not filters.passes(data, place, lambda name, make=make: _derived(make(), held_out, name)):  # type: ignore[misc]
            passed_over.add(row_id(data, columns, place))
            continue
        question = make()
        if question.id in seen:
            first = seen[question.id]
            both = f"{first.source}, rows {first.row} and {place.row}" if first.source == place.source else f"{first} and {place}"
            raise DataError(
                f"{both}, column {columns.id!r}: both have the id {question.id!r}; "
                "give every question an id of its own, or name another column in data.columns.id"
            )
        seen[question.id] = place
        questions.append(question)
        if keep_rows and isinstance(data, Mapping):
            kept.append(row_of(data, question, columns))
        if warn is not None:
            golds.look(question, place, columns.answer)
        named = named or has_column(data, columns.images)
        unused = unused or unused_images(data, columns)
        unseen = {name: column for name, column in unseen.items() if not has_column(data, column)} if unseen else {}
    filters.check(part.source)
    if questions and not named and not any(question.images for question in questions):
        _check_blind(part.source, columns, unused, reading)
    if warn is not None:
        golds.tell(warn)
        for name, column in unseen.items() if questions else ():
            warn(f"{part.source}: no row has the column {column!r} that data.columns.{name} names; mend the name if that is not meant")
    return PartRead(questions, count, filters.dropped, frozenset(passed_over), kept)


_MAY_LACK = ("id", "level", "grading", "answer_list", "choices")
"""Columns that rows need not have: one that a recipe names by another name than its usual one, and no row has, is perhaps misspelt."""


def _derived(question: Question, held_out: Collection[bytes], name: str) -> Any:
    """What one of `row_filters.DERIVED` is for a question."""
    if name == "prompt_length":
        return sum(len(message.content) for message in question.messages)
    if name == "answer_length":
        return max(map(len, question.golds))
    if name == "image_count":
        return len(question.images)
    if name == "held_out":
        return question_key(question) in held_out
    side = name == "image_height"
    return min((shown_size(image)[side] for image in question.images), default=None)


def listed_questions(rows: Iterable[Mapping[str, Any]], name: str, columns: Columns, reading: SourceSettings) -> list[Question]:
    """The questions of rows that are in memory (a `datasets.Dataset`, a list).

    Args:
        name: what messages call them; a row without an id is called `<name>:<row>`.

    Raises:
        DataError: as of `load_questions`.
    """
    placed = ((Place(name, name, number, Path.cwd()), row) for number, row in enumerate(rows, 1))
    return _from_rows(Part(name, name, reading, columns), placed, None, (), keep_rows=False).questions


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
