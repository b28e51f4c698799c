"""Scores of tokens a chunk of logits at a time, against the whole-logits form: values, gradients, and the largest tensor ever made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen3Config,
)

from zppo.config.settings import LoraSettings
from zppo.core.loss import jensen_shannon
from zppo.core.minibatch import head_tokens
from zppo.engines import output_head
from zppo.engines.logprobs import ForwardPass, Pack, Row, shared_logprobs, token_scores
from zppo.engines.output_head import HeadForm, head_form
from zppo.models.lora import add_adapters
from zppo.models.student_model import recompute_layers

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[Any, HeadForm]] = {
    "untied": (Qwen3Config(**SIZES), HeadForm(1.0, 0.0, VOCAB)),
    "tied": (LlamaConfig(**{**SIZES, "tie_word_embeddings": True}), HeadForm(1.0, 0.0, VOCAB)),
    "bias": (PhiConfig(**SIZES), HeadForm(1.0, 0.0, VOCAB)),
    "soft cap": (Gemma2Config(**SIZES, final_logit_softcapping=3.0), HeadForm(1.0, 3.0, VOCAB)),
    "division": (GraniteConfig(**SIZES, logits_scaling=7.0), HeadForm(0.142857, 0.0, VOCAB)),
    "factor": (CohereConfig(**SIZES, logit_scale=0.0625), HeadForm(0.0625, 0.0, VOCAB)),
}
ROWS = [
    Row([5, 6, 7], [8, 9]),
    Row((4,), (10, 11, 12, 13, 14)),
    Row(torch.tensor([3, 9, 9, 2, 7, 1, 6]), torch.tensor([5])),
    Row([1, 2], [3, 4, 5, 6]),
]
BANNED = (20, 31, 500)


def made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    return model


def whole(model: PreTrainedModel, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) log-probs and entropies of ROWS from whole logits, by autograd's own operations."""
    found = []
    for row in ROWS:
        prompt, completion = torch.as_tensor(row.prompt_ids), torch.as_tensor(row.completion_ids)
        logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
        logits[:, [i for i in BANNED if i < VOCAB]] = -1e30
        logprobs = logits.log_softmax(-1)
        found.append((logprobs.gather(1, completion[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)))
    return torch.cat([logprobs for logprobs, _ in found]), torch.cat([spread for _, spread in found])


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """To 1e-6 of the largest gradient; rows one by one and rows together differ by rounding already."""
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) <= 1e-6 * max(1.0, largest), name


def in_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(output_head, "head_tokens", lambda *_, **__: tokens)


def check(model: PreTrainedModel, temperature: float = 0.7) -> None:
    weights = torch.randn(12, generator=torch.Generator().manual_seed(1))
    scores = token_scores(model, ROWS, temperature=temperature, banned_ids=BANNED, entropies=True)
    ours = gradients(model, (scores.logprobs[scores.mask] * weights).sum())
    logprobs, entropies = whole(model, temperature)
    theirs = gradients(model, (logprobs * weights).sum())
    assert scores.entropies is not None
    torch.testing.assert_close(scores.logprobs[scores.mask], logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(scores.entropies[scores.mask], entropies, rtol=1e-6, atol=2e-6)
    close(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 5, 100])
@pytest.mark.parametrize("kind", MODELS)
def test_chunks_score_what_whole_logits_do(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, tokens)
    config, form = MODELS[kind]
    model = made(config)
    found = head_form(model)
    assert found is not None and found == pytest.approx(form, rel=1e-5)
    check(model)


