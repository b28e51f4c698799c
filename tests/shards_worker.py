"""One of four processes of tests/test_shards.py: what is gathered of sharded weights, in which type, who reads and writes how much."""

from __future__ import annotations

import pickle
import resource
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distributed_worker import load, sample
from test_update import make_settings, update
from zppo.config.settings import Settings
from zppo.core.advantages import step_advantages
from zppo.core.types import Group, Prompt, Question
from zppo.distributed import sharded
from zppo.distributed.checkpoint_parts import WeightFiles
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import Processes
from zppo.distributed.sharded import ShardedWeights
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.engines.logprobs import ForwardPass
from zppo.engines.vllm.vllm_engine import merged_weights
from zppo.models.optimizer import make_optimizer
from zppo.models.student_model import Student, load_student, unread_student
from zppo.train.engine_checks import EngineCheck
from zppo.train.learner import OptimizerStep
from zppo.train.policy_gradient import PolicyGradient, make_budget


class Gathered:
    """What lies whole in a process: bytes of FSDP's gathered parameters, and of those that are gathered one by one.

    Attributes:
        most: at any moment.
        types: of what was gathered.
    """

    def __init__(self) -> None:
        self.live, self.most, self.types = dict[int, int](), 0, set[torch.dtype]()

    def note(self, key: int, tensors: Sequence[torch.Tensor]) -> None:
        self.live[key] = sum(t.numel() * t.element_size() for t in tensors)
        self.types |= {t.dtype for t in tensors}
        self.most = max(self.most, sum(self.live.values()))

    @contextmanager
    def counted(self) -> Iterator[Gathered]:
        """Of this block; nothing of an earlier one is left."""
        assert not self.live, "something stays gathered"
        self.most, self.types = 0, set()
        yield self
        assert not self.live, "something stays gathered"

    def hook(self) -> None:
        """For the rest of the process."""

        def after(name: str, work: Callable[[FSDPParam], object]) -> None:
            inner = getattr(FSDPParam, name)

            def hooked(param: FSDPParam, *args: Any) -> None:
                inner(param, *args)
                work(param)

            setattr(FSDPParam, name, hooked)

        for name in ("init_all_gather_outputs", "alloc_all_gather_outputs"):
            after(name, lambda param: self.note(id(param), param.all_gather_outputs))
        after("free_unsharded_param", lambda param: self.live.pop(id(param), None) and None)
        whole = DTensor.full_tensor

        def full_tensor(tensor: DTensor, **more: Any) -> torch.Tensor:
            found = whole(tensor, **more)
            if found.dim():  # not the norm of gradients
                self.note(0, [found])
                del self.live[0]
            return found

        DTensor.full_tensor = full_tensor  # type: ignore[method-assign, assignment]


def make_learner(model: PreTrainedModel, weights: ReplicatedWeights, precision: str = "no") -> PolicyGradient:
    """Two minibatches a step; old log-probs by a forward pass."""
    AcceleratorState._reset_state(False)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    train = make_settings(train={"learning_rate": 1e-4, "tokens_per_microbatch": 60, "minibatches": 2}).train
    prepared = weights.prepare(model, accelerator)
    optimizer = accelerator.prepare_optimizer(make_optimizer(train, prepared.parameters(), accelerator.device, offloaded=weights.offload))
    step = OptimizerStep(prepared, optimizer, accelerator, train.max_grad_norm, weights)
    settings = make_settings(train=train)
    return PolicyGradient(settings, ForwardPass(prepared), step, make_budget(train), sampler_is_exact=False)


def train(learner: PolicyGradient, recorded: Sequence[list[Group]]) -> list[dict[str, Any]]:
    return [update(learner, groups, step_advantages(groups, "nontrivial"), step) for step, groups in enumerate(recorded)]


