"""A user's own reward function: how it is found and what it may return."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from zppo.cli import main
from zppo.config.data_settings import ColumnSettings
from zppo.config.settings import GradingSettings
from zppo.core.types import Message, Question
from zppo.data.load import load_questions
from zppo.errors import RewardError
from zppo.grading import RewardFunction, Verdict, load_reward
from zppo.grading.reward_function import form_of
from zppo.rollout.rewards import AT_ONCE, Rewards, make_rewards, unique_names
from zppo.rollout.student import Answered
from zppo.step_log import StepLog
from zppo.train.trainer import _reward_metrics

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
    with pytest.raises(RewardError, match=r"failed on question 'q7' with SystemExit: 3"):
        RewardFunction(lambda completion, question: sys.exit(3))("text", QUESTION)


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


REFUSED = {
    "def f(completion): return 1.0": ("is f(completion), which cannot be called with (completion, question)", "Give it these two"),
    "def f(completion, question, more): return 1.0": (
        "which cannot be called with (completion, question)",
        "f(completion, question, more)",
    ),
    "def f(completion, question, *, strict): return 1.0": ("cannot be called with", "Give it these two"),
    "def f(reward_inputs, format_weight=0.1): return [{}]": (
        "has the form of EasyR1",
        """"ground_truth": question.gold}])[0]["overall"]""",
    ),
    "def f(reward_input: dict): return {}": ("has the form of EasyR1", """"ground_truth": question.gold})["overall"]"""),
    "def f(data_sources, solution_strs, ground_truths, extra_infos): return []": ("verl for batches", "solution_strs=[completion]"),
    "def f(predict_str, ground_truth, use_boxed=True): return 1.0": ("in that order", "return f(completion, question.gold)"),
    "def f(output, expected): return 1.0": ("in that order", "return f(completion, question.gold)"),
    "def f(ground_truth, response): return 1.0": ("in that order", "return f(question.gold, completion)"),
    "import torch\nf = torch.nn.Linear(1, 1)": ("is a model", "name a function that gives it what it reads"),
    "def f(prompt, response): return 1.0": ("in that order", "return f(question.messages[-1].content, completion)"),
    "def f(prompt, response, answer): return 1.0": ("in that order", "f(question.messages[-1].content, completion, question.gold)"),
    "def f(completion, question): yield 1.0": ("is a generator, since it has `yield`", "with `return`"),
    "async def f(completion, question): yield 1.0": ("is a generator", "with `return`"),
    "async def f(completions, **columns): yield 1.0": ("is a generator", "with `return`"),
    "class f:\n    def __init__(self, threshold): pass\n    def __call__(self, completion, question): return 1.0": (
        "is a class, and cannot be made without arguments (TypeError",
        "give them defaults, or name an object of it",
    ),
    "class f:\n    pass": ("is a class without __call__", "give it __call__"),
    "class f:\n    def __call__(self, completion): return 1.0": ("is f(completion), which cannot be called", "or the form of TRL"),
    "f = 1.0": ("is a float, which cannot be called", "Name a function"),
    "def g(completion, question): return 1.0": ("has no 'f'", "Check the spelling"),
    "def f(completion, question) return 1.0": ("failed with SyntaxError", "mine.py, line 1"),
    "import sys\nsys.exit(3)": ("failed with SystemExit: 3", "Mend that file"),
    "import no_such_package_here\ndef f(completion, question): return 1.0": ("No module named 'no_such_package_here'", "Mend that file"),
    "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1": ("is a git-lfs pointer", "git lfs pull"),
}


def dry_run(folder: Path, reward: str = "mine.py:f", data: str = "") -> int:
    (folder / "q.jsonl").write_text('{"prompt": "2+3?", "answer": 5, "task": "sum"}')
    (folder / "r.yaml").write_text(
        f"method: grpo\nstudent: {{model: a/b}}\ndata: {{train: q.jsonl{data}}}\ngrading: {{reward: {reward}}}\n"
    )
    return main(["train", str(folder / "r.yaml"), "--dry-run"])


@pytest.mark.parametrize("code", REFUSED)
def test_what_cannot_be_called_is_refused_at_the_start_and_in_the_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    (tmp_path / "mine.py").write_text(f"{code}\n")
    kind, mend = REFUSED[code]
    with pytest.raises(RewardError) as caught:
        load_reward(f"{tmp_path / 'mine.py'}:f")
    assert kind in str(caught.value) and mend in str(caught.value)
    assert dry_run(tmp_path) == 2
    said = capsys.readouterr().err
    assert kind in said and mend in said and "Traceback" not in said


WRAP = "import functools\ndef wrap(g):\n    @functools.wraps(g)\n    def w(*args, **kwargs): return g(*args, **kwargs)\n    return w\n"
ALL_FORMS = {
    "def f(completion, question): return 1.0": "zppo",
    "def f(*everything): return 1.0": "zppo",
    "def f(completion, question, strict=True, *, more=1): return 1.0": "zppo",
    "def f(a, /, b): return 1.0": "zppo",
    "f = lambda completion, question: 1.0": "zppo",
    "import functools\ndef g(x, completion, question): return 1.0\nf = functools.partial(g, 0)": "zppo",
    "class C:\n    def __call__(self, completion, question): return 1.0\nf = C()": "zppo",
    "class f:\n    def __call__(self, completion, question): return 1.0": "zppo",
    "class f:\n    def __init__(self, weight=1.0): self.weight = weight\n    def __call__(self, c, q): return self.weight": "zppo",
    "async def f(completion, question): return 1.0": "zppo",
    "async def g(completion, question): return 1.0\nf = lambda completion, question: g(completion, question)": "zppo",
    "class f:\n    async def __call__(self, completion, question): return 1.0": "zppo",
    f"{WRAP}@wrap\ndef f(completion, question): return 1.0": "zppo",
    "import functools\n@functools.lru_cache\ndef f(completion, question): return 1.0": "zppo",
    "def wrap(g):\n    return lambda completion, question: g([completion])[0]\n@wrap\ndef f(completions): return [1.0]": "zppo",
    "def f(completions, **columns): return [1.0] * len(completions)": "trl",
    "def f(completion_ids, **columns): return [1.0 for _ in completion_ids]": "trl",
    "def f(**kwargs): return [1.0 for _ in kwargs['completions']]": "trl",
    "def f(prompts, completions, completion_ids, trainer_state, answer, task=None): return [1.0] * len(answer)": "trl",
    "def f(*, completions, **kwargs): return [1.0 for _ in completions]": "trl",
    "def f(completions, **kwargs):\n    for _ in completions: yield 1.0": "trl",
    "async def f(completions, **kwargs): return [1.0 for _ in completions]": "trl",
    "f = lambda completions, **kwargs: [1.0 for _ in completions]": "trl",
    "class C:\n    def __call__(self, completions, **kwargs): return [1.0 for _ in completions]\nf = C()": "trl",
    "class f:\n    def __call__(self, completions, solution, **kwargs): return [1.0 for _ in completions]": "trl",
    "class C:\n    def g(self, completions, **kwargs): return [1.0 for _ in completions]\nf = C().g": "trl",
    "import functools\ndef g(scale, completions, **kw): return [scale for _ in completions]\nf = functools.partial(g, 1.0)": "trl",
    "import functools\ndef g(completions, scale, **kw): return [scale for _ in completions]\nf = functools.partial(g, scale=1.0)": "trl",
    f"{WRAP}@wrap\ndef f(completions, **columns): return [1.0 for _ in completions]": "trl",
    "import torch\ndef f(completions, **columns): return torch.ones(len(completions))": "trl",
    "import numpy\ndef f(completions, **columns): return numpy.ones(len(completions))": "trl",
    "def f(data_source, solution_str, ground_truth, extra_info=None): return float(ground_truth == '5')": "verl",
    "def f(solution_str, ground_truth, method='strict', format_score=0.0, score=1.0): return score": "verl",
    "def f(data_source, solution_str, ground_truth, extra_info=None, **kw): return {'score': 1.0, 'acc': True, 'pred': '5'}": "verl",
    "print('hello')\ndef f(completion, question): return 1.0": "zppo",
}


@pytest.mark.parametrize("code", ALL_FORMS)
def test_every_form_that_people_have_is_called_as_it_wants_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str) -> None:
    (tmp_path / "mine.py").write_text(f"{code}\n")
    assert load_reward(f"{tmp_path / 'mine.py'}:f").form == ALL_FORMS[code]
    rewards = make_rewards(GradingSettings(reward=f"{tmp_path / 'mine.py'}:f"))
    chat = Question(id="q8", messages=QUESTION.messages, gold="5", chat=True)
    for verdict in rewards([Answered(q, r"\boxed{5}", False, ids=(1, 2)) for q in (QUESTION, chat, QUESTION)], StepLog(1)):
        assert (verdict.correct, verdict.reward, verdict.answer, verdict.graded, verdict.rewards) == (True, 1.0, "5", True, {"f": 1.0})
    rewards.close()
    assert dry_run(tmp_path) == 0
    capsys.readouterr()


def test_columns_that_a_function_asks_for_are_brought_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def f(completions, task, **columns): return [1.0 if t == 'sum' else 0.0 for t in task]\n")
    assert dry_run(tmp_path) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "mine.py:f takes 'task', and question 'q.jsonl:1' brings no column of that name" in said
    assert "data.columns.extra: [task]" in said
    assert dry_run(tmp_path, data=", columns: {extra: [task]}") == 0
    capsys.readouterr()
    (question,) = load_questions(str(tmp_path / "q.jsonl"), ColumnSettings(extra=("task",)))
    assert question.extra == {"task": "sum"} and Question.from_dict(json.loads(json.dumps(question.to_dict()))) == question
    assert make_rewards(GradingSettings(reward=f"{tmp_path / 'mine.py'}:f"))([Answered(question, "", False)])[0].correct


def test_what_a_function_of_trls_form_is_given() -> None:
    seen: list[dict[str, Any]] = []

    def f(**kwargs: Any) -> list[float]:
        seen.append(kwargs)
        kwargs["log_extra"]("parsed", [None] * len(kwargs["completions"]))
        kwargs["log_metric"]("share", 0.25)
        return [0.5] * len(kwargs["completions"])

    rewards = Rewards([RewardFunction(f, "m:f", form="trl")], [1.0], 1.0)
    chat = Question("c", (Message("system", "s"), Message("user", "?")), "7", chat=True, extra={"task": "x", "solution": "so 7"})
    rewards.prepare([QUESTION, chat], lambda text: [len(text)])
    rewards.steps = 10
    log = StepLog(3)
    verdicts = rewards([Answered(QUESTION, "a", False, ids=(4, 5)), Answered(chat, "bcd", False), Answered(QUESTION, "e", False)], log)
    texts, chats = seen
    assert texts["prompts"] == ["2+3?"] * 2 and texts["completions"] == ["a", "e"] and texts["completion_ids"] == [[4, 5], [1]]
    assert texts["answer"] == texts["ground_truth"] == texts["solution"] == ["5", "5"]
    assert chats["prompts"] == [[{"role": "system", "content": "s"}, {"role": "user", "content": "?"}]]
    assert chats["completions"] == [[{"role": "assistant", "content": "bcd"}]]
    assert (chats["solution"], chats["task"], chats["answer"]) == (["so 7"], ["x"], ["7"])
    assert (texts["trainer_state"].global_step, texts["trainer_state"].max_steps) == (2, 10)
    assert [v.notes for v in verdicts] == [{"parsed": None}] * 3
    assert _reward_metrics([], StepLog(counts=dict(log.own))) == {"reward_metrics": {"share": 0.25}}


def test_trls_own_functions_run_here() -> None:
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    chat = Question("c", (Message("user", "?"),), "7", chat=True)
    functions = [
        RewardFunction(f, f"trl:{i}", form=form_of(f, "f")) for i, f in enumerate((think_format_reward, get_soft_overlong_punishment(4, 2)))
    ]
    rewards = Rewards(functions, [1.0, 0.5], 5.0)
    good, bad = rewards([Answered(chat, "<think>x</think>\n7", False, ids=(1, 2, 3)), Answered(chat, "7", False, ids=(1,) * 9)])
    assert (good.reward, good.correct) == (0.75, True) and (bad.reward, bad.correct) == (-0.5, False)


def test_a_chat_function_on_texts_is_told_of_the_difference() -> None:
    f = RewardFunction(lambda completions, **columns: [float(c[0]["content"]) for c in completions], "m:f", form="trl")
    with pytest.raises(RewardError, match=r"TypeError.*It was given completions as texts, as the rows .* count on lists of messages"):
        Rewards([f], [1.0], 1.0)([Answered(QUESTION, "1", False)])


@pytest.mark.parametrize("value", [None, 1.0, "1", {"reward": 1}, [1.0], [1.0] * 3, [1.0, "x"], [1.0, math.nan], torch.tensor(1.0)])
def test_what_is_no_list_of_rewards_is_refused(value: object) -> None:
    f = RewardFunction(lambda completions, **columns: value, "m:f", form="trl")
    with pytest.raises(RewardError, match=r"m:f returned .*'q7'.*must return one number"):
        Rewards([f], [1.0], 1.0)([Answered(QUESTION, "1", False), Answered(QUESTION, "2", False)])


# --- several ---------------------------------------------------------------------------------------------------------------


def several(*values: object, weights: tuple[float, ...] = ()) -> Verdict:
    functions = [RewardFunction(lambda c, q, v=v: v, f"m:f{i}", optional=True) for i, v in enumerate(values)]
    return Rewards(functions, weights or (1.0,) * len(values), 1.0)([Answered(QUESTION, r"\boxed{4}", False)])[0]


def test_the_reward_is_the_weighted_sum_and_the_first_says_what_is_solved() -> None:
    verdict = several(1.0, 0.5, weights=(1.0, 0.2))
    assert (verdict.correct, verdict.reward, verdict.rewards, verdict.reason) == (True, 1.1, {"f0": 1.0, "f1": 0.5}, "reward")
    assert not several(0.0, 1.0, 1.0).correct  # a bonus makes nothing solved, whatever the sum
    assert several(0.0, 1.0, 1.0).reward == 2.0
    assert several(1.0, -0.75).correct and several(1.0, -0.75).reward == 0.25  # a penalty makes nothing hard
    assert several((True, 0.25), 0.5).correct and several((True, 0.25), 0.5).reward == 0.75
    assert several({"correct": True, "answer": "four", "reason": "parsed"}, 0.5).answer == "four"
    assert several(1.0, 0.5).answer == "4"


def test_a_function_that_does_not_apply_is_left_out() -> None:
    verdict = several(None, 1.0, 0.5)
    assert (verdict.correct, verdict.reward, verdict.rewards) == (True, 1.5, {"f1": 1.0, "f2": 0.5})
    nothing = several(None, None)
    assert (nothing.graded, nothing.correct, nothing.reward, nothing.reason) == (False, False, 0.0, "reward does not apply")
    log = StepLog(1)
    rewards = Rewards([RewardFunction(lambda completions, **c: [None, 1.0], "m:f", form="trl")], [1.0], 1.0)
    assert [v.graded for v in rewards([Answered(QUESTION, "", False)] * 2, log)] == [False, True]
    assert log.own["reward_without"] == 1 and "1 completions are ungraded" in log.warnings["rewards that do not apply"]


def test_the_dry_run_says_how_they_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def f(completion, question): return 1.0\ndef g(completions, **columns): return [1.0]\n")
    assert dry_run(tmp_path, "[mine.py:f, mine.py:g], reward_weights: [1, 0.25]") == 0
    assert "f + 0.25 g; what is solved, f says" in " ".join(capsys.readouterr().out.split())
    for weights, said in (("[1]", "has 1 values for 2 reward functions"), ("[1, .nan]", "grading.reward_weights.1")):
        assert dry_run(tmp_path, f"[mine.py:f, mine.py:g], reward_weights: {weights}") == 2
        assert said in capsys.readouterr().err
    assert dry_run(tmp_path, "[]") == 2
    assert "is an empty list" in capsys.readouterr().err


def test_names_are_told_apart() -> None:
    assert unique_names(["a.py:score", "b.py:score", "m:C.score", "b.py:score", "x:y"]) == ["score", "score-2", "C.score", "score-3", "y"]


# --- async -----------------------------------------------------------------------------------------------------------------


def asynchronous(function: Any, count: int, deadline: float = 0.2, log: StepLog | None = None) -> list[Verdict]:
    rewards = Rewards([RewardFunction(function, "m:f")], [1.0], deadline)
    try:
        return rewards([Answered(QUESTION, str(i), False) for i in range(count)], log)
    finally:
        rewards.close()


def test_async_calls_wait_at_the_same_time_and_a_late_one_is_ungraded() -> None:
    waiting, most = 0, 0

    async def f(completion: str, question: Question) -> float:
        nonlocal waiting, most
        waiting, most = waiting + 1, max(most, waiting + 1)
        if completion == "3":
            await asyncio.Event().wait()  # for ever
        await asyncio.sleep(0)
        waiting -= 1
        return 1.0

    log = StepLog(1)
    verdicts = asynchronous(f, 100, log=log)
    assert [v.graded for v in verdicts] == [i != 3 for i in range(100)] and verdicts[3].reason == "reward timeout"
    assert 2 < most <= AT_ONCE
    assert log.own["reward_timeouts"] == 1 and "grading.reward_deadline" in log.warnings["reward timeouts"]


@pytest.mark.slow
def test_what_does_not_listen_is_given_up() -> None:
    release = threading.Event()

    async def stubborn(completion: str, question: Question) -> float:
        if completion == "0":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.Event().wait()
        return 1.0

    assert [v.graded for v in asynchronous(stubborn, 3)] == [False, True, True]

    async def blocking(completion: str, question: Question) -> float:
        if completion == "1":
            release.wait()  # the whole loop
        return 1.0

    rewards = Rewards([RewardFunction(blocking, "m:f")], [1.0], 0.2)
    assert [v.graded for v in rewards([Answered(QUESTION, str(i), False) for i in range(2)])] == [True, False]
    assert rewards([Answered(QUESTION, "5", False)])[0].graded  # in a new loop
    release.set()
    rewards.close()


def test_one_loop_lasts_for_the_run_and_sync_functions_stay_in_their_thread() -> None:
    loops, threads = set(), set()

    async def f(completion: str, question: Question) -> float:
        loops.add(id(asyncio.get_running_loop()))
        return 0.5

    def g(completion: str, question: Question) -> float:
        threads.add(threading.current_thread())
        return 0.5

    rewards = Rewards([RewardFunction(f, "m:f"), RewardFunction(g, "m:g")], [1.0, 1.0], 5.0)
    assert {rewards([Answered(QUESTION, "", False)])[0].reward for _ in range(3)} == {1.0}
    assert len(loops) == 1 and threads == {threading.current_thread()}
    rewards.close()


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("of its own"), asyncio.CancelledError(), SystemExit(3)])
def test_an_async_function_that_raises_ends_the_run(error: BaseException) -> None:
    async def f(completion: str, question: Question) -> float:
        raise error

    with pytest.raises(RewardError, match=r"m:f failed on question 'q7' with"):
        asynchronous(f, 2)
