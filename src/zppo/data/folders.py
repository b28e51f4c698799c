"""A folder as a source: data files in it, laid out as the hub does, or what `save_to_disk` of `datasets` wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zppo.data.files import READERS, file_rows
from zppo.data.reading import Reading, Rows
from zppo.data.rows import Columns
from zppo.data.sets import set_rows, shorten
from zppo.errors import DataError

_SAVED = ("dataset_dict.json", "state.json")


def folder_rows(folder: Path, reading: Reading, columns: Columns) -> Rows:
    """Rows of a folder's split.

    Which files belong to which split is what `datasets` says: by their names (`train.jsonl`, `test/a.parquet`), or by the `configs` in
    the folder's README.md. Files whose names hold no split belong to every one. The files themselves are read as single ones are, so
    errors name file, row and column.

    Raises:
        DataError: no data files in it, or not the configuration or the split that is asked for.
    """
    if any((folder / name).is_file() for name in _SAVED):
        return _saved(folder, reading, columns)
    splits = _splits(folder, reading)
    files = splits.get(reading.split)
    if files is None:
        raise DataError(
            f"{folder}: has no split {reading.split!r} (it has {', '.join(splits)}); name one of these with {reading.split_setting}, "
            "or name a file in the folder"
        )
    return (row for path in files for row in file_rows(path, path.relative_to(folder).as_posix()))


def _splits(folder: Path, reading: Reading) -> Mapping[str, Sequence[Path]]:
    """Files by split, in the order of their names."""
    known = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READERS and not p.name.startswith("."))
    if not known:
        raise DataError(
            f"{folder}: is a folder without data files ({', '.join(READERS)}) in it; name another, or a file"
        )
    # Heavy, and only folders need it.
    import datasets

    try:
        found: Any = datasets.load_dataset_builder(str(folder.absolute()), reading.config).config.data_files
    except Exception as error:  # many kinds, by what is missing or malformed
        hint = "; name one with data.config" if "config" in str(error).lower() else ""
        raise DataError(f"{folder}: is no folder of data that can be used ({shorten(error)}){hint}") from error
    top = folder.absolute()
    splits = {
        str(split): files
        for split, paths in found.items()  # of a folder of images: the images too, and its metadata.jsonl
        if (files := [folder / os.path.relpath(p, top) for p in paths if Path(p).suffix.lower() in READERS])
    }
    left_out = set(known).difference(*splits.values())
    if left_out and reading.config is None:
        raise DataError(
            f"{folder}: holds files of several kinds or splits, and {min(left_out).relative_to(folder)} would be left out; "
            "keep one kind in a folder, or name a file"
        )
    if list(splits) == ["train"] and not any("train" in str(path.relative_to(folder)).lower() for path in known):
        return {reading.split: splits["train"]}
    return splits


def _saved(folder: Path, reading: Reading, columns: Columns) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # many kinds, by what is missing or malformed
        raise DataError(
            f"{folder}: cannot be read as what save_to_disk wrote ({shorten(error)}); write it again"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if reading.split not in loaded:
            raise DataError(
                f"{folder}: has no split {reading.split!r} (it has {', '.join(loaded)}); name one of these with {reading.split_setting}"
            )
        loaded = loaded[reading.split]
    return set_rows(loaded, str(folder), folder.name, columns, folder)
