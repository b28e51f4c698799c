"""`teacher.ask: eager`: the same prompts for less waiting, whatever comes early, late, wrong or not at all."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from fault_server import Server
from same_run import BY_CHANCE, assert_same_run, records
from test_zone import ScriptedTeacher, Words, make_group, score
from victims import Victims
from zppo.cli import main
from zppo.core.replay import PromptReplayBuffer
from zppo.core.select import hard_groups, surely_hard
from zppo.core.types import Group, Message, Rollout
from zppo.engines.base import Sampling
from zppo.grading.base import Verdict
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.teacher.base import Cancelled, TeacherReply, TeacherRequest, TeacherSampling
from zppo.teacher.compress import Compressor
from zppo.teacher.local import LocalTeacher
from zppo.teacher.remote import RemoteTeacher
from zppo.train.ask import Asker
from zppo.train.eager import Ahead
from zppo.train.early import EarlyScore, EarlyTeacher
from zppo.train.lane import Lane
from zppo.train.make_learner import make_reformulations
from zppo.train.materials import MaterialMaker
from zppo.train.methods import METHODS, Method
from zppo.train.rollouts import Answered, Score, Speaker
from zppo.train.settings import ZoneSettings
from zppo.train.team import ALONE, Team
from zppo.train.zone import Zone, ZoneBuilder

HOW = TeacherSampling(Sampling(max_new_tokens=16))
VAIN = ("teacher_unused_tokens", "teacher_cancelled", "teacher_wait_seconds")


class Asked(ScriptedTeacher):
    """Counts what it is asked, how much of it at the same time, and takes its time."""

    def __init__(self, solves: dict[str, int], seconds: float = 0.0, down: bool = False) -> None:
        super().__init__(solves, down=down)
        self.seconds, self.requests = seconds, Counter[TeacherRequest]()
        self.under_way = self.most = 0
        self.gone = threading.Event()
        self.lock = threading.Lock()

    def complete(self, requests: Sequence[TeacherRequest], how: TeacherSampling) -> list[TeacherReply]:
        with self.lock:
            self.requests.update(requests)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        gone = self.gone.wait(self.seconds) if self.seconds else False
        with self.lock:
            self.under_way -= 1
        if gone:
            raise Cancelled
        replies = super().complete(requests, how)
        return [replace(r, completion_tokens=r.completion_tokens or 5) for r in replies]


def make_builder(
    teacher: Asked,
    ask: str,
    *,
    method: Method = METHODS["zppo"],
    rho_aug: float = 1.0,
    context: int | None = None,
    team: Team = ALONE,
    score: Score = score,
    threads: int = 8,
) -> ZoneBuilder:
    book = PromptBook(neutralise=Neutraliser())
    speaker = Speaker(book, Words())  # type: ignore[arg-type]
    reformulations, zone = make_reformulations(method, 0.4), ZoneSettings(rho_aug=rho_aug)
    early, graded = EarlyTeacher(teacher, team), EarlyScore(score, team)

    def parts(teacher: Any, score: Score) -> tuple[Asker, MaterialMaker]:
        materials = MaterialMaker(
            frozenset(need for r in reformulations for need in r.needs),
            compressor=Compressor(teacher, book, HOW, lambda text: text),
            teacher=teacher,
            hint=HOW,
            book=book,
            response_ids=lambda source: tuple(range(len(source.text))),
            seed=3,
        )
        return Asker([(teacher, HOW)], speaker, score, group_size=4, seed=3), materials

    ahead = Ahead(
        *parts(early.ahead(), graded.ahead),
        teachers=[early],
        score=graded,
        reformulations=reformulations,
        settings=zone,
        group_size=4,
        seed=3,
        threads=threads,
        every_hard_question=method.teacher_response,
        cancel=teacher.gone.set,
        team=team,
    )
    asker, materials = parts(early, graded)
    return ZoneBuilder(
        reformulations,
        asker=asker,
        materials=materials,
        speaker=speaker,
        settings=zone,
        seed=3,
        context=context,
        max_new_tokens=16,
        lazy=ask != "all",
        ahead=ahead if ask == "eager" else None,
        teachers=[early],
        every_hard_question=method.teacher_response,
    )


def go(
    builder: ZoneBuilder,
    plain: Sequence[Group],
    order: Sequence[tuple[int, int]] | None = None,
    *,
    sampling: float = 0.0,
    new: int | None = None,
) -> Zone:
    """One step's zone; rollouts end in this order, and the last of them after so many seconds."""
    with builder.asking(new or len(plain), 1) as seen:
        if seen is not None:
            for i, j in order or [(i, j) for i, g in enumerate(plain) for j in range(len(g.rollouts))]:
                seen(plain[i].prompt, j, plain[i].rollouts[j])
        time.sleep(sampling)
        return builder.build(plain, new or len(plain), 1)


