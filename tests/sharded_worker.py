"""One of several processes of tests/test_sharded.py: trains what only some passes go through, and what may run out of memory."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed.tensor import DTensor

from test_distributed import assert_near
from test_memory import Full
from test_update import update
from zppo.config.settings import TOKENS_PER_MICROBATCH, Settings
from zppo.core.advantages import step_advantages
from zppo.core.types import Group
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import Processes
from zppo.distributed.sharded import ShardedWeights
from zppo.engines.chat import Chat
from zppo.engines.logprobs import ForwardPass
from zppo.engines.out_of_memory import TokenBudget
from zppo.images import features
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits
from zppo.models.student_model import Student, load_chat, load_student, unread_student
from zppo.step_log import StepLog
from zppo.train.assemble import make_learner
from zppo.train.distillation import Distillation
from zppo.train.policy_gradient import PolicyGradient

LIMITS = PixelLimits(16 * 16, 24 * 24)
LAST_LAYER = ("*layers.2.*", "*visual*")
"""Above layers through which, without a picture, no gradient would go."""


@dataclass(frozen=True)
class Case:
    """What is trained: a checkpoint (a folder's name), settings of `train`, where memory runs out in the second process."""

    name: str
    student: str
    train: dict[str, Any] = field(default_factory=dict)
    full: str = ""
    quantize: str | None = None


AUTO = {"tokens_per_microbatch": "auto"}
CASES = (
    Case("rates", "qwen3_vl", {**AUTO, "offload": True, "vision": {"tower_rate": 0.5, "projector_rate": 0.25}}, full="backward"),
    Case("adapters", "qwen3_vl", {**AUTO, "lora": {"rank": 4, "alpha": 8, "targets": LAST_LAYER}}, full="forward"),
    Case("frozen", "qwen3_5", {"vision": {"freeze_tower": True}, "gradient_checkpointing": True}),
    Case("4 bits", "text", {"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": True}, quantize="4bit"),
)
FITS = 30
"""Padded tokens that the second process has memory for, where it runs out."""


def settings_of(case: Case, folder: Path) -> Settings:
    train = {"minibatches": 2, "learning_rate": 1e-4, "tokens_per_microbatch": 60, "device": "cpu", **case.train}
    student = {"model": str(folder / case.student), "quantize": case.quantize}
    return Settings(method="grpo", student=student, data={"train": "-"}, train=train, seed=1)


def runs_out(layer: torch.nn.Module, where: str) -> list[int]:
    """The layer fails on micro-batches of more padded tokens than fit; gives what was tried."""
    tried: list[int] = []

    def hook(_: Any, args: tuple[Any, ...]) -> Any:
        tried.append(args[0].shape[0] * args[0].shape[1])
        if tried[-1] > FITS:
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return (Full.apply(args[0]), *args[1:])  # type: ignore[no-untyped-call]
        return None

    layer.register_forward_pre_hook(hook)
    return tried


@contextmanager
def looks() -> Iterator[list[int]]:
    """Counts how many times the vision tower is asked."""
    counted, inner = [0], features.encode

    def encode(*args: Any) -> Any:
        counted[0] += 1
        return inner(*args)

    features.encode = encode  # type: ignore[assignment]
    try:
        yield counted
    finally:
        features.encode = inner


def check_parts(student: Student, weights: ReplicatedWeights) -> None:
    """The language model's own weights lie in shards, what sees, adapters and 4 bits do not."""
    for name, parameter in student.model.named_parameters():
        whole = "visual" in name or "lora_" in name or not parameter.is_floating_point()
        assert isinstance(parameter, DTensor) == (weights.sharded and not whole), name


def make_shards(case: Case, processes: Processes) -> ShardedWeights:
    auto = case.train.get("tokens_per_microbatch") == "auto"
    return ShardedWeights(processes, retries=auto, offload=case.train.get("offload", False))


def loaded(weights: ReplicatedWeights, settings: Settings, start: Path | None, images: bool) -> Student:
    """As a run loads it; in parts where that can be."""
    told: list[str] = []
    make = partial(load_student, settings, start, bf16=False, images=images)
    student = weights.load(make, partial(unread_student, settings, start, images=images), told.append)
    parts = weights.sharded and settings.train.lora is None
    assert len(told) == (weights.sharded and weights.processes.main and not parts), told
    assert parts == all(p.is_meta for p in student.model.parameters()) or not weights.processes.main
    return student


def check_resumed(case: Case, settings: Settings, chat: Chat, learner: PolicyGradient, groups: list[Group], start: Path) -> None:
    """What was saved goes on as what has saved it, over the same processes and in one of them alone; nothing is saved of it."""
    processes, nothing, advantages = learner.processes, None, step_advantages(groups, "nontrivial")
    expected = update(learner, groups, advantages, len(groups))
    for weights in (make_shards(case, processes), ReplicatedWeights()):
        student = loaded(weights, settings, start, chat.image_processor is not None)
        other, _ = make_learner(settings, student.model, chat, start, Accelerator(cpu=True), [], nothing, weights)  # type: ignore[arg-type]
        assert isinstance(other, PolicyGradient)
        other.check, other.sampler_is_exact, other.budget.tokens = None, learner.sampler_is_exact, learner.budget.tokens
        found = update(other, groups, advantages, len(groups))
        if weights.sharded:
            assert found == expected
        else:
            assert_near({k: found[k] for k in ("loss", "grad_norm")}, {k: expected[k] for k in ("loss", "grad_norm")}, case.name)


def distilled(settings: Settings, chat: Chat, learner: PolicyGradient, groups: Sequence[Group]) -> dict[str, float | None]:
    """A step of on-policy distillation on the same weights; memory runs out in it where it does in the learner."""
    model = load_student(settings, None, bf16=False, images=chat.image_processor is not None).model
    teacher, budget = ForwardPass(model, image_processor=chat.image_processor), TokenBudget(TOKENS_PER_MICROBATCH, adaptive=True)
    distiller = Distillation(learner.forward, teacher, learner.optimizer, budget, respond=lambda _: None, teacher_sampler=None)
    log = StepLog(1)
    distiller.update(groups, [], {}, log)
    assert not learner.weights.sharded or budget.tokens <= FITS
    return log.counts


def train(case: Case, weights: ReplicatedWeights, folder: Path, recorded: Sequence[Sequence[Group]], out: Path) -> dict[str, Any]:
    """Two steps; what was trained is saved in `out`, whole and as a checkpoint has it. What came of it."""
    settings = settings_of(case, folder)
    images = case.student != "text"
    chat = load_chat(settings.student, LIMITS, PixelCache(1 << 20)) if images else load_chat(settings.student)
    student = loaded(weights, settings, None, images)
    nothing: Any = None
    learner, optimizer = make_learner(settings, student.model, chat, None, Accelerator(cpu=True), [], nothing, weights)
    assert isinstance(learner, PolicyGradient)
    check_parts(student, weights)
    layer = student.model.get_decoder().layers[-1]
    tried = runs_out(layer, case.full) if case.full and weights.processes.rank == 1 else []
    metrics = []
    with looks() as looked:
        learner.check = None
        for step, groups in enumerate(recorded):
            # Old log-probs of a forward pass, in which memory may run out too.
            learner.sampler_is_exact = (step == 0) == (case.full != "forward")
            if case.full:
                learner.budget.tokens = TOKENS_PER_MICROBATCH  # it runs out in each step
            metrics.append(update(learner, list(groups), step_advantages(groups, "nontrivial"), step))
    if case.full == "backward":
        metrics.append(distilled(settings, chat, learner, [g for g in recorded[0] if not g.prompt.images]))
    weights.write(out, student, optimizer.optimizer)
    weights.write_final(out / "whole", student)
    weights.processes.wait()
    if weights.sharded and not case.quantize:
        budget = learner.budget.tokens
        check_resumed(case, settings, chat, learner, list(recorded[0]), out)
        learner.budget.tokens = budget
    return {"metrics": metrics, "looked": looked[0], "tried": tried, "budget": learner.budget.tokens}


def main(arguments: list[str]) -> int:
    """Arguments: the folder with students and recorded groups, the names of the cases."""
    folder, names = Path(arguments[0]), arguments[1:]
    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
    processes = Processes(dist.get_rank(), dist.get_world_size())
    for case in CASES:
        if case.name not in names:
            continue
        recorded = pickle.loads((folder / f"{case.student}.pickle").read_bytes())
        out = folder / case.name
        out.mkdir(exist_ok=True)
        weights = make_shards(case, processes)
        try:
            found = train(case, weights, folder, recorded, out)
        except BaseException:
            traceback.print_exc()
            print("in the case", case.name)
            raise
        (out / f"{processes.rank}.pickle").write_bytes(pickle.dumps(found))
    return 0
