"""A row of a data set and typed access to its fields; what is wrong with one is said with benchmark, row and field."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from zppo.errors import DataError
from zppo.evaluate.item import Item, Media

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
PICTURES = frozenset((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"))
_LONGEST_LIST = 200_000  # characters of a list that is written as text


@dataclass(frozen=True, slots=True)
class Row:
    """One record in its data set's own schema.

    Attributes:
        benchmark: name in the registry.
        number: of the record in its source, from 1.
        data: the record; unread fields may hold anything.
        config, split: which part of the data set it comes from; "" where there is only one.
        folder: what paths of pictures and videos are relative to, and must not leave.
        trusted: the record comes from the `datasets` library, whose own paths into its cache are absolute.
    """

    benchmark: str
    number: int
    data: Mapping[str, Any]
    config: str = ""
    split: str = ""
    folder: Path = Path()
    trusted: bool = False

    def fail(self, field: str, problem: str) -> NoReturn:
        """Raises the DataError that says what is wrong with a field."""
        raise DataError(f"{self.benchmark}, row {self.number}, field {field!r}: {problem}")

    def has(self, field: str) -> bool:
        """Whether the field holds something."""
        value = self.data.get(field)
        return value is not None and not (isinstance(value, str | list | tuple) and not value)

    def value(self, *fields: str) -> Any:
        """What the first of the fields that holds something holds. Data sets that moved renamed some."""
        for field in fields:
            if self.has(field):
                return self.data[field]
        found = ", ".join(str(name) for name in list(self.data)[:12]) or "none"
        self.fail(
            fields[0],
            f"missing or empty (fields of the row: {found}); the data set may have changed: name the revision that the registry knows",
        )

    def text(self, *fields: str) -> str:
        """A text that is not blank, or a number as text."""
        value = self.value(*fields)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self.fail(fields[0], f"is {_a(value)}; a text is expected")
        text = value if isinstance(value, str) else _number(value)
        if not text.strip():
            self.fail(fields[0], "is blank; a text is expected")
        return text.strip()

    def maybe(self, *fields: str) -> str:
        """Like `text`, "" where there is none."""
        return next((self.text(field) for field in fields if self.has(field) and self.data[field] != ""), "")

    def integer(self, *fields: str) -> int:
        """A whole number, or a text that is one."""
        value = self.value(*fields)
        if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}\s*", value, re.ASCII):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(fields[0], f"is {_a(value)}; a whole number is expected")
        return value

    def seconds(self, field: str) -> float:
        """A number of seconds, 0 or more."""
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            self.fail(field, f"is {_a(value)}; a number of seconds is expected")
        return float(value)

    def items(self, *fields: str) -> list[Any]:
        """A list that is not empty; one that is written out as text is read."""
        value = self.value(*fields)
        if isinstance(value, str):
            value = _written_list(value)
        if not isinstance(value, list | tuple) or not value:
            self.fail(fields[0], f"is {_a(self.value(*fields))}; a list is expected")
        return list(value)

    def texts(self, *fields: str) -> tuple[str, ...]:
        """A list of texts (or numbers), none blank."""
        inner = [Row(self.benchmark, self.number, {fields[0]: value}) for value in self.items(*fields)]
        return tuple(row.text(fields[0]) for row in inner)

    def one_of(self, field: str, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
        """A text that is one of the allowed ones."""
        text = self.text(field)
        if text not in allowed:
            self.fail(field, f"is {text[:60]!r}; one of {', '.join(allowed)} is expected")
        return text

    def image(self, *fields: str) -> Media:
        """A picture: bytes, a path inside the folder, base64 text, a data URI, or the {bytes, path} of `datasets`."""
        field = next((name for name in fields if self.has(name)), fields[0])
        value = self.value(*fields)
        if isinstance(value, Mapping):
            if value.get("bytes") is None and self.trusted and isinstance(value.get("path"), str):
                return Path(value["path"])
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value.strip():
            self.fail(field, f"is {_a(value)}; a picture is expected (bytes, a path, or base64)")
        uri = _DATA_URI.match(value)
        if uri is None and Path(value[:4096]).suffix.lower() in PICTURES:
            return self.path(field, value)
        try:
            return base64.b64decode(value[uri.end() if uri else 0 :], validate=True)
        except (binascii.Error, ValueError):
            return self.fail(field, f"is {_a(value)}; neither the path of a picture nor base64")

    def video(self, *fields: str) -> tuple[tuple[Media, ...], Path | None]:
        """(frames, file) of a video: `frames`, a list of pictures, wins over the path in the named fields."""
        if self.has("frames"):
            pictures = [Row(self.benchmark, self.number, {"frames": value}, folder=self.folder, trusted=self.trusted)
                        for value in self.items("frames")]  # fmt: skip
            return tuple(row.image("frames") for row in pictures), None
        field = next((name for name in fields if self.has(name)), fields[0])
        return (), self.path(field, self.text(*fields))

    def path(self, field: str, name: str) -> Path:
        """A path inside the row's folder; a data file must not make anybody read another one."""
        relative = Path(name)
        if "\0" in name or relative.is_absolute() or ".." in relative.parts:
            self.fail(field, f"{name[:80]!r} leads out of the folder of the data; give a path inside of it")
        return self.folder / relative


Adapter = Callable[[Row], tuple[Item, ...]]
"""Items of a row: mostly one; none where the row is not part of the benchmark; several where it holds several questions.

Raises DataError, and nothing else, for a row that cannot be read.
"""


def _a(value: object) -> str:
    """A value as messages show it."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:37]}...")
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        tuple: "a list",
        dict: "an object",
    }
    name = kinds.get(type(value), type(value).__name__)
    return f"{name} ({value!r})" if isinstance(value, bool | int | float) else name


def _number(value: float) -> str:
    """A number as people write it: 4.0 is 4."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _written_list(text: str) -> object:
    """A list that a data set keeps as text, in JSON or as Python writes it; the text itself if it is neither."""
    if len(text) > _LONGEST_LIST or not text.lstrip().startswith("["):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return text
