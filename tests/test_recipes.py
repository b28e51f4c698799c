"""The recipes: each is parsed and dry-run, and trains end to end, with tiny stand-ins for its models, questions and teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import REWARD, make_tiny
from fault_server import Server
from seeing import make_picture, make_seeing
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings, ZoneSettings
from zppo.core.types import ImageRef, Message, Question
from zppo.planning.dry_run import memory_rows
from zppo.planning.machine import Machine
from zppo.planning.memory import within

RECIPES = Path(__file__).parents[1] / "recipes"
LARGE = ("qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b")
NAMES = (*LARGE, "single-gpu-lora", "api-teacher", "tinker")
MADE_FOR = {"qwen3.5-0.8b": 80, "qwen3.5-2b": 141, "qwen3.5-4b": 141, "qwen3.5-9b": 180, "single-gpu-lora": 24}  # GB


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student of the recipes' architecture, and questions with the columns of their data sets."""
    folder = tmp_path_factory.mktemp("standins")
    make_seeing(folder / "student", "qwen3_5")
    make_tiny(folder / "teacher")
    rows = [{"question": f"What is {i} + {j}?", "answer": f"They add up.\n#### {i + j}"} for i in range(4) for j in range(4)]
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    math = [{"problem": f"What is ${i}^2$?", "answer": str(i * i), "level": i % 5, "unique_id": f"n/{i}"} for i in range(16)]
    (folder / "math.jsonl").write_text("\n".join(map(json.dumps, math)))
    figures = [make_picture(folder, i).uri for i in range(3)]
    geometry = [{"problem": f"<image>Find angle {i}.", "images": [figures[i % 3]], "answer": str(i)} for i in range(16)]
    (folder / "geometry.jsonl").write_text("\n".join(map(json.dumps, geometry)))
    (folder / "reward.py").write_text(REWARD)
    return folder


def questions(name: str, folder: Path) -> list[str]:
    """The stand-in for a recipe's questions; the settings that only a hub set has go."""
    text = (RECIPES / f"{name}.yaml").read_text()
    names = {"openai/gsm8k": "gsm8k.jsonl", "geometry3k": "geometry.jsonl"}
    file = folder / next((file for name, file in names.items() if name in text), "math.jsonl")
    return [f"--data.train={file}", f"--data.eval={file}", "--data.config=null"]


