"""Checkpoints that bring code of their own: it never runs, nobody is asked, and where it is not needed they load."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import make_tiny
from seeing import make_seeing
from zppo import cli
from zppo.engines.chat import Chat
from zppo.engines.loading import load_network, reads_images
from zppo.errors import ModelError
from zppo.images.processor import ImageProcessor
from zppo.images.store import PixelLimits

SOURCES = Path(__file__).parents[1] / "src" / "zppo"
EVIL = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PretrainedConfig
class Evil(PretrainedConfig):
    model_type = "evil"
"""
AUTO = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoModelForImageTextToText": "evil.Evil",
}


class Yes(io.StringIO):
    """Somebody, or `yes |`, who agrees to everything; notes that something was read."""

    asked = False

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        self.asked = True
        return "y\n"


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> Yes:
    stdin = Yes()
    monkeypatch.setattr("sys.stdin", stdin)
    return stdin


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes), encoding="utf-8")


def evil(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")


def in_config(folder: Path) -> None:
    edit(folder / "config.json", model_type="evil", auto_map=AUTO)


def in_tokenizer(folder: Path) -> None:
    edit(folder / "config.json", model_type="evil")
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})


def in_another_place(folder: Path) -> None:
    """The code lies in another repository than the weights."""
    edit(folder / "config.json", model_type="evil", auto_map={name: f"somebody/else--{what}" for name, what in AUTO.items()})


BREAKS = (in_config, in_tokenizer, in_another_place)


@pytest.mark.parametrize("brings", BREAKS, ids=lambda f: f.__name__)
def test_no_command_runs_it_or_asks(
    brings: Any, tmp_path: Path, tiny_qwen3_dir: Path, yes: Yes, capsys: pytest.CaptureFixture[str]
) -> None:
    student = Path(shutil.copytree(tiny_qwen3_dir, tmp_path / "student"))
    evil(student, tmp_path / "ran")
    brings(student)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 plus 1?", "answer": 2}\n' * 4, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("method: grpo\nstudent: {model: ./student}\ndata: {train: train.jsonl}\n", encoding="utf-8")
    commands = (
        ["serve", str(student), "--port", "0"],
        ["train", str(tmp_path / "recipe.yaml"), f"--output={tmp_path / 'run'}", "--train.device=cpu"],
    )
    for command in commands:
        assert cli.main(command) == 2
        captured = capsys.readouterr()
        said = " ".join(captured.err.split())
        if brings is not in_tokenizer:
            assert "brings code of its own (`auto_map` in its files), which zppo does not run" in said, said
        assert "y/N" not in captured.out + captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "ran").exists() and not yes.asked


def test_what_transformers_knows_itself_loads_without_it(tmp_path: Path, yes: Yes) -> None:
    """Very common on the hub: `auto_map` beside a native architecture, in every file that may have one."""
    folder = make_tiny(tmp_path / "model")
    evil(folder, tmp_path / "ran")
    edit(folder / "config.json", auto_map=AUTO | {"AutoTokenizer": ["evil.Evil", None]})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    edit(folder / "generation_config.json", custom_generate="evil")
    (folder / "custom_generate").mkdir()
    evil(folder / "custom_generate", tmp_path / "ran")
    (folder / "custom_generate" / "evil.py").rename(folder / "custom_generate" / "generate.py")
    model = load_network(folder, dtype="auto")
    chat = Chat.load(str(folder))
    assert type(model).__name__ == "Qwen3ForCausalLM" and chat.tokenizer("1 plus 1?")["input_ids"]
    model.save_pretrained(tmp_path / "saved")
    chat.tokenizer.save_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").glob("*.json") if "auto_map" in path.read_text(encoding="utf-8")]
    assert not (tmp_path / "ran").exists() and not yes.asked


def test_processors_of_images_bring_none_either(tmp_path: Path, yes: Yes) -> None:
    folder = make_seeing(tmp_path / "model", "qwen2_5_vl")
    evil(folder, tmp_path / "ran")
    for name in ("preprocessor_config.json", "processor_config.json"):
        edit(folder / name, auto_map={"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"})
    tokenizer = Chat.load(str(folder)).tokenizer
    assert ImageProcessor.load(folder, tokenizer, PixelLimits(256, 576)).files  # the native one
    edit(folder / "preprocessor_config.json", image_processor_type="Evil")
    edit(folder / "config.json", model_type="evil", auto_map=AUTO)
    with pytest.raises(ModelError, match="code of its own"):
        ImageProcessor.load(folder, tokenizer, PixelLimits(256, 576))
    assert not reads_images(folder)
    assert not (tmp_path / "ran").exists() and not yes.asked


def test_a_part_of_a_model_brings_none_either(tmp_path: Path, yes: Yes) -> None:
    folder = make_seeing(tmp_path / "model", "gemma3")
    evil(folder, tmp_path / "ran")
    for part in ("vision_config", "text_config"):
        config = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", **{part: config[part] | {"auto_map": AUTO}})
    assert load_network(folder, dtype="auto", images=True)
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config=config["vision_config"] | {"model_type": "evil"})
    with pytest.raises(ModelError):
        load_network(folder, dtype="auto", images=True)
    assert not (tmp_path / "ran").exists() and not yes.asked


class Harmful:
    """What a pickle would run where it is read as one."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickled_weights_run_nothing_and_are_said(tmp_path: Path, tiny_qwen3_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = Path(shutil.copytree(tiny_qwen3_dir, tmp_path / "student"))
    for weights in student.glob("*.safetensors"):
        weights.unlink()
    (student / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Harmful(tmp_path / "ran")}))
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 plus 1?", "answer": 2}\n' * 4, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("method: grpo\nstudent: {model: ./student}\ndata: {train: train.jsonl}\n", encoding="utf-8")
    for command in (["serve", str(student), "--port", "0"], ["train", str(tmp_path / "recipe.yaml"), f"--output={tmp_path / 'run'}"]):
        assert cli.main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "has pickled weights (*.bin)" in said and "weights_only" not in said
    assert not (tmp_path / "ran").exists()


def test_there_is_one_door() -> None:
    """Nothing of a checkpoint is loaded but by `load_part`; what stands aside takes no code: peft's settings, the lab's own classes."""
    aside = {"names.py": 2, "models/lora.py": 2, "lab/pretrain.py": 2}
    found = {}
    for path in SOURCES.rglob("*.py"):
        if calls := re.findall(r"\w\.from_(?:pretrained|config)\(", path.read_text(encoding="utf-8")):
            found[path.relative_to(SOURCES).as_posix()] = len(calls)
    for shapes in ("planning/model_shapes.py", "engines/loading.py"):  # from_config
        assert found.pop(shapes) == 1 and "trust_remote_code=False" in (SOURCES / shapes).read_text(encoding="utf-8")
    assert found == aside
