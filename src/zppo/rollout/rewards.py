"""A user's reward functions in a run: called together, async ones with a deadline, and made into one verdict for each completion.

[zppo] The reward is the weighted sum of what the functions that apply give. What is solved, the first of them that applies says: a bonus
for form never makes a wrong answer solved, and a penalty for length never makes a right one hard. No torch: a dry run asks too.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zppo.core.types import JUDGE, Question
from zppo.grading.answer_form import AnswerForm
from zppo.grading.grader import Verdict
from zppo.grading.reward_function import Batch, Call, Reward, RewardFunction, load_reward
from zppo.grading.workers import TimeOuts
from zppo.step_log import StepLog

if TYPE_CHECKING:
    from zppo.config.settings import GradingSettings
    from zppo.rollout.student import Answered

AT_ONCE = 64
"""So many calls of an async function wait at the same time; the deadline of the others has not begun."""

_SLACK = 1.0  # seconds beyond its deadlines after which the event loop counts as blocked
_BREATH = 0.1
_LATE = object()
METRIC, CALLS = "reward_metric:", "reward_metric_calls:"
"""How numbers that functions report by name (`log_metric`) are counted until the step is over, with how often each came."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """`trainer_state` as functions of TRL's form read it; a step is one of zppo's.

    Attributes:
        global_step: finished steps.
        max_steps: steps of the whole run.
    """

    global_step: int = 0
    max_steps: int = 0


class Waiter:
    """An event loop in a thread of its own, for the length of a run: clients that async functions keep open live as long.

    Args:
        deadline: seconds that each awaitable may take.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def wait(self, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        """What each gives: a value, the exception that it raised, or `_LATE`. A loop that one of them blocks is given up."""
        results: list[Any] = [_LATE] * len(awaitables)
        rounds = math.ceil(len(awaitables) / AT_ONCE)
        loop = self._running()
        done = asyncio.run_coroutine_threadsafe(self._all(awaitables, results), loop)
        try:
            done.result(rounds * self._deadline + _SLACK)
        except FutureTimeoutError:
            self._loop = None  # its thread is a daemon
            loop.call_soon_threadsafe(loop.stop)
        return list(results)

    def close(self) -> None:
        """End the loop; used again, a new one starts."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_SLACK)
            self._loop = None

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(loop,), name="zppo-rewards", daemon=True)
            self._thread.start()
        return self._loop

    async def _all(self, awaitables: Sequence[Awaitable[Any]], results: list[Any]) -> None:
        free, late = asyncio.Semaphore(AT_ONCE), set[int]()

        async def keep(place: int, awaitable: Awaitable[Any]) -> None:
            result: Any
            try:
                result = await awaitable
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                result = error
            if place not in late:
                results[place] = result

        async def one(place: int, awaitable: Awaitable[Any]) -> None:
            async with free:
                task = asyncio.ensure_future(keep(place, awaitable))
                finished, _ = await asyncio.wait({task}, timeout=self._deadline)
                if not finished:
                    late.add(place)
                    task.cancel()  # and nobody waits for it: it may not listen

        await asyncio.gather(*(one(place, awaitable) for place, awaitable in enumerate(awaitables)))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop until it is stopped, and closes it; what is late by then is cancelled, and waited for as long as a breath."""

    async def end() -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=_BREATH)

    loop.run_forever()
    loop.run_until_complete(end())
    loop.close()


