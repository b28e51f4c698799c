"""The LLM judge: a frozen model compares a free-form completion with the gold and returns a strict verdict (method.md section 7).

Pure but for the one call of the model: which texts it reads, what counts as a verdict, and what was counted. Who asks is above.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

from zppo.core.draws import draw_key
from zppo.core.types import Question
from zppo.grading.text import final_part
from zppo.prompts import PromptBook
from zppo.step_log import StepLog
from zppo.teacher.interface import Teacher, TeacherReply, TeacherRequest, TeacherSampling

Outcome = Literal["correct", "wrong", "malformed", "unreachable"]

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
_WORDS = {"correct": True, "wrong": False}
_LONGEST = 200  # characters: a verdict has about 22, its fence 12; nothing long or deep is ever parsed


class Case(NamedTuple):
    """What is put before the judge. Equal cases are judged once.

    Attributes:
        question: with its gold.
        response: the part of a completion that the judge reads; see `readable`.
    """

    question: Question
    response: str


JUDGE_COUNTS = tuple(f"judge_{name}" for name in ("asked", "correct", "malformed", "unreachable", "prompt_tokens", "completion_tokens"))
"""What a step counts: cases sent to the judge; of these, judged correct, replies that were no verdict (they count as wrong), and cases
for which no reply came (they are ungraded); tokens as far as the judge's model reports them."""


def readable(completion: str, answer: str | None, think_open: bool = False) -> str:
    """What the judge reads of a completion: where it names a final answer, what follows the thinking; else all of it [zppo].

    Args:
        completion: the model's text.
        answer: what was extracted from it, None where it has no final answer that can be parsed.
        think_open: whether the prompt already ended inside an opened think block.
    """
    part = None if answer is None else final_part(completion, think_open)
    return (completion if part is None else part).strip()


def strict_object(reply: str, think_open: bool = False) -> tuple[tuple[str, object], ...] | None:
    """The (key, value) pairs of a reply that is one flat JSON object and nothing else; None for any other reply.

    [zppo] Three things around it are let pass, because chat models add them unasked: white space, one code fence around the whole, and a
    think block that was closed before it.
    """
    if think_open and "</think>" not in reply:
        return None
    text = reply.rsplit("</think>", 1)[-1].strip()
    if len(text) > _LONGEST:
        return None
    fenced = _FENCE.fullmatch(text)
    text = fenced[1].strip() if fenced else text
    if not text.startswith("{"):
        return None
    try:
        return cast(tuple[tuple[str, object], ...], json.loads(text, object_pairs_hook=tuple))
    except (ValueError, RecursionError):
        return None


def parse_verdict(reply: str, think_open: bool = False) -> bool | None:
    """Whether the judge says correct; None for a malformed verdict.

    The reply must be exactly the object {"verdict": "correct"} or {"verdict": "wrong"}: no other key, no key twice, no other
    spelling, no word next to it.
    """
    pairs = strict_object(reply, think_open)
    return next((verdict for word, verdict in _WORDS.items() if pairs == (("verdict", word),)), None)


class Judge:
    """Puts cases before a model, each distinct one once a step, and all that are new in one call."""

    def __init__(self, model: Teacher, book: PromptBook, how: TeacherSampling, cap: Callable[[str], str], *, seed: int = 0) -> None:
        """Sets how to judge.

        Args:
            model: in process or remote.
            book: renders the request; it should neutralise the model's special texts.
            how: sampling and chat-template arguments.
            cap: cuts a response to what the judge reads; see `zppo.teacher.compression.token_tail`.
            seed: keys the draws, which matter at a temperature above 0.
        """
        self._model, self._book, self._how, self._cap, self._seed = model, book, how, cap, seed

    def decide(self, cases: Sequence[Case], log: StepLog) -> list[Outcome]:
        """One outcome per case; one that the step has judged already is not asked about again.

        Verdicts are the step's, so that a resumed run asks what the uninterrupted one asked. An unreachable judge is not remembered: the
        case is asked about again when it comes again.
        """
        known = log.known("verdicts")
        new = [case for case in dict.fromkeys(cases) if case not in known]
        log.add_own(**dict.fromkeys(JUDGE_COUNTS, 0.0))
        replies = self._model.complete([self._request(case) for case in new], self._how, log) if new else []
        outcomes = {case: self._outcome(reply, log) for case, reply in zip(new, replies, strict=True)}
        known.update((case, outcome) for case, outcome in outcomes.items() if outcome != "unreachable")
        return [known[case] if case in known else outcomes[case] for case in cases]

    def _request(self, case: Case) -> TeacherRequest:
        """The draw is keyed by the case, so that equal ones are judged alike in every step."""
        asked = "\n\n".join(m.content for m in case.question.messages if m.role != "system")
        messages = self._book.judge(asked, str(case.question.gold), self._cap(case.response))
        return TeacherRequest(messages, (draw_key(self._seed, "judge", case.question.id, case.response),))

    def _outcome(self, reply: TeacherReply, log: StepLog) -> Outcome:
        """Reads one reply and counts it."""
        text = reply.texts[0] if reply.texts else None
        verdict = None if text is None else parse_verdict(text, reply.think_open)
        log.add_own(
            judge_asked=1,
            judge_correct=verdict is True,
            judge_malformed=text is not None and verdict is None,
            judge_unreachable=text is None,
            judge_prompt_tokens=reply.prompt_tokens,
            judge_completion_tokens=reply.completion_tokens,
        )
        log.note_error("judge", reply.error)
        if text is None:
            return "unreachable"
        return "malformed" if verdict is None else "correct" if verdict else "wrong"
