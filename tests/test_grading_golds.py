"""Several right answers, and what bounds the time of hostile ones: counted work, no clock."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from same_run import assert_same_run
from zppo.cli import main
from zppo.config.settings import Settings
from zppo.core.metrics import wrong_example
from zppo.core.types import Golds, Group, Message, Prompt, Question, Rollout
from zppo.engines.base import Sampling
from zppo.grading import Grader, has_gold_words
from zppo.grading import answer_form as form_module
from zppo.grading.golds import bare_items
from zppo.grading.grader import TimeOuts
from zppo.grading.text import extract_boxed
from zppo.prompts import PromptBook
from zppo.report.read_run import scan_file
from zppo.rollout.grading import Scorer, rule_grading
from zppo.rollout.reformulated import _listed
from zppo.rollout.student import Answered
from zppo.step_log import StepLog
from zppo.teacher.compression import Source, accept
from zppo.teacher.hints import accept_hint
from zppo.teacher.interface import TeacherReply, TeacherSampling
from zppo.teacher.judge import Case, Judge
from zppo.train.run import resume


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(deadline=30.0) as grader:  # a busy machine must not fail it
        yield grader


def right(grader: Grader, gold: Golds, answer: str) -> bool:
    return grader.grade(f"\\boxed{{{answer}}}", gold).correct


ANY = Golds("any", ("Paris", "the city on the Seine", r"x^2-1"))
SET = Golds("set", ("3", r"\frac12", "x+1"))
ORDERED = Golds("ordered", ("68", "27", "20"))


@pytest.mark.parametrize(
    ("gold", "answer", "wanted"),
    [
        (ANY, "paris", True),
        (ANY, "The city on the Seine", True),
        (ANY, "(x-1)(x+1)", True),  # by algebra
        (ANY, "Lyon", False),
        (ANY, "(x-1)(x+2)", False),
        (ANY, "Paris or Lyon", False),
        (Golds("any", ("5", "6")), "5 or 6", False),  # a hedge
        (Golds("any", ("5", "6")), r"\{5, 6\}", False),
        (SET, r"0.5, 3, 1+x", True),
        (SET, r"\{1 + x, 3, \frac{1}{2}\}", True),
        (SET, r"x + 1, 3 \text{ and } 1/2", True),
        (SET, "3, 1/2", False),
        (SET, "3, 1/2, x+1, 4", False),
        (SET, "3, 3, 1/2", False),
        (SET, "3", False),
        (SET, "(3, 1/2, x+1)", False),  # a point is no set
        (Golds("set", ("A", "C")), "CA", True),
        (Golds("set", ("A", "C")), "C and A", True),
        (Golds("set", ("A", "C")), "A", False),
        (Golds("set", ("(1,2)", "(3,4)")), "(3,4), (1,2)", True),
        (Golds("set", ("(1,2)", "(3,4)")), "(4,3), (1,2)", False),
        (Golds("set", ("x^2-1", "x^2-4")), "(x-2)(x+2), (x-1)(x+1)", True),
        (Golds("set", ("1", "-1")), r"\pm 1", True),
        (Golds("set", ("red", "light blue")), "light blue and red", True),
        (Golds("set", ("May 5, 2020", "June 1, 2021")), "June 1, 2021; May 5, 2020", True),
        (Golds("set", ("New York, NY", "Boston, MA")), "Boston, MA and New York, NY", True),
        (Golds("set", ("New York, NY", "Boston, MA")), "Boston, NY; New York, MA", False),
        (ORDERED, "68, 27, 20", True),
        (ORDERED, "(68, 27, 20)", True),
        (ORDERED, "[68, 27, 20]", True),
        (ORDERED, "68, 27 and 20", True),
        (ORDERED, "20, 27, 68", False),
        (ORDERED, r"\{68, 27, 20\}", False),  # a set has no order
        (ORDERED, "68, 27", False),
        (ORDERED, "68, 27, 20, 5", False),
        (Golds("ordered", ("3", "5")), "[3, 5]", True),
        (Golds("ordered", ("3", "5")), "[3, 5)", False),
        (Golds("ordered", ("B", "D", "A")), "BDA", True),
        (Golds("ordered", ("B", "D", "A")), "ABD", False),
        (Golds("ordered", ("x^2-1", "2")), "(x-1)(x+1), 2", True),
        (Golds("set", tuple(map(str, range(40)))), ", ".join(map(str, range(39, -1, -1))), True),  # more than is paired off: by words
        (Golds("ordered", tuple(map(str, range(40)))), ", ".join(map(str, range(39, -1, -1))), False),
    ],
)
def test_any_set_and_ordered(grader: Grader, gold: Golds, answer: str, wanted: bool) -> None:
    assert right(grader, gold, answer) is wanted


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=8, unique=True), st.randoms(use_true_random=False))
def test_a_set_has_no_order_and_an_order_is_kept(numbers: list[int], random: Any) -> None:
    golds = tuple(map(str, numbers))
    shuffled = random.sample(golds, len(golds))
    answer = ", ".join(shuffled)
    grader = Grader()  # no worker is needed
    assert right(grader, Golds("set", golds), answer)
    assert right(grader, Golds("ordered", golds), answer) is (shuffled == list(golds))
    assert not right(grader, Golds("any", golds), answer)
    assert all(right(grader, Golds("any", golds), one) for one in golds)


def test_the_very_words_of_several() -> None:
    assert has_gold_words("\\text{Paris}", "paris") and not has_gold_words("Paris", "the city Paris")
    assert has_gold_words(Golds("any", ("Rome", "Paris")), "paris") and not has_gold_words(Golds("any", ("1", "2")), "1, 2")
    assert has_gold_words(Golds("set", ("red", "Blue")), "blue, Red") and not has_gold_words(Golds("set", ("red", "blue")), "red")
    assert has_gold_words(Golds("ordered", ("red", "blue")), "red, blue") and not has_gold_words(
        Golds("ordered", ("red", "blue")), "blue, red"
    )


@pytest.mark.parametrize(
    ("gold", "items"),
    [("68, 27, 20", ("68", "27", "20")), ("1,234", ("1,234",)), ("(1, 2)", ("(1, 2)",)), ("[3, 5)", ("[3, 5)",)), ("5", ("5",))],
)
def test_only_a_bare_list_has_items(gold: str, items: tuple[str, ...]) -> None:
    assert bare_items(gold) == items


@pytest.mark.parametrize(("gold", "answer"), [(r"\{,\}", "5"), ("5", r"\{,\}"), (r"\{,\}", "1,2"), ("1,2", r"\{,\}"), (r"\{;\}", r"(1,2)")])
def test_a_set_of_nothing_but_commas_is_no_fault(grader: Grader, caplog: pytest.LogCaptureFixture, gold: str, answer: str) -> None:
    with caplog.at_level(logging.ERROR):
        assert grader.grade(f"\\boxed{{{answer}}}", gold).reason == "different"
    assert not caplog.records


# --- time-outs ------------------------------------------------------------------------------------------------------


class Pool:
    """In the place of the workers: towers of powers time out, everything else is equal; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []
        self.asked: list[tuple[str, str]] = []

    def compare(self, pairs: Sequence[tuple[str, str]], part: float = 1.0) -> list[str]:
        self.calls.append((len(pairs), part))
        self.asked += pairs
        return ["timeout" if "^{9" in answer else "equal" for _, answer in pairs]


