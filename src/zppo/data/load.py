"""Questions from JSON lines, parquet, or a registered source such as the lab; every error names file, row and column."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

from zppo.core.types import Question
from zppo.data.files import READERS
from zppo.data.rows import Columns, question_from_row
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


def load_questions(source: str, columns: Columns, limit: int | None = None) -> list[Question]:
    """Questions of a file or a registered source, in its order, the first `limit` of them.

    Files are JSON lines (.jsonl, .ndjson, .json) or parquet; rows count from 1 (in JSON lines: line numbers). A row without an
    id is named `<file name>:<row>`. Images are paths relative to the file.

    Raises:
        DataError: file missing, empty, unreadable or of an unknown kind; a row that is no question; an id that stands twice.
    """
    if has_scheme(source):
        questions = list(islice(_registered(source), limit))
        if not questions:
            raise DataError(f"{source}: holds no questions")
        return questions
    path = Path(source).expanduser()
    rows = _open(path)
    questions, seen = [], dict[str, int]()
    for row, data in islice(rows, limit):
        question = question_from_row(data, columns, path, row)
        if question.id in seen:
            raise DataError(
                f"{path}, rows {seen[question.id]} and {row}, column {columns.id!r}: both have the id {question.id!r}; "
                "give every question an id of its own, or leave the column out"
            )
        seen[question.id] = row
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: the file holds no rows; it needs at least one question")
    return questions


def drop_long(
    questions: Sequence[Question], length: Callable[[Question], int], limit: int
) -> tuple[list[Question], int]:
    """The questions whose plain prompt has at most `limit` tokens (`length` counts them), and how many were dropped."""
    kept = [question for question in questions if length(question) <= limit]
    return kept, len(questions) - len(kept)


def _registered(source: str) -> Iterable[Question]:
    scheme, _, rest = source.partition(":")
    if scheme not in _SOURCES:
        known = ", ".join(sorted(f"{name}:" for name in _SOURCES)) or "none"
        raise DataError(
            f"{source!r}: {scheme!r} is no source of questions (known: {known}); for a file of that name write ./{source}"
        )
    return _SOURCES[scheme](rest)


def _open(path: Path) -> Iterable[tuple[int, object]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files of the kind {path.suffix or 'without an ending'} cannot be read; "
            f"write JSON lines or parquet ({', '.join(READERS)})"
        )
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    if not path.exists():
        raise DataError(f"{path}: there is no such file (working directory {Path.cwd()})")
    return reader(path)
