"""What a launcher (torchrun, accelerate launch) asked for, and whether that is what stands. No torch: the command line asks too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from zppo.errors import LauncherError

Sharding = Literal["none", "fsdp2"]

_PER_NODE = "torchrun --nproc_per_node N -m zppo train RECIPE"


@dataclass(frozen=True, slots=True)
class Launch:
    """The launcher's wishes.

    Attributes:
        rank, processes: this process, and how many there are.
        sharding: what an accelerate configuration says, None where there is none that says something.
        mixed_precision: the same; "" for none.
        reshard: FSDP2's `reshard_after_forward`.
        offload: whether it asks for FSDP2's offload to the CPU.
    """

    rank: int = 0
    processes: int = 1
    sharding: Sharding | None = None
    mixed_precision: str = ""
    reshard: bool = True
    offload: bool = False

    def check_processes(self, running: int) -> None:
        """Raises LauncherError unless as many processes train together as were started."""
        if running != self.processes:
            raise LauncherError(f"{self.processes} processes were started, but this one trains with {running}: start with {_PER_NODE}")

    def check_precision(self, precision: str) -> None:
        """Raises LauncherError where the accelerate configuration names another precision than the recipe's ("bf16" or "no")."""
        if self.mixed_precision not in ("", precision):
            ours = "bf16" if precision == "bf16" else "fp32"
            raise LauncherError(
                f"the accelerate configuration sets mixed_precision to {self.mixed_precision!r}, but the run computes in {ours} "
                "(train.precision): set both to the same, or mixed_precision to 'no'"
            )


def read_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Reads the environment that a launcher made.

    Raises:
        LauncherError: it asks for something that would silently be something else, or that is not built.
    """
    processes, rank = _number(env, "WORLD_SIZE", 1), _number(env, "RANK", 0)
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in env
    if launched_by_accelerate and "MASTER_ADDR" in env and "RANK" not in env:
        raise LauncherError(
            "accelerate launch was asked for several processes and started one: on CPUs it does not start more by itself. Use "
            f"{_PER_NODE} instead (recipes/accelerate/ for GPUs)"
        )
    for name, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if _true(env, name):
            raise LauncherError(f"the accelerate configuration asks for {what}, which zppo does not train with: {_MEND}")
    if (steps := env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "auto"):
        raise LauncherError(
            f"the accelerate configuration sets gradient_accumulation_steps to {steps}, which would scale the loss: leave it out. "
            "Minibatches are train.minibatches, and how much memory one pass takes is train.tokens_per_microbatch"
        )
    sharding: Sharding | None = None
    if _true(env, "ACCELERATE_USE_FSDP"):
        _check_fsdp(env)
        sharding = "fsdp2"
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "" if precision == "no" else precision
    reshard, offload = _true(env, "FSDP_RESHARD_AFTER_FORWARD", True), sharding is not None and _true(env, "FSDP_OFFLOAD_PARAMS")
    return Launch(rank, processes, sharding, precision, reshard, offload)


_MEND = (
    "take recipes/accelerate/ddp.yaml (every process holds all weights) or fsdp2.yaml (weights, gradients and optimizer are sharded, "
    "as with train.sharding: fsdp2)"
)


def _check_fsdp(env: Mapping[str, str]) -> None:
    if (version := env.get("FSDP_VERSION", "1")) != "2":
        raise LauncherError(f"the accelerate configuration asks for FSDP version {version}: set fsdp_version: 2")
    if _true(env, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise LauncherError(
            "the accelerate configuration sets fsdp_activation_checkpointing: set it to false, and train.gradient_checkpointing in "
            "the recipe to true"
        )


def rank_of(env: Mapping[str, str] = os.environ) -> int | None:
    """This process's rank where a launcher started several, else None."""
    try:
        return int(env["RANK"]) if int(env.get("WORLD_SIZE", "1")) > 1 else None
    except (KeyError, ValueError):
        return None


def _true(env: Mapping[str, str], name: str, default: bool = False) -> bool:
    return env.get(name, str(default)).lower() in ("1", "true", "yes", "y", "on", "t")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LauncherError(f"{name} is {text!r} in the environment: a number is needed; start with {_PER_NODE}") from None
