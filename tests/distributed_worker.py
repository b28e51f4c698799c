"""One of several processes of tests/test_distributed.py: trains on recorded completions and writes down what it got."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable, Sequence
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

from test_update import make_settings, update
from zppo.core.advantages import step_advantages
from zppo.core.minibatch import Sharing
from zppo.core.types import Group, Question, Rollout
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import Processes
from zppo.distributed.sharded import ShardedWeights
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.logprobs import ForwardPass
from zppo.engines.out_of_memory import TokenBudget
from zppo.engines.transformers import TransformersEngine
from zppo.errors import LauncherError
from zppo.models.student_model import Student
from zppo.rollout.teacher import Pools
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.train.distillation import Distillation
from zppo.train.engine_checks import SamplerCheck
from zppo.train.learner import OptimizerStep, PartialUpdate, UpdateStopped
from zppo.train.policy_gradient import PolicyGradient, make_budget

LEARNING_RATE = 1e-4  # a hundred times the recipes': AdamW blows the rounding of gradients near 0 up to a fraction of it


def load(path: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def make_policy_gradient(
    model: PreTrainedModel, accelerator: Accelerator, weights: ReplicatedWeights, *, sampler: bool = True
) -> PolicyGradient:
    """Four minibatches in small micro-batches; vectors learn at half the rate of matrices, and one of them not at all."""
    settings = make_settings(train={"learning_rate": LEARNING_RATE, "tokens_per_microbatch": 60})
    train = settings.train
    model.model.norm.weight.requires_grad_(False)

    prepared = weights.prepare(model, accelerator)
    by_rate: dict[float, list[torch.nn.Parameter]] = {LEARNING_RATE: [], LEARNING_RATE / 2: []}
    for name, p in prepared.named_parameters():
        if p.requires_grad:
            by_rate[LEARNING_RATE / 2 if "norm" in name else LEARNING_RATE].append(p)
    groups = [{"params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(groups, weight_decay=train.weight_decay))
    return PolicyGradient(
        settings,
        ForwardPass(prepared),
        OptimizerStep(prepared, optimizer, accelerator, train.max_grad_norm, weights),
        make_budget(train),
        sampler_is_exact=sampler,
        sharing=Sharing(reach=10**6),
    )


def stopped_after_two(learner: PolicyGradient, groups: list[Group], advantages: torch.Tensor, step: int) -> PartialUpdate:
    """One of the processes is asked to stop before the third update, and all do."""
    inner, done = learner.optimizer.step, [0]

    def step_and_ask_to_stop(loss: float) -> tuple[float, float, bool]:
        done[0] += 1
        if done[0] == 2 and learner.processes.rank == 1:
            learner.processes.stop.request()
        return inner(loss)

    learner.optimizer.step = step_and_ask_to_stop  # type: ignore[method-assign]
    try:
        update(learner, groups, advantages, step)
    except UpdateStopped as stopped:
        partial = stopped.partial
        assert partial.done == 2 and len(partial.old) == sum(len(g.rollouts) for g in groups)
        views = [line for line in partial.old if line.untyped_storage().nbytes() > line.nbytes]
        assert not views, "old log-probs were sent with the batch that they are a part of"
        learner.optimizer.step, learner.processes.stop.signum = inner, None  # type: ignore[method-assign]
        return partial
    raise AssertionError("it did not stop")


def train(learner: PolicyGradient, recorded: list[list[Group]], *, stop_in: int | None = None) -> list[dict[str, float | None]]:
    """All recorded steps; the metrics of each. In step `stop_in` one process is asked to stop before the third update."""
    metrics = []
    for step, groups in enumerate(recorded):
        advantages = step_advantages(groups, "nontrivial")
        partial = stopped_after_two(learner, groups, advantages, step) if step == stop_in else None
        metrics.append(update(learner, groups, advantages, step, partial))
    return metrics


def distrust(learner: PolicyGradient, recorded: list[list[Group]]) -> list[dict[str, float | None]]:
    """Steps whose sampler, which recorded other weights' log-probs, is believed until it is looked at."""
    metrics = []
    learner.sampler_is_exact = True
    for step, groups in enumerate(recorded):
        learner.check = SamplerCheck(1e-4, processes=learner.weights.processes)
        metrics.append(update(learner, groups, step_advantages(groups, "nontrivial"), step))
        assert learner.check.refused and metrics[-1]["logprob_fallback"] == 1
    learner.sampler_is_exact, learner.check = False, None
    return metrics


class RecordedTeacher:
    """Off-policy: the correct rollouts of recorded groups as the teacher's correct responses."""

    def __init__(self, groups: list[Group]) -> None:
        self.rollouts = {f"{g.question.id} {i}": r for g in groups for i, r in enumerate(g.rollouts) if r.correct}

    def ask(self, questions: Sequence[Question], log: StepLog) -> Pools:
        return {q.id: tuple(Source(key, None) for key in self.rollouts if key.split()[0] == q.id) for q in questions}

    def respond(self, source: Source) -> Rollout:
        return self.rollouts[source.text]


