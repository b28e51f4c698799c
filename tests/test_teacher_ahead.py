"""`teacher.ask: ahead`: what is asked while the student samples, and that a run with it is the run without it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from conftest import make_tokenizer
from fault_server import Server
from same_run import assert_same_run, records
from test_zone import Words, make_group, score
from victims import Victims
from zppo.config.methods import METHODS
from zppo.config.settings import Settings
from zppo.core.replay import PromptReplayBuffer
from zppo.core.types import Group, Message
from zppo.engines.base import Sampling
from zppo.engines.chat import Chat
from zppo.grading import extract_boxed
from zppo.prompts.book import PromptBook
from zppo.rollout.reformulated import AskAhead, make_reformulations, make_reformulator
from zppo.rollout.student import PromptRenderer
from zppo.rollout.teacher import SharedTeacher, TeacherSampler
from zppo.step_log import StepLog
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling
from zppo.teacher.remote import RemoteTeacher

SERVICE = ("requests", "retries", "given_up", "short", "oversized", "waited_seconds")
IN_VAIN = ("teacher_unused_tokens", "teacher_unused_prompt_tokens", "teacher_broken_off")
ASIDE = ("teacher_tokens", *IN_VAIN, *(f"remote_{name}" for name in SERVICE))
"""What a step takes; all else is the same."""

BEGIN = "zppo.rollout.teacher:SharedTeacher.begin"


def main(argv: list[str]) -> int:
    """The command line, with rollouts graded as they end though a user's function grades them."""
    import zppo.rollout.step_parts
    from zppo.cli import main

    zppo.rollout.step_parts.grades_while_sampling = lambda settings, scorer: True  # type: ignore[attr-defined]
    return main(argv)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


class Runs:
    """Runs of four steps with a teacher that takes its time."""

    def __init__(self, victims: Victims, recipe: Path, server: Server) -> None:
        self.victims, self.recipe, self.server = victims, recipe, server

    def go(self, run: Path, ask: str, *overrides: str, dies_after: int | None = None, **fate: Any) -> int:
        slow = {"kind": "slow", "seconds": 0.01}
        if dies_after is None:
            self.server.control(always=slow)
        else:
            self.server.control(*[slow] * dies_after, always={"kind": "drop"})
        remote = [f"--teacher.base_urls=[{self.server.url}]", "--teacher.model=tiny", "--teacher.retry_for=0.5", f"--teacher.ask={ask}"]
        start = ["train", self.recipe, *remote, "--train.steps=4", "--data.eval=null", "--rollout.max_rows=8", *overrides]
        command = ["resume", run] if (run / "recipe.yaml").exists() else [*start, f"--output={run}"]
        return self.victims.run(*command, run=run, call="test_teacher_ahead:main", **fate)


@pytest.fixture(scope="module")
def runs(victims: Victims, recipe: Path, server: Server) -> Runs:
    return Runs(victims, recipe, server)


