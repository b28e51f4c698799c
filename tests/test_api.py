"""`import zppo`: what it gives, and that it gives it late."""

from __future__ import annotations

import asyncio
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

import zppo
from zppo.config.model_settings import ModelSettings
from zppo.errors import ModelError, SettingsError

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "lab.yaml"
MAPPING = {"method": "grpo", "student": {"model": "lab:unreachable/student"}, "data": {"train": "lab:unreachable/train"}}
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

    assert all(getattr(zppo, name) is not None for name in zppo.__all__) and {*zppo.__all__} <= {*dir(zppo)}
    assert zppo.PromptReplayBuffer is PromptReplayBuffer
    with pytest.raises(AttributeError):
        zppo.nothing  # noqa: B018


def test_train_is_a_room_and_a_function_at_once() -> None:
    import zppo.train.provenance  # the import system puts the room in the function's place
    from zppo.api import train

    room: Any = zppo.train
    assert inspect.signature(room) == inspect.signature(train) and room.__doc__ == train.__doc__
    shown = pydoc.render_doc(room, renderer=cast(Any, pydoc).plaintext)
    assert f"train{inspect.signature(train)}" in shown and "two underscores: `train__steps=100`" in shown
    assert room.provenance.origin_of


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_is_a_path_a_mapping_or_settings() -> None:
    settings = zppo.load_recipe(RECIPE)
    assert zppo.load_recipe(settings) is settings
    assert zppo.load_recipe(settings.model_dump(mode="json")) == settings
    for recipe in (RECIPE, str(RECIPE), settings):
        changed = zppo.load_recipe(recipe, {"train__steps": 3, "data.eval": None, "student": ModelSettings(model="a/b")})
        assert (changed.train.steps, changed.data.eval, changed.student.model) == (3, None, "a/b")
        assert changed == zppo.load_recipe(RECIPE, ["--train.steps=3", "--data.eval=null", "--student={model: a/b}"])
    small = zppo.load_recipe(MAPPING, {"method__replay": True, "grading__reward": Path("mine.py:score")})
    assert small.method.name == "grpo" and small.method.replay
    assert small.grading.reward == f"{Path.cwd() / 'mine.py'}:score"
    assert MAPPING["method"] == "grpo"


@pytest.mark.parametrize("recipe", [RECIPE, MAPPING, "settings"], ids=["path", "mapping", "settings"])
def test_overrides_are_looked_at_as_everywhere(recipe: Any) -> None:
    given = zppo.load_recipe(RECIPE) if recipe == "settings" else recipe
    with pytest.raises(SettingsError) as caught:
        zppo.train(given, steps=3, train__learning_rate="fast", train__steps=True, data__train__x=1)
    said = str(caught.value)
    assert said.startswith(f"{RECIPE}: 4 problems" if recipe == RECIPE else "the recipe: 4 problems")
    assert "steps is no setting (an override); the nearest one is train.steps" in said
    assert "train.learning_rate: 'fast' does not fit (an override); expected number" in said
    assert "train.steps: true does not fit" in said or "train.steps: 'true' does not fit" in said
    assert "data.train.x cannot be set: data.train is 'lab:unreachable/train', not a section" in said


@pytest.mark.parametrize("recipe", [3, None, ["a"]])
def test_what_is_no_recipe(recipe: Any) -> None:
    with pytest.raises(SettingsError, match="is no recipe: give the path of one, a mapping as one holds it, or Settings"):
        zppo.train(recipe)


def test_what_the_command_looks_at_first_is_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SettingsError, match="is not empty"):
        zppo.train(MAPPING, output=tmp_path / "full")
    with pytest.raises(ModelError, match="no bundled model 'lab:nowhere/student'"):
        zppo.train(MAPPING, student__model="lab:nowhere/student")
    with pytest.raises(ModelError, match="student.model: .*none is no transformers checkpoint"):
        zppo.train(MAPPING, student__model=tmp_path / "none")


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word, from the project's folder."""
    example = re.findall(r"```python\n(import zppo\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for name in ("recipes", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw: there is no console
    found: dict[str, Any] = {}
    exec(example[0], found)  # noqa: S102
    run = found["run"]
    assert len(example) == 1 and len(found["losses"]) == 2 and -1 < found["gained"] < 1
    assert list(run.after) == list(run.before) == ["all", "easy", "medium", "hard"]
    assert re.fullmatch(r"<TrainedRun runs/two-steps: 2 steps, held-out accuracy: all 0.237 -> 0.\d+, easy .*, hard .*>", repr(run))


@pytest.mark.slow
def test_a_run_from_a_script_and_from_a_notebook(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    run = zppo.train(RECIPE, console=quiet, output=tmp_path / "script", **SMALL)
    assert (run.final / "config.json").is_file() and run.folder == tmp_path / "script"
    assert [line["event"] for line in run.metrics] == ["eval", "step", "final"] and set(run.accuracies) == {0, 1}
    assert run.accuracies == {0: run.before["all"], 1: run.after["all"]}

    async def cell() -> zppo.TrainedRun:
        return zppo.train(zppo.load_recipe(RECIPE), console=quiet, output=str(tmp_path / "notebook"), **SMALL)

    same = asyncio.run(cell())
    assert same.accuracies == run.accuracies
    assert zppo.resume(run, console=quiet) == zppo.resume(run.folder, console=quiet) == run  # it is finished


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    line = '{"step": 0, "event": "eval", "accuracy": null, "by_level": {}}\n'
    (tmp_path / "metrics.jsonl").write_text(line + line[:20], encoding="utf-8")  # a torn last line is left out
    run = zppo.TrainedRun(tmp_path)
    assert (run.accuracies, run.before, run.after) == ({0: None}, {"all": None}, {})
    assert repr(run) == f"<TrainedRun {tmp_path}: 0 steps>"
