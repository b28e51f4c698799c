"""`zppo push` and `push` of a recipe, against a stand-in for the hub at the level of HTTP; the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import ModelCard

from hub_server import HubServer
from ports import hold_port
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.runs.model_card import public, run_card

TOKEN = "hf_standsForAKeyOfMine"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    small = ("--train.steps=2", "--rollout.batch_size=2", "--rollout.group_size=2", "--data.eval_limit=4", "--data.limit=4")
    done = zppo(None, "train", "lab", *small, f"--output={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer(TOKEN)
    yield server
    server.close()


def zppo(url: str | None, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the hub's address is read when its library is imported."""
    environment = {**os.environ, **dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET"), "1")}
    if url is not None:
        environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_TOKEN": token}
    return subprocess.run([sys.executable, "-m", "zppo", *arguments], env=environment, capture_output=True, text=True, timeout=200)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_finished_run_is_pushed_whole_with_its_card(run: Path, hub: HubServer) -> None:
    done = zppo(hub.url, "push", str(run), "--repo", "mine")
    assert done.returncode == 0 and done.stdout == f"{hub.url}/me/mine\n", done.stderr
    assert hub.repos == {"me/mine": True}  # private
    assert hub.files["me/mine"] == everything(run / "final") and "model.safetensors" in hub.files["me/mine"]
    ((name, message),) = hub.commits
    assert name == "me/mine" and message.startswith("my-run, trained with zppo ")
    for path, content in hub.files["me/mine"].items():
        assert path.endswith(".safetensors") or str(run.parent).encode() not in content, path
    assert zppo(hub.url, "push", str(run), "--repo", "us/theirs", "--public").returncode == 0
    assert hub.repos["us/theirs"] is False


@pytest.mark.slow
def test_a_card_that_was_edited_stays_and_one_that_names_paths_is_written_anew(run: Path, hub: HubServer, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "my-run"))
    card = copy / "final" / "README.md"
    card.write_text(card.read_text() + "\nmy own words\n")
    assert zppo(hub.url, "push", str(copy), "--repo", "edited").returncode == 0
    assert b"my own words" in hub.files["me/edited"]["README.md"]
    card.write_text(f"---\nlibrary_name: transformers\n---\n\n`{tmp_path}/student`\n")
    assert zppo(hub.url, "push", str(copy), "--repo", "old").returncode == 0
    assert hub.files["me/old"]["README.md"] == (run / "final" / "README.md").read_bytes()


@pytest.mark.slow
@pytest.mark.long
def test_a_push_that_fails_says_what_to_do_and_nothing_is_lost(run: Path, hub: HubServer) -> None:
    before = everything(run)
    done = zppo(hub.url, "push", str(run), "--repo", "mine", token="hf_another")
    assert done.returncode == 2 and "log in with `hf auth login`" in done.stderr and "Traceback" not in done.stderr
    assert f"`zppo push {run} --repo mine`" in done.stderr
    hub.refuse["/api/models"] = 403
    assert "take a token that may write there" in zppo(hub.url, "push", str(run), "--repo", "mine").stderr
    assert "is no name of a repository" in zppo(hub.url, "push", str(run), "--repo", "a/b/c").stderr
    assert "offline" in zppo(None, "push", str(run), "--repo", "mine").stderr.lower()
    shutil.copytree(run, cloned := run.parent / "cloned", dirs_exist_ok=True)
    (cloned / "final" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused = zppo(hub.url, "push", str(cloned), "--repo", "mine")
    assert refused.returncode == 2 and "final/tokenizer.json is a git-lfs pointer" in refused.stderr
    unfinished = zppo(None, "push", str(run / "final"), "--repo", "mine")
    assert unfinished.returncode == 2 and "holds no finished run" in unfinished.stderr
    assert everything(run) == before and not hub.commits


@pytest.mark.slow
@pytest.mark.long
def test_a_run_is_pushed_at_its_end_and_ends_well_where_that_fails(hub: HubServer, tmp_path: Path) -> None:
    small = ("--train.steps=1", "--rollout.batch_size=2", "--rollout.group_size=2", "--data.eval=null", "--data.limit=4")
    done = zppo(hub.url, "train", "lab", *small, "--push.repo=mine", "--push.private=false", f"--output={tmp_path / 'one'}")
    assert done.returncode == 0 and f"pushed: {hub.url}/me/mine" in done.stdout, done.stdout + done.stderr
    assert hub.repos == {"me/mine": False} and hub.files["me/mine"] == everything(tmp_path / "one" / "final")
    gone = f"http://127.0.0.1:{hold_port()}"
    done = zppo(gone, "train", "lab", *small, "--train.steps=0", "--push.repo=mine", f"--output={tmp_path / 'two'}")
    assert done.returncode == 0 and f"`zppo push {tmp_path / 'two'} --repo mine`" in " ".join(done.stdout.split())
    assert (tmp_path / "two" / "final" / "README.md").is_file()


def test_a_dry_run_says_that_the_student_will_leave(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "lab", "--dry-run", "--push.repo=us/mine"]) == 0
    assert re.search(r"pushed to +us/mine, private where it is made", capsys.readouterr().out)
    assert main(["train", "lab", "--dry-run", "--push.repo=a/b/c"]) == 2
    assert "push.repo: 'a/b/c' does not fit" in " ".join(capsys.readouterr().err.split())


