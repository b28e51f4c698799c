"""Language benchmarks with a judge of their own: Humanity's Last Exam and MultiChallenge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

from zppo.core.types import Message
from zppo.evaluate.adapters.row import Row
from zppo.evaluate.adapters.words import ask
from zppo.evaluate.item import Item

_ROLES = ("system", "user", "assistant")


def hle(row: Row) -> tuple[Item, ...]:
    """Humanity's Last Exam, with its picture where a question has one; options are part of the question's text."""
    images = (row.image("image"),) if row.has("image") else ()
    messages = ask(row, row.text("question"), len(images))
    facts = {name: row.maybe(name) for name in ("answer_type", "category", "raw_subject")}
    return (Item(row.text("id"), row.benchmark, messages, row.text("answer"), "judged", images, facts=facts),)


def multichallenge(row: Row) -> tuple[Item, ...]:
    """MultiChallenge: the conversation so far; the judge answers the target question, and the gold is what it should say."""
    turns = tuple(_turn(row, turn) for turn in row.items("conversation", "CONVERSATION"))
    if turns[-1].role != "user":
        row.fail("conversation", f"ends with a turn of the {turns[-1].role}; the user's is expected")
    gold = row.text("pass_criteria", "PASS_CRITERIA").strip(". ").lower()
    if gold not in ("yes", "no"):
        row.fail("pass_criteria", f"is {gold[:40]!r}; YES or NO is expected")
    facts = {"axis": row.maybe("axis", "AXIS"), "criterion": row.text("target_question", "TARGET_QUESTION")}
    return (Item(row.text("question_id", "QUESTION_ID"), row.benchmark, turns, gold, "criterion", facts=facts),)


def _turn(row: Row, turn: object) -> Message:
    if not isinstance(turn, Mapping):
        row.fail("conversation", "holds something that is no {role, content}")
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES or not isinstance(content, str) or not content.strip():
        row.fail(
            "conversation",
            f"holds a turn with the role {role!r:.40} that cannot be shown: {', '.join(_ROLES)} and a text are expected",
        )
    return Message(cast(Literal["system", "user", "assistant"], role), content)
