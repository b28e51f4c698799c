"""Inputs that somebody else made: code that a recipe names, YAML that stands for more than it says, pipes in the place of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import zppo
from zppo import cli
from zppo.config.data_settings import ColumnSettings
from zppo.config.recipe import MOST_VALUES, load_recipe, parse_yaml
from zppo.data.load import load_questions
from zppo.errors import DataError, SettingsError, TemplateError
from zppo.prompts.book import PromptBook
from zppo.runs.log import read_lines

CODE = (
    "from pathlib import Path\nPath({marker!r}).touch()\n\nclass Own:\n    kind, needs = 'own', frozenset()\n    def draft(self, *a): ...\n"
)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("--grading.reward={code}:Own", "grading.reward: "),
        ("--method.reformulations=[bcq, '{code}:Own']", "method.reformulations.1: "),
        ("--student.attention=owner/kernel", "student.attention: owner/kernel"),
    ],
)
@pytest.mark.parametrize("command", ["train", "dry run", "resume", "python"])
def test_no_code_imports_none(
    recipe: Path, tmp_path: Path, setting: str, named: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, ran, run = tmp_path / "own.py", tmp_path / "ran", tmp_path / "run"
    code.write_text(CODE.format(marker=str(ran)), encoding="utf-8")
    settings = load_recipe(recipe, ["--grading.reward=null", setting.format(code=code)])
    if command in ("train", "dry run"):
        asked = ["train", str(recipe), "--grading.reward=null", setting.format(code=code), "--no-code", f"--output={run}"]
        assert cli.main(asked + ["--dry-run"] * (command == "dry run")) == 2
    else:
        run.mkdir()
        from zppo.config.recipe import dump_recipe

        (run / "recipe.yaml").write_text(dump_recipe(settings), encoding="utf-8")
        if command == "resume":
            assert cli.main(["resume", str(run), "--no-code"]) == 2
        else:
            with pytest.raises(SettingsError, match="names code of its own"):
                zppo.resume(run, code=False)
    if command != "python":
        said = " ".join(capsys.readouterr().err.split())
        assert "names code of its own" in said and named in said and "--no-code imports none" in said
    assert not ran.exists() and [p.name for p in tmp_path.rglob("metrics.jsonl")] == []


def test_no_code_is_no_error_where_there_is_none(recipe: Path, tmp_path: Path) -> None:
    asked = ["train", str(recipe), "--grading.reward=null", "--no-code", "--dry-run", f"--output={tmp_path / 'run'}"]
    assert cli.main(asked) == 0


def bomb(leaf: str, again: str) -> str:
    lines = [f"a0: &a0 {leaf}"]
    return "\n".join([*lines, *(f"a{i}: &a{i} {again.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 12))])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb("[x, x]", "[{}]"), "stands for more than 100,000 values"),
        (bomb("{k: x}", "{{k: [{}]}}"), "stands for more than 100,000 values"),
        (bomb("{k: x}", "{{<<: [{}]}}"), "stands for more than 100,000 values"),
        ("a: &a [*a]", "stands for more than 100,000 values"),
        ("a: &a {b: *a}", "stands for more than 100,000 values"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
    ids=["lists", "mappings", "merges", "in itself", "in itself, a mapping", "depth"],
)
def test_yaml_that_stands_for_too_much(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 2
    captured = capsys.readouterr().err
    assert said in " ".join(captured.split()) and "Traceback" not in captured


@pytest.mark.slow
def test_aliases_in_measure_are_fine() -> None:
    assert parse_yaml("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}") == {"a": {"x": [1, 2]}, "b": {"x": [1, 2]}, "c": {"x": [1, 2], "y": 3}}
    assert len(parse_yaml(f"[{', '.join(['1'] * (MOST_VALUES // 2))}]")) == MOST_VALUES // 2
    assert parse_yaml("") is None


def test_pipes_and_devices_are_no_files(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody writes into the pipe: whoever opened it would wait for good."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        assert cli.main(["train", str(path)]) == 2
        assert "it is a pipe or a device, no file" in " ".join(capsys.readouterr().err.split())
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.bz2", ".csv.zst"):
        os.mkfifo(data := tmp_path / f"data{ending}")
        with pytest.raises(DataError, match="pipe or a device, no file"):
            load_questions(str(data), ColumnSettings())
    with pytest.raises(TemplateError, match="pipe or a device, no file"):
        PromptBook({"closing": pipe})
    for setting in (
        f"--student.template={pipe}",
        f"--teacher.template={pipe}",
        f"--prompts.closing={pipe}",
        f"--grading.reward={pipe}.py:x",
    ):
        assert cli.main(["train", str(recipe), setting, f"--output={tmp_path / 'run'}"]) == 2
    run = tmp_path / "theirs"
    run.mkdir()
    os.mkfifo(run / "recipe.yaml")
    assert cli.main(["resume", str(run)]) == 2
    assert cli.main(["report", str(run)]) == 2
    os.mkfifo(run / "metrics.jsonl")
    assert read_lines(run / "metrics.jsonl") == []


@pytest.mark.slow
def test_a_pipe_in_a_run_folder_is_said(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Deep inside, and where a resumed run would open it before its first step."""
    assert cli.main(["train", str(recipe), "--train.steps=1", "--train.checkpoint_every=1", f"--output={tmp_path / 'run'}"]) == 0
    state = next((tmp_path / "run").glob("checkpoints/*/*.json"))
    for path in (tmp_path / "run" / "metrics.jsonl", state):
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        for command in ("resume", "report"):
            capsys.readouterr()
            assert cli.main([command, str(tmp_path / "run")]) == 2
            assert f"{path.name} cannot be read: it is a pipe or a device" in " ".join(capsys.readouterr().err.split())
        path.unlink()
        path.write_bytes(kept)