def shown(zone: Zone) -> list[tuple[Any, ...]]:
    return [(p.kind, p.question.id, p.messages, p.forced_ids, p.audit) for p in zone.prompts]


def test_batches_are_the_same_whenever_the_teacher_is_asked() -> None:
    """All three ways, all methods with a teacher, rollouts that end in any order: the same prompts and counts, nothing asked twice."""

    @settings(max_examples=15)
    @given(seed=st.integers(0, 10**6), rho=st.sampled_from([0.1, 0.25, 0.5, 1.0]))
    def check(seed: int, rho: float) -> None:
        rng = random.Random(seed)
        count = rng.randrange(1, 13)
        rights = [rng.choice([0, 0, 0, 1, 2, 3]) for _ in range(count)]
        answerless = [rng.choice([0, 0, 4 - right]) for right in rights]
        plain = [make_group(f"q{i}", r, 4 - r - a, a) for i, (r, a) in enumerate(zip(rights, answerless, strict=True))]
        order = [(i, j) for i in range(count) for j in range(4)]
        rng.shuffle(order)
        solves = {f"q{i}": rng.choice([0, 1, 4]) for i in range(count)}
        method = METHODS[
            rng.choice(["zppo", "grpo-replay-bcq", "grpo-replay-ncq", "hint", "prefix", "teacher-response"])
        ]
        down, context = rng.random() < 0.1, rng.choice([None, 120])
        zones, teachers = {}, {}
        for ask in ("lazy", "eager", "all"):
            teachers[ask] = Asked(solves, down=down)
            threads = rng.choice([1, 3, 8])
            builder = make_builder(teachers[ask], ask, method=method, rho_aug=rho, context=context, threads=threads)
            zones[ask] = go(builder, plain, order)
        assert shown(zones["eager"]) == shown(zones["lazy"]) == shown(zones["all"])
        assert zones["eager"].pools == zones["lazy"].pools
        eager, lazy = ({k: v for k, v in zones[a].metrics.items() if k not in VAIN} for a in ("eager", "lazy"))
        assert eager == lazy
        assert max(teachers["eager"].requests.values(), default=1) == 1
        assert teachers["lazy"].requests.keys() <= teachers["eager"].requests.keys()

    check()


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 8),
    st.floats(0.05, 1.0),
)
def test_what_is_known_of_a_group_early_stays_true(verdicts: list[tuple[bool, bool]], ended: int, tau: float) -> None:
    """Hard for sure means hard however the others turn out; with all rollouts it means hard."""
    rollouts = [Rollout(torch.tensor([1]), torch.zeros(1), "", None, r and g, 0.0, graded=g) for r, g in verdicts]
    whole = Group(make_group("q", 1, 0).prompt, tuple(rollouts))
    hard = bool(hard_groups([whole], tau))
    assert surely_hard(rollouts, len(rollouts), tau) == hard
    if surely_hard(rollouts[:ended], len(rollouts), tau):
        assert hard


