"""DeepSpeed's ZeRO stages 2 and 3 beside the other ways in which the trained weights may lie (ours).

DeepSpeed owns the backward pass, the sum over processes, clipping and the optimizer step. Loss, minibatches, checkpoints and the
files of a run stay what they are: a gradient is the sum over all processes of a loss that is divided by the tokens of all of them,
and what is saved are whole tensors.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from zppo.errors import LauncherError
from zppo.train.checkpoint import HoldsState, Savable, TakesState
from zppo.train.models import Student
from zppo.train.precision import keep_logits_small
from zppo.train.team import Team
from zppo.train.weights import GatheredModel, MakeOptimizer, Snapshot, Weights, checksum
from zppo.train.zero_launch import Stage

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 50_000_000
"""Numbers that are reduced or gathered at once. DeepSpeed's own 500,000,000 are buffers of 2 GB in fp32."""


class ZeroWeights(Weights):
    """ZeRO-2: gradients and optimizer are sharded, every process holds all weights. ZeRO-3: the weights are sharded too.

    Args:
        stage: of ZeRO.
        deepspeed: the package, of `import_deepspeed`.
        tuning: fields of DeepSpeed's `zero_optimization` that change how it works and not what comes out.
    """

    sharded = True
    attempts_can_fail = False

    def __init__(
        self, team: Team, stage: Stage, deepspeed: Any, tuning: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        super().__init__(team)
        self.stage, self.deepspeed, self.tuning = stage, deepspeed, tuning
        shards = "weights, gradients and optimizer" if stage == 3 else "gradients and optimizer"
        self.kind = f"{shards} sharded over them (DeepSpeed ZeRO-{stage})"
        self._engine: Any = None
        self._trained: list[list[nn.Parameter]] = []  # by group of the recipe's optimizer, which DeepSpeed makes flat
        self._passes = 0  # backward passes since the last step

    def prepare(
        self, model: nn.Module, accelerator: Accelerator, make_optimizer: MakeOptimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """DeepSpeed's engine around the model, and its optimizer around the recipe's.

        Raises:
            LauncherError: nothing is sharded afterwards.
        """
        self.team.check_same("the student's weights at the start", checksum(model))
        placed: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
        keep_logits_small(placed, accelerator)
        made = make_optimizer(placed)
        self._trained = [list(group["params"]) for group in made.param_groups]
        self._engine, *_ = self.deepspeed.initialize(
            model=placed, optimizer=made, config=_config(self.stage, self.tuning)
        )
        self._check_sharded()
        optimizer: torch.optim.Optimizer = self._engine.optimizer
        engine: nn.Module = self._engine
        return engine, optimizer

    def start_gradients(self, model: nn.Module) -> None:
        """Nothing: the step leaves none, and no attempt is made twice."""

    def backward(self, loss: torch.Tensor, accelerator: Accelerator) -> None:
        """As `Weights.backward`; DeepSpeed divides what it sums by the number of processes."""
        self._passes += 1
        self._engine.backward(loss * self.team.size, scale_wrt_gas=False)

    def step(
        self, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float, *, finite: bool
    ) -> tuple[float, bool]:
        """As `Weights.step`; the norm of gradients that are not finite is infinite."""
        if not finite:
            self._pass(math.nan)  # DeepSpeed drops all gradients of a step where one is not finite
        elif not self._passes:
            self._pass(0.0)  # without a pass it has no gradients, and 0 is a step
        self._passes = 0
        self._engine.optimizer.clip_grad = max_norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()

    def _pass(self, factor: float) -> None:
        """A forward and backward pass of one token, the same in every process; all gradients are `factor` times something."""
        logits = self._engine(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self._engine.device)).logits
        self._engine.backward((logits.float() * factor).sum(), scale_wrt_gas=False)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As `Weights.whole`. DeepSpeed's hooks are off inside: passes of one process must neither gather nor free."""
        if self.stage == 2:
            yield
            return
        offload = self._engine.optimizer.parameter_offload
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            with self.deepspeed.zero.GatheredParameters(list(self._engine.module.parameters())):
                yield
        finally:
            offload.setup_zero_stage3_hooks()

    def saved(self, student: Student) -> Savable:
        if self.stage == 2:
            self.team.check_same("the trained weights", checksum(student.model))
        whole = {}  # by parameter: two names may share one
        for parameter in student.model.parameters():
            with self.deepspeed.zero.GatheredParameters([parameter]):  # of stage 2 they are whole
                if self.team.main:
                    whole[id(parameter)] = parameter.detach().clone().cpu()
        named = student.model.state_dict(keep_vars=True)
        return GatheredModel(student.model, {name: whole.get(id(value), value) for name, value in named.items()})

    def state_of(self, optimizer: Any) -> TakesState:
        return _ZeroState(self._engine, self._trained, self.team, self.deepspeed.utils)

    def snapshot_of(self, optimizer: Any) -> HoldsState:
        return Snapshot(_ZeroState(self._engine, self._trained, self.team, self.deepspeed.utils).gathered())

    def _check_sharded(self) -> None:
        held = sum(len(flat) for flat in _flats(self._engine))
        shapes = [_shape(p) for group in self._trained for p in group]
        whole = sum(shape.numel() for shape in shapes)
        if held * self.team.size > whole + self.team.size * (
            len(shapes) + 2 * len(self._trained)
        ):  # shares are filled up
            raise LauncherError(
                f"ZeRO-{self.stage} was asked for, but this process keeps {held:,} of {whole:,} numbers, and there are "
                f"{self.team.size} processes: train without sharding (train.sharding: none, recipes/accelerate/ddp.yaml)"
            )


def import_deepspeed(device: str) -> Any:
    """The package, set up for this kind of device.

    Raises:
        LauncherError: it is not installed, or was loaded for another kind.
    """
    try:
        deepspeed = importlib.import_module("deepspeed")
    except Exception as error:  # not installed; or installed, and something that it needs is broken
        raise LauncherError(
            f"training with DeepSpeed was asked for, and it cannot be imported: {error}. Install it with "
            "`pip install 'zppo[deepspeed]'`, or take train.sharding=fsdp2"
        ) from error
    found = deepspeed.get_accelerator().device_name()
    if found != device:
        raise LauncherError(
            f"DeepSpeed is set up for {found!r}, and the run trains on {device!r}: set DS_ACCELERATOR={device} in the environment"
        )
    # It would compile a kernel for inference on CPUs that nothing here calls, and end the process where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _config(stage: int, tuning: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration: fp32 throughout, and the caller says when a step is due."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # it must be told one, and only counts by it
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear for the whole process
            **tuning,
            "stage": stage,
        },
    }


