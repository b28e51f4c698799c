"""Equality of two answers by type: scalars, lists, sets, tuples, intervals, chains of relations, equations, matrices.

What can be decided cheaply and safely is decided here, for good. `compare` is three-valued: it returns True or False where the types
decide, and None where algebra is needed; then a worker calls the same function with its `algebra` (see `zppo.grading.worker`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from zppo.grading.numbers import ROUNDED_PLACES, figures_equal, is_huge, is_rounding, numbers_equal, parse_number, percent_equal
from zppo.grading.structure import IDENTIFIER, AnswerKind, ParsedAnswer, labelled, opened, parse_answer, without_tail
from zppo.grading.text import MAX_ANSWER, clean, nested_too_deep, text_key
from zppo.grading.units import Unit, ratio, split_unit
from zppo.grading.words import choice, is_prose, only_choice, same_moment, same_words, says_nothing, yes_no

MAX_ITEMS = 32  # items of one list; longer ones are compared as strings only

Algebra = Callable[[str, str], bool | None]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a comparison may ask.

    Attributes:
        algebra: whether two formulas are equal; None for "cannot tell here".
        value: a constant as a decimal, None if it is none; without it roundings of formulas are left undecided.
        rounded_golds: whether a gold that is a rounded decimal equals the exact answer.
    """

    algebra: Algebra
    value: Callable[[str], str | None] | None = None
    rounded_golds: bool = True


_SYMBOL = re.compile(r"[a-df-zA-Z]|\\(?!pi|infty|emptyset)[a-zA-Z]+")
_INFINITE = {r"\infty": "+", r"+\infty": "+", r"-\infty": "-"}
_PERCENT: Unit = (("percent", 1),)
_ANGLES = {(("degree", 1),), (("radian", 1),)}
_DECIMAL = re.compile(r"\d\.|\.\d")
_NAME = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_UNKNOWNS = re.compile(r"(?=.*[a-zA-Z].*[-+*a-zA-Z])(?:[a-zA-Z](?:_\{\w+\})?|[-+*]| ?\\cdot ?| ?\\times ?)+")
_ARITHMETIC = re.compile(r"(?:[-+*/().\d ]|\\cdot ?|\\times ?|\\frac|[{}])+")
_LETTER_NAME = re.compile(r"(?P<name>\\?[a-zA-Z]+(?:_\{\w+\})?(?:\^\{-1\})?)\((?P<variable>[a-zA-Z])\)")
_TOKEN = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
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


def _scalars(gold: str, answer: str, rules: Rules) -> bool | None:
    """Two answers without structure, units taken off."""
    if gold == answer or text_key(gold) == text_key(answer):
        return True
    if (figures := figures_equal(gold, answer)) is not None:
        return figures
    first, second = parse_number(gold), parse_number(answer)
    if first and second:
        return numbers_equal(first, second, rules.rounded_golds)
    if (moment := same_moment(gold, answer)) is not None:
        return moment
    if says_nothing(gold) or says_nothing(answer):
        return says_nothing(gold) and says_nothing(answer)
    if _approximated(gold) or _approximated(answer):
        return _approximation(gold, answer, rules)
    if is_prose(gold) or is_prose(answer) or is_huge(gold) or is_huge(answer):
        return False
    simple = [text for text, number in ((gold, first), (answer, second)) if number or _SYMBOL.fullmatch(text)]
    if len(simple) == 2 or r"\boxed" in gold or r"\boxed" in answer:
        return False  # two different names, a name and a number
    if _mismatched(answer):
        return False
    equal = rules.algebra(gold, answer)
    return equal or _rounded(gold, answer, equal, rules)


_APPROX = re.compile(r"\\approx(?![a-zA-Z]) ?")


def _approximated(text: str) -> bool:
    return _APPROX.search(text) is not None


def _approximation(gold: str, answer: str, rules: Rules) -> bool | None:
    """`\\sqrt{5} \\approx 2.24`: what stands before has to be equal, and what stands behind a rounding of it."""
    first, second = _APPROX.split(gold)[0].strip(), [part.strip() for part in _APPROX.split(answer)]
    if IDENTIFIER.fullmatch(second[0]) and len(second) == 2:
        return compare_cleaned(first, second[1], rules)
    figure = parse_number(second[-1])
    behind = _rounded(second[1], second[0], None, rules) if len(second) == 2 and figure else len(second) == 1
    if figure and (exact := parse_number(second[0])):
        behind = is_rounding(exact.value, figure)
    return _all([compare_cleaned(first, second[0], rules), behind])