def counted(workers: int = 1) -> tuple[Grader, Pool]:
    grader, pool = Grader(workers=workers), Pool()
    grader._pool = pool  # type: ignore[assignment]
    return grader, pool


def hostile(*numbers: int) -> list[str]:
    return [f"\\boxed{{{n}^{{9^{{9}}}}+x}}" for n in numbers]


HONEST = [f"\\boxed{{(x+{n})(x-{n})}}" for n in range(1, 40)]
GOLD = "x^2+7"


def test_a_group_s_hostile_answers_cost_two_deadlines() -> None:
    grader, pool = counted()
    spent = TimeOuts()
    verdicts = grader.grade_many([(text, GOLD) for text in hostile(*range(2, 66))], spent=spent)
    assert [v.reason for v in verdicts] == ["timeout"] * 64 and len(pool.asked) == 2
    assert (spent.total, spent.untried, grader.timeouts) == (2, 62, 64)


def test_honest_answers_of_other_groups_are_tried_in_full() -> None:
    grader, pool = counted()
    items = [(text, GOLD) for text in hostile(2, 3, 4, 5)] + [(text, "x^2+8") for text in HONEST]
    reasons = [v.reason for v in grader.grade_many(items)]
    assert reasons == ["timeout"] * 4 + ["equal"] * len(HONEST)
    assert {part for _, part in pool.calls} == {1.0}
    # Of one group, those that come before it has had its time.
    before = [(HONEST[0], GOLD), *((text, GOLD) for text in hostile(2, 3, 4)), (HONEST[1], GOLD), ("\\boxed{x^2+7}", GOLD)]
    assert [v.reason for v in grader.grade_many(before)] == ["equal", "timeout", "timeout", "timeout", "timeout", "equal"]


