"""Equality of two answers by type: scalars, lists, sets, tuples, intervals, chains of relations, equations, matrices.

What can be decided cheaply and safely is decided here, for good. `compare` is three-valued: it returns True or False where the types
decide, and None where algebra is needed; then a worker calls the same function with math-verify as its `algebra`
(see `zppo.grading.worker`). Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from zppo.grading.numbers import is_huge, numbers_equal, parse_number, percent_equal
from zppo.grading.text import MAX_ANSWER, choice, clean, is_prose, nested_too_deep, only_choice, text_key, yes_no
from zppo.grading.units import split_unit

MAX_ITEMS = 32  # items of one list; longer ones are compared as strings only


class AnswerKind(Enum):
    """How the items of an answer belong together."""

    SCALAR = "scalar"
    LIST = "list"  # bare items, in any order
    SET = "set"  # in braces
    BRACKET = "bracket"  # tuple, point, interval, closed list
    CHAIN = "chain"  # a < b <= c; items joined by marks
    EQUATION = "equation"  # the sides of an equation, two or more
    UNION = "union"
    MATRIX = "matrix"  # rows flattened


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer taken apart.

    Attributes:
        kind: how the items belong together.
        text: the cleaned answer.
        items: its parts as cleaned text.
        marks: BRACKET: the two brackets; CHAIN: the relations, ascending ("<", "<="); MATRIX: the number of rows.
    """

    kind: AnswerKind
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
            if _stays_open(text[:-1]) and (opening == r"\{" or "," in inner):
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


def _matrix(text: str) -> ParsedAnswer | None:
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in re.split(r"\\cr(?![a-zA-Z])", re.sub(r"\\cr\s*$", "", match[2]))]
    return ParsedAnswer(AnswerKind.MATRIX, text, tuple(cell for row in rows for cell in row), (str(len(rows)),))


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
    text = _MEMBER.sub("", text)
    builder = _BUILDER.match(text)
    if builder:
        text = _MEMBER.sub("", builder[1].strip())
    if text == r"\mathbb{R}":
        return ParsedAnswer(AnswerKind.BRACKET, text, (r"-\infty", r"\infty"), ("(", ")"))
    if parsed := _matrix(text) or _bracketed(text):
        return parsed
    union = split_top(text, _CUPS)
    if len(union) > 1:
        return ParsedAnswer(AnswerKind.UNION, text, tuple(union))
    items = _items(text)
    if len(items) > 1:
        return ParsedAnswer(AnswerKind.LIST, text, tuple(items))
    sides = split_top(text, _EQUALS)
    if len(sides) > 1 and all(sides):
        return ParsedAnswer(AnswerKind.EQUATION, text, tuple(sides))
    return _chain(text) or _plus_minus(text) or ParsedAnswer(AnswerKind.SCALAR, text, (text,))


Algebra = Callable[[str, str], bool | None]

_SYMBOL = re.compile(r"[a-zA-Z]|\\(?!pi|infty|emptyset)[a-zA-Z]+")
_INFINITE = {r"\infty": "+", r"+\infty": "+", r"-\infty": "-"}
_PERCENT = "%"
_REPEATED_SIGN = re.compile(r"[°%]\s*[°%]")


def _all(decisions: Iterable[bool | None]) -> bool | None:
    """Three-valued conjunction; stops at the first False."""
    result: bool | None = True
    for decision in decisions:
        if decision is False:
            return False
        if decision is None:
            result = None
    return result


def _scalars(gold: str, answer: str, algebra: Algebra) -> bool | None:
    """Two answers without structure, units taken off."""
    if gold == answer or text_key(gold) == text_key(answer):
        return True
    first, second = parse_number(gold), parse_number(answer)
    if first and second:
        return numbers_equal(first, second)
    if is_prose(gold) or is_prose(answer) or is_huge(gold) or is_huge(answer):
        return False
    simple = [text for text, number in ((gold, first), (answer, second)) if number or _SYMBOL.fullmatch(text)]
    if len(simple) == 2 or r"\boxed" in gold or r"\boxed" in answer:
        return False  # two different names, a name and a number
    if (":" in gold) != (":" in answer) and (first or second) and "/" not in gold + answer and r"\frac" not in gold + answer:
        return False  # a ratio or a time against a plain number
    return algebra(gold, answer)


def _ordered(golds: Sequence[str], answers: Sequence[str], algebra: Algebra) -> bool | None:
    if len(golds) != len(answers):
        return False
    return _all(compare_cleaned(g, a, algebra) for g, a in zip(golds, answers, strict=True))


