"""Pictures with a free answer: InfographicVQA, OCRBench v2, CharXiv, MM-Vet, VLMs-are-Blind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zppo.evals.adapters.choice import ask_about
from zppo.evals.adapters.row import DatasetRow, strip_directives
from zppo.evals.item import Item, Kind

_BLIND_KINDS: Mapping[str, Kind] = MappingProxyType({"touching circles": "text", "circled letter": "text"})
_GRID = "counting grid"


def infovqa(row: DatasetRow) -> tuple[Item, ...]:
    """InfographicVQA: several accepted answers; the test split has none."""
    messages = ask_about(row, strip_directives(row.text("question")), 1)
    return (Item(row.text("questionId"), row.benchmark, messages, row.texts("answers"), "anls", (row.image("image"),)),)


def mmvet(row: DatasetRow) -> tuple[Item, ...]:
    """MM-Vet: the gold may join parts with <AND> and <OR>, which the prompt of its judge explains."""
    messages = ask_about(row, strip_directives(row.text("question")), 1)
    facts = {"capability": row.maybe("capability")}
    return (Item(row.text("question_id"), row.benchmark, messages, row.text("answer"), "graded", (row.image("image"),), facts=facts),)


def vlms_are_blind(row: DatasetRow) -> tuple[Item, ...]:
    """VLMs-are-Blind: numbers, a letter, yes or no; grids have two numbers, rows first. The figure is the mean over its eight tasks."""
    task = row.text("task")
    kind = _BLIND_KINDS.get(task.lower(), "grid" if task.lower().startswith(_GRID) else "number")
    # A directive inside the sentence that asks, which another sentence illustrates.
    text = re.sub(r",?\s+and answer with [^.?!\n]{0,60} in curly brackets\b", "", strip_directives(row.text("prompt")), flags=re.IGNORECASE)
    messages = ask_about(row, text, 1)
    image, gold = row.image("image"), row.text("groundtruth")
    facts = {"task": task, "axis": task.partition(" - ")[0] if kind == "grid" else task}
    return (Item(f"blind-{row.number}", row.benchmark, messages, gold, kind, (image,), facts=facts),)


def ocrbench_en(row: DatasetRow) -> tuple[Item, ...]:
    """OCRBench v2, rows whose type ends in `en`."""
    return _ocrbench(row, "en")


def ocrbench_zh(row: DatasetRow) -> tuple[Item, ...]:
    """OCRBench v2, rows whose type ends in `cn`."""
    return _ocrbench(row, "cn")


def _ocrbench(row: DatasetRow, language: str) -> tuple[Item, ...]:
    """The form of the answer (boxes, HTML, a dictionary) is the task here, so a row's own description of it stays."""
    task = row.text("type")
    if not task.endswith(f" {language}"):
        return ()
    answers = row.texts("answers")
    facts: dict[str, Any] = {"task": task, "how": row.maybe("eval"), "question": row.text("question")}
    if row.has("bbox"):
        facts["bbox"] = tuple(_whole(row, "bbox", value) for value in row.items("bbox"))
    if row.has("bbox_list"):
        facts["boxes"] = tuple(_box(row, box) for box in row.items("bbox_list"))
        facts["content"] = row.texts("content")
        if len(facts["boxes"]) != len(facts["content"]):
            row.fail("content", f"has {len(facts['content'])} texts for {len(facts['boxes'])} boxes")
    messages = ask_about(row, strip_directives(row.text("question")), 1)
    identity = row.maybe("id") or f"ocrbench-{row.number}"
    return (Item(identity, row.benchmark, messages, answers, "ocr", (row.image("image"),), facts=facts),)


