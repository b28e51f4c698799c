"""What names stand for: schemes, bundled models, run folders; objects by import path are in test_grading_reward.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zppo.errors import ModelError, SettingsError
from zppo.lab.questions import ASSETS, bundled_questions
from zppo.names import MODELS, QUESTIONS, checkpoint_folder, load_object, model_folder, scheme_of


def test_paths_and_addresses_have_no_scheme() -> None:
    assert scheme_of("lab:unreachable/train") == "lab" and scheme_of("reasoning_gym:x?size=1") == "reasoning_gym"
    for name in ("train.jsonl", "./lab:x", "C:/train.jsonl", "/a/b:c.jsonl", "a/lab:x", "http://host:8000/v1", "Qwen/Q"):
        assert scheme_of(name) == ""


def test_models(tmp_path: Path) -> None:
    assert model_folder("lab:unreachable/student") == str(ASSETS / "unreachable" / "student")
    for name in ("Qwen/Qwen3-1.7B", str(tmp_path), "./x", "owner:name", "http://host/v1"):
        assert model_folder(name) == checkpoint_folder(name) == name
    with pytest.raises(ModelError, match="no bundled model 'lab:nowhere/student' .known: .*lab:reachable/student"):
        model_folder("lab:nowhere/student")


def test_a_run_stands_for_what_it_trained_once_it_is_finished(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").touch()
    assert checkpoint_folder(str(tmp_path)) == str(tmp_path / "final") and model_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "config.json").touch()  # a checkpoint with something called final/ in it
    assert checkpoint_folder(str(tmp_path)) == str(tmp_path)


def test_questions_of_the_lab() -> None:
    assert bundled_questions("lab:unreachable/test")
    with pytest.raises(SettingsError, match="'lab:unreachable' names no split; write lab:unreachable/train"):
        bundled_questions("lab:unreachable")


@pytest.mark.parametrize("path", [*MODELS.values(), *QUESTIONS.values()])
def test_what_stands_behind_a_scheme_is_there(path: str) -> None:
    assert load_object(path, "scheme", ModelError)


def test_asking_for_names_imports_nothing_heavy() -> None:
    code = "import sys, zppo.names as n; n.model_folder('a/b'); print([m for m in sys.modules if m.startswith('zppo')])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split("[")[1] == "'zppo', 'zppo.errors', 'zppo.names']\n"
