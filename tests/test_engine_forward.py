"""The training forward against the plainest one: row by row, autograd's own log-softmax."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

from zppo.distributed.parallel import zero_gradients
from zppo.engines import output_head
from zppo.engines.logprobs import Row, completion_logprobs, token_scores
from zppo.images.features import device_of

ROWS = [
    Row([5, 6, 7], [8, 9]),
    Row((4,), (10, 11, 12, 13, 14)),
    Row(torch.tensor([3, 9, 9, 2, 7, 1, 6]), torch.tensor([5])),
    Row([1, 2], [3, 4, 5]),
]


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model: PreTrainedModel
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**size, num_hidden_layers=2, head_dim=8))
    else:
        linear: dict[str, Any] = {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
        }
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**size, **linear, num_hidden_layers=4, head_dim=16))
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def plainly(model: PreTrainedModel, row: Row, temperature: float, banned: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one row, each (T,)."""
    prompt, completion = torch.as_tensor(row.prompt_ids), torch.as_tensor(row.completion_ids)
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / temperature
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[banned] = False
    logprobs = logits.masked_fill(~allowed, -1e30).log_softmax(-1)
    return logprobs.gather(1, completion[:, None])[:, 0], -(logprobs.exp() * logprobs)[:, allowed].sum(-1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [3, 1 << 24])
def test_gradients_that_are_summed_in_place_are_the_same(tied: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On top of what is there already, and only where the learner has said so."""
    monkeypatch.setattr(output_head, "head_tokens", lambda *_, **__: chunk)
    model = tiny("qwen3")
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight

    def twice() -> dict[str, torch.Tensor]:
        for _ in range(2):
            token_scores(model, ROWS).logprobs.sum().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    returned: list[torch.Tensor | None] = []
    summed = output_head._sum
    monkeypatch.setattr(output_head, "_sum", lambda *args: (returned.append(summed(*args)), returned[-1])[1])
    expected = twice()
    assert returned and all(part is not None for part in returned)
    zero_gradients(model)
    returned.clear()
    found = twice()
    assert returned and all(part is None for part in returned)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
def test_scores_and_gradients_equal_row_by_row(kind: str, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_head, "head_tokens", lambda *_, **__: max(1, chunk // 24))
    model, banned = tiny(kind), [15, 20]
    weights = torch.randn(len(ROWS), 5, generator=torch.Generator().manual_seed(1))

    scores = token_scores(model, ROWS, temperature=temperature, banned_ids=[*banned, 500], entropies=True)
    (scores.logprobs * weights).sum().backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()

    assert scores.entropies is not None and not scores.entropies.requires_grad
    assert scores.mask.sum(-1).tolist() == [2, 5, 1, 3]
    assert not scores.logprobs[~scores.mask].any() and not scores.entropies[~scores.mask].any()
    for i, row in enumerate(ROWS):
        logprobs, entropies = plainly(model, row, temperature, banned)
        (logprobs * weights[i, : len(logprobs)]).sum().backward()
        torch.testing.assert_close(scores.logprobs[i, : len(logprobs)], logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores.entropies[i, : len(logprobs)], entropies, atol=1e-5, rtol=1e-5)
    largest = max(float(weight.grad.abs().max()) for weight in model.parameters() if weight.grad is not None)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert float((ours[name] - weight.grad).abs().max()) <= 1e-5 * largest, name


def test_only_completion_tokens_reach_the_output_layer() -> None:
    model, seen = tiny("qwen3"), list[int]()
    inner = model.lm_head.forward

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[:-1].numel())
        return inner(hidden)

    model.lm_head.forward = counted
    rows = [Row([1] * 9, [2, 3]), Row([1] * 11, [2])]
    logprobs, mask = completion_logprobs(model, rows)
    assert seen[1:] == [3]  # after its form was tried
    assert logprobs.shape == mask.shape == (2, 2)


def test_what_stands_behind_a_row_does_not_matter() -> None:
    model = tiny("qwen3")
    one, _ = completion_logprobs(model, ROWS, pad_id=0)
    other, _ = completion_logprobs(model, ROWS, pad_id=23)
    assert torch.equal(one, other)


def test_half_precision_logits_are_scored_in_float32() -> None:
    model = cast(Any, tiny("qwen3")).to(torch.bfloat16)
    logprobs, mask = completion_logprobs(model, ROWS)
    assert logprobs.dtype == torch.float32
    logprobs.sum().backward()
    prompt, completion = torch.as_tensor(ROWS[1].prompt_ids), torch.as_tensor(ROWS[1].completion_ids)
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion])[None]).logits[0, :-1].float()
    torch.testing.assert_close(logprobs[1], logits.log_softmax(-1).gather(1, completion[:, None])[:, 0], atol=0.05, rtol=0.05)
    assert model.lm_head.weight.grad is not None and model.lm_head.weight.grad.isfinite().all()


@pytest.mark.parametrize(("rows", "temperature"), [([], 1.0), (ROWS, 0.0), ([Row([], [1])], 1.0), ([Row([1], [])], 1.0)])
def test_rows_that_cannot_be_scored_are_refused(rows: list[Row], temperature: float) -> None:
    with pytest.raises(ValueError, match="token_scores needs"):
        token_scores(tiny("qwen3"), rows, temperature=temperature)


def test_what_lies_in_the_processor_s_memory_is_computed_where_it_is_gathered() -> None:
    """With `train.offload` a shard is on the CPU between passes, and the pass is on a GPU: what it reads goes there."""
    mesh = DeviceMesh("cuda", torch.arange(1), _init_backend=False, _rank=0)  # without a GPU
    local = torch.zeros(2, 3)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(local.shape, local.stride(), local.dtype))
    model = torch.nn.Linear(3, 2, bias=False)
    assert device_of(model).type == "cpu"
    model.weight = torch.nn.Parameter(DTensor(local, spec, requires_grad=False))
    assert model.weight.device.type == "cpu" and device_of(model).type == "cuda"
