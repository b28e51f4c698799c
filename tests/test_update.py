"""The update: exact savings change no gradient, precision keeps small updates, faults are counted."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, PreTrainedModel

from zppo.config.settings import LossSettings, Settings
from zppo.core.advantages import step_advantages
from zppo.core.loss import clipped_surrogate
from zppo.core.minibatch import Sharing, deal_groups
from zppo.core.types import Group, Message, Prompt, Question, Rollout
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import Processes
from zppo.engines.logprobs import ForwardPass
from zppo.step_log import StepLog
from zppo.train.learner import OptimizerStep, PartialUpdate
from zppo.train.policy_gradient import PolicyGradient, make_budget

VOCABULARY = 300


def load(path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    return model  # type: ignore[no-any-return]


def make_groups(model: PreTrainedModel, rewards: list[list[float]], *, seed: int = 0, shift: float = 0.3) -> list[Group]:
    """Groups of random rollouts of mixed lengths, with old log-probs near the model's own."""
    rng = torch.Generator().manual_seed(seed)
    groups = []
    for g, row in enumerate(rewards):
        length = int(torch.randint(3, 12, (1,), generator=rng))
        ids = tuple(torch.randint(5, VOCABULARY, (length,), generator=rng).tolist())
        question = Question(f"q{g}", (Message("user", "?"),), "1")
        rollouts = []
        for i, reward in enumerate(row):
            tokens = torch.randint(5, VOCABULARY, (int(torch.randint(1, 15, (1,), generator=rng)),), generator=rng)
            with torch.no_grad():
                logits = model(torch.cat([torch.tensor(ids), tokens])[None]).logits[0, length - 1 : -1]
                own = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            old = own + shift * torch.randn(len(tokens), generator=rng)
            rollouts.append(Rollout(tokens, old, "", None, reward >= 1, reward, truncated=i == 0))
        groups.append(Group(Prompt("plain", question, question.messages, ids), tuple(rollouts)))
    return groups


def make_settings(**sections: Any) -> Settings:
    """A recipe of which only these sections matter."""
    return Settings(method="grpo", student={"model": "-"}, data={"train": "-"}, **sections)


def make_policy_gradient(
    model: PreTrainedModel, *, precision: str = "no", sampler: bool = True, sharing: Sharing | None = None, **train_settings: Any
) -> PolicyGradient:
    settings = make_settings(train={"minibatches": 1, "learning_rate": 1e-3, **train_settings})
    train = settings.train
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=train.betas, eps=train.adam_eps, weight_decay=train.weight_decay
    )
    AcceleratorState._reset_state(True)  # one process may set its precision once; tests use several
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    step = OptimizerStep(prepared, optimizer, accelerator, train.max_grad_norm, ReplicatedWeights(Processes()))
    return PolicyGradient(settings, ForwardPass(prepared), step, make_budget(train), sampler_is_exact=sampler, sharing=sharing)


def update(
    learner: PolicyGradient, groups: list[Group], advantages: torch.Tensor, step: int, partial: PartialUpdate | None = None
) -> dict[str, Any]:
    """The optimizer steps of one step; its metrics."""
    log = StepLog(step)
    learner.optimizer_steps(groups, advantages, log, partial)
    return log.counts


class Recorder:
    """Takes the place of an optimizer's step and keeps the gradients that it would have used."""

    def __init__(self, learner: PolicyGradient) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        inner = learner.optimizer.optimizer.step

        def step() -> None:
            self.gradients.append([p.grad.clone() for p in learner.optimizer.model.parameters() if p.grad is not None])
            inner()

        learner.optimizer.optimizer.step = step  # type: ignore[method-assign, assignment]


