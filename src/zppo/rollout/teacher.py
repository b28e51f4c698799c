"""Teacher rollouts: T_x, the correct ones of G_T fresh responses per question (Alg. 1, l. 4; Algs. 2, 5 and 6)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from zppo.config.settings import Settings
from zppo.core.draws import draw_key
from zppo.core.minibatch import shares
from zppo.core.types import Message, Question
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.chat import THINK_CLOSE, THINK_OPEN, Chat
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.student import Answered, PromptRenderer, Score
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.teacher.interface import Teacher, TeacherReply, TeacherRequest, TeacherSampling

Pools = dict[str, tuple[Source, ...]]
"""T_x by question id: correct teacher responses, in the order of teachers and draws."""


TEACHER_COUNTS = (
    "teacher_questions",
    "teacher_rollouts",
    "teacher_correct",
    "teacher_unreachable",
    "teacher_prompt_tokens",
    "teacher_completion_tokens",
    "teacher_solved_none",
)
"""What a step counts: questions asked about, replies, correct ones, missing ones, tokens, questions without a correct reply."""


class SharedTeacher:
    """A teacher whose requests are dealt out to the processes; it counts how long it was waited for.

    With `ahead` requests may be begun before the step asks: it then finds their replies. A request holds the keys of its draws, so that it
    is the same one whoever begins it, and what was begun in vain changes nothing but what it took.

    Args:
        ahead: requests may be begun; the same in all processes.
    """

    def __init__(self, teacher: Teacher, processes: Processes = ONE_PROCESS, *, ahead: bool = False) -> None:
        self.teacher, self.processes = teacher, processes
        self.ahead = ahead and isinstance(teacher, BeginsRequests)
        self._begun: dict[TeacherRequest, Future[TeacherReply]] = {}

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        """Replies in the order of the requests."""
        began = time.perf_counter()
        costs = [float(len(request.keys)) for request in requests]
        holders = self._holders(requests)
        with self.processes.deal(costs) as deal:
            if holders:  # a process serves what it has begun, and its share of the rest
                rest = [i for i in range(len(requests)) if i not in holders]
                share = shares([costs[i] for i in rest], self.processes.size)[self.processes.rank]
                deal.mine = sorted([*(i for i, rank in holders.items() if rank == self.processes.rank), *(rest[j] for j in share)])
            deal.done = self._serve([requests[i] for i in deal.mine], how, log)
        if log is not None:
            log.add(teacher_wait_seconds=time.perf_counter() - began)
        return list(deal.results)

    def begin(self, request: TeacherRequest, how: TeacherSampling) -> None:
        """Asks for what `complete` will be asked for; nothing where that is under way, or cannot be done."""
        if self.ahead and request not in self._begun:
            assert isinstance(self.teacher, BeginsRequests)
            self._begun[request] = self.teacher.begin(request, how)

    def break_off(self, request: TeacherRequest, log: StepLog) -> None:
        """Ends a request that was begun and counts it; a reply that is there is kept. What an unfinished one took no server says."""
        future = self._begun.get(request)
        if future is not None and future.cancel():
            del self._begun[request]
            log.add_own(teacher_broken_off=1.0)

    def forget(self, log: StepLog) -> None:
        """The step has all that it needs: what was begun ends, and the tokens of replies that nobody wanted are counted."""
        for request in list(self._begun):
            self.break_off(request, log)
        for future in self._begun.values():
            if future.exception() is None:
                reply = future.result()
                log.add_own(teacher_unused_prompt_tokens=reply.prompt_tokens, teacher_unused_tokens=reply.completion_tokens)
        self._begun = {}

    def _holders(self, requests: Sequence[TeacherRequest]) -> dict[int, int]:
        """By place of a request the process that has begun it."""
        if not self.ahead:
            return {}
        held = self.processes.gather([i for i, request in enumerate(requests) if request in self._begun])
        return {i: rank for rank, places in reversed(list(enumerate(held))) for i in places}

    def _serve(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None) -> list[TeacherReply]:
        begun = {i: self._begun.pop(request) for i, request in enumerate(requests) if request in self._begun}
        if not begun:
            return self.teacher.complete(requests, how, log)
        try:
            found = self._ask([i for i in range(len(requests)) if i not in begun], requests, how, log)
            early = {i: future.result() for i, future in begun.items()}
        except BaseException:  # a signal: nobody waits for them any more
            for future in begun.values():
                future.cancel()
            raise
        # Where nothing came, the teacher may have been down and be back.
        missed = [i for i, reply in early.items() if all(text is None for text in reply.texts)]
        found |= early | (self._ask(missed, requests, how, log) if missed else {})
        return [found[i] for i in range(len(requests))]

    def _ask(
        self, places: Sequence[int], requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None
    ) -> dict[int, TeacherReply]:
        """Replies of the teacher itself, by place."""
        return dict(zip(places, self.teacher.complete([requests[i] for i in places], how, log), strict=True))


@runtime_checkable
class BeginsRequests(Protocol):
    """A teacher that serves requests while the student samples: one on a server."""

    def begin(self, request: TeacherRequest, how: TeacherSampling) -> Future[TeacherReply]:
        """The reply, when it is there; cancelling it ends the request."""
        ...


class TeacherSampler:
    """Asks the teachers about questions and grades what they say by the student's own reward.

    Args:
        teachers: the frozen teachers with their sampling; usually one. The pool of several is the union of their correct responses [zppo].
        renderer, score: the words of the plain prompt; the reward.
        group_size: G_T, responses per teacher and question.
        seed: keys every draw by (seed, step, question id, index).
        processes: those that share the grading out.
    """

    def __init__(
        self,
        teachers: Sequence[tuple[Teacher, TeacherSampling]],
        renderer: PromptRenderer,
        score: Score,
        *,
        group_size: int,
        seed: int,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self.teachers, self.renderer, self.score = tuple(teachers), renderer, score
        self.group_size, self.seed, self.processes = group_size, seed, processes

    def ask(self, questions: Sequence[Question], log: StepLog) -> Pools:
        """Correct responses per question; an empty pool where no teacher was right, or none could be reached."""
        found: dict[str, list[Source]] = {q.id: [] for q in questions}
        for number, (teacher, how) in enumerate(self.teachers):
            first = number * self.group_size
            for question_id, source in self._ask_one(teacher, how, questions, log, first):
                found[question_id].append(source)
        log.add(teacher_questions=len(questions), teacher_solved_none=sum(not sources for sources in found.values()))
        return {question_id: tuple(sources) for question_id, sources in found.items()}

    def _ask_one(
        self, teacher: Teacher, how: TeacherSampling, questions: Sequence[Question], log: StepLog, first: int
    ) -> list[tuple[str, Source]]:
        """(question id, response) of the correct ones of G_T responses of one teacher, numbered from `first`."""
        indices = range(first, first + self.group_size)
        requests = [self._request(q, indices, log.step) for q in questions]
        replies = teacher.complete(requests, how, log)
        answered = [
            (index, Answered(question, text, reply.think_open, "teacher"))
            for question, reply in zip(questions, replies, strict=True)
            for index, text in zip(indices, reply.texts, strict=True)
            if text is not None
        ]
        with self.processes.deal([1.0] * len(answered)) as deal:
            deal.done = self.score([answered[i][1] for i in deal.mine], log)
        correct = [
            (a.question.id, Source(a.completion, verdict.answer, index, verdict.reward, a.think_open))
            for (index, a), verdict in zip(answered, deal.results, strict=True)
            if verdict.graded and verdict.correct
        ]
        for reply in replies:
            log.note_error("teacher", reply.error)
        log.add(
            teacher_rollouts=len(answered),
            teacher_correct=len(correct),
            teacher_unreachable=sum(text is None for reply in replies for text in reply.texts),
            teacher_prompt_tokens=sum(reply.prompt_tokens for reply in replies),
            teacher_completion_tokens=sum(reply.completion_tokens for reply in replies),
        )
        return correct

    def requests(self, question: Question, step: int) -> list[tuple[SharedTeacher, TeacherRequest, TeacherSampling]]:
        """What `ask` will ask of each teacher about a question, for who asks ahead of it."""
        firsts = (number * self.group_size for number in range(len(self.teachers)))
        return [
            (teacher, self._request(question, range(first, first + self.group_size), step), how)
            for (teacher, how), first in zip(self.teachers, firsts, strict=True)
            if isinstance(teacher, SharedTeacher)
        ]

    def _request(self, question: Question, indices: range, step: int) -> TeacherRequest:
        keys = tuple(draw_key(self.seed, "teacher", step, question.id, i) for i in indices)
        return TeacherRequest(self.renderer.book.plain(question), keys, question.images)


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


def make_teacher_sampler(
    settings: Settings, teachers: Sequence[Teacher], renderer: PromptRenderer, score: Score, processes: Processes
) -> TeacherSampler:
    """Who asks the teachers of a recipe."""
    own = [t for t in (settings.teacher, *settings.more_teachers) if t is not None]
    return TeacherSampler(
        [(teacher, t.how(t.rollout)) for teacher, t in zip(teachers, own, strict=False)],
        renderer,
        score,
        group_size=settings.zone.teacher_group_size,
        seed=settings.seed,
        processes=processes,
    )
