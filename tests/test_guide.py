"""docs/train-your-model.md: its settings and numbers exist, and its commands run, in its order, on tiny models."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import REWARD, make_tiny
from fault_server import Server
from test_recipes import RECIPES
from zppo.cli import main
from zppo.config.help import known_keys

GUIDE = (RECIPES.parent / "docs" / "train-your-model.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for block in blocks("bash") for line in block.splitlines() if line.startswith("zppo ")]


def test_settings_and_files_that_it_names_exist() -> None:
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    named = re.findall(rf"`(?:--)?((?:{'|'.join(sorted(sections))})(?:\.\w+)+)", GUIDE)
    own = {"accuracy.plain", "accuracy.bcq", "accuracy.ncq", "metrics.jsonl"}
    assert len(named) > 20 and [name for name in named if name not in known_keys() and name not in own] == []
    for document in re.findall(r"\]\(([\w-]+\.md)\)|`(recipes/[\w.-]+)`", GUIDE):
        assert any((folder / "".join(document)).is_file() for folder in (RECIPES.parent / "docs", RECIPES.parent)), document


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server(model="stand-in")
    yield started
    started.kill()


def test_a_small_student_begins_with_a_recipe_and_four_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the dry run, which calls nobody; every place of the guide is marked in the recipe that is copied."""
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0 and "smollm2-135m where the student is small" in " ".join(capsys.readouterr().out.split())
    assert main(["init", "mine", "--from", "smollm2-135m"]) == 0
    recipe, changes = yaml.safe_load(Path("mine.yaml").read_text()), blocks("yaml")[1]
    for text in (Path("mine.yaml").read_text(), changes):
        assert all(re.search(rf"^\w+:.*# \({i}\)|^\w+:.*\# \({i}\)", text, re.MULTILINE) for i in (1, 2, 3, 4))
    recipe.update(yaml.safe_load(changes))
    recipe["student"] = {"model": "tiny"}
    make_tiny(tmp_path / "tiny")
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    (csv,) = blocks("csv")
    head, first, second, *rest = csv.splitlines()
    Path("train.csv").write_text(
        "\n".join([f"{head},work", f"{first},12 times 11 is 132.", f"{second},2x is 4.", *(f"{row}," for row in rest)])
    )
    Path("test.csv").write_text("question,answer,topic\nWhat is 3 times 4?,12,arithmetic\n")
    assert main(["train", "mine.yaml", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "its-name-there at http://that-machine:8000/v1" in said and "2 from" in said and "greedy" in said and "verdict fits" in said


@pytest.mark.slow
def test_from_a_csv_to_a_student(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (csv,) = blocks("csv")
    (tmp_path / "questions.csv").write_text(csv + csv.split("\n", 1)[1] * 3)
    (split,) = blocks("python")
    subprocess.run([sys.executable, "-c", split], check=True)
    assert len(Path("train.csv").read_text().splitlines()) == 13 and len(Path("test.csv").read_text().splitlines()) == 5
    (tmp_path / "other.csv").write_text(csv)

    recipe = yaml.safe_load((RECIPES / "single-gpu-lora.yaml").read_text())
    data, _ = blocks("yaml")
    recipe.update(yaml.safe_load(data))
    make_tiny(tmp_path / "tiny")
    (tmp_path / "reward.py").write_text(REWARD)
    recipe["student"]["model"] = "tiny"
    recipe["teacher"] |= {"model": "stand-in", "base_urls": [server.url]}
    recipe["grading"] = {"reward": "reward.py:reward"}
    recipe["rollout"] |= {"batch_size": 4, "group_size": 4, "max_new_tokens": 8}
    recipe["train"] |= {"steps": 2, "device": "cpu", "checkpoint_every": 1}
    recipe["eval"] |= {"max_new_tokens": 8, "every": 0}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))

    ran = commands()
    assert [c[0] for c in ran] == ["train", "cost", "train", "report", "resume", "train"]
    for command in ran:
        extra = ["--teacher-params=27B"] if command[0] == "cost" else ["--figures=none"] if command[0] == "report" else []
        assert main([*command, *extra]) == 0, capsys.readouterr().err
    assert "runs/mine is finished already" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line["event"] == "step")
    last = [line["event"] for line in lines][-1]
    assert last == "final" and Path("runs/mine/final/adapter").is_dir() and Path("runs/mine/report.html").is_file()
    assert [json.loads(line)["event"] for line in Path("runs/check/metrics.jsonl").read_text().splitlines()].count("step") == 0

    watched = GUIDE.split("## 6.")[1].split("## 7.")[0]
    for row in re.findall(r"^\| (`.*?) \|", watched, re.MULTILINE):
        for name in re.findall(r"`([\w.]+)`", row):
            value = step
            for part in name.split("."):
                assert part in value, f"{name} is in the guide and not in metrics.jsonl"
                value = value[part]