def plain_gradients(model: PreTrainedModel, rows: list[tuple[Group, Rollout, float]], clip: float) -> list[torch.Tensor]:
    """Every row on its own, zero advantages included, no padding: the formula of method.md section 6."""
    model.zero_grad()
    denominator = sum(len(r.ids) for _, r, _ in rows)
    for group, rollout, advantage in rows:
        ids = torch.cat([torch.tensor(group.prompt.ids), rollout.ids])[None]
        logits = model(ids).logits[0, len(group.prompt.ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, rollout.ids[:, None])[:, 0]
        loss = clipped_surrogate(logprobs[None], rollout.logprobs[None], torch.tensor([advantage])).loss.sum() / denominator
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0] * 4, [0.0, 0.0, 1.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_dropped_rows_and_micro_batches_change_no_gradient(tiny_qwen3_dir: Path, budget: int) -> None:
    model = load(tiny_qwen3_dir)
    reference = copy.deepcopy(model)
    groups = make_groups(model, REWARDS)
    advantages = step_advantages(groups, "nontrivial")
    learner = make_policy_gradient(model, minibatches=1, tokens_per_microbatch=budget)
    recorder = Recorder(learner)
    metrics = update(learner, groups, advantages, step=1)
    values = iter(advantages.tolist())
    expected = plain_gradients(reference, [(g, r, next(values)) for g in groups for r in g.rollouts], clip=1.0)
    biggest = max(float(g.abs().max()) for g in expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(recorder.gradients[0], expected, strict=True))
    assert worst <= 1e-5 * biggest
    live = sum(len(r.ids) + len(g.prompt.ids) for g in (groups[0], groups[3]) for r in g.rollouts)
    assert metrics["train_tokens_needed"] == live


def test_each_minibatch_has_its_own_denominator_and_step(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    reference = copy.deepcopy(model)
    groups = make_groups(model, REWARDS, seed=1)
    advantages = step_advantages(groups, "nontrivial")
    per_group = [advantages[4 * i : 4 * i + 4].tolist() for i in range(len(groups))]
    learner = make_policy_gradient(model, minibatches=3)
    recorder = Recorder(learner)
    metrics = update(learner, groups, advantages, step=5)
    assert metrics["optimizer_steps"] == 3
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    for dealt, seen in zip(deal_groups(len(groups), 3, seed=0, step=5), recorder.gradients, strict=True):
        rows = [(groups[g], r, a) for g in dealt for r, a in zip(groups[g].rollouts, per_group[g], strict=True)]
        expected = plain_gradients(reference, rows, clip=1.0)
        biggest = max(float(g.abs().max()) for g in expected) or 1.0
        assert max(float((a - b).abs().max()) for a, b in zip(seen, expected, strict=True)) <= 1e-5 * biggest
        optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        # AdamW divides by a gradient's own size: where that is near 0, rounding is blown up, to a fraction of the step of 1e-3 at most.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_minibatch_without_signal_still_takes_its_step(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    before = [p.detach().clone() for p in model.parameters()]
    groups = make_groups(model, [[0.0] * 3, [1.0] * 3])
    metrics = update(make_policy_gradient(model, minibatches=4), groups, step_advantages(groups, "nontrivial"), step=1)
    assert metrics["optimizer_steps"] == 2  # two groups in four minibatches: two are empty and skipped
    assert metrics["loss"] == 0
    for old, new in zip(before, model.parameters(), strict=True):  # weight decay alone has acted, twice
        torch.testing.assert_close(new.detach(), old * (1 - 1e-3 * 0.1) ** 2)


def test_forward_old_logprobs_start_at_ratio_one(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, REWARDS, shift=3.0)  # the sampler's are far off: nothing may lean on them
    learner = make_policy_gradient(model, sampler=False)
    metrics = update(learner, groups, step_advantages(groups, "nontrivial"), step=1)
    assert metrics["clip_low_share"] == metrics["clip_high_share"] == metrics["clip_dual_share"] == 0
    assert metrics["logprob_gap_mean"] is not None and metrics["logprob_gap_mean"] > 0.5


def test_truncated_rollouts_can_be_masked(tiny_qwen3_dir: Path) -> None:
    groups = make_groups(load(tiny_qwen3_dir), [[1.0, 0.0, 1.0]])  # rollout 0 is truncated
    advantages = step_advantages(groups, "nontrivial")
    needed = []
    for masked in (False, True):
        learner = make_policy_gradient(load(tiny_qwen3_dir))
        learner.loss = LossSettings(mask_truncated=masked)
        needed.append(update(learner, groups, advantages, step=1)["train_tokens_needed"])
    assert needed[0] - needed[1] == len(groups[0].prompt.ids) + len(groups[0].rollouts[0].ids)


def test_ungraded_rollouts_are_as_if_they_had_not_been_sampled(tiny_qwen3_dir: Path) -> None:
    """The judge could not be reached for some: loss and weights are those of a step without them, a minibatch of them alone included."""
    groups = make_groups(load(tiny_qwen3_dir), REWARDS)
    missing = [replace(g, rollouts=(*g.rollouts[:-1], replace(g.rollouts[-1], graded=False))) for g in groups]
    without = [replace(g, rollouts=g.rollouts[:-1]) for g in groups]
    lost = replace(groups[0], rollouts=tuple(replace(r, graded=False) for r in groups[0].rollouts))
    models, metrics = [], []
    for kept in (missing, without):
        models.append(load(tiny_qwen3_dir))
        metrics.append(update(make_policy_gradient(models[-1]), kept, step_advantages(kept, "nontrivial"), step=1))
    assert metrics[0]["loss"] == metrics[1]["loss"] != 0 and metrics[0]["grad_norm"] == metrics[1]["grad_norm"]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert update(make_policy_gradient(load(tiny_qwen3_dir)), [lost], step_advantages([lost], "nontrivial"), step=1)["loss"] == 0


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_small_updates_are_not_rounded_away(tiny_qwen3_dir: Path, precision: str) -> None:
    """method.md section 6: 10 updates at 1e-6 move more than 99% of the weights, since these are fp32 whatever the autocast is."""
    model = load(tiny_qwen3_dir)
    before = [p.detach().clone() for p in model.parameters()]
    learner = make_policy_gradient(model, precision=precision, sampler=precision == "no", learning_rate=1e-6)
    groups = make_groups(load(tiny_qwen3_dir), REWARDS)
    for step in range(10):
        update(learner, groups, step_advantages(groups, "nontrivial"), step)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    moved = sum(int((a != b).sum()) for a, b in zip(before, model.parameters(), strict=True))
    assert moved > 0.99 * sum(p.numel() for p in model.parameters())


def test_updates_that_are_not_finite_are_skipped_and_stop_the_run(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, [[1.0, 0.0]])
    before = [p.detach().clone() for p in model.parameters()]
    learner = make_policy_gradient(model)
    broken = step_advantages(groups, "nontrivial") * float("nan")
    assert update(learner, groups, broken, 1)["skipped_updates"] == 1
    assert update(learner, groups, broken, 2)["optimizer_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert learner.optimizer.fault == ""
    update(learner, groups, broken, 3)
    assert "3 updates in a row were not finite" in learner.optimizer.fault and learner.optimizer.skipped_in_a_row == 3


def test_a_rollout_that_the_student_did_not_sample_gets_old_logprobs_from_a_forward_pass(tiny_qwen3_dir: Path) -> None:
    """Teacher response: its ratio starts at 1 whatever the sampler's log-probs of the others are, and it has a gradient."""
    model = load(tiny_qwen3_dir)
    (group,) = make_groups(model, [[1.0, 0.0]], shift=0.0)
    foreign = replace(group.rollouts[0], logprobs=torch.full_like(group.rollouts[0].logprobs, torch.nan))
    group = replace(group, rollouts=(foreign, group.rollouts[1]))
    metrics = update(make_policy_gradient(model), [group], step_advantages([group], "nontrivial"), step=1)
    assert metrics["clip_low_share"] == metrics["clip_high_share"] == 0
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] is not None and metrics["grad_norm"] > 0
    assert metrics["logprob_gap_max"] is not None and metrics["logprob_gap_max"] < 1e-4


@pytest.mark.parametrize("estimator", ["nontrivial", "all", "none", "group"])
@pytest.mark.parametrize("dropped", [False, True])
def test_statistics_per_minibatch_are_those_of_each_minibatch_alone(estimator: str, dropped: bool, tiny_qwen3_dir: Path) -> None:
    """Eq. 3 over the groups of one minibatch after the other, as they are dealt; and with one minibatch over the whole step."""
    rewards = [[1.0, 0, 0, 0], [0.0] * 4, [1.0, 1, 0, 0], [1.0] * 4, [0, 0, 0, 0.5], [1.0, 1, 1, 0], [1.0, 0, 1, 0]]
    groups = make_groups(load(tiny_qwen3_dir), rewards)
    groups[2] = replace(groups[2], rollouts=tuple(replace(r, graded=i > 0) for i, r in enumerate(groups[2].rollouts)))

    def advantages(minibatches: int, over: str) -> torch.Tensor:
        learner = make_policy_gradient(load(tiny_qwen3_dir), minibatches=minibatches)
        learner.estimator, learner.statistics, learner.drop_trivial = estimator, over, dropped  # type: ignore[assignment]
        return learner.update(groups[:5], groups[5:], {}, StepLog(3)).advantages

    kept = [g for g in groups if not dropped or len({r.reward for r in g.graded}) > 1]
    expected = {}
    deals = deal_groups(len(kept), 3, seed=0, step=3)
    for dealt in deals:
        inside = {g: [r.reward - statistics.fmean(x.reward for x in kept[g].graded) for r in kept[g].graded] for g in dealt}
        varied = {g: values for g, values in inside.items() if any(abs(v) > 1e-9 for v in values)}
        over = [v for values in (inside if estimator == "all" else varied).values() for v in values]
        for g in dealt:
            known = iter(inside[g])
            own = statistics.pstdev(inside[g])
            deviation = {"none": 1.0, "group": own}.get(estimator, statistics.pstdev(over) if over else 0.0)
            expected[id(kept[g])] = [next(known) / (deviation + 1e-8) if r.graded and g in varied else 0.0 for r in kept[g].rollouts]
    wanted = torch.tensor([value for g in groups for value in expected.get(id(g), [0.0] * 4)])
    found = advantages(3, "minibatch")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(deals) == 3 and torch.equal(found, advantages(3, "step")) == (estimator in ("none", "group"))
    assert torch.equal(advantages(1, "minibatch"), advantages(1, "step"))
    assert make_policy_gradient(load(tiny_qwen3_dir)).statistics == "step"
    settings = make_settings(advantage={"statistics": "minibatch"})
    whole = make_policy_gradient(load(tiny_qwen3_dir))
    assert PolicyGradient(settings, whole.forward, whole.optimizer, whole.budget, sampler_is_exact=True).statistics == "minibatch"
