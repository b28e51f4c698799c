"""Runs that die: told from slow starts and hard data, stopped, and gone on with from before that (`train.stop_on_collapse`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.config.settings import TrainSettings
from zppo.distributed.parallel import ReplicatedWeights
from zppo.models.student_model import Student
from zppo.runs import checkpoint
from zppo.runs.log import read_lines
from zppo.train.checkpointer import Checkpointer
from zppo.train.health_checks import CollapseWatch, HealthChecks

RECIPES = Path(__file__).parents[1] / "recipes"


def step_of(plain: float, *, share: float | None = None, groups: int = 40, bcq: float = 0.0) -> dict[str, Any]:
    """A line of metrics.jsonl, as far as it says whether anything was right."""
    share = (0.3 if plain or bcq else 0.0) if share is None else share
    return {"accuracy": {"plain": plain, "bcq": bcq}, "nonzero_advantage_share": share, "new_questions": groups, "replayed_questions": 0}


def watched(lines: Sequence[dict[str, Any]], **options: Any) -> tuple[int | None, CollapseWatch]:
    """The step at which these steps end as collapsed, None where they do not."""
    watch = CollapseWatch(**options)
    for step, line in enumerate(lines, 1):
        watch.see(step, line)
        if watch.steps:
            return step, watch
    return None, watch


LEARNING = [step_of(0.2 + 0.05 * i) for i in range(8)]
DEAD = step_of(0.0)


def test_a_run_that_falls_to_nothing_has_collapsed_after_three_steps_and_what_was_before_its_fatal_update_is_good() -> None:
    step, watch = watched([*LEARNING, *[DEAD] * 20])
    assert step == 11 and watch.steps == (9, 11)
    assert watch.good == 7  # the update of step 8 killed it: it is what step 9 sampled from
    assert watch.before == pytest.approx(sum(line["accuracy"]["plain"] for line in LEARNING) / 8)


def test_weights_on_their_way_down_are_not_good() -> None:
    falling = [step_of(plain) for plain in (0.5, 0.5, 0.5, 0.4, 0.2, 0.1, 0.05)]
    assert watched([*falling, *[DEAD] * 20])[1].good == 3  # 0.4 in the fourth step; 0.2 is less than half


@pytest.mark.parametrize(
    "lines",
    [
        [DEAD] * 200,  # a slow start
        [*[DEAD] * 100, *LEARNING, DEAD, DEAD, *LEARNING],  # and two bad steps later
        [*LEARNING, *[DEAD, DEAD, step_of(0.01)] * 20],  # something is right now and then
        [*LEARNING, *[step_of(0.0, bcq=0.1)] * 50],  # BCQ can carry it back
        [*LEARNING, *[step_of(0.0, share=0.1)] * 50],  # rewards that differ, though nothing is right
        [*LEARNING, *[step_of(1.0, share=0.0)] * 50],  # it is done
        [*LEARNING, *[{**DEAD, "accuracy": {}}] * 50],  # nobody grades
        [*LEARNING, *[{"accuracy": 0.0, "truncated": 0.0}] * 50],  # evaluations
        [*LEARNING, *[step_of(0.0, groups=2)] * 5],  # ten questions are few
    ],
)
def test_what_is_no_collapse(lines: list[dict[str, Any]]) -> None:
    assert watched(lines)[0] is None


def test_distillation_has_a_gradient_where_nothing_is_right() -> None:
    assert watched([*LEARNING, *[DEAD] * 50], advantages=False)[0] is None


@pytest.mark.parametrize(("rate", "questions"), [(0.02, 40), (0.05, 8), (0.1, 8), (0.3, 4), (0.02, 400)])
def test_hard_data_and_small_batches_are_no_collapse(rate: float, questions: int) -> None:
    """Questions that are solved always or never, the most that accuracies of steps can vary: 2,000 steps, and none is taken for a fall."""
    rng = random.Random(0)
    drawn = (sum(rng.random() < rate for _ in range(questions)) / questions for _ in range(2000))
    assert watched([step_of(plain, groups=questions) for plain in drawn])[0] is None


def test_a_small_batch_has_collapsed_after_more_steps() -> None:
    step, watch = watched([*[step_of(0.25, groups=4)] * 30, *[step_of(0.0, groups=4)] * 30])
    assert step == 30 + 13 and 0.75 ** (4 * 12) > 1e-6 > 0.75 ** (4 * 13)  # 52 groups
    assert watch.good == 29


def test_a_fall_is_told_before_it_is_over() -> None:
    adviser = HealthChecks(own_reward=False)
    lines = [*[step_of(0.6)] * 20, *[step_of(plain) for plain in (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)]]
    told = [text for step, line in enumerate(lines, 1) for text in adviser.advice(step, line)]
    assert len(told) == 1 and told[0].startswith("step 25: plain accuracy fell from 60% to 25%")
    assert "checkpoints after step 22 away" in told[0] and "train.learning_rate" in told[0]
    noisy = [step_of(plain, groups=4) for plain in (0.5, 0.25, 0.75, 0.25, 0.0, 0.25, 0.25, 0.0, 0.5)] * 20
    adviser = HealthChecks(own_reward=False)
    assert not [text for step, line in enumerate(noisy, 1) for text in adviser.advice(step, line)]


def test_without_a_gradient_a_student_that_has_fallen_is_not_told_to_take_easier_questions() -> None:
    adviser = HealthChecks(own_reward=False)
    for step, line in enumerate(LEARNING, 1):
        assert adviser.advice(step, line) == []
    told = [text for step in (9, 10, 11) for text in adviser.advice(step, DEAD)]
    assert any("solves nothing any more, of which it solved 38% before" in text for text in told), told
    assert not any("start with questions" in text for text in told)


DYING = (
    (0.69, 0.050), (0.37, 0.127), (0.34, 0.177), (0.20, 0.259), (0.02, 0.369),  # measured: a rate six times too large
)  # fmt: skip


def test_an_entropy_that_runs_away_while_accuracy_falls_is_told_before_the_end() -> None:
    adviser = HealthChecks(own_reward=False)
    lines = [*[step_of(0.64) | {"entropy": 0.067}] * 20, *[step_of(plain) | {"entropy": entropy} for plain, entropy in DYING]]
    told = [text for step, line in enumerate(lines, 1) for text in adviser.advice(step, line)]
    assert [text.split(":")[0] for text in told] == ["step 24", "step 24"] and lines[23]["accuracy"]["plain"] == 0.2
    assert "plain accuracy fell from 64% to 30%" in told[0] and "the entropy rose from 0.07 to 0.14 nats a token" in told[1]
    exploring = [step_of(0.3 + 0.01 * i) | {"entropy": 0.05 + 0.01 * i} for i in range(40)]
    adviser = HealthChecks(own_reward=False)
    assert not [text for step, line in enumerate(exploring, 1) for text in adviser.advice(step, line)]


class Weights(torch.nn.Linear):
    """Something to save."""

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "weights").write_text("1")


@pytest.mark.parametrize("background", [False, True])
def test_the_checkpoint_from_before_a_fall_outlives_newer_ones_until_there_is_a_better_one(tmp_path: Path, background: bool) -> None:
    model = Weights(1, 1)
    settings = TrainSettings(keep_checkpoints=2, checkpoint_in_background=background)
    write = Checkpointer(
        settings, tmp_path, Student(cast(Any, model), None), torch.optim.AdamW(model.parameters()), {}, ReplicatedWeights()
    )

    def names() -> list[str]:
        write.wait()
        return [path.name for path in checkpoint.existing(tmp_path)]

    for step in range(1, 8):
        write.good = min(step - 1, 3)  # nothing is right from step 5 on
        write(step, {}, None, later=True)
    assert names() == ["step-000003", "step-000006", "step-000007"]
    write.good = 6
    write(8, {}, None, later=True)
    assert names() == ["step-000006", "step-000007", "step-000008"][-3:]
    write.good = 6
    assert write.back_to_good() == checkpoint.place(tmp_path, 6) and names() == ["step-000006"]
    aside = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert aside == ["step-000006", "step-000007.collapsed", "step-000008.collapsed"]


def test_updates_of_the_next_step_are_not_from_before_it(tmp_path: Path) -> None:
    model = Weights(1, 1)
    for step, updates in ((2, None), (3, None), (3, 2), (4, None)):
        checkpoint.save(tmp_path, step, model, torch.optim.AdamW(model.parameters()), {}, keep=9, updates=updates)
    assert [path.name for path in checkpoint.up_to(tmp_path, 3)] == ["step-000002", "step-000003"]
    assert [path.name for path in checkpoint.up_to(tmp_path, 4)] == ["step-000002", "step-000003", "step-000003+2", "step-000004"]


SMALL = [
    "--method=grpo",
    "--rollout.batch_size=16",
    "--rollout.group_size=4",
    "--data.eval=null",
    "--train.checkpoint_every=1",
    "--train.keep_checkpoints=2",
]


@pytest.mark.long
def test_a_run_that_dies_is_stopped_and_goes_on_from_before_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lab's student, whose third update is a thousand times too large."""
    run = tmp_path / "run"
    assert main(["train", str(RECIPES / "lab.yaml"), f"--output={run}", *SMALL, "--train.steps=2"]) == 0
    edit(run, learning_rate=0.5, steps=40)
    capsys.readouterr()
    assert main(["resume", str(run)]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    steps = accuracies(run)
    assert min(steps[:3]) > 0.1 and steps[3:] == [0.0] * len(steps[3:]) and 6 <= len(steps) < 20
    assert f"the run has collapsed: nothing was right in steps 4 to {len(steps)}" in said
    assert "train.learning_rate: 0.5" in said and "step-000002 is from before that" in said
    assert f"the run is saved in {run}/checkpoints/step-000002; continue with" in said
    assert [path.name for path in checkpoint.existing(run)] == ["step-000002"]
    edit(run, learning_rate=5e-4, steps=4)
    assert main(["resume", str(run)]) == 0
    assert "resumed after step 2 of 4" in capsys.readouterr().out
    assert len(accuracies(run)) == 4 and min(accuracies(run)) > 0.1
    assert (run / "final" / "config.json").exists()


def test_a_study_lets_dead_runs_go_on() -> None:
    from zppo.lab.study import Cell, overrides_of

    recipe = RECIPES / "lab.yaml"
    assert load_recipe(recipe).train.stop_on_collapse
    assert not load_recipe(recipe, overrides_of(Cell(recipe, "zppo", 0), load_recipe(recipe))).train.stop_on_collapse


def edit(run: Path, **changes: Any) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"] |= changes
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def accuracies(run: Path) -> list[float]:
    return [line["accuracy"]["plain"] for line in read_lines(run / "metrics.jsonl") if line["event"] == "step"]
