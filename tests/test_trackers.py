"""Trackers: what is logged under which name and step, resume, and that a tracker that fails never stops a run."""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zppo.cli import main
from zppo.config.settings import TrackerName
from zppo.errors import SettingsError
from zppo.runs import trackers as module
from zppo.runs.tracker_kinds import KINDS, Opening
from zppo.runs.trackers import COLUMNS, Trackers, flatten, sample_rows

STEPS = ("--train.steps=4", "--eval.every=2")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(True)
    from accelerate import PartialState

    PartialState(cpu=True)  # accelerate's trackers ask it which process they are in


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **behaviour: Any) -> list[tuple[Any, ...]]:
    """A package in the place of wandb or trackio that keeps what it is called with; `behaviour` replaces its functions."""
    calls: list[tuple[Any, ...]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", values, step))
            if "log" in behaviour:
                behaviour["log"](values, step)

        def finish(self) -> None:
            calls.append(("finish",))
            if "finish" in behaviour:
                behaviour["finish"]()

    def init(**given: Any) -> Run:
        calls.append(("init", given))
        if "init" in behaviour:
            behaviour["init"]()
        return Run()

    package = ModuleType(name)
    package.init = init  # type: ignore[attr-defined]
    package.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, package)
    return calls


def fail(text: str) -> Callable[..., None]:
    def failing(*_: Any) -> None:
        raise ConnectionError(text)

    return failing


# --- names ----------------------------------------------------------------------------------------------------------


def test_flattened_names() -> None:
    values = {"loss": 0.5, "accuracy": {"plain": 1, "bcq": None}, "on": True, "text": "x", "bad": float("nan")}
    assert dict(flatten(values)) == {"loss": 0.5, "accuracy/plain": 1.0, "on": 1.0}
    assert dict(flatten(values, "eval/")) == {"eval/loss": 0.5, "eval/accuracy/plain": 1.0, "eval/on": 1.0}


