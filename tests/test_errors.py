"""Every row of docs/errors.md: the mistake is made, through the command line, and what is said is what the table says."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pyarrow
import pytest

from error_cases import CASES, World
from zppo import cli
from zppo.config.recipe import load_recipe
from zppo.errors import ModelError, one_line
from zppo.planning.needed import check_files

DOCS = Path(__file__).parents[1] / "docs" / "errors.md"
_ROW = re.compile(r"^\| (?P<wrong>[^|]+?) \| (?P<ticks>`+) ?(?P<said>.+?) ?(?P=ticks) \| (?P<status>\d) \|$", re.MULTILINE)


def rows() -> dict[str, tuple[str, int]]:
    """What is wrong -> (what is said, exit status) of all tables."""
    text = DOCS.read_text(encoding="utf-8").replace("\\|", "\0")
    found = [(m["wrong"], m["said"].replace("\0", "|"), int(m["status"])) for m in _ROW.finditer(text)]
    assert len({wrong for wrong, _, _ in found}) == len(found)
    assert len(found) == sum(line.startswith("| ") and not line.startswith("| what is wrong") for line in text.splitlines())
    return {wrong: (said, status) for wrong, said, status in found}


def tell(text: str) -> str:
    """A message in one line."""
    return " ".join(text.split())


def as_pattern(said: str) -> str:
    """`...` in a row stands for anything: folders of the machine, long lists, a library's own words."""
    return ".*".join(re.escape(part) for part in said.split("..."))


def test_the_table_lists_exactly_what_is_tested() -> None:
    assert list(rows()) == list(CASES)


@pytest.mark.parametrize("wrong", CASES)
def test_the_message_names_value_cause_and_mend(
    wrong: str, tmp_path: Path, tiny_qwen3_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, expected = rows()[wrong]
    shutil.copytree(tiny_qwen3_dir, tmp_path / "student")
    world = World(tmp_path)
    CASES[wrong](world)
    arguments = world.arguments()
    for name, value in world.env.items():
        monkeypatch.setenv(name, value)
    before = everything(tmp_path)
    # Tests may run as root, whom no permission stops.
    monkeypatch.setattr(os, "_exit", lambda status: None)  # one of several processes would end this one
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    status = cli.main(arguments)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert re.search(as_pattern(said), tell(message)), f"{tell(message)}\nis not\n{said}"
    assert status == expected
    assert everything(tmp_path) == before, "something was written before all checks had passed"


def everything(folder: Path) -> dict[str, int]:
    """Every file and folder below, with sizes; what Python compiled on the way aside."""
    found = (p for p in folder.rglob("*") if "__pycache__" not in p.parts)
    return {str(p): p.stat().st_size if p.is_file() else -1 for p in found}


def test_the_good_recipe_trains(tmp_path: Path, tiny_qwen3_dir: Path) -> None:
    """Each row breaks this recipe in one way; unbroken it runs."""
    shutil.copytree(tiny_qwen3_dir, tmp_path / "student")
    world = World(tmp_path)
    assert cli.main(world.arguments()) == 0
    assert (world.output / "final" / "model.safetensors").is_file()


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(recipe: Path) -> None:
    settings = load_recipe(recipe, ["--student.model=models/qwen/none"])
    with pytest.raises(ModelError, match="models/qwen/none is no transformers checkpoint"):
        check_files(settings)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            pyarrow.ArrowMemoryError("malloc of size 64 failed"),
            "this machine's memory ran out (ArrowMemoryError: malloc of size 64 failed)",
        ),
        (MemoryError(), "this machine's memory ran out (MemoryError: MemoryError)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine's memory ran out (OSError: [Errno 12] Cannot allocate memory)"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "this machine's memory ran out"),
        (RuntimeError("can't start new thread"), "no thread or process can be started any more (can't start new thread)"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no thread or process can be started any more"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_machine_that_is_used_up_is_said(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("zppo.cli.train_commands._methods", fail)
    assert cli.main(["methods"]) == 2
    message = capsys.readouterr().err
    assert said in " ".join(message.split()) and "Traceback" not in message


def test_an_error_that_is_its_own_cause_is_said_and_does_not_hang() -> None:
    first, second = ValueError("the first"), RuntimeError("the second")
    first.__context__, second.__cause__ = second, first
    assert one_line(first) == "the first" and one_line(second) == "the second"
