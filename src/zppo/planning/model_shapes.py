"""Shapes of models from their config.json alone, and how many parameters a model has: no weights are loaded.

Of a decoder: layers, linear maps, parameters, what a cache holds. Of a vision tower: what the estimate of memory needs.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from zppo.errors import ModelError, SettingsError
from zppo.names import check_file, load_part, model_folder

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
class DecoderShape:
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


def shape_of(name: str) -> DecoderShape | None:
    """The shape of a model that a recipe names: from its config.json, on disk or in the hub's cache, else by its name.

    Args:
        name: as recipes name models.

    Returns:
        None where nothing is known: a name without a file, or an architecture of another kind (experts, encoders).

    Raises:
        ModelError: the config.json cannot be read.
    """
    file = config_file(name)
    if file is not None:
        return _from_config(file)
    known = _in_table(name)
    return _from_table(known) if known else None


def config_file(name: str) -> Path | None:
    """The config.json of a model on disk or in the hub's cache; None where it is in neither."""
    folder = Path(model_folder(name))
    return folder / "config.json" if folder.is_dir() else _cached(name)


def context_in(name: str) -> int | None:
    """Positions that the model was made for, by its config.json on this machine; None where that does not say, or cannot be read."""
    limit = _text_config(name).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def family_of(name: str) -> str | None:
    """The `model_type` of a model's text part, by its config.json on this machine, else by its name; None where neither says."""
    kind = _text_config(name).get("model_type")
    return kind if isinstance(kind, str) else "qwen3_5" if _in_table(name) else None


def _text_config(name: str) -> Mapping[str, Any]:
    """What config.json says of the text model; empty where it is not on this machine, or cannot be read."""
    file = config_file(name)
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file else {}
        text = config.get("text_config") or config
    except (OSError, ValueError, AttributeError):  # `shape_of` and the model's loading say so
        return {}
    return text if isinstance(text, dict) else {}


def _in_table(name: str) -> str | None:
    last = name.rpartition("/")[2].removesuffix("-FP8").removesuffix("-Base")
    return last if last in _QWEN35 else None


