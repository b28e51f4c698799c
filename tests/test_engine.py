"""The transformers engine against plain re-statements: the training forward, token-by-token sampling, `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zppo.engines import kv_cache as cache
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.engines.keyed_sampling import Drawer
from zppo.engines.kv_cache import is_plain
from zppo.engines.logprobs import completion_logprobs
from zppo.engines.transformers import Piece, TransformersEngine, plan
from zppo.errors import ModelError

VOCAB, ENDS, BANNED = 64, frozenset(range(54, 64)), frozenset({3, 4})
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}


def tiny(kind: str = "qwen3", std: float = 0.2, **more: Any) -> PreTrainedModel:
    """A random model whose weights are large enough to show errors (std >= 0.1)."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZE | {"head_dim": 8} | more))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZE | more))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZE | more))
    elif kind == "sliding":
        window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        model = Qwen3ForCausalLM(Qwen3Config(**SIZE | {"head_dim": 8} | window | more))
    else:
        linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        shape = {"head_dim": 16, "num_hidden_layers": 4}
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SIZE | shape | linear | more))
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=std)
    return model.eval()


def requests(lengths: Sequence[int], group: int = 4, seed: int = 0) -> list[SampleRequest]:
    g = torch.Generator().manual_seed(seed)
    return [
        SampleRequest(
            tuple(torch.randint(5, 54, (n,), generator=g).tolist()), tuple(torch.randint(0, 2**62, (group,), generator=g).tolist())
        )
        for n in lengths
    ]


def engine(model: PreTrainedModel, **more: Any) -> TransformersEngine:
    return TransformersEngine(model, ENDS, 0, BANNED, **more)


