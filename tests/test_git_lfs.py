"""A pointer of git-lfs in place of any file is said, with the command that fetches the file."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from error_cases import LFS_POINTER
from pictures import save
from report_runs import evaluated, invented_run, rows_of
from zppo.cli import main
from zppo.config.data_settings import ColumnSettings
from zppo.config.model_settings import ModelSettings
from zppo.config.settings import GradingSettings
from zppo.data.load import load_questions
from zppo.engines.chat import Chat
from zppo.engines.loading import load_network
from zppo.errors import DataError, ModelError, SettingsError, TemplateError, ZPPOError
from zppo.evals.adapters.own import own_benchmark
from zppo.evals.benchmark_rows import _file_rows
from zppo.evals.clips.archives import unpack
from zppo.evals.journal import Journal
from zppo.evals.media import _video_url
from zppo.evals.results import EvalFolder
from zppo.images.store import open_file
from zppo.lab.world import load_world
from zppo.models.student_model import read_template
from zppo.names import load_object, load_part
from zppo.planning.model_shapes import shape_of
from zppo.prompts import PromptBook
from zppo.report.bootstrap import read_table
from zppo.report.tables import read_evaluation
from zppo.rollout.rewards import make_rewards
from zppo.runs.files import make_manifest
from zppo.runs.trackers import Trackers
from zppo.serve.command import read_server_key

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


RUN_FILES = {  # of a run folder -> the commands that read it
    "recipe.yaml": ("report", "inspect", "compare", "resume"),
    "metrics.jsonl": ("report", "inspect", "compare", "resume"),
    "buffer.jsonl": ("report", "inspect", "resume"),
    "rollouts/step-000003.parquet": ("report", "inspect"),
    "held_out/eval-000000.parquet": ("report", "inspect"),
    "checkpoints/step-000008/manifest.json": ("resume",),
    "checkpoints/step-000008/state.json": ("resume",),
    "checkpoints/step-000008/optimizer.pt": ("resume",),
    "checkpoints/step-000008/mid_step.safetensors": ("resume",),
    "checkpoints/step-000008/model/config.json": ("resume", "serve"),
    "checkpoints/step-000008/model/model.safetensors": ("resume", "serve"),
    "checkpoints/step-000008/model/adapter_model.safetensors": ("resume",),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint, as far as its files go."""
    folder = evaluated(invented_run(tmp_path / "run"))
    checkpoint = folder / "checkpoints" / "step-000008"
    for name in RUN_FILES:
        if name.startswith("checkpoints/") and not name.endswith("manifest.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
    (checkpoint / "manifest.json").write_text(make_manifest(checkpoint))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n.startswith("held_out") else n for n in RUN_FILES])
def test_of_a_run_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    healthy = Path(shutil.copytree(run, tmp_path / "healthy"))
    pointer(run / name)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for command in RUN_FILES[name]:
        place = str(run / name.partition("/model/")[0] / "model") if command == "serve" else str(run)
        question = rows_of(healthy)[3 * len(rows_of(healthy)) // 8 - 1]["question_id"]
        more = {"inspect": [question], "compare": [str(healthy)], "report": ["--out", str(tmp_path / "report")], "serve": ["--port", "0"]}
        code = main([command, place, *more.get(command, [])])
        shown = capsys.readouterr()
        said = " ".join((shown.err + shown.out).split())
        assert f"{Path(name).name} {MEND}" in said, f"{command}: {said}"
        assert code == (0 if name.startswith(("rollouts", "held_out")) else 2), command
        assert said.count("git lfs pull") == 1, f"{command}: {said}"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before  # nothing was set aside or cut


@pytest.mark.slow
def test_weights_that_are_not_there_hinder_no_report(run: Path, tmp_path: Path) -> None:
    """A run that was cloned without its large files shows what it has."""
    for name in ("checkpoints/step-000008/optimizer.pt", "checkpoints/step-000008/model/model.safetensors", "final/model.safetensors"):
        pointer(run / name)
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0


OTHERS: dict[str, Callable[[Path], object]] = {
    "trackers.json": lambda path: Trackers((), "p", path.parent, print)._kept(),
    "table.csv": lambda path: read_table(path),
    "eval.json": lambda path: read_evaluation(path),
    "other/eval.json": lambda path: read_evaluation(path.parent),
    "results/eval.json": lambda path: EvalFolder(path.parent).read(),
    "journal.jsonl": lambda path: Journal(path),
    "own.yaml": lambda path: own_benchmark(str(path)),
    "rows.jsonl": lambda path: list(_file_rows(SimpleNamespace(name="rows", family="llm"), path.parent, path.parent)[0]),  # type: ignore[arg-type]
    "clips.zip": lambda path: unpack(path, path.parent / "into"),
    "clips.tar": lambda path: unpack(path, path.parent / "into"),
    "key.txt": lambda path: read_server_key(argparse.Namespace(key_env=None, key_file=path)),
    "world.yaml": lambda path: load_world(str(path)),
    "set/state.json": lambda path: load_questions(str(path.parent), ColumnSettings()),
    "set/data-00000-of-00001.arrow": lambda path: (
        pointer(path).with_name("state.json").write_text("{}") and load_questions(str(path.parent), ColumnSettings())
    ),
    "set/README.md": lambda path: load_questions(str(path.parent), ColumnSettings()),
    "train.jsonl.gz": lambda path: load_questions(str(path), ColumnSettings()),
    "train.jsonl.zst": lambda path: load_questions(str(path), ColumnSettings()),
    "judge.jinja": lambda path: PromptBook({"judge": path}),
    "score.py": lambda path: make_rewards(GradingSettings(reward=f"{path}:score")),
    "adapter.py": lambda path: load_object(f"{path}:adapt", "adapter", SettingsError),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_any_other_file(tmp_path: Path, name: str) -> None:
    path = pointer(tmp_path / name)
    with pytest.raises(ZPPOError, match=f"{path.name} {MEND}"):
        OTHERS[name](path)
    assert path.read_text() == LFS_POINTER


def test_of_the_bundled_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone of the project itself, where somebody keeps its models so."""
    monkeypatch.setattr("zppo.lab.questions.ASSETS", tmp_path)
    pointer(tmp_path / "reachable" / "train.jsonl")
    with pytest.raises(SettingsError, match=f"train.jsonl {MEND}"):
        load_questions("lab:reachable/train", ColumnSettings())
