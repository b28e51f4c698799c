"""What an answer is made of: a scalar, a list, a set, a tuple, an interval, a chain of relations, an equation, a matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

MAX_ITEMS = 32  # items of one list; longer ones are compared as strings only


class Kind(Enum):
    """How the items of a shape belong together."""

    SCALAR = "scalar"
    LIST = "list"  # bare items, in any order
    SET = "set"  # in braces
    BRACKET = "bracket"  # tuple, point, interval, closed list
    CHAIN = "chain"  # a < b <= c; items joined by marks
    EQUATION = "equation"  # the sides of an equation, two or more
    UNION = "union"
    MATRIX = "matrix"  # rows flattened


@dataclass(frozen=True, slots=True)
class Shape:
    """An answer taken apart.

    Attributes:
        kind: how the items belong together.
        text: the cleaned answer.
        items: its parts as cleaned text.
        marks: BRACKET: the two brackets; CHAIN: the relations, ascending ("<", "<="); MATRIX: the number of rows.
    """

    kind: Kind
    text: str
    items: tuple[str, ...]
    marks: tuple[str, ...] = ()


IDENTIFIER = re.compile(
    r"(?:\\?[a-zA-Z]|\\[a-zA-Z]+)'*(?:_\{[^{}]*\}|_\w)?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?"
    r"|[A-Za-z]{2,}(?: [A-Za-z]{2,})?|m?(?:∠|\\angle) ?[A-Z]{1,3}|\\frac\{d[a-z]\}\{d[a-z]\}"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_MEMBER = re.compile(r"^[a-zA-Z] ?\\in(?![a-zA-Z]) ?")
_BUILDER = re.compile(r"^\\\{ ?[a-zA-Z] ?(?:\\in ?\\mathbb\{R\})? ?(?:\\mid|\\vert|\||:)(.*)\\\}$")
_AND_OR = re.compile(r"(?:^|(?<=[^a-zA-Z\\]))(?:and|or|和|或|以及)(?=[^a-zA-Z]|$)")
_RELATIONS = {r"\le": "<=", r"\ge": ">=", "<": "<", ">": ">"}
_RELATION = re.compile(r"\\le(?![a-zA-Z]) ?|\\ge(?![a-zA-Z]) ?|<|>")
_CLOSING = {"(": ")]", "[": ")]"}


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """`text` cut at matches of `separator` that stand outside of all brackets. Linear time."""
    depth, parts, start, position = 0, [], 0, 0
    cuts = {m.start(): m.end() for m in separator.finditer(text) if m.end() > m.start()}
    while position < len(text):
        char = text[position]
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and position in cuts:
            parts.append(text[start:position].strip())
            start = position = cuts[position]
            continue
        position += 1
    return [*parts, text[start:].strip()]


_COMMAS = re.compile(r"[,;]")
_CUPS = re.compile(r"\\cup(?![a-zA-Z]) ?")
_EQUALS = re.compile(r"(?<![<>!\\])=")


def _items(text: str) -> list[str]:
    """Items of a bare list: cut at commas, semicolons, "and" and "or"."""
    return [item for part in split_top(text, _COMMAS) for item in split_top(part, _AND_OR) if item]


def _chain(text: str) -> Shape | None:
    """`a < b <= c`, turned so that it ascends; None if it is no chain or turns within."""
    marks = [_RELATIONS[m[0].strip()] for m in _RELATION.finditer(text)]
    parts = split_top(text, _RELATION)
    if not marks or len(parts) != len(marks) + 1 or not all(parts):
        return None
    if all(m[0] == ">" for m in marks):
        return Shape(Kind.CHAIN, text, tuple(reversed(parts)), tuple(m.replace(">", "<") for m in reversed(marks)))
    return Shape(Kind.CHAIN, text, tuple(parts), tuple(marks)) if all(m[0] == "<" for m in marks) else None


def _bracketed(text: str) -> Shape | None:
    """A set in braces, or a tuple, point or interval in brackets."""
    body = text.removeprefix(r"\langle").removesuffix(r"\rangle") if text.startswith(r"\langle") else None
    if body is not None and text.endswith(r"\rangle"):
        return Shape(Kind.BRACKET, text, tuple(split_top(body, _COMMAS)), ("(", ")"))
    for opening, closing in ((r"\{", r"\}"), ("{", "}")):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if _stays_open(text[:-1]) and (opening == r"\{" or "," in inner):
                return Shape(Kind.SET, text, tuple(i for i in split_top(inner, _COMMAS) if i))
    if text[:1] in _CLOSING and text[-1] in _CLOSING[text[0]] and _stays_open(text[:-1]):
        items = split_top(text[1:-1], _COMMAS)
        rows = [_bracketed(item) for item in items] if text.startswith("[[") else []
        if len(rows) > 1 and all(row and row.kind is Kind.BRACKET for row in rows):
            return Shape(Kind.MATRIX, text, tuple(cell for row in rows if row for cell in row.items), (str(len(rows)),))
        if len(items) > 1:
            return Shape(Kind.BRACKET, text, tuple(items), (text[0], text[-1]))
    return None


def _stays_open(text: str) -> bool:
    """Whether the bracket at the start of `text` is not closed within it."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and not (index == 0 and char == "\\"):
            return False
    return True


def _matrix(text: str) -> Shape | None:
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [
        [cell.strip() for cell in row.split("&")]
        for row in re.split(r"\\cr(?![a-zA-Z])", re.sub(r"\\cr\s*$", "", match[2]))
    ]
    return Shape(Kind.MATRIX, text, tuple(cell for row in rows for cell in row), (str(len(rows)),))


def _plus_minus(text: str) -> Shape | None:
    """`a \\pm b` as the list of its two values."""
    sides = re.split(r"\\pm(?![a-zA-Z]) ?", text)
    if len(sides) != 2 or not sides[1] or re.search(r"\\mp(?![a-zA-Z])|=|[<>]", text):
        return None
    left, right = sides
    return Shape(Kind.LIST, text, (f"{left}+{right}" if left else right, f"{left}-{right}"))


@lru_cache(maxsize=8192)
def parse_shape(text: str) -> Shape:
    """Take a cleaned answer apart; what fits nothing else is a scalar."""
    text = _MEMBER.sub("", text)
    builder = _BUILDER.match(text)
    if builder:
        text = _MEMBER.sub("", builder[1].strip())
    if text == r"\mathbb{R}":
        return Shape(Kind.BRACKET, text, (r"-\infty", r"\infty"), ("(", ")"))
    if shape := _matrix(text) or _bracketed(text):
        return shape
    union = split_top(text, _CUPS)
    if len(union) > 1:
        return Shape(Kind.UNION, text, tuple(union))
    items = _items(text)
    if len(items) > 1:
        return Shape(Kind.LIST, text, tuple(items))
    sides = split_top(text, _EQUALS)
    if len(sides) > 1 and all(sides):
        return Shape(Kind.EQUATION, text, tuple(sides))
    return _chain(text) or _plus_minus(text) or Shape(Kind.SCALAR, text, (text,))