def step_by_step(model: PreTrainedModel, request: SampleRequest, key: int, sampling: Sampling) -> tuple[list[int], list[float]]:
    """The plainest sampler: the whole sequence through the model for every token, one row."""
    ids, logprobs = list(request.prompt_ids), []
    drawer = Drawer(sampling, [key], [request.prompt_ids], tuple(BANNED))
    for step in range(sampling.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        draws = drawer.draw(logits, step)
        ids.append(int(draws.tokens))
        logprobs.append(float(draws.logprobs))
        if ids[-1] in ENDS:
            break
    return ids[len(request.prompt_ids) :], logprobs


def flat(groups: list[list[Completion]]) -> list[list[int]]:
    return [completion.ids.tolist() for group in groups for completion in group]


KINDS = ["qwen3", "qwen3.5", "qwen2", "llama", "sliding"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_equal_the_training_forward(kind: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed prompt lengths, rows that end at different times: Qwen3 max <= 1e-5; Qwen3.5 mean <= 1e-5, max <= 1e-3."""
    model, asked = tiny(kind), requests([3, 40, 17, 1, 70])
    can_share, decided = cache.can_share, []

    def decide(*args: Any) -> bool:
        decided.append(can_share(*args))
        return shared and decided[-1]

    monkeypatch.setattr(cache, "can_share", decide)
    done = engine(model).sample(asked, Sampling(max_new_tokens=12, temperature=0.9))
    assert decided == [kind != "sliding"]
    lengths = {len(c.ids) for group in done for c in group}
    assert len(lengths) > 6 and max(lengths) == 12, "the case is meant to be ragged"
    rows = [(request.prompt_ids, c.ids) for request, group in zip(asked, done, strict=True) for c in group]
    with torch.no_grad():
        expected, mask = completion_logprobs(model, rows, temperature=0.9, banned_ids=BANNED)
    sampled = torch.cat([c.logprobs for group in done for c in group])
    error = (sampled - expected[mask]).abs()
    assert error.max() <= (1e-3 if kind == "qwen3.5" else 1e-5)
    assert error.mean() <= 1e-5
    assert model.config._attn_implementation == "sdpa"


def assert_lean_is_exact(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    """Tokens, log-probs and entropies of whole completions are those of the library's own forward, to the bit."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
    asked, sampling = requests([3, 40, 17, 1, 70]), Sampling(max_new_tokens=40, temperature=0.9)
    steps, decode = [], cache.decode_tokens
    patch.setattr(cache, "decode_tokens", lambda *a: (steps.append(1), decode(*a))[1])
    lean = engine(model.eval()).sample(asked, sampling)
    assert len(steps) > 10
    patch.setattr(cache, "is_plain", lambda _: False)
    plain = engine(model).sample(asked, sampling)
    for ours, theirs in zip((c for g in lean for c in g), (c for g in plain for c in g), strict=True):
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.logprobs, theirs.logprobs)
        assert ours.entropy == theirs.entropy


@pytest.mark.parametrize("more", [{}, {"attention_bias": True}], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_a_lean_step_is_the_library_s_to_the_bit(kind: str, more: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_lean_is_exact(tiny(kind, **({} if kind == "qwen2" else more)), monkeypatch)


def test_what_hangs_on_modules_is_not_gone_around() -> None:
    model = tiny()
    assert is_plain(model) and not is_plain(tiny("qwen3.5"))
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not is_plain(model)
    handle.remove()
    assert is_plain(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain(model)
    layer: Any = model.model.layers[1]
    layer.forward = layer.forward
    assert not is_plain(model)
    del layer.forward
    model.__class__ = type("FSDPQwen3ForCausalLM", (type(model),), {})
    assert not is_plain(model)


SAMPLINGS = [
    Sampling(max_new_tokens=8),
    Sampling(max_new_tokens=8, temperature=0),
    Sampling(max_new_tokens=8, temperature=0.6, top_p=0.95, top_k=20, presence_penalty=1.5),
    Sampling(max_new_tokens=8, min_p=0.05, repetition_penalty=1.3),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "greedy", "truncated", "penalised"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_a_batch_draws_what_each_rollout_alone_would(kind: str, sampling: Sampling) -> None:
    """The draws of a rollout are a function of its key, whatever else is in the batch."""
    model, asked = tiny(kind), requests([2, 30], group=3)
    for request, group in zip(asked, engine(model).sample(asked, sampling), strict=True):
        for key, completion in zip(request.keys, group, strict=True):
            ids, logprobs = step_by_step(model, request, key, sampling)
            assert completion.ids.tolist() == ids
            torch.testing.assert_close(completion.logprobs, torch.tensor(logprobs), atol=2e-4, rtol=0)
            assert completion.truncated == (ids[-1] not in ENDS)


@pytest.mark.parametrize("limits", [{"max_rows": 1}, {"max_rows": 5}, {"max_tokens": 90}, {"max_rows": 7, "max_tokens": 60}])
def test_limits_change_nothing_but_the_batches(limits: dict[str, int]) -> None:
    model, asked = tiny(), requests([9, 3, 21, 3], group=4)
    whole = engine(model).sample(asked, Sampling(max_new_tokens=10))
    assert flat(engine(model, **limits).sample(asked, Sampling(max_new_tokens=10))) == flat(whole)
    assert flat(engine(model).sample(asked[1:2], Sampling(max_new_tokens=10))) == flat(whole[1:2])


@pytest.mark.parametrize("look_every", [3, 100])
def test_looking_less_often_changes_nothing(look_every: int) -> None:
    model, asked = tiny(max_position_embeddings=40), requests([9, 33, 36], group=4)
    usual = engine(model).sample(asked, Sampling(max_new_tokens=10))
    rarely = engine(model, look_every=look_every).sample(asked, Sampling(max_new_tokens=10))
    assert flat(rarely) == flat(usual)
    assert [c.truncated for g in rarely for c in g] == [c.truncated for g in usual for c in g]


def test_the_plan_fills_batches_longest_first_and_splits_no_group_that_fits() -> None:
    asked = requests([5, 9, 7], group=4)
    assert plan(asked, 10, None, None) == [[Piece(1, 0, 4), Piece(2, 0, 4), Piece(0, 0, 4)]]
    assert plan(asked, 10, 6, None) == [[Piece(1, 0, 4)], [Piece(2, 0, 4)], [Piece(0, 0, 4)]]
    assert plan(asked[:1], 10, 3, None) == [[Piece(0, 0, 3)], [Piece(0, 3, 4)]]
    assert plan(asked, 10, None, 19 * 4) == [[Piece(1, 0, 4)], [Piece(2, 0, 4)], [Piece(0, 0, 4)]]
    assert plan(asked[1:2], 10, None, 1) == [[Piece(0, i, i + 1)] for i in range(4)]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_greedy_equals_generate(kind: str) -> None:
    model, asked = tiny(kind), requests([4, 18], group=1)
    done = TransformersEngine(model, ENDS, 0).sample(asked, Sampling(temperature=0, max_new_tokens=20))
    for request, (completion,) in zip(asked, done, strict=True):
        expected = cast(Any, model).generate(
            torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=20, eos_token_id=sorted(ENDS), pad_token_id=0
        )
        assert completion.ids.tolist() == expected[0, len(request.prompt_ids) :].tolist()


def test_first_tokens_are_distributed_as_the_model_says() -> None:
    model, (request,) = tiny(std=0.35), requests([12], group=6_000)
    done = engine(model).sample([request], Sampling(max_new_tokens=1, temperature=1.2))
    with torch.no_grad():
        logits = model(torch.tensor([request.prompt_ids])).logits[0, -1] / 1.2
    logits[sorted(BANNED)] = -torch.inf
    probs = logits.softmax(-1)
    counts = torch.tensor([c.ids[0] for c in done[0]]).bincount(minlength=VOCAB)
    assert int(counts[sorted(BANNED)].sum()) == 0
    common = probs * 6_000 > 5
    chi = ((counts - 6_000 * probs) ** 2 / (6_000 * probs))[common].sum()
    freedom = int(common.sum())
    assert float(chi) < freedom + 4 * (2 * freedom) ** 0.5
    assert done[0][0].entropy == pytest.approx(float(torch.special.entr(probs).sum()), abs=1e-5)


def test_banned_ids_never_appear_and_ends_close_a_completion() -> None:
    model = tiny(std=0.05)  # nearly uniform: without the ban they would come up
    done = engine(model).sample(requests([5, 8], group=100), Sampling(max_new_tokens=15))
    rows = flat(done)
    assert not any(i in BANNED for ids in rows for i in ids)
    assert all(i not in ENDS for ids in rows for i in ids[:-1])
    ends = [ids[-1] in ENDS for ids in rows]
    assert [not c.truncated for group in done for c in group] == ends
    assert True in ends and False in ends
    assert all(len(ids) == 15 for ids, ended in zip(rows, ends, strict=True) if not ended)
    assert any(len(ids) == 15 for ids, ended in zip(rows, ends, strict=True) if ended), "an end at the limit is no cut"


def test_a_completion_ends_at_the_context() -> None:
    model, asked = tiny(max_position_embeddings=20), requests([19, 15, 4], group=2)
    done = TransformersEngine(model, [63], 0, range(60)).sample(asked, Sampling(max_new_tokens=8))
    for room, group in zip([1, 5, 8], done, strict=True):
        for completion in group:
            assert len(completion.ids) <= room
            assert completion.truncated == (completion.ids[-1] != 63)
            assert len(completion.ids) == room or not completion.truncated


def test_entropy_is_the_mean_over_the_tokens() -> None:
    model, asked = tiny(), requests([6], group=3)
    for completion in engine(model).sample(asked, Sampling(max_new_tokens=9))[0]:
        ids = torch.tensor([[*asked[0].prompt_ids, *completion.ids.tolist()]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(asked[0].prompt_ids) - 1 : -1]
        logits[:, sorted(BANNED)] = -torch.inf
        expected = torch.special.entr(logits.softmax(-1)).sum(-1).mean()
        assert completion.entropy == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_eager_attention_samples_the_same(kind: str) -> None:
    asked = requests([3, 14], group=2)
    usual = engine(tiny(kind)).sample(asked, Sampling(max_new_tokens=10))
    assert flat(engine(tiny(kind, attn_implementation="eager")).sample(asked, Sampling(max_new_tokens=10))) == flat(usual)


def test_long_completions_outgrow_the_first_buffer() -> None:
    model, asked = tiny(max_position_embeddings=400), requests([3, 8], group=2)
    long = Sampling(max_new_tokens=150)
    plain = TransformersEngine(model, [63], 0)
    done = plain.sample(asked, long)
    assert max(len(c.ids) for group in done for c in group) > 100
    rows = [(request.prompt_ids, c.ids) for request, group in zip(asked, done, strict=True) for c in group]
    with torch.no_grad():
        expected, mask = completion_logprobs(model, rows)
    torch.testing.assert_close(torch.cat([c.logprobs for g in done for c in g]), expected[mask], atol=3e-5, rtol=0)


def test_autocast_is_applied_and_its_log_probs_stay_close() -> None:
    model, asked = tiny(std=0.1), requests([5, 12], group=4)
    done = engine(model, autocast_dtype=torch.bfloat16).sample(asked, Sampling(max_new_tokens=8))
    rows = [(request.prompt_ids, c.ids) for request, group in zip(asked, done, strict=True) for c in group]
    with torch.no_grad():
        expected, mask = completion_logprobs(model, rows, banned_ids=BANNED)
    error = (torch.cat([c.logprobs for g in done for c in g]) - expected[mask]).abs()
    assert 1e-4 < error.max() < 0.1, "bf16 differs, a little"
    assert all(c.logprobs.dtype == torch.float32 for g in done for c in g)


def test_the_models_modes_come_back() -> None:
    model = tiny(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    asked = requests([5], group=4)
    first = engine(model).sample(asked, Sampling(max_new_tokens=8))
    assert [module.training for module in model.modules()] == before
    assert flat(engine(model.eval()).sample(asked, Sampling(max_new_tokens=8))) == flat(first), "dropout was off"
    model.train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        engine(model).sample(asked, Sampling(max_new_tokens=8))
    assert model.training


@pytest.mark.parametrize(
    ("asked", "sampling", "says"),
    [
        ([], Sampling(), "empty"),
        ([SampleRequest((), (1,))], Sampling(), "prompt tokens"),
        ([SampleRequest((5,), ())], Sampling(), "keys"),
        ([SampleRequest((5, VOCAB), (1,))], Sampling(), f"token id {VOCAB}"),
        ([SampleRequest((5,) * 160, (1,))], Sampling(), "context is 160"),
        ([SampleRequest((5,), (1,))], Sampling(max_new_tokens=0), "max_new_tokens is 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(asked: list[SampleRequest], sampling: Sampling, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        engine(tiny()).sample(asked, sampling)


def test_an_engine_without_an_end_is_refused() -> None:
    with pytest.raises(ModelError, match="no end token"):
        TransformersEngine(tiny(), [3], 0, banned_ids=[3])


@pytest.mark.parametrize("limits", [{}, {"max_rows": 7}, {"max_tokens": 300}, {"look_every": 5}])
def test_completions_are_handed_over_as_they_end(limits: dict[str, int]) -> None:
    """Each once and as it is returned, and most of them before the longest has ended; a group that is split over batches too."""
    model, asked = tiny(), requests([3, 40, 17, 1, 70], group=6)
    steps, given = [0], {}
    model.register_forward_pre_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))

    for request, key, completion in engine(model, **limits).stream(asked, Sampling(max_new_tokens=20)):
        assert (request, key) not in given
        given[request, key] = (steps[0], completion)
    assert sum(at < steps[0] for at, _ in given.values()) > len(given) / 2
    done = engine(model, **limits).sample(asked, Sampling(max_new_tokens=20))
    for i, row in enumerate(done):
        for j, completion in enumerate(row):
            assert torch.equal(given.pop((i, j))[1].ids, completion.ids)
    assert not given
