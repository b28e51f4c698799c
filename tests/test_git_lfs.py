"""A pointer of git-lfs in place of any file is said, with the command that fetches the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from error_cases import LFS_POINTER
from pictures import save
from zppo.cli import main
from zppo.config.model_settings import ModelSettings
from zppo.config.settings import ColumnSettings
from zppo.data.load import load_questions
from zppo.engines.chat import Chat
from zppo.engines.loading import load_network
from zppo.errors import DataError, ModelError, SettingsError, TemplateError, ZPPOError
from zppo.evals.media import _video_url
from zppo.images.store import open_file
from zppo.models.student_model import read_template
from zppo.names import load_object, load_part
from zppo.planning.model_shapes import shape_of
from zppo.prompts import PromptBook

MEND = "is a git-lfs pointer, which only stands for the file: run `git lfs pull`"
LOADED = ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@pytest.fixture
def student(tiny_qwen3_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen3_dir, tmp_path / "student"))


def pointer(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LFS_POINTER)
    return path


@pytest.mark.parametrize("name", LOADED)
def test_of_a_checkpoint(student: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pointer(student / name)
    for load in (lambda: load_network(student, dtype="auto"), lambda: Chat.load(str(student)), lambda: load_part(AutoConfig, student)):
        with pytest.raises(ModelError, match=f"{name} {MEND}"):
            load()
    (student.parent / "q.jsonl").write_text('{"prompt": "1?", "answer": 1}')
    recipe = student.parent / "r.yaml"
    recipe.write_text("method: grpo\nstudent: {model: ./student}\ndata: {train: q.jsonl}\n")
    for command in (["train", str(recipe), "--dry-run"], ["serve", str(student), "--port", "0"]):
        assert main(command) == 2
        assert f"{name} {MEND}" in capsys.readouterr().err


def test_of_files_that_nobody_reads(student: Path) -> None:
    for name in ("pytorch_model.bin", "tokenizer.model", "consolidated.safetensors", "original/weights.pth", "picture.png"):
        pointer(student / name)
    load_network(student, dtype="auto")
    Chat.load(str(student))
    (student / "config.json").unlink()
    pointer(student / "config.json")
    with pytest.raises(ModelError, match="git lfs pull"):
        shape_of(str(student))


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_of_data(tmp_path: Path, ending: str) -> None:
    path = pointer(tmp_path / "data" / f"train.{ending}")
    for source in (path, path.parent):
        with pytest.raises(DataError, match=f"train.{ending} {MEND}"):
            load_questions(str(source), ColumnSettings())


def test_of_images_and_clips(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    pointer(tmp_path / "b.png")
    rows = [{"prompt": "p", "answer": "1", "images": [name]} for name in ("a.png", "b.png")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=f"row 2, column 'images': the image .*b.png {MEND}"):
        load_questions(str(tmp_path / "q.jsonl"), ColumnSettings())
    with pytest.raises(DataError, match=MEND):
        open_file(tmp_path / "b.png")
    with pytest.raises(DataError, match=MEND):
        _video_url(pointer(tmp_path / "c.mp4"))


def test_of_recipes_templates_and_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pointer(tmp_path / "recipe.yaml")
    assert main(["train", str(path), "--dry-run"]) == 2
    assert MEND in capsys.readouterr().err
    with pytest.raises(TemplateError, match=MEND):
        PromptBook({"bcq": path})
    with pytest.raises(SettingsError, match=MEND):
        read_template(ModelSettings(model="m", template=path))
    with pytest.raises(ZPPOError, match=MEND):
        load_object(f"{pointer(tmp_path / 'reward.py')}:score", "reward function", ZPPOError)