def tiny(name: str, folder: Path) -> list[str]:
    """Overrides that leave the recipe's method and shares and shrink its sizes."""
    return [
        f"--student.model={folder / 'student'}",
        *questions(name, folder),
        *(
            "--rollout.batch_size=4",
            "--rollout.group_size=4",
            "--rollout.max_new_tokens=8",
            "--rollout.engine=transformers",
            "--data.images.min_pixels=256",
            "--data.images.max_pixels=576",
        ),
        *("--teacher.rollout.max_new_tokens=16", "--teacher.compression.max_new_tokens=16"),
        *("--train.steps=2", "--train.checkpoint_every=1", "--train.device=cpu", "--train.optimizer=adamw"),
        *("--eval.every=0", "--eval.max_new_tokens=8", "--data.eval_limit=4"),
        *(f"--grading.reward={folder / 'reward.py'}:reward", "--zone.rho_aug=0.5"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_recipes_load_and_say_no_more_than_is_true(name: str) -> None:
    settings = load_recipe(RECIPES / f"{name}.yaml")
    teacher = settings.teacher
    assert teacher is not None and teacher.base_urls and settings.method.resolve().name == "zppo"
    [part] = settings.data.parts
    assert settings.data.eval and (part.name == "zppo-77k" if name in LARGE else part.source.startswith("hub:"))
    text = (RECIPES / f"{name}.yaml").read_text()
    assert ("about images" in text) == (name in LARGE)
    assert max(map(len, text.splitlines())) <= 150
    marks = {int(n) for n in re.findall(r"# \((\d)\)", text)}
    assert marks == set(range(1, int(re.search(r"lines marked \(1\) to \((\d)\)", text)[1]) + 1))  # type: ignore[index]
    for document in re.findall(r"docs/[\w-]+\.md|recipes/[\w.-]+\.yaml", text):
        assert (RECIPES.parent / document).is_file(), document


@pytest.mark.parametrize("name", LARGE)
def test_the_large_recipes_are_the_papers(name: str) -> None:
    """docs/method.md sections 2, 4, 6 and 10, which are the defaults."""
    settings, default = load_recipe(RECIPES / f"{name}.yaml"), Settings.model_fields
    assert settings.zone == ZoneSettings() and settings.advantage == default["advantage"].default
    assert settings.loss == default["loss"].default
    rollout, train = settings.rollout, settings.train
    assert (rollout.batch_size, rollout.group_size, rollout.max_new_tokens, rollout.temperature) == (384, 8, 12_288, 1.0)
    assert (train.steps, train.minibatches, train.learning_rate, train.weight_decay) == (200, 4, 1e-6, 0.1)
    assert settings.data.max_prompt_tokens == 4096 and settings.rollout.engine == "vllm"
    assert settings.eval.sampling() == default["eval"].default.sampling()
    teacher = settings.teacher
    assert teacher is not None and teacher.model == "Qwen/Qwen3.5-27B-FP8"
    assert (teacher.rollout.max_new_tokens, teacher.rollout.temperature, teacher.compression.max_new_tokens) == (12_288, 1.0, 512)
    length = settings.rollout.vllm.max_model_length
    assert length is not None and length >= 4096 + 8 * 512 + 300 + 12_288


@pytest.mark.parametrize("name", MADE_FOR)
def test_recipes_fit_the_machine_that_they_name(name: str) -> None:
    """By the estimate, with questions of up to 2,000 characters."""
    machine = Machine("GPU", True, MADE_FOR[name] * 10**9)
    assert f"{MADE_FOR[name]} GB" in (RECIPES / f"{name}.yaml").read_text()
    images = (ImageRef("figure.png", ""),) if name in LARGE else ()
    asked = [Question("q", (Message("user", "x" * 2000),), "1", images)]
    rows = dict(memory_rows(within(load_recipe(RECIPES / f"{name}.yaml"), asked), machine=machine, images=len(images)))
    assert rows["verdict"].startswith("fits"), rows


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_dry_run(name: str, standins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the sizes that they say: questions are read, nothing is loaded, nobody is called."""
    assert main(["train", str(RECIPES / f"{name}.yaml"), "--dry-run", *questions(name, standins)]) == 0
    printed = capsys.readouterr().out
    assert "16 from" in printed and "Qwen/Qwen3.5-" in printed and ("GiB" in printed or name == "tinker") and "verdict" in printed
    assert main(["train", str(RECIPES / f"{name}.yaml"), "--dry-run", *tiny(name, standins)]) == 0
    assert "from its" not in (printed := capsys.readouterr().out) and "verdict" in printed


def test_the_dry_run_bounds_prompts_by_the_questions(standins: Path) -> None:
    settings = load_recipe(RECIPES / "qwen3.5-0.8b.yaml", questions("qwen3.5-0.8b", standins))
    assert within(settings, []).data.max_prompt_tokens < settings.data.max_prompt_tokens


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server(key="not-a-real-key", model="stand-in")
    yield started
    started.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3.5-0.8b", "qwen3.5-4b", "single-gpu-lora", "api-teacher"])
def test_recipes_train(name: str, standins: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to final/, with a teacher over HTTP behind a key."""
    monkeypatch.setenv("STANDIN_KEY", server.key)
    remote = ["--teacher.model=stand-in", f"--teacher.base_urls=[{server.url}]", "--teacher.key_env=STANDIN_KEY"]
    run = tmp_path / "run"
    assert main(["train", str(RECIPES / f"{name}.yaml"), *tiny(name, standins), *remote, f"--output={run}"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert len(steps) == 2 and any(line["remote_requests"] for line in steps)
    assert any("<response>" in asked["messages"][-1]["content"] for asked in server.log)
    kind = AutoModelForImageTextToText if name in LARGE else AutoModelForCausalLM
    trained, before = (kind.from_pretrained(folder).state_dict() for folder in (run / "final", standins / "student"))
    assert any(not torch.equal(trained[key], before[key]) for key in before)
    assert (run / "final" / "adapter").exists() == (name == "single-gpu-lora")
    assert all(server.key not in file.read_text(errors="replace") for file in run.rglob("*") if file.is_file())
