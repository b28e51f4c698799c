"""`zppo.parts` and docs/library.md: the pieces of a step without our trainer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zppo
from test_zone import ScriptedTeacher
from zppo.core.advantages import two_step_advantages
from zppo.core.types import JUDGE, Message, Question
from zppo.data.load import listed_questions
from zppo.data.order import batch_ids
from zppo.engines.base import Completion, FunctionEngine
from zppo.engines.chat import Chat
from zppo.engines.transformers import TransformersEngine
from zppo.errors import ModelError, SettingsError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_step_of_the_page_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    exec(compile(code, "library.md", "exec"), made)  # noqa: S102 - the page's own
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("1 {'plain': 16, 'bcq': ") and "'ncq': " in first
    assert second.startswith("2 {'plain': 20, "), "4 of 16 are replayed"
    before = AutoModelForCausalLM.from_pretrained(made["folder"]).state_dict()
    assert all(torch.isfinite(value).all() for value in made["model"].state_dict().values())
    assert any((value != before[name]).any() for name, value in made["model"].state_dict().items())
    with zppo.parts(made["settings"], made["questions"], made["tokenizer"]) as again:
        again.buffer.load_state_dict(made["parts"].buffer.state_dict())
        assert again.buffer.questions() == made["parts"].buffer.questions() != []


def test_what_the_page_names_exists() -> None:
    (settings,) = re.findall(r"`zppo\.(load_recipe\(\"lab\", .*?\))`", PAGE)
    assert eval("zppo." + settings).method.resolve().name == "grpo-replay"  # noqa: S307 - the page's own
    for name in re.findall(r"`parts\.(\w+)", PAGE):
        assert hasattr(zppo.Parts, name), name
    assert "docs/library.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def settings(recipe: Path) -> zppo.Settings:
    return zppo.load_recipe(recipe)


@pytest.fixture
def parts(settings: zppo.Settings) -> Iterator[zppo.Parts]:
    with zppo.parts(settings, zppo.load_data(settings)[0]) as made:
        yield made


def make_engine(settings: zppo.Settings, chat: Chat) -> TransformersEngine:
    model: Any = AutoModelForCausalLM.from_pretrained(settings.student.model, dtype=torch.float32)
    return TransformersEngine(model, chat.eos_ids(model), chat.pad_id(model), chat.banned_ids(model))


@pytest.mark.slow
def test_by_hand_it_is_the_step_that_train_takes(settings: zppo.Settings, parts: zppo.Parts, recipe: Path, tmp_path: Path) -> None:
    """The same prompts, completions and advantages, in the same order, bit for bit."""
    run = zppo.train(recipe, output=tmp_path / "run", train__steps=1, eval__every=0, data__eval=None)
    written = pq.read_table(run.folder / "rollouts" / "step-000001.parquet").to_pydict()
    questions, log = zppo.load_data(settings)[0], zppo.StepLog(1)
    new = [questions[i] for i in batch_ids(len(questions), settings.rollout.batch_size, settings.seed, 0)]
    student = parts.student(make_engine(settings, parts.prompts.chat))
    plain = student.rollout([parts.prompts.plain(q) for q in [*new, *parts.replayed(new)]], log)
    again = parts.reformulate(parts.hard(plain, 1), len(new), log)
    groups = [*plain, *student.rollout(again.prompts, log)]
    assert {group.kind for group in groups} == {"plain", "bcq", "ncq"}
    assert [r.text for g in groups for r in g.rollouts] == written["completion"]
    assert parts.advantages(groups).tolist() == written["advantage"]
    changes = parts.remember(plain, 1)
    events = [line for line in (run.folder / "buffer.jsonl").read_text().splitlines() if '"admitted"' in line]
    assert len(changes.admitted) == len(events) == len(parts.buffer) > 0


def test_completions_from_elsewhere_are_groups(settings: zppo.Settings, parts: zppo.Parts) -> None:
    question = zppo.load_data(settings)[0][0]
    prompt, encode = parts.prompts.plain(question), parts.prompts.chat.tokenizer.encode
    end, most = parts.prompts.chat.tokenizer.eos_token_id, settings.rollout.max_new_tokens
    given = [[*encode("so"), end], encode("a b c d e f g h i j k l m n o p q r s t u v")[:most]]
    (group,) = parts.grade([prompt], [given], zppo.StepLog(1))
    assert [r.ids.tolist() for r in group.rollouts] == given and [r.truncated for r in group.rollouts] == [False, True]
    assert group.rollouts[0].text == "so" and group.rollouts[0].logprobs.isnan().all()
    whole = Completion(torch.tensor(given[0]), torch.zeros(len(given[0])), True, 0.5)
    (group,) = parts.grade([prompt], [[whole]], zppo.StepLog(1))
    assert group.rollouts[0].truncated and group.rollouts[0].entropy == 0.5 and not group.rollouts[0].logprobs.isnan().any()
    with pytest.raises(ValueError, match="1 prompts and 2 lists"):
        parts.grade([prompt], [given, given], zppo.StepLog(1))
    with pytest.raises(ValueError, match="at least one token id"):
        parts.grade([prompt], [[[]]], zppo.StepLog(1))


def test_a_teacher_and_a_tokenizer_of_ones_own(settings: zppo.Settings) -> None:
    tokenizer = AutoTokenizer.from_pretrained(settings.student.model)
    question = Question("mine", (Message("user", "mine is what?"),), "gold")
    own, teacher = settings.model_copy(update={"grading": zppo.Settings.model_fields["grading"].default}), ScriptedTeacher({"mine": 4})
    with zppo.parts(own, [question], tokenizer, teachers=[teacher]) as parts:  # type: ignore[list-item]
        log = zppo.StepLog(1)
        end = [tokenizer.eos_token_id]
        wrong = [tokenizer.encode(f"\\boxed{{{i}}}") + end for i in range(4)]
        (group,) = parts.grade([parts.prompts.plain(question)], [wrong], log)
        again = parts.reformulate(parts.hard([group], 1), 4, log)
        assert [p.kind for p in again.prompts] == ["bcq", "ncq"] and teacher.rollouts == ["mine"]
        assert parts.within(len(again.prompts[0].ids)).reformulate([group], 4, log).prompts == []


def test_groups_that_leave_the_batch_have_no_advantage(settings: zppo.Settings) -> None:
    zone = settings.zone.model_copy(update={"dynamic_sampling": "after-reformulation"})
    scope = settings.advantage.model_copy(update={"scope": "all"})
    with zppo.parts(settings.model_copy(update={"zone": zone, "advantage": scope}), zppo.load_data(settings)[0]) as parts:
        prompt = parts.prompts.plain(zppo.load_data(settings)[0][0])
        (group,) = parts.grade([prompt], [[[1], [2], [3]]], zppo.StepLog(1))
        mixed = replace(group, rollouts=tuple(replace(r, reward=float(i == 0)) for i, r in enumerate(group.rollouts)))
        same = replace(group, rollouts=tuple(replace(r, reward=1.0) for r in group.rollouts))
        assert parts.counted([same, mixed]) == [mixed]
        alone = two_step_advantages(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.int64), "all").tolist()
        assert parts.advantages([same, mixed]).tolist() == [0.0, 0.0, 0.0, *alone]


def test_what_is_not_for_own_loops_is_refused(settings: zppo.Settings) -> None:
    method = settings.method.model_copy(update={"name": "teacher-response"})
    with (
        zppo.parts(settings.model_copy(update={"method": method}), []) as parts,
        pytest.raises(SettingsError, match=r"'teacher-response' trains on .*`zppo train` alone"),
    ):
        parts.advantages([])
    own = settings.advantage.model_copy(update={"statistics": "minibatch"})
    with (
        zppo.parts(settings.model_copy(update={"advantage": own}), []) as parts,
        pytest.raises(SettingsError, match="which groups a minibatch has is decided by your trainer"),
    ):
        parts.advantages([])


@pytest.mark.slow
def test_a_teacher_that_writes_no_hints_is_said_in_own_loops_too(settings: zppo.Settings) -> None:
    method = settings.method.model_copy(update={"name": "hint"})
    with (
        pytest.warns(UserWarning, match=r"writes no hints: 4 of 4 replies .* so that this run is GRPO\u2020"),
        zppo.parts(settings.model_copy(update={"method": method}), zppo.load_data(settings)[0]),
    ):
        pass


def test_a_question_for_a_judge_that_was_not_named_is_refused(settings: zppo.Settings, parts: zppo.Parts) -> None:
    """Without it the rules would decide, and nobody would know."""
    question = replace(zppo.load_data(settings)[0][0], grading=JUDGE)
    with pytest.raises(SettingsError, match=r"wants a judge.*questions"):
        parts.grade([parts.prompts.plain(question)], [[[1]]], zppo.StepLog(1))


def test_an_engine_of_a_function_and_rows_in_memory(settings: zppo.Settings) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "mine is what?", "answer": 3},
        {"prompt": [{"role": "user", "content": "and yours?"}], "answer": "4", "id": "b"},
    ]
    questions = listed_questions(rows, "mine", settings.data.columns, settings.data.reading())
    assert [(q.id, q.gold, q.chat) for q in questions] == [("mine:1", "3", False), ("b", "4", True)]
    asked: list[Any] = []

    def sample(prompts: list[list[int]], n: int) -> tuple[list[list[int]], list[list[float]] | None]:
        asked.append((prompts, n))
        return [[7, i] for i in range(len(prompts) * n)], [[-1.0, -float(i)] for i in range(len(prompts) * n)]

    with zppo.parts(settings, questions) as parts:
        prompts = [parts.prompts.plain(q) for q in questions]
        groups = parts.student(FunctionEngine(sample, ends=[3])).rollout(prompts, zppo.StepLog(1))
        assert asked == [([list(p.ids) for p in prompts], settings.rollout.group_size)]
        assert [r.ids.tolist() for g in groups for r in g.rollouts] == [[7, i] for i in range(8)]
        assert [r.truncated for g in groups for r in g.rollouts] == [i != 3 for i in range(8)]
        assert groups[1].rollouts[1].logprobs.tolist() == [-1.0, -5.0]
        short = FunctionEngine(lambda prompts, n: ([[1]], None), ends=[3])
        with pytest.raises(ModelError, match="gave 1 completions for 2 prompts, of 4 each"):
            parts.student(short).rollout(prompts, zppo.StepLog(1))
