"""Rows of data files, one at a time, each with its place; and the settings of a source."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple, cast

from zppo.core.types import AnswerList
from zppo.data.json_shapes import row_in, rows_in
from zppo.errors import DataError, one_line
from zppo.names import check_file, readable


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
_LONGEST_LINE = 1 << 28  # bytes; a packed file could unpack to anything
_LONGEST_FILE = 1 << 32
_LONGEST_CELL = 1 << 26  # characters; the csv module's own limit, 131,072, is less than a long solution


def file_rows(path: Path, name: str | None = None) -> Rows:
    """(place, value) of every row of a file; `name` instead of the file's name in ids.

    Raises:
        DataError: there is no such file, its kind is unknown, or it cannot be read; while iterating, with the row.
    """
    reader = READERS.get(kind_of(path))
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
    check_file(path, DataError)
    _check_kind(path)
    return ((Place(str(path), name or path.name, number, path.parent), value) for number, value in reader(path))


def kind_of(path: Path) -> str:
    """The ending that says how a file is read: of `a.jsonl.gz` it is `.jsonl`."""
    endings = [ending.lower() for ending in path.suffixes]
    return endings[-2] if len(endings) > 1 and endings[-1] in _PACKED else "".join(endings[-1:])


_FOREIGN = {
    b"PAR1\x15": "is a parquet file; call it .parquet",
    b"PK\x03\x04": "is a zip archive, or a workbook of Excel; unpack it, or save the sheet as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "is a workbook of Excel; save the sheet as CSV in UTF-8",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
    b"<!doctype html": "is a web page, perhaps one that says why the file was not given; download the file itself",
    b"<html": "is a web page, perhaps one that says why the file was not given; download the file itself",
    b"SQLite format 3": "is a database of SQLite; export the table as CSV or JSON lines",
    b"ARROW1\0": "is an Arrow file; write it as parquet",
}
"""How files begin that are of another kind than their names say."""
_TABLES = (".csv", ".tsv")
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what opening, reading and unpacking raise


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa  # it has the codec, and it is heavy

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
_UNPACK: Mapping[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": lambda path: cast(IO[bytes], gzip.GzipFile(path)),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""By how a packed file begins, whatever it is called."""


def _unpacker(path: Path) -> Callable[[Path], IO[bytes]] | None:
    with path.open("rb") as file:
        start = file.read(8)
    return next((unpack for magic, unpack in _UNPACK.items() if start.startswith(magic)), None)


