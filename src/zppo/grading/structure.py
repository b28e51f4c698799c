"""Answers taken apart: what kind each is and which parts it has. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from zppo.grading.numbers import parse_number


class AnswerKind(Enum):
    """How the items of an answer belong together."""

    SCALAR = "scalar"
    LIST = "list"  # bare items, in any order
    SET = "set"  # in braces
    BRACKET = "bracket"  # tuple, point, interval, closed list
    CHAIN = "chain"  # a < b <= c; items joined by marks
    EQUATION = "equation"  # the sides of an equation, two or more
    UNION = "union"
    RATIO = "ratio"  # 2:3, a:b:c
    MATRIX = "matrix"  # rows flattened


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer taken apart.

    Attributes:
        kind: how the items belong together.
        text: the cleaned answer.
        items: its parts as cleaned text.
        marks: BRACKET: the two brackets; CHAIN: the relations, ascending ("<", "<="); MATRIX: the number of rows.
        name: the variable of `x \\in ...`, "" without one.
    """

    kind: AnswerKind
    text: str
    items: tuple[str, ...]
    marks: tuple[str, ...] = ()
    name: str = ""


_QUANTITY = r"(?:[A-Z]{1,4}|[A-Za-z])(?:_\{\w+\})?'*"  # a length, an area: AB, S_{ABC}
IDENTIFIER = re.compile(
    r"(?:\\?[a-zA-Z]|\\[a-zA-Z]+)'*(?:_\{[^{}]*\}|_\w)?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?(?:\^\{-1\}(?:\([a-zA-Z]\))?)?"
    r"|[A-Za-z]{2,}(?: [A-Za-z]{2,}){0,4}|m?(?:∠|\\angle) ?[A-Z]{1,3}|\\frac\{d[a-z]\}\{d[a-z]\}"
    r"|\|(?:[A-Z]{1,3}|[a-z]|\\(?:vec|overrightarrow|overline|mathbf)\{\w+\})\||\[[A-Z]{3,}\]"
    r"|\\(?:vec|overline|overrightarrow|widehat|hat|bar)\{\w+\}"
    r"|\\(?:sin|cos|tan|cot|sec|csc) ?(?:\\?[a-zA-Z]+|\([^()=]*\))"
    r"|(?:Pr?|E|Var|n|N)\([A-Za-z]\w*(?: ?(?:\||\\cap|\\cup|\\mid|,|=|>|<|\\ge|\\le) ?\w+)?\)"
    rf"|{_QUANTITY}(?::{_QUANTITY})+|\\frac\{{{_QUANTITY}\}}\{{{_QUANTITY}\}}|{_QUANTITY}/{_QUANTITY}"
)
"""What an answer may give a value to: a variable, a function of one, a length, an angle, a probability, a few words."""
_MATRIX = re.compile(r"\\begin\{([pbB]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_MEMBER = re.compile(r"^(?P<name>[a-zA-Z]) ?\\in(?![a-zA-Z]) ?")
_BUILDER = re.compile(r"^\\\{ ?[a-zA-Z] ?(?:\\in ?\\mathbb\{R\})? ?(?:\\mid|\\vert|\||:)(.*)\\\}$")
_LABEL = re.compile(r"\(?(?P<mark>[a-z]|[ivx]{1,4}|\d)\)(?P<rest>.+)|(?P<name>[A-Za-z][A-Za-z0-9 ]{0,20}): ?(?P<value>.+)")
_MEMBERSHIP = r"\\in ?\\?(?:mathbb\{?)?[ZNRQC]\}?(?:\^[+*]|_\{?[+>0]+\}?)?"
_TAIL = re.compile(
    r"(?:[,;]| |(?<=[\d)}])) ?\(?(?:for (?:all|any|every|some|each)|where|with|as long as)(?![a-zA-Z])(?P<what>.*)$"
    rf"|[,;] ?\(?(?:[a-zA-Z],? ?)+{_MEMBERSHIP}\)?$|\([a-zA-Z] ?{_MEMBERSHIP}\)$"
)
_RELATED = r"[a-zA-Z] ?(?:>|<|\\ge|\\le|\\ne) ?-?\d"
_CONDITION = re.compile(rf"[,;]? ?\({_RELATED}\)$|(?:[,;]| ?for) ?{_RELATED}$")  # (n >= 1)
_TAIL_WORDS = frozenset(
    "a an all and any are arbitrary be can complex constant constants element elements every fixed in integer integers is natural negative "
    "nonnegative nonzero not number numbers odd even of positive prime rational real reals some the value values where whole zero".split()
)
_POINT = re.compile(r"^[A-Z]'?(?:_\{?\d\}?)?(?=\([^()]*,[^()]*\)$)")  # P(3,-1)
_COLON = re.compile(":")
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


def _chain(text: str) -> ParsedAnswer | None:
    """`a < b <= c`, turned so that it ascends; None if it is no chain or turns within."""
    marks = [_RELATIONS[m[0].strip()] for m in _RELATION.finditer(text)]
    parts = split_top(text, _RELATION)
    if not marks or len(parts) != len(marks) + 1 or not all(parts):
        return None
    if all(m[0] == ">" for m in marks):
        return ParsedAnswer(AnswerKind.CHAIN, text, tuple(reversed(parts)), tuple(m.replace(">", "<") for m in reversed(marks)))
    return ParsedAnswer(AnswerKind.CHAIN, text, tuple(parts), tuple(marks)) if all(m[0] == "<" for m in marks) else None


def _bracketed(text: str) -> ParsedAnswer | None:
    """A set in braces, or a tuple, point or interval in brackets."""
    body = text.removeprefix(r"\langle").removesuffix(r"\rangle") if text.startswith(r"\langle") else None
    if body is not None and text.endswith(r"\rangle"):
        return ParsedAnswer(AnswerKind.BRACKET, text, tuple(split_top(body, _COMMAS)), ("(", ")"))
    for opening, closing in ((r"\{", r"\}"), ("{", "}")):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            if _stays_open(text[:-1]) and inner.strip(",; ") and (opening == r"\{" or "," in inner):
                return ParsedAnswer(AnswerKind.SET, text, tuple(i for i in split_top(inner, _COMMAS) if i))
    if text[:1] in _CLOSING and text[-1] in _CLOSING[text[0]] and _stays_open(text[:-1]):
        items = split_top(text[1:-1], _COMMAS)
        rows = [_bracketed(item) for item in items] if text.startswith("[[") else []
        if len(rows) > 1 and all(row and row.kind is AnswerKind.BRACKET for row in rows):
            return ParsedAnswer(AnswerKind.MATRIX, text, tuple(cell for row in rows if row for cell in row.items), (str(len(rows)),))
        if len(items) > 1:
            return ParsedAnswer(AnswerKind.BRACKET, text, tuple(items), (text[0], text[-1]))
    return None


def _stays_open(text: str) -> bool:
    """Whether the bracket at the start of `text` is not closed within it."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and not (index == 0 and char == "\\"):
            return False
    return True


_ABSOLUTE = re.compile(r"\|(?P<name>[a-zA-Z])\|(?P<relation><|>|\\le ?|\\ge ?)(?P<bound>[^<>=|]+)")
_UNEQUAL = re.compile(r"(?P<name>[a-zA-Z]) ?\\ne ?(?P<value>[^<>=,]+)")
_EXCEPT = re.compile(r"(?:all |the )*real(?: number)?s?,? (?:except|excluding|other than|but)(?: for)? (?:[a-zA-Z]=)?(?P<value>[^<>=,]+)")
_WITHOUT = re.compile(r"\\mathbb\{R\} ?(?:\\setminus|\\backslash|-) ?\\?\{(?P<value>[^{},]+)\\?\}")


def by_condition(text: str) -> str:
    """A condition on one variable as the relations that it stands for: `|x| > 2` as `x<-2,x>2`, `x \\ne 2` as `x<2,x>2`."""
    if match := _ABSOLUTE.fullmatch(text):
        name, bound, relation = match["name"], match["bound"], match["relation"].strip()
        below = {"<": "<", ">": "<", r"\le": r"\le ", r"\ge": r"\le "}[relation]
        if relation in ("<", r"\le"):
            return f"-({bound}){below}{name}{below}{bound}"
        above = ">" if relation == ">" else r"\ge "
        return f"{name}{below}-({bound}),{name}{above}{bound}"
    if match := _UNEQUAL.fullmatch(text):
        return rf"(-\infty,{match['value']})\cup({match['value']},\infty)"
    if match := _EXCEPT.fullmatch(text) or _WITHOUT.fullmatch(text):
        return rf"(-\infty,{match['value']})\cup({match['value']},\infty)"
    return text


def _matrix(text: str) -> ParsedAnswer | None:
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in re.split(r"\\cr(?![a-zA-Z])", re.sub(r"\\cr\s*$", "", match[2]))]
    return ParsedAnswer(AnswerKind.MATRIX, text, tuple(cell for row in rows for cell in row), (str(len(rows)),))


_MARKS = ("abcdefgh", "12345678", ("i", "ii", "iii", "iv", "v", "vi"))
_MARK = re.compile(r"\(?(?<![a-zA-Z0-9\\{])([a-h]|[ivx]{1,3}|[1-8])\)")


def _labelled_parts(text: str) -> tuple[str, ...]:
    """`(a) 3 (b) 4` cut before its labels, which have to come in order and with something behind each; () if it is nothing like it."""
    marks = list(_MARK.finditer(text))
    names = [mark[1] for mark in marks]
    if len(marks) < 2 or marks[0].start() > 0 or not any(names == list(order[: len(names)]) for order in _MARKS):
        return ()
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    values = [text[mark.end() : end].strip(" ,;") for mark, end in zip(marks, ends, strict=True)]
    return tuple(f"({name}){value}" for name, value in zip(names, values, strict=True)) if all(values) else ()


def without_tail(text: str) -> str:
    """`text` without what says for which values it holds: "for all x", "where n is an integer", `k \\in \\mathbb{Z}`, `(n \\ge 1)`."""
    condition = _CONDITION.search(text)
    match = _TAIL.search(text) or condition
    head = text[: match.start()].strip(" ,;") if match else ""
    if match is None or not head:
        return text
    if match is condition:  # not the second of two relations
        named = re.findall(r"[a-zA-Z](?= ?[<>\\])", match[0])
        return (
            text if re.search(r"[<>]|\\[lg]e(?![a-z])", head) or not set(named) & set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", head)) else head
        )
    what = match["what"] or ""
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", what.replace("-", ""))
    figures = re.search(r"\d", what) and not re.search(r"[<>=]|\\(?:[lgn]e|in)(?![a-z])", what)
    return text if figures or any(word.lower() not in _TAIL_WORDS for word in words) else head


def labelled(items: tuple[str, ...]) -> dict[str, str] | None:
    """`(a) 3,(b) 4` and `Ann: 5,Bob: 3` as a mapping; None if an item has no label or a label comes twice."""
    pairs: dict[str, str] = {}
    for item in items:
        match = _LABEL.fullmatch(item.strip())
        name = match and (match["mark"] or match["name"]).strip().lower()
        if not match or not name or name in pairs:
            return None
        pairs[name] = (match["rest"] or match["value"]).strip()
    return pairs


def opened(items: tuple[str, ...]) -> tuple[str, ...]:
    """Items of a list with each `a \\pm b` as the two that it stands for."""
    pairs = [_plus_minus(item) if r"\pm" in item else None for item in items]
    return tuple(value for item, pair in zip(items, pairs, strict=True) for value in (pair.items if pair else (item,)))


def _plus_minus(text: str) -> ParsedAnswer | None:
    """`a \\pm b` as the list of its two values."""
    sides = re.split(r"\\pm(?![a-zA-Z]) ?", text)
    if len(sides) != 2 or not sides[1] or re.search(r"\\mp(?![a-zA-Z])|=|[<>]", text):
        return None
    left, right = sides
    return ParsedAnswer(AnswerKind.LIST, text, (f"{left}+{right}" if left else right, f"{left}-{right}"))


@lru_cache(maxsize=8192)
def parse_answer(text: str) -> ParsedAnswer:
    """Take a cleaned answer apart; what fits nothing else is a scalar."""
    member = _MEMBER.match(text)
    parsed = _parsed(by_condition(text) if member is None else text[member.end() :])
    return replace(parsed, name=member["name"]) if member else parsed


def _parsed(text: str) -> ParsedAnswer:
    if parse_number(text):  # "one hundred and five" is no list
        return ParsedAnswer(AnswerKind.SCALAR, text, (text,))
    if parts := _labelled_parts(text):
        return ParsedAnswer(AnswerKind.LIST, text, parts)
    text = _POINT.sub("", text)
    builder = _BUILDER.match(text)
    if builder:
        text = by_condition(_MEMBER.sub("", builder[1].strip()))
    if text == r"\mathbb{R}":
        return ParsedAnswer(AnswerKind.BRACKET, text, (r"-\infty", r"\infty"), ("(", ")"))
    if parsed := _matrix(text) or _bracketed(text):
        return parsed
    union = split_top(text, _CUPS)
    if len(union) > 1:
        sets = [_bracketed(part) for part in union]
        if all(part and part.kind is AnswerKind.SET for part in sets):
            return ParsedAnswer(AnswerKind.SET, text, tuple(item for part in sets if part for item in part.items))
        return ParsedAnswer(AnswerKind.UNION, text, tuple(union))
    items = _items(text)
    if len(items) > 1:
        return ParsedAnswer(AnswerKind.LIST, text, tuple(items))
    sides = split_top(text, _EQUALS)
    if len(sides) > 1 and all(sides):
        return ParsedAnswer(AnswerKind.EQUATION, text, tuple(sides))
    ratio = split_top(text, _COLON)
    if len(ratio) > 1 and all(ratio):
        return ParsedAnswer(AnswerKind.RATIO, text, tuple(ratio))
    return _chain(text) or _plus_minus(text) or ParsedAnswer(AnswerKind.SCALAR, text, (text,))
