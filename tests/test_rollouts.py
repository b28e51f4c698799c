"""Grading beside the sampling: the same groups, what has ended in one call, and an end where something goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from test_zone import Words, score
from zppo.core.types import Group, Message, Question
from zppo.engines.base import Completion, Ended, SampleRequest, Sampling, in_order
from zppo.grading.grader import Verdict
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.student import Answered, PromptRenderer, Score, StudentSampler
from zppo.step_log import StepLog

QUESTIONS = [Question(f"q{i}", (Message("user", f"What is {i}?"),), str(i)) for i in range(3)]


class Engine:
    """Hands completions over as they end; `between` is called after all but the last three, which end together."""

    context = None

    def __init__(self, between: Callable[[int], None] = lambda count: None) -> None:
        self.between, self.count = between, 0

    def sync(self) -> None: ...

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        return in_order(requests, list(self.stream(requests, sampling)))

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        places = [(i, j) for j in range(len(requests[0].keys)) for i in range(len(requests))]
        for i, j in places:
            yield i, j, Completion(torch.tensor([1 + j]), torch.zeros(1), truncated=False, entropy=0.0)
            self.count += 1
            if self.count <= len(places) - 3:
                self.between(self.count)


class Texts(Words):
    def decode(self, ids: Sequence[int]) -> str:
        return f"\\boxed{{{ids[-1]}}}"


def roll(engine: Engine, grade: Score, *, beside: bool) -> list[Group]:
    renderer = PromptRenderer(PromptBook(neutralise=Neutraliser()), Texts())  # type: ignore[arg-type]
    sampler = StudentSampler(engine, renderer, grade, Sampling(max_new_tokens=4), 4, 0, grades_while_sampling=beside)
    return sampler.rollout([renderer.plain(q) for q in QUESTIONS], StepLog(1))


def shown(groups: Sequence[Group]) -> list[tuple[str, list[tuple[str, bool]]]]:
    return [(g.question.id, [(r.text, r.correct) for r in g.rollouts]) for g in groups]


def test_graded_beside_the_groups_are_the_same() -> None:
    assert shown(roll(Engine(), score, beside=True)) == shown(roll(Engine(), score, beside=False))


def test_what_has_ended_while_a_call_went_on_is_graded_in_the_next_one() -> None:
    calls, begun, go_on = list[tuple[int, bool]](), threading.Event(), threading.Event()

    def grade(answered: Sequence[Answered], log: StepLog) -> list[Verdict]:
        calls.append((len(answered), threading.current_thread() is threading.main_thread()))
        begun.set()
        assert go_on.wait(60)
        return score(answered, log)

    def between(count: int) -> None:
        assert begun.wait(60)
        if count == 9:
            go_on.set()
            end = time.monotonic() + 60
            while len(calls) < 2 and time.monotonic() < end:
                time.sleep(0.01)

    roll(Engine(between), grade, beside=True)
    assert calls[:2] == [(1, False), (8, False)] and sum(count for count, _ in calls) == 12


@pytest.mark.parametrize("at", [1, 12])
def test_an_error_in_grading_ends_the_sampling_with_its_cause(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the sampling, or of what the engine gives at its end."""
    graded, gradings = [0], list[Future[Any]]()

    class Kept(ThreadPoolExecutor):
        def submit(self, *args: Any, **more: Any) -> Future[Any]:
            gradings.append(super().submit(*args, **more))
            return gradings[-1]

    monkeypatch.setattr("zppo.rollout.student.ThreadPoolExecutor", Kept)

    def broken(answered: Sequence[Answered], log: StepLog) -> list[Verdict]:
        graded[0] += len(answered)
        if graded[0] >= at:
            raise ValueError("the grader is broken")
        return score(answered, log)

    def between(count: int) -> None:
        if at == 1 and count == 1:
            assert gradings[0].exception(60)
        assert at > 1 or count < 5, "it goes on sampling"

    with pytest.raises(ValueError, match="the grader is broken"):
        roll(Engine(between), broken, beside=True)


def test_an_interruption_does_not_wait_for_the_grading() -> None:
    begun, go_on, graded = threading.Event(), threading.Event(), [0]

    def slow(answered: Sequence[Answered], log: StepLog) -> list[Verdict]:
        begun.set()
        assert go_on.wait(60)
        graded[0] += len(answered)
        return score(answered, log)

    def between(count: int) -> None:
        assert begun.wait(60)
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll(Engine(between), slow, beside=True)
    assert graded == [0]
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("grading"):
            thread.join(60)
    assert graded == [1], "what waited is dropped"