class Reads:
    """What this process reads of safetensors.

    Attributes:
        total: bytes.
        most: of one tensor.
    """

    def __init__(self) -> None:
        self.total = self.most = 0

    @contextmanager
    def counted(self) -> Iterator[Reads]:
        whole, reads = safetensors.safe_open, self

        class Slice:
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def __getattr__(self, name: str) -> Any:
                return getattr(self.inner, name)

            def __getitem__(self, places: Any) -> torch.Tensor:
                found: torch.Tensor = self.inner[places]
                reads.total, reads.most = reads.total + found.nbytes, max(reads.most, found.nbytes)
                return found

        class File:
            def __init__(self, *args: Any, **options: Any) -> None:
                self.inner = whole(*args, **options)

            def __enter__(self) -> File:
                self.inner.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.inner.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                assert name in ("keys", "metadata"), f"{name} reads whole tensors"
                return getattr(self.inner, name)

            def get_slice(self, name: str) -> Slice:
                return Slice(self.inner.get_slice(name))

        safetensors.safe_open = File  # type: ignore[misc, assignment]
        try:
            yield self
        finally:
            safetensors.safe_open = whole  # type: ignore[misc]


def loaded(weights: ShardedWeights, path: Path, start: Path | None = None, *, parts: bool = True) -> tuple[Student, int, list[str]]:
    """As a run loads it; how many times this process has read all of it, and what is said."""
    settings, told, made = Settings(method="grpo", student={"model": str(path)}, data={"train": "-"}), list[str](), 0

    def make() -> Student:
        nonlocal made
        made += 1
        return load_student(settings, start, bf16=False)

    student = weights.load(make, partial(unread_student, settings, start) if parts else None, told.append)
    return student, made, told


class Shard:
    """Reads a student, shards it, trains it, and writes what it has.

    Args:
        parts: each process reads its own part, as a run does; otherwise the first one reads all of it.
    """

    def __init__(
        self, processes: Processes, path: Path, *, precision: str = "no", start: Path | None = None, parts: bool = True, **how: Any
    ) -> None:
        self.weights = ShardedWeights(processes, bf16=precision == "bf16", **how)
        self.student, self.made, self.told = loaded(self.weights, path, start, parts=parts)
        self.model = self.student.model
        assert processes.main or (not self.made and all(p.is_meta for p in self.model.parameters())), (
            "more than the first process has read it"
        )
        self.whole = sum(p.numel() for p in self.model.parameters())
        self.learner = make_learner(self.model, self.weights, precision)
        if start is not None:
            self.weights.load_optimizer(start, self.learner.optimizer.optimizer, self.model)
        own = sum(p.to_local().numel() for p in self.model.parameters())  # type: ignore[attr-defined]
        assert own * self.weights.within < self.whole * 1.1

    def held(self) -> dict[str, torch.Tensor]:
        """This process's part of the weights, and all that is no weight."""
        own = {name: p.to_local() for name, p in self.model.named_parameters(remove_duplicate=False)}  # type: ignore[attr-defined]
        return {**own, **dict(self.model.named_buffers())}

    def write(self, folder: Path) -> None:
        if self.weights.processes.main:
            folder.mkdir()
        self.weights.processes.wait()
        self.weights.write(folder, self.student, self.learner.optimizer.optimizer)
        self.weights.processes.wait()

    def module_bytes(self, size: int) -> int:
        """Of the outermost module and two layers, the one that is needed and the next: what may be whole at once."""
        root = sum(p.numel() for name, p in self.model.named_parameters() if ".layers." not in name)
        layer = sum(p.numel() for name, p in self.model.named_parameters() if ".layers.0." in name)
        assert (root + 2 * layer) < 0.6 * self.whole
        return (root + 2 * layer) * size

    def largest(self, size: int) -> int:
        return max(p.numel() for p in self.model.parameters()) * size


class Copy:
    """An engine with a copy of the weights, which it hears of one parameter at a time."""

    def __init__(self, model: PreTrainedModel, shard: Shard) -> None:
        self.model, self.shard = model, shard

    def sync(self) -> None:
        own = self.model.state_dict()
        for name, value in merged_weights(self.shard.model, torch.float32):
            own[name].copy_(value)

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        ids = [torch.arange(5, 5 + sampling.max_new_tokens) for _ in requests]
        with torch.no_grad():
            forward = ForwardPass(self.model)
            rows = [ForwardPass.logprobs(forward, [_row(request, i)])[0][0] for request, i in zip(requests, ids, strict=True)]
        return [[Completion(i, line, False, 0.0) for _ in r.keys] for r, i, line in zip(requests, ids, rows, strict=True)]


