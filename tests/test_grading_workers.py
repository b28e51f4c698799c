"""Hostile answers and the worker pool: bounded, killable, usable from anywhere, gone afterwards."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zppo.errors import SettingsError, ZPPOError
from zppo.grading import Grader, equal
from zppo.grading import workers as pool_module

pytestmark = pytest.mark.slow

FORMULA = (r"x^2-1", r"(x-1)(x+1)")
DEADLINE = 2.0
PATIENT = 30.0  # where time is not what is tested: a busy machine must not fail it
HOSTILE = ["9^{9^{9^{9}}}", "1000000000!", pytest.param(r"\binom{10^9}{10^8}"), pytest.param(r"(x+1)^{100000}")]
HARMLESS = [
    "9" * 100_000,
    "{" * 10_000 + "}" * 10_000,
    r"\sqrt{" * 10_000 + "2" + "}" * 10_000,
    "(" * 400 + ")" * 400,
    "a" * 1_000_000,
    "\x00",
    "\ud800",
    "1e999999999",
    "2**2**2**2**2**2",
    "__import__('os').system('exit 1')",
    "().__class__.__mro__",
    "1;" * 400,
    "x=" * 490 + "1",
    r"\pm" * 300,
    "a<" * 300 + "a",
    r"\frac{" * 160,
    r"\text{" * 140 + "a" + "}" * 140,
    "A," * 490,
    "°" * 990,
    "\ufdfa" * 990,
]


@pytest.fixture(autouse=True)
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that a busy machine keeps from answering is not taken for one that hangs, but where one does."""
    if request.function is not test_a_host_that_hangs_is_given_up:
        monkeypatch.setattr(pool_module, "_SLACK", PATIENT)


@pytest.fixture(scope="module")
def patient() -> Iterator[Grader]:
    with Grader(deadline=PATIENT) as grader:
        yield grader


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(deadline=DEADLINE) as grader:
        assert grader.equal(*FORMULA)
        yield grader


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_formulas_time_out_and_the_next_answer_is_graded(grader: Grader, answer: str) -> None:
    before = grader.timeouts
    verdict = grader.grade(rf"\boxed{{{answer}}}", r"\sqrt{2}+y")
    assert (verdict.correct, verdict.reason, verdict.reward) == (False, "timeout", 0.0)
    assert grader.timeouts == before + 1
    assert grader.equal("x^2-4", "(x-2)(x+2)" + "+0" * (before + 1))