def test_only_what_can_still_get_a_slot_is_asked_about() -> None:
    """Twenty hard questions and four slots: hardest first it asks what a lazy teacher asks; the other way round, most in vain."""
    plain = [make_group(f"q{i:02}", *((0, 4) if i < 10 else (1, 3))) for i in range(20)]
    solves = {f"q{i:02}": 4 for i in range(20)}
    ranked = hard_groups(plain, 0.5, seed=3, step=1)
    for groups, questions in ((ranked, 2), (ranked[::-1], 20)):
        teacher = Asked(solves, seconds=0.02)
        zone = go(make_builder(teacher, "eager"), groups, new=4, sampling=0.3)
        assert len(teacher.rollouts) == questions
        assert len(zone.prompts) == 4 and zone.metrics["teacher_questions"] == 2
        assert (zone.metrics["teacher_unused_tokens"] or 0.0) >= 5 * (questions - 2)
    barren = Asked({})  # nobody is right: half as many slots a question, and the next ones are begun by themselves
    assert len(go(make_builder(barren, "eager"), ranked, new=4, sampling=0.2).prompts) == 4
    assert len(barren.rollouts) == 4


def test_the_teacher_works_while_the_student_samples() -> None:
    """With 0.4 s a call and sampling that takes 1 s, two calls one after the other are over before they are needed."""
    plain = [make_group(f"q{i}", 0, 4) for i in range(3)]
    waits = {}
    for ask in ("lazy", "eager"):
        teacher = Asked({f"q{i}": 4 for i in range(3)}, seconds=0.4)
        zone = go(make_builder(teacher, ask), plain, sampling=1.0)
        assert len(zone.prompts) == 3
        waits[ask] = zone.metrics["teacher_wait_seconds"] or 0.0
    assert waits["lazy"] >= 0.8 and waits["eager"] < 0.5 * waits["lazy"]


def test_the_calls_under_way_are_bounded_and_end_with_the_step() -> None:
    plain = [make_group(f"q{i}", 0, 4) for i in range(12)]
    teacher = Asked({}, seconds=0.05)
    go(make_builder(teacher, "eager", threads=3), plain, sampling=0.1)
    assert 2 <= teacher.most <= 4  # the step's own call is the fourth
    slow = Asked({}, seconds=60)
    builder = make_builder(slow, "eager")
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), builder.asking(12, 1) as seen:
        assert seen is not None
        for group in plain:
            for j, rollout in enumerate(group.rollouts):
                seen(group.prompt, j, rollout)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 20 and slow.under_way == 0


