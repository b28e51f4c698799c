"""Packed weights: what is sampled with them is what is sampled without, and nothing of them stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from zppo.engines import packed_linear
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.packed_linear import PackedLinear, packed_linears
from zppo.engines.transformers import WORTH_PACKING, TransformersEngine


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 300, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=300, num_hidden_layers=2, tie_word_embeddings=True)).eval()


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def sampled(model: PreTrainedModel, **more: Any) -> list[tuple[list[int], torch.Tensor]]:
    requests = [SampleRequest((5, 6, 7, 8), (11, 12, 13)), SampleRequest((9, 10), (14, 15))]
    made = TransformersEngine(model, [2], 0, **more).sample(requests, Sampling(max_new_tokens=24))
    return [(completion.ids.tolist(), completion.logprobs) for group in made for completion in group]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed_weights_sample_the_same(model: PreTrainedModel, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[PackedLinear] = []
    init = PackedLinear.__init__
    monkeypatch.setattr(PackedLinear, "__init__", lambda self, *args: (packed.append(self), init(self, *args))[1])
    with_packing = sampled(model, autocast_dtype=dtype)
    monkeypatch.setattr(packed_linear, "_SMALLEST", 1 << 40)
    without = sampled(model, autocast_dtype=dtype)
    assert len(packed) == 11  # of 15 layers: keys and values are too small
    assert all(layer._weight is not None and layer._weight.is_mkldnn for layer in packed)
    for (ids, logprobs), (same_ids, same) in zip(with_packing, without, strict=True):
        assert ids == same_ids
        torch.testing.assert_close(logprobs, same, atol=1e-5 if dtype is None else 1e-2, rtol=0)


def test_each_sampling_has_the_weights_of_its_time(model: PreTrainedModel) -> None:
    before = sampled(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert [ids for ids, _ in sampled(model)] != [ids for ids, _ in before]


def test_nothing_stays_of_them(model: PreTrainedModel) -> None:
    """After a stream that is left half-way, too."""
    sampled(model)
    assert not any("forward" in vars(module) for module in model.modules())
    engine = TransformersEngine(model, [2], 0)
    stream = engine.stream([SampleRequest((5, 6), (1, 2))], Sampling(max_new_tokens=WORTH_PACKING))
    next(iter(stream))
    assert any(isinstance(vars(module).get("forward"), PackedLinear) for module in model.modules())
    stream.close()
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_go_through_the_layer_itself(model: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.enable_grad(), packed_linears(model):
        model(ids).logits.sum().backward()
    packed = [layer.weight.grad.clone() for layer in linears(model) if layer.weight.grad is not None]
    model.zero_grad()
    model(ids).logits.sum().backward()
    assert len(packed) == len(linears(model))
    assert all(torch.equal(a, layer.weight.grad) for a, layer in zip(packed, linears(model), strict=True) if layer.weight.grad is not None)


def test_what_is_no_plain_layer_is_left_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        """A quantized layer, say."""

    odd: Any = nn.ModuleList(
        [Own(512, 512), nn.Linear(512, 512, dtype=torch.float64), nn.Linear(16, 16), nn.Linear(512, 512, device="meta")]
    )
    odd.append(nn.Linear(512, 512))
    odd[-1].forward = odd[-1].forward
    with packed_linears(odd):
        assert not any(isinstance(vars(module).get("forward"), PackedLinear) for module in odd)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with packed_linears(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_processor_without_bf16_samples_with_the_layers_themselves(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with packed_linears(model, torch.bfloat16):
        assert not any("forward" in vars(module) for module in model.modules())
    with packed_linears(model):
        assert any("forward" in vars(module) for module in model.modules())
