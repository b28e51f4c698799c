"""Several right answers: any one of them, all of them, or all in their order, by comparisons of single ones."""

from __future__ import annotations

import re

from zppo.core.types import Gold, Golds
from zppo.grading.structure import AnswerKind, parse_answer
from zppo.grading.text import MAX_ANSWER, clean, nested_too_deep, normalise
from zppo.grading.words import choice

Pair = tuple[str, str]
"""One right answer, and an answer."""

_LISTS = ("()", "[]")
_WITHOUT_COMMAS = re.compile(r"\s*;\s*(?:and\b\s*)?|\s+and\s+")


def answer_items(answer: str, gold: Golds) -> tuple[str, ...]:
    """What an answer lists, as cleaned text: `1, 2`, `1 and 2`, `AC`; `\\{1, 2\\}` where no order is asked for, `(1, 2)` and `[1, 2]`
    where one is. Any other answer is one item; where right answers have commas themselves (`May 5, 2020`), commas part nothing."""
    if len(answer) > MAX_ANSWER or nested_too_deep(answer):
        return (answer,)
    if any(len(bare_items(g)) > 1 for g in gold.answers):
        return tuple(map(clean, _WITHOUT_COMMAS.split(answer.strip())))
    ordered, text = gold.how == "ordered", clean(answer)
    if len(choice(text)[0]) > 1:
        return tuple(re.findall("[A-J]", text))
    parsed = parse_answer(text) if text else None
    if parsed is None:
        return (answer,)
    whole = parsed.kind is AnswerKind.BRACKET and ordered and "".join(parsed.marks) in _LISTS
    as_set = parsed.kind is AnswerKind.SET and not ordered
    return parsed.items if whole or as_set or parsed.kind is AnswerKind.LIST else (text,)


def bare_items(gold: str) -> tuple[str, ...]:
    """The items of a right answer that is a bare list (`68, 27, 20`); one that has brackets, or is no list, is one item."""
    parsed = parse_answer(clean(gold)) if len(gold) <= MAX_ANSWER and not nested_too_deep(gold) else None
    return parsed.items if parsed is not None and parsed.kind is AnswerKind.LIST else (gold,)


def has_gold_words(gold: Gold, answer: str) -> bool:
    """Whether an answer has the right answer's very words after method.md section 9's normalisation; of several, any one's, or all of
    them, as `Golds.how` says."""
    if isinstance(gold, str):
        return normalise(answer) == normalise(gold)
    if gold.how == "any":
        return normalise(answer) in map(normalise, gold.answers)
    wanted, given = ([normalise(item) for item in items] for items in (map(clean, gold.answers), answer_items(answer, gold)))
    return wanted == given if gold.how == "ordered" else set(wanted) == set(given)