def _whole(row: DatasetRow, field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        row.fail(field, f"holds {value!r:.40}; whole numbers are expected")
    return value


def _box(row: DatasetRow, box: object) -> tuple[int, ...]:
    if not isinstance(box, list | tuple) or len(box) < 4 or len(box) % 2:
        row.fail("bbox_list", "holds something that is no list of x, y, x, y, ...")
    return tuple(_whole(row, "bbox_list", value) for value in box)


# The 19 questions about what is drawn; a row has their numbers. The words are ours, and so is what is said of the cases in which
# there is nothing to name: the gold then is "Not Applicable".
_NOT_THERE = "If there is none, the answer is Not Applicable."
_TICK = "Leave out units and scales that are written apart from the tick."
_DRAWN: Mapping[int, str] = MappingProxyType(
    {
        1: f"What title is written on the plot? {_NOT_THERE}",
        2: f"How is the x-axis labelled (the lower one if there are two, a shared one included)? {_NOT_THERE}",
        3: f"How is the y-axis labelled (the left one if there are two, a shared one included)? {_NOT_THERE}",
        4: f"Which labelled tick of the x-axis (the lower one if there are two) stands furthest left? {_TICK}",
        5: f"Which labelled tick of the x-axis (the lower one if there are two) stands furthest right? {_TICK}",
        6: f"Which labelled tick of the y-axis (the left one if there are two) stands lowest in the picture? {_TICK}",
        7: f"Which labelled tick of the y-axis (the left one if there are two) stands highest in the picture? {_TICK}",
        8: "By how much do neighbouring tick values of the x-axis (the lower one if there are two) differ? "
        "If they are no numbers, or the difference is not always the same, the answer is Not Applicable.",
        9: "By how much do neighbouring tick values of the y-axis (the left one if there are two) differ? "
        "If they are no numbers, or the difference is not always the same, the answer is Not Applicable.",
        10: f"How many lines are drawn, grid and auxiliary lines not counted? {_NOT_THERE}",
        11: "Do any of the lines cross, grid and auxiliary lines not counted: Yes or No? "
        "If there are no lines, the answer is Not Applicable.",
        12: f"How many separate labels does the legend have that belong to this plot? {_NOT_THERE}",
        13: "Which labels does the legend have that belong to this plot, from top to bottom, then left to right, "
        f"with commas between? {_NOT_THERE}",
        14: "What is the difference between the largest and the smallest tick label of the colour bar, "
        f"without a percent sign? {_NOT_THERE}",
        15: f"What is the largest tick label of the colour bar, without a percent sign? {_NOT_THERE}",
        16: "How do the data run from left to right, in a few words, such as: rises, then levels off?",
        17: "How many ticks with a label are there on all axes together, shared axes included?",
        18: "How are the subplots laid out, as rows by columns, such as 2 by 3? A single plot is 1 by 1.",
        19: "How many subplots are there? A single plot counts as 1.",
    }
)  # fmt: skip
_WHOLE_FIGURE = 18  # the question about the layout is about the whole figure


REASONING_RUBRICS = ("text-in-chart", "text-in-general", "number-in-chart", "number-in-general")
"""How an answer to a question about reasoning is compared, by its `reasoning_a_type`, 1 to 4."""
DESCRIPTIVE_RUBRICS: Mapping[int, str] = MappingProxyType(
    {1: "title", **dict.fromkeys(range(2, 8), "ocr"), **dict.fromkeys((8, 9, 10, 12, 14, 15, 17, 19), "quant"), 11: "bool", 13: "enum",
     16: "trend", 18: "layout"}
)  # fmt: skip
"""The same for the questions about what is drawn, by their numbers."""


def charxiv(row: DatasetRow) -> tuple[Item, ...]:
    """CharXiv: one question to reason about and four about what is drawn, for each chart.

    A number that is worked out is asked for with the decimals that its judge expects, those of the gold.
    """
    identity, image = row.maybe("original_id") or f"charxiv-{row.number}", row.image("image")

    def item(part: str, number: int, rubric: str, question: str, gold: str) -> Item:
        facts = {"part": "reasoning" if part == "r" else "descriptive", "question_type": number, "rubric": rubric}
        return Item(f"{identity}/{part}", row.benchmark, ask_about(row, question, 1), gold, "judged", (image,), facts=facts)

    gold = row.text("reasoning_a")
    number = _answer_type(row, gold)
    decimals = f"\n{_with_decimals(gold)}" if number == 4 else ""
    items = [item("r", number, REASONING_RUBRICS[number - 1], row.text("reasoning_q") + decimals, gold)]
    place = _subplot(row)
    for slot in (1, 2, 3, 4):
        number = row.integer(f"descriptive_q{slot}")
        if number not in _DRAWN:
            row.fail(f"descriptive_q{slot}", f"is {number}; one of the questions 1 to {len(_DRAWN)} is expected")
        question = _DRAWN[number] if number >= _WHOLE_FIGURE else f"{place}{_DRAWN[number]}"
        items.append(item(f"d{slot}", number, DESCRIPTIVE_RUBRICS[number], question, row.text(f"descriptive_a{slot}")))
    return tuple(items)


def _answer_type(row: DatasetRow, gold: str) -> int:
    """1 to 4; where a copy of the set lacks the column, a number is taken for one that is worked out, and a text for one that is not."""
    if not row.has("reasoning_a_type"):
        return 4 if _plain_number(gold) else 2
    number = row.integer("reasoning_a_type")
    if not 1 <= number <= len(REASONING_RUBRICS):
        row.fail("reasoning_a_type", f"is {number}; 1 to {len(REASONING_RUBRICS)} is expected")
    return number


def _plain_number(text: str) -> bool:
    return re.fullmatch(r"-?\d[\d,]*(?:\.\d+)?%?", text, re.ASCII) is not None


def _with_decimals(gold: str) -> str:
    """How exact the answer shall be, in words."""
    decimals = len(gold.rstrip("%").partition(".")[2])
    return f"The answer is a number with {decimals} decimal{'s' if decimals > 1 else ''}." if decimals else "The answer is a whole number."


def _subplot(row: DatasetRow) -> str:
    """Which subplot a question is about, in words; "" for a figure of one plot."""
    if row.has("subplot_loc"):
        return f"About {row.text('subplot_loc')}: "
    if not row.has("subplot_row") or row.integer("subplot_row") == 0:
        return ""
    return f"About the subplot in row {row.integer('subplot_row')}, column {row.integer('subplot_col')}: "
