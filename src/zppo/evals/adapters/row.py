"""A row of a data set and typed access to its fields; what is wrong with one is said with benchmark, row and field.

Sentences of a question that say how to reason or how to write the answer down are taken out: the protocol has one such directive for
all benchmarks (method.md section 10).
"""

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
from zppo.evals.item import Item, Media

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
PICTURES = frozenset((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"))
_LONGEST_LIST = 200_000  # characters of a list that is written as text


@dataclass(frozen=True, slots=True)
class DatasetRow:
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
        if isinstance(value, str) and len(value) <= _LONGEST_LIST and value.lstrip().startswith("["):
            value = written_value(value)
        if not isinstance(value, list | tuple) or not value:
            self.fail(fields[0], f"is {_a(self.value(*fields))}; a list is expected")
        return list(value)

    def records(self, *fields: str) -> list[Any]:
        """A list of objects, or an object of lists of one length, as `datasets` gives a sequence of objects."""
        value = self.value(*fields)
        if not isinstance(value, Mapping):
            return self.items(*fields)
        columns = list(value.values())
        if not columns or not all(isinstance(column, list | tuple) and len(column) == len(columns[0]) for column in columns):
            self.fail(fields[0], "is an object; a list of objects, or an object of lists of one length, is expected")
        if not columns[0]:
            self.fail(fields[0], "holds nothing")
        return [dict(zip(value, each, strict=True)) for each in zip(*columns, strict=True)]

    def texts(self, *fields: str) -> tuple[str, ...]:
        """A list of texts (or numbers), none blank."""
        inner = [DatasetRow(self.benchmark, self.number, {fields[0]: value}) for value in self.items(*fields)]
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
            pictures = [DatasetRow(self.benchmark, self.number, {"frames": value}, folder=self.folder, trusted=self.trusted)
                        for value in self.items("frames")]  # fmt: skip
            return tuple(row.image("frames") for row in pictures), None
        field = next((name for name in fields if self.has(name)), fields[0])
        return (), self.path(field, self.text(*fields))

    def path(self, field: str, name: str) -> Path:
        """A path inside the row's folder; a data file must not lead to files elsewhere."""
        relative = Path(name)
        if "\0" in name or relative.is_absolute() or ".." in relative.parts:
            self.fail(field, f"{name[:80]!r} leads out of the folder of the data; give a path inside of it")
        return self.folder / relative


Adapter = Callable[[DatasetRow], tuple[Item, ...]]
"""Items of a row: mostly one; none where the row is not part of the benchmark; several where it holds several questions.

Raises DataError, and nothing else, for a row that cannot be read.
"""


def _a(value: object) -> str:
    """A value as messages show it."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:37]}...")
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "an object"}
    name = kinds.get(type(value), type(value).__name__)
    return f"{name} ({value!r})" if isinstance(value, bool | int | float) else name


def _number(value: float) -> str:
    """A number as people write it: 4.0 is 4."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def written_value(text: str) -> object:
    """What a text holds in JSON or as Python writes it; None if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


# Each pattern covers a whole sentence in the words of one or several benchmarks, and nothing of a question: "Answer the question using
# a single word" is one, "Select the best title" is none.
_PLEASE = r"(?:please )?(?:directly )?"
# MathVerse's version in which the question stands in the picture alone: what follows is its directive.
_SHOWN = r"(?:(?:according to|based on) the (?:question|problem)(?: (?:shown|given))? in the (?:image|figure|picture),? )?"
# "the letter of the correct option" is a form, "the number of cats" and "the word that fills the gap" are questions.
_OF_THE_OPTION = r"(?! (?:of|that|which|whose)\b(?! (?:the |your )?(?:correct |right |best |chosen )?(?:answer|option|choice)\b))"
_FORM = (
    r"(?:only )?(?:the |an? )?(?:correct |final |single |full )?"
    rf"(?:option(?:['’]s)?|choice|answer|yes/no|yes or no|(?:letters?|number|integer|word|phrase){_OF_THE_OPTION})"
)
_WORDS = r"(?:e\.g\.|i\.e\.|\d\.\d|[^.!?\n]){0,400}+"  # bounded, and so linear in the text
_END = r"(?:[.!][\"'”’]?|(?=\n|$))"  # a sentence with a question mark is none of these
_REST = _WORDS + _END
_LIST = r"(?:the |these )?(?:(?:correct|given|right|following|provided|listed) )?(?:answer )?(?:choices?|options?|answers?)"
# Behind a list of options only what says more of the form: "the following options that are true" is a question.
_NO_MORE = (
    rf"(?: (?:of|from) {_LIST})?"
    r"(?: (?:letter|directly|only|below|above|provided|given|listed|as your (?:final )?answer|\([^()\n]{0,60}\)))*"
    r"(?:,? (?:e\.g\.|i\.e\.|such as|for example|without|and nothing)" + _WORDS + r")?" + _END
)
_BOXED = r"[^.!?\n\\]{0,200}\\boxed\{[^{}]{0,80}\}" + _REST
_DIRECTIVES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_PLEASE}(?:answer|respond|reply)(?: (?:the|this) question)?(?: directly)? (?:with|using|in|by) {_FORM}{_REST}",
        rf"{_PLEASE}(?:provide|give|output|select|choose) {_FORM} (?:letter )?(?:of|from) {_LIST}{_NO_MORE}",
        rf"{_PLEASE}answer (?:the|this) (?:question|task)(?: below)?(?: using| with| in| directly| based){_REST}",
        rf"answer this question using the text in the image directly{_REST}",
        rf"{_PLEASE}(?:answer|respond|provide|give|put|write|state|enclose)[^.!?\n]{{0,80}} in curly (?:brackets|braces){_REST}",
        r"for example, rows=\{\d+\} columns=\{\d+\}[.!]?",
        r"(?:let['’]s |please )?(?:think|reason|work|solve)(?: (?:the|this) problem)?(?: about (?:it|this))?,? step[- ]by[- ]step" + _REST,
        r"(?:please )?(?:carefully )?solve (?:the|this) (?:problem|question)" + _BOXED,
        r"(?:please )?(?:put|give|write|place|state|return|report|present|provide|enclose)" + _BOXED,
        r"think about the question and give your final answer" + _REST,
        r"(?:hint: )?please answer the question(?: requiring [^.!?\n]{0,100})? and provide [^\n]{0,300}?at the end[.!]?",
        rf"{_SHOWN}please first conduct reasoning,? and then answer the question{_REST}",
        rf"{_SHOWN}please directly answer the question{_REST}",
        r"(?:the )?last line of your response should[^\n]*",
        rf"select the best answer to the following multiple[- ]choice question{_REST}",
        r"(?:the )?(?:best|correct) answer is:?(?=\s*$)",
        rf"do not (?:generate|include|provide|write) any (?:intermediate )?(?:reasoning|explanation){_REST}",
        rf"(?:your )?final answer should be (?:in |an? |the form){_REST}",
        r"请?(?:一步一步|逐步)地?(?:思考|推理|解答)[^。\n]*。?",
        r"请?直接(?:回答|输出|给出|选择)(?:正确)?(?:选项|答案)[^。\n]*。?",
    )
)
# Where a sentence may start: at the start of a line, or behind the end of another sentence.
_START = re.compile(r"(?:^|(?<=[.!?:]\s)|(?<=[.!?。？！]))[ \t]*", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_MOST = 8  # directives in one question; more is not a question
_IMAGES = re.compile(r"<image[ _]?\d*>", re.IGNORECASE)


def strip_directives(text: str, may_be_empty: bool = False) -> str:
    """The text without its directives; what stands between them keeps its lines.

    Where nothing would be left but marks of images, the text stays as it is: what looked like a directive is the question.

    Args:
        text: a question.
        may_be_empty: the question may stand in the picture, and the text be nothing but directives.
    """
    left = _stripped(text)
    return left if may_be_empty or re.search(r"\w", _IMAGES.sub("", left)) else text.strip()


def _stripped(text: str) -> str:
    for _ in range(_MOST):
        span = _first(text)
        if span is None:
            break
        before, after = text[: span[0]].rstrip(" \t"), text[span[1] :].lstrip(" \t")
        text = before + (" " if before and after and not before.endswith("\n") and not after.startswith("\n") else "") + after
    return _BLANK_LINES.sub("\n\n", text).strip()


def _first(text: str) -> tuple[int, int] | None:
    """Where the first directive stands."""
    for start in _START.finditer(text):
        for directive in _DIRECTIVES:
            match = directive.match(text, start.end())
            if match is not None:
                return match.span()
    return None