def _mismatched(text: str) -> bool:
    """Whether a bracket is closed by one of another kind, as in `(9+1]`."""
    opened: list[str] = []
    for char in text.replace(r"\{", "").replace(r"\}", ""):
        if char in "([{":
            opened.append(char)
        elif char in ")]}" and (not opened or opened.pop() + char not in ("()", "[]", "{}")):
            return True
    return bool(opened)


def _rounded(gold: str, answer: str, equal: bool | None, rules: Rules) -> bool | None:
    """Whether one side is a decimal and the other the exact number that it stands for [zppo]; `equal` where that is not the question.

    A gold that is a rounded decimal may be what an exact answer rounds to; a decimal answer to an exact gold needs `ROUNDED_PLACES`.
    """
    first, second = parse_number(gold), parse_number(answer)
    if rules.rounded_golds and first and first.places and first.value != 0 and not _DECIMAL.search(answer):
        exact, decimal = answer, first
    elif second and second.places and second.places >= ROUNDED_PLACES and second.value != 0 and not _DECIMAL.search(gold):
        exact, decimal = gold, second
    else:
        return equal
    if rules.value is None:
        return None
    value = rules.value(exact)
    return value is not None and is_rounding(Fraction(value), decimal)


def _ordered(golds: Sequence[str], answers: Sequence[str], rules: Rules) -> bool | None:
    if len(golds) != len(answers):
        return False
    return _all(compare_cleaned(g, a, rules) for g, a in zip(golds, answers, strict=True))


def _unordered(golds: Sequence[str], answers: Sequence[str], rules: Rules) -> bool | None:
    """Whether the items can be paired off so that both of each pair are equal; repeated items count once."""
    rest, left = list(dict.fromkeys(opened(tuple(golds)))), list(dict.fromkeys(opened(tuple(answers))))
    if len(rest) != len(left):
        return False
    types = Rules(undecided, None, rules.rounded_golds)
    for gold in tuple(rest):  # what the types pair off needs no algebra
        match = next((a for a in left if compare_cleaned(gold, a, types) is True), None)
        if match is not None:
            rest.remove(gold)
            left.remove(match)
    result: bool | None = True
    for gold in rest:
        decisions = [compare_cleaned(gold, answer, rules) for answer in left]
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


def _both_ends(parsed: ParsedAnswer) -> ParsedAnswer | None:
    """`x > -2 and x < 1` as the chain -2 < x < 1; None where the two leave no room for x, or are no two such relations."""
    parts = [_interval(parse_answer(item)) for item in parsed.items]
    if len(parts) != 2 or None in parts:
        return None
    lower, upper = sorted((part for part in parts if part), key=lambda part: part[0] == r"-\infty")
    ends = parse_number(lower[0]), parse_number(upper[1])
    room = ends[0] and ends[1] and ends[0].value < ends[1].value
    if not room or lower[1] != r"\infty" or upper[0] != r"-\infty" or lower[4] != upper[4]:
        return None
    marks = ("<=" if lower[2] == "[" else "<", "<=" if upper[3] == "]" else "<")
    return ParsedAnswer(AnswerKind.CHAIN, parsed.text, (lower[0], lower[4], upper[1]), marks)


def _intervals(gold: ParsedAnswer, answer: ParsedAnswer, rules: Rules) -> bool | None:
    """Two intervals, at least one of them a chain of relations; chains that are no intervals are left to algebra."""
    first, second = _interval(gold), _interval(answer)
    if first is None or second is None:
        return rules.algebra(gold.text, answer.text)
    if first[4] and second[4] and first[4] != second[4]:
        return False
    decisions: list[bool | None] = []
    for end, bracket in ((0, 2), (1, 3)):
        infinite = _INFINITE.get(first[end]), _INFINITE.get(second[end])
        if infinite != (None, None):
            decisions.append(infinite[0] == infinite[1])
        else:
            decisions.append(first[bracket] == second[bracket] and compare_cleaned(first[end], second[end], rules))
    return _all(decisions)


def _is_name(text: str) -> bool:
    """Whether a side of an equation is what gets the value: an identifier, or a tuple of different ones."""
    if IDENTIFIER.fullmatch(text):
        return True
    parsed = parse_answer(text)
    names = parsed.kind is AnswerKind.BRACKET and all(IDENTIFIER.fullmatch(item) for item in parsed.items)
    return names and len(set(parsed.items)) == len(parsed.items)