# --- the card -------------------------------------------------------------------------------------------------------

EVALUATION = {"accuracy": 0.25, "by_level": {"easy": 0.5}, "count": 8, "ungraded": 0}
LINES: list[dict[str, Any]] = [
    {"step": 0, "event": "eval", **EVALUATION},
    {"step": 1, "event": "step", "rollouts": 64, "student_tokens": 1000, "teacher_tokens": 10},
    {"step": 1, "event": "final", **EVALUATION, "accuracy": 0.75},
]


def test_the_card_says_what_the_hub_reads(tmp_path: Path) -> None:
    settings = load_recipe("single-gpu-lora")
    text = run_card("my-run", settings, LINES, tmp_path)
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3.5-2B" and data["datasets"] == ["openai/gsm8k"]
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert {"zppo", "lora"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["type"] == "openai/gsm8k" and result["metrics"][0] == {"type": "accuracy", "value": 0.75}
    assert "| all | 0.250 | 0.750 |" in text and "64 rollouts" in text and "`Qwen3.5-27B-FP8`" not in text
    assert "Its teacher was `Qwen/Qwen3.5-27B-FP8`" in text and "rank 16" in text
    (tmp_path / "preprocessor_config.json").touch()
    assert cast(Any, ModelCard(run_card("r", settings, LINES, tmp_path)).data).pipeline_tag == "image-text-to-text"


def test_the_card_names_no_path_no_address_and_no_key(tmp_path: Path) -> None:
    """Every setting that can hold one holds one."""
    (tmp_path / "secret-student").mkdir()
    recipe = {
        "output": "secret-out",
        "method": {"name": "zppo", "reformulations": ["bcq", "secret_module:Kind"]},
        "student": {"model": "./secret-student", "template": "secret.jinja", "attention": "secret/kernel"},
        "teacher": {
            "model": "/secret/teacher", "base_urls": ["http://secret-host:8000/v1"], "key_env": "SECRET_KEY",
            "rollout": {"extra_body": {"user": "secret"}},
        },
        "judge": {"model": "secret", "base_urls": ["https://secret-judge/v1"]},
        "data": {"train": "secret/train.jsonl", "eval": "C:\\secret\\eval.jsonl", "images": {"folder": "secret"}},
        "prompts": {"closing": "secret.jinja"},
        "rollout": {"engine": "vllm", "vllm": {"mode": "server", "base_url": "http://secret-vllm:8001", "weights_folder": "secret"}},
        "train": {"trackers": ["wandb"], "tracker_project": "secret", "learning_rate": 0.5},
        "grading": {"reward": "secret.py:reward"},
        "push": {"repo": "secret/repo"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    text = run_card("my-run", load_recipe(path), [], tmp_path)
    assert "learning_rate: 0.5" in text and "A local checkpoint" in text
    left = [line for line in text.splitlines() if "secret" in line.lower() or str(tmp_path) in line]
    assert left == ["  model: secret"], text  # what a server calls its model looks like any other name
    assert not re.search(r"https?://(?!arxiv)", text)
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_the_card_says_how_it_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "student": {"model": "a/b"}, "method": "grpo", "data": {"train": "t.jsonl", "examples": 2}, "prompts": {"closing": "answer-line"},
    }))  # fmt: skip
    figures = {"accuracy": 0.5, "by_level": {}, "count": 4, "ungraded": 0}
    lines = [{"event": "eval", "step": 0, **figures}, {"event": "final", "step": 1, **figures}]
    text = run_card("my-run", load_recipe(path), lines, tmp_path)
    assert "closing: answer-line" in text and "Every prompt showed 2 training questions" in text
    own = public({"prompts": {"closing": "mine.jinja", "bcq": "boxed"}})
    assert own == {"prompts": {"closing": "(local)", "bcq": "boxed"}}  # `boxed` says nothing of anybody's files


def test_what_others_have_too_stays() -> None:
    kept = {"model": "Qwen/Qwen3.5-2B", "train": "hub:openai/gsm8k", "eval": "reasoning_gym:leg_counting", "answer_after": "</answer>"}
    assert public(kept) == kept and json.loads(json.dumps(public({"a": [1, "x/y", None]}))) == {"a": [1, "(local)", None]}
