"""Mathematics: AIME, IMO-AnswerBench, MathVista, MathVision, MathVerse, DynaMath, We-Math."""

from __future__ import annotations

import re

from zppo.evals.adapters.choice import LETTERS, ask_about, checked_options, choice_item, with_options
from zppo.evals.adapters.row import DatasetRow, strip_directives
from zppo.evals.item import Item, Kind
from zppo.grading.text import normalise

_VARIANT = re.compile(r"variant_?(\d{1,2})$")
_OPTION = re.compile(r"(?:(?:^|[;；]|\n)\s*([A-H])[.．、):：）]|(?:^|[;；:：\s])[(（]([A-H])[)）])\s*")


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
        options = _drawn_options(checked_options(row, "options", row.texts("options")))
        return (choice_item(row, identity, _one_mark(question), options, gold, (image,), facts),)
    return (Item(identity, row.benchmark, ask_about(row, _one_mark(question), 1), gold, "text", (image,), facts=facts),)


def _one_mark(text: str) -> str:
    """The text without marks for images: a row of MathVision has all its pictures in one."""
    return re.sub(r"[ \t]*<image\d*>[ \t]*", " ", text).strip()


def _drawn_options(options: tuple[str, ...]) -> tuple[str, ...]:
    """Options that are pictures, `<image2>` to `<image6>`: all of a row's pictures are in one, in which they have their letters."""
    if all(re.fullmatch(r"<image\d*>", option) for option in options):
        return tuple(LETTERS[: len(options)])
    return tuple(re.sub(r"<image(\d*)>", r"(picture \1)", option).replace("(picture )", "(the picture)") for option in options)


def mathverse(row: DatasetRow) -> tuple[Item, ...]:
    """MathVerse testmini: `query_wo` without its directive; it, unlike `question`, has the words of every version.

    The version whose question stands in the picture alone has a `query_wo` that is nothing but directives; a judge is then shown
    `question_for_eval`, and the options are those of it.
    """
    identity, image = row.text("sample_index"), row.image("image")
    facts = {"version": row.text("problem_version"), "problem_index": row.maybe("problem_index")}
    gold = row.text("answer")
    text = strip_directives(row.text("query_wo").removeprefix("Question:").strip(), may_be_empty=True)
    text, judged = re.sub(r"^Question:\s*", "", text), row.maybe("question_for_eval")
    if not text:
        text = "Answer the question that is shown in the image."
        facts |= {"shown": judged} if judged else {}
    if row.one_of("question_type", ("multi-choice", "free-form")) == "free-form":
        return (Item(identity, row.benchmark, ask_about(row, text, 1), gold, "text", (image,), facts=facts),)
    text, options = split_options(text)
    text = with_options(text, options) if options else text
    options = options or split_options(judged)[1]
    gold = option_letters(gold, options)
    kind: Kind = "choice" if _LETTERS_ALONE.fullmatch(gold) else "text"
    messages = ask_about(row, text, 1)
    return (Item(identity, row.benchmark, messages, gold, kind, (image,), options=options or tuple("ABCD"), facts=facts),)


_LETTERS_ALONE = re.compile(r"[A-Z](?:, [A-Z])*")


def option_letters(gold: str, options: tuple[str, ...]) -> str:
    """A right answer that is a letter in brackets, several letters (`C`, a line break, `D`) or the text of an option as letters: `C, D`.

    What is none of these is given back as it is.
    """
    letters = re.findall(r"[A-Z]", gold)
    if letters and re.fullmatch(r"\(?[A-Z]\)?\.?(?:(?:\s*[,;&]\s*|\s+|\s+and\s+)\(?[A-Z]\)?\.?)*", gold.strip()):
        return ", ".join(letters)
    same = [letter for letter, option in zip(LETTERS, options, strict=False) if normalise(option) == normalise(gold)]
    return same[0] if len(same) == 1 else gold


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
    else:
        facts["order"] = "fixed"
    return (Item(identity, row.benchmark, ask_about(row, question, 1), gold, number, (image,), facts=facts),)


def wemath(row: DatasetRow) -> tuple[Item, ...]:
    """We-Math testmini: `option` is one text, `A. 1; B. 2; ...`; `key` says which step of which problem a row is."""
    problem, key = row.text("ID"), row.text("key")
    letters, options = listed_options(row.text("option"))
    gold = option_letters(_LISTED_START.sub("\\1", row.text("answer")), options)
    if not options:
        row.fail("option", "no options A, B, ... can be made out in it")
    facts = {"problem": problem, "key": key, "concept": str(row.data.get("knowledge concept") or "")[:200]}
    question = strip_directives(row.text("question"))
    number = row.maybe("question number") or str(row.number)
    gold = LETTERS[letters.index(gold)] if gold in letters else gold
    identity = f"{problem}/{key}/{number}"
    return (choice_item(row, identity, question, options, gold, (row.image("image_path", "image"),), facts),)


_LISTED = re.compile(r"(?:^|[;；\n])\s*([A-H])[.．、:：]\s*(?=[^;；\s])")  # nothing behind it: the end of a text that was cut at `;`
_LISTED_LOOSELY = re.compile(r"(?:^|[;；\s])\s*([A-H])[.．、:：]\s*(?=[^;；\s])")
_CUT = re.compile(r"[;；](?=[A-Z]\.[ ;；\n]*$)")
_LISTED_START = re.compile(r"^\s*([A-H])[.．、:：].*", re.DOTALL)


def listed_options(text: str) -> tuple[str, tuple[str, ...]]:
    """(letters, texts) of a list `A. 1; B．2; F. none` that is nothing but options; empty where they do not stand in alphabetical order.

    Real lists have full-width stops, lack a `;`, leave a letter out, or have a `;` inside a text whose last word is a letter
    (`to point ;C.; B. ...`), which starts no option.
    """
    for pattern in (_LISTED, _LISTED_LOOSELY):
        marks = list(pattern.finditer(text))
        letters = "".join(mark[1] for mark in marks)
        whole = LETTERS.startswith(letters) or pattern is _LISTED_LOOSELY
        if (
            len(marks) >= 2
            and letters[0] == "A"
            and whole
            and all(first < second for first, second in zip(letters, letters[1:], strict=False))
        ):
            ends = [*(mark.start() for mark in marks[1:]), len(text)]
            return letters, tuple(_CUT.sub("", text[mark.end() : end]).strip(" ;；\n") for mark, end in zip(marks, ends, strict=True))
    return "", ()
