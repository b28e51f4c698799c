"""One decoding step of a plain decoder, with the model's own modules and without what the library does around them.

A small model's step on a CPU is hundreds of short operations. About half of its time goes into what stands around them: masks that
nobody looks at, keyword arguments, captured outputs, a norm in six operations. What is computed stays the same, operation by operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm
from transformers import DynamicCache, PreTrainedModel

_MODELS = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Classes whose decoder layers are: norm, attention, norm, MLP, each half added to what went in. Tested one by one."""


def is_plain(model: PreTrainedModel) -> bool:
    """Whether `decode` computes what the model's own forward computes: the library's own class, nothing hooked to any module or put in
    the place of its forward, no autocast.

    Sharded weights hang on hooks or on a class of their own; so do tools that look into a model.
    """
    kind = type(model)
    if torch.is_autocast_enabled(model.device.type):
        return False
    own = kind.__name__ in _MODELS and kind.__module__.startswith("transformers.models.")
    return own and not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


def decode(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, families: Any
) -> torch.Tensor:
    """Logits (R, V) after one more token per rollout.

    Args:
        model: one that `is_plain`.
        tokens, positions: (R,) of the token that is fed.
        cache: of `SharedLayer`s; grows by the token.
        families: which rollouts share a prompt.
    """
    base = model.model
    x = base.embed_tokens(tokens)  # (R, W)
    cos, sin = base.rotary_emb(x, positions[:, None])  # (R, 1, D)
    half = cos.shape[-1] // 2
    turned = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    kept: Any
    for layer, kept in zip(base.layers, cache.layers, strict=True):
        attention, inner = layer.self_attn, _norm(layer.input_layernorm, x)
        shape = (len(x), -1, attention.head_dim)
        query, key = attention.q_proj(inner).view(shape), attention.k_proj(inner).view(shape)
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        both = torch.cat((query, key), 1)
        both = both * cos + torch.cat((both[..., half:], both[..., :half]), -1) * turned
        query, key = both.split((query.shape[1], key.shape[1]), 1)
        keys, values = kept.update(key[:, :, None], attention.v_proj(inner).view(shape)[:, :, None])
        seen = kept.attend(query[:, :, None], keys, values, attention.scaling, families)
        x = x + attention.o_proj(seen.reshape(len(x), -1))
        x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
    logits: torch.Tensor = model.lm_head(_norm(base.norm, x))
    return logits


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The library's root-mean-square norm as one operation; a module that was put in its place as it is."""
    if not type(norm).__module__.startswith("transformers.models."):
        return norm(x)  # type: ignore[no-any-return]
    return rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
