"""How a judge's reply is read: in our own form, one JSON object with a verdict or a score, or in the form that a benchmark's official
prompt asks for, so that such a prompt can be given by path. A reply that can be read in two ways is not read. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from zppo.core.types import Message
from zppo.evaluate.benchmark import Judge
from zppo.grading.text import final_part
from zppo.teacher.judge import strict_object

_VERDICT = '{"verdict": "correct"} or {"verdict": "wrong"}'
_YES = {"yes": 1.0, "no": 0.0}
_TRUE = {"true": 1.0, "false": 0.0}
_RIGHT = {"correct": 1.0, "incorrect": 0.0, "wrong": 0.0}
_ONE = {"1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
_GRADE = re.compile(r"0(?:\.\d{1,4})?|1(?:\.0{1,4})?", re.ASCII)
_LONGEST = 40_000  # characters of a reply that are parsed
_SHOWN = 2_000  # characters of an unreadable reply that its judge sees again, its end
_EDGE = " \t*_`\"'|,."  # what may stand around a value or the name of a field, in Markdown or JSON


@dataclass(frozen=True, slots=True)
class Form:
    """What a judge is read by.

    Attributes:
        own: key and values of our own form, which has no other key; no values: a number from 0 to 1.
        fields: names, any of which the official form gives its value: in a JSON object beside others, or as a line `name: value`.
        words: what the official values come to; none: a number from 0 to 1.
        bare: whether the official value may also be the last line, without a name.
        example: our own form, as a reminder shows it.
    """

    own: tuple[str, Mapping[str, float]] = ("verdict", MappingProxyType({"correct": 1.0, "wrong": 0.0}))
    fields: tuple[str, ...] = ()
    words: Mapping[str, float] = field(default_factory=dict)
    bare: bool = False
    example: str = f"either {_VERDICT}"


FORMS: Mapping[Judge, Form] = MappingProxyType(
    {
        "judge": Form(),
        "eval_hle": Form(fields=("correct",), words=_YES | _TRUE),
        "eval_charxiv": Form(fields=("score",), words=_ONE),
        "eval_mmvu": Form(fields=("correctness", "correct"), words=_RIGHT | _TRUE | _YES | _ONE),
        "eval_mmvet": Form(("score", {}), ("correctness",), bare=True, example='such as {"score": 0.7}'),
        "eval_multichallenge": Form(
            ("verdict", _YES), ("verdict", "answer"), _YES, bare=True, example='either {"verdict": "yes"} or {"verdict": "no"}'
        ),
    }
)  # fmt: skip


def read_reply(judge: Judge, reply: str, think_open: bool = False) -> float | None:
    """The value in a judge's reply, 0 to 1; None where it has none, or several that differ.

    Args:
        judge: whose form; our own form is read for each of them.
        reply: the whole text, with or without thoughts.
        think_open: whether the prompt already ended inside an opened think block.
    """
    form = FORMS[judge]
    own = _own(form, strict_object(reply, think_open))
    if own is not None or not form.fields:
        return own
    text = final_part(reply, think_open) if len(reply) <= _LONGEST else None
    return None if text is None else _official(form, text.strip())


def reminder(judge: Judge, reply: str) -> tuple[Message, ...]:
    """The turns that follow an unreadable reply: it, without thoughts, and what a reply must be. Asked again in the very same words, a
    judge at temperature 0 would say the same.
    """
    said = (final_part(reply) or "").strip()[-_SHOWN:] or "..."
    asked = f"That cannot be read. Reply with one JSON object and nothing else, {FORMS[judge].example}."
    return Message("assistant", said), Message("user", asked)


def _own(form: Form, pairs: tuple[tuple[str, object], ...] | None) -> float | None:
    """The value of an object with our own key and no other."""
    key, words = form.own
    if not isinstance(pairs, tuple) or len(pairs) != 1 or pairs[0][0] != key:
        return None
    value = pairs[0][1]
    if words:
        return words.get(value) if isinstance(value, str) else None
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return float(value) if known and isinstance(value, int | float) else None


def _official(form: Form, text: str) -> float | None:
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", text, re.DOTALL)
    try:
        parsed = json.loads(fenced[1] if fenced else text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, tuple):
        found = [value for key, value in parsed if key in form.fields or key == form.own[0]]
        named = {key for key, _ in parsed} & {*form.fields}
        return _value(form, str(found[0])) if named and len(found) == 1 else None
    if isinstance(parsed, list):
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    name = re.compile(rf"[^\w:]*(?:final )?(?:{'|'.join(form.fields)})[^\w:]*:(.*)", re.IGNORECASE)
    said = [match[1] for line in lines if (match := name.fullmatch(line))]
    bare = [line for line in lines if _value(form, line) is not None] if form.bare else []
    if not said and (not bare or bare[-1] is not lines[-1]):
        return None
    values = {_value(form, each) for each in (*said, *bare)}
    return values.pop() if len(values) == 1 else None


def _value(form: Form, text: str) -> float | None:
    word = text.strip(_EDGE).lower()
    if form.words:
        return form.words.get(word)
    return float(word) if _GRADE.fullmatch(word) else None