def _flats(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors that this process's optimizer moves: its share of all weights."""
    zero = engine.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return list(zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter: stage 3 keeps an empty tensor where it is not gathered."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class _ZeroState:
    """DeepSpeed's optimizer, which takes and gives the state of a `torch.optim.AdamW` over whole weights."""

    def __init__(self, engine: Any, groups: list[list[nn.Parameter]], team: Team, utils: Any) -> None:
        self._zero, self._flats = engine.optimizer, _flats(engine)
        self._inner = self._zero.optimizer  # the recipe's, over flat shards
        self._trained, self._sizes = [p for group in groups for p in group], [len(group) for group in groups]
        self._team, self._utils = team, utils

    @property
    def state(self) -> Mapping[Any, Any]:
        return {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return []

    def gathered(self) -> dict[str, Any]:
        """The whole state, on the CPU of the first process. Every process must call it."""
        state: dict[int, Any] = {}
        if self._flats[0] in self._inner.state:  # after the first step
            self._link()
            for index, parameter in enumerate(self._trained):
                state[index] = {"step": self._inner.state[self._flats[0]]["step"].clone()}
                for name in _MOMENTS:
                    full = self._utils.safe_get_full_optimizer_state(parameter, name)
                    state[index][name] = full.cpu() if self._team.main else None
        groups, first = [], 0
        for group, size in zip(self._inner.param_groups, self._sizes, strict=True):
            groups.append({**group, "params": list(range(first, first + size))})
            first += size
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        held, groups = state["state"], state["param_groups"]
        if [len(g["params"]) for g in groups] != self._sizes or len(held) not in (0, len(self._trained)):
            raise ValueError(f"it is over {sum(len(g['params']) for g in groups)} tensors, not {len(self._trained)}")
        for group, saved in zip(self._inner.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        if not held:
            return
        for flat in self._flats:
            moments = {name: torch.zeros_like(flat, requires_grad=False) for name in _MOMENTS}
            self._inner.state[flat] = {"step": held[0]["step"].clone(), **moments}
        self._link()
        for index, parameter in enumerate(self._trained):
            for name in _MOMENTS:
                self._set(parameter, name, held[index][name])

    def _link(self) -> None:
        """Stage 2: parameters learn their place in the state. DeepSpeed does it itself, but for its first group alone."""
        for parameters, flat in zip(getattr(self._zero, "bit16_groups", ()), self._flats, strict=False):
            self._utils.lazy_init_hp_params_optimizer_state(parameters, flat, self._inner.state)

    def _set(self, parameter: nn.Parameter, name: str, value: torch.Tensor) -> None:
        shape = _shape(parameter)
        if value.shape != shape:
            raise ValueError(f"a moment of shape {tuple(value.shape)} for weights of {tuple(shape)}")
        if not hasattr(parameter, "ds_tensor"):
            self._utils.safe_set_full_optimizer_state(parameter, value, name)
            return
        each = parameter.ds_tensor.numel()  # the last share is filled up
        padded = nn.functional.pad(value.flatten(), (0, each * self._team.size - value.numel()))
        self._utils.safe_set_local_optimizer_state(parameter, padded[each * self._team.rank :][:each], name)
