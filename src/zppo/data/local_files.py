"""Rows of data files, one at a time, each with its place; and the settings of a source."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zppo.core.types import AnswerList
from zppo.errors import DataError
from zppo.names import readable


class Place(NamedTuple):
    """Where a row stands.

    Attributes:
        source: the file or set, as messages name it.
        name: the same as ids name it: a row without an id is called `<name>:<row>`.
        row: line of a JSON-lines file, line of a table (the header is 1), else number of the record from 1.
        folder: what paths of images in the row are relative to.
    """

    source: str
    name: str
    row: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


Rows = Iterator[tuple[Place, object]]


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What a recipe says about a source in addition to its name.

    Attributes:
        held_out: the questions are for evaluation; generated ones then differ from those of training.
        config, split, revision: of a set of the hub, or of a folder laid out like one.
        streaming: rows of a hub set come one by one, without a copy on the disk.
        answer_after: the right answer is what follows the last occurrence of this text in the answer column; see `data.rows.part_after`.
        answer_list: what a list of right answers means; None where none is expected.
        image_cache: where images without a file of their own are kept; None for the user's cache folder.
    """

    held_out: bool = False
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    answer_after: str | None = None
    answer_list: AnswerList | None = None
    image_cache: Path | None = None

    @property
    def split_setting(self) -> str:
        """The setting that names the split, for messages."""
        return "data.eval_split" if self.held_out else "data.split"


Numbered = Iterator[tuple[int, object]]

_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 64  # rows that are held at once; with images in them they are large
_LONGEST_CELL = 1 << 26  # characters; the csv module's own limit, 131,072, is less than a long solution


def file_rows(path: Path, name: str | None = None) -> Rows:
    """(place, value) of every row of a file; `name` instead of the file's name in ids.

    Raises:
        DataError: there is no such file, its kind is unknown, or it cannot be read; while iterating, with the row.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files of the kind {path.suffix or 'without an ending'} cannot be read; "
            f"bring JSON lines, JSON, CSV or parquet ({', '.join(READERS)})"
        )
    if not path.exists():
        raise DataError(f"{path}: there is no such file (working directory {Path.cwd()}); check data.train and data.eval")
    try:
        readable(path)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    return ((Place(str(path), name or path.name, number, path.parent), value) for number, value in reader(path))


def json_lines(path: Path) -> Numbered:
    """(line number, value) of every line that is not blank. A byte order mark at the start is skipped.

    Lines end at a line feed alone: JSON may hold other line separators inside a text.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                raw = line.removeprefix(_BOM) if number == 1 else line
                if raw.strip():
                    yield number, _parse(raw, path, number)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error


def json_file(path: Path) -> Numbered:
    """A `.json` file: one list of objects, numbered from 1, or JSON lines."""
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(_BOM).lstrip()
            if not start.startswith(b"["):
                yield from json_lines(path)
                return
            file.seek(0)
            text = file.read().removeprefix(_BOM).decode("utf-8")
        values = json.loads(text)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start + 1} of the file); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        near = _around(text, error.pos)
        raise DataError(
            f"{path}, line {error.lineno}, character {error.colno}: is no JSON ({error.msg}: {near!r}); "
            "mend it there, or write one object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no usable JSON ({error}); write one object per line") from error
    yield from enumerate(values, 1)


def table(path: Path) -> Numbered:
    """(line as a spreadsheet counts, values by column) of a CSV or tab-separated file whose first line names the columns."""
    number, separator = 1, "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = next(reader, [])
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}, row 1: two columns are called {twice!r}; give every column a name of its own")
            other = next((sign for sign in ";\t,|" if sign in names[0]), None) if len(names) == 1 else None
            if other is not None:
                raise DataError(
                    f"{path}, row 1: is one column called {names[0]!r}, so the file seems to be separated by {other!r}; "
                    f"save it with {separator!r} between the columns"
                )
            for number, cells in enumerate(reader, 2):
                if len(cells) > len(names):
                    raise DataError(
                        f"{path}, row {number}: has {len(cells)} cells, and the header names {len(names)} columns; "
                        f'put texts that hold "{separator}" in quotes'
                    )
                if cells:
                    yield number, dict(zip(names, cells, strict=False))
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after row {number}: is not UTF-8; save the file as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}, after row {number}: is no CSV ({error}); mend the quotes there") from error
    finally:
        csv.field_size_limit(limit)


def parquet(path: Path) -> Numbered:
    """(row number, values by column) of every row."""
    # Heavy, and most people bring JSON lines.
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, after row {number}: cannot be read as parquet ({error}); write the file again, or give it the ending of its kind"
        ) from error


READERS: Mapping[str, Callable[[Path], Numbered]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": table,
    ".tsv": table,
    ".parquet": parquet,
}
"""The reader for each ending of a file name."""


def _parse(raw: bytes, path: Path, number: int) -> object:
    where = f"{path}, row {number}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from error
    if number == 1 and text.lstrip().startswith("["):
        raise DataError(f"{where}: the file is one JSON list; call it .json, or write one object per line")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: is no JSON ({error.msg} at character {error.pos + 1}: {_around(text, error.pos)!r}); "
            "every line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no usable JSON ({error}); mend or remove the line") from error


def _around(text: str, position: int) -> str:
    return text[max(0, position - 15) : position + 15].strip()


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror or error}); check that it is a file that you may read"
