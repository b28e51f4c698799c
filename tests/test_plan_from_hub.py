"""A dry run of models that are on the hub alone: their config.json is fetched, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from hub_server import HubServer
from ports import hold_port
from test_push import TOKEN, zppo
from zppo import http_client

pytestmark = pytest.mark.slow

# Qwen3-0.6B's.
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "150")
    server = HubServer(TOKEN)
    server.files["us/student"] = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"weights"}
    server.files["us/no-config"] = {}
    yield server
    server.close()


ASKED = ("train", "my-data", "--dry-run", "--for-gpu=24", "--teacher.model=Qwen/Qwen3.5-0.8B")


def test_a_student_of_the_hub_is_planned_by_its_config(hub: HubServer) -> None:
    done = zppo(hub.url, *ASKED, "--student.model=us/student")
    assert done.returncode == 0, done.stderr
    weights = next(line for line in done.stdout.splitlines() if line.startswith("student: weights"))
    assert weights.split()[2:4] == ["2.2", "GiB"]  # 596,049,920 parameters in fp32
    assert "verdict" in done.stdout and not done.stderr
    assert all(path == "/" or path.endswith("/resolve/main/config.json") for path in hub.read)
    hub.close()  # what was fetched stays: without the hub the plan is the same
    assert zppo(hub.url, *ASKED, "--student.model=us/student").stdout == done.stdout


def test_what_the_hub_does_not_have_is_said(hub: HubServer) -> None:
    done = zppo(hub.url, *ASKED, "--student.model=us/no-config")
    assert done.returncode == 0 and "there is no config.json of us/no-config on this machine" in done.stdout
    assert "cannot be reached" not in done.stdout
    done = zppo(hub.url, *ASKED, "--student.model=us/never-was")
    assert done.returncode == 2 and "student.model: the hub has no model 'us/never-was' for you: check the name" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_is_back_is_used_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that finds none at its start may push to it at its end."""
    for library in (constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(http_client, "_found", [])
    monkeypatch.setattr(http_client, "_RESTS", (0.0,))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hold_port()}")
    assert "cannot be reached" in http_client.hub_trouble() and constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert "cannot be reached" in http_client.hub_trouble() and not hub.read  # asked a moment ago
    monkeypatch.setattr(http_client, "_GOOD_FOR", 0.0)
    assert http_client.hub_trouble() == "" and not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the user's own
    assert http_client.hub_trouble() == "HF_HUB_OFFLINE is set" and constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_not_waited_for(hub: HubServer) -> None:
    hub.close()
    done = zppo(hub.url, *ASKED, "--data.train=hub:us/questions")
    assert done.returncode == 2 and f"no copy was made earlier ({hub.url} cannot be reached: " in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    done = zppo(hub.url, *ASKED, "--student.model=us/student")
    assert done.returncode == 0 and "there is no config.json of us/student on this machine" in done.stdout and not done.stderr
    assert f"{hub.url} cannot be reached" in done.stdout and "`hf download us/student config.json`" in done.stdout
