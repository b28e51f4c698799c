"""Grading beside the sampling: the same groups, what has ended in one call, and an end where something goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from test_zone import Words, score
from zppo.core.types import Group, Message, Question
from zppo.engines.base import Completion, Finished, SampleRequest, Sampling
from zppo.grading.grader import Verdict
from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser
from zppo.rollout.student import Answered, PromptRenderer, Score, StudentSampler

QUESTIONS = [Question(f"q{i}", (Message("user", f"What is {i}?"),), str(i)) for i in range(3)]


class Engine:
    """Hands over all but the last completion of a request as they end; `between` is called after each."""

    context = None

    def __init__(self, between: Callable[[int], None] = lambda count: None) -> None:
        self.between, self.count = between, 0

    def sync(self) -> None: ...

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling, finished: Finished | None = None) -> list[list[Completion]]:
        made = [
            [Completion(torch.tensor([1 + i]), torch.zeros(1), truncated=False, entropy=0.0) for i in range(len(r.keys))] for r in requests
        ]
        for i, row in enumerate(made):
            for j, completion in enumerate(row[:-1]):
                if finished is not None:
                    finished(i, j, completion)
                self.count += 1
                self.between(self.count)
        return made


class Texts(Words):
    def decode(self, ids: Sequence[int]) -> str:
        return f"\\boxed{{{ids[-1]}}}"


def roll(engine: Engine, grade: Score, *, beside: bool) -> list[Group]:
    renderer = PromptRenderer(PromptBook(neutralise=Neutraliser()), Texts())  # type: ignore[arg-type]
    sampler = StudentSampler(engine, renderer, grade, Sampling(max_new_tokens=4), 4, 0, beside=beside)
    return sampler.roll([renderer.plain(q) for q in QUESTIONS], 1)


def shown(groups: Sequence[Group]) -> list[tuple[str, list[tuple[str, bool]]]]:
    return [(g.question.id, [(r.text, r.correct) for r in g.rollouts]) for g in groups]


def test_graded_beside_the_groups_are_the_same() -> None:
    assert shown(roll(Engine(), score, beside=True)) == shown(roll(Engine(), score, beside=False))


def test_what_has_ended_while_a_call_went_on_is_graded_in_the_next_one() -> None:
    calls, begun, go_on = list[tuple[int, bool]](), threading.Event(), threading.Event()

    def grade(answered: Sequence[Answered]) -> list[Verdict]:
        calls.append((len(answered), threading.current_thread() is threading.main_thread()))
        begun.set()
        assert go_on.wait(60)
        return score(answered)

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
def test_an_error_in_grading_ends_the_sampling_with_its_cause(at: int) -> None:
    """In the middle of the sampling, or of what the engine gives at its end."""
    graded = [0]
    ended = threading.Event()

    def broken(answered: Sequence[Answered]) -> list[Verdict]:
        graded[0] += len(answered)
        if graded[0] >= at:
            ended.set()
            raise ValueError("the grader is broken")
        return score(answered)

    def between(count: int) -> None:
        if at == 1 and count == 1:
            assert ended.wait(60)
            time.sleep(0.05)
        assert at > 1 or count < 5, "it goes on sampling"

    with pytest.raises(ValueError, match="the grader is broken"):
        roll(Engine(between), broken, beside=True)


def test_an_interruption_does_not_wait_for_the_grading() -> None:
    begun, go_on, graded = threading.Event(), threading.Event(), [0]

    def slow(answered: Sequence[Answered]) -> list[Verdict]:
        begun.set()
        assert go_on.wait(60)
        graded[0] += len(answered)
        return score(answered)

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