def _row(request: SampleRequest, ids: torch.Tensor) -> Any:
    from zppo.core.types import Row

    return Row(request.prompt_ids, ids)


def trained_within_two(count: Gathered, processes: Processes, path: Path, recorded: list[list[Group]], out: Path) -> None:
    """HSDP: the guard and vLLM's copy of the weights around an update, and no more than a module whole at any moment."""
    with count.counted():
        shard = Shard(processes, path, within=2)  # its output layer is tried too
    assert 0 < count.most <= shard.module_bytes(4), (count.most, shard.module_bytes(4))
    assert shard.weights.kind == "weights sharded over each 2 of them (FSDP2)"
    prompt = Prompt("plain", Question("q", (), ""), (), (5, 6, 7, 8))
    check = EngineCheck(
        cast(Any, Copy(load(str(path)), shard)), ForwardPass(shard.model), prompt, tolerance=1e-4, every=1, seed=0, weights=shard.weights
    )
    metrics = []
    with count.counted():
        for step, groups in enumerate(recorded):
            check.refresh(step)
            check.before_update(step, groups)
            metrics += train(shard.learner, [groups])
        found = check.refresh(len(recorded))
    assert 0 < count.most <= shard.module_bytes(4), (count.most, shard.module_bytes(4))
    assert count.types == {torch.float32} and found["engine_gap_max"] < 1e-4
    with count.counted():
        shard.write(out / "within")
    assert count.most == shard.largest(4)
    with count.counted():
        shard.weights.write_final(out / "final", shard.student)
    assert count.most == shard.largest(4)
    processes.wait()
    files = [path.stat().st_size for path in (out / "final").glob("*.safetensors")]
    assert len(files) == 4 and max(files) < 0.5 * sum(files), "a process writes more than its part"
    (out / f"within-{processes.rank}.pickle").write_bytes(pickle.dumps(metrics))


def trained_with_offload(processes: Processes, path: Path, recorded: list[list[Group]], out: Path) -> None:
    """The first step in shards of four, with AdamW on the processor; the second one after it in shards of two."""
    shard = Shard(processes, path, offload=True)
    optimizer = shard.learner.optimizer.optimizer
    assert optimizer.param_groups[0]["fused"]
    train(shard.learner, recorded[:1])
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"cpu"}
    shard.write(out / "four")
    with full_disk(processes.rank == 2):
        try:
            shard.write(out / "refused")
        except OSError:
            (out / f"refused-{processes.rank}").touch()
    other = Shard(processes, path, start=out / "four", within=2)
    settings = update(other.learner, recorded[1], step_advantages(recorded[1], "nontrivial"), 1)
    assert settings["skipped_updates"] == 0
    other.write(out / "two")