def _value_of_equation(parsed: ParsedAnswer, other: str, gold_first: bool, rules: Rules) -> bool | None:
    """An equation against something that is none: `x = 3` is 3, `2 + 3 = 5` is 5, `8 = 5` is not."""
    sides = parsed.items[1:] if _is_name(parsed.items[0]) else parsed.items
    if sides == parsed.items and _is_name(parsed.items[-1]) and len(sides) == 2:
        sides = parsed.items[:1]  # 3 = x
    if sides == parsed.items and not gold_first and _UNKNOWNS.fullmatch(sides[0]) and all(map(_ARITHMETIC.fullmatch, sides[1:])):
        sides = parsed.items[1:]  # m + n = 256 + 37 = 293
    if any(parse_answer(side).kind is not AnswerKind.SCALAR for side in sides[1:]):
        return False
    pair = (sides[-1], other) if gold_first else (other, sides[-1])
    return _all([compare_cleaned(*pair, rules), *(compare_cleaned(sides[0], s, rules) for s in sides[1:])])


def _with_variable(value: str, old: str, new: str) -> str:
    """A formula with the variable `old` written `new`."""
    return _TOKEN.sub(lambda match: new if match[0] == old else match[0], value)


def _equations(gold: ParsedAnswer, answer: ParsedAnswer, rules: Rules) -> bool | None:
    """Two equations: of the same name, their values; of two names, different; else whatever algebra says."""
    names = [parsed.items[0] if _is_name(parsed.items[0]) else "" for parsed in (gold, answer)]
    if all(names) and len(gold.items) == len(answer.items) == 2:
        if names[0] == names[1]:
            return compare_cleaned(gold.items[1], answer.items[1], rules)
        first, second = (_LETTER_NAME.fullmatch(name) for name in names)
        if first and second and first["name"] == second["name"]:  # f(x) = x^2 and f(t) = t^2: what the variable is called does not matter
            old, new = second["variable"], first["variable"]
            bound = new not in _TOKEN.findall(answer.items[1])
            return bound and compare_cleaned(gold.items[1], _with_variable(answer.items[1], old, new), rules)
        if parse_number(gold.items[1]) and parse_number(answer.items[1]):
            return False
    if is_prose(gold.text) or is_prose(answer.text):
        return False
    return rules.algebra(gold.text, answer.text)


def _assignments(parsed: ParsedAnswer) -> dict[str, str] | None:
    """`x=1, y=2`, `(x,y)=(1,2)` and labelled items as a mapping; None if an item is none of these or a name comes twice."""
    if parsed.kind is AnswerKind.EQUATION:
        names, values = (parse_answer(side) for side in parsed.items[:2])
        tuples = len(parsed.items) == 2 and names.kind is values.kind is AnswerKind.BRACKET and _is_name(parsed.items[0])
        same = tuples and len(names.items) == len(values.items) == len(set(names.items))
        return dict(zip(names.items, values.items, strict=True)) if same else None
    if (pairs := labelled(parsed.items)) is not None and len(pairs) > 1:
        return pairs
    pairs = {}
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


def _lists(gold: ParsedAnswer, answer: ParsedAnswer, rules: Rules) -> bool | None:
    """Lists, sets, tuples and closed lists against one another."""
    if _solutions(gold) or _solutions(answer):
        return _same_solutions(gold, answer, rules)
    golds, answers = _assignments(gold), _assignments(answer)
    for bracket in (gold, answer):
        if bracket.kind is AnswerKind.BRACKET and bracket.marks not in _PAIRED and not {gold.kind} == {answer.kind} == {AnswerKind.BRACKET}:
            return False  # (2, 1] is no point
    if golds is not None and answers is not None:
        return golds.keys() == answers.keys() and _all(compare_cleaned(golds[name], answers[name], rules) for name in golds)
    if golds is not None and answer.kind is AnswerKind.BRACKET:
        return _ordered([golds[name] for name in sorted(golds)], answer.items, rules)
    elif golds is not None and len({name[0] for name in golds}) > 1:
        return answer.kind is AnswerKind.LIST and _ordered(list(golds.values()), answer.items, rules)
    elif answers is not None and gold.kind is AnswerKind.BRACKET:
        return _ordered(gold.items, [answers[name] for name in sorted(answers)], rules)
    first, second = _values(gold), _values(answer)
    kinds = {gold.kind, answer.kind}
    if kinds <= {AnswerKind.LIST, AnswerKind.SET}:
        if any(map(yes_no, first)):
            return _ordered(first, second, rules)  # verdicts on several statements
        return _unordered(first, second, rules)
    if kinds == {AnswerKind.BRACKET}:
        return gold.marks == answer.marks and _ordered(first, second, rules)
    if kinds == {AnswerKind.BRACKET, AnswerKind.LIST}:
        brackets = (gold if gold.kind is AnswerKind.BRACKET else answer).marks
        return (brackets == ("(", ")") or (brackets == ("[", "]") and len(first) > 2)) and _ordered(first, second, rules)
    return False


