"""The rows of a JSON file that is one value: a list of objects, or one of the other shapes in which people save tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zppo.errors import DataError

_WRAPPERS = ("data", "rows", "records", "examples", "instances", "items", "questions", "problems", "train", "test", "validation")
_SPLIT = {"columns", "data"}  # of pandas, `orient="split"`
_SHOWN = 3
_VIEWED = {"row_idx", "row", "truncated_cells"}  # a row as the viewer of the hub gives it


def rows_in(value: object, name: str) -> Sequence[object]:
    """The rows: of a list its items; of an object the list in it, its columns side by side, or itself.

    Args:
        value: what the file holds.
        name: of the file, for messages.

    Raises:
        DataError: the shape is another one; the message says which.
    """
    if isinstance(value, list):
        if value and all(isinstance(turn, Mapping) and _is_turn(turn) for turn in value):
            raise DataError(
                f'{name}: is one conversation, a list of turns; write a list of rows, {{"messages": [...], "answer": ...}} each'
            )
        return [row_in(row, name) for row in value]
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"{name}: holds {'an empty object' if value == {} else type(value).__name__}; write a list of objects with columns")
    if set(value) >= _SPLIT and isinstance(value["columns"], list) and all(isinstance(row, list) for row in _list(value["data"])):
        return [dict(zip(map(str, value["columns"]), row, strict=False)) for row in _list(value["data"])]
    lists = [str(key) for key, inner in value.items() if _is_rows(inner)]
    named = [key for key in lists if key in _WRAPPERS]
    if len(named) > 1:
        raise DataError(f"{name}: holds several lists of rows ({', '.join(named)}); write each into a file of its own")
    if named or (lists and len(value) == 1):
        return [row_in(row, name) for row in value[named[0] if named else lists[0]]]
    if len(value) == 1 and isinstance(inner := next(iter(value.values())), Mapping) and _has_rows(inner):
        return rows_in(inner, name)
    if (columns := _columns(value)) is not None:
        return columns
    if len(value) > 1 and all(isinstance(inner, Mapping) for inner in value.values()):
        keys = ", ".join(repr(key) for key in list(value)[:_SHOWN])
        raise DataError(f"{name}: is one object with a row under every key ({keys}, ...); write a list of the rows, with the key as id")
    return [value]


def row_in(value: object, name: str) -> object:
    """A row, taken out of what the viewer of the hub puts around it (`{"row_idx": 0, "row": {...}, "truncated_cells": []}`).

    Raises:
        DataError: cells of it were cut.
    """
    if not (isinstance(value, Mapping) and {"row_idx", "row"} <= set(value) <= _VIEWED and isinstance(value["row"], Mapping)):
        return value
    if value.get("truncated_cells"):
        cut = ", ".join(map(repr, value["truncated_cells"]))
        raise DataError(
            f"{name}: is what the viewer of the hub shows, and cells of row {value['row_idx']} are cut ({cut}); name the set itself, "
            "as hub:owner/name"
        )
    return value["row"]


def list_shape(row: Sequence[object]) -> str:
    """What a row is that is a list, and how its values become a row with columns."""
    if any(isinstance(turn, Mapping) and _is_turn(turn) for turn in row):  # one of them may hold the right answer instead of a text
        return 'a list of turns, one conversation a row; write {"messages": [...], "answer": ...}'
    if row and all(isinstance(item, Mapping) for item in row):
        return "a list of objects; write each into a row of its own"
    return (
        f"a bare list of {len(row)} values, and nothing says which column each is; write objects "
        '({"prompt": "2+3?", "answer": "5"}), or a CSV file whose first line names the columns'
    )


def _has_rows(value: Mapping[Any, Any]) -> bool:
    return any(_is_rows(inner) or (isinstance(inner, Mapping) and _has_rows(inner)) for inner in value.values())


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _is_turn(row: Mapping[Any, Any]) -> bool:
    return {"role", "content"} <= set(row) or {"from", "value"} <= set(row)


def _is_rows(value: object) -> bool:
    """A list of objects that are no turns and no parts of a turn's content."""
    return isinstance(value, list) and bool(value) and all(isinstance(r, Mapping) and not _is_turn(r) and "type" not in r for r in value)


def _columns(value: Mapping[Any, Any]) -> list[dict[str, object]] | None:
    """Rows of an object of columns: lists of one length, or objects with the same row numbers as pandas writes them; None for another."""
    parts = list(value.values())
    if len(parts) < 2:
        return None
    if all(isinstance(part, Mapping) for part in parts):
        numbers = list(parts[0])
        if not numbers or not all(str(n).isdecimal() for n in numbers) or any(list(part) != numbers for part in parts):
            return None
        parts = [list(part.values()) for part in parts]
    elif not all(isinstance(part, list) for part in parts) or len({len(part) for part in parts}) != 1:
        return None
    if any(isinstance(item, Mapping) and _is_turn(item) for part in parts for item in part):
        return None  # a row with a conversation
    return [dict(zip(map(str, value), row, strict=True)) for row in zip(*parts, strict=True)]
