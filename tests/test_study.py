"""Studies: a grid that is run once, and the numbers that its tables show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.errors import DataError, SettingsError
from zppo.lab.study import Cell, graduated_share, grid, overrides_of, print_study, run_study, study_tables
from zppo.report.bootstrap import mean_interval, paired_difference

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.long
def test_a_study_runs_every_cell_once(recipe: Path, tmp_path: Path) -> None:
    """Through real processes; the second call finds every row, and a later one adds to them."""
    rows, work, extra = tmp_path / "rows.jsonl", tmp_path / "work", ["--train.steps=1"]
    cells = list(grid([recipe], ["grpo", "zppo"], [3], []))
    assert run_study(cells[:1], rows, jobs=2, work=work, extra=extra) == 0
    first = rows.read_text(encoding="utf-8")
    assert list(work.iterdir()) == []  # runs are not kept
    assert run_study(cells, rows, jobs=1, work=work, extra=extra) == 0
    later = rows.read_text(encoding="utf-8")
    assert later.startswith(first)
    found = [json.loads(line) for line in later.splitlines()]
    assert [(r["method"], r["seed"], r["steps"]) for r in found] == [("grpo", 3, 1), ("zppo", 3, 1)]
    zppo = found[1]
    assert zppo["rollouts"] > 32 and zppo["teacher_tokens"] > 0 and set(zppo["after"]) == {"a", "b"}


@pytest.mark.long
def test_a_cell_that_fails_is_told_and_run_again(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    failed = run_study([Cell(recipe, "grpo", 0)], rows, jobs=1, work=tmp_path / "work", extra=["--rollout.max_new_tokens=99999"])
    assert failed == 1 and not rows.exists()
    assert "context" in (tmp_path / "work" / "recipe-grpo-s0.txt").read_text(encoding="utf-8")
    assert "ended with 2" in " ".join(capsys.readouterr().out.split())


def test_a_matched_cost_run_takes_zppo_s_rollouts_by_more_steps(recipe: Path) -> None:
    settings = load_recipe(recipe)
    overrides = overrides_of(Cell(recipe, "grpo-matched", 1, "lab:x/student"), settings)
    assert {"--method=grpo", "--seed=1", "--student.model=lab:x/student"} <= set(overrides)
    assert not any(o.startswith("--data.") for o in overrides)  # questions of a file are taken as they are
    lab = load_recipe(RECIPES / "lab.yaml")
    assert {"--data.train=lab:unreachable/seen", "--data.eval=lab:unreachable/study"} <= set(
        overrides_of(Cell(RECIPES / "lab.yaml", "zppo", 0), lab)
    )
    assert {"--data.train=lab:x/seen", "--data.eval=lab:x/study"} <= set(
        overrides_of(Cell(RECIPES / "lab.yaml", "zppo", 0, "lab:x/student"), lab)
    )
    assert f"--train.steps={math.ceil(5 * (1 + 0.25 + 0.5))}" in overrides
    with pytest.raises(SettingsError, match="'gpro' is no method"):
        list(grid([recipe], ["gpro"], [0], []))


def row(method: str, seed: int, hard: float, graduated: int = 1) -> dict[str, object]:
    return {
        "recipe": "lab",
        "method": method,
        "seed": seed,
        "student": "",
        "before": {"hard": 0.0},
        "after": {"hard": hard},
        "admitted": {"0": 4, "0.125": 2},
        "graduated": {"0": graduated},
        "entropy": 0.5,
        "student_tokens": 10,
        "teacher_tokens": 5,
        "seconds": 1.0,
    }


def test_tables_hold_means_and_paired_differences(tmp_path: Path) -> None:
    rows = [row("grpo-replay", s, 0.1 * s) for s in (1, 2, 3)] + [row("zppo", s, 0.1 * s + 0.3, graduated=3) for s in (2, 3, 9)]
    outcome, difference = study_tables(rows)
    lines = {line[0]: line for line in outcome[2]}
    assert lines["grpo-replay"][1:3] == ["3", str(mean_interval([0.1, 0.2, 0.3])).replace("+", "")]
    assert lines["zppo"][3].startswith("0.75")
    assert difference[2] == [["zppo", "2", str(mean_interval([0.3, 0.3]))]]  # seeds 2 and 3 have both
    assert graduated_share(rows[0]) == 0.25
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    console = Console(record=True, width=200)
    print_study(path, console, markdown=True)
    assert "| zppo | 2 | +0.30" in console.export_text()
    with pytest.raises(DataError, match="no rows"):
        print_study(tmp_path / "none.jsonl", console)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 5, 8):
        means = [mean_interval(list(rng.normal(1.0, 2.0, n))) for _ in range(2000)]
        assert 0.935 < sum(m.low <= 1.0 <= m.high for m in means) / len(means) < 0.965
    assert math.isnan(mean_interval([1.0]).low) and math.isnan(mean_interval([]).value)
    assert paired_difference({"0": 1.0, "1": 2.0}, {"1": 0.5}).value == 1.5


def test_the_command_refuses_odd_seeds(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    assert main(["lab", "study", str(recipe), "--seeds=a-b"]) == 2
    assert "0-7" in capsys.readouterr().err
