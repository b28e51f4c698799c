"""`import zppo`: what it gives, and that it gives it late."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import zppo
from zppo.errors import SettingsError

RECIPE = Path(__file__).parents[1] / "recipes" / "lab.yaml"
SMALL = {
    "train__steps": 1,
    "rollout__batch_size": 4,
    "eval__every": 0,
    "data__eval_limit": 2,
    "rollout__group_size": 2,
    "teacher__rollout": {"max_new_tokens": 16},
}


def test_importing_it_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, zppo; print(zppo.__version__, [n for n in ('torch', 'pydantic', 'numpy', 'yaml') if n in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [zppo.__version__, "[]"]


def test_every_public_name_is_there() -> None:
    from zppo.core.replay import PromptReplayBuffer

    assert all(getattr(zppo, name) is not None for name in zppo.__all__)
    assert zppo.PromptReplayBuffer is PromptReplayBuffer and callable(zppo.train)
    with pytest.raises(AttributeError):
        zppo.nothing  # noqa: B018


@pytest.mark.slow
def test_a_run_from_a_script_and_from_a_notebook(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    run = zppo.train(RECIPE, console=quiet, output=tmp_path / "script", **SMALL)
    assert (run.final / "config.json").is_file() and run.folder == tmp_path / "script"
    assert [line["event"] for line in run.metrics] == ["eval", "step", "final"] and set(run.accuracies) == {0, 1}

    async def cell() -> zppo.TrainedRun:
        return zppo.train(str(RECIPE), console=quiet, output=str(tmp_path / "notebook"), **SMALL)

    same = asyncio.run(cell())
    assert same.accuracies == run.accuracies
    assert zppo.resume(run.folder, console=quiet).folder == run.folder  # it is finished


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    line = '{"step": 0, "event": "eval", "accuracy": 0.25}\n'
    (tmp_path / "metrics.jsonl").write_text(line + line[:20], encoding="utf-8")
    assert zppo.TrainedRun(tmp_path).accuracies == {0: 0.25}


def test_settings_are_whole(tmp_path: Path) -> None:
    settings = zppo.load_recipe(RECIPE, [])
    with pytest.raises(SettingsError, match="seed"):
        zppo.train(settings, seed=1)