def _cached(name: str) -> Path | None:
    """The config.json of a hub model that was downloaded before; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _from_table(name: str) -> DecoderShape | None:
    hidden, mlp, layers, heads, kv_heads, linear_value_heads, tied = _QWEN35[name]
    config = {
        "model_type": "qwen3_5",
        "vocab_size": 248_320,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "linear_num_value_heads": linear_value_heads,
        "tie_word_embeddings": tied,
    }
    return _read(config)


def _from_config(file: Path) -> DecoderShape | None:
    check_file(file, ModelError)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return _read(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read ({error}); fetch the checkpoint again") from error


def _read(config: Mapping[str, Any]) -> DecoderShape | None:
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
    return DecoderShape(
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
    )


# What `transformers` takes for Qwen3-VL and Qwen3.5 where a configuration says nothing: that of their larger checkpoints.
_QWEN3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "spatial_merge_size": 2}


@dataclass(frozen=True, slots=True)
class VisionTowerShape:
    """A tower of equal layers over square patches, of which `merge` squared become one token.

    Attributes:
        hidden, mlp, layers: of the tower.
        out: width of what the projector gives, the language model's.
        patch: pixels on a side.
        fixed: tokens of a picture where its size changes nothing; 0 where it does.
    """

    hidden: int
    mlp: int
    layers: int
    out: int
    patch: int
    merge: int
    fixed: int = 0

    @property
    def tower(self) -> int:
        """Parameters of the tower's layers; norms, biases and position embeddings, below a hundredth, are left out."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.mlp) + 6 * self.patch**2 * self.hidden

    @property
    def projector(self) -> int:
        """Parameters of what merges patches."""
        wide = self.hidden * self.merge**2
        return wide * (wide + self.out)

    def tokens(self, pixels: int) -> int:
        """Most tokens of a picture of at most so many pixels."""
        return self.fixed or max(1, pixels // (self.patch * self.merge) ** 2)

    def kept_per_patch(self, *, bf16: bool, recomputed: bool) -> float:
        """Bytes that the backward pass needs of the tower: a fit to Qwen3.5's in transformers 5.23, without scores of attention."""
        one = 28 * self.hidden + 6 * self.mlp if bf16 else 44 * self.hidden + 8 * self.mlp
        ends = 24 * self.patch**2 + 20 * self.hidden  # the pixels, the projector
        return ends + (one + 4 * self.hidden * self.layers if recomputed else one * self.layers)


def vision_shape_of(name: str) -> VisionTowerShape | None:
    """The tower of a model that a recipe names; None where nothing is known of one.

    Raises:
        ModelError: its config.json cannot be read.
    """
    file = config_file(name)
    if file is None:
        last = name.rpartition("/")[2]
        return _read_vision({"vision_config": {}, "text_config": {}}) if last.startswith("Qwen3.5") else None
    check_file(Path(file), ModelError)
    try:
        return _read_vision(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read ({error}); fetch the checkpoint again") from error


def _read_vision(config: Mapping[str, Any]) -> VisionTowerShape | None:
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return None
    given = {**_QWEN3, **vision}
    return VisionTowerShape(
        hidden=given["hidden_size"],
        mlp=given["intermediate_size"],
        layers=vision.get("num_hidden_layers") or given["depth"],
        out=(config.get("text_config") or {}).get("hidden_size") or given["hidden_size"],
        patch=given["patch_size"],
        merge=config.get("scale_factor") or given["spatial_merge_size"],
        fixed=config.get("mm_tokens_per_image") or 0,
    )


_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "": 1.0}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:e[+]?\d+)?)\s*([kmb]?)", re.IGNORECASE)
_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(A?)(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Size:
    """N of a model, and where it was found.

    Attributes:
        parameters: N.
        source: in words, for the reader of a table.
    """

    parameters: float
    source: str


def parse_size(text: str) -> float:
    """0.8e9, 27B or 340M -> a number of parameters. Raises SettingsError."""
    found = _NUMBER.fullmatch(text.strip())
    value = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not (found and value > 0 and math.isfinite(value)):
        raise SettingsError(f"{text!r} is no number of parameters; write one such as 0.8e9, 27B or 340M")
    return value


def size_of(name: str, given: float | None = None, option: str = "--student-params or --teacher-params") -> Size:
    """N of a model that a recipe names: as given, else from its folder, else from the size in its name.

    Args:
        name: as recipes name models.
        given: N from the user, which wins.
        option: that gives it, for the message.

    Raises:
        ModelError: a folder that holds no readable checkpoint, or a name without a size in it.
    """
    if given is not None:
        return Size(given, "given")
    folder = Path(model_folder(name))
    if folder.is_dir():
        return count_parameters(folder)
    if (nominal := nominal_size(name)) is None:
        raise ModelError(
            f"the number of parameters of {name!r} is not known: there is no such folder, and its name has no size in it such as 0.8B; "
            f"give it with {option}"
        )
    return Size(nominal, "by its name")


def nominal_size(name: str) -> float | None:
    """The size in a model's name, Qwen3.5-0.8B -> 0.8e9; of a mixture of experts the active one, 35B-A3B -> 3e9; None: none."""
    found = _IN_NAME.findall(re.split(r"[/\\]", name)[-1])
    chosen = [f for f in found if f[0]] or found
    return float(chosen[0][1]) * _UNITS[chosen[0][2].lower()] if chosen else None


def count_parameters(folder: Path, keep: Callable[[str], bool] = lambda name: True) -> Size:
    """N of a checkpoint folder: from the headers of its safetensors files, else by building its architecture without memory.

    Tied weights count once. Every tensor counts, those of a vision tower or of experts that a token does not visit too.

    Args:
        keep: which tensors of the files count, by their names.

    Raises:
        ModelError: the folder holds no checkpoint, or one that cannot be read.
    """
    if files := _weight_files(folder):
        return Size(float(sum(_elements(file, keep) for file in files)), "from the headers of its weights")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is no transformers checkpoint (no config.json in it); name another folder, or give the number "
            "with --student-params or --teacher-params"
        )
    return Size(float(_built(folder)), "from its config.json")


def _weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` reads; others in the folder may hold the same tensors once more."""
    index = folder / _INDEX
    if not index.is_file():
        return [folder / _SINGLE] if (folder / _SINGLE).is_file() else []
    check_file(index, ModelError)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read ({error}); fetch the checkpoint again") from error
    return [folder / name for name in names]


def _elements(file: Path, keep: Callable[[str], bool]) -> int:
    """Elements of the tensors that count in a safetensors file: 8 bytes of length (little endian), then a JSON header of that length."""
    check_file(file, ModelError)
    try:
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header would have {length:,} bytes")
            header: dict[str, Any] = json.loads(handle.read(length))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__" and keep(name))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ModelError(f"{file} is no readable safetensors file ({error}); fetch the checkpoint again") from error


def _built(folder: Path) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_part(AutoConfig, folder, local_files_only=True), trust_remote_code=False)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: its config.json makes no model ({error}); give the number with --student-params or --teacher-params"
        ) from error
    return sum(p.numel() for p in model.parameters())
