"""From completions to verdicts: extraction, typed equality, workers for the rest (method.md section 7)."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from zppo.errors import SettingsError
from zppo.grading.equality import compare, undecided
from zppo.grading.text import extract_boxed
from zppo.grading.workers import WorkerPool


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one completion was graded.

    Attributes:
        correct: decides hardness, pools and the buffer.
        answer: what was extracted, None where there is none.
        reason: a short word for the log: "equal", "different", "no answer", "timeout", ...
        reward: feeds advantages; 1.0/0.0 from `correct` unless a reward function says otherwise.
        graded: False where no verdict could be had (an unreachable judge).
    """

    correct: bool
    answer: str | None
    reason: str
    reward: float
    graded: bool = True


_log = logging.getLogger(__name__)

DEADLINE = 3.0  # seconds for one answer
MEMORY_LIMIT = 1 << 30  # bytes of address space for a worker; sympy itself needs about a fifth of it
_REMEMBERED = 16384  # pairs whose outcome is kept: the rollouts of a group repeat answers, and hostile ones cost a deadline each

Item = tuple[str, str] | tuple[str, str, bool]


class Grader:
    """Grades completions against gold answers. May be shared between threads, survives a fork, can be pickled.

    Args:
        deadline: seconds that one answer may take; one that takes longer is wrong, with the reason "timeout".
        workers: worker processes for answers that need algebra; they start when the first such answer comes.
        memory_limit: address space of a worker, bytes.

    Raises:
        SettingsError: a value that is not positive.
    """

    def __init__(self, deadline: float = DEADLINE, workers: int = 1, memory_limit: int = MEMORY_LIMIT) -> None:
        for name, value in (("deadline", deadline), ("workers", workers), ("memory_limit", memory_limit)):
            if not value > 0:
                raise SettingsError(f"grading {name} is {value!r}, but must be above 0: give a positive number")
        self._settings = (deadline, workers, memory_limit)
        self._pool = WorkerPool(*self._settings)
        self._known: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._lock = threading.Lock()
        self.timeouts = 0  # answers so far that were wrong because they took too long; a repeated one counts each time

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._settings

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Used again, the grader starts new ones."""
        self._pool.close()

    def _outcomes(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """For each (gold, answer): "equal", "different", "timeout" or "error"."""
        decided: dict[tuple[str, str], str] = {}
        for pair in dict.fromkeys(pairs):
            try:
                verdict = compare(*pair, undecided)
            except Exception:  # a fault of ours in one answer must not end a run of days: that answer is wrong, and said
                _log.exception("grading failed on gold %.200r and answer %.200r: please report it", *pair)
                decided[pair] = "error"
                continue
            if verdict is not None:
                decided[pair] = "equal" if verdict else "different"
        with self._lock:
            for pair in dict.fromkeys(pairs):
                if pair not in decided and pair in self._known:
                    self._known.move_to_end(pair)
                    decided[pair] = self._known[pair]
        hard = [pair for pair in dict.fromkeys(pairs) if pair not in decided]
        if hard:
            fresh = dict(zip(hard, self._pool.compare(hard), strict=True))
            decided |= fresh
            with self._lock:
                self._known.update(fresh)
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        outcomes = [decided[pair] for pair in pairs]
        with self._lock:
            self.timeouts += outcomes.count("timeout")
        return outcomes

    def equal(self, gold: str, answer: str) -> bool:
        """Whether `answer` is `gold` in another spelling at most (method.md section 7). Never raises over what they hold.

        Raises:
            ZPPOError: workers are needed and cannot be started.
        """
        return self._outcomes([(gold, answer)]) == ["equal"]

    def grade(self, completion: str, gold: str, think_open: bool = False) -> Verdict:
        """Verdict on one completion; see `grade_many`."""
        return self.grade_many([(completion, gold, think_open)])[0]

    def grade_many(self, items: Iterable[Item]) -> list[Verdict]:
        """Verdicts on completions, spread over the workers.

        Args:
            items: (completion, gold) or (completion, gold, think_open).

        Returns:
            One verdict an item, in order; reward 1.0 or 0.0. Reasons: "equal", "different", "no answer", "timeout" (the
            answer took longer than the deadline), "error" (its worker died, or the rules failed on it: see the log).

        Raises:
            ZPPOError: workers are needed and cannot be started.
        """
        rows = [(item[1], extract_boxed(item[0], item[2] if len(item) > 2 else False)) for item in items]
        outcomes = iter(self._outcomes([(gold, answer) for gold, answer in rows if answer is not None]))
        reasons = ["no answer" if answer is None else next(outcomes) for _, answer in rows]
        return [
            Verdict(reason == "equal", answer, reason, float(reason == "equal")) for (_, answer), reason in zip(rows, reasons, strict=True)
        ]


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
