"""Sweeps: which runs there are, that they are run once, stopped and taken up again, and what is said about them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from same_run import assert_same_run
from zppo import sweep
from zppo.cli import main
from zppo.errors import SettingsError
from zppo.report.read_run import Run
from zppo.sweep import SweepRun, outcome_table, parse_seeds, parse_vary, plan_sweep, run_all, state_of, visible_cards

RECIPES = Path(__file__).parents[1] / "recipes"
FEW = ["--train.steps=2", "--eval.every=0", "--train.checkpoint_every=1"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("train.minibatches=1,4,8", ["1", "4", "8"]),
        ("train.betas=[0.9, 0.95],[0.9, 0.999]", ["[0.9, 0.95]", "[0.9, 0.999]"]),
        ("student.template_args={a: 1, b: 2},{}", ["{a: 1, b: 2}", "{}"]),
        ("teacher.model='a,b',c", ["'a,b'", "c"]),
        ("method=zppo", ["zppo"]),
        ("--zone.threshold=0.25, 0.5", ["0.25", "0.5"]),
    ],
)
def test_values_of_a_setting(text: str, values: list[str]) -> None:
    assert parse_vary(text) == (text.removeprefix("--").partition("=")[0], values)


@pytest.mark.parametrize("text", ["train.minibatches", "=1,2", "train.minibatches=", "a=1,1", "a=1,,2", "seed=1,2", "output=a,b"])
def test_what_cannot_be_varied_is_said(text: str) -> None:
    if text == "a=1,,2":  # an empty value between commas is none
        assert parse_vary(text) == ("a", ["1", "2"])
        return
    with pytest.raises(SettingsError, match="--vary"):
        parse_vary(text)


def test_seeds() -> None:
    assert parse_seeds("0-2,5") == [0, 1, 2, 5]
    for wrong in ("x", "2-0", "1,1", "0-2,2", "", "0-9999999999"):
        with pytest.raises(SettingsError, match="--seeds"):
            parse_seeds(wrong)


def test_the_table_keeps_all_of_its_columns_at_80(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan_sweep(recipe, ["advantage.scope=none,nontrivial", "train.betas=[0.9,0.95],[0.9,0.999]"], [0, 3], FEW)
    monkeypatch.setattr(sweep, "_main_result", lambda run: ("held-out accuracy", run.accuracy))
    steps = [{"student_tokens": 12_345_678, "teacher_tokens": 1_234_567, "seconds": {"step": 7200.0}}]
    done: Any = {run.name: SimpleNamespace(steps=steps, accuracy=0.3 + run.settings.seed / 10) for run in runs}
    console = Console(width=80, file=io.StringIO())
    with console.capture() as told:
        console.print(sweep.outcome_table(runs, done))
    text = told.get()
    assert text.count("12,345,678") == text.count("1,234,567") == 4 and text.count("2.0 h") + text.count("2 h") >= 4
    assert max(map(len, text.splitlines())) <= 80


def test_a_plan_has_every_combination_under_every_seed(recipe: Path) -> None:
    runs = plan_sweep(recipe, ["train.minibatches=1,4", "zone.threshold=0.25,0.5"], [0, 3], FEW)
    assert len({run.name for run in runs}) == 8 and [run.settings.seed for run in runs] == [0] * 4 + [3] * 4
    assert runs[0].name == "minibatches=1-threshold=0.25-s0"
    assert [(r.settings.train.minibatches, r.settings.zone.threshold) for r in runs[:4]] == [(1, 0.25), (1, 0.5), (4, 0.25), (4, 0.5)]
    assert all(run.settings.train.steps == 2 for run in runs)
    # Keys of one last name are written whole; letters that no folder should have are not in names.
    names = [
        run.name
        for run in plan_sweep(recipe, ["rollout.max_new_tokens=9", "eval.max_new_tokens=8", "student.model=lab:unreachable/student"], None)
    ]
    assert names == ["rollout.max_new_tokens=9-eval.max_new_tokens=8-student.model=lab-unreachable-student-s0"]


@pytest.mark.parametrize(
    ("vary", "overrides", "words"),
    [
        (["train.minibatches=1,x"], [], "'x' does not fit"),
        (["train.minibatch=1,2"], [], "train.minibatch"),
        (["train.minibatches=1", "train.minibatches=2"], [], "twice"),
        (["student.model=a/b,a-b"], [], "two runs"),
        ([], ["--output=here"], "--out"),
    ],
)
def test_a_wrong_sweep_is_said_before_anything_runs(recipe: Path, vary: list[str], overrides: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        plan_sweep(recipe, vary, None, overrides)


@pytest.mark.parametrize(
    "vary",
    [
        "train.minibatches=1,4,8,16", "zone.threshold=0.25,0.5,0.75", "zone.rho_aug=0.125,0.25,0.5", "zone.rho_replay=0,0.25,0.5",
        "zone.buffer_capacity=100,10000", "teacher.compression.enabled=true,false", "rollout.group_size=4,8,16",
        "zone.prefix_fraction=0.2,0.4,0.6", "advantage.scope=nontrivial,all,none",
        "teacher.model=lab:unreachable/teacher,lab:reachable/teacher",
        "method=zppo,grpo-replay,grpo,hint,prefix,teacher-response,off-distill",
    ],
)  # fmt: skip
def test_every_ablation_of_the_paper_is_a_sweep(vary: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    count = len(parse_vary(vary)[1])
    assert main(["sweep", str(RECIPES / "lab.yaml"), "--vary", vary, "--seeds=0-2", "--dry-run", f"--out={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert f"{3 * count} runs" in told and told.count("to run") == 3 * count
    assert not list(tmp_path.iterdir())


def test_the_lines_of_a_slurm_array_name_the_same_runs(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = [str(recipe), "--vary=train.betas=[0.9, 0.95],[0.9, 0.999]", "--seeds=0-1", f"--out={tmp_path}", *FEW]
    assert main(["sweep", *given, "--slurm"]) == 0
    array, command, _, again = capsys.readouterr().out.splitlines()
    assert array == "#SBATCH --array=0-3"
    words = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "3"))
    assert words[:2] == ["zppo", "sweep"] and words[-1] == "--cell=3" and sorted(words[2:-1]) == sorted(given)
    assert shlex.split(again.removeprefix("# "))[2:] == words[2:-1]
    assert main([*words[1:-1], "--cell=4"]) == 2 and "0 to 3" in capsys.readouterr().err


@pytest.mark.slow
def test_each_run_has_its_card_and_its_share_of_the_cores(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher stands in for training: it writes down what it was given, and the run folder of a finished run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert visible_cards() == ["2", "5"]
    script = tmp_path / "launch.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "run = pathlib.Path(sys.argv[-1].removeprefix('--output='))\n"
        "(run / 'final').mkdir(parents=True)\n"
        "(run / 'final/README.md').touch(); (run / 'recipe.yaml').write_text('{}')\n"
        "(run / 'env').write_text(json.dumps([sys.argv[1:3], os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']]))\n"
        "time.sleep(0.5)\n"
    )
    runs = plan_sweep(recipe, ["train.minibatches=1,2,4"], None)
    told: list[str] = []

    def finished(run: SweepRun, place: Path) -> str:
        told.append(run.name)
        return "done"

    launcher = [sys.executable, str(script)]
    failed = run_all(runs, tmp_path / "sweep", finished, jobs=2, launcher=launcher, console=Console(quiet=True))
    assert failed == 0 and sorted(told) == sorted(run.name for run in runs)
    given = [json.loads((tmp_path / "sweep" / run.name / "env").read_text()) for run in runs]
    assert {tuple(words) for words, _, _ in given} == {("zppo", "train")}
    assert {card for _, card, _ in given} == {"2", "5"}
    assert {threads for _, _, threads in given} == {str(max(1, (os.cpu_count() or 1) // 2))}


@pytest.mark.slow
def test_a_sweep_is_run_once_and_compared(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(recipe), "--vary=train.minibatches=1,2", "--seeds=0", "--jobs=2", f"--out={tmp_path}", *FEW, "--method=grpo"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "2 runs" in told and "0 finished" in told and "2/2" in told
    assert [line.split()[:2] for line in told.splitlines() if re.match("[12] +1 ", line)] == [["1", "1"], ["2", "1"]]
    assert (tmp_path / "compare.html").stat().st_size > 10_000
    csv = (tmp_path / "compare.csv").read_text(encoding="utf-8")
    assert all(f"minibatches={i}-s0," in csv for i in (1, 2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == 2
    # The same command again trains nothing; with more seeds only theirs are left.
    assert main(command) == 0 and "2 finished" in capsys.readouterr().out
    assert main([*command[:3], "--seeds=0-2", *command[4:], "--dry-run"]) == 0
    assert "6 runs" in (told := capsys.readouterr().out) and told.count("to run") == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    # Other settings under the same names are an error, and nothing is overwritten.
    assert main([*command, "--train.learning_rate=0.5"]) == 2
    assert "train.learning_rate was 0.001 and is 0.5" in capsys.readouterr().err
    # A single task of an array says nothing of the others.
    assert main([*command, "--cell=0"]) == 0 and "minus the first" not in capsys.readouterr().out


def test_the_outcome_is_a_row_for_each_combination_with_intervals_over_seeds(recipe: Path) -> None:
    runs = plan_sweep(recipe, ["train.minibatches=1,4"], [0, 1, 2])
    accuracies = {"1": (0.2, 0.3, 0.4), "4": (0.5, 0.5, 0.8)}
    done = {}
    for run in runs:
        accuracy = accuracies[run.values["train.minibatches"]][run.settings.seed]
        step = {"step": 1, "accuracy": {"plain": 0.1}, "seconds": {"step": 90.0}, "student_tokens": 1000, "teacher_tokens": 0}
        final = {"event": "final", "step": 1, "accuracy": accuracy, "by_level": {}}
        done[run.name] = Run(Path(run.name), {"seed": run.settings.seed, "method": {"name": "grpo"}}, (step,), (final,), ())
    console = Console(width=120, record=True, quiet=False, file=io.StringIO())
    console.print(outcome_table(runs, done))
    rows = [line.split() for line in console.export_text().splitlines() if line[:2] in ("1 ", "4 ")]
    differences = [0.3, 0.2, 0.4]
    half = 4.303 * statistics.stdev(differences) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert rows[0][:3] == ["1", "3", "0.30"] and "1,000" in rows[0]
    assert " ".join(rows[1]).startswith("4 3 0.60 [")
    assert f"+0.30 [{0.3 - half:+.2f}, {0.3 + half:+.2f}]" in " ".join(rows[1])
    # A combination none of whose runs has finished yet has no row.
    console.print(outcome_table(runs, {name: run for name, run in done.items() if "=4" not in name}))
    assert not [line for line in console.export_text().splitlines()[6:] if line.startswith("4 ")]


def test_a_run_that_fails_leaves_the_others_and_is_run_again(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher stands in for training, which fails for two minibatches."""
    script = tmp_path / "launch.py"
    script.write_text(
        "import pathlib, sys\n"
        "print('so it is')\n"
        "run = pathlib.Path(sys.argv[-1].removeprefix('--output='))\n"
        "sys.exit(3) if 'minibatches=2' in run.name else (run / 'final').mkdir(parents=True)\n"
        "(run / 'final/README.md').touch(); (run / 'recipe.yaml').write_text('{}'); (run / 'metrics.jsonl').touch()\n"
    )
    launcher = f"--launcher={shlex.join([sys.executable, str(script)])}"
    command = ["sweep", str(recipe), "--vary=train.minibatches=1,2", f"--out={tmp_path / 'sweep'}", launcher]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "1 of 2 runs failed" in captured.err and "ended with 3" in captured.out and "minibatches=2-s0.txt" in captured.out
    assert (tmp_path / "sweep" / "minibatches=2-s0.txt").read_text() == "so it is\n"
    assert main(command) == 2 and "1/1 minibatches=2-s0" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_that_is_stopped_goes_on_and_comes_to_the_same(recipe: Path, tmp_path: Path) -> None:
    settings = ["--train.steps=8", "--train.checkpoint_every=1", "--method=grpo"]
    asked = [sys.executable, "-m", "zppo", "sweep", str(recipe), "--vary=train.minibatches=2", *settings]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen([*asked, f"--out={stopped}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while process.poll() is None and not list(stopped.glob("*/checkpoints/step-*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143 and "the same command goes on" in told and "Traceback" not in told
    (run,) = plan_sweep(recipe, ["train.minibatches=2"], None, settings)
    assert state_of(run, stopped) == "to resume"
    for folder in (stopped, whole):
        assert main([*asked[3:], f"--out={folder}"]) == 0
    assert state_of(run, stopped) == "finished"
    assert_same_run(stopped / run.name, whole / run.name)
