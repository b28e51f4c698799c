"""Out of memory where weights are sharded: one process's failure becomes everybody's, and all of them begin again [zppo].

The passes of all processes meet in the exchanges of FSDP: where one of them breaks off, the others would wait for it there. So before
each exchange, and at the end, they say to one another whether all is well. That is one number between the CPUs, which run ahead of
their GPUs. Out of memory is raised on the CPU, in front of the next exchange, so nobody enters one that not all enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from zppo.distributed.processes import Processes
from zppo.engines.out_of_memory import MemoryElsewhereError, out_of_memory


def why_no_retries() -> str:
    """Why an attempt cannot be made again with this torch; "" where it can."""
    if hasattr(FSDPModule, "reset_iter_state") and hasattr(dist, "all_gather_single"):
        return ""
    return f"torch {torch.__version__} cannot go on after a pass that was broken off, later ones can (2.13 does)"


class Retries:
    """Lets all processes leave a pass that one of them has to leave.

    Args:
        processes: those over which the weights lie.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes, self._on = processes, False

    def watch(self, module: Any) -> None:
        """Makes the exchanges of a module (FSDP2's) ask first."""
        module.set_custom_all_gather(_AllGather(self))
        module.set_custom_reduce_scatter(_ReduceScatter(self))

    def ask(self) -> None:
        """Raises MemoryElsewhereError where a process has broken off; every process must come here or break off."""
        if self._on and self._processes.any(False):
            raise MemoryElsewhereError("another process of this run is out of memory")

    @contextmanager
    def agreed(self, root: Any, afterwards: Callable[[], None]) -> Iterator[None]:
        """Inside, out of memory is raised by all processes or by none; the root module can begin a new pass then.

        Args:
            afterwards: called by all of them where it is raised.
        """
        self._on = True
        try:
            yield
            self.ask()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if not isinstance(error, MemoryElsewhereError):
                self._processes.any(True)
            self._on = False
            for parameter in root.parameters():
                if not isinstance(parameter, DTensor):  # gathered when the pass was left: its gradient would be added to the next
                    parameter.grad = None
            root.reset_iter_state()
            afterwards()
            raise
        finally:
            self._on = False


class _Exchange:
    """What FSDP2 asks of an exchange (torch.distributed.fsdp's `Comm`)."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Exchange):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        self._retries.ask()
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Exchange):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self._retries.ask()
        return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
