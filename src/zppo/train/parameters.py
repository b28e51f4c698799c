"""How many parameters a model has, found without loading its weights."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zppo.errors import ModelError, SettingsError

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


def size_of(name: str, given: float | None = None, resolve: Callable[[str], str] = str) -> Size:
    """N of a model that a recipe names: as given, else from its folder, else from the size in its name.

    Args:
        name: folder, hub name, or a name that `resolve` turns into a folder.
        given: N from the user, which wins.
        resolve: names -> folders; a name that it does not know comes back as it is.

    Raises:
        ModelError: a folder that holds no readable checkpoint, or a name without a size in it.
    """
    if given is not None:
        return Size(given, "given")
    folder = Path(resolve(name))
    if folder.is_dir():
        return count_parameters(folder)
    if (nominal := nominal_size(name)) is None:
        raise ModelError(
            f"the number of parameters of {name!r} is not known: there is no such folder, and its name has no size in it such as 0.8B; "
            "give it with --student-params or --teacher-params"
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
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read ({error}); fetch the checkpoint again") from error
    return [folder / name for name in names]


def _elements(file: Path, keep: Callable[[str], bool]) -> int:
    """Elements of the tensors that count in a safetensors file: 8 bytes of length (little endian), then a JSON header of that length."""
    try:
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header would have {length:,} bytes")
            header: dict[str, Any] = json.loads(handle.read(length))
        return sum(
            math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__" and keep(name)
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ModelError(f"{file} is no readable safetensors file ({error}); fetch the checkpoint again") from error


def _built(folder: Path) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: its config.json makes no model ({error}); give the number with --student-params or --teacher-params"
        ) from error
    return sum(p.numel() for p in model.parameters())
