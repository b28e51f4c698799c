"""The shape of a vision tower, from its config.json alone, for the estimate of memory. No weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zppo.errors import ModelError
from zppo.train.shapes import config_file

# What `transformers` takes for Qwen3-VL and Qwen3.5 where a configuration says nothing: that of their larger checkpoints.
_QWEN3 = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "spatial_merge_size": 2}


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A tower of equal layers over square patches, of which `merge` squared become one token.

    Attributes:
        hidden, mlp, layers: of the tower.
        out: width of what the projector gives, the language model's.
        patch: pixels on a side.
        fixed: tokens of a picture where its size changes nothing; 0 where it does.
        guessed: the sizes are not this checkpoint's own but the largest of its family.
    """

    hidden: int
    mlp: int
    layers: int
    out: int
    patch: int
    merge: int
    fixed: int = 0
    guessed: bool = False

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


def vision_shape_of(name: str, resolve: Callable[[str], str] = str) -> VisionShape | None:
    """The tower of a model that a recipe names; None where nothing is known of one.

    Raises:
        ModelError: its config.json cannot be read.
    """
    file = config_file(name, resolve)
    if file is None:
        last = name.rpartition("/")[2]
        return _read({"vision_config": {}, "text_config": {}}, guessed=True) if last.startswith("Qwen3.5") else None
    try:
        return _read(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read ({error}); fetch the checkpoint again") from error


def _read(config: Mapping[str, Any], *, guessed: bool = False) -> VisionShape | None:
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return None
    given = {**_QWEN3, **vision}
    return VisionShape(
        hidden=given["hidden_size"],
        mlp=given["intermediate_size"],
        layers=vision.get("num_hidden_layers") or given["depth"],
        out=(config.get("text_config") or {}).get("hidden_size") or given["hidden_size"],
        patch=given["patch_size"],
        merge=config.get("scale_factor") or given["spatial_merge_size"],
        fixed=config.get("mm_tokens_per_image") or 0,
        guessed=guessed or not vision,
    )
