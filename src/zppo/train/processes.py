"""Joins the processes that a launcher started into one run."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from zppo.config.settings import Settings
from zppo.errors import LauncherError, SettingsError
from zppo.runs.signals import Stop
from zppo.train.launch import Launch
from zppo.train.team import Team
from zppo.train.weights import ShardedWeights, Weights


def make_accelerator(settings: Settings, launch: Launch) -> Accelerator:
    """Device and precision by the recipe; with several processes it waits until all are here.

    Raises:
        LauncherError: what the launcher asked for is not what stands.
    """
    on_cpu = settings.train.device == "cpu" or not torch.cuda.is_available()
    bf16 = settings.train.precision == "bf16" or (settings.train.precision == "auto" and not on_cpu)
    precision = "bf16" if bf16 else "no"
    launch.check_precision(precision)
    # accelerate would shard on GPUs, and turn the wish into something else on CPUs: `make_weights` does it on both.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_patience(settings))],
    )
    launch.check_processes(accelerator.num_processes)
    return accelerator


def make_weights(settings: Settings, accelerator: Accelerator, launch: Launch, stop: Stop) -> Weights:
    """The team of this run's processes, and how the trained weights lie over them.

    Raises:
        LauncherError: sharding was asked for, and there is one process.
        SettingsError: the recipe trains what cannot be sharded.
    """
    size, sharding = accelerator.num_processes, launch.sharding or settings.train.sharding
    if size == 1:
        if sharding != "none":
            raise LauncherError(
                f"sharding over several processes was asked for ({sharding}), but one runs: start with torchrun --nproc_per_node N -m zppo "
                "train RECIPE, or set train.sharding to none"
            )
        return Weights(Team(stop=stop))
    if sharding != "none" and (settings.train.lora is not None or settings.train.optimizer != "adamw"):
        name = "train.lora" if settings.train.lora is not None else f"train.optimizer={settings.train.optimizer}"
        raise SettingsError(
            f"{name} does not go with sharding ({sharding}): leave one of them out. With adapters or an 8-bit optimizer there is "
            "little left to shard"
        )
    group = None  # the processes' own, where that carries objects on the CPU
    if torch.distributed.get_backend() != "gloo":
        group = torch.distributed.new_group(backend="gloo", timeout=_patience(settings))
    team = Team(accelerator.process_index, size, group, stop)
    return Weights(team) if sharding == "none" else ShardedWeights(team, reshard=launch.reshard)


def _patience(settings: Settings) -> timedelta:
    return timedelta(seconds=settings.train.collective_timeout)
