"""From completions to verdicts: extraction, typed equality, workers for the rest (method.md section 7)."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from zppo.core.types import Gold
from zppo.errors import SettingsError
from zppo.grading.answer_form import AnswerForm
from zppo.grading.equality import MAX_ITEMS, compare, undecided
from zppo.grading.golds import Pair, answer_items, has_gold_words
from zppo.grading.workers import DEADLINE, IN_A_STEP, LITTLE, MEMORY_LIMIT, TimeOuts, WorkerPool


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one completion was graded.

    Attributes:
        correct: decides hardness, pools and the buffer.
        answer: what was extracted, None where there is none.
        reason: a short word for the log: "equal", "different", "no answer", "timeout", ...
        reward: feeds advantages; 1.0/0.0 from `correct` unless a reward function says otherwise.
        graded: False where no verdict could be had (an unreachable judge).
        rewards, notes: see `Rollout`.
    """

    correct: bool
    answer: str | None
    reason: str
    reward: float
    graded: bool = True
    rewards: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


_log = logging.getLogger(__name__)

_REMEMBERED = 16384  # pairs whose outcome is kept: the rollouts of a group repeat answers, and hostile ones cost a deadline each

Item = tuple[str, Gold] | tuple[str, Gold, bool]


class _Open(NamedTuple):
    """An answer that waits for a worker: where its grading stands, and the pair that is asked about."""

    grading: Generator[Pair, str, str]
    pair: Pair


_Row = tuple[Hashable, Gold, str]  # group, right answer, answer