@contextmanager
def full_disk(full: bool) -> Iterator[None]:
    """No file of this process may grow beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trained_in_bf16(count: Gathered, processes: Processes, path: Path, recorded: list[list[Group]], out: Path) -> None:
    """Gathered in bf16, summed and kept in fp32, and sent in bf16."""
    reduced = set[torch.dtype]()
    scatter = DefaultReduceScatter.__call__

    def seen(self: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *more: Any, **options: Any) -> Any:
        reduced.add(input_tensor.dtype)
        return scatter(self, output_tensor, input_tensor, *more, **options)

    DefaultReduceScatter.__call__ = seen  # type: ignore[method-assign]
    shard = Shard(processes, path, precision="bf16")
    with count.counted():
        train(shard.learner, recorded)
    assert count.types == {torch.bfloat16} and count.most <= shard.module_bytes(2), (count.types, count.most)
    assert reduced == {torch.float32}, reduced
    state = shard.learner.optimizer.optimizer.state
    kept = {p.dtype for p in shard.model.parameters()} | {v.dtype for s in state.values() for v in s.values()}
    assert kept == {torch.float32}
    with count.counted():
        assert len(processes.gather(tuple(sample(shard.model, shard.weights.whole(), range(2))[0]))) == 4  # as an engine does
    assert count.types == {torch.bfloat16} and 2 * shard.whole <= count.most < 2.1 * shard.whole  # shards are of one size
    with count.counted():
        sent = {name: (value.dtype, value.shape) for name, value in merged_weights(shard.model, torch.bfloat16)}
    assert count.types == {torch.bfloat16} and count.most == shard.largest(2)
    assert sent == {name: (torch.bfloat16, p.shape) for name, p in shard.model.named_parameters()}
    shard.write(out / "bf16")


def read_in_parts(processes: Processes, path: Path, start: Path | None) -> None:
    """Each process reads a fourth, and has bit for bit what the first one's reading gives it; nobody ever has a whole matrix."""
    with Reads().counted() as reads:
        ours = Shard(processes, path, start=start)
    assert not ours.made and not ours.told
    theirs = Shard(processes, path, start=start, parts=False)
    assert theirs.made == processes.main
    found, wanted = ours.held(), theirs.held()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
    tied = [shard.model.get_input_embeddings().weight is shard.model.get_output_embeddings().weight for shard in (ours, theirs)]
    assert tied == [ours.model.config.tie_word_embeddings] * 2
    size, kinds = (4, 3) if start else (2, 1)  # a checkpoint is in fp32, with two moments; the student as published in bf16
    total = ours.whole * size * kinds
    assert sum(processes.gather(reads.total)) == total, (reads.total, total)  # nothing is read twice
    assert reads.total < total * 0.27 and reads.most <= -(-ours.largest(size) // 4) + 64 * size, (reads.total, reads.most)


def read_whole(processes: Processes, path: Path, out: Path) -> None:
    """What cannot be read in parts the first process reads, and says so."""
    odd = out / "odd"
    if processes.main:
        shutil.copytree(path, odd)
        shutil.copy(odd / "model.safetensors", odd / "model-copy.safetensors")
    processes.wait()
    here = WeightFiles.seen
    for folder, seen, why in (
        (odd, here, "hold lm_head.weight twice"),
        (path, lambda files: None if processes.rank == 2 else here(files), "not all processes see the same files of it"),
        (path, lambda files: f"{processes.rank} {here(files)}", "not all processes see the same files of it"),
    ):
        WeightFiles.seen = seen  # type: ignore[method-assign]
        try:
            _, made, told = loaded(ShardedWeights(processes), folder)
        finally:
            WeightFiles.seen = here  # type: ignore[method-assign]
        assert made == len(told) == processes.main, told
        assert not told or ("first process" in told[0] and why in told[0]), told


@contextmanager
def growth() -> Iterator[list[int]]:
    """The most bytes that this process has come to have of its own inside; pages of files, which are shared, are not counted."""

    def own() -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

    before, most, over = own(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], own() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def started(arguments: list[str]) -> int:
    """How much a start takes until the first pass. Arguments: the model, the folder to write to."""
    path, out = Path(arguments[0]), Path(arguments[1])
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=120))])
    processes = Processes(dist.get_rank(), dist.get_world_size())
    sharded.head_form = lambda *_, **__: None  # type: ignore[assignment]  # it would gather layers
    for parts in (True, False):
        weights = ShardedWeights(processes)
        with growth() as most:
            student, *_ = loaded(weights, path, parts=parts)
            weights.prepare(student.model, accelerator)
        (out / f"{'parts' if parts else 'whole'}-{processes.rank}").write_text(str(most[0]))
        del student
    return 0


def main(arguments: list[str]) -> int:
    """Arguments: the model, the recorded groups, the folder to write to, in which two models in bf16 are."""
    path, out = Path(arguments[0]), Path(arguments[2])
    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=120))])
    processes, count = Processes(dist.get_rank(), dist.get_world_size()), Gathered()
    recorded = pickle.loads(Path(arguments[1]).read_bytes())
    count.hook()
    try:
        trained_within_two(count, processes, path, recorded, out)
        trained_with_offload(processes, path, recorded, out)
        trained_in_bf16(count, processes, path, recorded, out)
        for student, start in (("tied", None), ("untied", None), ("tied", out / "two")):
            read_in_parts(processes, out / student, start)
        read_whole(processes, out / "untied", out)
    except BaseException:
        traceback.print_exc()  # who started this reads what it prints, and no exception
        return 1
    return 0
