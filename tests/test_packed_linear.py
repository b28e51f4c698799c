"""Packed weights: what is sampled with them is what is sampled without, and nothing of them stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from zppo.distributed.parallel import zero_gradients
from zppo.engines import packed_linear
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.packed_linear import PackedLinear, packed_linears, trained_linears
from zppo.engines.transformers import WORTH_PACKING, TransformersEngine
from zppo.models.student_model import recompute_layers


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 300, "num_attention_heads": 4, "num_key_value_heads": 2}
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
    stream: Any = engine.stream([SampleRequest((5, 6), (1, 2))], Sampling(max_new_tokens=WORTH_PACKING))
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


def learnt(model: PreTrainedModel, *, passes: int = 2) -> list[torch.Tensor]:
    """Gradients of all weights after a few passes, the padding id among the tokens; and the logits of the last."""
    zero_gradients(model)
    for shift in range(passes):
        ids = (torch.arange(24).view(2, 12) * 7 + shift) % 300
        ids[0, 3] = 0
        logits = model(ids).logits
        (logits * torch.linspace(-1, 1, 300)).mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", ["plain", "biases", "untied", "frozen", "computed again", "not in place"])
def test_training_has_the_outputs_and_gradients_of_the_layers_themselves(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 300, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"attention_bias": how == "biases", "mlp_bias": how == "biases", "tie_word_embeddings": how != "untied", "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=300, num_hidden_layers=2)).eval()
    if how == "frozen":
        model.model.layers[0].requires_grad_(False)
    if how == "computed again":
        recompute_layers(model)
    if how == "not in place":
        monkeypatch.setattr(packed_linear, "sums_in_place", lambda _: False)
    expected = learnt(model)
    products: list[tuple[int, ...]] = []
    multiplied = packed_linear._multiplied
    monkeypatch.setattr(packed_linear, "_multiplied", lambda x, w, b: (products.append(x.shape), multiplied(x, w, b))[1])
    with trained_linears(model):
        found = learnt(model)
    assert products and all(rows == 24 for rows, _ in products)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))


def kept(model: PreTrainedModel) -> int:
    """Numbers that a forward pass keeps for the backward pass, weights aside."""
    weights = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        held.append(tensor)  # what has been freed could lend its address
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.arange(64)[None]).logits.sum()
    return sum(size for at, size in seen.items() if at not in weights)


@pytest.mark.parametrize("make", [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_a_gated_mlp_keeps_half_and_has_the_same_gradients(make: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    inner, layers = 512, 2
    size = {"hidden_size": 256, "intermediate_size": inner, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    model = make[1](make[0](**size, num_hidden_layers=layers)).eval()
    expected, own = learnt(model), kept(model)
    with trained_linears(model):
        found, less = learnt(model), kept(model)
        model.model.layers[0].mlp.act_fn = nn.GELU()
    assert own - less >= layers * 64 * 2 * inner
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    with trained_linears(model):  # another activation is the library's own affair
        assert ["forward" in vars(layer.mlp) for layer in model.model.layers] == [False, True]
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)  # it would not be called
    with trained_linears(model):
        assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


def test_training_under_autocast_is_left_to_the_layers(model: PreTrainedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = learnt(model)
        with trained_linears(model):
            found = learnt(model)
    assert torch.equal(found[0], expected[0])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2 * float(theirs.abs().max()), rtol=0)
