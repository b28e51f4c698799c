"""Completions of one prompt as branches of one sequence: the same log-probs and gradients, and only where a model can do it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3_5TextConfig, Qwen3Config

from test_memory import runs_out
from test_update import REWARDS, Recorder, load, make_groups, make_policy_gradient, plain_gradients, update
from zppo.config.recipe import load_recipe
from zppo.core.advantages import step_advantages
from zppo.core.minibatch import Sharing, packed, samples_of, share_prompt
from zppo.engines import logprobs as shared
from zppo.engines.logprobs import BranchMask, Pack, completion_logprobs, shared_logprobs, sharing_of
from zppo.models.student_model import recompute_layers
from zppo.train.assemble import _make_sharing

ALWAYS = Sharing(reach=10**9)
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,  # small weights hide errors
}


def tiny(config: type, attention: str = "sdpa", **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**SIZES, **more}), attn_implementation=attention)
    return model.eval()  # type: ignore[no-any-return]


def packs(seed: int = 0) -> list[Pack]:
    rng = torch.Generator().manual_seed(seed)

    def ids(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=rng))
        return tuple(torch.randint(0, 60, (length,), generator=rng).tolist())

    made = [Pack(ids(20), [ids(12) for _ in range(count)]) for count in (3, 1, 8, 2)]
    return [*made, Pack((7,), [ids(5), (8,)])]  # a prompt of one token shares nothing, and is right all the same


@pytest.mark.parametrize("config", [Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "banned_ids": (3, 9, 1000), "pad_id": 5}])
def test_branches_score_what_rows_score(config: type, how: dict[str, Any]) -> None:
    model, given_packs = tiny(config), packs()
    rows = [(p.prompt_ids, c) for p in given_packs for c in p.completions if not {3, 9} & set(c) or not how]
    kept = [Pack(p.prompt_ids, own) for p in given_packs if (own := [c for q, c in rows if q is p.prompt_ids])]
    weights = torch.randn(len(rows), max(len(c) for _, c in rows))
    found = []
    for score in (lambda: shared_logprobs(model, kept, **how), lambda: completion_logprobs(model, rows, **how)):
        model.zero_grad()
        logprobs, mask = score()
        (logprobs * weights).sum().backward()
        found.append((logprobs.detach(), mask, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (ours, mask, gradients), (theirs, wanted, expected) = found
    assert torch.equal(mask, wanted) and float((ours - theirs).abs().max()) < 1e-5
    biggest = max(float(g.abs().max()) for g in expected)
    assert max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True)) <= 1e-5 * biggest


class Kernels(TorchDispatchMode):
    """Notes for how many queries and keys an attention kernel is called."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.asked.append((args[0].shape[2], args[1].shape[2]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_attention_is_asked_for_pairs_that_see_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for all pairs of a pack."""
    model, two = tiny(LlamaConfig), [Pack(range(20), [range(5), range(9), range(3)]), Pack(range(4), [range(2)])]
    expected, _ = completion_logprobs(model, [(p.prompt_ids, c) for p in two for c in p.completions])
    with Kernels() as seen:
        found, _ = shared_logprobs(model, two)
    assert sorted(set(seen.asked)) == [(2, 5), (3, 3), (3, 22), (5, 24), (9, 28), (19, 19)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_any_other_reader_of_the_mask_finds_a_plain_one() -> None:
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask = BranchMask.of(seen, [[1, 2]], None)  # and one token of padding
    assert type(mask[:, :, :2]) is torch.Tensor and type(mask.float()) is torch.Tensor and torch.equal(mask.logical_not(), ~seen)
    assert mask.late(1, 2).tolist() == [[True, True, False], [True, True, True]]
    short, x = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8)  # fewer queries than the mask has rows: nothing is known of them
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(short, x, x, mask[:, :, :3]), attend(short, x, x, seen[:, :, :3]))
    torch.testing.assert_close(attend(x, x, x, mask)[:, :, :3], attend(x, x, x, seen)[:, :, :3], atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [Qwen3Config, LlamaConfig])
@torch.no_grad()
def test_branches_in_bf16_are_as_near_as_rows_are(config: type) -> None:
    model = tiny(config)
    rows = [(p.prompt_ids, c) for p in packs() for c in p.completions]
    exact, mask = completion_logprobs(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        gaps = [
            (logprobs - exact)[mask].abs().mean() for logprobs, _ in (shared_logprobs(model, packs()), completion_logprobs(model, rows))
        ]
    assert float(gaps[0]) < 1.5 * float(gaps[1])


def test_models_that_cannot_branch_are_not_asked_to() -> None:
    assert sharing_of(tiny(Qwen3Config)) == Sharing(reach=6 * 32)
    assert sharing_of(tiny(Qwen3Config, "eager")) is None  # would add a mask of truth values to its scores
    assert sharing_of(tiny(MistralConfig, sliding_window=4)) is None
    linear = tiny(Qwen3_5TextConfig, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2)
    assert sharing_of(linear) is None


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(Qwen3Config)
    forward = model.forward
    model.forward = lambda attention_mask=None, **inputs: forward(**inputs)  # type: ignore[method-assign]
    assert sharing_of(model) is None
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)  # type: ignore[method-assign]
    assert sharing_of(model) is None


