"""From a completion to a score, as far as rules go (method.md section 10): rule first, the judge where it cannot decide."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from zppo.evals.adapters.choice import LETTERS
from zppo.evals.item import Item, Kind
from zppo.evals.scoring.text_scores import anls
from zppo.grading.answer_form import BOXED, AnswerForm
from zppo.grading.numbers import Number, parse_number
from zppo.grading.text import MAX_ANSWER, clean, final_part, nested_too_deep, normalise, printed
from zppo.grading.units import split_unit
from zppo.grading.words import choice, yes_no

Equal = Callable[[str, str], bool]
"""Whether an answer, the second, is a gold in another spelling at most: `Grader.equal`."""

NO_ANSWER = "no answer"
_LARGEST_FLOAT = 10**12  # beyond it a float has no decimals worth rounding


@dataclass(frozen=True, slots=True)
class Score:
    """What the rules say of one completion.

    Attributes:
        value: 0 to 1; None where a judge must decide.
        answer: what was extracted, None where there is none.
        reason: how it came about, a short word or two for the log.
        boxless: whether the row is 0 strictly by box: there is no box that can be read behind the thinking, or the thinking never ends. Of
            kinds whose whole response is scored (ocr, graded, criterion) only where nothing follows the thinking.
    """

    value: float | None
    answer: str | None
    reason: str
    boxless: bool = False


Rule = Callable[[Item, str, Equal], tuple[float | None, str]]
"""(value or None, reason) for an answer."""


def score(item: Item, completion: str, equal: Equal, think_open: bool = False, form: AnswerForm = BOXED) -> Score:
    """The rules' score of a completion.

    Without a boxed answer behind the thinking rules decide nothing, except where a whole response is scored: a judge may find the answer
    in the text, thoughts included (method.md section 10). A completion without any text is 0, and so is what a metric scores.

    Args:
        item: the question.
        completion: the model's text, with or without its thoughts.
        equal: `zppo.grading.Grader.equal`.
        think_open: whether the prompt already ended inside an opened think block, and the completion still holds its thoughts.
        form: where the answer stands.
    """
    part = (final_part(completion, think_open) or "").strip()
    lacking = None if completion.strip() and item.kind not in _METRICS else 0.0
    if not part:
        return Score(lacking, None, NO_ANSWER, True)
    answer = form.find(completion, think_open)
    boxless = answer is None and item.kind not in SCORED_WHOLE
    if item.kind in _WHOLE_RESPONSE:
        value, reason = _WHOLE_RESPONSE[item.kind](item, part if answer is None else answer, equal)
        return Score(value, answer, reason, boxless)
    if answer is None:
        return Score(lacking, None, NO_ANSWER, boxless)
    value, reason = _RULES[item.kind](item, answer, equal)
    return Score(value, answer, reason)


def _decided(right: bool, reason: str = "") -> tuple[float, str]:
    return float(right), reason or ("equal" if right else "different")


def _choice(item: Item, answer: str, equal: Equal) -> tuple[float | None, str]:
    """A letter, with or without its text, in any case; a text alone where it is that of exactly one option.

    A letter that none of the options has may be the text of one ("I", "N"), and is read so first.
    """
    cleaned = _cleaned(answer)
    gold = set(re.findall(r"[A-Z]", item.golds[0]))  # several where the question asks for several
    if cleaned is None:
        return None, "unclear"
    letters, _ = choice(cleaned)
    if letters and letters <= set(LETTERS[: len(item.options)]):
        return _decided(letters == gold, "letter")
    same = [i for i, option in enumerate(item.options) if normalise(option) == normalise(answer)]
    if not same:
        same = [i for i, option in enumerate(item.options) if equal(option, answer)]
    if len(same) == 1:
        return _decided({LETTERS[same[0]]} == gold, "option")
    if letters and not same:
        return _decided(letters == gold, "letter")
    return None, "unclear"


def _short(item: Item, answer: str, equal: Equal) -> tuple[float | None, str]:
    """The project's rules; where they say no, that is final only for two plain numbers, two verdicts or two letters."""
    if any(equal(gold, answer) for gold in item.golds):
        if not item.facts.get("order") or any(_in_order(gold, answer, equal) for gold in item.golds):
            return 1.0, "equal"
        return (0.0 if item.facts["order"] == "fixed" else None), "order"
    cleaned = _cleaned(answer)
    golds = [_cleaned(gold) for gold in item.golds]
    if cleaned is not None and all(gold is not None and _same_type(gold, cleaned) for gold in golds):
        return 0.0, "different"
    return None, "unclear"


