"""Rows of a set of `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zppo.data.reading import Place, Rows
from zppo.data.rows import SINGULAR, Columns, column_names, not_looked_at
from zppo.errors import DataError, one_line

_SHOWN = 20


def set_rows(loaded: Any, source: str, name: str, columns: Columns, folder: Path) -> Rows:
    """(place, values by column) of a `Dataset` or `IterableDataset`, of the columns that are asked for alone.

    Images come as bytes or paths: decoding them here would be for nothing.

    Raises:
        DataError: a column is missing; while iterating, that the set cannot be read further.
    """
    have = loaded.column_names  # None where a stream does not say
    if have is not None:
        check_columns(source, have, columns)
        _check_images(source, loaded.features or {}, columns)
        loaded = loaded.select_columns([column for column in have if column in _roots(columns)])
    return _rows(_undecoded(loaded), source, name, folder)


def check_columns(source: str, have: Sequence[str], columns: Columns) -> None:
    """Whether a set has a question and an answer. DataError lists its columns."""
    listing = ", ".join(have[:_SHOWN]) + (f" and {len(have) - _SHOWN} more" if len(have) > _SHOWN else "")
    if not set(have) & {*_names(columns.prompt), *_names(columns.messages)}:
        raise DataError(
            f"{source}: has no column {columns.prompt!r} and none {columns.messages!r}; it has {listing}. "
            "Name the one with the question in data.columns.prompt or data.columns.messages"
        )
    if not set(have) & set(_names(columns.answer)):
        raise DataError(
            f"{source}: has no column {columns.answer!r}; it has {listing}. Name the one with the answer in data.columns.answer"
        )


def _check_images(source: str, features: Mapping[str, Any], columns: Columns) -> None:
    """Whether a set without the images column has others with images in them. DataError names one."""
    if columns.images and not set(features) & set(_names(columns.images)):
        others = ((n, feature) for n, feature in features.items() if n not in _roots(columns))
        unused = [n for n, feature in others if n == SINGULAR or _plain(feature) != feature]
        if unused:
            raise DataError(not_looked_at(source, unused[0], columns))


def shorten(error: BaseException) -> str:
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
                f"{source}, after row {number}: cannot be read further ({shorten(error)}); try again, or lower data.limit"
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