@settings(max_examples=50)
@given(st.integers(1, 500), st.lists(st.integers(1, 200), min_size=1, max_size=8), st.integers(1, 10_000), st.integers(1, 5000))
def test_packs_hold_each_completion_once_and_never_cost_more(prompt: int, tokens: list[int], reach: int, most: int) -> None:
    def cost(chosen: list[list[int]]) -> float:
        pairs = len(chosen) * prompt**2 + sum(t * (prompt + t) for t in tokens)
        return sum(prompt + sum(tokens[i] for i in pack) for pack in chosen) + pairs / reach

    chosen = share_prompt(prompt, tokens, reach=reach, most=most)
    assert sorted(i for pack in chosen for i in pack) == list(range(len(tokens)))
    assert all(len(p) == 1 or prompt + sum(tokens[i] for i in p) <= most for p in chosen)
    alone = [[i] for i in range(len(tokens))]
    assert cost(chosen) <= cost(alone) * (1 + 1e-9)
    whole = [list(range(len(tokens)))]
    assert cost(share_prompt(prompt, tokens, reach=reach, most=10**9)) <= 1.05 * cost(whole) * (1 + 1e-9)


def test_packs_are_as_small_as_costs_little() -> None:
    assert len(share_prompt(150, [46] * 8, reach=3456, most=4096)) == 1
    assert len(share_prompt(50, [500] * 8, reach=3456, most=10**6)) == 4  # 4 prompts of 50 more are 4% of 4,050 tokens
    assert len(share_prompt(1, [500] * 8, reach=3456, most=10**6)) == 8


@pytest.mark.parametrize("sampler", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_an_update_that_shares_prompts_has_the_gradients_of_plain_rows(tiny_qwen3_dir: Path, budget: int, sampler: bool) -> None:
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, REWARDS)
    advantages = step_advantages(groups, "nontrivial")
    apart = make_policy_gradient(copy.deepcopy(model), sampler=sampler, tokens_per_microbatch=budget)
    learner = make_policy_gradient(copy.deepcopy(model), sampler=sampler, sharing=ALWAYS, tokens_per_microbatch=budget)
    recorders = Recorder(apart), Recorder(learner)
    wanted, metrics = (update(u, groups, advantages, step=1) for u in (apart, learner))
    expected = recorders[0].gradients[0]
    if sampler:
        values = iter(advantages.tolist())
        expected = plain_gradients(model, [(g, r, next(values)) for g in groups for r in g.rollouts], clip=1.0)
    biggest = max(float(g.abs().max()) for g in expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(recorders[1].gradients[0], expected, strict=True))
    assert worst <= 1e-5 * biggest
    counted = {"train_tokens_needed", "train_tokens_computed", "logprob_tokens"}
    for name in wanted.keys() - counted:
        assert metrics[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    live = [groups[0], groups[3]]
    shares = sum(len(g.prompt.ids) + sum(len(r.ids) for r in g.rollouts) for g in live)
    if budget == 10_000:
        assert metrics["train_tokens_needed"] == shares < (wanted["train_tokens_needed"] or 0)
        assert metrics["logprob_tokens"] == (0 if sampler else shares)
    if budget == 1:
        assert metrics["train_tokens_computed"] == wanted["train_tokens_computed"]


def test_memory_that_runs_out_makes_packs_smaller_down_to_single_rows(tiny_qwen3_dir: Path) -> None:
    model = load(tiny_qwen3_dir)
    groups = make_groups(model, REWARDS)
    advantages = step_advantages(groups, "nontrivial")
    plain = Recorder(apart := make_policy_gradient(copy.deepcopy(model)))
    update(apart, groups, advantages, step=1)
    longest = max(len(g.prompt.ids) + len(r.ids) for g in groups for r in g.rollouts)
    tried = runs_out(model, longest, "backward")
    learner = make_policy_gradient(model, sharing=ALWAYS, tokens_per_microbatch="auto")
    recorder = Recorder(learner)
    update(learner, groups, advantages, step=1)
    assert max(tried) > longest >= tried[-1]
    biggest = max(float(g.abs().max()) for g in plain.gradients[0])
    gaps = (float((a - b).abs().max()) for a, b in zip(recorder.gradients[0], plain.gradients[0], strict=True))
    assert max(gaps) <= 1e-5 * biggest


def test_layers_that_are_computed_again_may_branch(tiny_qwen3_dir: Path) -> None:
    gradients = []
    for again in (False, True):
        model = load(tiny_qwen3_dir)
        groups = make_groups(model, REWARDS)
        if again:
            assert recompute_layers(model) > 0
        recorder = Recorder(learner := make_policy_gradient(model, sharing=ALWAYS))
        update(learner, groups, step_advantages(groups, "nontrivial"), step=1)
        gradients.append(recorder.gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rows_of_one_prompt_share_it_and_others_do_not(tiny_qwen3_dir: Path) -> None:
    groups = make_groups(load(tiny_qwen3_dir), REWARDS)
    rows = [s for group in samples_of(groups, torch.ones(20), mask_truncated=False) for s in group]
    found = packed(rows, ALWAYS, most=10_000)
    assert sorted(sorted(pack) for pack in found) == [list(range(4 * g, 4 * g + 4)) for g in range(5)]
    assert sorted(packed(rows, ALWAYS, most=1)) == [[i] for i in range(20)]


def test_the_setting_and_its_default(tiny_qwen3_dir: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_qwen3_dir)

    def made(device: str, *overrides: str) -> Sharing | None:
        where: Any = SimpleNamespace(device=torch.device(device), mixed_precision="no")
        return _make_sharing(load_recipe(recipe, overrides), model, where)

    on = sharing_of(model)
    assert on is not None and made("cpu") == on == made("cuda", "--train.share_prompts=on")
    assert made("cuda") is None and made("cpu", "--train.share_prompts=off") is None
    monkeypatch.setattr(shared, "_agrees", lambda *_: False)
    assert made("cpu", "--train.share_prompts=on") is None