class Rewards:
    """Grades completions by a user's reward functions: a `Rule`.

    Args:
        functions: the one that judges the answer first.
        weights: of each in the reward.
        deadline: seconds that one call of an async function may take; completions that it was about are then ungraded.
        answers: where the answer of a completion stands; None for the last box after the thoughts.

    Attributes:
        steps: of the whole run, which functions of TRL's form are told; 0 where it is not known.
    """

    steps = 0

    def __init__(
        self, functions: Sequence[RewardFunction], weights: Sequence[float], deadline: float, answers: AnswerForm | None = None
    ) -> None:
        self.functions, self.weights, self.answers = tuple(functions), tuple(weights), answers or AnswerForm()
        self.names = unique_names([function.name for function in functions])
        self._waiter = Waiter(deadline)
        self._step = 0  # the newest one
        self._encode: Callable[[str], Sequence[int]] = lambda text: ()

    def prepare(self, questions: Iterable[Question], encode: Callable[[str], Sequence[int]]) -> None:
        """What is known once models and questions are loaded.

        Args:
            questions: all that will be graded; those of a judge are not looked at.
            encode: the student's tokens of a text, for what a teacher wrote.

        Raises:
            RewardError: the questions lack a column that a function asks for.
        """
        self.check_columns(questions)
        self._encode = encode

    def check_columns(self, questions: Iterable[Question]) -> None:
        """Whether the questions bring what each function asks for by name. RewardError where they do not."""
        graded = [question for question in questions if question.grading != JUDGE]
        for function in self.functions:
            function.check_columns(graded)

    def close(self) -> None:
        """End what runs for async functions, and what reads answers."""
        self._waiter.close()
        self.answers.close()

    def __call__(self, answered: Sequence[Answered], log: StepLog | None = None) -> list[Verdict]:
        """Verdicts in order.

        Raises:
            RewardError: a function raised, or returned something that is no reward.
        """
        if not answered:
            return []
        log = log or StepLog()
        self._step = log.step or self._step
        batch = self._batch(answered, log)
        said, late, notes = self._ask(batch)
        spent = log.known("grading").setdefault("time-outs", TimeOuts())
        groups = [(a.kind, a.question.id) for a in answered]
        found = self.answers.find_many([(a.completion, a.think_open) for a in answered], groups, spent)
        verdicts = [self._verdict(answer, [column[i] for column in said], i in late, notes[i]) for i, (answer, _) in enumerate(found)]
        self._warn(verdicts, log)
        return verdicts

    def _batch(self, answered: Sequence[Answered], log: StepLog) -> Batch:
        def log_metric(name: str, value: float) -> None:
            log.add_own(**{f"{METRIC}{name}": float(value), f"{CALLS}{name}": 1.0})

        wants_ids = any(function.form == "trl" for function in self.functions)
        return Batch(
            [a.completion for a in answered],
            [a.question for a in answered],
            [a.think_open for a in answered],
            [a.ids or tuple(self._encode(a.completion)) for a in answered] if wants_ids else [],
            TrainerState(log.step - 1 if log.step else self._step, self.steps),  # an evaluation has no step
            log_metric,
        )

    def _ask(self, batch: Batch) -> tuple[list[list[Reward | None]], set[int], list[dict[str, Any]]]:
        """Of each function what it says of each completion; those that one was late for; what functions reported of each."""
        calls = [(function, call) for function in self.functions for call in function.calls(batch)]
        waiting = [i for i, (_, call) in enumerate(calls) if inspect.isawaitable(call.result)]
        given = dict(zip(waiting, self._waiter.wait([calls[i][1].result for i in waiting]) if waiting else (), strict=True))
        size = len(batch.completions)
        said: dict[int, list[Reward | None]] = {id(function): [None] * size for function in self.functions}
        late, notes = set[int](), [dict[str, Any]() for _ in range(size)]
        for i, (function, call) in enumerate(calls):
            result = given.get(i, call.result)
            if result is _LATE:
                late.update(call.places)
                continue
            if i in given and isinstance(result, BaseException):
                raise function.failed(result, batch.questions[call.places[0]]) from result
            for place, reward in zip(call.places, function.rewards(call._replace(result=result), batch), strict=True):
                said[id(function)][place] = reward
            _take_notes(call, notes)
        return [said[id(function)] for function in self.functions], late, notes

    def _verdict(self, answer: str | None, said: Sequence[Reward | None], late: bool, notes: Mapping[str, Any]) -> Verdict:
        applies = [reward for reward in said if reward is not None]
        answer = next((reward.answer for reward in applies if reward.answer is not ...), answer)
        own = {name: reward.reward for name, reward in zip(self.names, said, strict=True) if reward is not None}
        if late or not applies:
            return Verdict(
                False, answer, "reward timeout" if late else "reward does not apply", 0.0, graded=False, rewards=own, notes=notes
            )
        total = math.fsum(w * reward.reward for w, reward in zip(self.weights, said, strict=True) if reward is not None)
        return Verdict(applies[0].correct, answer, applies[0].reason, total, rewards=own, notes=notes)

    def _warn(self, verdicts: Sequence[Verdict], log: StepLog) -> None:
        """What a person should know about the rewards of this step up to now."""
        reasons = Counter(verdict.reason for verdict in verdicts if not verdict.graded)
        log.add_own(reward_timeouts=reasons["reward timeout"], reward_without=reasons["reward does not apply"])
        late, without = (int(log.own[f"reward_{name}"]) for name in ("timeouts", "without"))
        if late:
            log.warnings["reward timeouts"] = (
                f"{late:,} completions are ungraded: an async reward function took more than grading.reward_deadline for them. Raise it, "
                "or make the function give up in time"
            )
        if without:
            log.warnings["rewards that do not apply"] = (
                f"{without:,} completions are ungraded: every reward function returned None for them, which means that it does not apply"
            )


def _take_notes(call: Call, notes: Sequence[dict[str, Any]]) -> None:
    """What a function of TRL's form reported with `log_extra`: a list with a value for each completion."""
    for name, values in call.notes.items():
        for place, value in zip(call.places, values, strict=False):
            notes[place][str(name)] = value if isinstance(value, str | int | float | bool | None) else str(value)


def unique_names(specs: Sequence[str]) -> list[str]:
    """What reward functions are called in metrics and logs: the end of their import path, numbered where two are alike."""
    names: list[str] = []
    for spec in specs:
        name = spec.rpartition(":")[2]
        same = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{same + 1}" if same else name)
    return names


def make_rewards(settings: GradingSettings, answers: AnswerForm | None = None) -> Rewards:
    """The reward functions of a recipe; `answers` says where the answers of completions stand.

    Raises:
        RewardError: one cannot be imported, or has no form that can be called.
    """
    specs = settings.rewards
    functions = [load_reward(spec, optional=len(specs) > 1) for spec in specs]
    return Rewards(functions, settings.reward_weights or (1.0,) * len(specs), settings.reward_deadline, answers)
