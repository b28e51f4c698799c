"""Recipes that come with zppo: by name, listed, copied."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from zppo.cli import main
from zppo.config.bundled import accelerate_files, find_recipe, made_for, recipe_names, recipes_folder, slurm_script
from zppo.config.recipe import load_recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["lab", "lab.yaml", "recipes/lab.yaml", Path("recipes/lab.yaml")])
def test_a_recipe_has_a_name_everywhere(given: str | Path) -> None:
    assert find_recipe(given) == recipes_folder() / "lab.yaml"
    assert load_recipe(given).student.model == "lab:unreachable/student"


def test_a_file_that_is_there_wins(elsewhere: Path) -> None:
    (elsewhere / "lab").mkdir()  # a folder is no recipe
    assert find_recipe("lab") == recipes_folder() / "lab.yaml"
    (elsewhere / "lab.yaml").touch()
    assert find_recipe("lab.yaml") == Path("lab.yaml")
    for other in ("none.yaml", "recipes/none.yaml", "my/lab.yaml", "../lab.yaml", "accelerate/ddp"):
        assert find_recipe(other) == Path(other)


def test_runs_are_named_after_the_recipe_even_with_a_dot_in_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "qwen3.5-0.8b", "--dry-run", "--data.train=lab:unreachable/train", "--data.eval=null"]) == 0
    assert "runs/qwen3.5-0.8b-<date>" in capsys.readouterr().out


def test_the_list_says_what_each_is_made_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in recipe_names():
        machine = made_for((recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
        assert re.search(r"GPU of \d+ GB|CPU cores", machine), name
        assert re.search(rf"^{re.escape(name)} .*{re.escape(machine)}", printed, re.MULTILINE), name
    assert re.search(r"^single-gpu-lora +Qwen3.5-2B by LoRA on gsm8k +Qwen3.5-27B-FP8 \(server\)", printed, re.MULTILINE)
    assert all(str(path) in printed for path in accelerate_files())


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_means_the_same(name: str, elsewhere: Path) -> None:
    """In another folder than the working one: paths work from there."""
    assert main(["init", "sub/mine", "--from", name]) == 0
    text = (elsewhere / "sub" / "mine.yaml").read_text(encoding="utf-8")
    assert "../" not in text and f"recipes/{name}.yaml" not in text and "sub/mine.yaml" in text
    copy, original = load_recipe("sub/mine.yaml"), load_recipe(name)
    sources = [copy.data.train] if isinstance(copy.data.train, str) else [part.source for part in copy.data.train]
    for source in (*sources, copy.data.eval):
        # By `zppo data build`, or by the benchmark that the recipe names, before the recipe is used.
        built = source is not None and (source.endswith("zppo-77k") or "/stories/" in source)
        assert source is not None and (":" in source or built or (Path(source).is_file() and source.startswith(str(elsewhere))))
    assert copy.model_copy(update={"data": original.data}) == original


def test_a_copy_overwrites_nothing(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "one"]) == 0
    (elsewhere / "data" / "my-data.jsonl").write_text("mine")
    assert main(["init", "two.yaml"]) == 0 and "data/my-data.jsonl  was there already" in capsys.readouterr().out
    assert (elsewhere / "data" / "my-data.jsonl").read_text() == "mine"
    assert main(["init", "two"]) == 2 and "is there already" in capsys.readouterr().err
    assert not (elsewhere / "two.yaml.yaml").exists()


def test_the_batch_script_is_copied_too(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0 and str(slurm_script()) in capsys.readouterr().out
    assert main(["init", "sub/mine", "--from", "slurm"]) == 0 and "`sbatch sub/mine.sbatch`" in capsys.readouterr().out
    text = (elsewhere / "sub" / "mine.sbatch").read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash") and "#   sbatch sub/mine.sbatch" in text and "recipes/slurm.sbatch" not in text
    assert subprocess.run(["bash", "-n", "sub/mine.sbatch"]).returncode == 0
    assert main(["init", "sub/mine.sbatch", "--from", "recipes/slurm.sbatch"]) == 2 and "is there already" in capsys.readouterr().err


def test_accelerate_configurations_are_copied_too(elsewhere: Path) -> None:
    assert main(["init", "ddp", "--from", "accelerate/ddp"]) == 0
    text = (elsewhere / "ddp.yaml").read_text(encoding="utf-8")
    assert "--config_file ddp.yaml" in text and "distributed_type: MULTI_GPU" in text
