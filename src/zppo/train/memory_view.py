"""The memory estimate of a dry run as a table, with a verdict, and what to turn where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zppo.config.settings import LoraSettings, Settings
from zppo.train.machine import GIB, Machine, find_machine
from zppo.train.memory import Memory, estimate

_TIGHT = 0.9  # of what is usable; above, an allocator's waste may be what does not fit

Rows = list[tuple[str, str]]


def memory_rows(
    settings: Settings, resolve: Callable[[str], str] = str, machine: Machine | None = None, images: int = 0
) -> Rows:
    """(what, how much) for the plan, the verdict last.

    Args:
        resolve: names of models -> folders.
        machine: None for the one that this runs on.
        images: most images of a question.

    Raises:
        ModelError: a checkpoint on disk cannot be read.
    """
    machine = machine or find_machine(settings.train.device)
    memory = _estimate(settings, machine, resolve, images)
    if isinstance(memory, str):
        return [("estimate", memory)]
    return [
        *_parts(settings, memory),
        ("at most", _against(memory.total, machine)),
        *_verdict(settings, memory, machine, resolve, images),
    ]


def _estimate(settings: Settings, machine: Machine | None, resolve: Callable[[str], str], images: int) -> Memory | str:
    gpu = machine is not None and machine.gpu
    return estimate(settings, gpu=gpu, capacity=machine.total if machine and gpu else 0, resolve=resolve, images=images)


def _parts(settings: Settings, memory: Memory) -> Rows:
    trained = "adapters and frozen weights" if settings.train.lora else "weights"
    rows = [
        (f"student: {trained}", _size(memory.weights)),
        ("gradients", _size(memory.gradients)),
        (f"{settings.train.optimizer} state", _size(memory.optimizer)),
    ]
    if memory.others:
        rows.append(("teachers and judge in this process", _size(memory.others)))
    if memory.vllm:
        rows.append(("vLLM in this process", f"{_size(memory.vllm)} (rollout.vllm.gpu_memory_utilization)"))
    if memory.cast:
        rows.append(("bf16 copy of the weights", _size(memory.cast)))
    if memory.rows:
        each = f"{memory.rows:,} rollouts at once, {_size(memory.row)} each at the limits"
        rows.append(("sampling", f"{_size(memory.row * memory.rows)} ({each})"))
    rows.append(("update: activations", f"{_size(memory.activations)} (micro-batches of {memory.tokens:,} tokens)"))
    if memory.images:
        rows.append(("preprocessed images of a step", f"{_size(memory.images)} at most (data.images.cache_gib)"))
    if memory.tower:
        rows.append(
            ("update: vision tower", f"{_size(memory.tower)} (roughly; every row with images of the largest size)")
        )
    if memory.layer:
        rows.append(("update: a layer computed again", f"{_size(memory.layer)} (not while logits are held)"))
    rows.append(("update: logits", f"{_size(memory.logits)} (gradients included)"))
    if settings.train.sharding != "none":
        rows.append(("sharding", "not taken off here: weights, gradients and optimizer state are counted whole"))
    return rows


def _verdict(
    settings: Settings, memory: Memory, machine: Machine | None, resolve: Callable[[str], str], images: int
) -> Rows:
    if machine is None:
        return [("verdict", "this machine does not say how much memory it has")]
    room = machine.usable
    if memory.total <= room:
        tight = memory.total > _TIGHT * room
        return [
            ("verdict", "fits, but it is tight: an estimate may be off by more than what is left" if tight else "fits")
        ]
    words = []
    if memory.standing + memory.update > room:
        advice, memory = _lighter(settings, memory, machine, resolve, images)
        words.append(advice)
    if memory.standing + memory.sampling > room:
        words.append(_fewer_rows(memory, machine))
    return [("verdict", "; ".join(words))]


def _fewer_rows(memory: Memory, machine: Machine) -> str:
    """How many rollouts fit at once."""
    fit = (machine.usable - memory.standing - memory.cast) // memory.row if memory.row else 0
    if fit < 1:
        return "sampling: not even one rollout fits beside what stands; lower rollout.max_new_tokens or data.max_prompt_tokens"
    says = (
        "it halves them by itself until they fit"
        if machine.gpu
        else "set it: a machine that runs out of RAM ends the run"
    )
    return f"sampling: {fit:,} of {memory.rows:,} rollouts fit at once, rollout.max_rows={fit}; {says}"


def _lighter(
    settings: Settings, memory: Memory, machine: Machine, resolve: Callable[[str], str], images: int
) -> tuple[str, Memory]:
    """The first change of settings with which the update fits, in words, and the memory with it."""

    def fitting(changes: Mapping[str, Any]) -> Memory | None:
        lighter = _estimate(_with(settings, changes), machine, resolve, images)
        fits = isinstance(lighter, Memory) and lighter.standing + lighter.update <= machine.usable
        return lighter if fits and isinstance(lighter, Memory) else None

    halves = settings.train.tokens_per_microbatch == "auto" and machine.gpu
    if halves and (smallest := fitting({"tokens_per_microbatch": memory.longest})):
        says = (
            "the update does not fit at once; train.tokens_per_microbatch=auto halves its micro-batches until they do"
        )
        return says, smallest
    for changes in _changes(settings, memory):
        if lighter := fitting(changes):
            keys = " ".join(f"--train.{key}={_shown(value)}" for key, value in changes.items())
            return (
                f"the update does not fit; it would with {keys} ({_size(lighter.standing + lighter.update)})",
                lighter,
            )
    return (
        "the update does not fit, even with LoRA, gradient checkpointing and one row at a time: lower rollout.max_new_tokens or "
        "data.max_prompt_tokens, put the teacher on another machine (teacher.base_urls), or take a smaller student",
        memory,
    )


def _changes(settings: Settings, memory: Memory) -> Iterator[Mapping[str, Any]]:
    """Settings of `train` that take less memory, those that cost least first."""
    again: dict[str, Any] = {} if settings.train.gradient_checkpointing else {"gradient_checkpointing": True}
    small: dict[str, Any] = {"tokens_per_microbatch": memory.longest} if memory.tokens > memory.longest else {}
    steps: list[dict[str, Any]] = [small, again, {**small, **again}]
    if settings.train.lora is None:
        if settings.train.optimizer == "adamw":
            steps.append({**small, **again, "optimizer": "adamw-8bit"})
        steps.append({**small, **again, "lora": LoraSettings()})
    yield from (step for step in steps if step)


def _with(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    return settings.model_copy(update={"train": settings.train.model_copy(update=dict(changes))})


def _shown(value: Any) -> str:
    return "'{}'" if isinstance(value, LoraSettings) else str(value).lower()


def _against(needed: int, machine: Machine | None) -> str:
    if machine is None:
        return _size(needed)
    free = (
        ""
        if machine.free is None or machine.free > _TIGHT * machine.total
        else f", {_size(machine.free)} of it free now"
    )
    return f"{_size(needed)} of {_size(machine.total)} ({machine.name}{free})"


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB // 10 else f"{count / 1024**2:,.1f} MiB"