def _opened(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked where it is packed."""
    unpack = _unpacker(path)
    return unpack(path) if unpack else path.open("rb")


def _check_kind(path: Path) -> None:
    """Whether a file is what its name says. DataError where it is known to be something else."""
    parquet_named = kind_of(path) == ".parquet"
    try:
        if parquet_named and _unpacker(path):
            raise DataError(f"{path}: is a packed parquet file; unpack it first (parquet is packed inside)")
        with _opened(path) as file:
            start = file.read(64)
    except _BROKEN:  # who reads it says so
        return
    for magic, what in _FOREIGN.items():
        begins = start.lstrip().lower() if magic.startswith(b"<") else start
        readable_so = parquet_named and magic.startswith(b"PAR1") or kind_of(path) in _TABLES and what.startswith("is UTF-16")
        if begins.startswith(magic) and not readable_so:
            raise DataError(f"{path}: {what}")


def json_lines(path: Path) -> Numbered:
    """(line number, value) of every line that is not blank. A byte order mark at the start is skipped.

    Lines end at a line feed alone: JSON may hold other line separators inside a text.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                if len(line) == _LONGEST_LINE:
                    raise DataError(f"{path}, row {number}: has more than {_LONGEST_LINE >> 20} MiB; write one object per line")
                raw = line.removeprefix(_BOM) if number == 1 else line
                if raw.strip():
                    yield number, row_in(_parse(raw, path, number), f"{path}, row {number}")
    except _BROKEN as error:
        raise DataError(_unreadable(path, error)) from error


def json_file(path: Path) -> Numbered:
    """A `.json` file: one list of objects, numbered from 1, another shape of a table (`json_shapes`), or JSON lines."""
    try:
        if _has_lines(path):
            yield from json_lines(path)
            return
        with _opened(path) as file:
            data = file.read(_LONGEST_FILE)
        if len(data) == _LONGEST_FILE:
            raise DataError(f"{path}: has more than {_LONGEST_FILE >> 30} GiB; write one object per line")
        text = data.removeprefix(_BOM).decode("utf-8")
        values = json.loads(text)
    except _BROKEN as error:
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
    yield from enumerate(rows_in(values, str(path)), 1)


def _has_lines(path: Path) -> bool:
    """Whether a `.json` file holds JSON lines: its first line is a whole object, and more follow; or no value at all."""
    with _opened(path) as file:
        lines = (line.removeprefix(_BOM).strip() for line in iter(lambda: file.readline(_LONGEST_LINE), b""))
        first = next(filter(None, lines), b"")
        if first.startswith(b"["):
            return False
        try:
            whole = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return not first.startswith(b"{") or first.endswith(b"}")  # a broken line: its row is named
        return not whole or next(filter(None, lines), None) is not None


def _encoding(path: Path) -> str:
    with _opened(path) as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


_SEPARATOR = re.compile("sep=(.)", re.I)


def table(path: Path) -> Numbered:
    """(line as a spreadsheet counts, values by column) of a CSV or tab-separated file whose first line names the columns.

    What spreadsheets leave is read: UTF-16, a first line `sep=;`, names that are separated by `;`, a tab, `|` or a comma, whatever the
    file is called; and passed over: spaces around names, columns without a name, rows without a value.
    """
    number, separator = 1, "\t" if kind_of(path) == ".tsv" else ","
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _opened(path) as raw, io.TextIOWrapper(raw, encoding=_encoding(path), newline="") as file:
            head = file.readline(_LONGEST_CELL)
            if given := _SEPARATOR.fullmatch(head.strip('"\r\n')):
                separator, head, number = given[1], file.readline(_LONGEST_CELL), 2
            elif separator not in head:
                separator = next((sign for sign in ";\t,|" if sign in head), separator)
            spaced = f"{separator} " in head  # `a, "b"`: the quotes stand behind a space
            reader = csv.reader(chain([head], file), delimiter=separator, strict=True, skipinitialspace=spaced)
            rows = enumerate(reader, number)
            number, names = next(((at, [name.strip() for name in cells]) for at, cells in rows if any(cells)), (number, []))
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}, row 1: two columns are called {twice!r}; give every column a name of its own")
            for number, cells in rows:
                if any(cells[len(names) :]):
                    raise DataError(
                        f"{path}, row {number}: has {len(cells)} cells, and the header names {len(names)} columns; "
                        f'put texts that hold "{separator}" in quotes'
                    )
                if any(cell.strip() for cell in cells):
                    yield number, {name: cell for name, cell in zip(names, cells, strict=False) if name}
    except _BROKEN as error:
        raise DataError(_unreadable(path, error)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after row {number}: is not {error.encoding.upper()}; save the file as CSV in UTF-8") from error
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


_IS_JSON = "{}: the file is one JSON list; call it .json, or write one object per line"


def _parse(raw: bytes, path: Path, number: int) -> object:
    where = f"{path}, row {number}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from error
    listed = number == 1 and text.lstrip().startswith("[")
    try:
        value: object = json.loads(text)
        if listed and all(isinstance(item, dict) and not {"role", "from"} & set(item) for item in cast(list[object], value)):
            raise DataError(_IS_JSON.format(where))
        return value
    except json.JSONDecodeError as error:
        raise DataError(
            _IS_JSON.format(where)
            if listed and "delimiter" not in error.msg
            else f"{where}: is no JSON ({error.msg} at character {error.pos + 1}: {_around(text, error.pos)!r}); "
            "every line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no usable JSON ({error}); mend or remove the line") from error


def _around(text: str, position: int) -> str:
    return text[max(0, position - 15) : position + 15].strip()


def _unreadable(path: Path, error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:  # of a codec
        return f"{path}: is packed, and cannot be unpacked ({one_line(error, 100)}); pack or download it again"
    return f"{path}: cannot be read ({error.strerror}); check that it is a file that you may read"
