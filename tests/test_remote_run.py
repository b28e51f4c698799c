"""Whole runs with a remote teacher: it dies and comes back, keys stay out of everything, mistakes are found before anything is written."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState

from fault_server import Server
from serving import listening
from zppo.cli import main
from zppo.core.types import Message
from zppo.engines.base import Sampling
from zppo.runs.log import RunLog
from zppo.teacher.interface import TeacherRequest, TeacherSampling
from zppo.teacher.local import LocalTeacher
from zppo.teacher.remote import RemoteTeacher

pytestmark = pytest.mark.slow

KEY, SERVE_KEY = "sk-very-secret-0123456789", "a-key-that-nobody-may-see"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr("zppo.teacher.servers.FIRST_WAIT", 0.05)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(key=KEY)
    yield server
    server.kill()


def train(recipe: Path, output: Path, url: str, *overrides: str) -> int:
    remote = [f"--teacher.base_urls=[{url}]", "--teacher.model=tiny", "--teacher.key_env=TEACHER_KEY"]
    return main(["train", str(recipe), f"--output={output}", *remote, "--teacher.retry_for=0.5", *overrides])


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines if line["event"] == "step"}


def everything_in(run: Path) -> str:
    """All that a run wrote, as text; parquet unpacked."""
    texts = [str(path) for path in run.rglob("*")]
    for path in (p for p in run.rglob("*") if p.is_file()):
        is_table = path.suffix == ".parquet"
        texts.append(str(pq.read_table(path).to_pylist()) if is_table else path.read_bytes().decode("latin-1"))
    return "\n".join(texts)


def test_a_run_survives_its_teacher_and_keeps_the_key_to_itself(
    recipe: Path,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    log = RunLog.metrics

    def weather(self: RunLog, step: int, event: str, values: Any) -> None:
        log(self, step, event, values)
        if event == "step" and step == 1:
            server.control(always={"kind": "suffix", "suffix": f" the key is {KEY}"})
        if event == "step" and step == 2:
            server.kill()
        if event == "step" and step == 4:
            server.start()
            monkeypatch.setattr("zppo.teacher.servers.LOOK_SECONDS", 60.0)  # it is back, however busy the machine is

    monkeypatch.setattr(RunLog, "metrics", weather)
    run = tmp_path / "run"
    assert train(recipe, run, server.url, "--train.steps=6", "--eval.every=0", "--teacher.compression.max_new_tokens=64") == 0
    printed = capsys.readouterr()
    said = printed.out + printed.err

    steps = steps_of(run)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    for step in (1, 2, 5, 6):
        assert steps[step]["teacher_rollouts"] > 0 and steps[step]["teacher_unreachable"] == 0, step
        assert steps[step]["remote_requests"] > 0 and steps[step]["remote_given_up"] == 0, step
        assert steps[step]["teacher_prompt_tokens"] > 0 and steps[step]["teacher_tokens"] > 0, step
    for step in (3, 4):  # it asks, gets nothing, and trains on what it has
        asked = steps[step]["teacher_questions"]
        assert steps[step]["teacher_unreachable"] == 4 * asked > 0, step
        assert steps[step]["remote_given_up"] >= asked and steps[step]["bcq_prompts"] == 0, step
        assert steps[step]["ncq_prompts"] > 0, step
    assert steps[3]["remote_retries"] > 0 and steps[3]["remote_waited_seconds"] > 0
    missed = sum(steps[step]["teacher_unreachable"] for step in steps)
    assert f"help that was missed: {missed:.0f} teacher rollouts without a reply" in " ".join(said.split())
    assert "step 3: the teacher could not serve every request" in said

    assert (run / "final" / "model.safetensors").is_file()
    assert "the key is [key]" in everything_in(run)
    for text in (everything_in(run), said, caplog.text):
        assert KEY not in text

    # A resumed run looks first, too: whole or not at all.
    shutil.rmtree(run / "final")
    before = (run / "metrics.jsonl").read_bytes()
    server.kill()
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    server.start()
    AcceleratorState._reset_state(True)
    assert main(["resume", str(run)]) == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--teacher.model=huge"], "teacher.model: 'huge' is not served"),
        (["--teacher.base_urls=[http://127.0.0.1:9/v1]"], "teacher.base_urls: the model 'tiny' cannot"),
        (["--teacher.key_env=WRONG_KEY"], "teacher.key_env: the environment variable WRONG_KEY "),
        (["--teacher.key_env=UNSET_KEY"], "teacher.key_env: the environment variable UNSET_KEY is"),
        (["--more_teachers=[{{model: huge, base_urls: [{url}], key_env: TEACHER_KEY}}]"], "more_teachers.0.model: 'huge'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    recipe: Path,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("WRONG_KEY", "sk-not-the-right-one")
    given = [o.replace("{url}", server.url).replace("{{", "{").replace("}}", "}") for o in overrides]
    assert train(recipe, tmp_path / "run", server.url, *given) == 2
    err = capsys.readouterr().err
    assert said in " ".join(err.split())
    assert "sk-" not in err
    assert not (tmp_path / "run").exists()


def test_two_addresses_one_of_them_down(recipe: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    urls = f"http://127.0.0.1:9/v1, {server.url}"
    assert train(recipe, run, urls, "--train.steps=1", "--data.eval=null") == 0
    assert "http://127.0.0.1:9/v1" in " ".join(capsys.readouterr().out.split())
    assert steps_of(run)[1]["teacher_unreachable"] == 0


def test_a_remote_judge_that_dies_leaves_completions_ungraded(
    recipe: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Name {i}", "answer": "a name", "grading": "judge"} for i in range(8)]
    (tmp_path / "judged.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    server.control(always={"kind": "text", "content": '{"verdict": "correct"}', "finish": "stop"})
    log = RunLog.metrics

    def die(self: RunLog, step: int, event: str, values: Any) -> None:
        log(self, step, event, values)
        if event == "step" and step == 1:
            server.kill()

    monkeypatch.setattr(RunLog, "metrics", die)
    judge = f"--judge={{model: tiny, base_urls: [{server.url}], key_env: TEACHER_KEY, retry_for: 0.5}}"
    grpo = ["--method=grpo-replay", "--teacher=null", "--train.steps=2", "--data.eval=null"]
    run = tmp_path / "run"
    overrides = [f"--data.train={tmp_path / 'judged.jsonl'}", *grpo, judge, f"--output={run}"]
    assert main(["train", str(recipe), *overrides]) == 0
    steps = steps_of(run)
    assert steps[1]["judge_correct"] == steps[1]["judge_asked"] > 0 and steps[1]["ungraded"] == 0
    assert steps[1]["remote_requests"] == steps[1]["judge_asked"]
    assert steps[2]["judge_unreachable"] == steps[2]["judge_asked"] == steps[2]["remote_given_up"] > 0
    assert steps[2]["ungraded"] == steps[2]["rollouts"]
    assert server.process is None and "judge calls without a reply" in " ".join(capsys.readouterr().out.split())


def test_a_teacher_behind_zppo_serve_is_the_teacher(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy completions are those of the same checkpoint in this process; a run with it asks, compresses and misses nothing."""
    model = recipe.parent / "teacher"
    requests = [TeacherRequest((Message("user", f"What is {i} plus 4?"),), (1, 2)) for i in range(5)]
    how = TeacherSampling(Sampling(temperature=0.0, max_new_tokens=8), {"enable_thinking": False})
    with listening(model, SERVE_KEY, model="tiny") as url:
        remote = RemoteTeacher("tiny", [url], key=SERVE_KEY)
        try:
            remote.check(TeacherSampling(Sampling(max_new_tokens=8)), "rollout", 4)
            assert not remote.one_by_one
            replies = remote.complete(requests, how)
        finally:
            remote.close()
        local = LocalTeacher.load(model).complete(requests, how)
        assert [r.texts for r in replies] == [r.texts for r in local]
        assert [r.prompt_tokens for r in replies] == [r.prompt_tokens for r in local]
        monkeypatch.setenv("TEACHER_KEY", SERVE_KEY)
        assert train(recipe, tmp_path / "run", url, "--train.steps=2", "--data.eval=null") == 0
    steps = steps_of(tmp_path / "run")
    for step in (1, 2):
        assert steps[step]["teacher_rollouts"] == 4 * steps[step]["teacher_questions"] > 0
        assert steps[step]["teacher_correct"] > 0 and steps[step]["compression_asked"] > 0
        assert steps[step]["teacher_unreachable"] == steps[step]["compression_unreachable"] == 0
        assert steps[step]["remote_retries"] == steps[step]["remote_given_up"] == 0
    assert SERVE_KEY not in everything_in(tmp_path / "run")
