"""Old log-probs are the sampler's only as long as the trainer says the same."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.state import AcceleratorState

from same_run import assert_same_run, records
from test_update import Recorder, load, make_groups, make_policy_gradient, update
from zppo.cli import main
from zppo.config.settings import TrainSettings
from zppo.core.advantages import step_advantages
from zppo.core.minibatch import deal_groups
from zppo.core.types import Group
from zppo.engines.transformers import TransformersEngine
from zppo.train.engine_checks import Gap, SamplerCheck, make_check
from zppo.train.learner import UpdateCounts, UpdateStopped
from zppo.train.policy_gradient import PolicyGradient

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]


def lying(groups: list[Group], by: float, tokens: slice = slice(None)) -> list[Group]:
    """The sampler's log-probs of some tokens of every rollout, off by a known amount."""

    def off(logprobs: torch.Tensor) -> torch.Tensor:
        moved = logprobs.clone()
        moved[tokens] -= by
        return moved

    return [replace(g, rollouts=tuple(replace(r, logprobs=off(r.logprobs)) for r in g.rollouts)) for g in groups]


def checked(model: Any, tolerance: float = 1e-4, **settings: Any) -> tuple[PolicyGradient, list[str]]:
    said: list[str] = []
    learner = make_policy_gradient(model, **{"minibatches": 2, **settings})
    learner.check = SamplerCheck(tolerance, said.append)
    return learner, said


def gradients(learner: PolicyGradient, groups: list[Group], steps: int = 1) -> tuple[list[list[torch.Tensor]], dict[str, Any]]:
    recorder, metrics = Recorder(learner), {}
    for step in range(1, steps + 1):
        metrics = update(learner, groups, step_advantages(groups, "nontrivial"), step)
    return recorder.gradients, metrics


def assert_equal(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True))


def test_an_honest_sampler_is_trusted_and_no_pass_is_added(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, REWARDS, shift=0.0)
    (plain, wanted), (learner, said) = (gradients(make_policy_gradient(copy.deepcopy(model), minibatches=2), groups), checked(model))
    passes: list[int] = []
    learner.optimizer.model.register_forward_hook(lambda *_: passes.append(1))
    backward: list[int] = []
    inner = learner._backward
    learner._backward = lambda *args, **kwargs: (backward.append(1), inner(*args, **kwargs))[1]  # type: ignore[method-assign]
    ours, metrics = gradients(learner, groups)
    assert_equal(ours, plain)
    assert len(passes) == len(backward) + 1 and not said  # the output layer is tried once, by a pass over two tokens
    assert metrics == wanted and metrics["logprob_fallback"] == metrics["logprob_tokens"] == 0


@pytest.mark.parametrize("by", [0.3, float("inf")])
def test_a_lying_sampler_is_found_out_before_the_first_optimizer_step(tiny_qwen3_dir: Path, by: float) -> None:
    """All updates are those of a run that never looks at the sampler's log-probs, to the last bit; it is said once."""
    model = load(tiny_qwen3_dir)
    groups = lying(make_groups(model, REWARDS, shift=0.0), by)
    forward, _ = gradients(make_policy_gradient(copy.deepcopy(model), minibatches=2, sampler=False), groups, steps=2)
    learner, said = checked(model)
    ours, metrics = gradients(learner, groups, steps=2)
    assert_equal(ours, forward)
    assert len(said) == 1 and said[0].startswith("step 1: ") and "train.logprob_tolerance" in said[0]
    assert metrics["logprob_fallback"] == 1 and metrics["logprob_tokens"] == metrics["train_tokens_needed"]
    assert f"by {by:.2g} a token" in said[0]


