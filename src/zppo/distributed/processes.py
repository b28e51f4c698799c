"""The processes that train one student together [zppo].

Work is dealt out and its results are gathered at once, so that above the few places where that happens every process
holds the same groups, the same buffer and the same batch, and the code reads as if there were one process. A group
(prompt, its rollouts, their verdicts, their gradients) is never split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from zppo.core.minibatch import shares
from zppo.errors import Interrupted, LauncherError
from zppo.runs.signals import Stop
from zppo.teacher.base import Teacher, TeacherReply, TeacherRequest, TeacherSampling

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from zppo.rollout.student import Answered, Score

Item = TypeVar("Item")
Result = TypeVar("Result")


class Processes:
    """One process's view of all of them; by default it is alone, and every method is what it would be without a team.

    Args:
        rank: which process this is; 0 prints and writes.
        size: how many there are.
        group: carries Python objects between them, on the CPU.
        stop: somebody's wish that the run stops. Signals reach the processes at different moments, so while they train together
            (`uninterrupted`) a wish ends only what a process does on its own, and all of them stop at the next gathering.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None, stop: Stop | None = None
    ) -> None:
        self.rank, self.size, self._group, self.stop = rank, size, group, stop or Stop()

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """Everybody's value, in the order of ranks; every process must call it.

        Raises:
            LauncherError: another process has ended, or did not come within `train.collective_timeout`.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise LauncherError(
                f"another process of this run has ended or does not answer ({_first_line(error)}): the reason stands in what it "
                "printed. If none has ended and a step simply takes long, raise train.collective_timeout"
            ) from error
        return values

    def map(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Sequence[Result]],
        cost: Callable[[Item], float] = lambda _: 1.0,
    ) -> list[Result]:
        """`work(items)`, split by item over the processes; results in the order of the items, on every process.

        Args:
            items: the same on every process.
            work: gives one result per item of its share, and is not called for an empty one.
            cost: what an item is expected to take; shares are balanced by it.

        Raises:
            Interrupted: somebody wants the run to stop; in several processes it is raised in all of them.
        """
        mine = shares([cost(item) for item in items], self.size)[self.rank]
        own = [items[i] for i in mine]
        parts = self.each(lambda: list(zip(mine, work(own), strict=True)) if mine else [])
        results = dict(pair for part in parts for pair in part)
        return [results[i] for i in range(len(items))]

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` gives in every process, in the order of ranks, on all of them.

        Raises:
            Interrupted: somebody wants the run to stop; in several processes it is raised in all of them.
        """
        if self.size == 1:
            return [work()]
        done: Result | None = None
        with (
            suppress(Interrupted),
            self.stop.exposed(),
        ):  # that somebody wants to stop is for all processes to know first
            done = work()
        parts = self.gather((self.stop.signum, done))
        for signum, _ in parts:
            if signum is not None:
                self.stop.request(signum)
                raise Interrupted(signum)
        return [part for _, part in parts]  # type: ignore[misc]

    def uninterrupted(self) -> AbstractContextManager[None]:
        """While several processes train together: see `stop`."""
        return nullcontext() if self.size == 1 else self.stop.ignored()

    def total(self, counts: Mapping[str, float]) -> dict[str, float]:
        """The sums over the processes of what each has counted of its own share, by name."""
        parts = self.gather(dict(counts))
        return {name: sum(part[name] for part in parts) for name in counts}

    def any(self, flag: bool) -> bool:
        """Whether one process says so, on all of them."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)

    def check_same(self, what: str, value: object) -> None:
        """Raises LauncherError unless every process holds the same `value` (compared by its `repr`)."""
        digests = self.gather(hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:12])
        if len(set(digests)) > 1:
            held = ", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests))
            raise LauncherError(
                f"the processes of this run disagree about {what} ({held}): give all of them the same files, packages and kind of "
                "device"
            )

    def teacher(self, teacher: Teacher) -> Teacher:
        """A teacher whose requests are split over the processes."""
        return teacher if self.size == 1 else _SplitTeacher(teacher, self)

    def score(self, score: Score) -> Score:
        """A grading whose completions are split over the processes."""
        if self.size == 1:
            return score

        def split(answered: Sequence[Answered]) -> list[Any]:
            return self.map(answered, score)

        return split


ONE_PROCESS = Processes()


class _SplitTeacher:
    """See `Processes.teacher`."""

    def __init__(self, teacher: Teacher, processes: Processes) -> None:
        self._teacher, self._team = teacher, processes

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling) -> list[TeacherReply]:
        return self._team.map(
            requests, lambda mine: self._teacher.complete(mine, how), lambda request: float(len(request.keys))
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
