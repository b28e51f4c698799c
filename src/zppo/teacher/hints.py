"""Hints: the teacher turns one of its correct responses into a hint that does not give the answer away (Alg. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zppo.core.draws import draw_key, keyed_random
from zppo.core.parts import last_turn_images
from zppo.core.types import Message, Question
from zppo.prompts import PromptBook
from zppo.step_log import StepLog
from zppo.teacher.compression import REDRAWS, Source, draw_order, echoes
from zppo.teacher.hint_leaks import gives_away
from zppo.teacher.interface import Teacher, TeacherReply, TeacherRequest, TeacherSampling


@dataclass(frozen=True, slots=True)
class HintRequest:
    """A hard question and the correct teacher responses that a hint may be made of."""

    question: Question
    responses: tuple[Source, ...]


HINT_COUNTS = ("hint_asked", "hint_failed", "hint_leaked", "hint_echoed", "hint_unreachable", "hint_completion_tokens")
"""What a step counts: responses sent; hints refused, those of them that gave the answer away, and that repeated the instructions; requests
without a reply; tokens."""
BY_GOLD = "hint_leaked of "
"""Before a right answer: the name under which a step counts the hints that gave it away."""
_GOLD_CHARACTERS = 40  # of a right answer in such a name


def read_hint(reply: str) -> str | None:
    """The last complete `<hint>` block after the last `</think>`; None where there is none, or an empty one."""
    text = reply.rsplit("</think>", 1)[-1]
    end = text.rfind("</hint>")
    start = text.rfind("<hint>", 0, max(end, 0))
    return (text[start + len("<hint>") : end].strip() or None) if start >= 0 else None


def accept_hint(reply: str, *golds: str, question: str = "") -> str | None:
    """The hint in a reply, or None where it may not be shown: it has no form, or gives one of the right answers away (`hint_leaks`)."""
    hint = read_hint(reply)
    return None if hint is None or gives_away(hint, *golds, question=question) else hint


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
    instructions = book.hinting(Question("", (Message("user", ""),), ""), "")[-1].content
    for turn in range(REDRAWS + 1):
        still = [i for i, hint in enumerate(hints) if hint is None and turn < len(options[i])]
        if not still:
            break
        keys = [draw_key(seed, step, requests[i].question.id, "hinting", turn) for i in still]
        calls = [_call(book, requests[i].question, options[i][turn].text, key) for i, key in zip(still, keys, strict=True)]
        for i, reply in zip(still, teacher.complete(calls, how, log), strict=True):
            text = reply.texts[0]
            question = requests[i].question
            hint = _hint_in(reply, text)
            leaked = hint is not None and gives_away(hint, *question.golds, question="\n".join(m.content for m in question.messages))
            echoed = hint is not None and echoes([line.strip() for line in hint.splitlines() if line.strip()], instructions)
            hints[i] = None if leaked or echoed else hint
            log.note_error("teacher", reply.error)
            log.add(
                hint_asked=1,
                hint_failed=text is not None and hints[i] is None,
                hint_leaked=leaked,
                hint_echoed=echoed,
                hint_unreachable=text is None,
                hint_completion_tokens=reply.completion_tokens,
            )
            if leaked:
                log.add(**{BY_GOLD + " ".join(str(question.gold).split())[:_GOLD_CHARACTERS]: 1})
    return hints


def hint_trial(question: Question, teacher: Teacher, book: PromptBook, how: TeacherSampling, seed: int) -> str:
    """Asks a teacher for a hint before a run, as often as a question may ask for one; why there is none, "" where one came [zppo].

    A small model may never have seen such a request. Then no question is asked again, and a comparison is one of a method with itself.
    """
    response = book.stated(question.golds[0])
    keys = [draw_key(seed, question.id, "hint trial", turn) for turn in range(REDRAWS + 1)]
    (reply,) = teacher.complete([_call(book, question, response, *keys)], how)
    texts = [text for text in reply.texts if text is not None]
    if not texts:
        return f"no reply came ({reply.error})"
    if any(_hint_in(reply, text) is not None for text in texts):
        return ""
    begins = " ".join(texts[0].split())
    return f"{len(texts)} of {len(texts)} replies have no <hint> in them; the first one begins {begins[:60]!r}"


def _call(book: PromptBook, question: Question, response: str, *keys: int) -> TeacherRequest:
    return TeacherRequest(book.hinting(question, response), keys, last_turn_images(question.messages, question.images))


def _hint_in(reply: TeacherReply, text: str | None) -> str | None:
    """The hint in one text of a reply; thoughts that have not come to an end hold none."""
    unfinished = text is not None and reply.think_open and "</think>" not in text
    return None if text is None or unfinished else read_hint(text)
