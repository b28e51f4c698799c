"""The shape of a decoder, from its config.json alone: layers, linear maps, parameters, what a cache holds. No weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from zppo.errors import ModelError

LINEAR, FULL = "linear_attention", "full_attention"

# hidden, MLP, layers, heads, key-value heads, linear value heads, tied embeddings; by the configurations of the checkpoints on the hub.
_QWEN35 = {
    "Qwen3.5-0.8B": (1024, 3584, 24, 8, 2, 16, True),
    "Qwen3.5-2B": (2048, 6144, 24, 8, 2, 16, True),
    "Qwen3.5-4B": (2560, 9216, 32, 16, 4, 32, True),
    "Qwen3.5-9B": (4096, 12288, 32, 16, 4, 32, False),
    "Qwen3.5-27B": (5120, 17408, 64, 24, 4, 48, False),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder with gated MLPs, its layers with full or with linear attention (gated delta rule).

    Attributes:
        vocab, hidden, mlp: widths.
        layers: `FULL` or `LINEAR`, one per layer.
        heads, kv_heads, head_dim: of full attention.
        gated: the output of full attention is gated, which doubles its query projection (Qwen3.5).
        head_norms: queries and keys are normalised per head.
        bias: of the query, key and value projections.
        tied: one matrix embeds and unembeds.
        linear_key_heads, linear_value_heads, linear_key_dim, linear_value_dim, conv: of linear attention.
        source: where the numbers are from, in words.
    """

    vocab: int
    hidden: int
    mlp: int
    layers: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool
    head_norms: bool
    bias: bool
    tied: bool
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    conv: int
    source: str

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads of full attention together; the values' is the same."""
        return self.kv_heads * self.head_dim

    @property
    def linear_keys(self) -> int:
        """Width of all key heads of linear attention together."""
        return self.linear_key_heads * self.linear_key_dim

    @property
    def linear_values(self) -> int:
        """Width of all value heads of linear attention together."""
        return self.linear_value_heads * self.linear_value_dim

    @property
    def parameters(self) -> int:
        """N, tied weights once; exact for Llama, Qwen2, Qwen3 and Qwen3.5 without vision tower."""
        maps = sum(width_in * width_out for _, width_in, width_out in self.linear_maps())
        rest = sum(self._small(kind) for kind in self.layers) + self.hidden
        return maps + rest + self.vocab * self.hidden * (1 if self.tied else 2)

    def linear_maps(self) -> Iterator[tuple[str, int, int]]:
        """(name, inputs, outputs) of every linear layer but the output embedding, named as `transformers` names them."""
        for number, kind in enumerate(self.layers):
            for name, width_in, width_out in self._layer_maps(kind):
                yield f"model.layers.{number}.{name}", width_in, width_out

    def adapters(self, rank: int, targets: str | Sequence[str]) -> int:
        """Parameters of LoRA adapters of this rank on `all-linear`, or on layers by their last name or a pattern of full names."""

        def taken(name: str) -> bool:
            if isinstance(targets, str):
                return True
            return any(entry == name.rpartition(".")[2] or fnmatchcase(name, entry) for entry in targets)

        return sum(rank * (a + b) for name, a, b in self.linear_maps() if taken(name))

    def cache_per_token(self, width: int) -> int:
        """Bytes of keys and values that a token of a rollout leaves, with numbers of `width` bytes."""
        return self.layers.count(FULL) * 2 * self.keys * width

    def cache_per_row(self, width: int) -> int:
        """Bytes that a rollout holds at any length: states of linear attention, which are fp32, and the convolution's last inputs."""
        state = self.linear_value_heads * self.linear_key_dim * self.linear_value_dim * 4
        return self.layers.count(LINEAR) * (state + (2 * self.linear_keys + self.linear_values) * self.conv * width)

    def _layer_maps(self, kind: str) -> tuple[tuple[str, int, int], ...]:
        h = self.hidden
        mlp = (("mlp.gate_proj", h, self.mlp), ("mlp.up_proj", h, self.mlp), ("mlp.down_proj", self.mlp, h))
        if kind == LINEAR:
            return (
                ("linear_attn.in_proj_qkv", h, 2 * self.linear_keys + self.linear_values),
                ("linear_attn.in_proj_z", h, self.linear_values),
                ("linear_attn.in_proj_b", h, self.linear_value_heads),
                ("linear_attn.in_proj_a", h, self.linear_value_heads),
                ("linear_attn.out_proj", self.linear_values, h),
                *mlp,
            )
        return (
            ("self_attn.q_proj", h, self.queries * (2 if self.gated else 1)),
            ("self_attn.k_proj", h, self.keys),
            ("self_attn.v_proj", h, self.keys),
            ("self_attn.o_proj", self.queries, h),
            *mlp,
        )

    def _small(self, kind: str) -> int:
        """Parameters of a layer outside its linear maps: norms, biases, convolution, decay."""
        norms = 2 * self.hidden
        if kind == LINEAR:
            conv = (2 * self.linear_keys + self.linear_values) * self.conv
            return norms + conv + 2 * self.linear_value_heads + self.linear_value_dim
        own = (2 * self.head_dim if self.head_norms else 0) + (self.queries + 2 * self.keys if self.bias else 0)
        return norms + own