def _in_order(gold: str, answer: str, equal: Equal) -> bool:
    """Whether equal answers that name several things, `2, 1` or the edge `BS`, name them in one order: the rules take lists for sets."""
    if "," in gold:
        first, second = (re.sub(r"^[\s$]*\\?[(\[{]|\\?[)\]}][\s$.]*$", "", text) for text in (gold, answer))
        return equal(f"({first})", f"({second})")
    run = re.fullmatch(r"[A-Z]{2,}", gold.strip())
    return run is None or run[0] in re.sub(r"[^A-Za-z]", "", clean(answer))


def _same_type(gold: str, answer: str) -> bool:
    """Whether two cleaned answers are both a number, a yes or no, or a letter, so that no reading makes them equal."""
    if yes_no(gold) or yes_no(answer):
        return bool(yes_no(gold) and yes_no(answer))
    if choice(gold)[0] or choice(answer)[0]:
        return bool(choice(gold)[0] and choice(answer)[0])
    (first, first_unit), (second, second_unit) = split_unit(gold, True), split_unit(answer)
    return bool(parse_number(first) and parse_number(second)) and first_unit == second_unit


def _precision(item: Item, answer: str, equal: Equal) -> tuple[float | None, str]:
    """A number: equal to the gold at `facts["precision"]` decimals, or within `facts["tolerance"]` of it.

    MathVista rounds the answer to as many decimals as the question asks for; DynaMath lets pass what is at most 0.001 off.
    """
    gold, number = _number(item.golds[0]), _number(answer)
    if gold is None or number is None:
        return _short(item, answer, equal)
    if "tolerance" in item.facts:
        near = abs(gold.value - number.value) <= Fraction(str(item.facts["tolerance"]))
    else:
        places = int(item.facts["precision"])
        # As the benchmark does it: a float rounded. An integer is not rounded to: 3.4 is not 3.
        near = number.value == gold.value or (
            places > 0
            and max(abs(gold.value), abs(number.value)) < _LARGEST_FLOAT
            and round(float(number.value), places) == round(float(gold.value), places)
        )
    if near:
        return 1.0, "precision"
    return _decided(equal(item.golds[0], answer))


def _grid(item: Item, answer: str, equal: Equal) -> tuple[float | None, str]:
    """The same whole numbers in the same order."""
    found = re.findall(r"\d{1,6}", answer, re.ASCII)
    if not found:
        return None, "unclear"
    return _decided([int(n) for n in found] == [int(n) for n in re.findall(r"\d{1,6}", item.golds[0], re.ASCII)])


def _anls(item: Item, answer: str, equal: Equal) -> tuple[float | None, str]:
    return max(anls(item.golds, text) for text in _readings(answer[:MAX_ANSWER])), "anls"


def _ocr(item: Item, response: str, equal: Equal) -> tuple[float | None, str]:
    # Its metrics need packages of the extra `ocr`, which nothing else needs.
    from zppo.evals.scoring.text_scores import ocr_score

    return max(ocr_score(item, text) for text in _readings(response)), str(item.facts["task"])


def _readings(answer: str) -> set[str]:
    """A text to be compared letter by letter, as it stands and as LaTeX prints it: a box is LaTeX, in which % and _ are escaped."""
    return {answer, printed(answer)}


def _judged(item: Item, response: str, equal: Equal) -> tuple[float | None, str]:
    """The gold in the gold's very words is right without a call; everything else is the judge's."""
    if any(normalise(gold) == normalise(response) for gold in item.golds):
        return 1.0, "same words"
    return None, "judge"


def _always(item: Item, response: str, equal: Equal) -> tuple[float | None, str]:
    return None, "judge"


def _cleaned(text: str) -> str | None:
    """The answer in one spelling; None where it is empty, or too long or too deep to be read."""
    return None if len(text) > MAX_ANSWER or nested_too_deep(text) else clean(text) or None


def _number(text: str) -> Number | None:
    """The number in an answer, its unit taken off."""
    cleaned = _cleaned(text)
    return None if cleaned is None else parse_number(split_unit(cleaned)[0])


_RULES: Mapping[Kind, Rule] = MappingProxyType(
    {"choice": _choice, "number": _short, "text": _short, "precision": _precision, "grid": _grid, "anls": _anls}
)
_METRICS: frozenset[Kind] = frozenset(("anls", "ocr"))
SCORED_WHOLE: frozenset[Kind] = frozenset(("ocr", "graded", "criterion"))
"""Kinds that need no box: all that follows the thinking is scored."""
_WHOLE_RESPONSE: Mapping[Kind, Rule] = MappingProxyType({"ocr": _ocr, "judged": _judged, "graded": _always, "criterion": _always})