def _solutions(parsed: ParsedAnswer) -> list[dict[str, str]] | None:
    """`x=1, y=2; x=2, y=1` as two solutions; None where no name comes twice, or each solution is of one name."""
    if parsed.kind is not AnswerKind.LIST:
        return None
    found: list[dict[str, str]] = [{}]
    for item in parsed.items:
        part = parse_answer(item)
        if part.kind is not AnswerKind.EQUATION or len(part.items) != 2 or not IDENTIFIER.fullmatch(part.items[0]):
            return None
        if part.items[0] in found[-1]:
            found.append({})
        found[-1][part.items[0]] = part.items[1]
    return found if len(found) > 1 and len(found[0]) > 1 else None


def _same_solutions(gold: ParsedAnswer, answer: ParsedAnswer, rules: Rules) -> bool | None:
    """Solutions of several unknowns, in any order; a side without names lists them as tuples, in the order of the other's names."""
    golds, answers = _solutions(gold) or [], _solutions(answer) or []
    names = tuple((golds or answers)[0])
    if any(set(solution) != set(names) for solution in (*golds, *answers)):
        return False

    def tuples(solutions: list[dict[str, str]], parsed: ParsedAnswer) -> tuple[str, ...]:
        return tuple("(" + ",".join(one[name] for name in names) + ")" for one in solutions) or parsed.items

    return _unordered(tuples(golds, gold), tuples(answers, answer), rules)


_PAIRED = (("(", ")"), ("[", "]"))


def _ratios(gold: ParsedAnswer, answer: ParsedAnswer, rules: Rules) -> bool | None:
    """A ratio against a ratio with proportional terms, or of two terms against its quotient written as a fraction."""
    if gold.kind is answer.kind:
        if len(gold.items) != len(answer.items):
            return False
        if gold.items == answer.items:
            return True
        terms = (*gold.items, *answer.items)
        if any(_NAME.search(term) or ((number := parse_number(term)) and number.value == 0) for term in terms):
            return _ordered(gold.items, answer.items, rules)  # times and names are not proportional
        pairs = zip(gold.items[1:], answer.items[1:], strict=True)
        first = gold.items[0], answer.items[0]
        return _all(compare_cleaned(rf"({first[0]})\cdot({a})", rf"({first[1]})\cdot({g})", rules) for g, a in pairs)
    ratio_of, other = (gold, answer) if gold.kind is AnswerKind.RATIO else (answer, gold)
    if other.kind is not AnswerKind.SCALAR or len(ratio_of.items) != 2 or not re.search(r"/|\\frac", other.text):
        return False
    quotient = rf"\frac{{{ratio_of.items[0]}}}{{{ratio_of.items[1]}}}"
    return compare_cleaned(quotient, other.text, rules) if ratio_of is gold else compare_cleaned(other.text, quotient, rules)


_LISTS = frozenset({AnswerKind.LIST, AnswerKind.SET, AnswerKind.BRACKET})
_INTERVALS = frozenset({AnswerKind.CHAIN, AnswerKind.BRACKET})


def _variables(parsed: ParsedAnswer) -> set[str]:
    """The one-letter variables that an answer gives values or ranges to: x of `x=2, 4`, of `x \\in [0, 1]` and of `x < 1 or x > 2`."""
    if parsed.name:
        return {parsed.name}
    if parsed.kind is AnswerKind.CHAIN and (interval := _interval(parsed)):
        return {interval[4]} - {""}
    if parsed.kind is AnswerKind.EQUATION and len(parsed.items) == 2 and re.fullmatch("[a-zA-Z]", parsed.items[0]):
        return {parsed.items[0]}
    if parsed.kind in (AnswerKind.LIST, AnswerKind.UNION):
        return {name for item in parsed.items for name in _variables(parse_answer(item))}
    return set()