class Grader:
    """Grades completions against gold answers. May be shared between threads, survives a fork, can be pickled.

    Args:
        deadline: seconds that one answer may take; one that takes longer is wrong, with the reason "timeout".
        workers: worker processes for answers that need algebra; they start when the first such answer comes.
        memory_limit: address space of a worker, bytes.
        rounded_golds: whether a gold that is a rounded decimal equals the exact answer that rounds to it [zppo].
        form: where the answer of a completion stands; None for the last box after the thoughts. It is closed with the grader.

    Raises:
        SettingsError: a value that is not positive.
    """

    def __init__(
        self,
        deadline: float = DEADLINE,
        workers: int = 1,
        memory_limit: int = MEMORY_LIMIT,
        rounded_golds: bool = True,
        form: AnswerForm | None = None,
    ) -> None:
        for name, value in (("deadline", deadline), ("workers", workers), ("memory_limit", memory_limit)):
            if not value > 0:
                raise SettingsError(f"grading {name} is {value!r}, but must be above 0: give a positive number")
        self._settings = (deadline, workers, memory_limit, rounded_golds)
        self._form = form or AnswerForm()
        self._pool = WorkerPool(*self._settings)
        self._in_a_step = IN_A_STEP * workers
        self._known: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._lock = threading.Lock()
        self.timeouts = 0  # answers so far that were wrong because they took too long; a repeated one counts each time

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self._settings, self._form)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Used again, the grader starts new ones."""
        self._pool.close()
        self._form.close()

    def _outcomes(self, rows: Sequence[_Row], spent: TimeOuts) -> list[str]:
        """For each row: "equal", "different", "timeout" or "error"."""
        decided: dict[_Row, str] = {}
        waiting: dict[_Row, _Open] = {}

        def go_on(row: _Row, grading: Generator[Pair, str, str], outcome: str | None) -> None:
            step = _sent(grading, outcome, row)
            while not isinstance(step, str) and (row[0], step) in spent.asked:
                step = _sent(grading, spent.asked[row[0], step], row)
            if isinstance(step, str):
                decided[row] = step
                waiting.pop(row, None)
            else:
                waiting[row] = _Open(grading, step)

        for row in dict.fromkeys(rows):
            go_on(row, _judge_answer(row[1], row[2], self._typed), None)
        while waiting:
            little = spent.total >= self._in_a_step
            wave, given_up = spent.next_wave([(row, row[0]) for row in waiting], self._in_a_step)
            for row in given_up:
                decided[row] = "timeout"
                del waiting[row]
            for row, outcome in zip(wave, self._ask([waiting[row].pair for row in wave], little), strict=True):
                spent.note(row[0], waiting[row].pair, outcome)
                go_on(row, waiting[row].grading, outcome)
        outcomes = [decided[row] for row in rows]
        with self._lock:
            self.timeouts += outcomes.count("timeout")
        return outcomes

    def _typed(self, gold: str, answer: str) -> str | None:
        """The outcome for one right answer and one answer where the types decide it, None where algebra is needed."""
        verdict = compare(gold, answer, undecided, rounded_golds=self._settings[3])
        return None if verdict is None else "equal" if verdict else "different"

    def _ask(self, pairs: Sequence[Pair], little: bool) -> list[str]:
        """Outcomes of pairs, by the workers or from memory; `little`: in a part of the deadline."""
        with self._lock:
            found = {pair: self._known[pair] for pair in pairs if pair in self._known}
            for pair in found:
                self._known.move_to_end(pair)
        if fresh := [pair for pair in dict.fromkeys(pairs) if pair not in found]:
            outcomes = self._pool.compare(fresh, LITTLE) if little else self._pool.compare(fresh)
            found |= zip(fresh, outcomes, strict=True)
            with self._lock:
                # What little time was not enough for may be decided in another step.
                self._known.update((pair, found[pair]) for pair in fresh if not little or found[pair] != "timeout")
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return [found[pair] for pair in pairs]

    def equal(self, gold: str, answer: str) -> bool:
        """Whether `answer` is `gold` in another spelling at most (method.md section 7). Never raises over what they hold.

        Raises:
            ZPPOError: workers are needed and cannot be started.
        """
        return self._outcomes([("", gold, answer)], TimeOuts()) == ["equal"]

    def grade(self, completion: str, gold: Gold, think_open: bool = False) -> Verdict:
        """Verdict on one completion; see `grade_many`."""
        return self.grade_many([(completion, gold, think_open)])[0]

    def grade_many(self, items: Iterable[Item], groups: Sequence[Hashable] | None = None, spent: TimeOuts | None = None) -> list[Verdict]:
        """Verdicts on completions, spread over the workers.

        Args:
            items: (completion, gold) or (completion, gold, think_open); a gold is a text, or several (`Golds`).
            groups: for each item the group whose time-outs count together; None: items with the same gold are one.
            spent: the time-outs of this step so far, which are counted on; None: the call is a step of its own.

        Returns:
            One verdict an item, in order; reward 1.0 or 0.0. Reasons: "equal", "different", "no answer", "timeout" (the
            answer took longer than the deadline, or was not tried because others of its group had), "error" (its worker died, or the
            rules failed on it: see the log).

        Raises:
            ZPPOError: workers are needed and cannot be started.
        """
        items = list(items)
        golds = [item[1] for item in items]
        groups, spent = groups or golds, spent if spent is not None else TimeOuts()
        found = self._form.find_many([(item[0], item[2] if len(item) > 2 else False) for item in items], groups, spent)
        answers = [answer for answer, _ in found]
        rows = [(group, gold, answer) for group, gold, answer in zip(groups, golds, answers, strict=True) if answer is not None]
        outcomes = iter(self._outcomes(rows, spent))
        reasons = [why or next(outcomes) for _, why in found]
        with self._lock:
            self.timeouts += [why for _, why in found].count("timeout")
        return [
            Verdict(reason == "equal", answer, reason, float(reason == "equal")) for answer, reason in zip(answers, reasons, strict=True)
        ]


Quick = Callable[[str, str], str | None]
"""The outcome for a right answer and an answer, None where that takes a worker."""


def _judge_answer(gold: Gold, answer: str, quick: Quick) -> Generator[Pair, str, str]:
    """The outcome of one answer: "equal", "different", "timeout" or "error".

    Yields the pairs that take a worker, one after the other, and is sent the outcome of each. What `quick` can decide comes first.
    """
    if isinstance(gold, str):
        return quick(gold, answer) or (yield gold, answer)
    if gold.how == "any":
        return (yield from _any_of(gold.answers, answer, quick))
    items = answer_items(answer, gold)
    if max(len(items), len(gold.answers)) > MAX_ITEMS:
        return "equal" if has_gold_words(gold, answer) else "different"
    return (yield from (_in_order if gold.how == "ordered" else _in_any_order)(gold.answers, items, quick))


def _any_of(golds: Sequence[str], answer: str, quick: Quick) -> Generator[Pair, str, str]:
    said = [quick(gold, answer) for gold in golds]
    if "equal" in said:
        return "equal"
    outcomes = []
    for gold, known in zip(golds, said, strict=True):
        outcomes.append(known or (yield gold, answer))
        if outcomes[-1] == "equal":
            return "equal"
    return _failed(outcomes)


def _in_order(golds: Sequence[str], items: Sequence[str], quick: Quick) -> Generator[Pair, str, str]:
    if len(golds) != len(items):
        return "different"
    pairs = list(zip(golds, items, strict=True))
    said = [quick(*pair) for pair in pairs]
    if "different" in said:
        return "different"
    for pair, known in zip(pairs, said, strict=True):
        outcome = known or (yield pair)
        if outcome != "equal":
            return outcome
    return "equal"


def _in_any_order(golds: Sequence[str], items: Sequence[str], quick: Quick) -> Generator[Pair, str, str]:
    """Whether each gold can be paired with an item of its own; what comes twice counts once."""
    rest, left = list(dict.fromkeys(golds)), list(dict.fromkeys(items))
    if len(rest) != len(left):
        return "different"
    said = {(gold, item): quick(gold, item) for gold in rest for item in left}
    for gold in tuple(rest):
        match = next((item for item in left if said[gold, item] == "equal"), None)
        if match is not None:
            rest.remove(gold)
            left.remove(match)
    if any(all(said[gold, item] == "different" for item in left) for gold in rest):
        return "different"
    for gold in rest:
        outcomes = []
        for item in left:
            outcomes.append(said[gold, item] or (yield gold, item))
            if outcomes[-1] == "equal":
                left.remove(item)
                break
        else:
            return _failed(outcomes)
    return "equal"


def _failed(outcomes: Sequence[str]) -> str:
    """The outcome where none of these was "equal"."""
    return next((word for word in ("timeout", "error") if word in outcomes), "different")


def _sent(grading: Generator[Pair, str, str], outcome: str | None, row: _Row) -> Pair | str:
    """The next pair that the grading of a row asks about, or its outcome."""
    try:
        return next(grading) if outcome is None else grading.send(outcome)
    except StopIteration as end:
        return str(end.value)
    except Exception:  # a fault of ours in one answer must not end a run of days: that answer is wrong, and said
        _log.exception("grading failed on gold %.200r and answer %.200r: please report it", *row[1:])
        return "error"


_shared: Grader | None = None
_shared_lock = threading.Lock()


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` is `gold` in another spelling at most, by a grader with default limits that this process shares.

    Bounded in time; not symmetric: words behind the number of a gold are its unit, behind an answer's they may be anything.
    """
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Grader()
            atexit.register(_shared.close)
    return _shared.equal(gold, answer)