def _unordered(golds: Sequence[str], answers: Sequence[str], algebra: Algebra) -> bool | None:
    """Whether the items can be paired off so that both of each pair are equal; repeated items count once."""
    rest, left = list(dict.fromkeys(golds)), list(dict.fromkeys(answers))
    if len(rest) != len(left):
        return False
    for gold in tuple(rest):  # what the types pair off needs no algebra
        match = next((a for a in left if compare_cleaned(gold, a, undecided) is True), None)
        if match is not None:
            rest.remove(gold)
            left.remove(match)
    result: bool | None = True
    for gold in rest:
        decisions = [compare_cleaned(gold, answer, algebra) for answer in left]
        if True in decisions:
            left.pop(decisions.index(True))
        elif None in decisions:
            result = None  # some pairing may still do; keep looking for a gold that nothing fits
        else:
            return False
    return result


def _interval(parsed: ParsedAnswer) -> tuple[str, str, str, str, str] | None:
    """(lower end, upper end, opening, closing, variable or "") of an interval in brackets or as a chain; None if it is none."""
    if parsed.kind is AnswerKind.BRACKET and len(parsed.items) == 2:
        return (*parsed.items, *parsed.marks, "")  # type: ignore[return-value]
    if parsed.kind is not AnswerKind.CHAIN or len(parsed.items) > 3:
        return None
    names = [i for i, item in enumerate(parsed.items) if IDENTIFIER.fullmatch(item) and item not in _INFINITE]
    numbers = [item for i, item in enumerate(parsed.items) if i not in names]
    if len(names) != 1 or any(parsed.items[names[0]] in re.findall(r"[a-zA-Z]+", n) for n in numbers):
        return None
    opening = "[" if names[0] > 0 and parsed.marks[names[0] - 1] == "<=" else "("
    closing = "]" if names[0] < len(parsed.marks) and parsed.marks[names[0]] == "<=" else ")"
    name = parsed.items[names[0]]
    if len(parsed.items) == 2:
        return (numbers[0], r"\infty", opening, ")", name) if names[0] == 1 else (r"-\infty", numbers[0], "(", closing, name)
    return (numbers[0], numbers[1], opening, closing, name) if names[0] == 1 else None


def _intervals(gold: ParsedAnswer, answer: ParsedAnswer, algebra: Algebra) -> bool | None:
    """Two intervals, at least one of them a chain of relations; chains that are no intervals are left to algebra."""
    first, second = _interval(gold), _interval(answer)
    if first is None or second is None:
        return algebra(gold.text, answer.text)
    if first[4] and second[4] and first[4] != second[4]:
        return False
    decisions: list[bool | None] = []
    for end, bracket in ((0, 2), (1, 3)):
        infinite = _INFINITE.get(first[end]), _INFINITE.get(second[end])
        if infinite != (None, None):
            decisions.append(infinite[0] == infinite[1])
        else:
            decisions.append(first[bracket] == second[bracket] and compare_cleaned(first[end], second[end], algebra))
    return _all(decisions)


def _value_of_equation(parsed: ParsedAnswer, other: str, gold_first: bool, algebra: Algebra) -> bool | None:
    """An equation against something that is none: `x = 3` is 3, `2 + 3 = 5` is 5, `8 = 5` is not."""
    sides = parsed.items[1:] if IDENTIFIER.fullmatch(parsed.items[0]) else parsed.items
    if sides == parsed.items and IDENTIFIER.fullmatch(parsed.items[-1]) and len(sides) == 2:
        sides = parsed.items[:1]  # 3 = x
    if any(parse_answer(side).kind is not AnswerKind.SCALAR for side in sides[1:]):
        return False
    pair = (sides[-1], other) if gold_first else (other, sides[-1])
    return _all([compare_cleaned(*pair, algebra), *(compare_cleaned(sides[0], s, algebra) for s in sides[1:])])


def _equations(gold: ParsedAnswer, answer: ParsedAnswer, algebra: Algebra) -> bool | None:
    """Two equations: of the same name, their values; of two names, different; else whatever algebra says."""
    names = [parsed.items[0] if IDENTIFIER.fullmatch(parsed.items[0]) else "" for parsed in (gold, answer)]
    if all(names) and len(gold.items) == len(answer.items) == 2:
        if names[0] == names[1]:
            return compare_cleaned(gold.items[1], answer.items[1], algebra)
        if parse_number(gold.items[1]) and parse_number(answer.items[1]):
            return False
    if is_prose(gold.text) or is_prose(answer.text):
        return False
    return algebra(gold.text, answer.text)