def _structured(gold: ParsedAnswer, answer: ParsedAnswer, rules: Rules) -> bool | None:
    """Two answers, at least one of them with structure."""
    kinds = {gold.kind, answer.kind}
    if len(gold.items) > MAX_ITEMS or len(answer.items) > MAX_ITEMS:
        return gold.text == answer.text
    named = _variables(gold), _variables(answer)
    if kinds == {AnswerKind.EQUATION}:
        return _equations(gold, answer, rules)
    mixed = answer.kind is AnswerKind.LIST and len(named[1]) > 1 and any(parse_answer(i).kind is AnswerKind.CHAIN for i in answer.items)
    if (mixed and not named[0]) or (named[0] and named[1] and named[0] != named[1]):
        return False  # what one says of x the other says of y
    if AnswerKind.EQUATION in kinds:
        if AnswerKind.LIST in kinds and any(side.kind is AnswerKind.EQUATION and _assignments(side) for side in (gold, answer)):
            return _lists(gold, answer, rules)  # (x,y)=(1,2) against x=1, y=2
        if kinds & {AnswerKind.CHAIN, AnswerKind.MATRIX}:
            return False
        if gold.kind is AnswerKind.EQUATION:
            return _value_of_equation(gold, answer.text, True, rules)
        return _value_of_equation(answer, gold.text, False, rules)
    if kinds == {AnswerKind.LIST, AnswerKind.BRACKET} and (both := _both_ends(gold if gold.kind is AnswerKind.LIST else answer)):
        return _intervals(*((both, answer) if gold.kind is AnswerKind.LIST else (gold, both)), rules)
    if kinds <= _LISTS:
        return _lists(gold, answer, rules)
    if AnswerKind.RATIO in kinds:
        return _ratios(gold, answer, rules)
    if kinds == {AnswerKind.MATRIX}:
        return gold.marks == answer.marks and _ordered(gold.items, answer.items, rules)
    if kinds == {AnswerKind.MATRIX, AnswerKind.BRACKET}:
        matrix = gold if gold.kind is AnswerKind.MATRIX else answer
        vector = matrix.marks[0] in ("1", str(len(matrix.items)))
        return vector and _ordered(gold.items, answer.items, rules)
    if kinds == {AnswerKind.CHAIN} and gold.marks == answer.marks and _ordered(gold.items, answer.items, Rules(lambda g, a: g == a)):
        return True
    if kinds == {AnswerKind.CHAIN} and all(IDENTIFIER.fullmatch(item) for item in (*gold.items, *answer.items)):
        return False
    if kinds <= _INTERVALS and not (is_prose(gold.text) or is_prose(answer.text)):
        return _intervals(gold, answer, rules)
    if kinds & _INTERVALS and AnswerKind.LIST in kinds and (both := _both_ends(gold if gold.kind is AnswerKind.LIST else answer)):
        return _intervals(*((both, answer) if gold.kind is AnswerKind.LIST else (gold, both)), rules)
    if AnswerKind.UNION in kinds and kinds <= {AnswerKind.UNION, AnswerKind.LIST}:
        return _unordered(gold.items, answer.items, rules)
    if kinds <= {AnswerKind.MATRIX, AnswerKind.SCALAR} and not (
        is_prose(gold.text.replace("matrix", "")) or is_prose(answer.text.replace("matrix", ""))
    ):
        return rules.algebra(gold.text, answer.text)
    if kinds == {AnswerKind.UNION, AnswerKind.SCALAR} and not (is_prose(gold.text) or is_prose(answer.text)):
        return rules.algebra(gold.text, answer.text)
    if AnswerKind.SCALAR in kinds and kinds & {AnswerKind.SET, AnswerKind.LIST}:
        if says_nothing(gold.items[0]) or says_nothing(answer.items[0]):
            return False  # the set that holds the empty set is not empty
        return len(gold.items) == len(answer.items) == 1 and compare_cleaned(gold.items[0], answer.items[0], rules)
    return False


def _percents(gold: str, answer: str, unit_of_gold: bool, rules: Rules) -> bool | None:
    """Exactly one side carries a percent sign: the same figure, or the number that the percentage means."""
    first, second = parse_number(gold), parse_number(answer)
    if first and second:
        percent, other = (first, second) if unit_of_gold else (second, first)
        return percent_equal(percent, other, unit_of_gold, rules.rounded_golds)
    return compare_cleaned(gold, answer, rules)