def test_what_is_tried_does_not_depend_on_the_calls() -> None:
    """Rollouts are graded while others are sampled, in calls that depend on the machine; the step's time-outs go through them."""
    texts = [HONEST[0], *hostile(2), *HONEST[1:3], *hostile(3), HONEST[3], *hostile(4), HONEST[4]]
    items = [(text, gold) for text in texts for gold in (GOLD, "x^2+8")]
    found = []
    for size in (1, 2, 3, 5, len(items)):
        grader, _ = counted()
        spent = TimeOuts()
        found.append([v.reason for at in range(0, len(items), size) for v in grader.grade_many(items[at : at + size], spent=spent)])
        assert (spent.total, spent.untried) == (4, 6)
    assert all(reasons == found[0] for reasons in found) and found[0].count("equal") == 6


def test_a_repeated_hostile_answer_counts_once_in_whatever_calls() -> None:
    items = [(text, GOLD) for text in (*hostile(2) * 5, HONEST[0], *hostile(2) * 3, *hostile(3), HONEST[1], *hostile(2), HONEST[0])]
    for size in (1, 3, len(items)):
        grader, pool = counted()
        spent = TimeOuts()
        reasons = [v.reason for at in range(0, len(items), size) for v in grader.grade_many(items[at : at + size], spent=spent)]
        assert [i for i, reason in enumerate(reasons) if reason == "equal"] == [5, 12] and spent.total == 2 and len(pool.asked) == 3


def test_nor_on_what_is_remembered() -> None:
    """A resumed run remembers nothing of earlier steps."""
    texts = [(text, GOLD) for text in (*hostile(2, 3), HONEST[0], *hostile(4))]
    grader, pool = counted()
    grader.grade_many([(HONEST[0], GOLD), *((text, GOLD) for text in hostile(2))])
    asked = len(pool.asked)
    remembering = [v.reason for v in grader.grade_many(texts)]
    assert len(pool.asked) == asked + 1  # the second tower alone
    assert remembering == [v.reason for v in counted()[0].grade_many(texts)] == ["timeout"] * 4


@pytest.mark.parametrize("workers", [1, 3])
def test_hostile_answers_of_many_groups_soon_get_little_time(workers: int) -> None:
    grader, pool = counted(workers)
    groups = range(100)
    items = [(text, f"x^2+{group}") for group in groups for text in hostile(2, 3, 4)]
    reasons = [v.reason for v in grader.grade_many(items)]
    assert reasons == ["timeout"] * 300
    full = sum(count for count, part in pool.calls if part == 1.0)
    assert full == 8 * workers and len(pool.asked) - full <= 100
    # An honest answer of yet another group is still tried, and what had little time is not remembered.
    spent = TimeOuts(by_group=cast(Any, Counter(others=8 * workers)))
    assert grader.grade_many([(HONEST[0], "x^2+999")], spent=spent)[0].correct
    asked = len(pool.asked)
    grader.grade_many([(items[-3][0], items[-3][1])])
    assert len(pool.asked) == asked + 1


def test_several_golds_do_not_multiply_the_time() -> None:
    grader, pool = counted()
    gold = Golds("any", tuple(f"x^2+{n}" for n in range(1, 20)))
    grader.grade_many([(text, gold) for text in hostile(*range(2, 12))])
    assert len(pool.asked) == 2
    grader, pool = counted()
    gold = Golds("set", tuple(f"x^2+{n}" for n in range(1, 20)))
    answer = ", ".join(f"{n}^{{9^{{9}}}}+x" for n in range(2, 21))
    assert grader.grade(f"\\boxed{{{answer}}}", gold).reason == "timeout" and len(pool.asked) == 2


def test_groups_of_a_step_have_time_of_their_own_and_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rollouts that spend it take nothing from the teacher's responses to the same question."""
    pool = Pool()
    pool.close = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr("zppo.grading.grader.WorkerPool", lambda *_: pool)
    question = Question("q", (Message("user", "?"),), GOLD)
    settings = Settings.model_validate({"student": {"model": "s"}, "data": {"train": "none.jsonl"}, "method": "grpo"})
    log = StepLog(1)
    with rule_grading(settings) as rule:
        score = Scorer(rule)
        score([Answered(question, text, False, "plain") for text in hostile(2, 3, 4)], log)
        assert score([Answered(question, HONEST[0], False, "teacher")], log)[0].correct
        assert not score([Answered(question, HONEST[1], False, "plain")], log)[0].correct
        assert log.own == {"graded_answers": 5, "grading_untried": 2}
        assert score([Answered(question, HONEST[1], False, "plain")], StepLog(2))[0].correct  # another step


