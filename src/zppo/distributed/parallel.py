"""How the trained weights lie over the processes: all of them in every process, or sharded (`zppo.distributed.sharded`) [zppo].

Gradients are *summed* over the processes, once per optimizer step where every process holds all weights: the loss of a
minibatch is already divided by the tokens of all of them. DistributedDataParallel is not used: it averages, and wants
as many backward passes from each process as from the others, while here some have more rows with a gradient than others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from zppo.config.settings import Settings
from zppo.distributed.launcher import Launch, started_by_slurm
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.output_head import sum_in_place
from zppo.errors import LauncherError, SettingsError
from zppo.models.student_model import Student, UnreadStudent
from zppo.runs import checkpoint
from zppo.runs.checkpoint import HoldsState, Savable, TakesState
from zppo.runs.signals import Stop

Value = TypeVar("Value")


def keep_logits_small(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Makes a model that `accelerator.prepare` put under autocast give its outputs in autocast's own type.

    accelerate turns them into fp32: for a vocabulary of 250,000 a copy of all logits and one of their gradient, the largest tensors of
    a training step. Losses turn bf16 logits into fp32 themselves, part by part, to the same numbers.
    """
    forward = getattr(model, "_original_forward", None)
    if forward is None:  # no autocast
        return

    @wraps(forward)
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = under_autocast


