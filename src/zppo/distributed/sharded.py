"""The trained weights sharded over the processes with FSDP2 [zppo]. Loaded where a run asks for it: torch takes seconds to import that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from zppo.distributed.parallel import ReplicatedWeights, checksum, keep_logits_small, trained_parameters
from zppo.distributed.processes import Processes
from zppo.engines.output_head import head_form
from zppo.errors import LauncherError
from zppo.models.student_model import Student
from zppo.runs.checkpoint import HoldsState, Savable, TakesState


class ShardedWeights(ReplicatedWeights):
    """FSDP2: weights, gradients and optimizer state are sharded; a pass gathers one layer after the other.

    Args:
        reshard: free a layer's gathered weights after its forward pass (less memory) or after its backward pass.
    """

    sharded = True
    kind = "weights sharded over them (FSDP2)"

    def __init__(self, processes: Processes, *, reshard: bool = True) -> None:
        super().__init__(processes)
        self.reshard = reshard
        self._modules: list[tuple[FSDPModule, bool]] = []  # with `reshard_after_forward` of each

    def prepare(self, model: nn.Module, accelerator: Accelerator) -> nn.Module:
        """Shards every layer that the architecture names as one, then the rest.

        Raises:
            LauncherError: parameters are not sharded afterwards.
        """
        self.processes.check_same("the student's weights at the start", checksum(model))
        head_form(model)  # by a pass of its own, which would be everybody's afterwards
        prepared: nn.Module = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        keep_logits_small(prepared, accelerator)
        mesh = init_device_mesh(accelerator.device.type, (self.processes.size,))
        layers = set(getattr(prepared, "_no_split_modules", None) or ())
        for layer in [m for m in prepared.modules() if type(m).__name__ in layers]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=self.reshard)
        fully_shard(prepared, mesh=mesh, reshard_after_forward=False)  # it is needed again at once
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

    def _sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: the backward passes have done it."""

    def _norm(self, value: torch.Tensor) -> float:
        return float(value.full_tensor() if isinstance(value, DTensor) else value)

    def saved(self, student: Student) -> Savable:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return GatheredModel(student.model, get_model_state_dict(student.model, options=options))

    def state_of(self, optimizer: Any) -> TakesState:
        return _ShardedState(optimizer)

    def snapshot_of(self, optimizer: Any) -> HoldsState:
        return Snapshot(gathered_state(optimizer, keep=self.processes.main))


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


class Snapshot:
    """An optimizer's whole state as it was."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


def gathered_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """A sharded optimizer's state in whole tensors on the CPU, gathered one by one. Every process must call it.

    Args:
        keep: whether this process wants them; the others pass them on.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if keep else None

    state = optimizer.state_dict()
    kept = {i: {name: whole(value) for name, value in values.items()} for i, values in state["state"].items()}
    return {**state, "state": kept}


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """A whole tensor of the optimizer's state in the shards of its parameter; a step count as it is."""
    if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape):
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
