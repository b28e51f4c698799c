"""The check of the sampling engine against the trainer, and the warnings with advice."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import make_tiny
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.draws import draw_key
from zppo.core.types import Group, Prompt, Question, Rollout
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import Processes
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.engines.logprobs import ForwardPass
from zppo.engines.transformers import TransformersEngine
from zppo.errors import EngineError
from zppo.models.student_model import load_chat
from zppo.train.assemble import make_engine_check, make_forward
from zppo.train.engine_checks import EngineCheck, Movement, _GapStats
from zppo.train.health_checks import EVERY, WATCHES, HealthChecks

PROMPT = tuple(range(10, 40))


class Recorded:
    """An engine over a model that counts its calls; `off` is added to the log-probs of the calls named in `wrong`."""

    def __init__(self, model: PreTrainedModel, off: float = 0.0, wrong: Sequence[int] = ()) -> None:
        self.engine, self.off, self.wrong = TransformersEngine(model, [2], 0), off, wrong
        self.syncs = 0
        self.calls: list[tuple[int, Sampling]] = []

    def sync(self) -> None:
        self.syncs += 1

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        off = self.off if len(self.calls) in self.wrong else 0.0
        self.calls.append((len(requests[0].keys), sampling))
        done = self.engine.sample(requests, sampling)
        return [[Completion(c.ids, c.logprobs + off, c.truncated, c.entropy) for c in row] for row in done]


@pytest.fixture
def model(tiny_qwen3_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float32).eval()


def guard(engine: Any, model: PreTrainedModel, tolerance: float = 1e-3, every: int = 1, **more: Any) -> EngineCheck:
    options = {name: more.pop(name) for name in ("weights", "rounded", "exact") if name in more}
    prompt = Prompt("plain", Question("q", (), ""), (), PROMPT)
    forward = ForwardPass(model, **more)
    return EngineCheck(engine, forward, prompt, tolerance=tolerance, every=every, seed=0, **options)


def look(watching: EngineCheck, step: int) -> dict[str, float]:
    """After a change of weights."""
    return watching.refresh(step)


def nudge(model: PreTrainedModel, by: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def test_an_engine_that_shares_the_weights_passes_through_every_update(model: PreTrainedModel) -> None:
    engine = TransformersEngine(model, [2], 0, [5, 6])
    watching = guard(engine, model, temperature=0.7, banned_ids=(5, 6))
    for step in range(4):
        found = look(watching, step)
        assert 0 <= found["engine_gap_mean"] <= found["engine_gap_max"] < 1e-5
        nudge(model, 0.01)


@pytest.mark.parametrize("wrong", [{"temperature": 0.5}, {"banned_ids": tuple(range(200))}])
def test_an_engine_with_other_settings_is_refused(model: PreTrainedModel, wrong: dict[str, Any]) -> None:
    class Fixed(Recorded):
        def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
            return super().sample(requests, Sampling(max_new_tokens=sampling.max_new_tokens))

    with pytest.raises(EngineError, match="before the first step"):
        look(guard(Fixed(model), model, **wrong), 0)


def test_another_model_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / "other", seed=1), dtype=torch.float32).eval()
    with pytest.raises(EngineError, match=r"after step 3 .* on average over \d+ tokens .*allowed: 0.001.*zppo resume"):
        look(guard(Recorded(other), model), 3)


class Deaf(Recorded):
    """A copy that takes no weights; what it says is off by `noise`, other numbers at each call."""

    def __init__(self, model: PreTrainedModel, noise: float = 0.0) -> None:
        super().__init__(copy.deepcopy(model))
        self.noise = noise

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        done = super().sample(requests, sampling)
        random = torch.Generator().manual_seed(len(self.calls))
        off = lambda c: self.noise * torch.randn(c.logprobs.shape, generator=random)  # noqa: E731
        return [[Completion(c.ids, c.logprobs + off(c), c.truncated, c.entropy) for c in row] for row in done]


class Hearing(Deaf):
    """A copy that takes them, `late` updates late."""

    def __init__(self, model: PreTrainedModel, noise: float = 0.0, late: int = 0) -> None:
        super().__init__(model, noise)
        self.trainer, self.sent = model, [copy.deepcopy(model.state_dict()) for _ in range(late)]

    def sync(self) -> None:
        super().sync()
        self.sent.append(copy.deepcopy(self.trainer.state_dict()))
        self.engine.model.load_state_dict(self.sent.pop(0))


def rollouts(model: PreTrainedModel, step: int, size: int = 4) -> list[Group]:
    """Groups of a step with unequal rewards, as the student sampled them."""
    groups = []
    for i in range(5):
        question = Question(f"q{i}", (), "")
        prompt = Prompt("plain", question, (), tuple(range(10 + i, 40)))
        keys = tuple(draw_key(0, "rollout", step, question.id, "plain", j) for j in range(size))
        (row,) = TransformersEngine(model, [2], 0).sample([SampleRequest(prompt.ids, keys)], Sampling(max_new_tokens=80))
        made = [Rollout(c.ids, c.logprobs, "", None, False, float(j % 2), reason="") for j, c in enumerate(row)]
        groups.append(Group(prompt, tuple(made)))
    return groups


def steps(watching: EngineCheck, model: PreTrainedModel, by: float, count: int) -> list[dict[str, float]]:
    """As many steps of a run with updates of that size; what each has logged. The last look is after the last update."""
    found = [watching.refresh(0)]
    for step in range(1, count + 1):
        watching.before_update(step, rollouts(model, step))
        nudge(model, by)
        found.append(watching.refresh(step))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("by", [1e-2, 1e-5, 1e-7, *(pytest.param(by, marks=pytest.mark.long) for by in (1e-3, 1e-4, 1e-6))])
def test_a_deaf_engine_is_found_after_one_update_however_small(model: PreTrainedModel, by: float) -> None:
    with pytest.raises(EngineError, match="after step 1 .* does not hold the trainer's weights"):
        steps(guard(Deaf(model), model, tolerance=0.05), model, by, 1)


@pytest.mark.slow
@pytest.mark.parametrize("by", [1e-6, *(pytest.param(by, marks=pytest.mark.long) for by in (0.0, 1e-2, 1e-3, 1e-4, 1e-5, 1e-7))])
def test_one_that_hears_passes_however_small_the_updates(model: PreTrainedModel, by: float) -> None:
    watching = guard(Hearing(model, noise=1e-6), model, tolerance=0.05)
    assert all(line["engine_gap_mean"] < 1e-5 for line in steps(watching, model, by, 4))


@pytest.mark.slow
@pytest.mark.parametrize("late", [1, 2])
def test_a_late_engine_is_found(model: PreTrainedModel, late: int) -> None:
    with pytest.raises(EngineError, match="does not hold the trainer's weights"):
        steps(guard(Hearing(model, late=late), model, tolerance=0.05), model, 1e-4, 3)


@pytest.mark.slow
def test_a_deaf_engine_whose_kernels_are_noisy_is_watched_until_it_shows(model: PreTrainedModel) -> None:
    """An update is less than the noise; the same rollouts are looked at until the trainer has gone far enough."""
    watching = guard(Deaf(model, noise=0.01), model, tolerance=0.05)
    with pytest.raises(EngineError, match="its log-probs moved by .* of what the trainer's did"):
        steps(watching, model, 1e-4, 60)
    assert len(watching.engine.calls) > 6  # type: ignore[attr-defined]


@pytest.mark.slow
def test_bf16_may_round_small_updates_away(model: PreTrainedModel) -> None:
    """The same silence is a fault in fp32, and where the trainer has moved by more than rounding."""
    steps(guard(Deaf(model), model, tolerance=0.05, rounded=True), model, 1e-6, 3)
    with pytest.raises(EngineError, match="to the last bit while the trainer's log-probs moved by"):
        steps(guard(Deaf(model), model, tolerance=0.05, rounded=True), model, 3e-4, 3)


@pytest.mark.slow
def test_an_engine_over_the_trainer_s_module_is_looked_at_in_passing_and_a_wrong_one_found(model: PreTrainedModel) -> None:
    """One token after the first few of a prompt after each update, at four places where it is not known to be the module; a copy of the
    weights in bf16 that nobody renews is not the module."""
    ours = TransformersEngine(model, [2], 0)
    asked: list[tuple[int, int, int]] = []
    sample = ours.sample

    def noted(requests: Any, how: Any) -> Any:
        asked.append((len(requests), max(len(r.prompt_ids) for r in requests), how.max_new_tokens))
        return sample(requests, how)

    ours.sample = noted  # type: ignore[method-assign, assignment]
    check = guard(ours, model)
    whole = len(check.prompt.ids)
    assert all(line["engine_gap_max"] < 1e-5 for line in steps(check, model, 1e-4, 3))
    assert asked == [(1, whole, 8)] + [(1, min(8, whole), 1)] * (1 + 1 + 3)
    asked.clear()
    wrapped = SimpleNamespace(sample=noted, sync=ours.sync, shares_weights=True)  # whose module is not seen
    assert all(line["engine_gap_max"] < 1e-5 for line in steps(guard(wrapped, model), model, 1e-4, 1))
    assert asked == [(1, whole, 8)] + [(4, whole, 1)] * (1 + 1 + 1)
    for stale in (copy.deepcopy(model), cast(Any, copy.deepcopy(model)).to(torch.bfloat16)):
        wrong = TransformersEngine(stale, [2], 0)
        with pytest.raises(EngineError, match="does not hold the trainer's weights"):
            steps(guard(wrong, model, tolerance=0.05), model, 1e-4, 1)


def test_over_the_trainer_s_module_a_step_pays_for_seventeen_tokens(model: PreTrainedModel) -> None:
    """A step of four questions with 8 rollouts of 32 tokens samples a thousand, and reads prompts and learns besides: under 2%."""
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    check = guard(TransformersEngine(model, [2], 0), model)
    check.refresh(0)
    read.clear()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    check.refresh(1)
    assert 0 < sum(read) <= 17 < 0.02 * 4 * 8 * 32


@pytest.mark.slow
def test_the_gap_of_trained_rows_is_watched(model: PreTrainedModel) -> None:
    watching = guard(TransformersEngine(model, [2], 0), model)
    for mean, faulty in ((None, False), (1e-4, False), (2e-3, True), (float("nan"), True)):
        watching.before_update(1, rollouts(model, 1))
        watching.trained({"logprob_gap_mean": mean})
        watching._gap = None
        if faulty:
            with pytest.raises(EngineError, match="over the rollouts that the step learnt from"):
                watching.refresh(1)
        else:
            watching.refresh(1)
    truncated = guard(TransformersEngine(model, [2], 0), model, exact=False)  # top-p: other log-probs by design
    truncated.trained({"logprob_gap_mean": 1.0})
    assert truncated.refresh(1)


def test_an_engine_may_say_the_same_while_nothing_moves(model: PreTrainedModel) -> None:
    watching = guard(Recorded(model), model)
    for step in range(3):
        look(watching, step)


def test_one_odd_look_is_looked_at_again(model: PreTrainedModel) -> None:
    engine = Recorded(model, off=0.5, wrong=[0])
    assert look(guard(engine, model), 0)["engine_gap_mean"] < 1e-5
    assert [size for size, _ in engine.calls] == [1, 8]
    assert [sampling.max_new_tokens for _, sampling in engine.calls] == [8, 64]
    with pytest.raises(EngineError):
        look(guard(Recorded(model, off=0.5, wrong=[0, 1]), model), 0)


def test_numbers_that_are_none_are_refused(model: PreTrainedModel) -> None:
    engine = Recorded(copy.deepcopy(model))
    nudge(model, float("nan"))
    with pytest.raises(EngineError, match="differ by nan"):
        look(guard(engine, model), 1)


@pytest.mark.parametrize(("every", "looks"), [(0, 0), (1, 7), (3, 3)])
def test_every_change_is_synced_and_some_are_looked_at(model: PreTrainedModel, every: int, looks: int) -> None:
    engine = Recorded(model)
    watching = guard(engine, model, every=every)
    found = [look(watching, step) for step in range(7)]
    assert engine.syncs == 7 and len(engine.calls) == sum(bool(f) for f in found) == looks


def test_weights_that_stay_are_looked_at_once(model: PreTrainedModel) -> None:
    """A step after an evaluation finds the engine ready, and its numbers are those of an uninterrupted run."""
    engine = Recorded(model)
    watching = guard(engine, model, every=2)
    found = watching.refresh(2)
    assert found and watching.refresh(2) == found and engine.syncs == len(engine.calls) == 1
    assert watching.refresh(3) == {} and engine.syncs == 2


def test_a_wrong_engine_of_one_process_stops_all_of_them(model: PreTrainedModel) -> None:
    """Each looks at its own engine, in a pass of all trainers together; the metrics are those of the worst."""

    class Others(Processes):
        """Another process, whose engine is off by `gap`, or has a fault."""

        def __init__(self, gap: _GapStats, fault: str = "") -> None:
            super().__init__(0, 2)
            self.gap, self.fault = gap, fault

        def gather(self, value: Any) -> list[Any]:
            own, _ = value
            return [value, (self.gap, self.fault) if isinstance(own, _GapStats) else (own, "")]

    inside: list[str] = []

    class Weights(ReplicatedWeights):
        @contextmanager
        def whole(self) -> Iterator[None]:
            inside.append("whole")
            yield

        @contextmanager
        def scoring(self) -> Iterator[None]:
            inside.append("in")
            yield
            inside.append("out")

    well = guard(Recorded(model), model, weights=Weights(Others(_GapStats(2e-4, 7e-4))))
    assert look(well, 0) == {"engine_gap_mean": 2e-4, "engine_gap_max": 7e-4}
    assert inside == ["in", "out"]  # for the look; weights are sent as they lie
    with pytest.raises(EngineError, match="rank 1 is stale"):
        look(guard(Recorded(model), model, weights=Weights(Others(_GapStats(1.0, 1.0), "rank 1 is stale"))), 0)
    with pytest.raises(EngineError, match="after step 2"):
        look(guard(Recorded(model, off=0.5, wrong=[0, 1]), model, weights=Weights(Others(_GapStats(0.0, 0.0)))), 2)


def test_a_look_that_one_process_repeats_all_repeat(model: PreTrainedModel) -> None:
    """Where weights are sharded, each pass is one of all processes: this one has nothing to look at again, and another has."""

    class Doubting(Processes):
        def gather(self, value: Any) -> list[Any]:
            own, _ = value
            return [value, (False if isinstance(own, bool) else own, "")]

    engine = Recorded(model)
    assert look(guard(engine, model, weights=ReplicatedWeights(Doubting(0, 2))), 0)["engine_gap_mean"] < 1e-4
    assert len(engine.calls) == 2


def test_the_recipe_s_tolerance_and_its_defaults(model: PreTrainedModel, recipe: Path) -> None:
    def made(engine: Any, precision: str, *overrides: str) -> EngineCheck:
        settings = load_recipe(recipe, overrides)
        forward = make_forward(settings, model, load_chat(settings.student))
        prompt = Prompt("plain", Question("q", (), ""), (), PROMPT)
        return make_engine_check(settings, engine, forward, prompt, SimpleNamespace(mixed_precision=precision), ReplicatedWeights())  # type: ignore[arg-type]

    ours = TransformersEngine(model, [2], 0)
    assert made(ours, "no").tolerance == 1e-3 and made(ours, "bf16").tolerance == 0.2
    assert made(Recorded(model), "no").tolerance == made(Recorded(model), "bf16").tolerance == 0.05
    assert made(ours, "no", "--train.engine_tolerance=0.3").tolerance == 0.3
    assert made(ours, "no", "--train.check_engine_every=7").every == 7


# --- advice ------------------------------------------------------------------------------------------------------------

FINE: dict[str, Any] = {
    "truncated_share": 0.1,
    "no_answer_share": 0.2,
    "grading_timeout_share": 0.0,
    "graded_answers": 1000,
    "seconds": {"step": 10.0, "grading": 1.0},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"truncated_share": 0.4}, "40% of the completions were cut off at rollout.max_new_tokens, and most of those have no answer"),
        ({"truncated": 0.4}, "40% of the held-out completions were cut off at eval.max_new_tokens, and most of those have no answer: the"),
        ({"truncated_share": 0.9}, "90% of the completions were cut off at rollout.max_new_tokens, most of them after an answer"),
        ({"truncated": 0.9}, "90% of the held-out completions were cut off at eval.max_new_tokens, most of them after an answer"),
        ({"no_answer_share": 0.75}, r"75% of the completions have no \boxed{} answer"),
        ({"no_answer_share": 0.6, "truncated_share": 0.3}, "most of them because they were cut off. Raise rollout.max_new_tokens"),
        ({"no_answer_share": 1.0}, "does not know the form"),
        ({"no_answer_share": 0.97, "truncated": 0.0}, "97% of the held-out completions have no"),
        ({"grading_timeout_share": 0.034}, "grading gave up on 3.4% of the answers"),
        ({"graded_answers": 10, "seconds": {"step": 10.0, "grading": 4.0}}, "400 seconds per 1,000 answers"),
    ],
)
def test_each_watch_warns_with_advice(change: dict[str, Any], said: str) -> None:
    (text,) = HealthChecks(own_reward=False).advice(3, {**FINE, **change})
    assert text.startswith("step 3: ") and said in text
    assert any(word in text for word in ("Raise", "Look at", "Ask for", "Lower"))


def test_advice_for_a_student_that_never_boxes_names_what_helps() -> None:
    (text,) = HealthChecks(own_reward=False).advice(3, {**FINE, "no_answer_share": 1.0})
    for way in ("prompts.closing", "data.examples", "student.template", "grading.answer_from", "grading.reward"):
        assert way in text
    assert "max_new_tokens" not in text  # nothing was cut off


def test_advice_about_missing_answers_names_settings_that_exist() -> None:
    for metrics in ({"no_answer_share": 1.0}, {"no_answer_share": 0.7}, {"no_answer_share": 0.7, "truncated": 0.5}):
        for text in HealthChecks(own_reward=False).advice(1, metrics):
            for section, name in re.findall(r"\b(rollout|eval|grading|student|train)\.([a-z_]+)", text):
                assert name in Settings.model_fields[section].annotation.model_fields, (section, name)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "metrics",
    [
        FINE,
        {**FINE, "truncated_share": None, "no_answer_share": None, "grading_timeout_share": None, "graded_answers": 0},
        {**FINE, "graded_answers": 10, "seconds": {"step": 100.0, "grading": 4.0}},  # slow, but who cares
        {"seconds": {"step": 1.0}},
        {"accuracy": 0.0, "truncated": 0.0},  # an evaluation
    ],
)
def test_healthy_steps_are_quiet(metrics: dict[str, Any]) -> None:
    assert HealthChecks(own_reward=False).advice(1, metrics) == []


def test_the_same_warning_comes_again_only_after_a_while() -> None:
    adviser, bad = HealthChecks(own_reward=False), {**FINE, "truncated_share": 0.9}
    said = [step for step in range(1, 2 * EVERY + 2) if adviser.advice(step, bad)]
    assert said == [1, 1 + EVERY, 1 + 2 * EVERY]
    assert len(adviser.advice(60, {**bad, "no_answer_share": 0.9})) == 1  # another one does not wait for it


NONE_RIGHT: dict[str, Any] = {**FINE, "accuracy": {"plain": 0.0, "bcq": 0.0}}


def steps_told(lines: Sequence[dict[str, Any]], own_reward: bool = False) -> list[int]:
    adviser = HealthChecks(own_reward=own_reward)
    return [step for step, line in enumerate(lines, 1) if adviser.advice(step, line)]


def test_a_run_without_a_right_answer_is_told_after_three_steps() -> None:
    adviser = HealthChecks(own_reward=False)
    assert [adviser.advice(step, NONE_RIGHT) for step in (1, 2)] == [[], []]
    (text,) = adviser.advice(3, NONE_RIGHT, "Right answer '#### 42' | answer '42' (question 'q')")
    assert text.startswith("step 3: not one answer has been right in 3 steps") and "80% of the completions have one" in text
    assert "Right answer '#### 42' | answer '42' (question 'q')." in text and "data.answer_after" in text
    assert steps_told([NONE_RIGHT] * 60) == [3, 53]


@pytest.mark.parametrize(
    "line",
    [
        {**NONE_RIGHT, "accuracy": {"plain": 0.0, "bcq": 0.1}},
        {**NONE_RIGHT, "teacher_correct": 1.0},  # so the golds can match
        {**NONE_RIGHT, "accuracy": {}},  # nothing was graded
        {**NONE_RIGHT, "no_answer_share": 1.0, "truncated_share": 0.0},
        {"accuracy": 0.25, "truncated": 0.0},  # an evaluation
    ],
)
def test_a_right_answer_from_anywhere_keeps_it_quiet(line: dict[str, Any]) -> None:
    adviser = HealthChecks(own_reward=False)
    told = [text for step in range(1, 9) for text in adviser.advice(step, line) if "not one answer" in text]
    told += [text for step, one in enumerate((NONE_RIGHT, line, NONE_RIGHT), 9) for text in adviser.advice(step, one) if "not one" in text]
    assert not told
    assert steps_told([NONE_RIGHT] * 9, own_reward=True) == []  # a number below 1 may be all that it gives


def step_line(entropy: float | None, plain: float, share: float = 0.3) -> dict[str, Any]:
    return {**FINE, "entropy": entropy, "accuracy": {"plain": plain}, "nonzero_advantage_share": share}


@pytest.mark.parametrize(("plain", "said"), [(0.0, "solves nothing of it"), (1.0, "is done, or needs harder questions")])
def test_steps_without_any_gradient_are_told_with_what_fits(plain: float, said: str) -> None:
    adviser = HealthChecks(own_reward=True)
    told = [text for step in range(1, 5) for text in adviser.advice(step, step_line(0.5, plain, share=0.0))]
    assert len(told) == 1 and told[0].startswith("step 3: no rollout of the last 3 steps") and said in told[0]
    distils = HealthChecks(own_reward=True, advantages=False)  # learns from all tokens
    assert [text for step in range(1, 9) for text in distils.advice(step, step_line(0.5, plain, share=0.0))] == []
    # A step with a gradient, or an evaluation between, is no such step.
    lines = [step_line(0.5, plain, 0.0), {"accuracy": 0.5, "truncated": 0.0}, step_line(0.5, plain, 0.1), step_line(0.5, plain, 0.0)] * 4
    assert steps_told(lines, own_reward=True) == []


def test_an_entropy_that_collapses_is_told_unless_the_student_has_learned_it_all() -> None:
    start, fallen = [step_line(0.56, 0.3)] * 5, [step_line(0.04, 0.3)] * 5
    assert steps_told([*start, *fallen]) == [10]
    assert steps_told([*start, *[step_line(0.2, 0.3)] * 5]) == []  # a third is left
    assert steps_told([*start, *[step_line(0.04, 0.95)] * 5]) == []  # it solves nearly everything
    assert steps_told([*start, *[step_line(None, 0.3)] * 20]) == []  # an engine that does not tell
    # A run that is resumed remembers what it began with.
    adviser = HealthChecks(own_reward=False)
    for line in (*start, *fallen[:4]):
        adviser.remember(line)
    (text,) = adviser.advice(10, fallen[0])
    assert "from 0.56 to 0.040 nats" in text and "train.learning_rate" in text


def test_a_reward_of_one_s_own_has_no_boxes_to_miss() -> None:
    bad = {**FINE, "truncated_share": 0.9, "no_answer_share": 1.0}
    assert len(HealthChecks(own_reward=True).advice(1, bad)) == 1 < len(HealthChecks(own_reward=False).advice(1, bad))
    assert len({watch.name for watch in WATCHES}) == len(WATCHES)


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_a_healthy_one_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lab's chains take eleven tokens: with five all answers are cut off, and nothing is right."""
    recipe = Path(__file__).parents[1] / "recipes" / "lab.yaml"
    small = ["--train.steps=1", "--rollout.batch_size=8", "--data.eval_limit=8", "--eval.every=0"]
    warnings = ("cut off at rollout.max_new_tokens", "have no \\boxed{} answer", "cut off at eval.max_new_tokens")
    for run, limit in (("healthy", 16), ("failing", 5)):
        limits = [f"--rollout.max_new_tokens={limit}", f"--eval.max_new_tokens={limit}"]
        assert main(["train", str(recipe), f"--output={tmp_path / run}", *small, *limits]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert [text in said for text in warnings] == [run == "failing"] * 3
        assert ("step 1: " in said) == (run == "failing")


@pytest.mark.slow
def test_a_run_warns_and_times_its_grading(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zppo.cli import main
    from zppo.runs.log import read_lines

    run = tmp_path / "run"
    options = ["--train.steps=2", "--eval.every=0", "--grading.reward=null", "--method=grpo"]
    assert main(["train", str(recipe), f"--output={run}", *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("have no \\boxed{} answer") == 1 and said.count("cut off at rollout.max_new_tokens") == 1
    steps = [line for line in read_lines(run / "metrics.jsonl") if line["event"] == "step"]
    assert [step["graded_answers"] for step in steps] == [32, 32]  # evaluations are none of a step's
    assert all(0 < step["seconds"]["grading"] <= step["seconds"]["sampling"] for step in steps)
    assert all(step["engine_gap_max"] < 1e-4 for step in steps)


def test_an_engine_with_a_part_of_the_update_is_found_where_it_was_near_before() -> None:
    """Most of the movement, but not all of it: of two engines that differ as much, the one that always did is left alone."""
    trainer = torch.linspace(-1e-3, 1e-3, 200, dtype=torch.float64)
    part = trainer * torch.where(torch.arange(200) % 4 == 0, 0.0, 1.0)
    assert "are missing" in Movement(part, trainer, 1e-7).fault(rounded=False)
    assert not Movement(part, trainer, 1e-3).fault(rounded=False) and not Movement(part, trainer, 1e-7).fault(rounded=True)
    assert not Movement(trainer + 1e-6, trainer, 1e-6).fault(rounded=False)


@pytest.mark.parametrize("tokens", [1, 4, 15])
def test_few_tokens_that_moved_by_a_rounding_are_no_fault(tokens: int) -> None:
    """Their least-squares factor has no spread: a half is nothing to go by where a log-prob's last bit is half of the movement."""
    trainer = torch.full((tokens,), 1.91e-6).double()
    for engine in (trainer / 2, torch.zeros(tokens).double(), -trainer):
        assert not Movement(engine, trainer, 0.0).fault(rounded=False)
    for engine in (trainer / 4, torch.zeros(tokens).double()):
        assert Movement(engine * 1e3, trainer * 1e3, 0.0).fault(rounded=False)
