"""One process trains into a run folder at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from test_resume import SHORT, UPDATE, contents
from victims import Victims
from zppo.errors import CheckpointError
from zppo.runs import lock
from zppo.runs.files import LOCK, check_output
from zppo.runs.lock import locked

HOLD = """
import os, sys
from pathlib import Path
from zppo.runs.lock import locked
with locked(Path(sys.argv[1]), lambda text: None):
    if os.fork() == 0:  # a helper that outlives it
        sys.stdout.close()
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdin and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.slow
def test_two_of_them_do_not_train_into_one_folder(victims: Victims, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["train", recipe, *SHORT, "--train.steps=2", f"--output={run}"]
    assert victims.run(*train, run=run, at=UPDATE, nth=6) < 0
    assert json.loads((run / LOCK).read_text())["host"] == socket.gethostname()  # left by the kill
    with holder(run) as other:
        before = contents(run)
        assert victims.run("resume", run, run=run) == 2
        assert f"is trained by process {other.pid} on {socket.gethostname()}, since 0 min, and two would spoil it" in victims.said
        assert contents(run) == before
        other.kill()
        other.wait()
        assert victims.run("resume", run, run=run) == 0, victims.said
    assert f"process {other.pid} on {socket.gethostname()}" in victims.said and "its lock is taken over" in victims.said
    assert not (run / LOCK).exists()


@pytest.mark.slow
def test_a_new_run_takes_it_as_well(victims: Victims, recipe: Path, tmp_path: Path) -> None:
    """Somebody else begins a run there while the models of this one are loaded."""
    run = tmp_path / "run"
    run.mkdir()
    with holder(run):
        assert victims.run("train", recipe, *SHORT, f"--output={run}", run=run) == 2
        assert "is trained by process" in victims.said and not (run / "recipe.yaml").exists()
    check_output(run)  # a lock alone is no run


def test_it_is_held_once_in_a_process_too(tmp_path: Path) -> None:
    with locked(tmp_path, pytest.fail):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(CheckpointError, match=f"by process {os.getpid()} on"), locked(tmp_path, pytest.fail):
            pass
    with locked(tmp_path, pytest.fail):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 3}'])
def test_a_torn_lock_is_nobodys(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.0)
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_another_machine_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock may not be seen here; that it touches the file is."""
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": 0.0}), encoding="utf-8")
    said: list[str] = []

    def touched(seconds: float) -> None:
        os.utime(path, (1.0, 1.0))

    monkeypatch.setattr("time.sleep", touched)
    with pytest.raises(CheckpointError, match="is trained by process 7 on elsewhere"), locked(tmp_path, said.append):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.01)
    with locked(tmp_path, said.append):
        pass
    assert "for 60 s it is watched" in said[0] and said[-1].startswith("process 7 on elsewhere") and "taken over" in said[-1]


def test_the_holder_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[Any] = []
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.001)
    monkeypatch.setattr(lock.os, "utime", touched.append)
    with locked(tmp_path, pytest.fail):
        while len(touched) < 2:
            pass
