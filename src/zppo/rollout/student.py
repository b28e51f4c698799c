"""Student rollouts: prompts -> token ids -> completions -> verdicts -> groups (Alg. 1, l. 2 and 16)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from zppo.core.draws import draw_key
from zppo.core.types import PLAIN, Draft, Group, Message, Prompt, Question, Rollout
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Ended, Engine, SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.errors import DataError
from zppo.grading.grader import Verdict
from zppo.prompts.book import PromptBook
from zppo.step_log import StepLog


@dataclass(frozen=True, slots=True)
class Answered:
    """A completion that waits for its verdict.

    `kind` is that of its prompt: completions of one kind about one question are a group, whose answers share the time for grading.
    `ids` are its tokens, where the student wrote it.
    """

    question: Question
    completion: str
    think_open: bool
    kind: str = ""
    ids: tuple[int, ...] = ()


class Watches(Protocol):
    """What is told of the plain rollouts of a step while they are sampled."""

    def begin(self, prompts: Sequence[Prompt], log: StepLog) -> None:
        """These are about to be sampled, by this process."""
        ...

    def ended(self, prompt: Prompt, place: int, rollout: Rollout) -> None:
        """One has ended and is graded. Called in any thread."""
        ...


Score = Callable[[Sequence[Answered], StepLog], list[Verdict]]
"""Grades completions, in their order, and counts what that took: by rule, by a user's reward function, by a judge."""


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
            prompt.kind, prompt.question, prompt.messages, prompt.ids, prompt.think_open, prompt.images, draft.forced_ids, draft.audit
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
        grades_while_sampling: grade rollouts that have ended in a thread while others are sampled.
        watch: told of plain rollouts in training; None where nobody asks ahead.
    """

    engine: Engine
    renderer: PromptRenderer
    score: Score
    sampling: Sampling
    group_size: int
    seed: int
    processes: Processes = ONE_PROCESS
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    grades_while_sampling: bool = False
    watch: Watches | None = None

    def rollout(self, prompts: Sequence[Prompt], log: StepLog, *, purpose: str = "rollout") -> list[Group]:
        """One group of G_S graded rollouts per prompt, in order (Alg. 1, l. 2 and 16).

        Args:
            purpose: keeps the draws of evaluation apart from those of training.
        """
        if not prompts:
            return []
        costs = [float(len(p.ids) + self.sampling.max_new_tokens) for p in prompts]
        with log.time("sampling"), self.whole(), self.processes.deal(costs) as deal:
            deal.done = self._rollouts([prompts[i] for i in deal.mine], log, purpose)
        return [Group(prompt, rollouts) for prompt, rollouts in zip(prompts, deal.results, strict=True)]

    def _rollouts(self, prompts: Sequence[Prompt], log: StepLog, purpose: str) -> list[tuple[Rollout, ...]]:
        """Of this process's prompts, in order."""
        if not prompts:
            return []
        requests = [
            SampleRequest(
                p.ids + p.forced_ids,
                tuple(draw_key(self.seed, purpose, log.step, p.question.id, p.kind, i) for i in range(self.group_size)),
                p.images,
            )
            for p in prompts
        ]
        done: dict[tuple[int, int], Rollout] = {}
        watch = self.watch if purpose == "rollout" and prompts[0].kind == PLAIN else None
        if watch is not None:
            watch.begin(prompts, log)

        def tick(ended: Iterable[Ended]) -> Iterator[Ended]:
            total = len(requests) * self.group_size
            for count, each in enumerate(ended, 1):
                log.tell("sampling", count, total)
                yield each

        def grade(ended: Sequence[Ended]) -> None:
            for (i, j, _), rollout in zip(ended, graded_rollouts(prompts, ended, self.renderer.chat, self.score, log), strict=True):
                done[i, j] = rollout
                if watch is not None:
                    watch.ended(prompts[i], j, rollout)

        if self.grades_while_sampling:
            self._sample_and_grade(tick(self.engine.stream(requests, self.sampling)), grade)
        else:
            grade(sorted(tick(self.engine.stream(requests, self.sampling)), key=lambda each: each[:2]))
        return [tuple(done[i, j] for j in range(self.group_size)) for i in range(len(prompts))]

    def _sample_and_grade(self, stream: Iterator[Ended], grade: Callable[[Sequence[Ended]], None]) -> None:
        """Has rollouts graded in a thread as they end, while the engine samples the others."""
        waiting: SimpleQueue[Ended] = SimpleQueue()
        jobs: deque[Future[None]] = deque()

        def work() -> None:
            # One call for all that has ended by now: a grader compares its rows at the same time.
            if ended := [waiting.get_nowait() for _ in range(waiting.qsize())]:
                grade(ended)

        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grading")
        try:
            for ended in stream:
                while jobs and jobs[0].done():
                    jobs.popleft().result()  # an error in grading ends the sampling
                waiting.put(ended)
                jobs.append(pool.submit(work))
            for job in jobs:
                job.result()
        finally:
            # What goes wrong here is not held up by what is being graded.
            pool.shutdown(wait=False, cancel_futures=True)


def graded_rollouts(prompts: Sequence[Prompt], ended: Sequence[Ended], chat: Chat, score: Score, log: StepLog) -> list[Rollout]:
    """Rollouts of completions, in their order: decoded after the forced tokens of their prompt, with a verdict."""
    texts = [chat.decode(prompts[i].forced_ids + tuple(c.ids.tolist())) for i, _, c in ended]
    asked = [prompts[i] for i, _, _ in ended]
    answered = [
        Answered(p.question, text, p.think_open, p.kind, p.forced_ids + tuple(c.ids.tolist()))
        for p, text, (_, _, c) in zip(asked, texts, ended, strict=True)
    ]
    verdicts = score(answered, log)
    return [
        Rollout(
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
            rewards=verdict.rewards,
            notes=verdict.notes,
        )
        for (_, _, completion), text, verdict in zip(ended, texts, verdicts, strict=True)
    ]