def distil(
    learner: PolicyGradient, teacher: PreTrainedModel, groups: list[Group], *, off_policy: bool = False, budget: int = 60
) -> dict[str, float | None]:
    """One step of distillation on the same weights and optimizer."""
    recorded: Any = RecordedTeacher(groups)
    distiller = Distillation(
        learner.forward,
        ForwardPass(teacher),
        learner.optimizer,
        TokenBudget(budget),
        teacher_sampler=recorded if off_policy else None,
        respond=recorded.respond,
    )
    log = StepLog(1)
    distiller.update(groups, [], {}, log)
    return log.counts


def sample(model: PreTrainedModel, whole: AbstractContextManager[None], keys: range) -> list[list[int]]:
    """Tokens of completions; one process may draw more and longer ones than another."""
    with whole:
        engine = TransformersEngine(model, [1], 0)
        done = engine.sample([SampleRequest((5, 6, 7), tuple(keys))], Sampling(max_new_tokens=3 + len(keys)))
    return [c.ids.tolist() for c in done[0]]


def check_shards(learner: PolicyGradient) -> None:
    """Every process keeps its share, and no more."""
    weights, parameters = learner.weights, list(learner.optimizer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if isinstance(weights, ShardedWeights):
        assert all(isinstance(p, DTensor) for p in parameters) and all(isinstance(p.grad, DTensor) for p in trained)
        local = sum(p.to_local().numel() for p in parameters)  # type: ignore[attr-defined]
        assert local < 0.6 * sum(p.numel() for p in parameters)


def skips_what_is_not_finite(learner: PolicyGradient) -> None:
    """A loss or a gradient of one process that is not finite moves no weight in any, and leaves nothing behind."""
    bad = learner.weights.processes.rank == 1
    for loss, factor in ((math.inf, 1.0), (0.0, math.nan)):
        learner.optimizer.zero_gradients()
        logits = learner.optimizer.model(input_ids=torch.tensor([[5, 6, 7]])).logits
        learner.optimizer.accelerator.backward(logits.sum() * (factor if bad else 1.0))
        _, norm, moved = learner.optimizer.step(loss if bad else 0.0)
        assert not moved and (math.isfinite(loss) or not math.isnan(norm))
    assert learner.optimizer.skipped_in_a_row == 2


def written(learner: PolicyGradient, model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer as a checkpoint has them, and the weights read back."""
    weights = learner.weights
    if weights.processes.main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    weights.processes.wait()
    weights.write(folder, Student(model, None), learner.optimizer.optimizer)
    weights.processes.wait()
    return {name: value for path in sorted((folder / "model").glob("*.safetensors")) for name, value in load_file(path).items()}


def one(name: str, make: Callable[[], ReplicatedWeights], model_path: str, recorded: list[list[Group]], out: Path) -> None:
    """Trains one layout of the weights and writes what one process has to compare with."""
    weights, accelerator = make(), Accelerator(cpu=True)
    processes, model = weights.processes, load(model_path)
    learner = make_policy_gradient(model, accelerator, weights, sampler=False)
    before = sample(model, weights.whole(), range(1 + 2 * processes.rank))
    assert before == sample(load(model_path), ReplicatedWeights().whole(), range(1 + 2 * processes.rank))
    metrics = train(learner, recorded, stop_in=2)
    written(learner, model, out / f"{name}-five")
    metrics += distrust(learner, recorded[:2])
    check_shards(learner)
    skips_what_is_not_finite(learner)
    metrics.append(distil(learner, load(model_path), recorded[0]))
    metrics.append(distil(learner, load(model_path), recorded[0], off_policy=True))
    written(learner, model, out / name)
    # What was saved puts a fresh model and optimizer where these are, whatever way the weights lie: they go on alike.
    weights = make()
    fresh = weights.load(lambda: Student(load(str(out / name / "model")), None)).model
    other = make_policy_gradient(fresh, accelerator, weights, sampler=False)
    weights.load_optimizer(out / name, other.optimizer.optimizer, fresh)
    assert train(learner, recorded[:1]) == train(other, recorded[:1])
    ours, theirs = (written(*pair, out / f"{name}-on") for pair in ((learner, model), (other, fresh)))
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
    for costs in ([float(i) for i in range(7)], [3.0], []):
        with processes.deal(costs) as deal:
            deal.done = [(costs[i], processes.rank) for i in deal.mine]
        assert [cost for cost, _ in deal.results] == costs
        assert deal.results == processes.gather(deal.results)[0]
    log = StepLog(1, {"known": 1.0}, {"own": 1.0 + processes.rank} if processes.rank else {})
    processes.gather_log(log)
    assert log.counts == {"known": 1.0, "own": 2.0} and log.own == {}
    assert processes.any(processes.rank == 1) and not processes.any(False)
    processes.check_same("a constant", 1)
    try:
        processes.check_same("the rank", processes.rank)
    except LauncherError as error:
        (out / f"refused-{processes.rank}").write_text(str(error), encoding="utf-8")
    return 0
