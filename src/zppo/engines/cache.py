"""The key-value cache of rollouts that are being decoded: a prompt's part is computed once and spread to its rollouts."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_GROWTH = 64  # tokens by which a full buffer grows at least


class BufferedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A key-value cache layer that writes into a buffer with room to spare.

    The library's own layer copies everything at every token (`cat`), which is most of the time of decoding with a small model, and
    copies every row where rows are dropped. This one appends in place and moves only the rows that fill a gap.
    """

    def __init__(self, source: DynamicLayer, rows: torch.Tensor) -> None:
        """The `rows` (R,) of `source`, any row any number of times."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = source.dtype, source.device, True
        length = source.get_seq_length()
        self._buffers: list[torch.Tensor] = []
        for full in (source.keys, source.values):
            assert full is not None, "a layer is spread after its prefill"
            buffer = _room(full, len(rows), length + _GROWTH)
            buffer[:, :, :length] = full.index_select(0, rows)
            self._buffers.append(buffer)
        self._show(len(rows), length)

    def _show(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes the first `rows` rows and `length` places of the buffers the cache's content, and returns it."""
        self._length = length
        keys, values = (buffer[:rows, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        length = self._length
        for buffer in self._buffers:
            buffer[moved, :, :length] = buffer[beam_idx[moved], :, :length]
        self._show(len(beam_idx), length)


def _room(like: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    return like.new_empty(rows, like.shape[1], length, like.shape[3])


class DecodeState:
    """The cache of the rows being decoded and what goes with it; prompts are spread to their rollouts at the first decoding step."""

    def __init__(self, cache: DynamicCache, mask: torch.Tensor, owners: torch.Tensor, flat_mask: bool) -> None:
        self.cache = cache
        self.owners = owners  # (R,) which prompt a row belongs to
        self.mask = mask  # (P, L) while compact, then (R, L + steps so far) with room
        self.lengths = mask.sum(-1)  # (P,) or (R,): the position of the next token
        self.padded = not bool(mask.all())
        self.flat_mask = flat_mask
        self.spread = False

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows (R',)."""
        if not self.spread:
            self.owners = self.owners[rows]
            return
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.mask, self.lengths = self.mask[rows], self.lengths[rows]

    def _spread(self) -> None:
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[i] = BufferedLayer(layer, self.owners)
            else:
                layer.reorder_cache(cast(torch.LongTensor, self.owners))
        self.mask, self.lengths, self.spread = self.mask[self.owners], self.lengths[self.owners], True

    def step(self, model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token per row (R,), returns the logits after it (R, V)."""
        if not self.spread:
            self._spread()
        mask = None
        if self.padded:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
            # A mask in four dimensions is taken as it is, which saves building one at every token; only plain SDPA can use it.
            mask = self.mask if self.flat_mask else self.mask[:, None, None]
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self.lengths[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.lengths = self.lengths + 1
        logits: torch.Tensor = out.logits[:, -1]
        return logits
