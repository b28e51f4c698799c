"""Mathematics: AIME, IMO-AnswerBench, MathVista, MathVision, MathVerse, DynaMath, We-Math."""

from __future__ import annotations

import re

from zppo.evals.adapters.choice import LETTERS, ask_about, checked_options, choice_item, with_options
from zppo.evals.adapters.row import DatasetRow, strip_directives
from zppo.evals.item import Item, Kind

_VARIANT = re.compile(r"variant_?(\d{1,2})$")
_OPTION = re.compile(r"(?:(?:^|[;；]|\n)\s*([A-H])[.、):：]|(?:^|[;；\s])\(([A-H])\))\s*")


def aime25(row: DatasetRow) -> tuple[Item, ...]:
    """AIME 2025, I and II: `question`, or `problem` in another owner's copy."""
    identity = row.maybe("id") or f"{row.config or 'aime25'}-{row.number}"
    text = strip_directives(row.text("question", "problem"))
    return (Item(identity, row.benchmark, ask_about(row, text), row.text("answer"), "number"),)


def aime26(row: DatasetRow) -> tuple[Item, ...]:
    """AIME 2026."""
    identity = row.maybe("problem_idx", "id") or f"aime26-{row.number}"
    text = strip_directives(row.text("problem", "question"))
    return (Item(identity, row.benchmark, ask_about(row, text), row.text("answer"), "number"),)


def imo_answerbench(row: DatasetRow) -> tuple[Item, ...]:
    """IMO-AnswerBench: the answers are numbers, formulas, sets, or a few words."""
    facts = {"category": row.maybe("Category"), "subcategory": row.maybe("Subcategory")}
    text = strip_directives(row.text("Problem"))
    return (Item(row.text("Problem ID"), row.benchmark, ask_about(row, text), row.text("Short Answer"), "text", facts=facts),)


def mathvista(row: DatasetRow) -> tuple[Item, ...]:
    """MathVista: `question` and `choices`, never `query`, which adds a hint on the form; the unit is part of the question."""
    identity, image = row.text("pid"), row.image("decoded_image", "image")
    question = strip_directives(row.text("question"))
    if row.has("unit"):
        question = f"{question} (unit: {row.text('unit')})"
    facts = {"answer_type": row.maybe("answer_type"), "unit": row.maybe("unit")}
    if row.one_of("question_type", ("multi_choice", "free_form")) == "multi_choice":
        options = row.texts("choices")
        gold = row.text("answer")
        if gold not in options:
            row.fail("answer", f"{gold[:40]!r} is none of the choices")
        letter = LETTERS[options.index(gold)] if options.index(gold) < len(LETTERS) else ""
        return (choice_item(row, identity, question, checked_options(row, "choices", options), letter, (image,), facts),)
    kind: Kind = "text"
    if facts["answer_type"] in ("integer", "float"):
        kind = "precision"
        facts["precision"] = str(0 if facts["answer_type"] == "integer" else row.integer("precision"))
    return (Item(identity, row.benchmark, ask_about(row, question, 1), row.text("answer"), kind, (image,), facts=facts),)


def mathvision(row: DatasetRow) -> tuple[Item, ...]:
    """MathVision: an empty list of options means a free answer; marks `<image1>` stand in the question."""
    identity, image = row.maybe("id") or f"mathvision-{row.number}", row.image("decoded_image", "image")
    facts = {"subject": row.maybe("subject"), "level": row.maybe("level")}
    question, gold = strip_directives(row.text("question")), row.text("answer")
    if row.has("options"):
        options = checked_options(row, "options", row.texts("options"))
        return (choice_item(row, identity, _one_mark(question), options, gold, (image,), facts),)
    return (Item(identity, row.benchmark, ask_about(row, _one_mark(question), 1), gold, "text", (image,), facts=facts),)


def _one_mark(text: str) -> str:
    """The text without marks for images: a row of MathVision has all its pictures in one."""
    return re.sub(r"[ \t]*<image\d*>[ \t]*", " ", text).strip()


def mathverse(row: DatasetRow) -> tuple[Item, ...]:
    """MathVerse testmini: `query_wo` without its directive; it, unlike `question`, has the words of every version.

    The version whose question stands in the picture alone has a `query_wo` that is nothing but directives.
    """
    identity, image = row.text("sample_index"), row.image("image")
    facts = {"version": row.text("problem_version"), "problem_index": row.maybe("problem_index")}
    gold = row.text("answer")
    text = strip_directives(row.text("query_wo").removeprefix("Question:").strip(), may_be_empty=True)
    text = re.sub(r"^Question:\s*", "", text) or "Answer the question that is shown in the image."
    kind: Kind = "text"
    options: tuple[str, ...] = ()
    if row.one_of("question_type", ("multi-choice", "free-form")) == "multi-choice":
        kind, (text, options) = "choice", split_options(text)
        options = options or tuple("ABCD")
        gold = gold.strip("() .")
        text = with_options(text, options) if options != tuple("ABCD") else text
    return (Item(identity, row.benchmark, ask_about(row, text, 1), gold, kind, (image,), options=options, facts=facts),)


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question that ends with its options, `A: 1; B: 2`, `(A) 1 (B) 2` or a line each, taken apart; else no options."""
    marks = list(_OPTION.finditer(text))
    letters = "".join(mark[1] or mark[2] for mark in marks)
    if len(marks) < 2 or not LETTERS.startswith(letters):
        return text, ()
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    options = tuple(text[mark.end() : end].strip(" ;；\n") for mark, end in zip(marks, ends, strict=True))
    head = re.sub(r"\s*\b(?:choices?|options?)\s*[:：]?\s*$", "", text[: marks[0].start()], flags=re.IGNORECASE)
    return (head.strip(), options) if all(options) else (text, ())


def dynamath(row: DatasetRow) -> tuple[Item, ...]:
    """DynaMath: ten variants (splits) of each of 501 seed questions."""
    seed = row.text("id", "question_id")
    named = _VARIANT.search(row.split)
    variant = named[1] if named else row.text("variant", "question_id")
    image, kind = row.image("decoded_image", "image"), row.maybe("answer_type")
    facts = {"seed": seed, "variant": variant, "subject": row.maybe("subject"), "answer_type": kind}
    gold, question = row.text("ground_truth", "answer"), strip_directives(row.text("question"))
    identity = f"{seed}/{variant}"
    if kind == "multiple choice":
        head, options = split_options(question)
        messages = ask_about(row, with_options(head, options) if options else question, 1)
        options = options or tuple("ABCDEFGH")
        return (Item(identity, row.benchmark, messages, gold.strip("() ."), "choice", (image,), options=options, facts=facts),)
    number: Kind = "precision" if kind == "float" else "text"
    if kind == "float":
        facts["tolerance"] = "0.001"
    return (Item(identity, row.benchmark, ask_about(row, question, 1), gold, number, (image,), facts=facts),)


def wemath(row: DatasetRow) -> tuple[Item, ...]:
    """We-Math testmini: `option` is one text, `A. 1; B. 2; ...`; `key` says which step of which problem a row is."""
    problem, key = row.text("ID"), row.text("key")
    _, options = split_options(row.text("option"))
    if not options:
        row.fail("option", "no options A, B, ... can be made out in it")
    facts = {"problem": problem, "key": key, "concept": str(row.data.get("knowledge concept") or "")[:200]}
    question = strip_directives(row.text("question"))
    number = row.maybe("question number") or str(row.number)
    return (
        choice_item(row, f"{problem}/{key}/{number}", question, options, row.text("answer"), (row.image("image_path", "image"),), facts),
    )
