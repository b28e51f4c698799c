"""Teacher rollouts: T_x, the correct ones of G_T fresh responses per question (Alg. 1, l. 4; Algs. 2, 5 and 6)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from zppo.core.draws import draw_key
from zppo.core.types import Message, Question
from zppo.engines.chat import THINK_CLOSE, THINK_OPEN, Chat
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.student import Answered, PromptRenderer, Score
from zppo.teacher.base import Teacher, TeacherReply, TeacherRequest, TeacherSampling
from zppo.teacher.compression import Source

Pools = dict[str, tuple[Source, ...]]
"""T_x by question id: correct teacher responses, in the order of teachers and draws."""


class TimedTeacher:
    """A teacher that knows how long it was waited for.

    Attributes:
        seconds: what has been waited since somebody set it to 0.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.seconds = 0.0

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling) -> list[TeacherReply]:
        """Replies in the order of the requests."""
        began = time.perf_counter()
        try:
            return self._teacher.complete(requests, how)
        finally:
            self.seconds += time.perf_counter() - began


@dataclass(slots=True)
class _Counts:
    """What a step asked for and got."""

    questions: int = 0
    rollouts: int = 0
    correct: int = 0
    unreachable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    solved_none: int = 0


class TeacherSampler:
    """Asks the teachers about questions and grades what they say by the student's own reward.

    Args:
        teachers: the frozen teachers with their sampling; usually one. The pool of several is what all of them got right [zppo].
        renderer, score: the words of the plain prompt; the reward.
        group_size: G_T, responses per teacher and question.
        seed: keys every draw by (seed, step, question id, index).
    """

    def __init__(
        self,
        teachers: Sequence[tuple[Teacher, TeacherSampling]],
        renderer: PromptRenderer,
        score: Score,
        *,
        group_size: int,
        seed: int,
    ) -> None:
        self.teachers, self.renderer, self.score = tuple(teachers), renderer, score
        self.group_size, self.seed = group_size, seed
        self.new_step()

    def new_step(self) -> None:
        """Forget what was counted."""
        self._counts = _Counts()
        self.error = ""  # why a request was not served, the last such reason

    def metrics(self) -> dict[str, float | None]:
        """Counts since `new_step`, named teacher_*."""
        return {f"teacher_{name}": float(value) for name, value in asdict(self._counts).items()}

    def ask(self, questions: Sequence[Question], step: int) -> Pools:
        """Correct responses per question; an empty pool where no teacher was right, or none could be reached."""
        found: dict[str, list[Source]] = {q.id: [] for q in questions}
        for number, (teacher, how) in enumerate(self.teachers if questions else ()):
            first = number * self.group_size
            for question_id, source in self._ask_one(teacher, how, questions, step, first):
                found[question_id].append(source)
        self._counts.questions += len(questions)
        self._counts.solved_none += sum(not sources for sources in found.values())
        return {question_id: tuple(sources) for question_id, sources in found.items()}

    def _ask_one(
        self, teacher: Teacher, how: TeacherSampling, questions: Sequence[Question], step: int, first: int
    ) -> list[tuple[str, Source]]:
        indices = range(first, first + self.group_size)
        requests = [
            TeacherRequest(
                self.renderer.book.plain(q),
                tuple(draw_key(self.seed, "teacher", step, q.id, i) for i in indices),
                q.images,
            )
            for q in questions
        ]
        replies = teacher.complete(requests, how)
        answered = [
            (index, Answered(question, text, reply.think_open))
            for question, reply in zip(questions, replies, strict=True)
            for index, text in zip(indices, reply.texts, strict=True)
            if text is not None
        ]
        verdicts = self.score([a for _, a in answered])
        correct = [
            (a.question.id, Source(a.completion, verdict.answer, index, verdict.reward, a.think_open))
            for (index, a), verdict in zip(answered, verdicts, strict=True)
            if verdict.graded and verdict.correct
        ]
        self.error = next((r.error for r in replies if r.error), self.error)
        self._counts.rollouts += len(answered)
        self._counts.correct += len(correct)
        self._counts.unreachable += sum(text is None for reply in replies for text in reply.texts)
        self._counts.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
        self._counts.completion_tokens += sum(reply.completion_tokens for reply in replies)
        return correct


class ResponseTokens:
    """A teacher response in the student's tokens: control tokens in its text are broken up, think tags stay.

    Where one of the two chat templates opens the think block in the prompt and the other does not, the opening or closing tag is
    added, so that the text stands rightly behind the student's prompt [zppo].
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.neutralise = Neutraliser(set(chat.special_texts) - {THINK_OPEN, THINK_CLOSE}, tags=())
        self.think_open = chat.think_open(chat.encode([Message("user", "1 + 1 = ?")]))

    def __call__(self, source: Source) -> tuple[int, ...]:
        text = self.neutralise(source.text)
        if source.think_open and not self.think_open:
            text = f"{THINK_OPEN}\n{text}"
        elif self.think_open and not source.think_open:
            thought = text.lstrip().startswith(THINK_OPEN)
            text = text.lstrip().removeprefix(THINK_OPEN) if thought else f"{THINK_CLOSE}\n\n{text}"
        return tuple(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"])
