"""A user's own reward function: how it is found and what it may return."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zppo.core.types import Message, Question
from zppo.errors import RewardError
from zppo.grading import RewardFunction, Verdict, load_reward

QUESTION = Question(id="q7", messages=(Message("user", "2+3?"),), gold="5")


def _verdict(value: object, completion: str = r"\boxed{5}") -> Verdict:
    return RewardFunction(lambda completion, question: value, "mine")(completion, QUESTION)


@pytest.mark.parametrize(
    ("value", "correct", "reward"),
    [
        (1, True, 1.0),
        (0.5, False, 0.5),
        (-2.0, False, -2.0),
        (3, True, 3.0),
        (True, True, 1.0),
        (False, False, 0.0),
        ((True, 0.25), True, 0.25),
        ((False, 1.0), False, 1.0),
        ([1, 0.5], True, 0.5),
        ({"correct": True, "reward": 0.5}, True, 0.5),
        ({"correct": True}, True, 1.0),
        ({"correct": False}, False, 0.0),
        ({"reward": 1.0}, True, 1.0),
        ({"reward": 0.9}, False, 0.9),
        (torch.tensor(1.5), True, 1.5),
        ((torch.tensor(True), torch.tensor(0.5)), True, 0.5),
    ],
)
def test_accepted_returns(value: object, correct: bool, reward: float) -> None:
    verdict = _verdict(value)
    assert (verdict.correct, verdict.reward, verdict.answer, verdict.graded) == (correct, reward, "5", True)
    assert type(verdict.correct) is bool
    assert type(verdict.reward) is float


@pytest.mark.parametrize(
    "value",
    [
        None, "1", b"1", math.nan, math.inf, -math.inf, (True,), (True, 1.0, 2), (0.5, 1.0), (True, math.nan), (None, 1.0), ("yes", 1.0),
        {}, {"score": 1}, {"correct": "yes"}, {"correct": True, "reward": None}, {"reward": math.nan}, {"reward": "1"},
        {"correct": True, "reward": math.inf}, {"correct": True, "answer": 5}, {"correct": True, "reason": 1}, torch.zeros(2), object(),
    ],
)  # fmt: skip
def test_refused_returns_are_named(value: object) -> None:
    with pytest.raises(RewardError, match=r"mine returned .*'q7'.*must return"):
        _verdict(value)


def test_mapping_may_name_answer_and_reason() -> None:
    verdict = _verdict({"correct": True, "answer": "five", "reason": "parsed"})
    assert (verdict.answer, verdict.reason) == ("five", "parsed")
    assert _verdict({"correct": False, "answer": None}).answer is None


def test_thinking_hides_the_answer() -> None:
    function = RewardFunction(lambda completion, question: 1)
    assert function(r"\boxed{5}", QUESTION, think_open=True).answer is None


def test_arguments_and_failures() -> None:
    seen: list[Any] = []
    RewardFunction(lambda completion, question: seen.extend((completion, question)) or 0)("text", QUESTION)
    assert seen == ["text", QUESTION]

    def broken(completion: str, question: Question) -> float:
        raise KeyError("gold")

    with pytest.raises(RewardError, match=r"broken failed on question 'q7' with KeyError"):
        RewardFunction(broken)("text", QUESTION)


def test_load_from_a_file_and_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "class Rewards:\n    @staticmethod\n    def exact(completion, question):\n        return question.gold in completion\n"
    source += "def one(completion, question):\n    return 1.0\nname = 'x'\n"
    path = tmp_path / "my_reward_module.py"
    path.write_text(source)
    assert load_reward(f"{path}:one")("", QUESTION).correct
    assert load_reward(f"{path}:Rewards.exact")("it is 5", QUESTION).correct
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not load_reward("my_reward_module:Rewards.exact")("it is 6", QUESTION).correct
    monkeypatch.delitem(sys.modules, "my_reward_module")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "has no module"),
        ("justaname", "has no module"),
        ("module:", "has no module"),
        (":function", "has no module"),
        ("no_such_module_anywhere:f", "importing 'no_such_module_anywhere' failed"),
        ("math:no_such_function", "'math' has no 'no_such_function'"),
        ("math:pi", "a float, which cannot be called"),
        ("nowhere/reward.py:f", "there is no file"),
    ],
)
def test_bad_names(spec: str, said: str) -> None:
    with pytest.raises(RewardError, match=said):
        load_reward(spec)


def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1/0\n")
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        load_reward(f"{path}:f")
