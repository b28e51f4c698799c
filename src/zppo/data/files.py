"""Rows of data files, one at a time, each with its number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from zppo.errors import DataError

Rows = Iterator[tuple[int, object]]

_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH = 1024


def json_lines(path: Path) -> Rows:
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
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def parquet(path: Path) -> Rows:
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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after row {number}: cannot be read as parquet ({error})") from error


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_lines,
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
        raise DataError(
            f"{where}: the file is one JSON list; write one object per line, without brackets and commas between"
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: is no JSON ({error.msg} at character {error.pos + 1}: {_around(text, error.pos)!r}); "
            "every line must be one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no usable JSON ({error})") from error


def _around(text: str, position: int) -> str:
    return text[max(0, position - 15) : position + 15].strip()