def shape_of(name: str, resolve: Callable[[str], str] = str) -> Shape | None:
    """The shape of a model that a recipe names: from its config.json, on disk or in the hub's cache, else by its name.

    Args:
        name: folder, hub name, or a name that `resolve` turns into a folder.

    Returns:
        None where nothing is known: a name without a file, or an architecture of another kind (experts, encoders).

    Raises:
        ModelError: the config.json cannot be read.
    """
    file = config_file(name, resolve)
    if file is not None:
        return _from_config(file)
    last = name.rpartition("/")[2].removesuffix("-FP8").removesuffix("-Base")
    return _from_table(last) if last in _QWEN35 else None


def config_file(name: str, resolve: Callable[[str], str] = str) -> Path | None:
    """The config.json of a model on disk or in the hub's cache; None where it is in neither."""
    folder = Path(resolve(name))
    return folder / "config.json" if folder.is_dir() else _cached(name)


def _cached(name: str) -> Path | None:
    """The config.json of a hub model that was downloaded before; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _from_table(name: str) -> Shape:
    hidden, mlp, layers, heads, kv_heads, linear_value_heads, tied = _QWEN35[name]
    return Shape(
        vocab=248_320,
        hidden=hidden,
        mlp=mlp,
        layers=tuple(FULL if (i + 1) % 4 == 0 else LINEAR for i in range(layers)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=256,
        gated=True,
        head_norms=True,
        bias=False,
        tied=tied,
        linear_key_heads=16,
        linear_value_heads=linear_value_heads,
        linear_key_dim=128,
        linear_value_dim=128,
        conv=4,
        source="by its name",
    )


def _from_config(file: Path) -> Shape | None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return _read(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read ({error}); fetch the checkpoint again") from error


def _read(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes; None where it is no dense decoder or leaves a size out."""
    text: Mapping[str, Any] = config.get("text_config") or config
    kind = str(text.get("model_type", ""))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if any(not isinstance(text.get(size), int) for size in sizes) or any("expert" in key for key in text):
        return None
    count, heads, hidden = text["num_hidden_layers"], text["num_attention_heads"], text["hidden_size"]
    hybrid = kind.startswith("qwen3_5")
    every = text.get("full_attention_interval", 4)
    default = [LINEAR if hybrid and (i + 1) % every else FULL for i in range(count)]
    layers = text.get("layer_types") or default
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return Shape(
        vocab=text["vocab_size"],
        hidden=hidden,
        mlp=text["intermediate_size"],
        layers=tuple(LINEAR if layer == LINEAR else FULL for layer in layers),
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        gated=hybrid,
        head_norms=kind.startswith("qwen3"),
        bias=kind == "qwen2",
        tied=bool(tied),
        linear_key_heads=text.get("linear_num_key_heads", 16) if hybrid else 0,
        linear_value_heads=text.get("linear_num_value_heads", 32) if hybrid else 0,
        linear_key_dim=text.get("linear_key_head_dim", 128) if hybrid else 0,
        linear_value_dim=text.get("linear_value_head_dim", 128) if hybrid else 0,
        conv=text.get("linear_conv_kernel_dim", 4) if hybrid else 0,
        source="from its config.json",
    )