def test_one_token_that_is_far_off_is_enough(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    groups = lying(make_groups(model, REWARDS, shift=0.0), 0.3, slice(0, 1))
    for largest, refused in ((0.09, False), (0.11, True)):  # with a mean of 0.0005
        assert SamplerCheck(1e-3).refuses(1, Gap(total=0.5, largest=largest, tokens=1000)) is refused
    _, metrics = gradients(checked(model, 1e-3)[0], groups)
    assert metrics["logprob_fallback"] == 1


def test_a_first_minibatch_without_gradients_hides_nothing(tiny_qwen3_dir: Path) -> None:
    """Its optimizer step would move the weights before anybody looked: rows of a later one are scored instead."""
    model = load(tiny_qwen3_dir)
    first = deal_groups(3, 3, seed=0, step=1)[0][0]
    rewards = [[0.0] * 4 if g == first else [1.0, 0.0, 0.0, 1.0] for g in range(3)]
    for by, fallback in ((0.0, 0), (0.3, 1)):
        groups = lying(make_groups(model, rewards, shift=0.0), by)
        learner, said = checked(copy.deepcopy(model), minibatches=3)
        _, metrics = gradients(learner, groups)
        assert metrics["logprob_fallback"] == fallback == len(said)
        assert metrics["logprob_gap_mean"] == pytest.approx(by, abs=1e-5)


def test_a_step_without_any_gradient_decides_nothing(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    learner, said = checked(model)
    _, metrics = gradients(learner, lying(make_groups(model, [[0.0] * 3, [1.0] * 3]), 0.3))
    assert metrics["logprob_fallback"] == 0 and not said and metrics["logprob_gap_mean"] is None


def test_what_was_decided_goes_into_a_step_that_is_stopped(tiny_qwen3_dir: Path) -> None:
    """Stopped after the first update: the rest is done with the log-probs of the forward pass, by whoever takes over."""
    model = load(tiny_qwen3_dir)
    groups = lying(make_groups(model, REWARDS, shift=0.0), 0.3)
    advantages = step_advantages(groups, "nontrivial")
    whole, wanted = gradients(checked(copy.deepcopy(model))[0], groups)
    learner, _ = checked(model)
    recorder, inner = Recorder(learner), learner.optimizer.step

    def step_and_ask_to_stop(loss: float) -> Any:
        learner.processes.stop.request()
        return inner(loss)

    learner.optimizer.step = step_and_ask_to_stop  # type: ignore[method-assign]
    with pytest.raises(UpdateStopped) as stopped:
        update(learner, groups, advantages, 1)
    partial = stopped.value.partial
    assert partial.done == 1 and partial.tally.fallback == 1
    assert learner.check is not None and learner.check.state_dict() == {"sampler_refused": 1}
    other = SamplerCheck(1e-4)
    other.load_state_dict(learner.check.state_dict())
    learner.check, learner.optimizer.step, learner.processes.stop.signum = other, inner, None  # type: ignore[method-assign]
    metrics = update(learner, groups, advantages, 1, partial)
    assert_equal(recorder.gradients, whole)
    assert metrics == wanted
    other.load_state_dict({})  # as a checkpoint from before this was looked at
    assert not other.refused


def test_processes_decide_together() -> None:
    """What one process cannot see in its own rows, another does; a process without rows agrees."""

    class Two:
        def gather(self, own: Gap) -> list[Gap]:
            return [own, Gap(3.0, 0.5, 10)]

    for own in (Gap(), Gap(1e-6, 1e-7, 100)):
        check = SamplerCheck(1e-3, processes=Two())  # type: ignore[arg-type]
        assert check.refuses(1, own) and check.refused
    assert not SamplerCheck(0.3, processes=Two()).refuses(1, Gap())  # type: ignore[arg-type]


def test_the_recipe_s_tolerance_and_its_defaults() -> None:
    assert make_check(TrainSettings(), exact=True).tolerance == 1e-4
    assert make_check(TrainSettings(), exact=False).tolerance == 0.05
    assert make_check(TrainSettings(logprob_tolerance=0.2), exact=True).tolerance == 0.2


def test_counts_are_read_at_once_and_are_those_of_each_micro_batch() -> None:
    tally = UpdateCounts()
    assert tally.add([]) == 0
    loss = tally.add([torch.tensor([0.5, 1, 2, 3, 0.25, 0.2, 7]), torch.tensor([0.25, 4, 5, 6, 0.5, 0.1, 1])])
    assert loss == 0.75 and (tally.clipped_low, tally.clipped_high, tally.clipped_dual) == (5, 7, 9)
    assert tally.gap == Gap(0.75, cast(Any, pytest.approx(0.2)), 8)


@pytest.fixture
def zppo(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    def run(*argv: object) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
        status = main([str(a) for a in argv])
        said = capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    yield run


@pytest.mark.slow
def test_a_run_whose_engine_begins_to_lie_falls_back_and_resumes_the_same(
    zppo: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fourth step on the engine is off by 0.01; a run that is resumed after step 4 does not have to find out again."""
    real, calls = TransformersEngine.stream, [0]

    def stream(self: TransformersEngine, requests: Any, sampling: Any) -> Any:
        calls[0] += len(requests) > 1  # `EngineCheck`'s probe is one request
        wrong = 0.01 * (len(requests) > 1 and calls[0] > 6)  # two calls a step: plain and reformulated prompts
        for at, sample, completion in real(self, requests, sampling):
            yield at, sample, replace(completion, logprobs=completion.logprobs - wrong)

    monkeypatch.setattr(TransformersEngine, "stream", stream)
    short = ["--data.eval=null", "--train.engine_tolerance=1", "--train.checkpoint_every=2", "--teacher.compression.enabled=false"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    status, said = zppo("train", recipe, *short, f"--output={whole}")
    assert status == 0 and said.count("the sampler's log-probs differ from the trainer's by 0.01 a token") == 1, said
    steps = [r for r in records(whole) if r["event"] == "step"]
    fallbacks = [r["logprob_fallback"] for r in steps]
    assert fallbacks == sorted(fallbacks) and 0 < sum(fallbacks) < len(steps)
    assert [bool(r["logprob_tokens"]) for r in steps] == [bool(f) for f in fallbacks]
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000005")
    status, said = zppo("resume", run)
    assert status == 0 and "the sampler's log-probs differ" not in said, said
    assert_same_run(whole, run)
