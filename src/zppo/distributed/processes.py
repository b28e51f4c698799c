"""The processes that train one student together [zppo].

Work is dealt out and its results are gathered at once, so that above the few places where that happens every process
holds the same groups, the same buffer and the same batch, and the code reads as if there were one process. A group
(prompt, its rollouts, their verdicts, their gradients) is never split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zppo.core.minibatch import shares
from zppo.errors import EngineError, Interrupted, LauncherError
from zppo.runs.signals import Stop
from zppo.step_log import StepLog

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


@dataclass(slots=True)
class Deal:
    """Work that is dealt out to the processes.

    Attributes:
        mine: places of this process's items, in order; it may have none.
        done: what it has made of them, in that order.
        results: those of all processes, in the order of the items.
    """

    mine: list[int]
    done: Sequence[Any] = ()
    results: Sequence[Any] = ()


class Processes:
    """One process's view of all of them; by default it is alone, and every method is what it would be without the others.

    Args:
        rank: which process this is; 0 prints and writes.
        size: how many there are.
        group: carries Python objects between them, on the CPU.
        stop: the request that the run stops. Signals reach the processes at different moments, so while they train together
            (`uninterrupted`) a request ends only what a process does on its own, and all of them stop at the next gathering.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None, stop: Stop | None = None) -> None:
        self.rank, self.size, self.group, self.stop = rank, size, group, stop or Stop()

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
        with _answered():
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def deal(self, costs: Sequence[float]) -> Iterator[Deal]:
        """Work that is dealt out: inside, a process does its part, and afterwards every one has the results of all.

        Args:
            costs: what each item is expected to take, the same on every process; parts are balanced by it.

        Raises:
            Interrupted: the run was asked to stop; in several processes it is raised in all of them.
            EngineError: the engine of one process failed; in all of them, so that they can save what is trained together.
        """
        deal = Deal(shares(costs, self.size)[self.rank])
        if self.size == 1:
            yield deal
            deal.results = deal.done
            return
        # All processes learn of a request to stop, or of an engine that failed, before any of them acts on it.
        fault = ""
        try:
            with suppress(Interrupted), self.stop.exposed():
                yield deal
        except EngineError as error:
            fault = str(error)
        parts = self.gather((self.stop.signum, fault, dict(zip(deal.mine, deal.done, strict=False))))
        for signum, said, _ in parts:
            if signum is not None:
                self.stop.request(signum)
                raise Interrupted(signum)
            if said:
                raise EngineError(said)
        results = {place: result for _, _, part in parts for place, result in part.items()}
        deal.results = [results[place] for place in range(len(costs))]

    def uninterrupted(self) -> AbstractContextManager[None]:
        """While several processes train together: see `stop`."""
        return nullcontext() if self.size == 1 else self.stop.ignored()

    def gather_log(self, log: StepLog) -> None:
        """Add what each process has counted of its own share to what all know, and give everybody's warnings to all."""
        parts = self.gather((log.own, log.warnings))
        log.own = {}
        for rank, (own, warnings) in enumerate(parts):
            log.add(**own)
            for subject, text in warnings.items():
                if text not in log.warnings.values():
                    log.warnings[f"{subject} of process {rank}"] = text

    def any(self, flag: bool) -> bool:
        """Whether one process says so, on all of them: cheap enough for every exchange of a pass. Raises as `gather`."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        said = torch.tensor(int(flag))
        with _answered():
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.group)
        return bool(said)

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)

    def check_same(self, what: str, value: object) -> None:
        """Raises LauncherError unless every process holds the same `value` (compared by its `repr`)."""
        digests = self.gather(hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:12])
        if len(set(digests)) > 1:
            held = ", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests))
            raise LauncherError(
                f"the processes of this run disagree about {what} ({held}): give all of them the same files, packages and kind of device"
            )


ONE_PROCESS = Processes()


@contextmanager
def _answered() -> Iterator[None]:
    """What the others do not answer, as a LauncherError."""
    try:
        yield
    except RuntimeError as error:
        raise LauncherError(
            f"another process of this run has ended or does not answer ({_first_line(error)}): the reason stands in what it "
            "printed. If none has ended and a step simply takes long, raise train.collective_timeout"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
