"""Worked examples that every prompt shows (`data.examples`): drawn from the training questions, and held out of them [zppo]. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from zppo.config.settings import Settings
from zppo.core.draws import draw_key
from zppo.core.types import RULE, Golds, Message, Question
from zppo.data.mixture import Mixture, PartRead, question_key
from zppo.data.rows import column_value
from zppo.errors import DataError, SettingsError
from zppo.prompts.book import CLOSING, PromptBook

_TAGS = ("<think>", "</think>")


class Example(NamedTuple):
    """A question that is shown with its answer; `solution` is "" where its row has none."""

    question: Question
    answer: str
    solution: str = ""


def draw_examples(
    settings: Settings, mixture: Mixture, read: Sequence[PartRead], held_out: Sequence[Question]
) -> tuple[Mixture, tuple[Example, ...]]:
    """`data.examples` questions by the seed, and the mixture without them and their copies.

    Drawn from questions without images that are graded by rule, have one answer to show and are not held out; where rows have a worked
    solution, from those. A larger number adds to a smaller one.

    Args:
        read: what was read of each source, with its rows where a column of solutions is named.

    Raises:
        DataError: there are too few such questions, or no row has a solution though a column is named.
    """
    wanted = settings.data.examples
    if not wanted:
        return mixture, ()
    kept_out = set(map(question_key, held_out))
    columns = [part.columns.solution for part in settings.data.parts]
    able: list[Example] = []
    for question, (part, place) in zip(mixture.questions, mixture.places, strict=True):
        listed = isinstance(question.gold, Golds) and question.gold.how != "any"
        if not (question.images or listed or question.grading != RULE or question_key(question) in kept_out):
            rows = read[part].kept_rows
            able.append(Example(question, question.golds[0], _text(rows[place], columns[part]) if rows and columns[part] else ""))
    solved = [example for example in able if example.solution]
    if any(columns) and not solved:
        raise DataError(
            f"data.columns.solution is {next(filter(None, columns))!r}, and no training question that could be an example has a text "
            "there: mend the name, or leave it out, and examples show the answer alone"
        )
    drawn = sorted(solved or able, key=lambda example: draw_key(settings.seed, "examples", example.question.id))[:wanted]
    if len(drawn) < wanted:
        raise DataError(
            f"data.examples is {wanted}, and {len(drawn)} training questions can be shown as examples: questions without images, graded by "
            "rule, with one right answer, that are not held out; lower it"
        )
    shown = {question_key(example.question) for example in drawn}
    left = [i for i, question in enumerate(mixture.questions) if question_key(question) not in shown]
    if not left:
        raise DataError(f"data.examples is {wanted}, and no training question is left beside the examples; lower it")
    rest = replace(mixture, questions=[mixture.questions[i] for i in left], places=[mixture.places[i] for i in left])
    return rest, tuple(drawn)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = column_value(row, column)
    return value.strip() if isinstance(value, str) else ""


def example_turns(settings: Settings, examples: Sequence[Example], book: PromptBook, neutralise: Callable[[str], str]) -> list[Message]:
    """The turns of the examples: each question as it is asked, and a response in the form that is asked for.

    A worked solution stands in the thoughts where the closing instruction asks for some; it is given the answer where it has none that
    can be read.

    Args:
        book: the words of the prompts, without examples.
        neutralise: breaks special texts of the models; solutions are data.

    Raises:
        SettingsError: the answer of an example could not be read by `grading.answer_from`.
    """
    form, thinks = settings.answer_form, _TAGS[0] in book.text(CLOSING, {}) if examples else False
    turns: list[Message] = []
    for question, answer, solution in examples:
        written = form.written(answer)
        for tag in _TAGS:
            solution = solution.replace(tag, "")
        solution = neutralise(solution).strip()
        if solution and thinks:
            response = f"{_TAGS[0]}\n{solution}\n{_TAGS[1]}\n\n{written}"
        elif solution:
            response = solution if form.find(solution) is not None else f"{solution}\n{written}"
        else:
            response = written
        if form.find(response) is None:
            raise SettingsError(
                f"data.examples: no answer can be read from the example {question.id!r}, which ends {response[-60:]!r}, by "
                f"grading.answer_from ({form.place!r}): name a column of worked solutions in that form with data.columns.solution, or set "
                "data.examples to 0"
            )
        turns += [*(m for m in book.plain(question) if m.role != "system"), Message("assistant", response)]
    return turns
