"""Several right answers: any one of them, all of them, or all in their order, by comparisons of single ones. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence

from zppo.core.types import Gold, Golds
from zppo.grading.equality import MAX_ITEMS
from zppo.grading.structure import AnswerKind, parse_answer
from zppo.grading.text import MAX_ANSWER, clean, nested_too_deep, normalise
from zppo.grading.words import choice

Pair = tuple[str, str]
"""One right answer, and an answer."""
Quick = Callable[[str, str], str | None]
"""The outcome for a right answer and an answer, None where that takes a worker."""

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


def judge_answer(gold: Gold, answer: str, quick: Quick) -> Generator[Pair, str, str]:
    """The outcome of one answer: "equal", "different", "timeout" or "error".

    Yields the pairs that take a worker, one after the other, and is sent the outcome of each. What `quick` can decide comes first.
    """
    if isinstance(gold, str):
        return quick(gold, answer) or (yield gold, answer)
    if gold.how == "any":
        return (yield from _any_of(gold.answers, answer, quick))
    items = answer_items(answer, gold)
    if max(len(items), len(gold.answers)) > MAX_ITEMS:
        return "equal" if has_gold_words(gold, answer) else "different"
    return (yield from (_in_order if gold.how == "ordered" else _in_any_order)(gold.answers, items, quick))


def _any_of(golds: Sequence[str], answer: str, quick: Quick) -> Generator[Pair, str, str]:
    said = [quick(gold, answer) for gold in golds]
    if "equal" in said:
        return "equal"
    outcomes = []
    for gold, known in zip(golds, said, strict=True):
        outcomes.append(known or (yield gold, answer))
        if outcomes[-1] == "equal":
            return "equal"
    return _failed(outcomes)


def _in_order(golds: Sequence[str], items: Sequence[str], quick: Quick) -> Generator[Pair, str, str]:
    if len(golds) != len(items):
        return "different"
    pairs = list(zip(golds, items, strict=True))
    said = [quick(*pair) for pair in pairs]
    if "different" in said:
        return "different"
    for pair, known in zip(pairs, said, strict=True):
        outcome = known or (yield pair)
        if outcome != "equal":
            return outcome
    return "equal"


def _in_any_order(golds: Sequence[str], items: Sequence[str], quick: Quick) -> Generator[Pair, str, str]:
    """Whether each gold can be paired with an item of its own; what comes twice counts once."""
    rest, left = list(dict.fromkeys(golds)), list(dict.fromkeys(items))
    if len(rest) != len(left):
        return "different"
    said = {(gold, item): quick(gold, item) for gold in rest for item in left}
    for gold in tuple(rest):
        match = next((item for item in left if said[gold, item] == "equal"), None)
        if match is not None:
            rest.remove(gold)
            left.remove(match)
    if any(all(said[gold, item] == "different" for item in left) for gold in rest):
        return "different"
    for gold in rest:
        outcomes = []
        for item in left:
            outcomes.append(said[gold, item] or (yield gold, item))
            if outcomes[-1] == "equal":
                left.remove(item)
                break
        else:
            return _failed(outcomes)
    return "equal"


def _failed(outcomes: Sequence[str]) -> str:
    """The outcome where none of these was "equal"."""
    return next((word for word in ("timeout", "error") if word in outcomes), "different")
