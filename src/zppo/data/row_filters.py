"""Filters of rows, `pass_rate <= 0.5 and level in ['hard', 'harder']`: a small language of comparisons, parsed here and never run as code.

Values are the row's own columns (`a.b` is b in the object in column a; other names stand in backticks), some that are worked out
(`DERIVED`), numbers, texts in quotes, true, false, null, and lists of these in brackets. Comparisons: < <= > >= == != in, not in; they may
be chained (`0 < pass_rate <= 0.5`) and joined by `and`, `or`, `not` and parentheses. What is compared with a missing value is unknown, as
in SQL; `x == null` asks for it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from zppo.data.conversations import RowError, a
from zppo.data.local_files import Place
from zppo.data.rows import column_value, has_column
from zppo.errors import DataError

DERIVED = ("prompt_length", "answer_length", "image_count", "image_width", "image_height", "held_out")
"""What is worked out of a question, where the row has no column of that name: characters of the conversation and of the longest right
answer; how many images; the smallest width and height of them in pixels, null without an image; whether it is a held-out question too."""

Value = Any
Truth = bool | None
Lookup = Callable[[str], Value]
Test = Callable[[Lookup], Truth]

_LONGEST = 1000  # characters of a filter
_SHOWN = 20
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<text>'[^']*'|"[^"]*")
    |(?P<column>`[^`]+`)
    |(?P<sign><=|>=|==|!=|<|>|[][(),])
    |(?P<name>[^\W\d]\w*(?:\.\w+)*))""",
    re.VERBOSE,
)
_ORDER: Mapping[str, Callable[[Any, Any], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_CONSTANTS: Mapping[str, Value] = {"true": True, "false": False, "null": None}
_WORDS = ("and", "or", "not", "in")


class Token(NamedTuple):
    """A piece of a filter: number, text, column (in backticks), sign, name, or end."""

    kind: str
    text: str


class _Operand(NamedTuple):
    """One side of a comparison; `null` is the word itself."""

    read: Callable[[Lookup], Value]
    null: bool = False


class _Parser:
    """One filter by recursive descent. ValueError where it is none."""

    def __init__(self, text: str) -> None:
        self.text, self.names = text, list[str]()
        self._tokens = _tokens(text)

    def parse(self) -> Callable[[Lookup], Truth]:
        test = self._any()
        if self._tokens[0].kind != "end":
            raise ValueError(f"{self._shown()} is one too many")
        if not self.names:
            raise ValueError("it names no column")
        return test

    def _any(self) -> Test:
        tests = [self._all()]
        while self._take("or"):
            tests.append(self._all())
        return tests[0] if len(tests) == 1 else lambda row: _either([test(row) for test in tests])

    def _all(self) -> Test:
        tests = [self._not()]
        while self._take("and"):
            tests.append(self._not())
        return tests[0] if len(tests) == 1 else lambda row: _both([test(row) for test in tests])

    def _not(self) -> Test:
        if self._take("not"):
            inner = self._not()
            return lambda row: None if (truth := inner(row)) is None else not truth
        if self._take("("):
            inner = self._any()
            self._expect(")")
            return inner
        return self._comparison()

    def _comparison(self) -> Test:
        sides, signs = [self._operand()], list[str]()
        while (sign := self._sign()) is not None:
            signs.append(sign)
            sides.append(self._operand())
        if not signs:
            return lambda row: _truth(sides[0].read(row))
        links = list(zip(sides, signs, sides[1:], strict=False))
        return lambda row: _both([_compare(left, sign, right, row) for left, sign, right in links])

    def _sign(self) -> str | None:
        token = self._tokens[0]
        if token.kind == "sign" and token.text in (*_ORDER, "==", "!="):
            return self._next().text
        if self._take("in"):
            return "in"
        if self._take("not"):
            self._expect("in")
            return "not in"
        return None

    def _operand(self) -> _Operand:
        token = self._next()
        if token.kind == "number":
            number = float(token.text) if set(token.text) & set(".eE") else int(token.text)
            return _Operand(lambda row: number)
        if token.kind == "text":
            return _Operand(lambda row: token.text)
        if token.kind == "sign" and token.text == "[":
            return self._list()
        if token.kind == "name" and token.text.lower() in _CONSTANTS:
            constant = _CONSTANTS[token.text.lower()]
            return _Operand(lambda row: constant, constant is None)
        if token.kind == "column" or (token.kind == "name" and token.text not in _WORDS):
            self.names.append(token.text)
            return _Operand(lambda row: row(token.text))
        what = "it ends" if token.kind == "end" else f"{token.text!r} stands"
        raise ValueError(f"{what} where a column or a value should stand")

    def _list(self) -> _Operand:
        items: list[_Operand] = []
        while not self._take("]"):
            if items:
                self._expect(",")
            items.append(self._operand())
        return _Operand(lambda row: [item.read(row) for item in items])

    def _next(self) -> Token:
        return self._tokens.pop(0) if len(self._tokens) > 1 else self._tokens[0]

    def _take(self, text: str) -> bool:
        token = self._tokens[0]
        if token.kind in ("sign", "name") and token.text == text:
            self._next()
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise ValueError(f"{text!r} is missing before {self._shown()}")

    def _shown(self) -> str:
        return "its end" if self._tokens[0].kind == "end" else repr(self._tokens[0].text)


def _tokens(text: str) -> list[Token]:
    if len(text) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST:,} characters")
    found, place = list[Token](), 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        if match is None:
            rest = text[place:].strip()
            hint = "; equal is ==" if rest.startswith("=") else ""
            raise ValueError(f"{rest[:10]!r} cannot be read{hint}")
        kind = str(match.lastgroup)
        found.append(Token(kind, match[kind][1:-1] if kind in ("text", "column") else match[kind]))
        place = match.end()
    return [*found, Token("end", "")]


def parse_filter(text: str) -> tuple[Test, list[str]]:
    """(what says of a row whether it passes, None for unknown; the names that it looks up). ValueError where the text is no filter."""
    try:
        parser = _Parser(text)
        return parser.parse(), parser.names
    except RecursionError:
        raise ValueError(f"filter {text[:40]!r}...: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"filter {text!r}: {error}; write e.g. 'pass_rate <= 0.5' (docs/data.md)") from None


def check_filters(filters: Sequence[str]) -> tuple[str, ...]:
    """The filters of a recipe, each of which can be read. ValueError where one cannot."""
    for text in filters:
        parse_filter(text)
    return tuple(filters)


def _both(truths: Sequence[Truth]) -> Truth:
    return False if False in truths else None if None in truths else True


def _either(truths: Sequence[Truth]) -> Truth:
    return True if True in truths else None if None in truths else False


def _truth(value: Value) -> Truth:
    value = _plain(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value is None or isinstance(value, bool):
        return value
    raise RowError(f"is {a(value)}, neither true nor false; compare it with something")


def _compare(left: _Operand, sign: str, right: _Operand, row: Lookup) -> Truth:
    one, other = _plain(left.read(row)), _plain(right.read(row))
    if (left.null or right.null) and sign in ("==", "!="):
        return ((one is None) == (other is None)) == (sign == "==")
    if one is None or (other is None and not right.null):
        return None
    if sign in ("in", "not in"):
        return _within(one, other) == (sign == "in")
    if sign in ("==", "!="):
        return _equal(one, other) == (sign == "==")
    one, other = _alike(one, other)
    kinds = (int, float, Decimal)
    if not all(isinstance(side, str) for side in (one, other)) and not all(
        isinstance(side, kinds) and not isinstance(side, bool) for side in (one, other)
    ):
        raise RowError(f"{a(one)} and {a(other)} have no order")
    return _ORDER[sign](one, other)


def _within(value: Value, container: Value) -> bool:
    if isinstance(container, list | tuple):
        return any(_equal(value, _plain(item)) for item in container)
    if isinstance(value, str) and isinstance(container, str):
        return value in container
    raise RowError(f"is compared with {a(container)}, which holds nothing; `in` takes a list, or two texts")


def _equal(one: Value, other: Value) -> bool:
    one, other = _alike(one, other)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _alike(one: Value, other: Value) -> tuple[Value, Value]:
    """Both as numbers where one is a number and the other a text that says one: the cells of a CSV table are texts."""
    return _as(one, other), _as(other, one)


def _as(value: Value, other: Value) -> Value:
    if not isinstance(value, str):
        return value
    if isinstance(other, bool):
        return _CONSTANTS.get(value.strip().lower(), value)
    if isinstance(other, int | float | Decimal):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _plain(value: Value) -> Value:
    """Nothing in its several forms is null: a blank cell of a table, a number that is none."""
    if isinstance(value, str) and not value.strip():
        return None
    return None if isinstance(value, float | Decimal) and math.isnan(value) else value


class RowFilters:
    """The filters of one source: which rows pass, and how many each of them drops.

    Attributes:
        dropped: (filter, rows that it dropped, how many of these since a value was null), in the order of the recipe.
    """

    def __init__(self, filters: Sequence[str]) -> None:
        self._tests = [(text, *parse_filter(text)) for text in filters]
        self._dropped, self._null = [0] * len(filters), [0] * len(filters)
        self._unseen = {name for _, _, names in self._tests for name in names}
        self._columns: dict[str, None] = {}

    @property
    def dropped(self) -> tuple[tuple[str, int, int], ...]:
        counts = zip(self._tests, self._dropped, self._null, strict=True)
        return tuple((text, dropped, null) for (text, *_), dropped, null in counts)

    def passes(self, data: object, place: Place, derived: Callable[[str], Value]) -> bool:
        """Whether a row passes all of them; the first that it does not pass counts it.

        Args:
            derived: what one of `DERIVED` is for this row; asked only where a filter needs it.

        Raises:
            DataError: a value cannot be compared so; with source, row and filter.
        """
        if not self._tests or not isinstance(data, Mapping):
            return True
        self._columns.update(dict.fromkeys(map(str, data)))

        def look(name: str) -> Value:
            if has_column(data, name) or name not in DERIVED:
                return column_value(data, name)
            return derived(name)

        self._unseen -= {name for name in self._unseen if name in DERIVED or has_column(data, name)}
        for number, (text, test, _) in enumerate(self._tests):
            try:
                truth = test(look)
            except RowError as fault:
                raise DataError(f"{place}, filter {text!r}: {fault}") from None
            if not truth:
                self._dropped[number] += 1
                self._null[number] += truth is None
                return False
        return True

    def check(self, source: str) -> None:
        """Whether every column that they name was in some row. DataError where one was not; it names those that were."""
        if not self._unseen or not self._columns:
            return
        missing = min(self._unseen)
        text = next(text for text, _, names in self._tests if missing in names)
        columns = list(self._columns)
        more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
        raise DataError(
            f"{source}: no row has the column {missing!r} of the filter {text!r}; the rows have {', '.join(columns[:_SHOWN])}{more}, and "
            f"{', '.join(DERIVED)} are worked out"
        )
