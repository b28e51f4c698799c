"""One decoding step of a plain decoder, with the model's own modules and without what the library does around them.

A small model's step on a CPU is hundreds of short operations. About half of its time goes into what stands around them: masks that
that are not used, keyword arguments, captured outputs, a norm in six operations. What is computed stays the same, operation by operation.

The key-value cache of rollouts that are being decoded.

A prompt's keys and values are computed once. Where the decoder can (`can_share`), they are also *kept* once and every
step attends to them for all rollouts of the prompt together; elsewhere they are copied to the rollouts.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import rms_norm
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from zppo.engines.packed_linear import PackedLinear

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
    return own and not any(module._forward_hooks or module._forward_pre_hooks or _replaced(module) for module in model.modules())


def _replaced(module: torch.nn.Module) -> bool:
    """Whether something else is computed than what the module's class says; a packed weight changes nothing."""
    return "forward" in vars(module) and not isinstance(module.forward, PackedLinear)


def decode_tokens(model: Any, tokens: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, families: Any) -> torch.Tensor:
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


_GROWTH = 64  # tokens by which a full buffer grows at least
_SHARED = "zppo_shared_prompt"  # name under which the library finds `_shared_attention`
# Decoders whose attention is softmax(q k / scale) v and nothing else; tested one by one.
_SHARING_MODELS = frozenset({"llama", "qwen2", "qwen3", "qwen3_5_text", "qwen2_5_vl_text", "qwen3_vl_text"})


class BufferedLayer(DynamicLayer):
    """A key-value cache layer that writes into a buffer with room to spare.

    The library's own layer copies everything at every token (`cat`) and copies every row where rows are dropped. This
    one appends in place and moves only the rows that fill a gap.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Starts with the `rows` (R,) of `keys` and `values` (P, H, L, D), any row any number of times."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        length = keys.shape[2]
        self._buffers = [_room(full, len(rows), length + _GROWTH) for full in (keys, values)]
        for buffer, full in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, :length] = full.index_select(0, rows)
        self._show(len(rows), length)

    def _show(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the first `rows` rows and `length` places of the buffers the cache's content, and returns it."""
        self._length = length
        keys, values = (buffer[:rows, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (R, H, T, D) keys and values; returns all of them, (R, H, L, D), as views."""
        rows, start = key_states.shape[0], self._length
        stop = start + key_states.shape[2]
        for i, (buffer, new) in enumerate(zip(self._buffers, (key_states, value_states), strict=True)):
            if stop > buffer.shape[2]:
                bigger = _room(buffer, rows, max(stop + _GROWTH, buffer.shape[2] * 3 // 2))
                bigger[:, :, :start] = buffer[:rows, :, :start]
                self._buffers[i] = buffer = bigger
            buffer[:rows, :, start:stop] = new
        return self._show(rows, stop)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Goes on with rows `beam_idx` (R',) in this order, R' <= R; a row that stays where it is is not touched."""
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero()[:, 0]
        for buffer in self._buffers:
            buffer[moved, :, : self._length] = buffer[beam_idx[moved], :, : self._length]
        self._show(len(beam_idx), self._length)


def _room(like: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    return like.new_empty(rows, like.shape[1], length, like.shape[3])


class Families(NamedTuple):
    """Which rollouts belong to which prompt.

    Attributes:
        slots: (P, G) the rollouts of every prompt, filled up with row 0.
        prompt, slot: (R,) each: where in `slots` a rollout stands.
        bias: (P, 1, 1, L) what is added to a prompt's attention scores: 0, or -inf on padding; None without padding.
    """

    slots: torch.Tensor
    prompt: torch.Tensor
    slot: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, owners: torch.Tensor, prompts: int, bias: torch.Tensor | None) -> Families:
        """From the prompt of every rollout, `owners` (R,)."""
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=prompts)
        ranks = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners[order]]
        slot = torch.empty_like(owners)
        slot[order] = ranks
        slots = owners.new_zeros(prompts, int(counts.max()))
        slots[owners[order], ranks] = order
        return cls(slots, owners, slot, bias)


class SharedLayer(BufferedLayer):
    """A cache layer that keeps the keys and values of prompts once per prompt and those of completions in its buffer.

    Decoding a small model on a CPU waits for the memory that holds these numbers: with G rollouts of a prompt this
    reads the prompt's part once instead of G times.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        super().__init__(keys[:, :, :0], values[:, :, :0], rows)
        self.prompt_keys, self.prompt_values = keys, values  # (P, H, L, D)

    def get_seq_length(self) -> int:
        """Places taken by prompt (with its padding) and completion so far."""
        return self.prompt_keys.shape[2] + self._length

    def keep_prompts(self, prompts: torch.Tensor) -> None:
        """Goes on with these prompts (P',)."""
        self.prompt_keys, self.prompt_values = self.prompt_keys[prompts], self.prompt_values[prompts]

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, families: Families) -> torch.Tensor:
        """Attention of one query per rollout over its prompt and its own completion.

        Args:
            query: (R, H, 1, D); H is a multiple of the K key-value heads.
            keys, values: (R, K, S, D) of the completions.
            scaling: factor of the scores.

        Returns:
            (R, 1, H, D).
        """
        (rows, heads, _, size), kv = query.shape, keys.shape[1]
        (prompts, group), length, rep = families.slots.shape, self.prompt_keys.shape[2], heads // kv
        query = query.reshape(rows, kv, rep, size) * scaling

        def by_prompt(x: torch.Tensor) -> torch.Tensor:  # (R, K, rep, ...) to (P, K, G * rep, ...)
            return x[families.slots].transpose(1, 2).reshape(prompts, kv, group * rep, -1)

        def by_row(x: torch.Tensor) -> torch.Tensor:  # and back
            return x.view(prompts, kv, group, rep, -1)[families.prompt, :, families.slot]

        far = by_prompt(query) @ self.prompt_keys.transpose(2, 3)
        if families.bias is not None:
            far = far + families.bias
        near = query @ keys.transpose(2, 3)
        weights = torch.cat([by_row(far), near], -1).softmax(-1)
        out = weights[..., length:] @ values + by_row(by_prompt(weights[..., :length]) @ self.prompt_values)
        return out.reshape(rows, 1, heads, size)


