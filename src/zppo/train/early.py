"""Results that are there before the step asks for them: a teacher's replies and their verdicts, with `teacher.ask: eager` (ours).

Threads ask ahead while the student samples; afterwards the step asks, in its own order, for exactly what it would have asked
without them, and takes what is there. So the batch cannot depend on what was asked ahead, or when: every request is determined by its
keys, and each is made once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from zppo.grading.base import Verdict
from zppo.teacher.base import Cancelled, Teacher, TeacherReply, TeacherRequest, TeacherSampling
from zppo.train.rollouts import Answered, Score
from zppo.train.team import Team

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Early(Generic[Key, Result]):
    """Results by key, each made once, by whoever comes first; threads come early, and the step takes.

    Args:
        team: what one process has early, all of them take. Two of them may have made the same; the first one's is taken.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._results: dict[Key, Future[Result]] = {}
        self._taken: set[Key] = set()
        self._open = self._frozen = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """From now on threads may come. All processes call it."""
        self._results, self._taken, self._open, self._frozen = {}, set(), True, False

    def freeze(self) -> None:
        """What is under way may end, and nothing else is begun early: what this process begins from now on, the others would not know."""
        with self._lock:
            self._frozen = True

    def close(self) -> None:
        """From now on threads that come are sent away (`Cancelled`); what they had is gone."""
        with self._lock:
            self._open, self._results = False, {}

    def untaken(self) -> tuple[list[Result], int]:
        """Results that were made early and never taken, and how many have not come yet."""
        with self._lock:
            left = [future for key, future in self._results.items() if key not in self._taken]
        made = [f.result() for f in left if f.done() and f.exception() is None]
        return made, sum(not f.done() for f in left)

    def early(self, keys: Sequence[Key], work: Callable[[list[Key]], Sequence[Result]]) -> list[Result]:
        """Results in the order of the keys; `work` makes those that nobody else has begun.

        Raises:
            Cancelled: it is closed, or frozen and nobody has begun it.
        """
        with self._lock:
            own = {key: Future[Result]() for key in keys if key not in self._results}
            if not self._open or (self._frozen and own):
                raise Cancelled
            self._results |= own
            futures = [self._results[key] for key in keys]
        if own:
            try:
                for future, result in zip(own.values(), work(list(own)), strict=True):
                    future.set_result(result)
            except BaseException as error:
                for future in own.values():
                    if not future.done():
                        future.set_exception(error)
                raise
        return [future.result() for future in futures]

    def take(self, keys: Sequence[Key], work: Callable[[list[Key]], Sequence[Result]]) -> list[Result]:
        """Results in the order of the keys: those that some process has begun, and of the others what `work` gives.

        Every process calls it with the same keys; what is missing is asked for while what is under way comes in.

        Raises:
            what making an early result has raised.
        """
        if not self._open:
            return list(work(list(keys)))
        with self._lock:
            begun = [i for i, key in enumerate(keys) if key in self._results]
        held = self._team.each(lambda: begun)
        known = {i for places in held for i in places}
        rest = [key for i, key in enumerate(keys) if i not in known]
        alone = self._team.size == 1  # then a thread that comes late finds what the step has begun
        fresh = iter((self.early(rest, work) if alone else work(rest)) if rest else ())
        parts = self._team.each(lambda: [self._results[keys[i]].result() for i in begun])
        found: dict[int, Result] = {}
        for places, results in zip(held, parts, strict=True):
            for i, result in zip(places, results, strict=True):
                found.setdefault(i, result)
        self._taken.update(keys)
        return [found[i] if i in known else next(fresh) for i in range(len(keys))]


class EarlyTeacher:
    """A teacher whose replies may be there before the step asks for them.

    Attributes:
        seconds: what the step has waited for it.
    """

    def __init__(self, teacher: Teacher, team: Team) -> None:
        self._teacher, self._team = teacher, team
        self.replies: Early[TeacherRequest, TeacherReply] = Early(team)
        self.seconds = 0.0

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling) -> list[TeacherReply]:
        """The step's own requests; all processes make the same."""
        began = time.perf_counter()
        try:
            return self.replies.take(requests, lambda rest: self._team.teacher(self._teacher).complete(rest, how))
        finally:
            self.seconds += time.perf_counter() - began

    def ahead(self) -> Teacher:
        """The same teacher for the threads of one process that ask ahead."""
        return _Ahead(self._teacher, self.replies)


class EarlyScore:
    """A grading whose verdicts on teacher responses may be there before the step asks for them."""

    def __init__(self, score: Score, team: Team) -> None:
        self._score, self._team = score, team
        self.verdicts: Early[Answered, Verdict] = Early(team)

    def __call__(self, answered: Sequence[Answered]) -> list[Verdict]:
        """The step's own; all processes want the same."""
        return self.verdicts.take(answered, self._team.score(self._score))

    def ahead(self, answered: Sequence[Answered]) -> list[Verdict]:
        """The same for the threads of one process that ask ahead."""
        return self.verdicts.early(answered, self._score)


class _Ahead:
    def __init__(self, teacher: Teacher, replies: Early[TeacherRequest, TeacherReply]) -> None:
        self._teacher, self._replies = teacher, replies

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling) -> list[TeacherReply]:
        return self._replies.early(requests, lambda rest: self._teacher.complete(rest, how))
