"""Killed, stopped and starved runs: real processes die, the disk fills up, checkpoints rot, and the resumed run is the same."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from conftest import CHAT_TEMPLATE, make_tiny
from same_run import assert_same_run, records
from victims import FILES, Victims
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.core.replay import Changes
from zppo.core.types import Group as RolloutGroup
from zppo.core.types import ImageRef, Message, Prompt, Question, Rollout
from zppo.errors import CheckpointError, Interrupted, StorageError
from zppo.models.student_model import load_model
from zppo.runs import checkpoint
from zppo.runs.files import MANIFEST, make_manifest, write_whole
from zppo.runs.log import RunLog
from zppo.runs.signals import Stop, catch_signals
from zppo.step_log import StepLog
from zppo.teacher.compression import Source
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling
from zppo.train.learner import PartialUpdate, UpdateCounts
from zppo.train.mid_step import MidStep, StepRollouts
from zppo.train.provenance import changes_since, origin_of

UPDATE = "torch.optim:AdamW.step"
SAMPLE = "zppo.rollout.student:StudentSampler.rollout"
MANIFEST_MADE = "zppo.runs.checkpoint:make_manifest"
FINAL_MADE = "zppo.train.finish:save_final"
SEED = 20
SHORT = [
    "--rollout.max_new_tokens=6",
    "--eval.max_new_tokens=6",
    "--teacher.rollout.max_new_tokens=4",
    "--teacher.compression.enabled=false",
    "--data.eval_limit=2",
]
"""Nothing here depends on how long completions are."""

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(victims: Victims, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run: 5 steps of 8 of 20 questions, so the second epoch begins in step 3."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert victims.run("train", recipe, *SHORT, f"--output={run}", run=run) == 0, victims.said
    return run


class Run:
    """A run that is started, and resumed again and again."""

    def __init__(self, victims: Victims, recipe: Path, folder: Path) -> None:
        self.victims, self.recipe, self.folder = victims, recipe, folder

    def go(self, **fate: Any) -> int:
        start = ["resume", self.folder] if (self.folder / "recipe.yaml").exists() else self.start
        return self.victims.run(*start, run=self.folder, **fate)

    @property
    def start(self) -> list[object]:
        return ["train", self.recipe, *SHORT, f"--output={self.folder}"]

    @property
    def said(self) -> str:
        return self.victims.said

    def checkpoints(self) -> list[str]:
        return [p.name for p in checkpoint.existing(self.folder)]


@pytest.fixture
def run(victims: Victims, recipe: Path, tmp_path: Path) -> Run:
    return Run(victims, recipe, tmp_path / "run")


@slow
def test_kills_at_random_moments(run: Run, whole: Path) -> None:
    """SIGKILL at random operations on files and after random times: again and again, until the run comes to its end by itself."""
    rng = random.Random(SEED)
    kills = 0
    for by_file in (True, True, False, True, False, True):
        status = run.go(**({"at": FILES, "nth": rng.randrange(1, 60)} if by_file else {"seconds": rng.uniform(0.1, 0.8)}))
        kills += status == -signal.SIGKILL
        if status == 0:
            break
        assert status == -signal.SIGKILL, run.said
    assert kills >= 2
    assert run.go() == 0, run.said
    assert_same_run(whole, run.folder)


PLACES = [
    ("teacher", "zppo.rollout.teacher:TeacherSampler.ask", 2),
    ("checkpoint, before its manifest", MANIFEST_MADE, 1),
    ("checkpoint, before it counts", "zppo.runs.checkpoint:_remove_partial", 2),
    ("second epoch, between two updates", UPDATE, 7),
    ("a checkpoint's files", "zppo.runs.checkpoint:sync", 3),
    ("old checkpoints go", "shutil:rmtree", 2),
    ("rewinding", "zppo.runs.log:write_whole", 2),
    ("final", "zppo.train.finish:sync", 2),
    ("final's evaluation", "zppo.train.finish:evaluate_held_out", 1),
    ("final's card", "zppo.train.finish:finish_final", 1),
]


@slow
def test_a_kill_at_each_kind_of_place(run: Run, whole: Path) -> None:
    """One run, killed at every place of the list, one after the other."""
    for name, at, nth in PLACES:
        assert run.go(at=at, nth=nth) == -signal.SIGKILL, f"{name}: {run.said}"
    assert run.go() == 0, run.said
    assert_same_run(whole, run.folder)


@slow
def test_a_signal_saves_the_state_that_it_finds(run: Run, whole: Path) -> None:
    """SIGTERM or Ctrl-C: while sampling, between two updates, before the first update, in an evaluation, while a checkpoint is written."""
    assert run.go(at=SAMPLE, nth=1, do="term") == 143  # before training: the first evaluation
    assert f"`zppo resume {run.folder}` starts over" in run.said and not run.checkpoints()
    assert run.go(at=SAMPLE, nth=3, do="int") == 130  # the reformulated prompts of step 1
    assert run.said.endswith(f"`zppo resume {run.folder}` starts over") and not run.checkpoints()
    assert run.go(at=UPDATE, nth=3, do="hup") == 129
    assert run.checkpoints() == ["step-000000+3"]
    assert run.said.endswith(f"`zppo resume {run.folder}`") and "step-000000+3" in run.said
    assert run.go(at=UPDATE, nth=3, do="int") == 130  # the last update of step 1 and two of step 2
    assert "step 0 of 5 and 3 updates" in run.said
    assert run.checkpoints() == ["step-000000+3", "step-000001+2"]
    assert run.go(at="zppo.train.policy_gradient:step_advantages", do="term") == 143  # nothing moved: it is saved already
    assert run.checkpoints() == ["step-000000+3", "step-000001+2"]
    assert run.go(at=MANIFEST_MADE, do="term") == 143  # the checkpoint of step 2 is finished first
    assert run.checkpoints() == ["step-000001+2", "step-000002"]
    assert run.go(at="zppo.train.policy_gradient:step_advantages", do="int") == 130  # step 3 is sampled, and no update is done
    assert run.checkpoints() == ["step-000002", "step-000002+0"]
    assert run.go(at="zppo.train.trainer:evaluate_held_out", do="term") == 143  # after step 4, before its checkpoint
    assert run.checkpoints() == ["step-000002+0", "step-000004"]
    assert run.go(at=FINAL_MADE, do="term") == 143
    assert run.go() == 0, run.said
    assert_same_run(whole, run.folder)


@slow
def test_adapters_are_stopped_and_killed_like_all_weights(run: Run, tmp_path: Path) -> None:
    lora = ["--train.lora={rank: 2}", "--train.steps=2", "--data.eval=null"]
    whole = tmp_path / "whole"
    assert run.victims.run("train", run.recipe, *SHORT, *lora, f"--output={whole}", run=whole) == 0, run.said
    assert run.victims.run(*run.start, *lora, run=run.folder, at=UPDATE, nth=6, do="term") == 143
    assert run.checkpoints() == ["step-000001+2"]
    assert run.go(at="zppo.train.finish:write_model_card") == -signal.SIGKILL  # they are merged into the weights by then
    assert run.go() == 0, run.said
    assert records(whole) == records(run.folder)
    names = [p.relative_to(whole) for p in (whole / "final").rglob("*.safetensors")]
    assert len(names) == 2 and all((whole / n).read_bytes() == (run.folder / n).read_bytes() for n in names)


@slow
def test_a_second_ctrl_c_ends_at_once(run: Run) -> None:
    assert run.go(at=UPDATE, nth=2, do="int-twice") == 130
    assert not run.checkpoints() and "Ctrl-C again ends at once" in run.said


WRITERS = [
    ("metrics.jsonl", "zppo.runs.log:RunLog.metrics", 2),
    ("buffer.jsonl", "zppo.runs.log:RunLog.buffer", 1),
    ("rollouts/step-000002.parquet", "zppo.runs.log:RunLog.rollouts", 2),
    ("checkpoints/step-000002", "zppo.runs.checkpoint:saving", 1),
    ("checkpoints/step-000004", "torch:save", 2),
    ("final.partial", FINAL_MADE, 1),
    ("README.md", "zppo.train.finish:write_model_card", 1),
]


@slow
def test_a_full_disk_stops_the_run_with_nothing_lost(run: Run, whole: Path) -> None:
    """One run whose disk fills up at every writer, one after the other; each time space is made and the run goes on."""
    for name, at, nth in WRITERS:
        before = run.checkpoints()
        assert run.go(at=at, nth=nth, do="full") == 2, f"{name}: {run.said}"
        assert f"{name} cannot be written: File too large" in run.said, run.said
        assert f"`zppo resume {run.folder}`" in run.said and "Traceback" not in run.said
        assert set(before) <= set(run.checkpoints()) or len(run.checkpoints()) == 2
        assert not list(run.folder.rglob("step-*.partial"))
    assert run.go() == 0, run.said
    assert_same_run(whole, run.folder)


@slow
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(run: Run, whole: Path) -> None:
    shutil.copytree(whole, run.folder)
    shutil.rmtree(run.folder / "final")
    newest = run.folder / "checkpoints" / "step-000005"
    flip(newest / "model" / "model.safetensors")
    assert run.go() == 0, run.said
    assert "model/model.safetensors holds" in run.said
    assert "step 4 of 5" in run.said and newest.with_name("step-000005.damaged").is_dir()
    shutil.rmtree(newest.with_name("step-000005.damaged"))
    assert_same_run(whole, run.folder)


@slow
def test_a_checkpoint_with_a_total_that_is_gone_still_loads(run: Run, whole: Path) -> None:
    shutil.copytree(whole, run.folder)
    shutil.rmtree(run.folder / "final")
    shutil.rmtree(run.folder / "checkpoints" / "step-000005")
    newest = run.folder / "checkpoints" / "step-000004"
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    state["totals"]["teacher_unused_tokens"] = 0
    (newest / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (newest / MANIFEST).write_text(make_manifest(newest), encoding="utf-8")
    assert run.go() == 0, run.said
    assert_same_run(whole, run.folder)


@slow
def test_no_whole_checkpoint_is_an_error_and_nothing_is_removed(run: Run, whole: Path) -> None:
    shutil.copytree(whole, run.folder)
    shutil.rmtree(run.folder / "final")
    (run.folder / "checkpoints" / "step-000004" / MANIFEST).unlink()
    (run.folder / "checkpoints" / "step-000005" / "state.json").write_text("{", encoding="utf-8")
    before = contents(run.folder)
    assert run.go() == 2
    assert "step-000004: manifest.json " in run.said and "step-000005: state.json has 1 bytes" in run.said
    assert contents(run.folder) == before


@slow
def test_an_unreliable_teacher_loses_nothing_and_says_nothing_twice(run: Run) -> None:
    """Its answers are new ones each time, as a remote teacher's are: the run is another, and still whole."""
    teacher = "test_resume:moody"
    for fate in ({"at": UPDATE, "nth": 6}, {"at": SAMPLE, "nth": 3}, {"at": UPDATE, "nth": 3, "do": "term"}):
        assert run.go(teacher=teacher, **fate) in (-signal.SIGKILL, 143), run.said
    assert run.go(teacher=teacher) == 0, run.said
    steps = [r for r in records(run.folder) if r["event"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records(run.folder) if r["event"] == "eval"] == [0, 2, 4]
    for record in steps:
        rows = pq.read_table(run.folder / "rollouts" / f"step-{record['step']:06d}.parquet").to_pylist()
        assert len(rows) == record["rollouts"]
        assert len({(r["kind"], r["question_id"], r["rollout"]) for r in rows}) == len(rows)
    held: set[str] = set()
    for event in records(run.folder, "buffer.jsonl"):
        (held.add if event["event"] == "admitted" else held.remove)(event["id"])
    assert len(held) == steps[-1]["buffer"]


def moody(self: object, requests: list[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
    """A teacher whose answers nobody can foresee; one in five does not come."""

    def text() -> str | None:
        number = int.from_bytes(os.urandom(2), "big")
        return None if number % 5 == 0 else f"It is \\boxed{{{number}}}"

    return [TeacherReply(tuple(text() for _ in request.keys), prompt_tokens=1, completion_tokens=1) for request in requests]


@slow
def test_changes_since_the_checkpoint_are_said_or_refused(
    whole: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another learning rate and other questions are said; another student and another method are refused; a rotten optimizer too."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "final")
    own = recipe.parent
    text = (run / "recipe.yaml").read_text(encoding="utf-8")

    def resume(*edits: tuple[str, str]) -> tuple[int, str]:
        changed = text
        for old, new in edits:
            assert old in changed
            changed = changed.replace(old, new)
        (run / "recipe.yaml").write_text(changed, encoding="utf-8")
        AcceleratorState._reset_state(True)
        status = main(["resume", str(run)])
        captured = capsys.readouterr()
        return status, " ".join((captured.out + captured.err).split())

    make_tiny(tmp_path / "small", num_hidden_layers=1)
    status, said = resume((str(own / "student"), str(tmp_path / "small")))
    assert status == 2 and "num_hidden_layers 2, not 1" in said
    status, said = resume(("name: zppo", "name: grpo-replay"))
    assert status == 2 and "'zppo'" in said and "'grpo-replay'" in said
    newest = run / "checkpoints" / "step-000005"
    kept = (newest / "optimizer.pt").read_bytes()
    torch.save(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict(), newest / "optimizer.pt")
    (newest / MANIFEST).write_text(make_manifest(newest), encoding="utf-8")
    status, said = resume()
    assert status == 2 and "optimizer.pt" in said
    (newest / "optimizer.pt").write_bytes(kept)
    (newest / MANIFEST).write_text(make_manifest(newest), encoding="utf-8")
    lines = (own / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-1]), encoding="utf-8")
    edits = [(f"train: {own / 'questions.jsonl'}", f"train: {tmp_path / 'fewer.jsonl'}")]
    status, said = resume(*edits, ("learning_rate: 0.001", "learning_rate: 0.002"))
    assert status == 0 and "train.learning_rate was 0.001, is 0.002" in said
    assert "training questions" in said and "20 then, 19 now" in said


@slow
@pytest.mark.parametrize("loss", ["deaf", "full-stdout"])
def test_a_run_that_nobody_can_read_goes_on(run: Run, whole: Path, loss: str) -> None:
    """`| head`, a tee that died, a full disk behind its output: it goes on without a display and ends with its result."""
    assert run.go(at=UPDATE, nth=2, do=loss) == 0, run.said
    assert "nothing can be shown any more" in run.said and "Traceback" not in run.said
    assert_same_run(whole, run.folder)


@slow
def test_an_error_in_the_display_costs_the_display_alone(
    run: Run, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise KeyError("width")

    for name in ("step", "evaluation", "at_step", "part"):
        monkeypatch.setattr(f"zppo.runs.display.Progress.{name}", fail)
    AcceleratorState._reset_state(True)
    assert main([str(a) for a in run.start]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("could not be shown (KeyError: 'width'); the run goes on") == 1
    assert_same_run(whole, run.folder)


@slow
def test_an_error_in_a_steps_report_costs_that_report_alone(
    run: Run, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 is learnt from when its report fails, and step 2 was the last checkpoint: step 3 is saved, and 4 comes next."""
    from zppo.train import trainer

    right = trainer.step_metrics

    def fail(rollouts: Any, updated: Any, log: StepLog, threshold: float) -> dict[str, Any]:
        if log.step == 3:
            raise ZeroDivisionError("a report")
        return right(rollouts, updated, log, threshold)

    monkeypatch.setattr(trainer, "step_metrics", fail)
    AcceleratorState._reset_state(True)
    assert main([str(a) for a in run.start]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err and run.checkpoints()[-1] == "step-000003"
    assert run.go() == 0 and "resumed after step 3 of 5" in run.said
    ours, theirs = (load_file(r / "final" / "model.safetensors") for r in (run.folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@slow
def test_an_edited_optimizer_acts(whole: Path, tmp_path: Path) -> None:
    """A resume with other settings takes the steps that an optimizer made by them takes, on the moments of the checkpoint."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    edits = {"learning_rate: 0.001": "learning_rate: 0.5", "weight_decay: 0.1": "weight_decay: 0.0", "adam_eps: 1.0e-08": "adam_eps: 0.1"}
    edit_recipe(run, edits | {"steps: 5": "steps: 6", "- 0.9\n": "- 0.7\n"})
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 0
    (group,) = torch.load(run / "checkpoints" / "step-000006" / "optimizer.pt", weights_only=True)["param_groups"]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.7, 0.999), 0.1, 0.0)
    before, after = (load_file(r / "final" / "model.safetensors") for r in (whole, run))
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 0.05


@slow
def test_a_finished_run_with_more_steps_trains_on(run: Run, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And comes to the end that it would have had with these steps from the start."""
    assert run.victims.run(*run.start, "--train.steps=2", run=run.folder) == 0, run.said
    assert run.go() == 0 and "is finished already" in run.said
    edit_recipe(run.folder, {"steps: 2": "steps: 5"})
    assert run.go(at=UPDATE, nth=3, do="term") == 143 and run.checkpoints()[-1] == "step-000002+3"
    assert "train.steps was 2, is 5" in run.said
    assert run.go() == 0, run.said
    assert_same_run(whole, run.folder)
    assert run.go() == 0 and "is finished already" in run.said


class Unsaved:
    """A model of no interest."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()


def edit_recipe(run: Path, edits: dict[str, str]) -> None:
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    for old, new in edits.items():
        assert old in text, text
        text = text.replace(old, new)
    (run / "recipe.yaml").write_text(text, encoding="utf-8")


def test_one_group_of_moments_is_dealt_out_to_the_groups_of_today(tmp_path: Path) -> None:
    """A checkpoint of a vision-language student from before its parts had groups: the parameters stand in another order now."""
    layers = torch.nn.ModuleList(torch.nn.Linear(n, 1) for n in (2, 3, 4))
    trained = list(layers.parameters())
    one = torch.optim.AdamW(trained, lr=1.0)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    one.step()
    folder = checkpoint.save(tmp_path, 1, Unsaved(), one, {}, keep=1)
    several = torch.optim.AdamW(
        cast(Any, [{"params": [*layers[2].parameters()], "lr": 0.5}, {"params": [*layers[0].parameters(), *layers[1].parameters()]}])
    )
    checkpoint.load_optimizer(folder, several, trained)
    assert [group["lr"] for group in several.param_groups] == [0.5, 1e-3]
    assert all(torch.equal(one.state[p][name], several.state[p][name]) for p in trained for name in ("exp_avg", "exp_avg_sq", "step"))
    fewer = torch.optim.AdamW([{"params": [trained[0]]}, {"params": [trained[1]]}])
    with pytest.raises(CheckpointError, match="does not fit the student.*over 6 weights, and 2 are trained"):
        checkpoint.load_optimizer(folder, fewer, trained[:2])


@slow
def test_an_error_before_the_updates_costs_no_finished_step(run: Run, recipe: Path, whole: Path, tmp_path: Path) -> None:
    """A reward function of the user's that breaks in step 4: the three steps before it are saved."""
    function = tmp_path / "reward.py"
    good = (recipe.parent / "reward.py").read_text(encoding="utf-8")
    function.write_text(good + TIRED.format(run=run.folder), encoding="utf-8")
    assert run.victims.run(*run.start, f"--grading.reward={function}:reward", run=run.folder) == 2
    assert run.checkpoints() == ["step-000002", "step-000003"] and "tired" in run.said
    assert f"the run is saved in {run.folder / 'checkpoints' / 'step-000003'}" in run.said
    function.write_text(good, encoding="utf-8")
    assert run.go() == 0, run.said
    assert_same_run(whole, run.folder)


TIRED = """
from pathlib import Path

right = reward

def reward(completion, question):
    if Path("{run}", "rollouts", "step-000003.parquet").exists():
        raise RuntimeError("tired")
    return right(completion, question)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def kept(tiny_qwen3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 3 and 4, and of two updates of step 4; read only."""
    run = tmp_path_factory.mktemp("kept")
    model = load_model(tiny_qwen3_dir, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for step, updates in ((2, None), (3, None), (3, 2), (4, None)):
        checkpoint.save(run, step, model, optimizer, {"so": "on"}, keep=3, updates=updates)
    return run


def test_checkpoints_stand_in_the_order_of_training_and_old_ones_go(kept: Path) -> None:
    assert [p.name for p in checkpoint.existing(kept)] == ["step-000003", "step-000003+2", "step-000004"]
    newest, damaged = checkpoint.newest_good(kept)
    assert newest is not None and newest.name == "step-000004" and damaged == {}
    assert checkpoint.load_state(newest) == {"step": 4, "updates": None, "so": "on"}
    assert checkpoint.newest_good(kept / "nowhere") == (None, {})


@pytest.mark.parametrize(
    ("name", "harm", "told"),
    [
        ("optimizer.pt", lambda p: p.write_bytes(p.read_bytes()[:-1]), "optimizer.pt has"),
        ("optimizer.pt", lambda p: p.write_bytes(b""), "optimizer.pt has 0 bytes, and"),
        ("optimizer.pt", flip, "optimizer.pt holds"),
        ("model/model.safetensors", Path.unlink, "model/model.safetensors is missing"),
        ("model/config.json", flip, "model/config.json holds"),
        ("state.json", lambda p: (p.unlink(), p.mkdir()), "state.json "),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, lambda p: p.write_text("{"), "manifest.json is damaged"),
        (MANIFEST, lambda p: p.write_bytes(b"\xff\x00"), "manifest.json is damaged"),
        (MANIFEST, lambda p: p.write_text('{"files": {}}'), "manifest.json does not name optimizer.pt"),
        (MANIFEST, lambda p: p.write_text(p.read_text().replace("state.json", "../../x")), "manifest.json does not name"),
        (MANIFEST, lambda p: p.write_text(p.read_text().replace("model/config", "../../x")), "outside of the checkpoint"),
    ],
)
def test_every_damage_is_found_and_named(kept: Path, tmp_path: Path, name: str, harm: Any, told: str) -> None:
    run = Path(shutil.copytree(kept, tmp_path / "run"))
    newest = run / "checkpoints" / "step-000004"
    harm(newest / name)
    found, damaged = checkpoint.newest_good(run)
    assert found is not None and found.name == "step-000003+2"
    assert list(damaged) == [newest] and told in damaged[newest]
    assert checkpoint.set_aside(newest).name == "step-000004.damaged"
    assert checkpoint.newest_good(run) == (found, {})


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_never_runs_code(kept: Path, tmp_path: Path) -> None:
    """Somebody put a pickle that runs a command in the optimizer's place, with a manifest that fits."""
    folder = Path(shutil.copytree(kept / "checkpoints" / "step-000004", tmp_path / "step-000004"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    for write in (pickle.dump, torch.save):
        with open(folder / "optimizer.pt", "wb") as file:
            write({"state": Payload(f"touch {tmp_path / 'executed'}")}, file)
        (folder / MANIFEST).write_text(make_manifest(folder), encoding="utf-8")
        with pytest.raises(CheckpointError, match="cannot be used"):
            checkpoint.load_optimizer(folder, optimizer)
    assert not (tmp_path / "executed").exists()


def test_a_manifest_needs_no_threads(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    folder = kept / "checkpoints" / "step-000004"
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert make_manifest(folder) == (folder / MANIFEST).read_text(encoding="utf-8")
    assert checkpoint.newest_good(kept) == (folder, {})


def test_an_optimizer_of_other_shapes_is_refused(kept: Path) -> None:
    model = torch.nn.ParameterList(
        torch.nn.Parameter(torch.ones(3))
        for _ in torch.load(kept / "checkpoints" / "step-000004" / "optimizer.pt", weights_only=True)["state"]
    )
    with pytest.raises(CheckpointError, match="another recipe"):
        checkpoint.load_optimizer(kept / "checkpoints" / "step-000004", torch.optim.AdamW(model))


def test_what_the_disk_refuses_names_path_and_cause(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where a folder should be; a read-only disk is played, as these tests may run as root."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("rollouts", "checkpoints", "buffer.jsonl"):
        (run / name).write_text("", encoding="utf-8")
    log = RunLog(run)
    with pytest.raises(StorageError, match="run cannot be written: File exists"):
        log.open()
    with pytest.raises(StorageError, match=r"rollouts/step-000001.parquet cannot be written: Not a directory"):
        log.rollouts(1, [], [], replayed=frozenset(), entry_accuracy={}, show=str)
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(StorageError, match=r"checkpoints/step-000001 cannot be written: Not a directory"):
        checkpoint.save(run, 1, layer, torch.optim.AdamW(layer.parameters()), {}, keep=1)  # type: ignore[arg-type]
    write_whole(run / "text", "old")

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError, match="metrics.jsonl cannot be written: Read-only file system"):
        log.metrics(1, "step", {})
    with pytest.raises(StorageError, match="buffer.jsonl cannot be written"):
        log.buffer(1, Changes())
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StorageError, match="text cannot be written"):
        write_whole(run / "text", "new")
    monkeypatch.undo()
    assert (run / "text").read_text(encoding="utf-8") == "old"


def test_rewinding_keeps_what_belongs_to_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.open()
    for step, event in ((0, "eval"), (1, "step"), (2, "step"), (2, "eval"), (3, "step"), (3, "final")):
        log.metrics(step, event, {})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2, "event": "step"}')  # torn before the end of its line
    (tmp_path / "rollouts" / "step-000003.partial").write_bytes(b"torn")
    foreign = [tmp_path / "rollouts" / name for name in ("notes.txt", "step-000003 copy.parquet")]
    for path in foreign:
        path.write_text("mine", encoding="utf-8")
    log.rewind(3, 2)
    events = [(r["step"], r["event"]) for r in records(tmp_path)]
    assert events == [(0, "eval"), (1, "step"), (2, "step"), (2, "eval"), (3, "step")]
    log.rewind(2, 0)  # a checkpoint that was made before the evaluation of its step
    assert [(r["step"], r["event"]) for r in records(tmp_path)] == [(0, "eval"), (1, "step"), (2, "step")]
    log.rewind(-1, -1)
    assert records(tmp_path) == [] and sorted((tmp_path / "rollouts").iterdir()) == foreign


def collected_step() -> MidStep:
    """A step with everything in it that is hard to store."""
    odd = 'a "quote"\n\ud800 \U0001f600 \x00'
    question = Question("q/1", (Message("system", odd), Message("user", "2 + 2 = ?")), "4", (ImageRef("a.png", "00"),), "easy")
    nan = float("nan")

    def group(kind: str, forced: tuple[int, ...], *lengths: int) -> RolloutGroup:
        prompt = Prompt(kind, question, question.messages, (1, 2, 3), True, question.images, forced, {"listed": ["5", odd]})
        rollouts = [
            Rollout(
                torch.arange(n),
                torch.randn(n) if n % 2 else torch.full((n,), nan),
                odd,
                None if n % 2 else "4",
                n % 2 == 0,
                0.1 * n,
                n > 2,
                n != 3,
                "why",
                nan if n % 2 else 0.3,
            )
            for n in lengths
        ]
        return RolloutGroup(prompt, tuple(rollouts))

    plain, reformulated = [group("plain", (), 1, 2)], [group("bcq", (7, 8), 3, 4)]
    responses: dict[str, tuple[Source, ...]] = {"q/1": (Source(odd, None, 2, 0.5, True),)}
    log = StepLog(4, {"asked": 1.0, "none": None}, errors={"teacher": "no answer"})
    log.resume_clock({"step": 1.5, "sampling": 1.0})
    partial = PartialUpdate(2, UpdateCounts(losses=[0.1, nan], tokens=5, gap_max=1e-30), [torch.randn(n) for n in (1, 2, 3, 4)])
    return MidStep(StepRollouts(1, ("q/1",), plain, reformulated, responses), log, partial)


def test_a_stopped_step_comes_back_as_it_was(tmp_path: Path) -> None:
    before = collected_step()
    before.write(tmp_path)
    after = MidStep.read(tmp_path, 4)
    assert after is not None and after.log.elapsed()["step"] > 1.5
    before.log._began = after.log._began
    assert plain_form(after) == plain_form(before)
    assert MidStep.read(tmp_path / "nowhere", 4) is None
    facts = json.loads((tmp_path / "halfway.json").read_text(encoding="utf-8"))
    older = facts | {"zone_metrics": {"asked": 1.0}, "counts": {"none": None}}  # in two parts
    (tmp_path / "halfway.json").write_text(json.dumps(older), encoding="utf-8")
    read = MidStep.read(tmp_path, 4)
    assert read is not None and read.log.counts == before.log.counts
    for harm in ({"done": None, "groups": []}, {"old": [1, -1, 10]}, {"tally": {"unknown": 1}}):
        (tmp_path / "halfway.json").write_text(json.dumps(facts | harm), encoding="utf-8")
        with pytest.raises(CheckpointError, match="cannot be used"):
            MidStep.read(tmp_path, 4)


def plain_form(value: Any) -> Any:
    """Nested dicts and lists that compare equal where all fields do, NaN and the bits of tensors included."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.numpy().tobytes()
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain_form(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: plain_form(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [plain_form(below) for below in value]
    return repr(value)


def test_what_changed_since_a_checkpoint(recipe: Path, tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher"))
    config = load_model(tiny_qwen3_dir, dtype=torch.float32).config
    question = Question("a", (Message("user", "?"),), "1")

    def origin(*overrides: str, gold: str = "1", processes: int = 1) -> dict[str, Any]:
        settings = load_recipe(recipe, [f"--teacher.model={teacher}", *overrides])
        made = origin_of(settings, [Question("a", question.messages, gold)], config, processes)
        return json.loads(json.dumps(made))

    then, where = origin(), Path("step-000001")
    assert changes_since(then, origin("--output=elsewhere"), where, mid_step=True) == []
    (note,) = changes_since(then, origin("--train.minibatches=2"), where, mid_step=False)
    assert note == "train.minibatches was 4, is 2"
    ours = (
        "--rollout.temperature=0.5",
        "--rollout.top_p=0.5",
        "--zone.threshold=0.25",
        "--loss.clip_low=0.1",
        "--train.old_logprobs=forward",
        "--data.images.min_pixels=1024",
        "--data.images.max_pixels=600000",
    )
    for override in ("--train.minibatches=2", "--seed=3", "--advantage.scope=all", "--loss.mask_truncated=true", *ours):
        with pytest.raises(CheckpointError, match="stopped between two updates"):
            changes_since(then, origin(override), where, mid_step=True)
    assert changes_since(then, origin("--train.learning_rate=1"), where, mid_step=True) == ["train.learning_rate was 0.001, is 1.0"]
    # A method is all that it resolves to, not its name.
    for override, said in (
        ("--method.control=placebo", "'zppo' with control 'none', and the recipe says 'zppo' with 'placebo'"),
        ("--method.replay=false", "'zppo' with replay True, and the recipe says 'zppo' with False"),
        ("--method.reformulations=[bcq]", r"reformulations \['bcq', 'ncq'\], and the recipe says 'zppo' with \['bcq'\]"),
        ("--method.name=grpo", "'zppo', and the recipe says 'grpo': put the method back"),
    ):
        for earlier in (then, then | {"method": "zppo"}):  # earlier versions wrote the name alone
            with pytest.raises(CheckpointError, match=f"was made by the method .*{said}"):
                changes_since(earlier, origin(override), where, mid_step=False)
    assert changes_since(then, origin("--method.replay=true"), where, mid_step=False) == ["method.replay was None, is True"]  # as it was
    versions = then | {"versions": then["versions"] | {"torch": "1.0", "gone": "2.0"}}
    notes = changes_since(versions, origin(), where, mid_step=False)
    assert sorted(notes) == ["gone was 2.0, is None", f"torch was 1.0, is {then['versions']['torch']}"]
    (note,) = changes_since(then, origin(gold="2"), where, mid_step=True)
    assert note.startswith("the training questions ")
    (note,) = changes_since(then, origin(processes=2), where, mid_step=False)
    assert note.startswith("1 processes ") and " 2 " in note
    old = origin()
    old["recipe"]["rollout"] |= {"min_p": 0.0, "repetition_penalty": 1.0}
    old["recipe"]["advantage"] |= {"eps": 1e-8}
    assert changes_since(old, origin(), where, mid_step=True) == []
    old["recipe"]["rollout"] |= {"min_p": 0.1}
    assert changes_since(old, origin(), where, mid_step=True) == ["rollout.min_p was 0.1, is None"]
    older = origin()  # than settings of today: what it does not have was as the default is
    for name in ("filters", "duplicates"):
        del older["recipe"]["data"][name]
    assert changes_since(older, origin(), where, mid_step=True) == []
    assert changes_since(older, origin("--data.duplicates=one"), where, mid_step=True) == ["data.duplicates was keep, is one"]
    flip(teacher / "model.safetensors")
    (note,) = changes_since(then, origin(), where, mid_step=True)
    assert note.startswith("the files of the teacher 1 ")


@slow
def test_the_users_own_words_are_kept_with_the_run(run: Run, recipe: Path, tmp_path: Path) -> None:
    """Templates that are edited or gone between start and resume change nothing; edited copies, code and folders are said."""
    words = {
        "prompts.closing": tmp_path / "mine.jinja",
        "student.template": tmp_path / "chat.jinja",
        "teacher.template": tmp_path / "chat.jinja",
    }
    words["prompts.closing"].write_bytes(b"Answer in a box.\r\n")
    words["student.template"].write_text(CHAT_TEMPLATE + "{# mine #}", encoding="utf-8")
    reward = Path(shutil.copy(recipe.parent / "reward.py", tmp_path / "reward.py"))
    own = [f"--{key}={path}" for key, path in words.items()] + [f"--grading.reward={reward}:reward"]
    assert run.victims.run(*run.start, *own, run=run.folder, at=UPDATE, nth=10, do="term") == 143, run.said
    for path in {*words.values()}:
        path.unlink()
    kept = run.folder / "words"
    assert {p.name for p in kept.iterdir()} == {f"{key}.jinja" for key in words}
    assert (kept / "prompts.closing.jinja").read_bytes() == b"Answer in a box.\r\n"
    assert run.go(at=UPDATE, nth=3, do="term") == 143 and "since the checkpoint" not in run.said, run.said
    moved = run.folder.rename(run.folder.with_name("moved"))
    run.folder = moved
    with open(kept.parent.with_name("moved") / "words" / "prompts.closing.jinja", "a", encoding="utf-8") as file:
        file.write("Be brief.")
    reward.write_text(reward.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    assert run.go() == 0, run.said
    said = "the words of prompts.closing are not the same as before; the code of grading.reward is not the same as before."
    assert f"since the checkpoint: {said}" in run.said
    prompts = pq.read_table(moved / "rollouts" / "step-000005.parquet")["prompt"].to_pylist()
    assert all("Answer in a box." in prompt and "Be brief." in prompt for prompt in prompts)


def test_a_wish_to_stop_waits_for_the_end_of_a_shield() -> None:
    stop, seen = Stop(), []
    stop.check()
    with pytest.raises(Interrupted) as caught, stop.shield():
        with stop.shield():
            stop.request(signal.SIGTERM)
            stop.request(signal.SIGINT)
            stop.check()
        seen.append("inner")
        with stop.ignored():
            seen.append("ignored")
        seen.append("outer")
    assert seen == ["inner", "ignored", "outer"] and caught.value.signum == signal.SIGTERM
    with pytest.raises(ValueError), stop.shield():
        raise ValueError


def test_signals_are_caught_in_the_main_thread_and_given_back() -> None:
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals(stop):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        with stop.ignored():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers send it twice
            os.kill(os.getpid(), signal.SIGINT)  # and pass on a terminal's Ctrl-C
            assert stop.wanted and stop.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with catch_signals(Stop()), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGHUP)
    before_hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    stop = Stop()
    with catch_signals(stop):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.wanted
    signal.signal(signal.SIGHUP, before_hup)
    with catch_signals(Stop()):
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the second one does not end what saves the run
    seen: list[object] = []

    def elsewhere() -> None:
        with catch_signals(Stop()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before[0]]
