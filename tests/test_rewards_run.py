"""Several reward functions in a run through the command line: what is logged of each, what is solved, late ones, the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.state import AcceleratorState

from same_run import records
from zppo.cli import main
from zppo.config.recipe import load_recipe

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[1] / "recipes"
REWARDS = '''
import asyncio
import re


class Accuracy:
    """As people have it for TRL; `level` is no name of a right answer."""

    def __call__(self, completions, ground_truth, completion_ids, trainer_state, log_metric, **columns):
        assert all(completion_ids) and trainer_state.max_steps == 2
        log_metric("finished", trainer_state.global_step)
        found = [re.search(r"boxed{(.*?)}", text) for text in completions]
        return [float(match is not None and match[1].strip() == gold) for match, gold in zip(found, ground_truth)]


async def brevity(completion, question):
    await asyncio.sleep(0)
    if len(completion) % 7 == 3:
        await asyncio.Event().wait()  # for ever
    return -min(len(completion), 1000) / 1000


def closed(completion, question):
    return None if "<think>" not in completion else float("</think>" in completion)
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "mine.py").write_text(REWARDS, encoding="utf-8")
    specs = ", ".join(f"{folder / 'mine.py'}:{name}" for name in ("Accuracy", "brevity", "closed"))
    small = ("--train.steps=2", "--rollout.batch_size=8", "--eval.every=1", "--data.eval_limit=4", "--train.device=cpu")
    rewards = (f"--grading.reward=[{specs}]", "--grading.reward_weights=[1, 0.5, 0.25]", "--grading.reward_deadline=0.5")
    assert main(["train", str(RECIPES / "lab.yaml"), *small, *rewards, f"--output={folder / 'run'}"]) == 0
    return folder / "run"


def test_each_is_logged_by_its_name(run: Path) -> None:
    steps = [r for r in records(run) if r["event"] == "step"]
    assert len(steps) == 2
    for record in steps:
        rows = pq.read_table(run / "rollouts" / f"step-{record['step']:06d}.parquet").to_pylist()
        given = [json.loads(row["rewards"]) if row["rewards"] else {} for row in rows]
        for name in ("Accuracy", "brevity", "closed"):
            values = [rewards[name] for rewards in given if name in rewards]
            assert record["rewards"][name] == pytest.approx(sum(values) / len(values))
        assert record["reward_metrics"] == {"finished": record["step"] - 1}
        assert record["reward_timeouts"] >= record["ungraded"] > 0  # the teacher's are among the former
    evaluations = [r for r in records(run) if r["event"] == "eval"]
    assert all("Accuracy" in r["rewards"] for r in evaluations)
    assert [r["reward_metrics"]["finished"] for r in evaluations] == [r["step"] for r in evaluations]


def test_the_weighted_sum_is_the_reward_and_the_first_says_what_is_solved(run: Path) -> None:
    rows = [row for path in sorted((run / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()]
    solved = 0
    for row in rows:
        given = json.loads(row["rewards"])
        late = len(row["completion"]) % 7 == 3
        assert row["graded"] != late and ("brevity" in given) != late
        if late:
            assert (row["reason"], row["reward"], row["advantage"], row["correct"]) == ("reward timeout", 0.0, 0.0, False)
            continue
        total = math.fsum(weight * given.get(name, 0.0) for name, weight in (("Accuracy", 1.0), ("brevity", 0.5), ("closed", 0.25)))
        assert row["reward"] == pytest.approx(total) and row["correct"] == (given["Accuracy"] == 1.0)
        solved += row["correct"]
    assert 0 < solved < len(rows)
    assert any(row["kind"] == "bcq" for row in rows)  # responses of the teacher were graded too


def test_the_recipe_of_the_run_names_them(run: Path) -> None:
    grading = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["grading"]
    assert [spec.rpartition(":")[2] for spec in grading["reward"]] == ["Accuracy", "brevity", "closed"]
    assert all(Path(spec.rpartition(":")[0]).is_absolute() for spec in grading["reward"]) and grading["reward_weights"] == [1.0, 0.5, 0.25]
    assert set(load_recipe(run / "recipe.yaml").own_code) == {f"grading.reward.{i}" for i in range(3)}
    assert main(["resume", str(run), "--no-code"]) == 2


def test_the_report_and_inspect_show_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Reward functions" in page and "brevity" in page
    capsys.readouterr()
    rows = pq.read_table(run / "rollouts" / "step-000001.parquet").to_pylist()
    shown = next(row for row in rows if row["graded"] and row["kind"] == "plain")
    assert main(["inspect", str(run), shown["question_id"]]) == 0
    assert "(Accuracy " in " ".join(capsys.readouterr().out.split())