class ReplicatedWeights:
    """Every process holds all weights and the whole optimizer.

    Attributes:
        processes: the processes.
        sharded: whether a forward or backward pass of one process needs all others: every process must make equally many.
        kind: how they lie, in words.
        offload: whether what is trained lies in the processor's memory.
    """

    sharded = offload = False
    kind = "each with all weights"

    def __init__(self, processes: Processes = ONE_PROCESS) -> None:
        self.processes = processes

    def load(
        self, make: Callable[[], Student], unread: Callable[[], UnreadStudent | str] | None = None, say: Callable[[str], None] | None = None
    ) -> Student:
        """The student, from where `make` reads it. Every process must call it.

        Args:
            unread: gives it without its weights, or says why not: see `ShardedWeights.load`.
            say: called with a message about how it is read.
        """
        return make()

    def prepare(self, model: nn.Module, accelerator: Accelerator) -> nn.Module:
        """The model on its device, with autocast where asked for. The optimizer is made afterwards: parameters may be others."""
        prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)  # True: not wrapped
        keep_logits_small(prepared, accelerator)
        if self.processes.size > 1:
            self.processes.check_same("the student's weights at the start", checksum(prepared))
        return prepared

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every process can run forward passes on its own. Every process must enter."""
        return nullcontext()

    def scoring(self) -> AbstractContextManager[None]:
        """Around forward passes without a backward pass. Where weights are sharded every process must make equally many."""
        return nullcontext()

    def together(self) -> AbstractContextManager[None]:
        """Inside, out of memory in one process is an error of all of them where they need one another: see `ShardedWeights`."""
        return nullcontext()

    def of_all(self, value: Value) -> list[Value]:
        """What the processes say that share an attempt (`together`); by default each has its own."""
        return [value]

    def step(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float, *, finite: bool) -> tuple[float, bool]:
        """One optimizer step with the gradients of all processes, clipped; none where they are not finite, or `finite` is false.

        Every process must call it. Afterwards gradients are 0.

        Args:
            finite: whether the loss of all processes together is; the same in all of them.

        Returns:
            The gradient norm before clipping, and whether the weights moved.
        """
        parameters = trained_parameters(optimizer)
        self._sum_gradients(parameters)
        norm = self._clip(parameters, accelerator, max_norm)
        moved = finite and math.isfinite(norm)
        if moved:
            optimizer.step()
        for parameter in parameters:  # the fused optimizer's own way puts shards and whole gradients into one list, which torch refuses
            if parameter.grad is not None:
                parameter.grad.zero_()
        return norm, moved

    def _sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients of the processes in place; all parameters must have one."""
        if self.processes.size == 1:
            return
        pending = [dist.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
        for work in pending:
            work.wait()

    def _clip(self, parameters: list[nn.Parameter], accelerator: Accelerator, max_norm: float) -> float:
        """Scales gradients down to a norm of `max_norm`; the norm that they had."""
        return float(accelerator.clip_grad_norm_(parameters, max_norm))

    def saved(self, student: Student) -> Savable:
        """What the first process saves the student from. Every process must call it."""
        if self.processes.size > 1:
            self.processes.check_same("the trained weights", checksum(student.model))
        return student.saved

    def load_optimizer(self, start: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Gives the optimizer the state of a checkpoint, whatever way the weights lay then. Every process must call it.

        Raises:
            CheckpointError: it holds no such state, or one over other weights.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if checkpoint.in_parts(start):
            from zppo.distributed.checkpoint_parts import read_moments

            read_moments(start, optimizer, trained)
        else:
            checkpoint.load_optimizer(start, self.state_of(optimizer), list(trained.values()), mapped=self.sharded)

    def write_final(self, folder: Path, student: Student) -> None:
        """Writes the whole student into a folder, in fp32, adapters merged for good. Every process must call it."""
        saved = self.saved(student)
        if self.processes.main:
            whole: Savable = saved if student.adapters is None else student.adapters.merge()
            whole.save_pretrained(folder)

    def state_of(self, optimizer: Any) -> TakesState:
        """What takes a whole state for the optimizer."""
        takes: TakesState = optimizer
        return takes

    def write(self, folder: Path, student: Student, optimizer: HoldsState) -> None:
        """Writes student and optimizer into the folder of a checkpoint. Every process must call it."""
        saved = self.saved(student)
        if self.processes.main:
            checkpoint.write_whole_state(folder, saved, optimizer)


def checksum(model: nn.Module) -> list[float]:
    """A number per parameter that changes when a weight does."""
    with torch.no_grad():
        return [float(p.detach().double().sum()) for p in model.parameters()]


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def zero_gradients(model: torch.nn.Module) -> None:
    """Gradients of all trainable parameters as zeros: AdamW passes over a parameter whose gradient is None, and 0 is a step.

    They are summed in place from now on (`zppo.engines.output_head`).
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            sum_in_place(parameter)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()


def make_accelerator(settings: Settings, launch: Launch) -> Accelerator:
    """Device, precision and CPU threads by the recipe; with several processes it waits until all are here.

    Raises:
        LauncherError: what the launcher asked for is not what stands.
    """
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    elsewhere = settings.student.tinker is not None  # nothing of the student is computed here
    on_cpu = settings.train.device == "cpu" or elsewhere or not torch.cuda.is_available()
    bf16 = settings.train.precision == "bf16" or (settings.train.precision == "auto" and not on_cpu)
    precision = "bf16" if bf16 else "no"
    launch.check_precision(precision)
    # accelerate would shard on GPUs, and do something else on CPUs: `make_weights` does it on both.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    os.environ |= started_by_slurm()
    group: dict[str, Any] = {"timeout": _patience(settings)}
    if launch.processes > 1 and not on_cpu and (settings.train.offload or launch.offload):
        group["backend"] = "cuda:nccl,cpu:gloo"  # the norm of gradients on the CPU is summed there
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(**group)])
    launch.check_processes(accelerator.num_processes)
    return accelerator


def make_weights(settings: Settings, accelerator: Accelerator, launch: Launch, stop: Stop) -> ReplicatedWeights:
    """The processes of this run, and how the trained weights lie over them.

    Raises:
        LauncherError: sharding was asked for, and there is one process.
        SettingsError: this torch cannot do what the recipe asks for with shards.
    """
    size, sharding = accelerator.num_processes, launch.sharding or settings.train.sharding
    if size == 1:
        if sharding != "none":
            raise LauncherError(
                f"sharding over several processes was asked for ({sharding}), but one runs: start with torchrun --nproc_per_node N -m zppo "
                "train RECIPE, or set train.sharding to none"
            )
        return ReplicatedWeights(Processes(stop=stop))
    group = None  # the processes' own, where that carries objects on the CPU
    if torch.distributed.get_backend() != "gloo":
        group = torch.distributed.new_group(backend="gloo", timeout=_patience(settings))
    processes = Processes(accelerator.process_index, size, group, stop)
    if sharding == "none":
        return ReplicatedWeights(processes)
    from zppo.distributed.retries import why_no_retries
    from zppo.distributed.sharded import ShardedWeights

    retries = settings.train.tokens_per_microbatch == "auto"
    if retries and (why := why_no_retries()):
        raise SettingsError(
            f"train.tokens_per_microbatch is auto, and weights are sharded ({sharding}): {why}. Give a number, or update torch"
        )
    return ShardedWeights(
        processes,
        reshard=launch.reshard,
        retries=retries,
        within=settings.train.shard_within,
        offload=settings.train.offload or launch.offload,
        bf16=accelerator.mixed_precision == "bf16",
    )


def _patience(settings: Settings) -> timedelta:
    return timedelta(seconds=settings.train.collective_timeout)