def _assignments(parsed: ParsedAnswer) -> dict[str, str] | None:
    """`x=1, y=2` as a mapping; None if an item is no assignment or a name comes twice."""
    pairs: dict[str, str] = {}
    for item in parsed.items:
        part = parse_answer(item)
        if (
            part.kind is not AnswerKind.EQUATION
            or len(part.items) != 2
            or not IDENTIFIER.fullmatch(part.items[0])
            or part.items[0] in pairs
        ):
            return None
        pairs[part.items[0]] = part.items[1]
    return pairs


def _values(parsed: ParsedAnswer) -> tuple[str, ...]:
    """Items of a list of solutions: `x=1 or x=2` and `x_1=1, x_2=2` give 1 and 2."""
    parts = [parse_answer(item) for item in parsed.items]
    names = {re.sub(r"_\{?\w+\}?$", "", p.items[0]) for p in parts}
    if len(names) == 1 and all(p.kind is AnswerKind.EQUATION and len(p.items) == 2 and IDENTIFIER.fullmatch(p.items[0]) for p in parts):
        return tuple(p.items[1] for p in parts)
    head = parts[0]
    alone = head.kind is AnswerKind.EQUATION and all(p.kind is not AnswerKind.EQUATION for p in parts[1:])
    if alone and len(head.items) == 2 and IDENTIFIER.fullmatch(head.items[0]):
        return (head.items[1], *parsed.items[1:])  # x = 1, 2
    return parsed.items


def _lists(gold: ParsedAnswer, answer: ParsedAnswer, algebra: Algebra) -> bool | None:
    """Lists, sets, tuples and closed lists against one another."""
    golds, answers = _assignments(gold), _assignments(answer)
    if golds is not None and answers is not None:
        if golds.keys() == answers.keys():
            return _all(compare_cleaned(golds[name], answers[name], algebra) for name in golds)
    elif golds is not None and answer.kind is AnswerKind.BRACKET:
        return _ordered([golds[name] for name in sorted(golds)], answer.items, algebra)
    elif golds is not None and len({name[0] for name in golds}) > 1:
        return answer.kind is AnswerKind.LIST and _ordered(list(golds.values()), answer.items, algebra)
    elif answers is not None and gold.kind is AnswerKind.BRACKET:
        return _ordered(gold.items, [answers[name] for name in sorted(answers)], algebra)
    first, second = _values(gold), _values(answer)
    kinds = {gold.kind, answer.kind}
    if kinds <= {AnswerKind.LIST, AnswerKind.SET}:
        if any(map(yes_no, first)):
            return _ordered(first, second, algebra)  # verdicts on several statements
        return _unordered(first, second, algebra)
    if kinds == {AnswerKind.BRACKET}:
        return gold.marks == answer.marks and _ordered(first, second, algebra)
    if kinds == {AnswerKind.BRACKET, AnswerKind.LIST}:
        brackets = (gold if gold.kind is AnswerKind.BRACKET else answer).marks
        return (brackets == ("(", ")") or (brackets == ("[", "]") and len(first) > 2)) and _ordered(first, second, algebra)
    return False


_LISTS = frozenset({AnswerKind.LIST, AnswerKind.SET, AnswerKind.BRACKET})
_INTERVALS = frozenset({AnswerKind.CHAIN, AnswerKind.BRACKET})


