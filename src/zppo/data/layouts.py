"""Layouts of rows that public data sets share: the choices of a question, Alpaca's three columns; and how a row's layout is called.

A row is read as its layout means it: a question with choices is shown with them, and its right answer is the choice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from string import ascii_uppercase as _LETTERS
from typing import Any

from zppo.core.types import Message
from zppo.data.conversations import RowError, a, parsed

USUAL_CHOICES = "choices"
"""The column of choices where a recipe names none; `options`, and columns A, B, C, ... of texts, are then read too."""

_OTHER_CHOICES = "options"
_FEWEST, _MOST = 2, len(_LETTERS)
_PLACE = re.compile(r"[A-Ja-j]|\d")
_CHOICE_NAMES = frozenset(
    "choices options endings candidates alternatives answer_choices answer_options possible_answers mc_answers choices_list".split()
)
_NUMBERED = re.compile(r"(op|opt|option|choice|sol|ending|answer|alternative)[_ ]?(?:[a-jA-J]|\d)")
_LETTERED = re.compile(r"\(?([A-Z])(?:\)|[.:](?=\s))\s*", re.IGNORECASE)


class Choices:
    """The choices of one question, lettered A, B, C, ...

    Args:
        texts: what each says.
        labels: what the row calls each, such as 1, 2, 3; () where it does not say.
        numbers: the row has them as numbers, not as texts: a number that answers is then one of them, and no place.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str] = (), *, numbers: bool = False) -> None:
        self.texts, self.labels, self.numbers = tuple(texts), tuple(labels), numbers

    def shown(self, question: str) -> str:
        """The question with its choices, or as it is where it has them already."""
        if all(self._within(question, letter, text) for letter, text in zip(_LETTERS, self.texts, strict=False)):
            return question
        return question.rstrip() + "\n\n" + "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, self.texts, strict=False))

    @staticmethod
    def _within(question: str, letter: str, text: str) -> bool:
        return re.search(rf"(?<!\w)\(?{letter}\s*[).:,\]]?\s*{re.escape(text)}", question) is not None

    def right(self, value: str, *, place: bool, alone: bool) -> str:
        """The right answer that a row's value stands for: a letter, a label, a number counted from 0, or the text of a choice.

        Args:
            place: the row has the value as a whole number.
            alone: it is the only one; it is then given with its text, and an answer may be the letter or the text.

        Raises:
            RowError: it is none of the choices, or could be two of them.
        """
        found = self._found(value.strip(), place and not self.numbers)
        if len(found) > 1:
            raise RowError(f"is {value!r}, which could be {' or '.join(_LETTERS[i] for i in found)}; write the letter in brackets: (B)")
        if not found:
            counted = " (numbers count from 0)" if value.isdecimal() else ""
            raise RowError(
                f"is {value[:40]!r}, which is none of the {len(self.texts)} choices by letter, number or text{counted}; mend the row, "
                "name the column of choices with data.columns.choices, or '' to leave them out"
            )
        letter, text = _LETTERS[found[0]], self.texts[found[0]]
        return f"{letter}. {text}" if alone and len(text) > 1 else letter

    def _found(self, value: str, place: bool) -> list[int]:
        """The choices that a value may mean, by their numbers."""
        everything = range(len(self.texts))
        if named := [i for i, label in enumerate(self.labels) if label.casefold() == value.casefold()]:
            return named
        at = [i for i in everything if str(i) == value]
        if place:
            return at
        letter = value if len(value) == 1 else mark[1] if (mark := _LETTERED.match(f"{value} ")) else ""
        lettered = [i for i in everything if letter and _LETTERS[i] == letter.upper()]
        same = [i for i in everything if self.texts[i] == value] or [i for i in everything if self.texts[i].casefold() == value.casefold()]
        if len(value) > 1 and lettered:  # (B), B. Paris
            return lettered
        return sorted({*same, *lettered, *at})


def choices_of(data: Mapping[str, Any], column: str, value: Any) -> Choices | None:
    """The choices of a row; None where it has none.

    Args:
        column: as the recipe names it; "" for none.
        value: what stands in it.

    Raises:
        RowError: the column is no list of choices.
    """
    if not column:
        return None
    where = ""
    if value is None and column == USUAL_CHOICES:
        value = data.get(_OTHER_CHOICES)
        where = f"{_OTHER_CHOICES!r} beside it "
        if value is None and _LETTERS[0] in data:
            letters = [letter for letter in _LETTERS if isinstance(data.get(letter), str) and data[letter].strip()]
            if len(letters) >= _FEWEST and letters == list(_LETTERS[: len(letters)]):
                value = [data[letter] for letter in letters]
    value, labels = _texts_and_labels(parsed(value))
    if value in (None, "", [], {}):
        return None
    plain = isinstance(value, list) and all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in value)
    if not plain or not _FEWEST <= len(value) <= _MOST:
        raise RowError(f"{where}is {a(value)}; expected a list of {_FEWEST} to {_MOST} texts. data.columns.choices: '' leaves choices out")
    texts = [" ".join(str(item).split()) for item in value]
    marks = [_LETTERED.match(text) for text in texts]
    if all(mark is not None and mark[1].upper() == letter for mark, letter in zip(marks, _LETTERS, strict=False)):
        texts = [text[mark.end() :] for text, mark in zip(texts, marks, strict=True) if mark]
    labels = labels if len(labels) == len(texts) and None not in labels else []
    return Choices(texts, list(map(str, labels)), numbers=not any(isinstance(item, str) for item in value))