class Shifted(torch.nn.Module):
    """An output layer of which nothing is known: the model adds something to its logits that depends on the id."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.shift = model, torch.nn.Parameter(torch.randn(VOCAB))
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        out.logits = out.logits + self.shift
        return out


def test_a_head_that_does_something_unknown_keeps_the_whole_form(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 3)
    model: Any = Shifted(made(MODELS["untied"][0]))
    assert head_form(model) is None
    check(model)


def test_a_factor_by_another_name_is_found() -> None:
    """Falcon-H1 multiplies by `lm_head_multiplier`: forms are tried, names are not known."""
    config = FalconH1Config(**SIZES, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    found = head_form(made(config))
    assert found is not None and found.scale == 0.3


@pytest.mark.parametrize("how", ["lora on the head", "modules to save", "checkpointed layers", "only the head"])
def test_whatever_the_head_is(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 5)
    model = made(MODELS["untied"][0])
    if how == "lora on the head":
        add_adapters(model, LoraSettings(targets=("lm_head", "q_proj")), base="x")
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        assert sum("lm_head" in name for name, p in model.named_parameters() if p.requires_grad) == 2
    elif how == "modules to save":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))  # type: ignore[assignment]
        assert any("lm_head.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    elif how == "checkpointed layers":
        assert recompute_layers(model) > 0
    else:
        model.model.requires_grad_(False)
    check(model)
    assert head_form(model) == HeadForm(1.0, 0.0, VOCAB)


class Packed(torch.nn.Linear):
    """A linear layer as quantized ones are: its weights are no parameters, and its own code unpacks them."""

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().max() / 127
        del self.weight
        self.register_buffer("packed", (layer.weight.detach() / scale).round().to(torch.int8))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.packed.to(x.dtype) * self.scale)


def test_a_quantized_head_is_called_and_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 5)
    model = made(MODELS["untied"][0])
    model.set_output_embeddings(Packed(model.lm_head))
    check(model)


def test_under_autocast_gradients_of_all_weights_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that autocast has turned without gradients must not serve a backward pass in the same context."""
    found = []
    for tokens in (5, 100):
        in_chunks(monkeypatch, tokens)
        model = made(MODELS["untied"][0])
        with torch.autocast("cpu", torch.bfloat16):
            scores = token_scores(model, ROWS)
            found.append((scores.logprobs.detach(), gradients(model, scores.logprobs.sum())))
    (chunked, ours), (plain, theirs) = found
    torch.testing.assert_close(chunked, plain)
    assert ours.keys() == theirs.keys() and "lm_head.weight" in ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.parametrize("tokens", [2, 100])
@pytest.mark.parametrize("kind", ["untied", "soft cap"])
def test_divergences_are_those_of_whole_logits(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, tokens)
    model, teacher = made(MODELS[kind][0]), made(Qwen3Config(**{**SIZES, "vocab_size": VOCAB + 8}))
    weights = torch.randn(12, generator=torch.Generator().manual_seed(1))
    ours_of, theirs_of = ForwardPass(model), ForwardPass(teacher)
    found = ours_of.divergence(ROWS, theirs_of.late(ROWS))
    ours = gradients(model, (found * weights).sum())
    lines = []
    for row in ROWS:
        ids, start = torch.cat([torch.as_tensor(row.prompt_ids), torch.as_tensor(row.completion_ids)])[None], len(row.prompt_ids) - 1
        with torch.no_grad():
            wanted = teacher(ids).logits[0, start:-1, :VOCAB]
        lines.append(jensen_shannon(model(ids).logits[0, start:-1], wanted))
    theirs = gradients(model, (torch.cat(lines) * weights).sum())
    torch.testing.assert_close(found, torch.cat(lines), rtol=1e-6, atol=1e-6)
    close(ours, theirs)
    assert all(p.grad is None for p in teacher.parameters())


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


WIDE: dict[str, Any] = {**SIZES, "vocab_size": 50_000, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_hidden_layers": 1}


def logprobs_of(model: PreTrainedModel, rows: list[Row]) -> torch.Tensor:
    return token_scores(model, rows, temperature=0.5, banned_ids=BANNED, entropies=True).logprobs.sum()


def shared_of(model: PreTrainedModel, rows: list[Row]) -> torch.Tensor:
    return shared_logprobs(model, [Pack(rows[0].prompt_ids, [row.completion_ids for row in rows])])[0].sum()


def divergence_of(model: PreTrainedModel, rows: list[Row]) -> torch.Tensor:
    return ForwardPass(model).divergence(rows, ForwardPass(copy.deepcopy(model)).late(rows)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("work", [logprobs_of, shared_of, divergence_of])
def test_logits_are_never_whole(work: Callable[[PreTrainedModel, list[Row]], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of 300 tokens over a vocabulary of 50,000: nothing is larger than a chunk of 20, or the weights."""
    in_chunks(monkeypatch, 20)
    model = made(Qwen3Config(**WIDE))
    rows = [Row([1, 2, 3], torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (200, 100)]
    with Largest() as largest:
        work(model, rows).backward()  # type: ignore[no-untyped-call]
    assert largest.numbers <= max(20 * 50_000, 16 * 50_000)
    with Largest() as largest, torch.no_grad():
        work(model, rows)
    assert largest.numbers <= max(20 * 50_000, 16 * 50_000)


def test_a_chunk_takes_the_same_memory_whatever_the_vocabulary_is() -> None:
    sizes = [head_tokens(vocab, gpu=gpu) * vocab for vocab in (100, 49_152, 248_320) for gpu in (False, True)]
    assert all(2**24 * 0.9 < size <= 2**24 for size in sizes[::2]) and all(2**27 * 0.9 < size <= 2**27 for size in sizes[1::2])
    assert head_tokens(10**9, gpu=False) == 1