def _converted(gold: str, gold_unit: Unit, answer: str, answer_unit: Unit, rules: Rules) -> bool | None:
    """Two answers in two units: of one dimension, by what the units are worth; of two, different."""
    if {gold_unit, answer_unit} == _ANGLES:
        turned = rf"({gold})\cdot\frac{{\pi}}{{180}}" if gold_unit == (("degree", 1),) else rf"({gold})\cdot\frac{{180}}{{\pi}}"
        return compare_cleaned(turned, answer, rules)
    worth = ratio(gold_unit, answer_unit)
    if worth is None:
        return False
    first, second = parse_number(gold), parse_number(answer)
    if first and second:
        return first.value * worth == second.value
    if parse_answer(gold).kind is not AnswerKind.SCALAR or parse_answer(answer).kind is not AnswerKind.SCALAR:
        return False
    return compare_cleaned(rf"({gold})\cdot\frac{{{worth.numerator}}}{{{worth.denominator}}}", answer, rules)


def compare_cleaned(gold: str, answer: str, rules: Rules) -> bool | None:
    """`compare` for two cleaned answers or parts of them: units first, then structure, then scalars."""
    if gold == answer:
        return bool(gold)
    (gold_rest, gold_unit), (answer_rest, answer_unit) = split_unit(gold, True), split_unit(answer, False)
    if gold_unit and not answer_unit:  # a letter right behind figures may be a unit, where the other side has one like it
        rest, unit = split_unit(answer, False, True)
        answer_rest, answer_unit = (rest, unit) if unit and ratio(gold_unit, unit) else (answer_rest, None)
    elif answer_unit and not gold_unit:
        rest, unit = split_unit(gold, True, True)
        gold_rest, gold_unit = (rest, unit) if unit and ratio(unit, answer_unit) else (gold_rest, None)
    if (gold_unit == _PERCENT) != (answer_unit == _PERCENT):
        if gold_unit and answer_unit:
            return False
        return _percents(gold_rest, answer_rest, gold_unit == _PERCENT, rules)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return _converted(gold_rest, gold_unit, answer_rest, answer_unit, rules)
    first, second = parse_answer(gold_rest), parse_answer(answer_rest)
    if first.kind is AnswerKind.SCALAR and second.kind is AnswerKind.SCALAR:
        return _scalars(first.text, second.text, rules)
    return _structured(first, second, rules)


def _compare_choices(gold: str, answer: str, rules: Rules) -> bool | None:
    """Answers one of which is a choice letter with or without its text, or several letters."""
    (gold_letters, gold_text), (letters, text) = choice(gold), choice(answer)
    if gold_letters and letters:
        if len(gold) > 1 and gold.isalpha() and list(gold) != sorted(gold):
            return [c for c in answer if c in gold_letters] == list(gold)  # BDAC is an order; AC is a choice of two
        return gold_letters == letters
    if gold_letters:
        return bool(gold_text) and compare_cleaned(gold_text, answer, rules)
    return bool(text) and compare_cleaned(gold, text, rules)


def compare(
    gold: str, answer: str, algebra: Algebra, value: Callable[[str], str | None] | None = None, rounded_golds: bool = True
) -> bool | None:
    """Whether two answers are equal (method.md section 7 with both of its passes).

    Args:
        gold: the right answer.
        answer: what was extracted from a completion.
        algebra: asked about two formulas that no type decides; returns None for "cannot tell here".
        value: a constant as a decimal, None if it is none; without it roundings of formulas are left undecided.
        rounded_golds: whether a gold that is a rounded decimal equals the exact answer that rounds to it [zppo].

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
    if gold == answer or text_key(gold) == text_key(answer) or same_words(gold, answer):
        return True
    if _REPEATED_SIGN.search(gold + " " + answer):
        return False
    rules = Rules(algebra, value, rounded_golds)
    verdicts = yes_no(gold), yes_no(answer)
    if verdicts[0]:
        return verdicts[0] == verdicts[1]
    if (moment := same_moment(gold, answer)) is not None:
        return moment
    if only_choice(gold) or only_choice(answer):
        return _compare_choices(gold, answer, rules)
    gold, answer = without_tail(gold), without_tail(answer)
    return bool(gold) and (gold == answer or compare_cleaned(gold, answer, rules))


def undecided(gold: str, answer: str) -> bool | None:
    """The `algebra` of the caller's own process: none."""
    return None
