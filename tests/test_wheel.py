"""The wheel: built, installed beside nothing of this repository, and used from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import cast

import pytest
import yaml

import zppo

ROOT = Path(__file__).parents[1]
SOURCES = ("src", "recipes", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: a build leaves its folders there."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / name, copy)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    _pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", arguments[0], "--no-index", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def command(installed: Path, folder: Path, *arguments: str) -> str:
    """What the installed `zppo` prints, started in `folder`, where nothing of the repository lies."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / "zppo"), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_travels_and_nothing_else(wheel: Path) -> None:
    """Each file of the package and of recipes/, whatever its kind: a list of patterns forgets one."""
    wanted = {f"zppo/{path.relative_to(ROOT / 'src' / 'zppo')}" for path in (ROOT / "src" / "zppo").rglob("*") if path.is_file()}
    wanted |= {f"zppo/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for name in wanted if "__pycache__" not in name}


def test_the_version_is_said_in_one_place(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        about = Parser().parsestr(archive.read(name).decode())
    assert about["Version"] == zppo.__version__
    assert f"\nversion: {zppo.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(zppo.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert zppo.__version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.")[0].split("dependencies")[0]
    assert {"Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.13"} <= set(
        cast(list[str], about.get_all("Classifier"))
    )


def test_it_trains_reports_and_lists_without_the_repository(installed: Path, tmp_path: Path) -> None:
    assert command(installed, tmp_path, "--version") == f"zppo {zppo.__version__}\n"
    listed = command(installed, tmp_path, "recipes")
    assert str(installed) in listed and "single-gpu-lora" in listed and "24 GB" in listed
    small = ("--train.steps=1", "--rollout.batch_size=2", "--rollout.group_size=2", "--data.eval_limit=2", "--output=run")
    command(installed, tmp_path, "train", "lab", *small)
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    words = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))["prompts"]
    lab = {path.read_text(encoding="utf-8") for path in (installed / "zppo" / "lab" / "prompts").iterdir()}
    own = {(tmp_path / "run" / path).read_text(encoding="utf-8") for path in words.values()}
    assert len(own) == len(words) and own < lab  # another world's recipe has hints
    command(installed, tmp_path, "report", "run", "--figures=none")
    assert "plotly.js (basic" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_copied_recipe_works_where_it_lies(installed: Path, tmp_path: Path) -> None:
    command(installed, tmp_path, "init", "mine/lab", "--from", "lab")
    plan = command(installed, tmp_path, "train", "mine/lab.yaml", "--dry-run")
    assert "180 from lab:unreachable/train" in plan
    said = command(installed, tmp_path, "init", "mine/own")
    assert "mine/data/my-data.jsonl" in said
    assert f"from {tmp_path}/mine/data/my-data.jsonl" in command(installed, tmp_path, "train", "mine/own.yaml", "--dry-run")