# --- all the way ----------------------------------------------------------------------------------------------------

QUESTION = Question("q", (Message("user", "Where?"),), Golds("any", ("Paris", "the city on the Seine")))


def with_gold(how: Any, *answers: str) -> Question:
    return replace(QUESTION, gold=Golds(how, answers))


def test_the_judge_is_told_all_right_answers() -> None:
    requests: list[Any] = []

    class Model:
        def complete(self, asked: Sequence[Any], how: Any, log: Any = None) -> list[Any]:
            requests.extend(asked)
            return [TeacherReply(('{"verdict": "wrong"}',))] * len(asked)

    judge = Judge(Model(), PromptBook(), TeacherSampling(Sampling()), lambda text: text)  # type: ignore[arg-type]
    cases = [QUESTION, with_gold("set", "red", "blue"), with_gold("ordered", "red", "blue")]
    judge.decide([Case(question, "a") for question in cases], StepLog(1))
    shown = [r.messages[0].content.partition("<reference>\n")[2].partition("\n</reference>")[0] for r in requests]
    assert shown == [
        "any one of these: Paris; the city on the Seine",
        "all of these, in any order: red; blue",
        "all of these, in this order: red; blue",
    ]


def test_the_words_of_any_right_answer_spare_the_judge_a_call() -> None:
    judged = [replace(QUESTION, grading="judge"), replace(with_gold("set", "red", "blue"), grading="judge")]
    model: Any = type("Nobody", (), {"complete": lambda *_: pytest.fail("the judge is asked")})()
    judge = Judge(model, PromptBook(), TeacherSampling(Sampling()), lambda text: text)
    scorer = Scorer(lambda *_: [], judge)  # type: ignore[arg-type]
    for question, answer in zip(judged, ("the city on the seine", "blue, red"), strict=True):
        assert scorer([Answered(question, f"\\boxed{{{answer}}}", False)], StepLog(1))[0].correct


def test_an_ncq_lists_no_right_answer() -> None:
    """A reward function, or a judge, may call wrong what has a right answer's words."""

    def listed(question: Question, *answers: str | None) -> tuple[str, ...]:
        return _listed([Source("text", answer) for answer in answers], question)

    assert listed(QUESTION, "Lyon", "paris", "The city on the Seine", None, "lyon", "Paris or Lyon") == ("Lyon", "Paris or Lyon")
    assert listed(with_gold("set", "1", "2"), "2, 1", "1", "1, 3") == ("1", "1, 3")
    assert listed(with_gold("ordered", "1", "2"), "2, 1", "1, 2") == ("2, 1",)


def test_a_hint_gives_no_right_answer_away_and_a_summary_keeps_the_one_that_was_given() -> None:
    assert accept_hint("<hint>Think of the city on the Seine.</hint>", *QUESTION.golds) is None
    assert accept_hint("<hint>Think of France.</hint>", *QUESTION.golds) == "Think of France."
    cap = str
    assert accept("<summary>\\boxed{the City on the Seine}</summary>", "the city on the Seine", cap) is not None
    assert accept("<summary>\\boxed{Paris}</summary>", "the city on the Seine", cap) is None  # right as well, and another answer


def test_a_reward_function_gets_what_the_row_holds(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def reward(completion, question):\n    return completion in question.golds and question.gold.how == 'any'\n", encoding="utf-8"
    )
    data = {
        "student": {"model": "s"},
        "data": {"train": "none.jsonl"},
        "method": "grpo",
        "grading": {"reward": f"{tmp_path / 'own.py'}:reward"},
    }
    with rule_grading(Settings.model_validate(data)) as rule:
        assert [v.correct for v in rule([Answered(QUESTION, text, False) for text in ("Paris", "Lyon")])] == [True, False]


