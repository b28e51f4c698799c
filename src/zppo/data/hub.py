"""Rows of a set that `datasets` reads: of the Hugging Face hub (`hub:owner/name`), or of a folder.

A folder holds data files laid out as the hub does, or what `save_to_disk` of `datasets` wrote.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from zppo.data.layouts import layout_hint
from zppo.data.local_files import READERS, Place, Rows, SourceSettings, file_rows, kind_of
from zppo.data.rows import SINGULAR, Columns, column_names, not_looked_at
from zppo.errors import DataError, one_line
from zppo.names import check_file

_SHOWN = 20


def set_rows(loaded: Any, source: str, name: str, columns: Columns, folder: Path, more: Sequence[str] | None = ()) -> Rows:
    """(place, values by column) of a `Dataset` or `IterableDataset`, of the columns that are asked for alone.

    Images come as bytes or paths: decoding them here would be for nothing.

    Args:
        more: other columns that are wanted; None for all, whatever `columns` says.

    Raises:
        DataError: a column is missing; while iterating, that the set cannot be read further.
    """
    have = loaded.column_names  # None where a stream does not say
    if have is not None and more is not None:
        check_columns(source, have, columns)
        _check_images(source, loaded.features or {}, columns)
        wanted = _roots(columns).union(*(_names(column) for column in more))
        loaded = loaded.select_columns([column for column in have if column in wanted])
    return _rows(_undecoded(loaded), source, name, folder)


def check_columns(source: str, have: Sequence[str], columns: Columns) -> None:
    """Whether a set has a question and an answer. DataError lists its columns."""
    listing = ", ".join(have[:_SHOWN]) + (f" and {len(have) - _SHOWN} more" if len(have) > _SHOWN else "")
    if not set(have) & {*_names(columns.prompt), *_names(columns.messages)}:
        raise DataError(
            f"{source}: has no column {columns.prompt!r} and none {columns.messages!r}; it has {listing}. "
            "Name the one with the question in data.columns.prompt or data.columns.messages."
            + layout_hint(have, prompt=True, answer=not set(have) & set(_names(columns.answer)))
        )
    chats = set(have) & {*_names(columns.messages), *_names(columns.prompt)}
    if not set(have) & set(_names(columns.answer)) and chats <= {columns.prompt}:  # a conversation may end in the answer
        raise DataError(
            f"{source}: has no column {columns.answer!r}; it has {listing}. Name the one with the answer in data.columns.answer."
            + layout_hint(have, prompt=False, answer=True)
        )


def _check_images(source: str, features: Mapping[str, Any], columns: Columns) -> None:
    """Whether a set without the images column has others with images in them. DataError names one."""
    if columns.images and not set(features) & set(_names(columns.images)):
        others = ((n, feature) for n, feature in features.items() if n not in _roots(columns))
        unused = [n for n, feature in others if n == SINGULAR or _plain(feature) != feature]
        if unused:
            raise DataError(not_looked_at(source, unused[0], columns))


def shortened(error: BaseException) -> str:
    """An error of a library in one line, without its example of use."""
    return f"{type(error).__name__}: {one_line(error).partition(' Example of usage')[0]}"


def _rows(loaded: Iterable[object], source: str, name: str, folder: Path) -> Rows:
    number, rows = 0, iter(loaded)
    while True:
        try:
            value = _fetched(next(rows))
        except StopIteration:
            return
        except Exception as error:  # a stream fails in as many ways as a network
            raise DataError(
                f"{source}, after row {number}: cannot be read further ({shortened(error)}); try again, or lower data.limit"
            ) from error
        number += 1
        yield Place(source, name, number, folder), value


def _undecoded(loaded: Any) -> Any:
    """The set with its images as `{"bytes", "path"}`."""
    for column, feature in (loaded.features or {}).items():
        plain = _plain(feature)
        if plain != feature:
            loaded = loaded.cast_column(column, plain)
    return loaded


def _plain(feature: Any) -> Any:
    """A feature of `datasets` whose images, however deep inside, are not decoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, Mapping):
        return {name: _plain(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_plain(feature.feature))
    return feature


def _fetched(value: object) -> object:
    """A row in which images that lie on the hub have their bytes: a stream gives no more than their addresses."""
    if isinstance(value, list):
        return [_fetched(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    path = value.get("path")
    if set(value) == {"bytes", "path"} and value["bytes"] is None and isinstance(path, str) and "hf://" in path:
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return {"bytes": file.read(), "path": None}
    return {name: _fetched(inner) for name, inner in value.items()}


def _names(column: str) -> tuple[str, str]:
    """A column's own name, and the column that it lies in if it is a nested one."""
    return column, column.partition(".")[0]


def _roots(columns: Columns) -> set[str]:
    return {name for column in column_names(columns) for name in _names(column)}


SCHEME = "hub"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_OPTIONS = ("config", "split", "revision")


def hub_rows(rest: str, reading: SourceSettings, columns: Columns, more: Sequence[str] | None = ()) -> Rows:
    """Rows of `owner/name` or `owner/name?config=...&split=...&revision=...`, where what stands in the name wins over the settings; `more`
    as in `set_rows`.

    Raises:
        DataError: no such set, configuration, split or revision, one that needs a log-in, or no network; each with the mend.
    """
    name, reading = parse_hub(rest, reading)
    if Path(name).exists():
        raise DataError(
            f"hub:{name}: {Path(name).absolute()} exists, and `datasets` would read it instead of the hub's; "
            f"start in another folder, or write ./{name} to mean the folder"
        )
    # Heavy, and most people bring files.
    import datasets

    from zppo.http_client import hub_trouble

    why = hub_trouble()
    try:
        loaded = datasets.load_dataset(name, reading.config, split=reading.split, revision=reading.revision, streaming=reading.streaming)
    except Exception as error:  # many kinds, by what is missing: see `_why`
        raise DataError(f"hub:{name}: {_why(name, reading, error, why)}") from error
    return set_rows(loaded, f"hub:{name}, split {reading.split}", f"{name}:{reading.split}", columns, Path.cwd(), more)


def parse_hub(rest: str, reading: SourceSettings) -> tuple[str, SourceSettings]:
    """(name, reading with the options that stand behind it). Raises DataError for a name or an option that cannot be."""
    name, mark, query = rest.partition("?")
    if not _NAME.fullmatch(name):
        raise DataError(f"hub:{rest}: {name!r} is no name of a data set; write hub:owner/name")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if mark else {}
    except ValueError as error:
        raise DataError(f"hub:{rest}: {query!r} cannot be read; write hub:{name}?split=test, with & between options") from error
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise DataError(f"hub:{rest}: {unknown[0]!r} is no option of a hub set; known: {', '.join(_OPTIONS)}")
    return name, replace(
        reading,
        config=options.get("config", reading.config),
        split=options.get("split", reading.split),
        revision=options.get("revision", reading.revision),
    )


def _why(name: str, reading: SourceSettings, error: BaseException, unreached: str = "") -> str:
    """What went wrong and how to mend it. `datasets` drops the causes of its errors, so some are told apart by their words.

    Args:
        unreached: why the hub was not asked.
    """
    import datasets

    page, said = f"https://huggingface.co/datasets/{name}", shortened(error)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        if "gated dataset" in said:
            return f"is gated: accept its terms at {page}, then run `hf auth login` ({said})"
        if "Revision" in said:
            return f"has no revision {reading.revision!r}; see {page}/commits/main and set data.revision ({said})"
        return f"does not exist on the hub, or is private: check the name at {page}; for a private one run `hf auth login` ({said})"
    if isinstance(error, ConnectionError | TimeoutError):
        return (
            f"the hub could not be reached, and no copy was made earlier ({unreached or said}): check the network and that "
            "HF_HUB_OFFLINE is not set; or name a folder with a copy of the set"
        )
    if isinstance(error, ValueError) and "split" in said:
        return f"has no split {reading.split!r} ({said}); name another with {reading.split_setting}"
    if isinstance(error, ValueError) and "config" in said.lower():
        wrong = "needs a configuration" if reading.config is None else f"has no configuration {reading.config!r}"
        return f"{wrong} ({said}); name one with data.config"
    return f"cannot be loaded ({said}); see {page}, or download it and name the folder"


_SAVED = ("dataset_dict.json", "state.json")
_MANIFEST = "manifest.json"


def folder_rows(folder: Path, reading: SourceSettings, columns: Columns, more: Sequence[str] | None = ()) -> Rows:
    """Rows of a folder's split; `more` as in `set_rows`.

    Which files belong to which split is what `datasets` says: by their names (`train.jsonl`, `test/a.parquet`), or by the `configs` in
    the folder's README.md. Files whose names hold no split belong to every one. The files themselves are read as single ones are, so
    errors name file, row and column.

    Raises:
        DataError: no data files in it, or not the configuration or the split that is asked for.
    """
    for path in (folder / "README.md", *(folder / name for name in _SAVED)):
        check_file(path, DataError)
    if any((folder / name).is_file() for name in _SAVED):
        return _saved(folder, reading, columns, more)
    splits = _splits(folder, reading)
    files = splits.get(reading.split)
    if files is None:
        raise DataError(
            f"{folder}: has no split {reading.split!r} (it has {', '.join(splits)}); name one of these with {reading.split_setting}, "
            "or name a file in the folder"
        )
    return (row for path in files for row in file_rows(path, path.relative_to(folder).as_posix()))


def _splits(folder: Path, reading: SourceSettings) -> Mapping[str, Sequence[Path]]:
    """Files by split, in the order of their names."""
    known = sorted(p for p in folder.rglob("*") if kind_of(p) in READERS and not p.name.startswith("."))
    about = folder / _MANIFEST  # of a corpus that `zppo data build` made: it counts rows, and has none
    known = [p for p in known if p != about] or known
    if not known:
        raise DataError(f"{folder}: is a folder without data files ({', '.join(READERS)}) in it; name another, or a file")
    # Heavy, and only folders need it.
    import datasets

    try:
        found: Any = datasets.load_dataset_builder(str(folder.absolute()), reading.config).config.data_files
    except Exception as error:  # many kinds, by what is missing or malformed
        hint = "; name one with data.config" if "config" in str(error).lower() else ""
        raise DataError(f"{folder}: is no folder of data that can be used ({shortened(error)}){hint}") from error
    top = folder.absolute()
    splits = {
        str(split): files
        for split, paths in found.items()  # of a folder of images: the images too, and its metadata.jsonl
        if (files := [folder / os.path.relpath(p, top) for p in paths if kind_of(Path(p)) in READERS])
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


def _saved(folder: Path, reading: SourceSettings, columns: Columns, more: Sequence[str] | None) -> Rows:
    import datasets

    for path in sorted(p for ending in ("*.arrow", "*.json") for p in folder.rglob(ending)):
        check_file(path, DataError)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # many kinds, by what is missing or malformed
        raise DataError(f"{folder}: cannot be read as what save_to_disk wrote ({shortened(error)}); write it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        if reading.split not in loaded:
            raise DataError(
                f"{folder}: has no split {reading.split!r} (it has {', '.join(loaded)}); name one of these with {reading.split_setting}"
            )
        loaded = loaded[reading.split]
    return set_rows(loaded, str(folder), folder.name, columns, folder, more)
