"""Student rollouts: prompts -> token ids -> completions -> verdicts -> groups (Alg. 1, l. 2 and 16)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue

from zppo.core.draws import draw_key
from zppo.core.types import PLAIN, Draft, Group, Message, Prompt, Question, Rollout
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Completion, Engine, SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.errors import DataError
from zppo.grading.grader import Verdict
from zppo.prompts.book import PromptBook


@dataclass(frozen=True, slots=True)
class Answered:
    """A completion that waits for its verdict."""

    question: Question
    completion: str
    think_open: bool


Score = Callable[[Sequence[Answered]], list[Verdict]]
"""Grades completions, in their order: the rule grader, or a user's reward function."""

_Ended = tuple[int, int, Completion]  # the prompt's place, the rollout's place in its group, what was sampled


@dataclass(frozen=True, slots=True)
class PromptRenderer:
    """How questions become the student's prompts: the words and the chat template. DataError, with its id, for one that cannot."""

    book: PromptBook
    chat: Chat

    def plain(self, question: Question) -> Prompt:
        """The question with the closing instruction."""
        return self._prompt(PLAIN, question, self.book.plain(question))

    def reformulated(self, draft: Draft) -> Prompt:
        """The prompt of a draft."""
        prompt = self._prompt(draft.kind, draft.question, self.book.render(draft))
        return Prompt(
            prompt.kind,
            prompt.question,
            prompt.messages,
            prompt.ids,
            prompt.think_open,
            prompt.images,
            draft.forced_ids,
            draft.audit,
        )

    def _prompt(self, kind: str, question: Question, messages: tuple[Message, ...]) -> Prompt:
        try:
            ids = self.chat.encode(messages, question.images)
        except DataError as error:
            raise DataError(f"question {question.id!r}: {error}") from error
        return Prompt(kind, question, messages, ids, self.chat.think_open(ids), question.images)


@dataclass(frozen=True, slots=True)
class StudentSampler:
    """Samples and grades groups of student rollouts.

    Attributes:
        engine, renderer, score: the student, its words, its grading.
        sampling: how tokens are drawn.
        group_size: G_S.
        seed: keys the draw of every rollout by (seed, step, question id, kind, index).
        processes: the processes that share the groups out; each samples and grades whole groups, and all get all of them.
        whole: inside it the engine has all weights.
        beside: grade in a thread of its own while other rollouts are sampled, where the engine hands them over as they end.
    """

    engine: Engine
    renderer: PromptRenderer
    score: Score
    sampling: Sampling
    group_size: int
    seed: int
    processes: Processes = ONE_PROCESS
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    beside: bool = False

    def roll(self, prompts: Sequence[Prompt], step: int, *, purpose: str = "rollout") -> list[Group]:
        """One group per prompt, in order.

        Args:
            purpose: keeps the draws of evaluation apart from those of training.
        """
        if not prompts:
            return []

        def work(mine: Sequence[Prompt]) -> list[tuple[Rollout, ...]]:
            return self._rollouts(mine, step, purpose)

        with self.whole():
            rolled = self.processes.map(prompts, work, lambda p: float(len(p.ids) + self.sampling.max_new_tokens))
        return [Group(prompt, rollouts) for prompt, rollouts in zip(prompts, rolled, strict=True)]

    def _rollouts(self, prompts: Sequence[Prompt], step: int, purpose: str) -> list[tuple[Rollout, ...]]:
        """Of this process's prompts, in order."""
        requests = [
            SampleRequest(
                p.ids + p.forced_ids,
                tuple(draw_key(self.seed, purpose, step, p.question.id, p.kind, i) for i in range(self.group_size)),
                p.images,
            )
            for p in prompts
        ]
        done: dict[tuple[int, int], Rollout] = {}

        def grade(ended: Sequence[_Ended]) -> None:
            for (i, j, _), rollout in zip(ended, self._graded(prompts, ended), strict=True):
                done[i, j] = rollout

        if self.beside:
            self._sample_and_grade(requests, grade)
        else:
            grade(_all_of(self.engine.sample(requests, self.sampling)))
        return [tuple(done[i, j] for j in range(self.group_size)) for i in range(len(prompts))]

    def _sample_and_grade(self, requests: Sequence[SampleRequest], grade: Callable[[Sequence[_Ended]], None]) -> None:
        """Has the rollouts graded in a thread as they end; those that the engine does not hand over, when all have ended."""
        given: set[tuple[int, int]] = set()
        waiting: SimpleQueue[_Ended] = SimpleQueue()
        jobs: deque[Future[None]] = deque()

        def work() -> None:
            # One call for all that has ended by now: a grader compares its rows at the same time.
            if ended := [waiting.get_nowait() for _ in range(waiting.qsize())]:
                grade(ended)

        def put(ended: _Ended) -> None:
            while jobs and jobs[0].done():
                jobs.popleft().result()  # an error in grading ends the sampling
            waiting.put(ended)
            jobs.append(pool.submit(work))

        def finished(request: int, key: int, completion: Completion) -> None:
            given.add((request, key))
            put((request, key, completion))

        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grading")
        try:
            for i, j, completion in _all_of(self.engine.sample(requests, self.sampling, finished)):
                if (i, j) not in given:
                    put((i, j, completion))
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(
                wait=False, cancel_futures=True
            )  # what goes wrong here is not held up by what is being graded

    def _graded(self, prompts: Sequence[Prompt], ended: Sequence[_Ended]) -> list[Rollout]:
        decode = self.renderer.chat.decode
        texts = [decode(prompts[i].forced_ids + tuple(c.ids.tolist())) for i, _, c in ended]
        answered = [
            Answered(prompts[i].question, text, prompts[i].think_open)
            for (i, _, _), text in zip(ended, texts, strict=True)
        ]
        verdicts = self.score(answered)
        return [_rollout(c, text, verdict) for (_, _, c), text, verdict in zip(ended, texts, verdicts, strict=True)]


def _all_of(completions: Sequence[Sequence[Completion]]) -> list[_Ended]:
    return [(i, j, completion) for i, row in enumerate(completions) for j, completion in enumerate(row)]


def _rollout(completion: Completion, text: str, verdict: Verdict) -> Rollout:
    return Rollout(
        ids=completion.ids,
        logprobs=completion.logprobs,
        text=text,
        answer=verdict.answer,
        correct=verdict.correct,
        reward=verdict.reward,
        truncated=completion.truncated,
        graded=verdict.graded,
        reason=verdict.reason,
        entropy=completion.entropy,
    )
