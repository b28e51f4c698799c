"""Checkpoints at step boundaries: model, optimizer, buffer, counters. No pickled code is ever loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from zppo.errors import CheckpointError

CHECKPOINTS = "checkpoints"
_MODEL, _OPTIMIZER, _STATE = "model", "optimizer.pt", "state.json"


class Savable(Protocol):
    """A model, or what of it is trained."""

    def save_pretrained(self, folder: Path, /) -> None:
        """Write it into a folder."""
        ...


def save(
    run: Path,
    step: int,
    model: Savable,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write checkpoints/step-NNNNNN, whole or not at all, then remove all but the newest `keep`.

    `model/` in it loads with `transformers` (or with `peft`, where adapters are trained); weights are stored in fp32, as they are trained.
    """
    target = run / CHECKPOINTS / f"step-{step:06d}"
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial / _MODEL)
    torch.save(optimizer.state_dict(), partial / _OPTIMIZER)
    (partial / _STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    for path in partial.rglob("*"):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    _sync(target.parent)
    for old in existing(run)[:-keep]:
        shutil.rmtree(old)
    return target


def existing(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(p for p in (run / CHECKPOINTS).glob("step-*") if p.suffix != ".partial" and p.is_dir())


def model_folder(checkpoint: Path) -> Path:
    """Where the checkpoint's weights are."""
    return checkpoint / _MODEL


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, and the step."""
    path = checkpoint / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it holds no step")
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its state back."""
    path = checkpoint / _OPTIMIZER
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} cannot be read: {error}. Remove the folder {path.parent}; the checkpoint before it is used then"


def _sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a rename never outlives what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
