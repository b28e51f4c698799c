"""Multiple choice over text and pictures: AI2D, EmbSpatial-Bench, VisualPuzzles, MMMU-Pro, BabyVision, the MMLU family, GPQA, C-Eval.

Besides it the language benchmarks with a judge of their own (Humanity's Last Exam, MultiChallenge), and how the questions of all
adapters are written: options in one shape, images where they belong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from zppo.core.draws import keyed_random
from zppo.core.types import IMAGE, Message
from zppo.evals.adapters.row import DatasetRow, strip_directives
from zppo.evals.item import Item, Media

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABEL = re.compile(r"^\s*(?:[(（]([A-Z])[)）]|([A-Z])[.．、):：）])\s*")
_MARK = re.compile(r"<image(?:[ _]?\d+)?>", re.IGNORECASE)
_NUMBERED = re.compile(r"<image[ _]?(\d+)>", re.IGNORECASE)


def bare_options(options: Sequence[str]) -> tuple[str, ...]:
    """Options without their letters, where every one of them carries its own (`A. `, `(A) `, `A) `)."""
    labels = [_LABEL.match(option) for option in options]
    if not all(label and (label[1] or label[2]) == LETTERS[i] for i, label in enumerate(labels) if i < len(LETTERS)):
        return tuple(option.strip() for option in options)
    return tuple(option[label.end() :].strip() for option, label in zip(options, labels, strict=True) if label)


def with_options(question: str, options: Sequence[str]) -> str:
    """The question and, a line each, its options as `A. text`; options that are but letters stand in a picture."""
    if tuple(options) == tuple(LETTERS[: len(options)]):
        return question
    lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return "\n".join((question, *lines))


def checked_options(row: DatasetRow, field: str, options: Sequence[str]) -> tuple[str, ...]:
    """Bare options; DataError for fewer than two, or more than there are letters."""
    if not 2 <= len(options) <= len(LETTERS):
        row.fail(field, f"has {len(options)} options; 2 to {len(LETTERS)} are expected")
    return bare_options(options)


def ask_about(row: DatasetRow, text: str, images: int = 0) -> tuple[Message, ...]:
    """One user's turn with so many images, at the text's own marks, in order, or, where it has none, all in front.

    A text without images may still say `<image>` (a question about HTML): that is no mark, and stays.
    """
    marks = len(_MARK.findall(text))
    if images and marks == images:
        text = _MARK.sub(IMAGE, text)
    elif images and marks:
        row.fail("question", f"has {marks} marks for images, and the row has {images} of these")
    elif images:
        text = "\n".join([IMAGE] * images + [text])
    return (Message("user", text),)


def numbered_images(text: str) -> tuple[str, tuple[int, ...]]:
    """Marks `<image 3>` as plain ones, and the numbers in the order in which they first stand; a later one is named in words."""
    order: list[int] = []

    def mark(match: re.Match[str]) -> str:
        number = int(match[1][:4])
        if number in order:
            return f"(image {order.index(number) + 1})"
        order.append(number)
        return IMAGE

    return _NUMBERED.sub(mark, text), tuple(order)


_ROLES = ("system", "user", "assistant")


def hle(row: DatasetRow) -> tuple[Item, ...]:
    """Humanity's Last Exam, with its picture where a question has one; options are part of the question's text."""
    images = (row.image("image"),) if row.has("image") else ()
    messages = ask_about(row, row.text("question"), len(images))
    facts = {name: row.maybe(name) for name in ("answer_type", "category", "raw_subject")}
    return (Item(row.text("id"), row.benchmark, messages, row.text("answer"), "judged", images, facts=facts),)


def multichallenge(row: DatasetRow) -> tuple[Item, ...]:
    """MultiChallenge: the conversation so far; the judge answers the target question, and the gold is what it should say.

    A sequence of {role, content}, which `datasets` gives as one object of two lists: both shapes are read.
    """
    turns = tuple(_turn(row, turn) for turn in row.records("conversation", "CONVERSATION"))
    if turns[-1].role != "user":
        row.fail("conversation", f"ends with a turn of the {turns[-1].role}; the user's is expected")
    gold = row.text("pass_criteria", "PASS_CRITERIA").strip(". ").lower()
    if gold not in ("yes", "no"):
        row.fail("pass_criteria", f"is {gold[:40]!r}; YES or NO is expected")
    facts = {"axis": row.maybe("axis", "AXIS"), "criterion": row.text("target_question", "TARGET_QUESTION")}
    return (Item(row.text("question_id", "QUESTION_ID"), row.benchmark, turns, gold, "criterion", facts=facts),)


def _turn(row: DatasetRow, turn: object) -> Message:
    if not isinstance(turn, Mapping):
        row.fail("conversation", "holds something that is no {role, content}")
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES or not isinstance(content, str) or not content.strip():
        row.fail(
            "conversation", f"holds a turn with the role {role!r:.40} that cannot be shown: {', '.join(_ROLES)} and a text are expected"
        )
    return Message(cast(Literal["system", "user", "assistant"], role), content)


_GPQA_SEED = 0


def choice_item(
    row: DatasetRow,
    identity: str,
    question: str,
    options: tuple[str, ...],
    gold: str,
    images: tuple[Media, ...] = (),
    facts: Mapping[str, Any] | None = None,
) -> Item:
    """An item of the kind choice; the gold must be the letter of one of the options."""
    check_letter(row, gold, options)
    messages = ask_about(row, with_options(question, options), len(images))
    return Item(identity, row.benchmark, messages, gold, "choice", images, options=options, facts=facts or {})


def check_letter(row: DatasetRow, gold: str, options: Sequence[str]) -> None:
    """DataError where the right answer is not the letter of an option."""
    if gold not in LETTERS[: len(options)] or len(gold) != 1:
        row.fail("answer", f"is {gold[:40]!r}; the letter of one of the {len(options)} options is expected")


def indexed_gold(row: DatasetRow, field: str, options: tuple[str, ...]) -> str:
    """The letter for an answer that is an index from 0, as a number or as text, or a letter already."""
    value = row.value(field)
    if isinstance(value, str) and value.strip() in LETTERS[: len(options)] and len(value.strip()) == 1:
        return value.strip()
    index = row.integer(field)
    if not 0 <= index < len(options):
        row.fail(field, f"is option {index} (the first is 0), and the row has {len(options)}")
    return LETTERS[index]


def ai2d(row: DatasetRow) -> tuple[Item, ...]:
    """AI2D: the answer is the index of an option, kept as text."""
    options = checked_options(row, "options", row.texts("options"))
    gold = indexed_gold(row, "answer", options)
    question = strip_directives(row.text("question"))
    return (choice_item(row, f"ai2d-{row.number}", question, options, gold, (row.image("image"),)),)


def embspatial(row: DatasetRow) -> tuple[Item, ...]:
    """EmbSpatial-Bench."""
    options = checked_options(row, "answer_options", row.texts("answer_options"))
    gold = indexed_gold(row, "answer", options)
    question = strip_directives(row.text("question").replace(IMAGE, "").strip())
    facts = {"relation": row.maybe("relation")}
    return (choice_item(row, row.text("question_id"), question, options, gold, (row.image("image"),), facts),)


def visual_puzzles(row: DatasetRow) -> tuple[Item, ...]:
    """VisualPuzzles: where a row has no options they are drawn in the picture, four of them."""
    options = checked_options(row, "options", row.texts("options")) if row.has("options") else ()
    gold, image = row.one_of("answer", tuple(LETTERS[: len(options) or 4])), row.image("image")
    question = strip_directives(row.text("question"))
    identity = row.maybe("id") or f"visualpuzzles-{row.number}"
    facts = {"category": row.maybe("category")}
    if options:
        return (choice_item(row, identity, question, options, gold, (image,), facts),)
    messages = ask_about(row, f"{question}\nThe options A, B, C and D are shown in the image.", 1)
    return (Item(identity, row.benchmark, messages, gold, "choice", (image,), options=tuple("ABCD"), facts=facts),)


def mmmu_pro(row: DatasetRow) -> tuple[Item, ...]:
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
    check_letter(row, gold, options)
    messages = ask_about(row, text, len(images))
    return (Item(identity, row.benchmark, messages, gold, "choice", images, options=options, facts=facts),)


def babyvision(row: DatasetRow) -> tuple[Item, ...]:
    """BabyVision: options with the index of the right one, or a blank to fill in."""
    kind = row.one_of("ansType", ("choice", "blank"))
    identity = row.maybe("taskId", "id") or f"babyvision-{row.number}"
    facts = {"type": row.maybe("type"), "subtype": row.maybe("subtype")}
    question, image = strip_directives(row.text("question")), row.image("image")
    if kind == "choice":
        options = checked_options(row, "options", row.texts("options"))
        return (choice_item(row, identity, question, options, indexed_gold(row, "choiceAns", options), (image,), facts),)
    facts["order"] = "unsure"  # some blanks are a sequence, some a set: the question says which
    return (Item(identity, row.benchmark, ask_about(row, question, 1), row.text("blankAns"), "text", (image,), facts=facts),)


def mmlu(row: DatasetRow) -> tuple[Item, ...]:
    """MMLU: the row number is part of the id, since questions have none and some stand there twice."""
    options = checked_options(row, "choices", row.texts("choices"))
    gold = indexed_gold(row, "answer", options)
    subject = row.maybe("subject") or row.config
    facts = {"subject": subject}
    return (choice_item(row, f"{subject}-{row.number}", row.text("question"), options, gold, facts=facts),)


def mmlu_redux(row: DatasetRow) -> tuple[Item, ...]:
    """MMLU-Redux 2.0: only rows whose annotators found nothing wrong."""
    return mmlu(row) if row.text("error_type") == "ok" else ()


def mmlu_pro(row: DatasetRow) -> tuple[Item, ...]:
    """MMLU-Pro: up to ten options; the placeholders `N/A` at the end are left out."""
    texts = [text for text in row.texts("options") if text != "N/A"]
    options = checked_options(row, "options", texts)
    gold, facts = row.text("answer"), {"category": row.maybe("category")}
    return (choice_item(row, row.text("question_id"), row.text("question"), options, gold, facts=facts),)


def ceval(row: DatasetRow) -> tuple[Item, ...]:
    """C-Eval: four columns of options; the answers of the test split are not public."""
    options = checked_options(row, "A", tuple(row.text(letter) for letter in "ABCD"))
    subject = row.config or "ceval"
    identity = f"{subject}-{row.maybe('id') or row.number}"
    return (choice_item(row, identity, row.text("question"), options, row.text("answer"), facts={"subject": subject}),)


def gpqa(row: DatasetRow) -> tuple[Item, ...]:
    """GPQA: the right answer has a column of its own; the order of the options is drawn, keyed by the record's id."""
    identity = row.text("Record ID")
    texts = [row.text("Correct Answer"), *(row.text(f"Incorrect Answer {i}") for i in (1, 2, 3))]
    order = keyed_random(_GPQA_SEED, "gpqa", identity).sample(range(4), 4)
    options = tuple(texts[i] for i in order)
    facts = {"domain": row.maybe("High-level domain")}
    return (choice_item(row, identity, row.text("Question"), options, LETTERS[order.index(0)], facts=facts),)
