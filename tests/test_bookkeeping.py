"""Checkpoints in the background: what is written is what was, and what the disk refuses is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from zppo.config.settings import TrainSettings
from zppo.distributed.parallel import ReplicatedWeights
from zppo.errors import StorageError
from zppo.models.student import Student, load_model
from zppo.train import checkpointer
from zppo.train.checkpointer import Checkpointer, CopiedModel, CopiedState


def make(tmp_path: Path, model: Any) -> tuple[Checkpointer, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters())
    settings = TrainSettings(checkpoint_in_background=True)
    return Checkpointer(settings, tmp_path, Student(model, None), optimizer, {}, ReplicatedWeights()), optimizer


def test_what_the_disk_refuses_in_the_background_is_said_at_the_next_occasion(
    tiny_qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise StorageError("the disk is full")

    writer, _ = make(tmp_path, load_model(tiny_qwen3_dir, dtype=torch.float32))
    monkeypatch.setattr(checkpointer.checkpoint, "save", refuse)
    writer(1, {}, None, True, beside=True)
    with pytest.raises(StorageError, match="the disk is full"):
        writer.wait()
    writer.wait()
    writer(2, {}, None, True, beside=True)
    with pytest.raises(StorageError, match="the disk is full"):
        writer(3, {}, None, True, beside=True)
    writer.check()


def test_a_copy_stays_as_it_was(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    """Weights and optimizer move on while the copy is written; tied weights stay tied."""
    model = load_model(tiny_qwen3_dir, dtype=torch.float32)
    _, optimizer = make(tmp_path, model)

    def move() -> None:
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        optimizer.step()

    move()
    model.save_pretrained(tmp_path / "before")
    copied, state = CopiedModel(model), CopiedState(optimizer)
    held = {i: values["exp_avg"].clone() for i, values in optimizer.state_dict()["state"].items()}
    move()
    copied.save_pretrained(tmp_path / "after")
    names = [p.name for p in (tmp_path / "before").iterdir()]
    assert all((tmp_path / "before" / n).read_bytes() == (tmp_path / "after" / n).read_bytes() for n in names)
    assert held and all(torch.equal(value, state.state_dict()["state"][i]["exp_avg"]) for i, value in held.items())
