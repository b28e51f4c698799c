"""The trained weights sharded over the processes with FSDP2 [zppo]. Loaded where a run asks for it: torch takes seconds to import that.

No process holds all of the student in one place: each reads its own part of the files. Where their form does not allow that, the first
process reads all of it, and passes one layer after the other on. In bf16 layers are gathered in bf16 and gradients summed in fp32; weights
and optimizer state are fp32 shards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from zppo.distributed.checkpoint_parts import WeightFiles, files_of, read_weights, untied, write_moments, write_weights
from zppo.distributed.parallel import ReplicatedWeights, Value, checksum, keep_logits_small, trained_parameters
from zppo.distributed.processes import Processes
from zppo.distributed.retries import Retries
from zppo.engines.output_head import head_form
from zppo.engines.vllm.vllm_engine import merged_weights
from zppo.errors import LauncherError
from zppo.models.quantized import unpacked
from zppo.models.student_model import Student, UnreadStudent
from zppo.models.vision_parts import parts_of
from zppo.runs.checkpoint import HoldsState, TakesState, weights_folder, write_whole_state


class ShardedWeights(ReplicatedWeights):
    """FSDP2: weights, gradients and optimizer state are sharded; a pass gathers one layer after the other.

    Every process must make equally many passes, so what only some passes go through stays whole in each, and its gradients are summed
    before the optimizer step: a vision tower and its projector, which a process without a picture does not call. So do adapters, which
    are small, and weights in 4 bits, which are no numbers that could be cut.

    Args:
        reshard: free a layer's gathered weights after its forward pass (less memory) or after its backward pass.
        within: so many neighbouring processes share one copy of the weights, and gradients are summed over all of them (HSDP); None
            for all processes.
        offload: a process's share of weights, gradients and optimizer state stays in the processor's memory, and the optimizer steps there.
        bf16: gather weights in bf16; gradients are summed in fp32 all the same.
        retries: whether an attempt that runs out of memory is made again (`together`).
    """

    sharded = True
    kind = "weights sharded over them (FSDP2)"

    def __init__(
        self,
        processes: Processes,
        *,
        reshard: bool = True,
        retries: bool = False,
        within: int | None = None,
        offload: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__(processes)
        self.reshard, self.within, self.offload, self.bf16 = reshard, within or processes.size, offload, bf16
        if self.within < processes.size:
            self.kind = f"weights sharded over each {self.within} of them (FSDP2)"
        self._files: WeightFiles | None = None  # what each process reads its part of
        self._loaded = False  # the first process has the weights, or the files have, and the others know their shapes
        self._mesh: DeviceMesh | None = None
        self._retries = Retries(processes) if retries else None
        self._gathered = False
        self._modules: list[tuple[FSDPModule, bool]] = []  # with `reshard_after_forward` of each

    def load(
        self, make: Callable[[], Student], unread: Callable[[], UnreadStudent | str] | None = None, say: Callable[[str], None] | None = None
    ) -> Student:
        """The student without its weights, of which each process reads its own part in `prepare`.

        Where that cannot be, which is said, the first process reads all of them with `make`, and they follow layer by layer in `prepare`.
        One in 4 bits, a fraction of the size and no plain numbers, is read by every process.
        """
        own, files, why = None, None, "not all processes see the same files of it"
        if unread is not None and self.processes.main:
            found = unread()
            if isinstance(found, str):
                why = found
            elif isinstance(named := files_of(found.student.model, found.folder), str):
                why = named
            else:
                own, files = found.student, named
        self._files = self._agreed(files)
        if self._files is None and self.processes.main:
            own = make()
        bare = None
        if own is not None and all(p.is_floating_point() for p in own.model.parameters()):
            empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in own.model.parameters()}
            bare = copy.deepcopy(own, empty)
        if self._files is None and unread is not None and say is not None and self.processes.main:
            say(f"{'every process' if bare is None else 'the first process, which passes it on,'} reads the whole student: {why}")
        sent = self.processes.gather(bare)[0]
        self._loaded = sent is not None
        return own or sent or make()

    def _agreed(self, files: WeightFiles | None) -> WeightFiles | None:
        """The first process's, where all processes see the same under that name."""
        found = self.processes.gather(files)[0]
        if found is None:
            return None
        seen = self.processes.gather(found.seen())
        return found if None not in seen and len(set(seen)) == 1 else None

    def prepare(self, model: nn.Module, accelerator: Accelerator) -> nn.Module:
        """Shards every layer that the architecture names as one, then the rest.

        Raises:
            LauncherError: parameters are not sharded afterwards.
        """
        if not self._loaded:
            self.processes.check_same("the student's weights at the start", checksum(model))
        prepared: nn.Module = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        keep_logits_small(prepared, accelerator)
        kept = kept_whole(prepared)
        if self._loaded:
            self._place(prepared, accelerator.device, kept)
            kept = kept_whole(prepared)
        kinds = set(getattr(prepared, "_no_split_modules", None) or ())
        layers: list[nn.Module] = [m for m in prepared.modules() if type(m).__name__ in kinds and not kept.issuperset(m.parameters())]
        for module in (*layers, prepared):
            if self._loaded and self._files is None:
                self._place(module, accelerator.device, {p for p in module.parameters() if not isinstance(p, DTensor)} - kept)
            again = self.reshard and module is not prepared  # all of it is needed again at once
            fully_shard(module, reshard_after_forward=again, ignored_params=kept, **self._policies(accelerator.device))
        if self._files is not None:
            self._read(prepared, accelerator.device)
        for tensor in (*kept, *prepared.buffers()):  # the others are there
            tensor.data = tensor.data.to(accelerator.device)
        _always_differentiate(prepared)
        sharded = [m for m in prepared.modules() if isinstance(m, FSDPModule)]
        self._modules = [(m, self.reshard and m is not prepared) for m in sharded]
        for module in sharded:
            module.set_gradient_divide_factor(1.0)  # sums, as above
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            if self._retries is not None:
                self._retries.watch(module)
        whole = [name for name, parameter in prepared.named_parameters() if not isinstance(parameter, DTensor) and parameter not in kept]
        if whole:
            raise LauncherError(
                f"sharding was asked for, but {len(whole)} parameters are not sharded (the first is {whole[0]!r}): train without "
                "sharding (train.sharding: none, recipes/accelerate/ddp.yaml)"
            )
        with self.scoring():  # by a pass, which all must make together: now, and not where one of them scores its first row
            head_form(prepared, again=True)
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

    def _place(self, module: nn.Module, device: torch.device, wanted: set[nn.Parameter]) -> None:
        """Gives these parameters of a module room on the device, and what the first process has read of them, if it has."""
        placed = dict[int, nn.Parameter]()  # tied weights stay one parameter
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter not in wanted:
                    continue
                if id(parameter) not in placed:
                    own = parameter.detach()
                    sent = self._files is None
                    value = own.to(device) if sent and self.processes.main else torch.empty_like(own, device=device)
                    if sent:
                        dist.broadcast(value, 0)
                    placed[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
                owner.register_parameter(name, placed[id(parameter)])

    def _read(self, model: nn.Module, device: torch.device) -> None:
        """Gives all that is still on the meta device room, and reads this process's part of the weights."""
        assert self._files is not None
        self._place(model, torch.device("cpu") if self.offload else device, {p for p in model.parameters() if p.is_meta})
        for owner in model.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(owner, name, torch.empty_like(buffer, device=device))
        read_weights(self._files, model)

    @contextmanager
    def whole(self) -> Iterator[None]:
        self._gather()
        self._gathered = True
        try:
            yield
        finally:
            self._gathered = False
            for module, reshard in self._modules:
                module.set_reshard_after_forward(reshard, recurse=False)
                module.reshard()

    def _gather(self) -> None:
        for module, _ in self._modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A backward pass would let go of what the outermost module has gathered, and an update would leave that behind."""
        try:
            yield
        finally:
            for module, _ in self._modules:
                module.reshard()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, out of memory in one process is an error of all of them, after which all can begin the work again.

        The others would wait for it in the middle of a pass: see `Retries`. Every process must enter.

        Raises:
            RuntimeError: memory ran out, here or in another process (`MemoryElsewhereError`).
        """
        if self._retries is None:
            yield
            return
        root, _ = self._modules[0]
        with self._retries.agreed(root, self._gather if self._gathered else lambda: None):
            yield

    def of_all(self, value: Value) -> list[Value]:
        return [value] if self._retries is None else self.processes.gather(value)

    def _sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of what every process holds whole; for the rest the backward passes have done it."""
        super()._sum_gradients(p for p in parameters if not isinstance(p, DTensor))

    def _clip(self, parameters: list[nn.Parameter], accelerator: Accelerator, max_norm: float) -> float:
        """Shards and whole gradients are not mixed by torch: one norm is made of the norms of both."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        kinds = [kind for cut in (True, False) if (kind := [g for g in gradients if isinstance(g, DTensor) == cut])]
        if len(kinds) < 2:
            return _number(accelerator.clip_grad_norm_(parameters, max_norm))
        norm = math.hypot(*(_number(nn.utils.get_total_norm(kind)) for kind in kinds))
        scale = max_norm / (norm + 1e-6)  # as torch clips
        if scale < 1:
            for kind in kinds:
                torch._foreach_mul_(kind, scale)
        return norm

    def _check_whole(self, student: Student) -> None:
        whole = nn.ParameterList(p for p in student.model.parameters() if not isinstance(p, DTensor))
        self.processes.check_same("the weights that every process holds whole", checksum(whole))

    def write_final(self, folder: Path, student: Student) -> None:
        """Each process writes its part; see `zppo.distributed.checkpoint_parts`."""
        self._check_whole(student)
        if student.adapters is None:
            write_weights(folder, student.model, self.processes)
            return
        merged = student.adapters.merged({})  # its shape
        values = ((name, value.float()) for name, value in merged_weights(student.model, unpack=unpacked))
        buffers = ((name, value) for name, value in untied(merged).items() if not isinstance(value, nn.Parameter))
        write_weights(folder, merged, self.processes, chain(values, buffers))

    def state_of(self, optimizer: Any) -> TakesState:
        return _ShardedState(optimizer)

    def write(self, folder: Path, student: Student, optimizer: HoldsState) -> None:
        """Each process writes its part of both; see `zppo.distributed.checkpoint_parts`."""
        self._check_whole(student)
        if student.adapters is not None:  # the first process has all that is trained
            if self.processes.main:
                write_whole_state(folder, student.adapters, optimizer)
            return
        write_weights(weights_folder(folder), student.model, self.processes)
        write_moments(folder, cast(torch.optim.Optimizer, optimizer), student.model, self.processes)


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


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that are not cut into shards: see `ShardedWeights`."""
    parts = parts_of(cast(PreTrainedModel, model))
    return {p for name, p in model.named_parameters() if parts[name] != "language" or ".lora_" in name or not p.is_floating_point()}


def _always_differentiate(model: nn.Module) -> None:
    """Gradients go down to the embeddings in every pass, so that all processes gather the same layers on the way back.

    With adapters above frozen layers, or in the vision tower, they would go down there only where a pass has a picture.
    """

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    cast(PreTrainedModel, model).get_input_embeddings().register_forward_hook(hook)


def _number(norm: torch.Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """A whole tensor of the optimizer's state in the shards of its parameter; a step count as it is."""
    if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape):
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
