"""The trained weights sharded over the processes with FSDP2 [zppo]. Loaded where a run asks for it: torch takes seconds to import that.

No process but the first ever holds all of the student in one place, and that one only while it is read: it passes one layer after the
other on. In bf16 layers are gathered in bf16 and gradients summed in fp32; weights and optimizer state are fp32 shards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from zppo.distributed.checkpoint_parts import write_moments, write_weights
from zppo.distributed.parallel import ReplicatedWeights, Value, checksum, keep_logits_small, trained_parameters
from zppo.distributed.processes import Processes
from zppo.errors import LauncherError
from zppo.models.student_model import Student
from zppo.runs.checkpoint import Savable, TakesState, weights_folder


class ShardedWeights(ReplicatedWeights):
    """FSDP2: weights, gradients and optimizer state are sharded; a pass gathers one layer after the other.

    Args:
        reshard: free a layer's gathered weights after its forward pass (less memory) or after its backward pass.
        within: so many neighbouring processes share one copy of the weights, and gradients are summed over all of them (HSDP); None
            for all processes.
        offload: a process's share of weights, gradients and optimizer state stays in the processor's memory, and the optimizer steps there.
        bf16: gather weights in bf16; gradients are summed in fp32 all the same.
    """

    sharded = True
    kind = "weights sharded over them (FSDP2)"

    def __init__(
        self, processes: Processes, *, reshard: bool = True, within: int | None = None, offload: bool = False, bf16: bool = False
    ) -> None:
        super().__init__(processes)
        self.reshard, self.within, self.offload, self.bf16 = reshard, within or processes.size, offload, bf16
        if self.within < processes.size:
            self.kind = f"weights sharded over each {self.within} of them (FSDP2)"
        self._loaded = False  # the first process has the weights, and the others know their shapes
        self._mesh: DeviceMesh | None = None
        self._modules: list[tuple[FSDPModule, bool]] = []  # with `reshard_after_forward` of each

    def load(self, make: Callable[[], Student]) -> Student:
        """The first process reads the student; the others get it without its weights, which follow layer by layer in `prepare`."""
        own = make() if self.processes.main else None
        bare = None
        if own is not None:
            empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in own.model.parameters()}
            bare = copy.deepcopy(own, empty)
        sent = self.processes.gather(bare)[0]
        self._loaded = True
        student = own or sent
        assert student is not None
        return student

    def decide(self, make: Callable[[], Value]) -> Value:
        """The first process alone has all weights."""
        if not self._loaded:
            return make()
        answers: list[Any] = self.processes.gather(make() if self.processes.main else None)
        decided: Value = answers[0]
        return decided

    def prepare(self, model: nn.Module, accelerator: Accelerator) -> nn.Module:
        """Shards every layer that the architecture names as one, then the rest.

        Raises:
            LauncherError: parameters are not sharded afterwards.
        """
        if not self._loaded:
            self.processes.check_same("the student's weights at the start", checksum(model))
        prepared: nn.Module = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        keep_logits_small(prepared, accelerator)
        kinds = set(getattr(prepared, "_no_split_modules", None) or ())
        layers: list[nn.Module] = [m for m in prepared.modules() if type(m).__name__ in kinds]
        for module in (*layers, prepared):
            if self._loaded:
                self._pass_on(module, accelerator.device)
            again = self.reshard and module is not prepared  # all of it is needed again at once
            fully_shard(module, reshard_after_forward=again, **self._policies(accelerator.device))
        sharded = [m for m in prepared.modules() if isinstance(m, FSDPModule)]
        self._modules = [(m, self.reshard and m is not prepared) for m in sharded]
        for module in sharded:
            module.set_gradient_divide_factor(1.0)  # sums, as above
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        whole = [name for name, parameter in prepared.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise LauncherError(
                f"sharding was asked for, but {len(whole)} parameters are not sharded (the first is {whole[0]!r}): train without "
                "sharding (train.sharding: none, recipes/accelerate/ddp.yaml)"
            )
        return prepared

    def _policies(self, device: torch.device) -> dict[str, Any]:
        """How `fully_shard` shards."""
        size, within = self.processes.size, self.within
        if self._mesh is None:
            shape, names = ((size,), ("shard",)) if within == size else ((size // within, within), ("replicate", "shard"))
            self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self.offload else OffloadPolicy()
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else MixedPrecisionPolicy()
        return {"mesh": self._mesh, "mp_policy": precision, "offload_policy": offload}

    def _pass_on(self, module: nn.Module, device: torch.device) -> None:
        """Gives all processes what the first one has read of a module, of what is not sharded yet."""
        passed = dict[int, tuple[nn.Parameter, nn.Parameter]]()  # tied weights stay one parameter
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    continue
                if id(parameter) not in passed:
                    own = parameter.detach()
                    value = own.to(device) if self.processes.main else torch.empty_like(own, device=device)
                    dist.broadcast(value, 0)
                    passed[id(parameter)] = parameter, nn.Parameter(value, parameter.requires_grad)
                setattr(owner, name, passed[id(parameter)][1])

    @contextmanager
    def whole(self) -> Iterator[None]:
        for module, _ in self._modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module, reshard in self._modules:
                module.set_reshard_after_forward(reshard, recurse=False)
                module.reshard()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A backward pass would let go of what the outermost module has gathered, and an update would leave that behind."""
        try:
            yield
        finally:
            for module, _ in self._modules:
                module.reshard()

    def _sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: the backward passes have done it."""

    def _norm(self, value: torch.Tensor) -> float:
        return float(value.full_tensor() if isinstance(value, DTensor) else value)

    def saved(self, student: Student) -> Savable:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return GatheredModel(student.model, get_model_state_dict(student.model, options=options))

    def state_of(self, optimizer: Any) -> TakesState:
        return _ShardedState(optimizer)

    def write(self, folder: Path, student: Student, optimizer: torch.optim.Optimizer) -> None:
        """Each process writes its part of both; see `zppo.distributed.checkpoint_parts`."""
        if student.adapters:
            saved = self.saved(student)
            if self.processes.main:
                saved.save_pretrained(weights_folder(folder))
        else:
            write_weights(weights_folder(folder), student.model, self.processes)
        write_moments(folder, optimizer, student.model, self.processes)


class GatheredModel:
    """Saves a sharded model from its gathered weights."""

    def __init__(self, model: Any, state: dict[str, Any]) -> None:
        self._model, self._state = model, state

    def save_pretrained(self, folder: Path, /) -> None:
        self._model.save_pretrained(folder, state_dict=self._state)


class _ShardedState:
    """A sharded optimizer that takes a whole state: checkpoints do not know about shards."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def state(self) -> Mapping[Any, Any]:
        return self._optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        parameters = trained_parameters(self._optimizer)
        sharded = {
            index: {name: _like(parameters[int(index)], value) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": sharded})


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """A whole tensor of the optimizer's state in the shards of its parameter; a step count as it is."""
    if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape):
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
