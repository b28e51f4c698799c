"""Updates that cannot go on, by numbers that are not finite or by memory: the run stops with a state that resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from same_run import assert_same_run, records
from zppo.cli import main
from zppo.models.student_model import load_model
from zppo.runs import checkpoint
from zppo.train import policy_gradient as learn
from zppo.train.distillation import Distillation
from zppo.train.policy_gradient import PolicyGradient

pytestmark = pytest.mark.slow
SHORT = [
    "--train.steps=3",
    "--train.checkpoint_every=0",
    "--rollout.max_new_tokens=6",
    "--eval.max_new_tokens=6",
    "--teacher.rollout.max_new_tokens=4",
    "--teacher.compression.enabled=false",
    "--data.eval_limit=2",
]


@pytest.fixture
def zppo(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*argv: object) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
        status = main([str(a) for a in argv])
        said = capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    return run


def nth_call_raises(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, nth: int) -> None:
    """From the nth call on there is no memory left."""
    real, calls = getattr(owner, name), [0]

    def limited(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] >= nth:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)


def saved(run: Path) -> list[str]:
    return [path.name for path in checkpoint.existing(run)]


def test_three_updates_that_are_not_finite_stop_the_run_after_their_step(
    zppo: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is logged, so that its rollouts can be looked at, and saved, although checkpoints are off; the run goes on after it."""
    run, real, calls = tmp_path / "run", learn.step_advantages, [0]

    def broken(*args: Any) -> torch.Tensor:
        calls[0] += 1
        return real(*args) * (float("nan") if calls[0] == 2 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(learn, "step_advantages", broken)
        status, said = zppo("train", recipe, *SHORT, f"--output={run}")
    assert status == 2 and "4 updates in a row were not finite" in said, said
    assert saved(run) == ["step-000002"] and f"continue with `zppo resume {run}`" in said
    assert [r["skipped_updates"] for r in records(run) if r["event"] == "step"] == [0, 4]
    assert (run / "rollouts" / "step-000002.parquet").exists()
    model = load_model(checkpoint.weights_folder(checkpoint.existing(run)[0]), dtype=torch.float32)
    assert all(p.isfinite().all() for p in model.parameters())
    status, said = zppo("resume", run)
    assert status == 0, said
    steps = [r for r in records(run) if r["event"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3] and steps[2]["skipped_updates"] == 0


def test_memory_that_runs_out_between_two_updates_loses_nothing(
    zppo: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole, saving = tmp_path / "run", tmp_path / "whole", "--train.checkpoint_every=50"
    monkeypatch.setattr("zppo.train.policy_gradient.pass_tokens", lambda *_, **__: 10**6)  # one micro-batch per update, four updates a step
    monkeypatch.setattr("zppo.train.policy_gradient.MERGED_TOKENS", 10**6)
    with monkeypatch.context() as patch:
        nth_call_raises(patch, PolicyGradient, "_backward", 7)
        status, said = zppo("train", recipe, *SHORT, saving, f"--output={run}")
    assert status == 2 and "memory ran out in a micro-batch" in said, said
    assert saved(run) == ["step-000001+2"] and f"continue with `zppo resume {run}`" in said
    assert zppo("resume", run)[0] == 0
    assert zppo("train", recipe, *SHORT, saving, f"--output={whole}")[0] == 0
    assert_same_run(whole, run)


def test_memory_that_runs_out_before_the_first_update_leaves_the_step_before(
    zppo: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        nth_call_raises(patch, Distillation, "_backward", 2)
        status, said = zppo("train", recipe, *SHORT, "--method=on-distill", f"--output={run}")
    assert status == 2 and saved(run) == ["step-000001"], said
    assert zppo("resume", run)[0] == 0


def test_merging_adapters_loses_nothing_where_checkpoints_are_off(
    zppo: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def fails(*_: object) -> Path:
        raise RuntimeError("no merge")

    with monkeypatch.context() as patch:
        patch.setattr("zppo.train.finish.save_final", fails)
        status, said = zppo("train", recipe, *SHORT, "--train.lora={}", f"--output={run}")
    assert status == 1 and saved(run) == ["step-000003"], said
    assert zppo("resume", run)[0] == 0