def _texts_and_labels(value: Any) -> tuple[Any, list[Any]]:
    """The texts of choices, and what the row calls each: of a list, an object by letters, or as ARC and CommonsenseQA have them."""
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), list):
            return value["text"], list(value.get("label") or [])
        kept = {key: text for key, text in value.items() if text is not None}
        return list(kept.values()), list(kept)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and isinstance(item.get("text"), str) for item in value):
        return [item["text"] for item in value], [item.get("label", item.get("id")) for item in value]
    return value, []


def choice_columns(column: str) -> tuple[str, ...]:
    """Every column in which choices are looked for."""
    return (column, _OTHER_CHOICES, *sorted(_CHOICE_NAMES), *_LETTERS) if column == USUAL_CHOICES else (column,) if column else ()


def with_choices(messages: tuple[Message, ...], choices: Choices) -> tuple[Message, ...]:
    """A conversation whose question is shown with its choices."""
    *rest, last = messages
    return (*rest, Message(last.role, choices.shown(last.content)))


def is_alpaca(data: Mapping[str, Any]) -> bool:
    """Whether a row is laid out as Alpaca's or Dolly's: an instruction, what it is about, and what was answered."""
    return "instruction" in data and bool({"output", "response"} & set(data))


def alpaca_turns(data: Mapping[str, Any], instruction: str) -> tuple[Message, ...]:
    """The turns of a row of Alpaca's layout: `input` (Dolly: `context`) belongs to the instruction, `history` stands before it."""
    about, earlier = data.get("input") or data.get("context"), parsed(data.get("history"))
    turns: list[Message] = []
    for pair in earlier if isinstance(earlier, list) else []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError("has a column 'history' that is no list of [instruction, answer]; mend it, or take it out")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    text = f"{instruction}\n\n{about}" if isinstance(about, str) and about.strip() else instruction
    return (*turns, Message("user", text))


def system_of(data: Mapping[str, Any]) -> str:
    """What a row says in a column of its own that stands before the conversation; "" for nothing.

    `system` is one in the layouts of Alpaca and ShareGPT alone, `system_prompt` in any.
    """
    own = data.get("system") if is_alpaca(data) or "conversations" in data else None
    return next((text for text in (own, data.get("system_prompt")) if isinstance(text, str) and text.strip()), "")


def hidden_choices(data: Mapping[str, Any], gold: object) -> str:
    """The names of columns that seem to hold choices nobody would be shown, where the right answer is a letter or a number; "" for none."""
    if not (isinstance(gold, str) and _PLACE.fullmatch(gold)):
        return ""
    for name in _CHOICE_NAMES.intersection(data):
        found = parsed(data[name])
        if isinstance(found, list) and _FEWEST <= len(found) <= _MOST:
            return name
    named: dict[str, list[str]] = {}
    for name, value in data.items():
        if isinstance(name, str) and isinstance(value, str) and (mark := _NUMBERED.fullmatch(name)):
            named.setdefault(mark[1], []).append(name)
    return next((", ".join(names) for names in named.values() if len(names) >= _FEWEST), "")


_LAYOUTS: tuple[tuple[str, frozenset[str], str], ...] = (
    ("Alpaca", frozenset({"instruction", "output"}), "data.columns: {prompt: instruction, answer: output}"),
    ("ShareGPT and LLaVA", frozenset({"conversations"}), "data.columns: {messages: conversations}"),
    ("ShareGPT and LLaVA", frozenset({"conversation"}), "data.columns: {messages: conversation}"),
    ("verl", frozenset({"prompt", "reward_model"}), "data.columns: {answer: reward_model.ground_truth}"),
    ("verl", frozenset({"data_source", "reward_model"}), "data.columns: {answer: reward_model.ground_truth}"),
    ("KTO's good and bad answers", frozenset({"prompt", "completion", "label"}), "so keep the good ones alone, without the column label"),
    ("OpenAI's preferences", frozenset({"preferred_output", "non_preferred_output"}), "which hold no right answer that could be checked"),
    ("preferences", frozenset({"chosen", "rejected"}), "which hold no right answer that could be checked: bring questions with one"),
    ("TRL's prompts and completions", frozenset({"prompt", "completion"}), "data.columns: {answer: completion}"),
    (
        "Label Studio",
        frozenset({"data", "annotations"}),
        "data.columns: {prompt: data.text, answer: annotations.0.result.0.value.choices.0}, with the names of your project",
    ),
    ("SQuAD's articles", frozenset({"paragraphs"}), "which hold many questions a row: write each question into a row of its own"),
    ("OpenAI's batches", frozenset({"body", "custom_id"}), "data.columns: {messages: body.messages}, and an answer"),
    ("OpenAI's evals", frozenset({"input", "ideal"}), "data.columns: {prompt: input, answer: ideal}"),
)
_QUESTIONS = "prompt question problem query instruction input text context_question Question Problem".split()
_ANSWERS = (
    "answer final_answer answers ground_truth gold gold_answer target label solution output response completion answerKey answer_key "
    "correct_answer reference_answer correct Answer"
).split()


def layout_hint(names: Collection[str], *, prompt: bool, answer: bool) -> str:
    """What a row's layout is called and which settings read it, as an end of a message; "" where nobody can tell.

    Args:
        names: of its columns.
        prompt, answer: what is missing.
    """
    for name, columns, mend in _LAYOUTS:
        if columns <= set(names):
            return f" It is laid out as {name}{': write ' if mend.startswith('data.') else ', '}{mend}"
    wanted = {"prompt": _QUESTIONS} if prompt else {}
    wanted |= {"answer": _ANSWERS} if answer else {}
    found = {what: next((name for name in known if name in names), "") for what, known in wanted.items()}
    pairs = ", ".join(f"{what}: {name}" for what, name in found.items() if name and name != what)
    return f" Perhaps data.columns: {{{pairs}}}" if pairs else ""
