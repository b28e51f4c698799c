"""What people's terminals are: other encodings than UTF-8, widths that are none; every command that prints still says all it has to say."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from report_runs import invented_run, rows_of
from zppo.api import fit_output
from zppo.cli import main

RECIPES = Path(__file__).parents[1] / "recipes"
ENCODINGS = ("ascii", "latin-1", "cp1252", "koi8-r")
WIDTHS = ("", "10", "wide", *(pytest.param(width, marks=pytest.mark.long) for width in ("0", "00", "1", "-5", "²", "100000")))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented_run(tmp_path_factory.mktemp("runs") / "läufe →", steps=2)


def commands(run: Path) -> list[list[str]]:
    return [
        ["methods"],
        ["report", str(run), "--figures", "none"],
        ["inspect", str(run), rows_of(run)[0]["question_id"]],
        ["lab", "questions", "--n", "3"],
        ["cost", "--paper"],
        ["cost", str(RECIPES / "lab.yaml")],
        ["train", str(RECIPES / "lab.yaml"), "--dry-run"],
        ["compare", str(run), str(run)],
        ["resume", str(run / "nö →")],
    ]


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, command: list[str], errors: str = "strict") -> tuple[int, str]:
    """Status and all that was printed to streams of such an encoding."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", out)
        status = main(command)
        out.flush()
    return status, out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_prints_in_every_encoding(run_folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    for command in commands(run_folder):
        expected = 2 if command[0] in ("compare", "resume") else 0
        for errors in ("strict", "surrogateescape"):  # the second one is Python's where the locale is C
            status, text = printed(monkeypatch, encoding, command, errors)
            assert (status, "Traceback" in text) == (expected, False), text
            assert text.strip()


def test_what_an_encoding_does_not_have_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = printed(monkeypatch, "utf-8", ["lab", "questions", "--n", "2"])[1]
    assert "→" in whole
    assert printed(monkeypatch, "ascii", ["lab", "questions", "--n", "2"])[1] == whole.replace("→", "\\u2192")
    # A file name that is no UTF-8 comes as half a surrogate.
    status, text = printed(monkeypatch, "utf-8", ["resume", "no\udcff"])
    assert status == 2 and "no\\udcff" in text
    # Who chose another way of writing them keeps it.
    assert "?" in printed(monkeypatch, "ascii", ["lab", "questions", "--n", "2"], "replace")[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_hides_what_is_said(run_folder: Path, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    for command in commands(run_folder):
        with monkeypatch.context() as patched:
            patched.setenv("COLUMNS", "1000")
            status, whole = printed(patched, "utf-8", command)
            patched.setenv("COLUMNS", width)
            patched.setenv("LINES", width)
            assert printed(patched, "utf-8", command)[0] == status
            text = printed(patched, "utf-8", command)[1]
        assert len(letters(text)) > 0.7 * len(letters(whole)), text


def test_methods_are_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    assert "…" not in printed(monkeypatch, "utf-8", ["methods"])[1]


def test_a_stream_that_is_no_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's has no encoding either
    monkeypatch.setattr(sys, "stderr", None)
    fit_output()


def test_a_process_in_the_c_locale(tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "0"}
    command = [sys.executable, "-m", "zppo", "lab", "questions", "--n", "1"]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, b"") and b"\\u2192" in done.stdout
