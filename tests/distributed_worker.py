"""One of several processes of tests/test_distributed.py: trains on recorded completions and writes down what it got.

torchrun --nproc_per_node 2 distributed_worker.py MODEL RECORDED OUT
"""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from zppo.core.types import Group
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.transformers import TransformersEngine
from zppo.errors import LauncherError
from zppo.train.distill import Distiller
from zppo.train.models import Student
from zppo.train.settings import AdvantageSettings, LossSettings, TrainSettings
from zppo.train.team import Team
from zppo.train.update import Begun, Updater, UpdateStopped, advantages_of
from zppo.train.weights import ShardedWeights, Weights

LEARNING_RATE = (
    1e-4  # a hundred times the recipes': AdamW blows the rounding of gradients near 0 up to a fraction of it
)


def load(path: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def make_updater(
    model: PreTrainedModel, accelerator: Accelerator, weights: Weights, *, sampler: bool = True
) -> Updater:
    """Four minibatches in small micro-batches."""
    train = TrainSettings(learning_rate=LEARNING_RATE, tokens_per_microbatch=60)
    prepared = weights.prepare(model, accelerator)
    optimizer = accelerator.prepare_optimizer(
        torch.optim.AdamW(prepared.parameters(), lr=LEARNING_RATE, weight_decay=train.weight_decay)
    )
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
        weights=weights,
    )


def stopped_after_two(updater: Updater, groups: list[Group], advantages: torch.Tensor, step: int) -> Begun:
    """One of the processes is asked to stop before the third update, and all do."""
    asked = iter([False, False, updater.weights.team.rank == 1])
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


def train(
    updater: Updater, recorded: list[list[Group]], *, stop_in: int | None = None
) -> list[dict[str, float | None]]:
    """All recorded steps; the metrics of each. In step `stop_in` one process is asked to stop before the third update."""
    metrics = []
    for step, groups in enumerate(recorded):
        advantages = advantages_of(groups, AdvantageSettings())
        begun = stopped_after_two(updater, groups, advantages, step) if step == stop_in else None
        metrics.append(updater.update(groups, advantages, step, begun))
    return metrics


def distil(updater: Updater, teacher: PreTrainedModel, groups: list[Group]) -> dict[str, float | None]:
    """One step of on-policy distillation on the same weights and optimizer."""
    distiller = Distiller(
        updater.model,
        updater.optimizer,
        updater.accelerator,
        teacher=teacher,
        asker=None,
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


def one(name: str, weights: Weights, model_path: str, recorded: list[list[Group]], out: Path) -> None:
    """Trains one layout of the weights and writes what one process has to compare with."""
    accelerator, team = Accelerator(cpu=True), weights.team
    model = load(model_path)
    updater = make_updater(model, accelerator, weights, sampler=False)
    before = sample(model, weights.whole(), range(1 + 2 * team.rank))
    assert before == sample(load(model_path), Weights().whole(), range(1 + 2 * team.rank))
    metrics = train(updater, recorded, stop_in=2)
    if weights.sharded:
        assert all(isinstance(p, DTensor) for p in updater.model.parameters())
        assert all(isinstance(p.grad, DTensor) for p in updater.model.parameters())
        local = sum(p.to_local().numel() for p in updater.model.parameters())  # type: ignore[attr-defined]
        assert local < 0.6 * sum(p.numel() for p in updater.model.parameters())
    metrics.append(distil(updater, load(model_path), recorded[0]))
    saved, state = weights.saved(Student(model, None)), weights.snapshot_of(updater.optimizer)
    if team.main:
        saved.save_pretrained(out / name)
        torch.save(state.state_dict(), out / f"{name}-optimizer.pt")
    # What was saved puts a fresh optimizer where this one is, whatever way its weights lie.
    team.wait()
    loaded = torch.load(out / f"{name}-optimizer.pt", weights_only=True)
    weights.state_of(updater.optimizer).load_state_dict(loaded)
    again = weights.snapshot_of(updater.optimizer).state_dict()
    if team.main:
        pairs = [
            (loaded["state"][i][n], again["state"][i][n]) for i in loaded["state"] for n in ("exp_avg", "exp_avg_sq")
        ]
        assert pairs and all(torch.equal(a, b) for a, b in pairs)
    (out / f"{name}-{team.rank}.pickle").write_bytes(pickle.dumps(metrics))


def main() -> None:
    model_path, recorded_path, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=120))])
    team = Team(dist.get_rank(), dist.get_world_size())
    recorded = pickle.loads(recorded_path.read_bytes())
    one("replicated", Weights(team), model_path, recorded, out)
    one("sharded", ShardedWeights(team), model_path, recorded, out)
    assert (
        team.map(list(range(7)), lambda mine: [(i, team.rank) for i in mine], float)
        == team.gather(team.map(list(range(7)), lambda mine: [(i, team.rank) for i in mine], float))[0]
    )
    assert team.map([3], lambda mine: [i + 1 for i in mine]) == [4] and team.map([], lambda mine: [1]) == []
    assert team.any(team.rank == 1) and not team.any(False)
    team.check_same("a constant", 1)
    try:
        team.check_same("the rank", team.rank)
    except LauncherError as error:
        (out / f"refused-{team.rank}").write_text(str(error), encoding="utf-8")
    os._exit(0)  # as the command line does (zppo.cli.main)


if __name__ == "__main__":
    main()
