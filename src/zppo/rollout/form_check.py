"""What share of a few completions has an answer that can be read, said before a run [zppo]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from zppo.core.draws import draw_key
from zppo.core.types import RULE, Question
from zppo.engines.base import SampleRequest
from zppo.grading.answer_form import AnswerForm
from zppo.rollout.student import StudentSampler

QUESTIONS = 6
TOKENS = 256
"""Of each completion at most: seconds on a CPU, of a small model."""
LOW = 0.5
_SHOWN = 80


class FormCheck(NamedTuple):
    """Of the completions that say something about the form, which are those that ended or have an answer.

    Attributes:
        read: how many have an answer that can be read.
        told: how many say something.
        cut: how many were cut off by the check and have none.
        limit: tokens after which they were cut off.
        ends: how one without an answer ends, "" where all have one.
    """

    read: int
    told: int
    cut: int
    limit: int
    ends: str

    @property
    def low(self) -> bool:
        """Whether few have one."""
        return self.told > 0 and self.read < LOW * self.told

    def text(self, form: AnswerForm) -> str:
        """For people, with the mend where few have one."""
        if not self.told:
            return (
                f"{self.cut} completions were looked at, and none came to an end within {self.limit} tokens: whether their answers can be "
                "read will show in the first steps"
            )
        head = f"{self.read} of {self.told} completions that were looked at have a {form.name}"
        head += f" ({self.cut} more did not come to an end within {self.limit} tokens)" if self.cut else ""
        if not self.low:
            return head
        return (
            f"warning: {head}. What has none counts as wrong, so that there is little to learn from; one ends {self.ends!r}. Ask for "
            "a form that the student keeps (prompts.closing: boxed, for models that do not think, answer-line, or a template of yours); "
            "show it with data.examples: 2; take an instruction-tuned student, or give a base model a student.template; or read the form "
            "that it has with grading.answer_from, or a function of yours (grading.reward)"
        )


def check_form(student: StudentSampler, questions: Sequence[Question], form: AnswerForm) -> FormCheck | None:
    """Samples one short completion of a few plain prompts; nothing is graded, and the draws are no step's.

    Args:
        student: its engine holds the weights.
        questions: those that are trained on; the check takes some that are graded by rule, drawn by the seed.

    Returns:
        None where there is no such question.
    """
    ruled = [question for question in questions if question.grading == RULE]
    some = [question for question in ruled if not question.images] or ruled
    drawn = sorted(some, key=lambda question: draw_key(student.seed, "form check", question.id))[:QUESTIONS]
    if not drawn:
        return None
    prompts = [student.renderer.plain(question) for question in drawn]
    limit = min(TOKENS, student.sampling.max_new_tokens)
    requests = [SampleRequest(p.ids, (draw_key(student.seed, "form check", p.question.id, 0),), p.images) for p in prompts]
    with student.whole():
        ended = sorted(student.engine.stream(requests, replace(student.sampling, max_new_tokens=limit)), key=lambda each: each[:2])
    texts = [student.renderer.chat.decode(tuple(completion.ids.tolist())) for _, _, completion in ended]
    found = form.find_many([(text, prompt.think_open) for text, prompt in zip(texts, prompts, strict=True)])
    # What the run itself would cut off has no answer there either.
    cut = [c.truncated and limit < student.sampling.max_new_tokens for _, _, c in ended]
    read = sum(answer is not None for answer, _ in found)
    unread = [(text, short) for text, (answer, _), short in zip(texts, found, cut, strict=True) if answer is None]
    lacking = [text for text, short in unread if not short]
    ends = " ".join((lacking or [""])[0].split())[-_SHOWN:]
    return FormCheck(read, read + len(lacking), len(unread) - len(lacking), limit, ends)
