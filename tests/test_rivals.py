"""Rivals: every rule of credit and loss against the formula row by row, whole steps on the lab, stops in a step, refusals."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel

from same_run import records
from test_distributed import assert_near_run
from test_train import undocumented
from test_update import Recorder, load, make_groups, make_policy_gradient, make_settings
from victims import Victims
from zppo.cli import main
from zppo.config.methods import METHODS, RIVALS
from zppo.config.recipe import load_recipe
from zppo.core.advantages import group_advantages
from zppo.core.credit import credited_groups
from zppo.core.loss import Surrogate, clipped_surrogate, shaped_surrogate
from zppo.core.minibatch import Sample, Sharing
from zppo.core.reformulate import Material, PartialSolution, TrialAndError
from zppo.core.select import helped_below
from zppo.core.types import Group, Message, Question, Rollout
from zppo.engines.logprobs import ForwardPass
from zppo.errors import CheckpointError, SettingsError
from zppo.lab.questions import ASSETS
from zppo.prompts.book import PromptBook
from zppo.rollout.step_parts import parts
from zppo.rollout.student import PromptRenderer
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.train.distillation import Distillation, Privileged
from zppo.train.learner import UpdateStopped
from zppo.train.mid_step import MidStep, StepRollouts
from zppo.train.policy_gradient import PolicyGradient
from zppo.train.provenance import _check_method
from zppo.train.trainer import REFILLS

LAB = Path(__file__).parents[1] / "recipes" / "lab.yaml"
PARTIAL = "reformulations: [partial]"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_the_shaped_loss_is_its_formula(gamma: float) -> None:
    """-A rho / (rho + gamma), whose slope is -A gamma rho / (rho + gamma)^2: bounded however far the two policies are apart."""
    torch.manual_seed(0)
    logprobs, old, advantages = -torch.rand(3, 5) * 6, -torch.rand(3, 5) * 6, torch.tensor([1.5, -0.5, 0.0])
    logprobs[0, 0], old[0, 0] = -0.01, -300.0
    leaf = logprobs.clone().requires_grad_()
    loss = shaped_surrogate(leaf, old, advantages, gamma)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    ratio = (logprobs.double() - old.double()).exp()
    torch.testing.assert_close(loss.detach().double(), -advantages[:, None] * ratio / (ratio + gamma), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope.double(), -advantages[:, None] * gamma * ratio / (ratio + gamma) ** 2, rtol=1e-3, atol=1e-6)
    assert slope.isfinite().all() and float(slope[2].abs().max()) == 0
    luffy = shaped_surrogate(logprobs, torch.zeros_like(logprobs), advantages, 0.1)  # f(p) = p / (p + 0.1), the teacher's taken to be 1
    torch.testing.assert_close(luffy, -advantages[:, None] * logprobs.exp() / (logprobs.exp() + 0.1), rtol=1e-4, atol=1e-6)


def test_who_is_helped() -> None:
    assert [helped_below(who, 0.5) > accuracy for who in ("hard", "unsolved", "every") for accuracy in (0.0, 0.125, 0.5, 1.0)] == [
        *(True, True, False, False),
        *(True, False, False, False),
        *(True, True, True, True),
    ]


@pytest.fixture
def step(tiny_qwen3_dir: Path) -> tuple[PreTrainedModel, list[Group], list[Group]]:
    """Three plain groups, the first two unsolved, and one hinted group for each of these, on a longer prompt."""
    model = load(tiny_qwen3_dir)
    plain = make_groups(model, [[0.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 1.0]], seed=1, shift=0.0)
    hinted = make_groups(model, [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], seed=2, shift=0.0)
    return model, plain, [Group(replace(g.prompt, kind="hint"), g.rollouts) for g in hinted]


def test_guide_puts_hinted_rollouts_under_the_plain_prompt(step: tuple[PreTrainedModel, list[Group], list[Group]]) -> None:
    _, plain, hinted = step
    groups = credited_groups(plain, hinted, "plain", "own", seed=0, step=1)
    assert groups[:3] == plain and [g.kind for g in groups[3:]] == ["hint", "hint"]
    for made, own, shown in zip(groups[3:], plain, hinted, strict=False):
        assert made.prompt.ids == own.prompt.ids != shown.prompt.ids
        assert all(r.drawn is shown.prompt and r.ids is was.ids for r, was in zip(made.rollouts, shown.rollouts, strict=True))
    assert credited_groups(plain, hinted, "shown", "own", seed=0, step=1) == [*plain, *hinted]


@pytest.mark.parametrize(("grouping", "joined"), [("one-joins", [1, 1, 0]), ("all-join", [2, 1, 0])])
def test_right_rollouts_take_the_places_of_wrong_ones(
    grouping: Any, joined: list[int], step: tuple[PreTrainedModel, list[Group], list[Group]]
) -> None:
    """As many as there are, once each, and no other rollout moves; drawn by key, whatever stands beside them."""
    _, plain, hinted = step
    groups = credited_groups(plain, hinted, "shown", grouping, seed=0, step=1)
    assert [sum(r.drawn is not None for r in g.rollouts) for g in groups] == joined
    for group, before, shown in zip(groups, plain, [*hinted, None], strict=True):
        assert group.prompt is before.prompt
        new = [r for r in group.rollouts if r.drawn is not None]
        assert len({id(r.ids) for r in new}) == len(new) and all(r.correct and shown and r.drawn is shown.prompt for r in new)
        assert all(r is was or not was.correct for r, was in zip(group.rollouts, before.rollouts, strict=True))
    again = credited_groups(plain[:1], hinted[:1], "shown", grouping, seed=0, step=1)
    assert [r.ids for r in again[0].rollouts] == [r.ids for r in groups[0].rollouts]
    places = {
        tuple(r.drawn is not None for r in credited_groups(plain[:1], hinted, "shown", grouping, seed=s, step=1)[0].rollouts)
        for s in range(9)
    }
    assert len(places) > 1
    silent = Group(plain[0].prompt, tuple(replace(r, graded=False) for r in plain[0].rollouts))
    assert credited_groups([silent], hinted, "shown", grouping, seed=0, step=1) == [silent]


def respond(source: Source) -> Rollout:
    ids = torch.tensor([40 + len(source.text), 7, 9])
    return Rollout(ids, torch.full((3,), torch.nan), source.text, "1", True, 1.0, reason="teacher response")


def learner_of(name: str, model: PreTrainedModel, **settings: Any) -> PolicyGradient:
    """What `make_learner` makes of a row, in one minibatch."""
    learner = make_policy_gradient(model, **settings)
    learner.method, learner.estimator = METHODS[name], METHODS[name].advantage
    learner.respond = respond if METHODS[name].teacher_response else None
    return learner


def logprobs_of(model: PreTrainedModel, prompt: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    logits = model(torch.cat([torch.tensor(prompt), ids])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


RESPONSES: dict[str, tuple[Source, ...]] = {f"q{i}": (Source("x" * i, "1"),) for i in range(3)}


def literal_gradients(name: str, model: PreTrainedModel, plain: list[Group], hinted: list[Group]) -> list[torch.Tensor]:
    """The row's definition, rollout after rollout, none packed, padded or left out (docs/method.md section 13)."""
    row, model = METHODS[name], copy.deepcopy(model)
    terms: list[tuple[torch.Tensor, int]] = []
    if name == "luffy":  # one rollout of each group is the teacher's, its probability taken to be 1; advantages without deviation
        for group in taught(name, model, plain):
            rewards = torch.tensor([r.reward for r in group.rollouts])
            for rollout, advantage in zip(group.rollouts, rewards - rewards.mean(), strict=True):
                now = logprobs_of(model, group.prompt.ids, rollout.ids)
                if rollout.reason == "teacher response":
                    terms.append((-(now.exp() / (now.exp() + 0.1) * advantage).sum(), len(rollout.ids)))
                else:
                    terms.append((clipped_surrogate(now[None], now[None].detach(), advantage[None]).loss.sum(), len(rollout.ids)))
    else:
        for group in credited_groups(plain, hinted, row.credit, row.grouping, seed=0, step=1):
            rewards = torch.tensor([r.reward for r in group.rollouts])
            advantages = group_advantages(rewards, torch.zeros(4))
            for rollout, advantage in zip(group.rollouts, advantages, strict=True):
                shown = rollout.drawn.ids if rollout.drawn else group.prompt.ids
                old = logprobs_of(model, shown, rollout.ids).detach()
                if rollout.drawn is None or row.credit == "shown":
                    loss = clipped_surrogate(logprobs_of(model, shown, rollout.ids)[None], old[None], advantage[None]).loss.sum()
                else:
                    ratio = (logprobs_of(model, group.prompt.ids, rollout.ids) - old).exp()
                    loss = -(ratio / (ratio + cast(float, row.gamma)) * advantage).sum()
                terms.append((loss, len(rollout.ids)))
    total = cast(torch.Tensor, sum(loss for loss, _ in terms) / sum(tokens for _, tokens in terms))
    gradients = torch.autograd.grad(total, list(model.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g / max(1.0, float(norm)) for g in gradients]


def taught(name: str, model: PreTrainedModel, plain: list[Group]) -> list[Group]:
    learner = learner_of(name, copy.deepcopy(model))
    return [learner._with_response(g, RESPONSES, 1) for g in plain]


@pytest.mark.parametrize("name", ["luffy", "guide-grpo", "scaf-grpo", "lte"])
@pytest.mark.parametrize(("sampler", "sharing"), [(True, None), (False, None), (True, Sharing(reach=10**6))])
def test_a_step_is_the_definition_of_its_row(
    name: str, sampler: bool, sharing: Sharing | None, step: tuple[PreTrainedModel, list[Group], list[Group]]
) -> None:
    """With the sampler's log-probs or those of a forward pass, on rows or in packs that share a prompt."""
    model, plain, hinted = step
    expected = literal_gradients(name, model, plain, hinted)
    learner = learner_of(name, model, sampler=sampler, sharing=sharing)
    recorder = Recorder(learner)
    log = StepLog(1)
    result = learner.update(plain, [] if name == "luffy" else hinted, RESPONSES if name == "luffy" else {}, log)
    biggest = max(float(g.abs().max()) for g in expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(recorder.gradients[0], expected, strict=True))
    assert worst <= 2e-5 * biggest
    assert [len(g.rollouts) for g in result.groups] == [4] * len(result.groups) and len(result.advantages) == 4 * len(result.groups)
    if name == "luffy":
        assert log.counts["teacher_responses_in_groups"] == 3
    else:
        assert log.counts["hinted_rollouts_in_plain_groups"] == {"guide-grpo": 8, "scaf-grpo": 2, "lte": 3}[name]


def test_the_log_has_every_rollout_where_it_was_sampled(step: tuple[PreTrainedModel, list[Group], list[Group]]) -> None:
    """Those that gave way have no advantage, those that joined have theirs in their own group, and the wrong hinted ones none."""
    model, plain, hinted = step
    result = learner_of("lte", model).update(plain, hinted, {}, StepLog(1))
    assert result.groups == [*plain, *hinted]
    lines = [line.tolist() for line in result.advantages.split(4)]
    # Group 0: two right of four; group 1: one of four.
    assert sorted(lines[0]) == pytest.approx([-1, -1, 0, 0]) and lines[3] == pytest.approx([1, 0, 0, 1])
    assert sorted(lines[1]) == pytest.approx([-((1 / 3) ** 0.5)] * 3 + [0]) and lines[4] == pytest.approx([0, 3**0.5, 0, 0])


@pytest.mark.parametrize("name", ["luffy", "guide-grpo", "lte"])
def test_what_another_policy_drew_is_not_held_against_the_sampler(
    name: str, step: tuple[PreTrainedModel, list[Group], list[Group]]
) -> None:
    model, plain, hinted = step
    log = StepLog(1)
    learner_of(name, model).update(plain, [] if name == "luffy" else hinted, RESPONSES if name == "luffy" else {}, log)
    assert log.counts["logprob_gap_max"] is not None and log.counts["logprob_gap_max"] < 1e-5


@pytest.mark.parametrize("name", ["luffy", "guide-grpo", "lte"])
def test_a_step_that_was_stopped_goes_on(name: str, step: tuple[PreTrainedModel, list[Group], list[Group]], tmp_path: Path) -> None:
    """Between its two updates, over a checkpoint's files: the weights are those of a step that was not stopped."""
    model, plain, hinted = step
    pools: dict[str, tuple[Source, ...]] = RESPONSES if name == "luffy" else {}
    again = [] if name == "luffy" else hinted
    whole = copy.deepcopy(model)
    learner_of(name, whole, minibatches=2).update(plain, again, pools, StepLog(1))
    learner = learner_of(name, model, minibatches=2)
    inner = learner.optimizer.step

    def once(loss: float) -> tuple[float, float, bool]:
        learner.processes.stop.request()
        return inner(loss)

    learner.optimizer.step = once  # type: ignore[method-assign]
    log = StepLog(1)
    with pytest.raises(UpdateStopped) as stopped:
        learner.update(plain, again, pools, log)
    MidStep(StepRollouts(3, (), plain, again, pools), log, stopped.value.partial).write(tmp_path)
    learner.optimizer.step, learner.processes.stop.signum = inner, None  # type: ignore[method-assign]
    read = MidStep.read(tmp_path, 1)
    assert read is not None and read.partial.done == 1
    learner.update(read.rollouts.plain, read.rollouts.reformulated, read.rollouts.responses, read.log, read.partial)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Tokens:
    """A chat template of one token a character."""

    eos_token_id = 2

    def encode(self, messages: tuple[Message, ...], images: object = ()) -> tuple[int, ...]:
        return tuple(5 + ord(c) % 250 for m in messages for c in m.content[:40])

    def think_open(self, ids: object) -> bool:
        return False


@pytest.mark.parametrize(("name", "budget"), [("sdpo", 1), ("sdpo", 10**6), ("opsd", 60)])
def test_self_distillation_is_its_definition(name: str, budget: int, tiny_qwen3_dir: Path) -> None:
    """Jensen-Shannon divergence from the student behind a privileged prompt, which has no gradient; a mean over the tokens of the rollouts
    that another right rollout, or a teacher response, can be shown for."""
    from zppo.engines.out_of_memory import TokenBudget

    model = load(tiny_qwen3_dir)
    groups = make_groups(model, [[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], seed=3)
    groups = [Group(g.prompt, tuple(replace(r, text=f"so{i} </think> it is {i}") for i, r in enumerate(g.rollouts))) for g in groups]
    renderer: Any = PromptRenderer(PromptBook(), Tokens())  # type: ignore[arg-type]
    privileged = Privileged(renderer, METHODS[name].teacher_response, None, seed=0)
    pools: dict[str, tuple[Source, ...]] = {"q0": (Source("told", "1"),), "q2": (Source("said", "1"),)} if name == "opsd" else {}
    shown = {
        "sdpo": {(0, 0): "it is 3", (0, 1): "it is 0", (0, 2): "it is 0", (0, 3): "it is 0", **{(1, i): "it is 3" for i in range(3)}},
        "opsd": {(g, i): text for g, text in ((0, "told"), (2, "said")) for i in range(4)},
    }[name]
    total, tokens, student = torch.tensor(0.0), 0, copy.deepcopy(model)
    for (g, i), text in shown.items():
        group, rollout = groups[g], groups[g].rollouts[i]
        prompt = privileged.prompt(group, rollout, pools, 1)
        assert (
            prompt is not None and text in prompt.messages[-1].content and "</think>" not in prompt.messages[-1].content.split("think")[0]
        )
        ours = student(torch.cat([torch.tensor(group.prompt.ids), rollout.ids])[None]).logits[0, len(group.prompt.ids) - 1 : -1].softmax(-1)
        ids = torch.cat([torch.tensor(prompt.ids), rollout.ids])[None]
        theirs = student(ids).logits[0, len(prompt.ids) - 1 : -1].softmax(-1).detach()
        middle = (ours + theirs) / 2
        total = total + ((ours * (ours / middle).log()).sum() + (theirs * (theirs / middle).log()).sum()) / 2
        tokens += len(rollout.ids)
    wanted = torch.autograd.grad(total / tokens, list(student.parameters()))
    assert all(
        privileged.prompt(g, r, pools, 1) is None for n, g in enumerate(groups) for i, r in enumerate(g.rollouts) if (n, i) not in shown
    )

    learner = make_policy_gradient(model, max_grad_norm=None)
    recorder = Recorder(learner)
    forward = ForwardPass(learner.optimizer.model)
    nobody: Callable[[Source], Rollout | None] = lambda source: None  # noqa: E731
    distiller = Distillation(
        forward, forward, learner.optimizer, TokenBudget(budget), respond=nobody, teacher_sampler=None, privileged=privileged
    )
    log = StepLog(1)
    distiller.update(groups, [], pools, log)
    assert log.counts["loss"] == pytest.approx(float(total.detach()) / tokens, rel=1e-4) and log.counts["distilled_completions"] == len(
        shown
    )
    for given, gradient in zip(recorder.gradients[0], wanted, strict=True):
        torch.testing.assert_close(given, gradient, rtol=1e-3, atol=1e-6)
    tight = replace(privileged, context=3)
    assert tight.prompt(groups[0], groups[0].rollouts[0], pools, 1) is None


def test_what_trial_and_error_shows() -> None:
    question = Question("q", (Message("user", "1+1?"),), "2")
    draw, rng = TrialAndError().draft, random.Random(0)
    draft = draw(Material(question, wrong_answers=("3", "4")), rng)
    assert draft is not None and draft.kind == "lte" and TrialAndError.needs == {"answers"}
    (message,) = PromptBook().render(draft)
    assert "\\boxed{3}\n\\boxed{4}" in message.content and "briefly" not in message.content and "candidate" not in message.content
    cut = draw(Material(question, truncated=True), rng)
    assert cut is not None and "briefly" in PromptBook().render(cut)[0].content and "boxed{3}" not in PromptBook().render(cut)[0].content
    assert draw(Material(question), rng) is None


def test_what_a_partial_solution_shows() -> None:
    question = Question("q", (Message("user", "1+1?"),), "2")
    draw, rng = PartialSolution().draft, random.Random(0)
    draft = draw(Material(question, response="one and\none make two", prefix_fraction=0.6), rng)
    assert draft is not None and draft.slots == {"beginning": "one and\none "} and draft.forced_ids == ()
    assert "one and\none\n</candidate>" in PromptBook().render(draft)[0].content
    assert draw(Material(question, response="two", prefix_fraction=0.4), rng) is None and draw(Material(question), rng) is None


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{name: guide-grpo, reformulations: []}", "there are none: leave method.reformulations out"),
        ("{name: lte, reformulations: []}", "there are none: leave method.reformulations out"),
        ("{name: luffy, teacher_response: false}", "leave method.teacher_response out"),
        ("{name: sdpo, reformulations: [ncq]}", "no policy gradient"),
        ("guide-grpo", "needs a teacher"),
        ("opsd", "needs a teacher"),
    ],
)
def test_what_cannot_be_is_refused(method: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_recipe({"student": {"model": "-"}, "data": {"train": "-"}}, [f"--method={method}"])


@pytest.mark.parametrize("name", ["lte", "sdpo", "dapo"])
def test_some_need_no_teacher(name: str) -> None:
    assert make_settings().model_copy(
        update={"method": load_recipe({"student": {"model": "-"}, "data": {"train": "-"}, "method": name}).method}
    )
    assert not METHODS[name].needs_teacher


def test_a_teacher_that_is_not_asked_is_not_asked_ahead_either(recipe: Path) -> None:
    settings = load_recipe(recipe, ["--method=lte", "--teacher.base_urls=[http://nowhere/v1]", "--teacher.ask=ahead"])
    with parts(settings, []) as made:
        assert made.reformulator.ahead is None and [r.kind for r in made.reformulator.reformulations] == ["lte"]


def test_a_checkpoint_from_before_the_rivals_goes_on(tmp_path: Path) -> None:
    now = {"method": asdict(METHODS["zppo"])}
    older = {name: value for name, value in now["method"].items() if name not in ("helped", "grouping", "credit", "gamma", "refill")}
    _check_method({"method": older}, now, tmp_path)
    with pytest.raises(CheckpointError, match="with refill False"):
        _check_method({"method": older}, {"method": now["method"] | {"refill": True}}, tmp_path)


@pytest.mark.parametrize("name", [row.name for row in RIVALS if row.name != "pope"])
def test_own_loops_are_told_that_zppo_train_alone_does_it(name: str, recipe: Path) -> None:
    """Pope is a step like the paper's: groups as they were sampled, in the clipped surrogate."""
    assert not METHODS[name].plain_step and METHODS["pope"].plain_step
    settings = load_recipe(recipe, [f"--method={name}", "--grading.reward=null"])
    with parts(settings, [], teachers=[]) as made, pytest.raises(SettingsError, match="`zppo train` alone"):
        made.advantages([])


def on_lab(output: Path, method: str, *more: str, world: str = "") -> list[dict[str, Any]]:
    """Two small steps on the lab; what was logged of them."""
    small = ["--train.steps=2", "--train.minibatches=2", "--rollout.batch_size=8", "--rollout.group_size=4", "--zone.rho_aug=1"]
    idle = ["--data.eval=null", "--train.checkpoint_every=0"]
    recipe = LAB.with_name(f"lab{world}.yaml")
    assert main(["train", str(recipe), f"--method={method}", f"--output={output}", *small, *idle, *more]) == 0
    steps = records(output)
    assert undocumented(output) == set() and len(steps) == 2
    return steps


def by_group(run: Path) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
    """Rollouts by step, kind and question, in the order in which they were sampled."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for path in sorted((run / "rollouts").iterdir()):
        for row in pq.read_table(path).to_pylist():
            groups.setdefault((row["step"], row["kind"], row["question_id"]), []).append(row)
    return groups


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """The rows with a gradient, as they reach the loss."""
    kept: list[Sample] = []
    inner = PolicyGradient._surrogate

    def keep(self: PolicyGradient, logprobs: torch.Tensor, old: torch.Tensor, samples: Sequence[Sample]) -> Surrogate:
        kept.extend(samples)
        return inner(self, logprobs, old, samples)

    monkeypatch.setattr(PolicyGradient, "_surrogate", keep)
    return kept


CANDIDATE = json.loads((ASSETS / "unreachable" / "student" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]["<candidate>"]
MOST = "--zone.prefix_fraction=0.9"


@pytest.mark.slow
def test_guide_on_the_lab_learns_on_plain_prompts(tmp_path: Path, learnt: list[Sample]) -> None:
    steps = on_lab(tmp_path / "run", f"{{name: guide-grpo, {PARTIAL}}}", MOST)
    shaped = [s for s in learnt if s.gamma is not None]
    assert len(shaped) > 5 and all(s.drawn is not None and CANDIDATE in s.drawn.prompt_ids for s in shaped)
    assert all(CANDIDATE not in s.row.prompt_ids and len(s.row.prompt_ids) < len(s.drawn.prompt_ids) for s in shaped if s.drawn)
    assert all(0 < r["accuracy"]["partial"] < 1 and r["hinted_rollouts_in_plain_groups"] == 4 * r["partial_prompts"] > 0 for r in steps)
    groups = by_group(tmp_path / "run")
    helped = {(step, question) for step, kind, question in groups if kind == "partial"}
    unsolved = {(step, q) for (step, kind, q), rows in groups.items() if kind == "plain" and not any(r["correct"] for r in rows)}
    assert helped == unsolved


def test_lte_on_the_lab_needs_no_teacher(tmp_path: Path, learnt: list[Sample]) -> None:
    steps = on_lab(tmp_path / "run", "lte", "--teacher=null", world="-reachable")
    joined = [s for s in learnt if s.drawn is not None]
    assert len(joined) == sum(r["hinted_rollouts_in_plain_groups"] for r in steps) > 0 and all(s.gamma == 0.1 for s in joined)
    assert all(r["teacher_tokens"] == r["teacher_questions"] == 0 for r in steps)
    groups = by_group(tmp_path / "run")
    right = [(key, r) for key, rows in groups.items() if key[1] == "lte" for r in rows if r["correct"]]
    assert len(right) == len(joined) and all(r["advantage"] > 0 for _, r in right)
    for (step, _, question), _ in right:
        assert sorted(r["advantage"] != 0 for r in groups[step, "plain", question]) == [False, True, True, True]
    prompt = next(rows[0]["prompt"] for key, rows in groups.items() if key[1] == "lte")
    assert "All wrong:" in prompt and "candidate" not in prompt


@pytest.mark.slow
def test_dapo_on_the_lab_fills_its_batch(tmp_path: Path) -> None:
    steps = on_lab(tmp_path / "run", "dapo", "--teacher=null", world="-reachable")
    groups = by_group(tmp_path / "run")
    for record in steps:
        asked = [rows for (step, _, _), rows in groups.items() if step == record["step"]]
        mixed = [len({r["correct"] for r in rows}) > 1 for rows in asked]
        assert len(asked) == 8 + record["refilled_questions"] > 8 and record["rollouts"] == 4 * len(asked)
        assert all((r["advantage"] != 0) == learns for rows, learns in zip(asked, mixed, strict=True) for r in rows)
        done, turns = 8, 0
        while done < len(asked):  # each time as many as are missing
            done, turns = done + 8 - sum(mixed[:done]), turns + 1
        assert done == len(asked) and turns <= REFILLS and (sum(mixed) == 8 or turns == REFILLS)


def test_sdpo_on_the_lab_teaches_itself(tmp_path: Path) -> None:
    steps = on_lab(tmp_path / "run", "sdpo", "--teacher=null")
    groups = by_group(tmp_path / "run")
    for record in steps:
        right = [sum(r["correct"] for r in rows) for (step, _, _), rows in groups.items() if step == record["step"]]
        assert record["distilled_completions"] == sum(4 if n > 1 else 3 * n for n in right) > 0
        assert record["optimizer_steps"] == 1 and 0 < record["loss"] < 0.7 and record["logprob_tokens"] > record["train_tokens_needed"]
    assert main(["cost", str(tmp_path / "run")]) == 0


@pytest.mark.long
def test_the_others_on_the_lab(tmp_path: Path, learnt: list[Sample]) -> None:
    steps = on_lab(tmp_path / "luffy", "luffy")
    taught = [s for s in learnt if s.fixed]
    given = [rows for rows in by_group(tmp_path / "luffy").values() if any(r["reason"] == "teacher response" for r in rows)]
    assert all(r["teacher_responses_in_groups"] == 8 for r in steps) and len(given) == 16 and 0 < len(taught) <= 16
    assert all(s.gamma == 0.1 and float(s.sampled_logprobs.abs().max()) == 0 for s in taught)
    learnt.clear()
    steps = on_lab(tmp_path / "scaf", f"{{name: scaf-grpo, {PARTIAL}}}", MOST)
    hinted = [s for s in learnt if CANDIDATE in s.row.prompt_ids]
    assert len(hinted) == sum(r["hinted_rollouts_in_plain_groups"] for r in steps) > 0 and all(s.comparable for s in hinted)
    learnt.clear()
    on_lab(tmp_path / "pope", "pope", MOST)
    groups = by_group(tmp_path / "pope")
    assert any(r["advantage"] != 0 for key, rows in groups.items() if key[1] == "partial" for r in rows)
    assert any(CANDIDATE in s.row.prompt_ids for s in learnt) and all(s.drawn is None and s.gamma is None for s in learnt)
    steps = on_lab(tmp_path / "opsd", "opsd")
    assert all(r["distilled_completions"] == 4 * (8 - r["teacher_solved_none"]) > 0 for r in steps)


@pytest.mark.long
@pytest.mark.parametrize("method", [f"{{name: guide-grpo, {PARTIAL}}}", "sdpo", "luffy"])
def test_adapters_learn_too(method: str, tmp_path: Path) -> None:
    steps = on_lab(tmp_path / "run", method, MOST, "--train.lora={rank: 4}")
    assert all(r["grad_norm"] > 0 and r["optimizer_steps"] > 0 for r in steps)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lte", "luffy", "dapo", "sdpo", "opsd"])
def test_two_processes_are_one(method: str, recipe: Path, tmp_path: Path, victims: Victims) -> None:
    short = [f"--method={method}", "--train.steps=2", "--data.eval=null", "--train.checkpoint_every=0"]
    assert main(["train", str(recipe), *short, f"--output={tmp_path / 'one'}"]) == 0
    status = victims.run("train", recipe, *short, f"--output={tmp_path / 'two'}", run=tmp_path / "two", processes=2)
    assert status == 0, victims.said[-3000:]
    assert_near_run(tmp_path / "one", tmp_path / "two")