@pytest.fixture(scope="module")
def lazy(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "lazy"
    assert runs.go(run, "lazy") == 0, runs.victims.said
    return run


@pytest.mark.slow
def test_a_run_is_the_same_bit_for_bit(runs: Runs, lazy: Path, tmp_path: Path) -> None:
    ahead, literal = tmp_path / "ahead", tmp_path / "all"
    assert runs.go(ahead, "ahead") == 0, runs.victims.said
    assert_same_run(lazy, ahead, ASIDE)
    vain = [sum(line[name] for name in IN_VAIN) for line in records(ahead)]
    assert len(vain) == 4 and sum(vain) > 0  # it has begun what was not needed
    for one, other in zip(records(lazy), records(ahead), strict=True):
        assert other["teacher_tokens"] == one["teacher_tokens"] + other["teacher_unused_tokens"]
    assert runs.go(literal, "all") == 0, runs.victims.said
    for name in (f"step-{step:06d}.parquet" for step in range(1, 5)):
        assert pq.read_table(literal / "rollouts" / name).equals(pq.read_table(ahead / "rollouts" / name))
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (ahead, literal))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.long
def test_stopped_with_requests_under_way(runs: Runs, lazy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for fate, status in (({"nth": 12}, -signal.SIGKILL), ({"nth": 9, "do": "term"}, 143), ({"nth": 15, "do": "int"}, 130)):
        assert runs.go(run, "ahead", at=BEGIN, **fate) == status, runs.victims.said
    assert runs.go(run, "ahead") == 0, runs.victims.said
    assert_same_run(lazy, run, ASIDE)


@pytest.mark.long
def test_a_teacher_that_dies_costs_help_and_not_the_run(runs: Runs, tmp_path: Path) -> None:
    """It dies with requests under way, after its start-up check and some replies."""
    run = tmp_path / "run"
    assert runs.go(run, "ahead", dies_after=20) == 0, runs.victims.said
    steps = records(run)
    assert len(steps) == 4 and sum(step["teacher_rollouts"] for step in steps) > 0
    assert steps[-1]["teacher_rollouts"] == 0 and steps[-1]["teacher_unreachable"] > 0


@pytest.mark.long
def test_two_processes_come_to_the_same(runs: Runs, lazy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert runs.go(run, "ahead", "--train.steps=2", processes=2) == 0, runs.victims.said
    for one, other in zip(records(lazy), records(run), strict=False):
        counted = [name for name in one if name.startswith(("teacher_", "compression_", "bcq", "ncq")) and name not in ASIDE]
        assert {name: one[name] for name in counted} == {name: other[name] for name in counted}
    columns = ["kind", "question_id", "rollout", "prompt"]
    for name in ("step-000001.parquet", "step-000002.parquet"):
        one, other = (pq.read_table(r / "rollouts" / name, columns=columns) for r in (lazy, run))
        assert one.equals(other)


class Handled:
    """A teacher whose replies come when the test says."""

    def __init__(self) -> None:
        self.under_way: dict[str, Future[TeacherReply]] = {}
        self.asked: list[str] = []

    def begin(self, request: TeacherRequest, how: TeacherSampling) -> Future[TeacherReply]:
        future = self.under_way[self.name(request)] = Future()
        return future

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling, log: StepLog | None = None) -> list[TeacherReply]:
        self.asked += [self.name(request) for request in requests]
        return [self.reply(request) for request in requests]

    def come(self) -> None:
        for name, future in self.under_way.items():
            if not future.done():
                future.set_result(TeacherReply((f"{name} \\boxed{{gold}}",) * 4, prompt_tokens=5, completion_tokens=9))

    @property
    def open(self) -> list[str]:
        return [name for name, future in self.under_way.items() if not future.done()]

    @staticmethod
    def name(request: TeacherRequest) -> str:
        text = request.messages[-1].content
        return f"short {extract_boxed(text.rsplit('<response>', 1)[1])}" if "<response>" in text else text.split()[0]

    def reply(self, request: TeacherRequest) -> TeacherReply:
        return TeacherReply((f"{self.name(request)} \\boxed{{gold}}",) * len(request.keys))


@pytest.fixture
def handled() -> Handled:
    return Handled()


def make_ahead(teacher: Handled, slots: int, held: Sequence[Group] = ()) -> tuple[AskAhead, TeacherSampler]:
    """Asks ahead for `slots` reformulated prompts a step, of groups of four; `held` are in the buffer."""
    settings = Settings(
        student={"model": "-"},
        teacher={"model": "-", "base_urls": ["http://nowhere/v1"], "ask": "ahead"},
        data={"train": "-"},
        rollout={"batch_size": slots, "group_size": 4},
        zone={"rho_aug": 1.0, "ties": "batch"},
    )
    shared = SharedTeacher(teacher, ahead=True)
    how = TeacherSampling(Sampling(max_new_tokens=16))
    renderer = PromptRenderer(PromptBook(), Words())  # type: ignore[arg-type]
    sampler = TeacherSampler([(shared, how)], renderer, score, group_size=4, seed=0)
    buffer = PromptReplayBuffer(100)
    buffer.update([(g.question, g.accuracy) for g in held], 0)
    talking = PromptRenderer(renderer.book, Chat(make_tokenizer(), {}))
    made = make_reformulator(settings, make_reformulations(METHODS["zppo"]), [shared], talking, sampler, None, buffer)
    assert made.ahead is not None
    return made.ahead, sampler


def end(ahead: AskAhead, group: Group, *places: int) -> None:
    for place in places:
        ahead.ended(group.prompt, place, group.rollouts[place])


def test_asked_as_soon_as_it_is_hard_for_certain_and_broken_off_when_others_are_harder(handled: Handled) -> None:
    old, new, harder, easy = make_group("old", 1, 3), make_group("new", 1, 3), make_group("harder", 0, 4), make_group("easy", 2, 2)
    ahead, sampler = make_ahead(handled, 2, held=[old])  # at least one question for two slots, 1.3 times that: two
    log = StepLog(1)
    ahead.begin([g.prompt for g in (new, harder, easy, old)], log)
    assert handled.open == ["old"]  # it was hard before
    end(ahead, easy, 0, 1, 2, 3)
    end(ahead, new, 0, 1, 2)
    assert handled.open == ["old"]  # one right, two wrong: the last one decides
    end(ahead, new, 3)
    assert set(handled.open) == {"old", "new", "short wrong0", "short wrong1"}  # all its rollouts are there
    end(ahead, harder, 0, 1, 2)
    assert "harder" in handled.open and len({"old", "new"} & set(handled.open)) == 1
    handled.come()
    end(ahead, harder, 3)
    end(ahead, old, 0, 1, 2, 3)
    ahead.sampled([harder, old, new], log)
    handled.come()  # what was broken off, and is wanted after all
    pools = sampler.ask([harder.question, old.question], log)
    assert [len(pools[name]) for name in ("harder", "old")] == [4, 4]
    assert "harder" not in handled.asked  # its reply was there
    ahead.close(log)
    assert not handled.open and log.own["teacher_broken_off"] > 0
    assert log.own["teacher_unused_tokens"] % 9 == 0


def ask_two(teacher: Handled) -> tuple[SharedTeacher, list[TeacherRequest], TeacherSampling]:
    """Two requests that are under way."""
    shared, how = SharedTeacher(teacher, ahead=True), TeacherSampling(Sampling(max_new_tokens=16))
    requests = [TeacherRequest((Message("user", f"{name} asks something"),), (1,)) for name in ("one", "two")]
    for request in requests:
        shared.begin(request, how)
    return shared, requests, how


def test_a_reply_that_did_not_come_is_asked_for_again(handled: Handled) -> None:
    shared, requests, how = ask_two(handled)
    handled.under_way["one"].set_result(TeacherReply((None,), error="refused"))
    handled.come()
    replies = shared.complete(requests, how)
    assert handled.asked == ["one"] and all(reply.texts[0] for reply in replies)
    assert not replies[0].error


def test_a_signal_breaks_off_what_is_waited_for(handled: Handled) -> None:
    shared, requests, how = ask_two(handled)

    def interrupted(timeout: float | None = None) -> TeacherReply:
        raise KeyboardInterrupt

    handled.under_way["one"].result = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        shared.complete(requests, how)
    assert handled.open == []


def test_a_remote_request_that_is_broken_off_leaves_the_server(server: Server) -> None:
    server.control(always={"kind": "hang"})
    teacher = RemoteTeacher("tiny", [server.url])
    try:
        shared = SharedTeacher(teacher, ahead=True)
        request, log = TeacherRequest((Message("user", "one asks something"),), (1,)), StepLog(1)
        shared.begin(request, TeacherSampling(Sampling(max_new_tokens=16)))
        server.wait_for(1)
        shared.forget(log)
        assert log.own["teacher_broken_off"] == 1.0
        server.control(reset=False)
        (reply,) = shared.complete([request], TeacherSampling(Sampling(max_new_tokens=16)), log)
        assert reply.texts[0] and log.own["remote_requests"] == 2.0  # the one that was broken off, too
    finally:
        teacher.close()