def test_an_error_in_the_background_ends_the_step_with_its_cause() -> None:
    def broken(answered: Sequence[Answered]) -> list[Verdict]:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("the reward function is broken")
        return score(answered)

    builder = make_builder(Asked({}), "eager", score=broken)
    with pytest.raises(ValueError, match="the reward function is broken"):
        go(builder, [make_group("q", 0, 4)], sampling=0.1)
    lane: Lane[int] = Lane("test", lambda items: 1 // 0)
    lane.put(1)
    with pytest.raises(ZeroDivisionError):
        lane.drain()
    with pytest.raises(ZeroDivisionError):
        lane.put(2)
    lane.close()


class Together(Team):
    """Two processes that are threads."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, 2)
        self.board, self.barrier = board, barrier

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(60)
        values = list(self.board)
        self.barrier.wait(60)
        return values


def test_two_processes_ask_ahead_about_their_own_questions_and_build_the_same() -> None:
    plain = [make_group(f"q{i}", i % 3, 4 - i % 3) for i in range(8)]
    solves = {f"q{i}": (i % 2) * 4 for i in range(8)}
    alone = go(make_builder(Asked(solves), "lazy", rho_aug=0.5), plain)
    board, barrier, teacher = [None, None], threading.Barrier(2), Asked(solves, seconds=0.01)
    zones: dict[int, Zone] = {}

    def work(rank: int) -> None:
        builder = make_builder(teacher, "eager", rho_aug=0.5, team=Together(rank, board, barrier))
        mine = [(i, j) for i in range(rank, 8, 2) for j in range(4)]
        zones[rank] = go(builder, plain, mine, sampling=0.1 * rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert shown(zones[0]) == shown(zones[1]) == shown(alone)
    assert {k: v for k, v in zones[0].metrics.items() if k not in VAIN} == {
        k: v for k, v in alone.metrics.items() if k not in VAIN
    }
    assert zones[0].metrics["teacher_unused_tokens"] == zones[1].metrics["teacher_unused_tokens"]
    asked = Counter(teacher.rollouts)  # equal completions may be compressed in both
    assert max(asked.values()) == 1 and asked.keys() >= {f"q{i}" for i in (0, 3, 6)}


def cancelled(teacher: LocalTeacher | RemoteTeacher, tokens: int, ready: Callable[[], None]) -> float:
    """Seconds until a call in another thread has ended by `cancel`."""
    ended: list[type[BaseException]] = []

    def call() -> None:
        try:
            how = TeacherSampling(Sampling(max_new_tokens=tokens))
            teacher.complete([TeacherRequest((Message("user", "What is 1 plus 1?"),), (1,))], how)
        except BaseException as error:
            ended.append(type(error))

    thread = threading.Thread(target=call)
    thread.start()
    ready()
    began = time.monotonic()
    teacher.cancel()
    thread.join(60)
    assert ended == [Cancelled]
    return time.monotonic() - began


def test_a_call_is_ended_from_another_thread(tiny_qwen3_dir: Path) -> None:
    server = Server()
    try:
        server.control(always={"kind": "hang"})
        remote = RemoteTeacher("tiny", [server.url])
        assert cancelled(remote, 16, lambda: server.wait_for(1)) < 20
        remote.close()
    finally:
        server.kill()
    local = LocalTeacher.load(tiny_qwen3_dir)
    banned = [i for i in range(local.network.config.vocab_size) if i != 5]
    local._engine.banned_ids = frozenset(banned)  # type: ignore[attr-defined]  # it never ends by itself
    steps = [0]
    local.network.register_forward_pre_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    assert cancelled(local, 10**6, lambda: until(lambda: steps[0] > 3)) < 20
    done = local.complete(
        [TeacherRequest((Message("user", "And now?"),), (1,))], TeacherSampling(Sampling(max_new_tokens=2))
    )
    assert done[0].texts[0] is not None and not done[0].error


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


SHORT = [
    "--teacher.rollout.max_new_tokens=4",
    "--teacher.compression.max_new_tokens=6",
    "--data.eval=null",
    "--train.steps=3",
]


@pytest.mark.slow
def test_runs_are_the_same_whenever_the_teacher_is_asked(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victims: Victims
) -> None:
    """Weights, rollouts, buffer and metrics, lazily and eagerly; an eager run that writes its checkpoints in the background is killed
    while it asks and while it writes, stopped by a signal and by a full disk, and resumes to the same."""
    AcceleratorState._reset_state(True)
    lazy, run, copies = tmp_path / "lazy", tmp_path / "eager", []
    with monkeypatch.context() as patch:
        real = PromptReplayBuffer.state_dict
        patch.setattr(PromptReplayBuffer, "state_dict", lambda self: (copies.append(1), real(self))[1])
        assert main(["train", str(recipe), *SHORT, f"--output={lazy}"]) == 0
    assert len(copies) == 2, "the buffer is copied for the checkpoints of steps 2 and 3 alone"
    beside = ["--train.checkpoint_every=1", "--train.checkpoint_in_background=true"]
    start = ["train", recipe, *SHORT, *beside, "--teacher.ask=eager", f"--output={run}"]
    assert victims.run(*start, run=run, at="zppo.train.checkpoint:make_manifest") == -signal.SIGKILL
    assert victims.run("resume", run, run=run, at="zppo.train.ask:Asker.ask", nth=5) == -signal.SIGKILL
    assert victims.run("resume", run, run=run, at="zppo.train.zone:ZoneBuilder.build", do="term") == 143, victims.said
    assert victims.run("resume", run, run=run, at="torch:save", do="full") == 2, victims.said
    assert "cannot be written: File too large" in victims.said and f"`zppo resume {run}`" in victims.said
    assert victims.run("resume", run, run=run) == 0, victims.said
    steps = [r for r in records(run) if r["event"] == "step"]
    for step in steps:
        used = step["teacher_completion_tokens"] + step["compression_completion_tokens"]
        assert step["teacher_questions"] > 0 and step["teacher_tokens"] == used + step["teacher_unused_tokens"]
    assert_same_run(lazy, run, aside=BY_CHANCE)