def test_a_repeated_hostile_answer_costs_nothing_more(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    grader.equal(r"\sqrt{7}", "8^{8^{8^{8}}}")
    before = grader.timeouts
    monkeypatch.setattr(grader._pool, "compare", lambda pairs: pytest.fail(f"the workers are asked again: {pairs}"))
    verdicts = grader.grade_many([(r"\boxed{8^{8^{8^{8}}}}", r"\sqrt{7}")] * 8)
    assert [v.reason for v in verdicts] == ["timeout"] * 8
    assert grader.timeouts == before + 8


@pytest.mark.parametrize("answer", HARMLESS, ids=lambda a: ascii(a[:12]))
@pytest.mark.timeout(60)
def test_hostile_texts_are_wrong_at_once(grader: Grader, answer: str) -> None:
    assert not grader.equal("5", answer)
    assert not grader.equal(r"\{1,2\}", answer)
    assert not grader.grade("\\boxed{" + answer + "}", "3+5").correct


def test_memory_is_limited() -> None:
    code = "from zppo.grading.worker import limit_worker; limit_worker(768 << 20); bytearray(1 << 30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip().endswith("MemoryError")


def test_grade_many_keeps_order_and_uses_the_workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    ask, wait = pool_module._Host.ask, pool_module.WorkerPool._wait
    monkeypatch.setattr(pool_module._Host, "ask", lambda *args: (events.append("ask"), ask(*args))[1])
    monkeypatch.setattr(pool_module.WorkerPool, "_wait", lambda *args: (events.append("wait"), wait(*args))[1])
    with Grader(deadline=DEADLINE, workers=2) as grader:
        assert grader.equal(*FORMULA)
        items: list[tuple[str, str]] = [(rf"\boxed{{{n}}}", str(n % 2)) for n in range(4)]
        items += [(rf"\boxed{{7^{{7^{{7^{{{n}}}}}}}}}", "y+z") for n in (7, 8)]
        items += [(r"\boxed{x(x+1)}", "x^2+x"), ("none", "5")]
        events.clear()
        reasons = [v.reason for v in grader.grade_many(items)]
        assert events == ["ask"] * 3 + ["wait"] * 3  # both towers and the formula are under way before any is waited for
        assert reasons == ["equal", "equal", "different", "different", "timeout", "timeout", "equal", "no answer"]


def test_threads_share_a_grader(patient: Grader) -> None:
    results: list[bool] = []
    threads = [threading.Thread(target=lambda n=n: results.append(patient.equal(f"x^2-{n * n}", f"(x-{n})(x+{n})"))) for n in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [True] * 6


def _grade_in_child(queue: multiprocessing.Queue[bool], grader: Grader) -> None:
    queue.put(grader.equal("y^2-9", "(y-3)(y+3)"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_daemonic_children_and_forks_can_grade(patient: Grader, method: str) -> None:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_grade_in_child, args=(queue, patient), daemon=True)  # type: ignore[attr-defined]
    child.start()
    assert queue.get(timeout=60) is True
    child.join(20)
    assert child.exitcode == 0
    assert patient.equal("z^2-9", "(z-3)(z+3)")  # the parent's worker is untouched


def test_a_script_without_a_main_guard_can_grade(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            r"""
            print("started")
            from zppo.grading import equal
            print(equal("x^2-1", "(x-1)(x+1)"))
            import sys
            print("torch" in sys.modules, "sympy" in sys.modules)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["started", "True", "False", "False"]
    assert done.stderr == ""


def _stat(pid: int) -> list[str]:
    """Fields of a process from its state on; Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z"]


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if _stat(pid)[0] != "Z"]


def _ticks(pids: list[int]) -> int:
    """Hundredths of a second that processes have computed."""
    return sum(int(ticks) for pid in pids for ticks in _stat(pid)[11:13])


def _descendants(pid: int) -> list[int]:
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return children + [d for c in children for d in _descendants(c)]


def _wait_for(condition: Callable[[], bool]) -> None:
    """Until the condition holds; only what hangs takes a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_close_leaves_no_process_and_the_grader_starts_again() -> None:
    known = set(_descendants(os.getpid()))
    grader = Grader(deadline=PATIENT)
    assert grader.equal(*FORMULA)
    ours = [pid for pid in _descendants(os.getpid()) if pid not in known]
    assert ours
    grader.close()
    _wait_for(lambda: not _alive(ours))
    assert grader.equal("x^2-9", "(x-3)(x+3)")
    grader.close()


def test_killed_workers_are_replaced() -> None:
    with Grader(deadline=PATIENT) as grader:
        known = set(_descendants(os.getpid()))
        assert grader.equal(*FORMULA)
        for pid in [pid for pid in _descendants(os.getpid()) if pid not in known]:
            os.kill(pid, signal.SIGKILL)
        assert grader.equal("x^2-9", "(x-3)(x+3)")


def test_a_host_whose_end_nobody_has_seen_yet_is_replaced_at_once() -> None:
    with Grader(deadline=PATIENT) as grader:
        assert grader.equal(*FORMULA)
        host = grader._pool._current
        assert host is not None
        host._process.stdin.close()  # writing fails while the host still counts as alive: what a kill looks like for an instant
        assert host.usable
        assert grader.equal("x^2-9", "(x-3)(x+3)")
        assert grader._pool._current is not host


def test_a_caller_that_is_killed_takes_its_workers_along(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        "from zppo.grading import Grader\ng = Grader(deadline=60)\ng.equal('x+y', 'y+x')\n"
        "print('busy', flush=True)\ng.equal('x+y', '9^{9^{9^9}}')\n"
    )
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    assert caller.stdout.readline().strip() == "busy"
    workers = _descendants(caller.pid)
    before = _ticks(workers)
    _wait_for(lambda: _ticks(workers) > before + 10)  # one of them computes
    caller.kill()
    caller.wait()
    caller.stdout.close()
    _wait_for(lambda: not _alive(workers))


def test_a_worker_that_cannot_start_is_an_error_and_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_COMMAND", "raise SystemExit('libraries are missing')")
    with pytest.raises(ZPPOError, match="libraries are missing"):
        Grader().equal(*FORMULA)


def test_a_host_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = "import sys, time; print('{\"ready\": true}', flush=True); time.sleep(60)"
    monkeypatch.setattr(pool_module, "_COMMAND", silent)
    grader = Grader(deadline=3 * DEADLINE)  # the worker after it may start on busy cores
    assert grader.grade(r"\boxed{x+y+1}", "x+y").reason == "timeout"
    monkeypatch.undo()
    assert grader.equal(*FORMULA)
    grader.close()


def test_pickle_and_settings() -> None:
    copy = pickle.loads(pickle.dumps(Grader(deadline=2.0, workers=3, memory_limit=1 << 29, rounded_golds=False)))
    assert copy._settings == (2.0, 3, 1 << 29, False)
    for bad in ({"deadline": 0}, {"workers": -1}, {"memory_limit": 0}):
        with pytest.raises(SettingsError, match=next(iter(bad))):
            Grader(**bad)  # type: ignore[arg-type]


def test_the_shared_grader() -> None:
    assert equal(*FORMULA)
    assert not equal("x", "y+1")
