"""Hints: the teacher turns one of its correct responses into a hint that does not give the answer away (Alg. 5)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from zppo.core.draws import draw_key, keyed_random
from zppo.core.parts import last_turn_images
from zppo.core.types import Question
from zppo.grading import normalise
from zppo.prompts import PromptBook
from zppo.step_log import StepLog
from zppo.teacher.compression import REDRAWS, Source, draw_order
from zppo.teacher.interface import Teacher, TeacherRequest, TeacherSampling


@dataclass(frozen=True, slots=True)
class HintRequest:
    """A hard question and the correct teacher responses that a hint may be made of."""

    question: Question
    responses: tuple[Source, ...]


HINT_COUNTS = ("hint_asked", "hint_failed", "hint_unreachable", "hint_completion_tokens")
"""What a step counts: responses sent, hints refused, requests without a reply, tokens."""


def accept_hint(reply: str, *golds: str) -> str | None:
    """The hint in a reply, or None where it may not be shown.

    The last complete `<hint>` block after the last `</think>` counts. It is refused where it is empty, has a box, or holds a gold
    as a word of its own, both normalised [zppo]; of several right answers each one.
    """
    text = reply.rsplit("</think>", 1)[-1]
    end = text.rfind("</hint>")
    start = text.rfind("<hint>", 0, max(end, 0))
    if start < 0:
        return None
    hint = text[start + len("<hint>") : end].strip()
    revealed = any(re.search(rf"(?<!\w){re.escape(normalise(gold))}(?!\w)", normalise(hint)) for gold in golds)
    return None if not hint or "\\boxed" in hint or revealed else hint


def make_hints(
    requests: Sequence[HintRequest], teacher: Teacher, book: PromptBook, how: TeacherSampling, *, seed: int, log: StepLog
) -> list[str | None]:
    """One hint per request, None where no response gave one.

    The teacher sees the question's last turn, the images in it and the response [zppo]. The response is drawn uniformly; one whose hint
    is refused is redrawn, up to 3 times, all open requests in one teacher call a round.
    """
    step = log.step
    options = [draw_order(r.responses, REDRAWS + 1, keyed_random(seed, step, r.question.id, "hint")) for r in requests]
    hints: list[str | None] = [None] * len(requests)
    for turn in range(REDRAWS + 1):
        still = [i for i, hint in enumerate(hints) if hint is None and turn < len(options[i])]
        if not still:
            break
        calls = [
            TeacherRequest(
                book.hinting(requests[i].question, options[i][turn].text),
                (draw_key(seed, step, requests[i].question.id, "hinting", turn),),
                last_turn_images(requests[i].question.messages, requests[i].question.images),
            )
            for i in still
        ]
        for i, reply in zip(still, teacher.complete(calls, how, log), strict=True):
            text = reply.texts[0]
            unfinished = text is not None and reply.think_open and "</think>" not in text
            hints[i] = None if text is None or unfinished else accept_hint(text, *requests[i].question.golds)
            log.note_error("teacher", reply.error)
            log.add(
                hint_asked=1,
                hint_failed=text is not None and hints[i] is None,
                hint_unreachable=text is None,
                hint_completion_tokens=reply.completion_tokens,
            )
    return hints
