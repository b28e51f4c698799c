"""A user's own reward function: how it is found and what it may return."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zppo.cli import main
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


FORMS = {
    "def f(completions, **columns): return [1.0] * len(completions)": ("has the form of TRL", "f(completions=[completion])[0]"),
    "def f(prompts, completions, answer, **kwargs): return [1.0]": (
        "has the form of TRL, f(prompts, completions, answer, kwargs)",
        "f(prompts=[question.messages[-1].content], completions=[completion], answer=[question.gold])[0]",
    ),
    "def f(completions, ground_truth): return [1.0]": (
        "has the form of TRL",
        "f(completions=[completion], ground_truth=[question.gold])[0]",
    ),
    "def f(*, completions, **kwargs): return [1.0]": ("has the form of TRL", "completions=[completion]"),
    "async def f(completions, **kwargs): return [1.0]": ("has the form of TRL", "asyncio.run(f(completions=[completion]))[0]"),
    "async def f(completion, question): return 1.0": ("is an async function", "asyncio.run(f(completion, question))"),
    "def f(data_source, solution_str, ground_truth, extra_info=None): return 1.0": (
        "has the form of verl",
        "f(data_source='', solution_str=completion, ground_truth=question.gold)",
    ),
    "def f(completion): return 1.0": ("cannot be called with (completion, question): it is f(completion)", "Give it these two"),
    "def f(completion, question, more): return 1.0": ("cannot be called with (completion, question)", "f(completion, question, more)"),
    "def f(completion, question, *, strict): return 1.0": ("cannot be called with", "Give it these two"),
}


@pytest.mark.parametrize("code", FORMS)
def test_forms_of_other_trainers_are_recognised_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"{code}\n")
    kind, mend = FORMS[code]
    with pytest.raises(RewardError) as caught:
        load_reward(f"{path}:f")
    assert kind in str(caught.value) and mend in str(caught.value)
    # The dry run reads the file, and does not run it.
    path.write_text(f"{code}\nraise RuntimeError('was run')\n")
    (tmp_path / "q.jsonl").write_text('{"prompt": "2+3?", "answer": 5}')
    (tmp_path / "r.yaml").write_text("method: grpo\nstudent: {model: a/b}\ndata: {train: q.jsonl}\ngrading: {reward: mine.py:f}\n")
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert kind in said and mend in said


@pytest.mark.parametrize(
    "code",
    [
        "def f(completion, question): return 1.0",
        "def f(*everything): return 1.0",
        "def f(completion, question, strict=True, *, more=1): return 1.0",
        "def f(a, /, b): return 1.0",
        "f = lambda completion, question: 1.0",
        "import functools\ndef g(x, completion, question): return 1.0\nf = functools.partial(g, 0)",
        "class C:\n    def __call__(self, completion, question): return 1.0\nf = C()",
        "def wrap(g):\n    return lambda completion, question: g([completion])[0]\n@wrap\ndef f(completions): return [1.0]",
    ],
)
def test_forms_that_can_be_called(tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str) -> None:
    (tmp_path / "mine.py").write_text(f"{code}\n")
    assert load_reward(f"{tmp_path / 'mine.py'}:f")("x", QUESTION).correct
    (tmp_path / "q.jsonl").write_text('{"prompt": "2+3?", "answer": 5}')
    (tmp_path / "r.yaml").write_text("method: grpo\nstudent: {model: a/b}\ndata: {train: q.jsonl}\ngrading: {reward: mine.py:f}\n")
    assert main(["train", str(tmp_path / "r.yaml"), "--dry-run"]) == 0
    capsys.readouterr()


def test_a_class_is_no_reward_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Reward:\n    def __call__(self, completion, question): return 1.0\n")
    with pytest.raises(RewardError, match="is a class"):
        load_reward(f"{tmp_path / 'mine.py'}:Reward")
