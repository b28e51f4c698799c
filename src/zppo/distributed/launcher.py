"""What a launcher (torchrun, accelerate launch, srun) asked for, and whether that is what stands. No torch: the command line asks too."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zppo.errors import LauncherError, SettingsError

if TYPE_CHECKING:
    from zppo.config.methods import Loss
    from zppo.config.settings import TrainSettings

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
    env = {**env, **started_by_slurm(env)}
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


def check_shards(train: TrainSettings, launch: Launch, loss: Loss = "policy") -> None:
    """Whether so many processes can shard what a recipe trains, before they look for one another.

    Raises:
        SettingsError: they cannot, or what the recipe says of shards is said of none.
    """
    sharding, size = launch.sharding or train.sharding, launch.processes
    if sharding == "none" and (train.shard_within is not None or train.offload):
        name = "train.offload is on" if train.offload else f"train.shard_within is {train.shard_within}"
        raise SettingsError(f"{name}, and nothing is sharded: set train.sharding=fsdp2 and start several processes, or leave it out")
    if train.shard_within is not None and size > 1 and size % train.shard_within:
        raise SettingsError(
            f"train.shard_within is {train.shard_within}, and {size} processes cannot be split into groups of so many: take a divisor of "
            f"{size}"
        )
    if sharding != "none" and train.optimizer != "adamw" and train.lora is None:
        raise SettingsError(
            f"train.optimizer={train.optimizer} does not go with sharded weights ({sharding}), whose state it cannot hold: set it "
            "to adamw, whose state is sharded, or train adapters (train.lora), which every process holds whole"
        )
    if sharding != "none" and loss == "self-distill":
        raise SettingsError(
            f"a student that teaches itself (sdpo, opsd) reads its weights twice a pass, which they cannot be while sharded ({sharding}): "
            "leave train.sharding and FSDP out, so that every process holds all weights, or take another method"
        )


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
    with suppress(LauncherError):  # the run says what is wrong
        env = {**env, **started_by_slurm(env)}
    try:
        return int(env["RANK"]) if int(env.get("WORLD_SIZE", "1")) > 1 else None
    except (KeyError, ValueError):
        return None


def started_by_slurm(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torchrun would have set, for a process that `srun` started as one of several; empty for any other.

    The first process listens on the first host of the step, at a port that follows from the job's number; MASTER_ADDR and MASTER_PORT win
    where they are set.

    Raises:
        LauncherError: variables contradict one another, so that there would be several runs, or some processes would wait for ever.
    """
    tasks = _slurm_tasks(env)
    if tasks == 1 or _at_a_terminal(env):
        return {}
    if "GROUP_WORLD_SIZE" in env:  # srun started torchrun, and that this process
        if (agents := _number(env, "GROUP_WORLD_SIZE", 1)) != tasks:
            raise LauncherError(
                f"srun started {tasks} launchers, and this process's counts {agents} (GROUP_WORLD_SIZE), so there would be several runs: "
                "start one a node, srun --ntasks-per-node=1 torchrun --nnodes $SLURM_NNODES --rdzv_backend c10d --rdzv_endpoint HOST:PORT, "
                "as recipes/slurm.sbatch does"
            )
        return {}
    rank, local = _number(env, "SLURM_PROCID", 0), _number(env, "SLURM_LOCALID", 0)
    if not 0 <= rank < tasks:
        raise LauncherError(f"SLURM_PROCID is {rank}, but srun started {tasks} processes: leave SLURM's variables as srun sets them")
    devices = [device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    ours = {"RANK": str(rank), "WORLD_SIZE": str(tasks)}
    for name, value in ours.items():
        if env.get(name, value) != value:
            raise LauncherError(
                f"{name} is {env[name]!r} in the environment, but srun started {tasks} processes, of which this is number {rank}: set "
                f"neither {' nor '.join(ours)} in the batch script, zppo takes them from SLURM"
            )
    if "SLURM_HET_SIZE" in env and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
        raise LauncherError(
            f"srun started {tasks} processes in a heterogeneous job (SLURM_HET_SIZE), whose parts have hosts and job numbers of their own: "
            "set MASTER_ADDR to the host of the first process, and MASTER_PORT to a free port of it, in the batch script"
        )
    # With --gpus-per-task a process sees its own GPU alone, which is the first for it.
    ours["LOCAL_RANK"] = env.get("LOCAL_RANK", str(local % len(devices) if devices else local))
    ours["MASTER_ADDR"] = env.get("MASTER_ADDR") or _first_host(env)
    nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
    if nodes > 1 and ours["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        raise LauncherError(
            f"MASTER_ADDR is {ours['MASTER_ADDR']}, and srun started processes on {nodes} nodes, each of which would look for the first "
            "one on itself: unset it, zppo takes the first host from SLURM"
        )
    ours["MASTER_PORT"] = env.get("MASTER_PORT") or str(_slurm_port(env))
    return ours


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """How many processes `srun` started this one with; 1 outside of a step of SLURM."""
    if "SLURM_PROCID" not in env:
        return 1
    # In a batch script and in the shell of salloc SLURM_NTASKS is what may be started, and nothing has been started yet.
    if "SLURM_STEP_NUM_TASKS" not in env and "SLURM_TASK_PID" in env and "SLURM_STEP_ID" not in env:
        return 1
    name = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in env), "SLURM_NPROCS")
    if (tasks := _number(env, name, 1)) < 1:
        raise LauncherError(f"{name} is {tasks} in the environment: leave SLURM's variables as srun sets them")
    return tasks


def _at_a_terminal(env: Mapping[str, str]) -> bool:
    """Whether this is a shell that `srun --pty` opened: of its tasks the first alone has a terminal, and the others have ended."""
    return "SLURM_PTY_PORT" in env and env.get("SLURM_PROCID") == "0" and os.isatty(0)


def _first_host(env: Mapping[str, str]) -> str:
    """The first of SLURM's list of hosts, which may be short for many: gpu[03-06,09]-ib,login1."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = next((env[name] for name in names if env.get(name)), "")
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+(?=,|$)", hosts)
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""
    if not re.fullmatch(r"[\w.:-]+", host):
        raise LauncherError(
            f"srun started several processes, and the first host cannot be read from {names[1]} ({hosts!r}): set MASTER_ADDR to the host "
            "of the first process"
        )
    return host


def _slurm_port(env: Mapping[str, str]) -> int:
    """The same in all processes of a step, another one for another step; below the ports that systems give away by themselves."""
    return 15_000 + (_number(env, "SLURM_JOB_ID", 0) * 31 + _number(env, "SLURM_STEP_ID", 0)) % 15_000


def _true(env: Mapping[str, str], name: str, default: bool = False) -> bool:
    return env.get(name, str(default)).lower() in ("1", "true", "yes", "y", "on", "t")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LauncherError(f"{name} is {text!r} in the environment: a number is needed; start with {_PER_NODE}") from None
