"""`teacher.ask: eager`: the teacher is asked about a hard question while other rollouts are still sampled (ours).

Nothing that is asked here enters the batch by itself. The replies wait for the step, which afterwards asks as a lazy one does and finds
them there (`zppo.train.early`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from zppo.core.draws import draw_key
from zppo.core.reformulate import RESPONSES, Reformulation
from zppo.core.select import surely_hard
from zppo.core.types import Group, Prompt, Rollout
from zppo.teacher.compress import Source
from zppo.train.ask import Asker
from zppo.train.early import Early, EarlyScore, EarlyTeacher
from zppo.train.lane import LEAVE_SECONDS, Lane
from zppo.train.materials import MaterialMaker, drafts_of
from zppo.train.rollouts import Seen
from zppo.train.settings import ZoneSettings
from zppo.train.team import Team


@dataclass(eq=False, slots=True)
class _Asked:
    """A question of the step and how far it is.

    Attributes:
        rank: its place among the hard questions as far as it is known: accuracy up to now, then the order of ties.
        most: prompts that it can still give.
        hard: it is hard, however the rest of its rollouts turn out.
        begun: the teacher is being asked.
        pool: correct teacher responses, once they are there.
        made: what it is asked again with is being made.
    """

    prompt: Prompt
    tie: int
    most: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    rank: tuple[float, int] = (0.0, 0)
    hard: bool = False
    begun: bool = False
    pool: tuple[Source, ...] | None = None
    made: bool = False


class Ahead:
    """Asks the teacher about the questions that can get a slot, as far as is known.

    A question is asked about as soon as so many of its rollouts are wrong that it is hard in any case, unless those that are harder
    up to now can fill all slots by themselves. Of a question whose responses are all wrong, or that has no negative to show, it is
    known then that it fills fewer, and the next one is begun.

    Args:
        asker, materials: made over `EarlyTeacher.ahead` and `EarlyScore.ahead`; nobody else uses them.
        teachers, score: what the step itself asks.
        reformulations: in building order.
        group_size: G_S.
        threads: questions that are asked about at the same time; 1 for a teacher in this process, which then gets all that wait.
        every_hard_question: all hard questions are wanted, slots or not (Teacher response).
        cancel: ends calls of the teachers, and of a judge, that other threads are in.
    """

    def __init__(
        self,
        asker: Asker,
        materials: MaterialMaker,
        *,
        teachers: Sequence[EarlyTeacher],
        score: EarlyScore,
        reformulations: Sequence[Reformulation],
        settings: ZoneSettings,
        group_size: int,
        seed: int,
        threads: int,
        every_hard_question: bool,
        cancel: Callable[[], None],
        team: Team,
    ) -> None:
        self._asker, self._materials = asker, materials
        self._teachers, self._cancel, self._team = tuple(teachers), cancel, team
        self._early: list[Early[Any, Any]] = [*(t.replies for t in teachers), score.verdicts]
        self._reformulations, self._settings, self._seed = tuple(reformulations), settings, seed
        self._group_size, self._threads, self._every = group_size, threads, every_hard_question
        self._responses = every_hard_question or any(r.needs & RESPONSES for r in self._reformulations)
        self._lock = threading.Lock()

    @contextmanager
    def asking(self, cap: int, step: int) -> Iterator[Seen]:
        """Gives what is to be told of each plain rollout; at the end nobody asks any more.

        Args:
            cap: floor(rho_aug * len(X_new)). Of several processes each asks for its share of it, about its own questions.
        """
        self._step, self._cap = step, math.ceil(cap / self._team.size)
        self._questions: dict[str, _Asked] = {}
        self._asker.new_step()
        self._materials.new_step()
        for early in self._early:
            early.open()
        self._lane = Lane("ask ahead", self._work, threads=self._threads, most=1 if self._threads > 1 else None)
        try:
            yield self.seen
        finally:
            self._close(LEAVE_SECONDS)

    def collected(self) -> None:
        """All rollouts are known to all processes, and the step begins to ask."""
        if self._team.size > 1:
            for early in self._early:
                early.freeze()

    def settle(self) -> dict[str, float]:
        """Ends the asking, once the step has its prompts; what was asked in vain.

        Raises:
            what a thread has raised.
        """
        left = [teacher.replies.untaken() for teacher in self._teachers]
        self._close(None)
        self._lane.check()
        return self._team.total(
            {
                "teacher_unused_tokens": float(sum(r.completion_tokens for replies, _ in left for r in replies)),
                "teacher_cancelled": float(sum(count for _, count in left)),
            }
        )

    def seen(self, prompt: Prompt, place: int, rollout: Rollout) -> None:
        """A plain rollout is graded. Raises what a thread has raised."""
        with self._lock:
            asked = self._questions.get(prompt.question.id)
            if asked is None:
                tie = draw_key(self._seed, "ties", self._step, prompt.question.id)
                if self._settings.ties == "batch":
                    tie = len(self._questions)  # about that order: it is not the rank that the step goes by
                asked = _Asked(prompt, tie, max(1, len(self._reformulations)))
                self._questions[prompt.question.id] = asked
            asked.rollouts[place] = rollout
            ended = asked.rollouts.values()
            if surely_hard(tuple(ended), self._group_size, self._settings.threshold):
                asked.hard = True
                asked.rank = (sum(r.correct for r in ended) / sum(r.graded for r in ended), asked.tie)
                self._begin()
            if self._whole(asked) and asked.pool is not None and not asked.made:
                self._lane.put(asked)  # it was waiting for this rollout

    def _begin(self) -> None:
        """Asks about all questions that can get a slot as far as is known. To be called with the lock held."""
        slots = 0
        hard = sorted((asked for asked in self._questions.values() if asked.hard), key=lambda asked: asked.rank)
        for place, asked in enumerate(hard):
            if not self._every and max(slots, place) >= self._cap:
                return
            if not asked.begun:
                asked.begun = True
                self._lane.put(asked)
            slots += asked.most

    def _work(self, waiting: list[_Asked]) -> None:
        """In a thread: responses of those that have none yet, then the material of those whose rollouts have all ended."""
        fresh = [asked for asked in waiting if asked.pool is None]
        questions = [asked.prompt.question for asked in fresh]
        pools = self._asker.ask(questions, self._step) if self._responses else {q.id: () for q in questions}
        with self._lock:
            for asked in fresh:
                asked.pool = pools[asked.prompt.question.id]
                asked.most = sum(bool(asked.pool) or not r.needs & RESPONSES for r in self._reformulations)
            ready = [asked for asked in waiting if self._whole(asked) and not asked.made]
            for asked in ready:
                asked.made = True
            self._begin()
        if not (ready and self._reformulations):
            return
        groups = [Group(a.prompt, tuple(a.rollouts[i] for i in range(self._group_size))) for a in ready]
        known = {asked.prompt.question.id: asked.pool or () for asked in ready}
        materials = self._materials.make(groups, known, self._step)
        with self._lock:
            for asked, material in zip(ready, materials, strict=True):
                asked.most = len(drafts_of(self._reformulations, material, self._seed, self._step))
            self._begin()

    def _whole(self, asked: _Asked) -> bool:
        return len(asked.rollouts) == self._group_size

    def _close(self, timeout: float | None) -> None:
        self._lane.close(self._hasten, timeout=timeout)
        self._hasten()

    def _hasten(self) -> None:
        """Ends what the threads are at, and sends them away when they come again."""
        for early in self._early:
            early.close()
        self._cancel()
