"""One of several processes of tests/test_distributed.py: trains on recorded completions and writes down what it got."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from zppo.config.settings import AdvantageSettings, LossSettings, TrainSettings
from zppo.core.types import Group
from zppo.distributed.parallel import ReplicatedWeights, ShardedWeights, zero_gradients
from zppo.distributed.processes import Processes
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.logprobs import Sharing
from zppo.engines.transformers import TransformersEngine
from zppo.errors import LauncherError
from zppo.models.student import Student
from zppo.train.distillation import Distillation
from zppo.train.engine_checks import SamplerCheck
from zppo.train.policy_gradient import PartialUpdate, Updater, UpdateStopped, advantages_of

LEARNING_RATE = 1e-4  # a hundred times the recipes': AdamW blows the rounding of gradients near 0 up to a fraction of it


def load(path: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def make_updater(model: PreTrainedModel, accelerator: Accelerator, weights: ReplicatedWeights, *, sampler: bool = True) -> Updater:
    """Four minibatches in small micro-batches; vectors learn at half the rate of matrices, and one of them not at all."""
    train = TrainSettings(learning_rate=LEARNING_RATE, tokens_per_microbatch=60)
    model.model.norm.weight.requires_grad_(False)

    prepared = weights.prepare(model, accelerator)
    by_rate: dict[float, list[torch.nn.Parameter]] = {LEARNING_RATE: [], LEARNING_RATE / 2: []}
    for name, p in prepared.named_parameters():
        if p.requires_grad:
            by_rate[LEARNING_RATE / 2 if "norm" in name else LEARNING_RATE].append(p)
    groups = [{"params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(groups, weight_decay=train.weight_decay))
    return Updater(
        prepared,
        optimizer,
        accelerator,
        train=train,
        loss=LossSettings(),
        seed=0,
        temperature=1.0,
        banned_ids=(),
        pad_id=0,
        sampler_is_exact=sampler,
        sharing=Sharing(reach=10**6),
        weights=weights,
    )


def stopped_after_two(updater: Updater, groups: list[Group], advantages: torch.Tensor, step: int) -> PartialUpdate:
    """One of the processes is asked to stop before the third update, and all do."""
    asked = iter([False, False, updater.weights.processes.rank == 1])
    updater.stop = lambda: next(asked)
    try:
        updater.update(groups, advantages, step)
    except UpdateStopped as stopped:
        assert stopped.begun.done == 2 and len(stopped.begun.old) == sum(len(g.rollouts) for g in groups)
        views = [line for line in stopped.begun.old if line.untyped_storage().nbytes() > line.nbytes]
        assert not views, "old log-probs were sent with the batch that they are a part of"
        updater.stop = lambda: False
        return stopped.begun
    raise AssertionError("it did not stop")


def train(updater: Updater, recorded: list[list[Group]], *, stop_in: int | None = None) -> list[dict[str, float | None]]:
    """All recorded steps; the metrics of each. In step `stop_in` one process is asked to stop before the third update."""
    metrics = []
    for step, groups in enumerate(recorded):
        advantages = advantages_of(groups, AdvantageSettings())
        begun = stopped_after_two(updater, groups, advantages, step) if step == stop_in else None
        metrics.append(updater.update(groups, advantages, step, begun))
    return metrics


def distrust(updater: Updater, recorded: list[list[Group]]) -> list[dict[str, float | None]]:
    """Steps whose sampler, which recorded other weights' log-probs, is believed until it is looked at."""
    metrics = []
    updater.sampler_is_exact = True
    for step, groups in enumerate(recorded):
        updater.check = SamplerCheck(1e-4, processes=updater.weights.processes)
        metrics.append(updater.update(groups, advantages_of(groups, AdvantageSettings()), step))
        assert updater.check.refused and metrics[-1]["logprob_fallback"] == 1
    updater.sampler_is_exact, updater.check = False, None
    return metrics


def distil(updater: Updater, teacher: PreTrainedModel, groups: list[Group]) -> dict[str, float | None]:
    """One step of on-policy distillation on the same weights and optimizer."""
    distiller = Distillation(
        updater.model,
        updater.optimizer,
        updater.accelerator,
        teacher=teacher,
        teacher_sampler=None,
        respond=lambda _: None,
        train=updater.train,
        pad_id=0,
        weights=updater.weights,
    )
    return distiller.learn(groups, [], {}, 1).metrics