@given(
    st.recursive(
        st.none() | st.floats() | st.integers(-(2**70), 2**70) | st.text(),
        lambda inner: st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_anything_flattens_to_finite_numbers(value: Any) -> None:
    flat = dict(flatten({"x": value}))
    assert all(isinstance(v, float) and abs(v) != float("inf") and v == v and k.startswith("x") for k, v in flat.items())


# --- TensorBoard, whole runs ----------------------------------------------------------------------------------------


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(run: Path, event: str, *path: str) -> list[tuple[int, Any]]:
    found = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        value = record = json.loads(line)
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if record["event"] == event and value is not None:
            found.append((record["step"], pytest.approx(value, rel=1e-6)))
    assert found
    return found


def assert_logged(run: Path) -> None:
    logged = scalars(run)
    assert logged["accuracy/plain"] == expected(run, "step", "accuracy", "plain")
    assert logged["loss"] == expected(run, "step", "loss")
    assert logged["buffer"] == expected(run, "step", "buffer")
    assert logged["seconds/sampling"] == expected(run, "step", "seconds", "sampling")
    assert logged["eval/accuracy"] == expected(run, "eval", "accuracy")
    assert logged["eval/by_level/a"] == expected(run, "eval", "by_level", "a")
    assert logged["final/accuracy"] == expected(run, "final", "accuracy")


@pytest.mark.slow
def test_tensorboard_gets_the_numbers_and_a_resumed_run_goes_on_at_its_step(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [str(recipe), f"--output={run}", "--train.trackers=[tensorboard]", *STEPS, "--train.checkpoint_every=1"]
    assert main(["train", *command, "--train.keep_checkpoints=4"]) == 0
    assert_logged(run)
    assert [step for step, _ in scalars(run)["loss"]] == [1, 2, 3, 4]
    shutil.rmtree(run / "final")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 0
    assert_logged(run)  # each step once, with the numbers (times too) of the run that stands


@pytest.mark.slow
def test_a_tracker_that_fails_costs_a_warning_and_never_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """wandb fails at every log and at the end; trackio and TensorBoard go on beside it. No secret of the environment is shown."""
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-of-the-user")
    broken = stand_in(monkeypatch, "wandb", log=fail("no route, key s3cr3t-of-the-user"), finish=fail("gone"))
    sound = stand_in(monkeypatch, "trackio")
    run = tmp_path / "run"
    named = ["--train.trackers=[wandb, tensorboard, trackio]", "--train.tracker_project=mine", "--data.eval=null"]
    assert main(["train", str(recipe), f"--output={run}", *named, "--train.steps=4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "step 1: tracker wandb failed and is tried again: ConnectionError: no route, key <WANDB_API_KEY>" in said
    assert "step 3: tracker wandb failed and is left out from now on" in said
    assert [call[2] for call in broken if call[0] == "log"] == [1, 2, 3]
    assert [call[2] for call in sound if call[0] == "log"] == [1, 2, 3, 4] and sound[-1] == ("finish",)
    identity = json.loads((run / "trackers.json").read_text(encoding="utf-8"))["id"]
    assert broken[0] == ("init", {"project": "mine", "name": "run", "id": identity, "resume": "never"})
    assert sound[0] == ("init", {"project": "mine", "name": f"run-{identity}", "resume": "never"})
    assert scalars(run)["loss"] == expected(run, "step", "loss")
    assert sound[1][1]["loss"] == expected(run, "step", "loss")[0][1]
    for path in run.rglob("*"):
        assert path.is_dir() or b"s3cr3t" not in path.read_bytes()
    shutil.rmtree(run / "final")
    broken.clear(), sound.clear()
    stand_in(monkeypatch, "wandb", init=fail("no network"))
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 0  # a run that goes on does not hang on a tracker's server
    assert "tracker wandb cannot start: ConnectionError: no network. The run goes on without it" in " ".join(
        capsys.readouterr().out.split()
    )
    assert sound[0][1] == {"project": "mine", "name": f"run-{identity}", "resume": "allow"}


# --- start and end --------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_or_cannot_start_stops_a_new_run_before_anything_is_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    monkeypatch.setitem(sys.modules, "trackio", None)
    named = "--train.trackers=[tensorboard, trackio]"
    assert main(["train", str(recipe), f"--output={run}", named]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "train.trackers names trackio, not installed here: `pip install trackio`" in said
    stand_in(monkeypatch, "wandb", init=fail("not logged in"))
    assert main(["train", str(recipe), f"--output={run}", "--train.trackers=[tensorboard, wandb]"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "tracker wandb cannot start: ConnectionError: not logged in" in said and "wandb login" in said
    assert not run.exists()


def test_what_has_started_is_closed_where_another_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stand_in(monkeypatch, "trackio")
    stand_in(monkeypatch, "wandb", init=fail("no"))
    with pytest.raises(SettingsError, match="wandb cannot start"):
        Trackers(("trackio", "wandb"), "p", tmp_path / "run", print).start()
    assert first[-1] == ("finish",)


def test_a_run_that_goes_on_finds_its_name_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "wandb")
    run = tmp_path / "run"
    Trackers(("wandb",), "p", run, print).start()
    Trackers(("wandb",), "p", run, print).start(7)
    assert calls[0][1]["id"] == calls[1][1]["id"] and calls[1][1]["resume"] == "allow"
    (run / "trackers.json").write_text("[1]", encoding="utf-8")  # damaged: a new name, not a stop
    Trackers(("wandb",), "p", run, print).start(7)
    assert calls[2][1]["id"] != calls[0][1]["id"]


def test_an_upload_that_does_not_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released, said = threading.Event(), list[str]()
    stand_in(monkeypatch, "wandb", finish=lambda: released.wait(120))
    monkeypatch.setattr(module, "FINISH_SECONDS", 0.2)
    trackers = Trackers(("wandb",), "p", tmp_path, said.append)
    trackers.start()
    trackers.finish()
    assert said == ["tracker wandb is still busy after 0.2 s and is not waited for"]
    released.set()


# --- completions, and trackers of every kind ------------------------------------------------------------------------


def rows_of(step: int) -> list[dict[str, Any]]:
    """Rows as rollouts/*.parquet has them, of two kinds."""
    row = dict.fromkeys(COLUMNS, None) | {"step": step, "prompt": "1 | 1?\n<b>", "gold": "2", "correct": True, "graded": True}
    return [row | {"kind": kind, "question_id": f"q{i}", "completion": f"{i} " * 9} for kind in ("plain", "bcq") for i in range(5)]


def test_a_table_holds_a_few_completions_of_each_kind_the_same_each_time() -> None:
    rows = rows_of(3)
    chosen = sample_rows(3, rows, 2)
    assert [row[1] for row in chosen] == ["plain", "plain", "bcq", "bcq"] and all(row[0] == 3 for row in chosen)
    assert len({(row[1], row[2]) for row in chosen}) == 4
    assert sample_rows(3, rows, 2) == chosen != sample_rows(4, rows, 2)
    assert len(sample_rows(3, rows, 9)) == 10
    long = "a" * 10_000 + "the end"
    (cut,) = sample_rows(1, [rows[0] | {"completion": long}], 1)
    text = cut[COLUMNS.index("completion")]
    assert text.startswith("aaa") and text.endswith("the end") and "2,007 characters" in text and len(text) < 8_100


def test_tensorboard_shows_completions_as_a_table_that_no_text_breaks(tmp_path: Path) -> None:
    trackers = Trackers(("tensorboard",), "p", tmp_path, print, completions=1)
    trackers.start()
    trackers.log_completions(7, rows_of(7))
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("completions/text_summary")
    head, rule, *lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert event.step == 7 and head.split(" | ")[1] == "kind" and set(rule) <= set("|- ")
    assert len(lines) == 2 and all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "1 &#124; 1?<br>&lt;b&gt;" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1])
def test_a_run_sends_completions_only_where_its_recipe_wants_that(recipe: Path, tmp_path: Path, count: int) -> None:
    run = tmp_path / "run"
    more = ["--train.trackers=[tensorboard]", f"--train.tracker_completions={count}", "--train.steps=2", "--data.eval=null"]
    assert main(["train", str(recipe), f"--output={run}", *more]) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Tags()["tensors"] == ["completions/text_summary"] * count
    if count:
        assert [event.step for event in events.Tensors("completions/text_summary")] == [1, 2]


def test_a_table_that_fails_is_left_out_and_the_numbers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = stand_in(monkeypatch, "wandb"), list[str]()
    trackers = Trackers(("wandb",), "p", tmp_path, said.append, completions=1)
    trackers.start()
    sys.modules["wandb"].Table = lambda columns, data, dataframe: fail("too large")()  # type: ignore[attr-defined]
    for step in range(1, 6):
        trackers.log_completions(step, rows_of(step))
        trackers.log(step, "step", {"loss": 1.0})
    assert [call[2] for call in calls if call[0] == "log"] == [1, 2, 3, 4, 5]
    assert said == [
        "step 1: tracker wandb's table of completions failed and is tried again: ConnectionError: too large",
        "step 3: tracker wandb's table of completions failed and is left out from now on: ConnectionError: too large",
    ]


def test_what_a_tracker_called_the_run_is_kept_for_the_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    class Service:
        def __init__(self, experiment_name: str, **given: Any) -> None:
            started.append(given)
            self.tracker = SimpleNamespace(info=SimpleNamespace(run_id=given["run_id"] or "given-by-it"))

        def start(self) -> None: ...

    monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "mlflow", Service)
    Trackers(("mlflow",), "p", tmp_path, print).start()
    Trackers(("mlflow",), "p", tmp_path, print).start(7)
    assert [given["run_id"] for given in started] == [None, "given-by-it"]


def test_trackers_of_every_kind_are_opened_as_accelerate_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that accelerate has, each with arguments that its class there takes."""
    comet = ModuleType("comet_ml")
    comet.ExperimentConfig = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    assert set(KINDS) == set(module.LOGGER_TYPE_TO_CLASS) == set(get_args(TrackerName))
    for name, kind in KINDS.items():
        for key, step in ((None, None), ("its-key", 3)):
            given = kind.arguments(Opening("p", tmp_path / "run", "identity", key, step))
            inspect.signature(module.LOGGER_TYPE_TO_CLASS[name]).bind(**given)
            assert "run" in json.dumps(given, default=str) or name == "dvclive"
            assert key is None or kind.key is None or key in given.values()