def _structured(gold: ParsedAnswer, answer: ParsedAnswer, algebra: Algebra) -> bool | None:
    """Two answers, at least one of them with structure."""
    kinds = {gold.kind, answer.kind}
    if len(gold.items) > MAX_ITEMS or len(answer.items) > MAX_ITEMS:
        return gold.text == answer.text
    if AnswerKind.EQUATION in kinds:
        if kinds == {AnswerKind.EQUATION}:
            return _equations(gold, answer, algebra)
        if kinds & {AnswerKind.CHAIN, AnswerKind.MATRIX}:
            return False
        if gold.kind is AnswerKind.EQUATION:
            return _value_of_equation(gold, answer.text, True, algebra)
        return _value_of_equation(answer, gold.text, False, algebra)
    if kinds <= _LISTS:
        return _lists(gold, answer, algebra)
    if kinds == {AnswerKind.MATRIX}:
        return gold.marks == answer.marks and _ordered(gold.items, answer.items, algebra)
    if kinds == {AnswerKind.MATRIX, AnswerKind.BRACKET}:
        matrix = gold if gold.kind is AnswerKind.MATRIX else answer
        vector = matrix.marks[0] in ("1", str(len(matrix.items)))
        return vector and _ordered(gold.items, answer.items, algebra)
    if kinds == {AnswerKind.CHAIN} and gold.marks == answer.marks and _ordered(gold.items, answer.items, lambda g, a: g == a):
        return True
    if kinds == {AnswerKind.CHAIN} and all(IDENTIFIER.fullmatch(item) for item in (*gold.items, *answer.items)):
        return False
    if kinds <= _INTERVALS and not (is_prose(gold.text) or is_prose(answer.text)):
        return _intervals(gold, answer, algebra)
    if AnswerKind.UNION in kinds and kinds <= {AnswerKind.UNION, AnswerKind.LIST}:
        return _unordered(gold.items, answer.items, algebra)
    if kinds <= {AnswerKind.MATRIX, AnswerKind.SCALAR} and not (
        is_prose(gold.text.replace("matrix", "")) or is_prose(answer.text.replace("matrix", ""))
    ):
        return algebra(gold.text, answer.text)
    if kinds == {AnswerKind.UNION, AnswerKind.SCALAR} and not (is_prose(gold.text) or is_prose(answer.text)):
        return algebra(gold.text, answer.text)
    if AnswerKind.SCALAR in kinds and kinds & {AnswerKind.SET, AnswerKind.LIST}:
        return len(gold.items) == len(answer.items) == 1 and compare_cleaned(gold.items[0], answer.items[0], algebra)
    return False


def _percents(gold: str, answer: str, unit_of_gold: bool, algebra: Algebra) -> bool | None:
    """Exactly one side carries a percent sign: the same figure, or the number that the percentage means."""
    first, second = parse_number(gold), parse_number(answer)
    if first and second:
        return percent_equal(first, second) if unit_of_gold else percent_equal(second, first)
    return compare_cleaned(gold, answer, algebra)


def compare_cleaned(gold: str, answer: str, algebra: Algebra) -> bool | None:
    """`compare` for two cleaned answers or parts of them: units first, then structure, then scalars."""
    if gold == answer:
        return bool(gold)
    (gold_rest, gold_unit), (answer_rest, answer_unit) = split_unit(gold, True), split_unit(answer, False)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    if (gold_unit == _PERCENT) != (answer_unit == _PERCENT):
        return _percents(gold_rest, answer_rest, gold_unit == _PERCENT, algebra)
    first, second = parse_answer(gold_rest), parse_answer(answer_rest)
    if first.kind is AnswerKind.SCALAR and second.kind is AnswerKind.SCALAR:
        return _scalars(first.text, second.text, algebra)
    return _structured(first, second, algebra)


def _compare_choices(gold: str, answer: str, algebra: Algebra) -> bool | None:
    """Answers one of which is a choice letter with or without its text, or several letters."""
    (gold_letters, gold_text), (letters, text) = choice(gold), choice(answer)
    if gold_letters and letters:
        if len(gold) > 1 and gold.isalpha() and list(gold) != sorted(gold):
            return [c for c in answer if c in gold_letters] == list(gold)  # BDAC is an order; AC is a choice of two
        return gold_letters == letters
    if gold_letters:
        return bool(gold_text) and compare_cleaned(gold_text, answer, algebra)
    return bool(text) and compare_cleaned(gold, text, algebra)


def compare(gold: str, answer: str, algebra: Algebra) -> bool | None:
    """Whether two answers are equal (method.md section 7 with both of its passes).

    Args:
        gold: the right answer.
        answer: what was extracted from a completion.
        algebra: asked about two formulas that no type decides; returns None for "cannot tell here".

    Returns:
        True or False, final; None if `algebra` said None and the rest does not decide.
    """
    gold, answer = gold.strip(), answer.strip()
    if gold == answer:
        return bool(gold)
    if max(len(gold), len(answer)) > MAX_ANSWER or nested_too_deep(gold) or nested_too_deep(answer):
        return False
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    if gold == answer or text_key(gold) == text_key(answer):
        return True
    if _REPEATED_SIGN.search(gold + " " + answer):
        return False
    verdicts = yes_no(gold), yes_no(answer)
    if verdicts[0]:
        return verdicts[0] == verdicts[1]
    if only_choice(gold) or only_choice(answer):
        return _compare_choices(gold, answer, algebra)
    return compare_cleaned(gold, answer, algebra)


def undecided(gold: str, answer: str) -> bool | None:
    """The `algebra` of the caller's own process: none."""
    return None