def sample(model: PreTrainedModel, whole: AbstractContextManager[None], keys: range) -> list[list[int]]:
    """Tokens of completions; one process may draw more and longer ones than another."""
    with whole:
        engine = TransformersEngine(model, [1], 0)
        done = engine.sample([SampleRequest((5, 6, 7), tuple(keys))], Sampling(max_new_tokens=3 + len(keys)))
    return [c.ids.tolist() for c in done[0]]


def check_shards(updater: Updater) -> None:
    """Every process keeps its share, and no more."""
    weights, parameters = updater.weights, list(updater.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if isinstance(weights, ShardedWeights):
        assert all(isinstance(p, DTensor) for p in parameters) and all(isinstance(p.grad, DTensor) for p in trained)
        local = sum(p.to_local().numel() for p in parameters)  # type: ignore[attr-defined]
        assert local < 0.6 * sum(p.numel() for p in parameters)


def skips_what_is_not_finite(updater: Updater) -> None:
    """A loss or a gradient of one process that is not finite moves no weight in any, and leaves nothing behind."""
    bad = updater.weights.processes.rank == 1
    for loss, factor in ((math.inf, 1.0), (0.0, math.nan)):
        zero_gradients(updater.model)
        logits = updater.model(input_ids=torch.tensor([[5, 6, 7]])).logits
        updater.accelerator.backward(logits.sum() * (factor if bad else 1.0))
        _, norm, moved = updater.guard.step(loss if bad else 0.0)
        assert not moved and (math.isfinite(loss) or not math.isnan(norm))
    assert updater.guard.skipped_in_a_row == 2


def written(updater: Updater, model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer as a checkpoint has them, and the weights read back."""
    weights = updater.weights
    saved, state = weights.saved(Student(model, None)), weights.snapshot_of(updater.optimizer)
    if weights.processes.main:
        saved.save_pretrained(folder)
        torch.save(state.state_dict(), f"{folder}-optimizer.pt")
    weights.processes.wait()
    return load_file(folder / "model.safetensors")


def one(name: str, make: Callable[[], ReplicatedWeights], model_path: str, recorded: list[list[Group]], out: Path) -> None:
    """Trains one layout of the weights and writes what one process has to compare with."""
    weights, accelerator = make(), Accelerator(cpu=True)
    processes, model = weights.processes, load(model_path)
    updater = make_updater(model, accelerator, weights, sampler=False)
    before = sample(model, weights.whole(), range(1 + 2 * processes.rank))
    assert before == sample(load(model_path), ReplicatedWeights().whole(), range(1 + 2 * processes.rank))
    metrics = train(updater, recorded, stop_in=2)
    written(updater, model, out / f"{name}-five")
    metrics += distrust(updater, recorded[:2])
    check_shards(updater)
    skips_what_is_not_finite(updater)
    metrics.append(distil(updater, load(model_path), recorded[0]))
    written(updater, model, out / name)
    # What was saved puts a fresh model and optimizer where these are, whatever way the weights lie: they go on alike.
    fresh, weights = load(str(out / name)), make()
    other = make_updater(fresh, accelerator, weights, sampler=False)
    loaded = torch.load(out / f"{name}-optimizer.pt", weights_only=True)
    weights.state_of(other.optimizer).load_state_dict(loaded)
    assert train(updater, recorded[:1]) == train(other, recorded[:1])
    ours, theirs = (written(*pair, out / f"{name}-on") for pair in ((updater, model), (other, fresh)))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    (out / f"{name}-{processes.rank}.pickle").write_bytes(pickle.dumps(metrics))


def main(arguments: list[str]) -> int:
    """Arguments: the model, the recorded groups, the folder to write to."""
    model_path, recorded_path, out = arguments[0], Path(arguments[1]), Path(arguments[2])
    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=120))])
    processes = Processes(dist.get_rank(), dist.get_world_size())
    recorded = pickle.loads(recorded_path.read_bytes())
    one("replicated", lambda: ReplicatedWeights(processes), model_path, recorded, out)
    one("sharded", lambda: ShardedWeights(processes), model_path, recorded, out)
    assert (
        processes.map(list(range(7)), lambda mine: [(i, processes.rank) for i in mine], float)
        == processes.gather(processes.map(list(range(7)), lambda mine: [(i, processes.rank) for i in mine], float))[0]
    )
    assert processes.map([3], lambda mine: [i + 1 for i in mine]) == [4] and processes.map([], lambda mine: [1]) == []
    assert processes.any(processes.rank == 1) and not processes.any(False)
    processes.check_same("a constant", 1)
    try:
        processes.check_same("the rank", processes.rank)
    except LauncherError as error:
        (out / f"refused-{processes.rank}").write_text(str(error), encoding="utf-8")
    return 0
