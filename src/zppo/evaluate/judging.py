"""What a judge is asked about a row that the rules leave open, and how its reply is read. Who sends the request is above.

The words are ours (`prompts/eval_*.jinja`); a benchmark's official ones can be given by path. Figures from ours are no leaderboard figures.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from zppo.core.types import IMAGE, Message
from zppo.evaluate.benchmark import Benchmark, Judge
from zppo.evaluate.item import Item
from zppo.evaluate.replies import read_reply
from zppo.grading.text import extract_boxed, final_part
from zppo.prompts import PromptBook
from zppo.prompts.book import JUDGE
from zppo.teacher.judge import readable

_SLOTS = ("question", "gold", "response", "criterion")
_MOST = 20_000  # characters of a response that a judge reads, its end; more is no answer


def judge_book(
    overrides: Mapping[str, str | Path] | None = None, neutralise: Callable[[str], str] = lambda text: text
) -> PromptBook:
    """The prompt book with the judges' templates, each replaceable by the path of a file.

    A template may use `question`, `gold`, `response` and `criterion` (the last: MultiChallenge's target question); the shared one,
    `judge`, has its own variables (`zppo.prompts.book`).

    Raises:
        TemplateError: a file cannot be read, or uses another variable.
    """
    folder = Path(str(importlib.resources.files("zppo.evaluate"))) / "prompts"
    names = [name for name in get_args(Judge) if name != JUDGE]
    book = PromptBook({name: folder / f"{name}.jinja" for name in names} | dict(overrides or {}), neutralise)
    for name in names:  # a mistake shows now, not after the model was asked everything
        book.text(name, dict.fromkeys(_SLOTS, ""))
    return book


def judge_request(
    benchmark: Benchmark, item: Item, completion: str, book: PromptBook, think_open: bool = False
) -> tuple[Message, ...]:
    """The request to judge one completion.

    A benchmark's own judge reads what follows the thinking; the shared one reads all of a completion without a boxed answer
    (`zppo.teacher.judge.readable`). At most the last 20,000 characters of it.
    """
    gold = " or ".join(item.golds)
    asked = (item.asked.replace(IMAGE, "") if item.images else item.asked).strip()
    if benchmark.judge == JUDGE:
        response = readable(completion, extract_boxed(completion, think_open), think_open)
        return book.judge(asked, gold, response[-_MOST:])
    response = (final_part(completion, think_open) or "").strip()[-_MOST:]
    values = {"question": asked, "gold": gold, "response": response, "criterion": str(item.facts.get("criterion", ""))}
    return (Message("user", book.text(benchmark.judge, values)),)


def judge_score(benchmark: Benchmark, item: Item, reply: str, think_open: bool = False) -> float | None:
    """The score in a judge's reply, 0 to 1; None where the reply is malformed, which is an error of the judge, not of the model.

    Forms: `zppo.evaluate.replies`. MultiChallenge: the judge says yes or no, which is right if it is what the row wants.
    """
    value = read_reply(benchmark.judge, reply, think_open)
    if benchmark.judge == "eval_multichallenge" and value is not None:
        return float((value == 1.0) == (item.golds[0] == "yes"))
    return value
