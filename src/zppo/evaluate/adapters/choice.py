"""Multiple choice over text and pictures: AI2D, EmbSpatial-Bench, VisualPuzzles, MMMU-Pro, BabyVision, MMLU and its kin, GPQA, C-Eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zppo.core.draws import keyed_random
from zppo.core.types import IMAGE
from zppo.evaluate.adapters.directives import strip_directives
from zppo.evaluate.adapters.row import Row
from zppo.evaluate.adapters.words import (
    LETTERS,
    ask,
    checked_options,
    letter_of,
    numbered_images,
    with_options,
)
from zppo.evaluate.item import Item, Media

_GPQA_SEED = 0


def choice_item(
    row: Row,
    identity: str,
    question: str,
    options: tuple[str, ...],
    gold: str,
    images: tuple[Media, ...] = (),
    facts: Mapping[str, Any] | None = None,
) -> Item:
    """An item of the kind choice; the gold must be the letter of one of the options."""
    if gold not in LETTERS[: len(options)] or len(gold) != 1:
        row.fail("answer", f"is {gold[:40]!r}; the letter of one of the {len(options)} options is expected")
    messages = ask(row, with_options(question, options), len(images))
    return Item(identity, row.benchmark, messages, gold, "choice", images, options=options, facts=facts or {})


def indexed_gold(row: Row, field: str, options: tuple[str, ...]) -> str:
    """The letter for an answer that is an index from 0, as a number or as text, or a letter already."""
    value = row.value(field)
    if isinstance(value, str) and value.strip() in LETTERS[: len(options)] and len(value.strip()) == 1:
        return value.strip()
    return letter_of(row, field, row.integer(field), len(options))


def ai2d(row: Row) -> tuple[Item, ...]:
    """AI2D: the answer is the index of an option, kept as text."""
    options = checked_options(row, "options", row.texts("options"))
    gold = indexed_gold(row, "answer", options)
    question = strip_directives(row.text("question"))
    return (choice_item(row, f"ai2d-{row.number}", question, options, gold, (row.image("image"),)),)


def embspatial(row: Row) -> tuple[Item, ...]:
    """EmbSpatial-Bench."""
    options = checked_options(row, "answer_options", row.texts("answer_options"))
    gold = indexed_gold(row, "answer", options)
    question = strip_directives(row.text("question").replace(IMAGE, "").strip())
    facts = {"relation": row.maybe("relation")}
    return (choice_item(row, row.text("question_id"), question, options, gold, (row.image("image"),), facts),)


def visual_puzzles(row: Row) -> tuple[Item, ...]:
    """VisualPuzzles: where a row has no options they are drawn in the picture, four of them."""
    options = checked_options(row, "options", row.texts("options")) if row.has("options") else ()
    gold, image = row.one_of("answer", tuple(LETTERS[: len(options) or 4])), row.image("image")
    question = strip_directives(row.text("question"))
    identity = row.maybe("id") or f"visualpuzzles-{row.number}"
    facts = {"category": row.maybe("category")}
    if options:
        return (choice_item(row, identity, question, options, gold, (image,), facts),)
    messages = ask(row, f"{question}\nThe options A, B, C and D are shown in the image.", 1)
    return (Item(identity, row.benchmark, messages, gold, "choice", (image,), options=tuple("ABCD"), facts=facts),)


def mmmu_pro(row: Row) -> tuple[Item, ...]:
    """MMMU-Pro: the two text configurations, and `vision`, where question and options are in the picture."""
    options = checked_options(row, "options", row.texts("options"))
    facts = {"subject": row.maybe("subject"), "config": row.config}
    gold, identity = row.text("answer"), f"{row.config or 'standard'}/{row.text('id')}"
    if row.has("question"):
        text, numbers = numbered_images(with_options(strip_directives(row.text("question")), options))
        images = tuple(row.image(f"image_{number}") for number in numbers)
        if not images and row.has("image_1"):
            text, images = f"{IMAGE}\n{text}", (row.image("image_1"),)
    else:
        text = f"{IMAGE}\nAnswer the question that is shown in the image."
        images = (row.image("image"),)
    if gold not in LETTERS[: len(options)]:
        row.fail("answer", f"is {gold[:40]!r}; the letter of one of the {len(options)} options is expected")
    messages = ask(row, text, len(images))
    return (Item(identity, row.benchmark, messages, gold, "choice", images, options=options, facts=facts),)


def babyvision(row: Row) -> tuple[Item, ...]:
    """BabyVision: options with the index of the right one, or a blank to fill in."""
    kind = row.one_of("ansType", ("choice", "blank"))
    identity = row.maybe("taskId", "id") or f"babyvision-{row.number}"
    facts = {"type": row.maybe("type"), "subtype": row.maybe("subtype")}
    question, image = strip_directives(row.text("question")), row.image("image")
    if kind == "choice":
        options = checked_options(row, "options", row.texts("options"))
        return (
            choice_item(row, identity, question, options, indexed_gold(row, "choiceAns", options), (image,), facts),
        )
    return (Item(identity, row.benchmark, ask(row, question, 1), row.text("blankAns"), "text", (image,), facts=facts),)


def mmlu(row: Row) -> tuple[Item, ...]:
    """MMLU: the row number is part of the id, since questions have none and some stand there twice."""
    options = checked_options(row, "choices", row.texts("choices"))
    gold = indexed_gold(row, "answer", options)
    subject = row.maybe("subject") or row.config
    facts = {"subject": subject}
    return (choice_item(row, f"{subject}-{row.number}", row.text("question"), options, gold, facts=facts),)


def mmlu_redux(row: Row) -> tuple[Item, ...]:
    """MMLU-Redux 2.0: only rows whose annotators found nothing wrong."""
    return mmlu(row) if row.text("error_type") == "ok" else ()


def mmlu_pro(row: Row) -> tuple[Item, ...]:
    """MMLU-Pro: up to ten options; the placeholders `N/A` at the end are left out."""
    texts = [text for text in row.texts("options") if text != "N/A"]
    options = checked_options(row, "options", texts)
    gold, facts = row.text("answer"), {"category": row.maybe("category")}
    return (choice_item(row, row.text("question_id"), row.text("question"), options, gold, facts=facts),)


def ceval(row: Row) -> tuple[Item, ...]:
    """C-Eval: four columns of options; the answers of the test split are not public."""
    options = checked_options(row, "A", tuple(row.text(letter) for letter in "ABCD"))
    subject = row.config or "ceval"
    identity = f"{subject}-{row.maybe('id') or row.number}"
    return (choice_item(row, identity, row.text("question"), options, row.text("answer"), facts={"subject": subject}),)


def gpqa(row: Row) -> tuple[Item, ...]:
    """GPQA: the right answer has a column of its own; the order of the options is drawn, keyed by the record's id."""
    identity = row.text("Record ID")
    texts = [row.text("Correct Answer"), *(row.text(f"Incorrect Answer {i}") for i in (1, 2, 3))]
    order = keyed_random(_GPQA_SEED, "gpqa", identity).sample(range(4), 4)
    options = tuple(texts[i] for i in order)
    facts = {"domain": row.maybe("High-level domain")}
    return (choice_item(row, identity, row.text("Question"), options, LETTERS[order.index(0)], facts=facts),)