@pytest.fixture
def listed_recipe(recipe: Path, tmp_path: Path) -> Path:
    """The shared recipe on questions with several right answers."""
    AcceleratorState._reset_state(True)
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    hows = ("any", "set", "ordered")
    rows = [
        {"prompt": f"What is {i} plus 1?", "answer": [str(i + 1), f"{i} + one"], "answer_list": hows[i % 3], "id": f"q{i}"}
        for i in range(20)
    ]
    (tmp_path / "several.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data["data"] |= {"train": "several.jsonl", "eval": "several.jsonl"}
    for section in ("student", "teacher"):
        data[section]["model"] = str(recipe.parent / section)
    reward = (recipe.parent / "reward.py").read_text(encoding="utf-8") + "\ndef several(completion, question):\n"
    (tmp_path / "reward.py").write_text(reward + "    assert len(question.golds) == 2\n    return reward(completion, question)\n")
    data["grading"]["reward"] = f"{tmp_path / 'reward.py'}:several"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_run_on_several_right_answers_and_its_resumed_twin(listed_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", str(listed_recipe), f"--output={run}", "--train.steps=4", "--train.checkpoint_every=2"]) == 0
    rows = [row for path in sorted((run / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()]
    for row in rows:
        i = int(row["question_id"][1:])
        assert row["golds"] == [str(i + 1), f"{i} + one"] and row["answer_list"] == ("any", "set", "ordered")[i % 3]
        assert row["gold"].endswith(f": {i + 1}; {i} + one")
    state = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text(encoding="utf-8"))
    held = [Question.from_dict(entry[0]) for entry in state["buffer"]["entries"]]
    assert held and all(isinstance(question.gold, Golds) for question in held)
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints" / "step-000004")
    (again / "final" / "README.md").unlink()
    AcceleratorState._reset_state(True)
    resume(again)
    assert_same_run(run, again)
    # Files of an earlier version lack the columns.
    path = sorted((run / "rollouts").iterdir())[0]
    before = scan_file(path)
    pq.write_table(pq.read_table(path).drop_columns(["golds", "answer_list"]), path)
    assert [line.question_id for line in scan_file(path).groups] == [line.question_id for line in before.groups]


@pytest.mark.slow
def test_a_run_whose_golds_cannot_match_says_so_before_and_after(
    listed_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {i} plus 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(20)]
    (tmp_path / "several.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    # A random model boxes nothing: everything that it writes counts as 5.
    monkeypatch.setattr(form_module, "extract_boxed", lambda text, think_open, anywhere: "5")
    options = [
        "--grading.reward=null",
        "--method=grpo",
        "--data.limit=1",
        "--train.steps=4",
        "--eval.every=0",
        f"--output={tmp_path / 'run'}",
    ]
    options += ["--train.checkpoint_every=0"]
    told = "several.jsonl, row 1, column 'answer': the right answer '0 + 1 = 1\\n#### 1' holds the mark '####'"
    mend = "take what follows it with data.answer_after: '####'"
    for more in (["--dry-run"], []):
        assert main(["train", str(listed_recipe), *options, *more]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.count(told) == 2 and said.count(mend) == 2  # questions to train on, and held-out ones
        if not more:
            assert said.count("not one answer has been right") == 1 and "step 3: not one answer has been right in 3 steps" in said
            assert "Right answer '0 + 1 = 1\\n#### 1' | answer '5' (question 'several.jsonl:1')" in said
    (tmp_path / "several.jsonl").write_text(json.dumps({"prompt": "4 plus 1?", "answer": "So\n#### 5"}), encoding="utf-8")
    AcceleratorState._reset_state(True)
    options[-2] = f"--output={tmp_path / 'mended'}"
    assert main(["train", str(listed_recipe), *options, "--data.answer_after=####"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "####" not in said and "not one answer" not in said
    final = [json.loads(line) for line in (tmp_path / "mended" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    assert final["accuracy"] == 1.0


def test_the_example_is_of_a_wrong_rollout_with_an_answer() -> None:
    def rollout(text: str, correct: bool, graded: bool = True) -> Rollout:
        nothing = torch.zeros(0)
        return Rollout(nothing, nothing, text, extract_boxed(text), correct, float(correct), graded=graded)

    prompt = Prompt("plain", QUESTION, QUESTION.messages, ())
    first = Group(prompt, (rollout("\\boxed{Paris}", True), rollout("no", False), rollout("\\boxed{Rome}", False, graded=False)))
    assert wrong_example([first]) == ""
    second = Group(prompt, (rollout("\\boxed{" + "Lyon" * 100 + "}", False),))
    said = wrong_example([first, second])
    assert said.startswith("Right answer 'any one of these: Paris; the city on the Seine' | answer 'LyonLyon") and len(said) < 250