_DECODING: ContextVar[DecodeState] = ContextVar("_DECODING")


def _shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The library's attention interface for `SharedLayer`: the mask is in its families."""
    state = _DECODING.get()
    layer = cast(SharedLayer, state.cache.layers[cast(int, module.layer_idx)])
    return layer.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, state.families), None


AttentionInterface.register(_SHARED, _shared_attention)


def can_share(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether the prompts in a cache can be kept once: those of a known decoder, in fp32 on a CPU.

    Elsewhere [zppo] the fused kernels win: in bf16 they keep scores in fp32, which log-probs need to be exact, and on
    a GPU a step's time is that of starting kernels, of which they need few.
    """
    config = model.config.get_text_config(decoder=True)
    kept = [x for layer in cache.layers if isinstance(layer, DynamicLayer) for x in (layer.keys, layer.values)]
    exact = all(x is not None and x.device.type == "cpu" and x.dtype == torch.float32 for x in kept)
    return exact and config.model_type in _SHARING_MODELS and _plain_sdpa(config)


def _plain_sdpa(config: PreTrainedConfig) -> bool:
    """Whether attention is SDPA over everything before a token (no sliding windows)."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers <= {"full_attention", "linear_attention"} and config._attn_implementation == "sdpa"


class DecodeState:
    """The cache of the rows being decoded and what goes with it.

    Args:
        model: what is decoded with.
        cache: after the prefill of P prompts.
        mask: (P, L) bool, where the prompts' tokens are; padding stands on the left.
        following: (P,) position of the token after each prompt, on every axis of the rotary positions.
        owners: (R,) which prompt each rollout belongs to.
    """

    def __init__(
        self, model: PreTrainedModel, cache: DynamicCache, mask: torch.Tensor, following: torch.Tensor, owners: torch.Tensor
    ) -> None:
        self.model, self.cache = model, cache
        self.owners = owners
        self._config = model.config.get_text_config(decoder=True)
        self._shared = can_share(model, cache)
        self._lean = self._shared and is_plain(model)
        self._positions = following[owners]  # (R,) of the next token
        self._mask = None if bool(mask.all()) else mask[owners]  # (R, L + steps so far)
        layers = set(getattr(self._config, "layer_types", None) or ["full_attention"])
        self._ready_mask = layers <= {"full_attention", "linear_attention"} and self._config._attn_implementation == "sdpa"
        bias = None if self._mask is None else torch.zeros(mask.shape).masked_fill(~mask.cpu(), float("-inf"))[:, None, None]
        kind = SharedLayer if self._shared else BufferedLayer
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                assert layer.keys is not None and layer.values is not None, "decoding starts after the prefill"
                cache.layers[i] = kind(layer.keys, layer.values, owners)
            else:
                layer.reorder_cache(cast(torch.LongTensor, owners))
        if self._shared:
            bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[:, None, None]
            self.families = Families.of(owners, len(mask), None if self._mask is None else bias)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows (R',) in this order."""
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.owners, self._positions = self.owners[rows], self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        if self._shared:
            prompts, bias = self.families.slots.shape[0], self.families.bias
            left, owners = self.owners.unique(return_inverse=True)
            if 4 * len(left) <= 3 * prompts:
                for layer in self.cache.layers:
                    if isinstance(layer, SharedLayer):
                        layer.keep_prompts(left)
                self.owners, prompts = owners, len(left)
                bias = None if bias is None else bias[left]
            self.families = Families.of(self.owners, prompts, bias)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token per row (R,), returns the logits after it (R, V)."""
        if not self._shared:
            return self._forward(tokens, self._grown_mask())
        if self._lean:
            logits = decode_tokens(self.model, tokens, self._positions, self.cache, self.families)
            self._positions = self._positions + 1
            return logits
        ours, theirs = _DECODING.set(self), self._config._attn_implementation
        self._config._attn_implementation = _SHARED
        try:
            return self._forward(tokens, None)
        finally:
            self._config._attn_implementation = theirs
            _DECODING.reset(ours)

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self._positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._positions = self._positions + 1
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _grown_mask(self) -> torch.Tensor | None:
        if self._mask is None:
            return None
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        # A mask in four dimensions is taken as it is, which saves building one at every token; only SDPA can use it.
        return self._mask[:, None, None] if self._ready_mask else self._mask
