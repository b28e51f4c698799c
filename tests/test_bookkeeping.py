"""Checkpoints in the background: what is written is what was, and what the disk refuses is said."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from same_run import assert_same_run
from victims import Victims
from zppo.cli import main
from zppo.config.settings import TrainSettings
from zppo.core.replay import PromptReplayBuffer
from zppo.distributed.parallel import ReplicatedWeights
from zppo.errors import StorageError
from zppo.models.student_model import Student, load_model
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
    writer(1, {}, None, later=True)
    with pytest.raises(StorageError, match="the disk is full"):
        writer.wait()
    writer.wait()
    writer(2, {}, None, later=True)
    with pytest.raises(StorageError, match="the disk is full"):
        writer(3, {}, None, later=True)
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


SHORT = ["--teacher.rollout.max_new_tokens=4", "--teacher.compression.max_new_tokens=6", "--data.eval=null", "--train.steps=3"]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_writes_in_the_background_is_the_same_whatever_ends_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victims: Victims
) -> None:
    """Killed while it writes and while it asks the teacher, stopped by a signal and by a full disk, it resumes to the same."""
    AcceleratorState._reset_state(True)
    whole, run, copies = tmp_path / "whole", tmp_path / "run", []
    with monkeypatch.context() as patch:
        real = PromptReplayBuffer.state_dict
        patch.setattr(PromptReplayBuffer, "state_dict", lambda self: (copies.append(1), real(self))[1])
        assert main(["train", str(recipe), *SHORT, f"--output={whole}"]) == 0
    assert len(copies) == 2, "the buffer is copied for the checkpoints of steps 2 and 3 alone"
    beside = ["--train.checkpoint_every=1", "--train.checkpoint_in_background=true"]
    start = ["train", recipe, *SHORT, *beside, f"--output={run}"]
    assert victims.run(*start, run=run, at="zppo.runs.checkpoint:make_manifest") == -signal.SIGKILL
    assert victims.run("resume", run, run=run, at="zppo.rollout.teacher:TeacherSampler.ask", nth=2) == -signal.SIGKILL
    assert victims.run("resume", run, run=run, at="zppo.rollout.reformulated:Reformulator.reformulate", do="term") == 143, victims.said
    assert victims.run("resume", run, run=run, at="torch:save", do="full") == 2, victims.said
    assert "cannot be written: File too large" in victims.said and f"`zppo resume {run}`" in victims.said
    assert victims.run("resume", run, run=run) == 0, victims.said
    assert_same_run(whole, run)
