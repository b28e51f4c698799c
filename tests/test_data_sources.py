"""Sources of questions beyond one file of JSON lines: tables, folders, the hub, generated questions."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import datasets
import datasets.load
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from conftest import make_tokenizer
from error_cases import World
from zppo import cli
from zppo.config.data_settings import ColumnSettings, DataSettings
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.types import Message, Question
from zppo.data import reasoning_gym as gym
from zppo.data.load import load_questions
from zppo.data.local_files import SourceSettings
from zppo.data.reasoning_gym import REFUSED, TASKS
from zppo.engines.chat import Chat
from zppo.errors import DataError, SettingsError
from zppo.grading import Grader
from zppo.prompts.book import PromptBook
from zppo.rollout.data import in_both, load_data
from zppo.rollout.run_data import unknown_tokens
from zppo.rollout.student import PromptRenderer

httpx: Any = datasets.load.httpx  # the client, under whichever name the hub's library has it
COLUMNS = ColumnSettings()
ROWS = [{"prompt": f"{i}?", "answer": str(i)} for i in range(3)]


def load(source: object, columns: ColumnSettings = COLUMNS, limit: int | None = None, **reading: Any) -> list[Question]:
    return load_questions(str(source), columns, limit, SourceSettings(**reading))


def message(source: object, columns: ColumnSettings = COLUMNS, **reading: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(source, columns, **reading)
    return str(caught.value)


def lines(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))


# --- files ----------------------------------------------------------------------------------------------------------


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('\ufeffquestion,answer,id,messages\n"What is\n1,5 + 1?",2.5,,\n\né?,"1,234",x,\n', encoding="utf-8")
    first, second = load(tmp_path / "q.csv", ColumnSettings(prompt="question"))
    assert (first.messages[0].content, first.gold, first.id) == ("What is\n1,5 + 1?", "2.5", "q.csv:2")
    assert (second.messages[0].content, second.gold, second.id) == ("é?", "1,234", "x")
    (tmp_path / "q.tsv").write_text("prompt\tanswer\na, b\t1\n", encoding="utf-8")
    assert load(tmp_path / "q.tsv") == [Question("q.tsv:2", (Message("user", "a, b"),), "1")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,answer\na,1\nb\n", "q.csv, row 3, column 'answer': missing"),
        ("prompt,answer\na,\n", "q.csv, row 2, column 'answer': is empty"),
        ("prompt,answer\na,1,2\n", "q.csv, row 2: has 3 cells, and the header names 2 columns"),
        ("prompt,prompt\na,1\n", "q.csv, row 1: two columns are called 'prompt'"),
        ('prompt,answer\n"a"b,1\n', "q.csv, after row 1: is no CSV"),
        ("a,b\n1,2\n", "column 'prompt': missing, and so is 'messages'; the row has 'a', 'b'"),
        ("prompt,answer\n", "holds no questions"),
        ("", "holds no questions"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "q.csv").write_text(text, encoding="utf-8")
    assert said in message(tmp_path / "q.csv")


def test_tables_in_another_encoding_and_long_cells(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes(b"prompt,answer\ncaf\xe9,1\n")
    assert "is not UTF-8; save the file as CSV in UTF-8" in message(tmp_path / "q.csv")
    (tmp_path / "q.csv").write_text(f"prompt,answer\n{'x' * 200_000},1\n", encoding="utf-8")
    assert len(load(tmp_path / "q.csv")[0].messages[0].content) == 200_000


def test_one_json_list(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig")
    assert [(q.id, q.gold) for q in load(tmp_path / "q.json")] == [("q.json:1", "0"), ("q.json:2", "1"), ("q.json:3", "2")]
    lines(tmp_path / "lines.json")
    assert [q.gold for q in load(tmp_path / "lines.json")] == ["0", "1", "2"]
    (tmp_path / "q.json").write_text('[\n {"prompt": "a",}\n]', encoding="utf-8")
    assert "q.json, line 2, character " in message(tmp_path / "q.json")
    (tmp_path / "q.json").write_text(json.dumps([*ROWS, {"prompt": "a"}]), encoding="utf-8")
    assert "q.json, row 4, column 'answer': missing" in message(tmp_path / "q.json")
    (tmp_path / "q.json").write_bytes(b'[{"prompt": "caf\xe9", "answer": "1"}]')
    assert "is not UTF-8 (byte 17 of the file)" in message(tmp_path / "q.json")


# --- columns --------------------------------------------------------------------------------------------------------


def test_nested_columns_and_answers_in_other_shapes(tmp_path: Path) -> None:
    """A row as VeRL writes it: messages called prompt, the gold inside an object."""
    verl = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"style": "rule", "ground_truth": 2}, "extra": {"index": 7}}
    path = lines(tmp_path / "q.jsonl", [verl])
    expected = [Question("7", (Message("user", "1+1?"),), "2")]
    for answer in ("reward_model.ground_truth", "reward_model"):
        assert load(path, ColumnSettings(messages="prompt", answer=answer, id="extra.index")) == expected
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "answer": ["x"]},
        {"prompt": "b", "answer": {"ground_truth": ["4"]}},
        {"prompt": "c", "answer": 5},
    ]
    assert [q.gold for q in load(lines(path, rows))] == ["x", "4", "5"]
    assert [q.gold for q in load(lines(path, [{"prompt": "a", "my.gold": "1"}]), ColumnSettings(answer="my.gold"))] == ["1"]
    assert "column 'answer.b': missing" in message(lines(path, [{"prompt": "a", "answer": {"c": 1}}]), ColumnSettings(answer="answer.b"))


def test_answer_after(tmp_path: Path) -> None:
    """GSM8K's answers: a solution, then #### and the number."""
    path = lines(tmp_path / "q.jsonl", [{"prompt": "p", "answer": "5 #### 6 = <<30>>30\n#### 1,030 "}])
    assert load(path, answer_after="####")[0].gold == "1,030"
    assert load(path)[0].gold.startswith("5 ####")
    for answer in ("42", "so #### "):
        said = message(lines(path, [{"prompt": "p", "answer": answer}]), answer_after="####")
        assert "row 1, column 'answer'" in said and "data.answer_after" in said


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_by_splits(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "train.jsonl")
    lines(tmp_path / "d" / "test.jsonl", ROWS[:1])
    assert [q.id for q in load(tmp_path / "d")] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert [q.id for q in load(tmp_path / "d", split="test", held_out=True)] == ["test.jsonl:1"]
    said = message(tmp_path / "d", split="validation", held_out=True)
    assert "has no split 'validation' (it has train, test); name one of these with data.eval_split" in said


def test_a_folder_without_splits_and_with_folders_in_it(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "a" / "q.jsonl")
    lines(tmp_path / "d" / "b" / "q.jsonl", [*ROWS[:1], {"prompt": "p", "answer": "1", "id": "a/q.jsonl:1"}])
    (tmp_path / "d" / "README.md").write_text("my data", encoding="utf-8")
    assert "a/q.jsonl, row 1 and " in message(tmp_path / "d", split="test")
    lines(tmp_path / "d" / "b" / "q.jsonl", ROWS[:1])
    assert [q.id for q in load(tmp_path / "d", split="test")][::3] == ["a/q.jsonl:1", "b/q.jsonl:1"]
    lines(tmp_path / "d" / "b" / "q.jsonl", [{"prompt": "p"}])
    assert f"{tmp_path / 'd' / 'b' / 'q.jsonl'}, row 1, column 'answer'" in message(tmp_path / "d")


def test_a_folder_with_configurations(tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines(tmp_path / name / "q.jsonl")
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/*.jsonl\n" for n in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    assert [q.id for q in load(tmp_path, config="two", limit=1)] == ["two/q.jsonl:1"]
    for config in (None, "three"):
        said = message(tmp_path, config=config)
        assert "'one', 'two'" in said and "data.config" in said


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    assert "is a folder without data files" in message(tmp_path)
    lines(tmp_path / "q.jsonl")
    lines(tmp_path / "p.jsonl")
    (tmp_path / "r.csv").write_text("prompt,answer\na,1\n", encoding="utf-8")
    assert "r.csv would be left out" in message(tmp_path)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, dev=one.select([2])).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one", split="test") == load(tmp_path / "one")
    assert [(q.id, q.gold) for q in load(tmp_path / "one", limit=2)] == [("one:1", "0"), ("one:2", "1")]
    assert [(q.id, q.gold) for q in load(tmp_path / "two", split="dev")] == [("two:1", "2")]
    assert "has no split 'test' (it has train, dev); name one of these with data.split" in message(tmp_path / "two", split="test")
    said = message(tmp_path / "one", ColumnSettings(answer="solution"))
    assert "has no column 'solution'; it has prompt, answer. Name the one with the answer in data.columns.answer" in said
    (tmp_path / "one" / "dataset_info.json").write_text("{", encoding="utf-8")
    assert "cannot be read as what save_to_disk wrote" in message(tmp_path / "one")


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`datasets.load_dataset` sent to a folder that is laid out like a repository of the hub; what it was asked for."""
    top = tmp_path / "repository"
    lines(
        top / "main" / "train.jsonl",
        [{"question": r["prompt"], "answer": f"so #### {r['answer']}", "n": {"id": i}} for i, r in enumerate(ROWS)],
    )
    lines(top / "main" / "test.jsonl", [{"question": "t?", "answer": "#### 9", "n": {"id": 8}}])
    parts = "".join(f"  - split: {s}\n    path: main/{s}.jsonl\n" for s in ("train", "test"))
    configs = "".join(f"- config_name: {name}\n  data_files:\n{parts}" for name in ("main", "socratic"))
    (top / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    real, asked = datasets.load_dataset, list[dict[str, Any]]()

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
        asked.append({"path": path, "name": name, **kwargs})
        kwargs.pop("revision")
        return real(str(top), name, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


GSM8K = ColumnSettings(prompt="question", id="n.id")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_the_hub(hub: list[dict[str, Any]], streaming: bool) -> None:
    questions = load("hub:owner/name", GSM8K, 2, config="main", revision="v1", streaming=streaming, answer_after="####")
    assert questions == [Question(str(i), (Message("user", f"{i}?"),), str(i)) for i in range(2)]
    assert hub == [{"path": "owner/name", "name": "main", "split": "train", "revision": "v1", "streaming": streaming}]
    again = load("hub:owner/name?config=socratic&split=test", ColumnSettings(prompt="question"), config="main")
    assert [(q.id, q.gold) for q in again] == [("owner/name:test:1", "#### 9")]
    assert hub[1]["name"] == "socratic"


def test_streaming_reads_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Any:
        yield from ({"prompt": f"{i}?", "answer": i} for i in range(5))
        raise AssertionError("read on")

    stream = datasets.IterableDataset.from_generator(endless)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    assert len(load("hub:owner/name", limit=5, streaming=True)) == 5
    assert "owner/name, split train, after row 5: cannot be read further (AssertionError: read on)" in message(
        "hub:owner/name", streaming=True
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("reading", "said"),
    [
        ({}, ["needs a configuration", "'main', 'socratic'", "data.config"]),
        ({"config": "none"}, ["no configuration 'none'", "'main', 'socratic'", "data.config"]),
        ({"config": "main", "split": "dev"}, ["no split 'dev'", "'train', 'test'", "data.split"]),
        ({"config": "main", "split": "dev", "held_out": True}, ["no split 'dev'", "data.eval_split"]),
        ({"config": "main"}, ["no column 'prompt' and none 'messages'", "question, answer", "data.columns.prompt"]),
    ],
)
def test_what_a_set_of_the_hub_lacks(hub: list[dict[str, Any]], streaming: bool, reading: dict[str, Any], said: list[str]) -> None:
    text = message("hub:owner/name", streaming=streaming, **reading)
    assert "hub:owner/name" in text
    assert all(part in text for part in said), text


def _answered(kind: type[Exception], status: int) -> Exception:
    request = httpx.Request("GET", "https://huggingface.co/api/datasets/owner/name")
    return kind("refused", response=httpx.Response(status, request=request))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (_answered(GatedRepoError, 403), ["is gated", "https://huggingface.co/datasets/owner/name", "hf auth login"]),
        (_answered(RepositoryNotFoundError, 404), ["does not exist on the hub, or is private", "hf auth login"]),
        (_answered(RevisionNotFoundError, 404), ["has no revision 'v9'", "data.revision"]),
        (OfflineModeIsEnabled("offline"), ["could not be reached", "HF_HUB_OFFLINE", "check the network"]),
        (httpx.ConnectError("no route"), ["could not be reached", "check the network"]),
    ],
)
def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch, cause: Exception, said: list[str]) -> None:
    """The library's own path from what the hub answers to what it raises, then ours."""
    from huggingface_hub import HfApi

    def refuse(*_: Any, **__: Any) -> Any:
        raise cause

    monkeypatch.setattr(HfApi, "hf_hub_download", refuse)
    if not isinstance(cause, OfflineModeIsEnabled):
        monkeypatch.setattr(datasets.load, "_raise_if_offline_mode_is_enabled", lambda: None)
    text = message("hub:owner/name", revision="v9")
    assert text.startswith("hub:owner/name: ")
    assert all(part in text for part in said), text


def test_names_that_are_no_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "a/b/c", "../x", "/etc", "a//b", "a/b c"):
        assert "is no name of a data set; write hub:owner/name" in message(f"hub:{name}")
    assert "'x' is no option of a hub set; known: config, split, revision" in message("hub:a/b?x=1")
    assert "cannot be read" in message("hub:a/b?x")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "would read it instead of the hub's" in message("hub:a/b")


# --- reasoning_gym --------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    def fail(*_: Any) -> float:
        raise AssertionError("a scorer of the package was called")

    for kind in {ProceduralDataset, *(kind for kind, _ in DATASETS.values())}:
        monkeypatch.setattr(kind, "score_answer", fail)


def _wrong(kind: str, question: Question) -> str:
    if kind == "truth":
        return {"True": "False", "False": "True", "Yes": "No", "No": "Yes"}[cast(str, question.gold)]
    if kind == "word" and not question.gold.lstrip("-").isdigit():
        return cast(str, question.gold)[::-1] + "x"
    return f"{question.gold} + 1"


@pytest.fixture(scope="module")
def grader() -> Any:
    with Grader() as grader:
        yield grader


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), sorted(TASKS.items()))
@pytest.mark.usefixtures("_no_scorers")
def test_the_grader_knows_right_from_wrong(task: str, kind: str, grader: Grader) -> None:
    """On every task that is allowed: the gold is right, something else is not, and neither is the question itself."""
    questions = load(f"reasoning_gym:{task}?size=8&seed=3")
    assert len({q.id for q in questions}) == 8
    boxed = [(f"<think>a</think>\\boxed{{{q.gold}}}", q.gold) for q in questions]
    wrong = [(f"\\boxed{{{answer}}}", q.gold) for q in questions for answer in (_wrong(kind, q), q.messages[-1].content)]
    assert all(v.correct for v in grader.grade_many(boxed))
    assert not any(v.correct for v in grader.grade_many(wrong))


@pytest.mark.slow
def test_generated_questions_are_a_function_of_the_seed() -> None:
    first = load("reasoning_gym:leg_counting", limit=20)
    assert first == load("reasoning_gym:leg_counting?size=20&seed=0")
    assert [q.id for q in first][:2] == ["leg_counting:0:0", "leg_counting:0:1"]
    held_out = load("reasoning_gym:leg_counting", held_out=True)
    assert len(held_out) == gym.HELD_OUT_SIZE
    assert not {q.messages for q in held_out} & {q.messages for q in load("reasoning_gym:leg_counting")}
    few = load("reasoning_gym:leg_counting?size=5&max_animals=3")
    assert max(q.messages[0].content.count(",") for q in few) < max(q.messages[0].content.count(",") for q in first)


@pytest.mark.slow
def test_every_task_of_the_package_is_allowed_or_refused_with_a_reason() -> None:
    from reasoning_gym.factory import DATASETS

    assert not set(TASKS) & set(REFUSED)
    assert set(DATASETS) <= set(TASKS) | set(REFUSED)
    assert set(TASKS) <= set(DATASETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("chain_sum", "'chain_sum' cannot train: the question itself, copied into the box, equals the answer. Tasks that can: acre, aiw"),
        ("countdown", "several answers are right"),
        ("sudoku", "is a grid"),
        ("leg_count", "no such task, the nearest one is leg_counting"),
        ("", "no such task. Tasks that can"),
        ("leg_counting?size=x", "cannot be read"),
        ("leg_counting?size", "integers only"),
        ("leg_counting?size=0", "size is 0"),
        ("leg_counting?size=10000000000", "size must be 1 to 10000000"),
        ("leg_counting?seed=-1", "seed at least 0"),
        ("leg_counting?animals=3", "'animals' is no option of it; known: size, seed, min_animals, max_animals"),
        ("leg_counting?min_animals=9&max_animals=3", "its settings do not fit together"),
    ],
)
def test_generated_questions_that_cannot_be(source: str, said: str) -> None:
    text = message(f"reasoning_gym:{source}")
    assert text.startswith(f"reasoning_gym:{source}: ")
    assert said in text


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install reasoning-gym" in message("reasoning_gym:aiw")


# --- settings -------------------------------------------------------------------------------------------------------


def recipe(tmp_path: Path, **data: Any) -> Settings:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"student": {"model": "s"}, "method": "grpo", "data": data}), encoding="utf-8")
    return load_recipe(path)


def test_settings_reach_the_sources(tmp_path: Path, hub: list[dict[str, Any]]) -> None:
    data = {"train": "hub:owner/name", "eval": "hub:owner/name", "config": "main", "revision": "v1", "answer_after": "####"}
    columns = {"prompt": "question", "id": "n.id"}
    train, held_out = load_data(recipe(tmp_path, **data, columns=columns))
    assert ([q.id for q in train], [q.gold for q in held_out]) == (["0", "1", "2"], ["9"])
    swapped = recipe(tmp_path, **data, columns=columns, split="test", eval_split="train", limit=1, eval_limit=2, streaming=True)
    train, held_out = load_data(swapped)
    assert ([q.id for q in train], [q.gold for q in held_out]) == (["8"], ["0", "1"])
    assert [(a["split"], a["streaming"], a["revision"]) for a in hub] == [
        ("train", False, "v1"),
        ("test", False, "v1"),
        ("test", True, "v1"),
        ("train", True, "v1"),
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": "hub:a/b", "streaming": True}, "data.streaming needs data.limit for data.train=hub:a/b"),
        ({"train": "hub:a/b", "eval": "hub:a/b", "streaming": True, "limit": 5}, "data.streaming needs data.eval_limit"),
        ({"train": "q.jsonl", "streaming": True, "limit": 5}, "data.streaming is set, but neither data.train nor data.eval"),
        ({"train": "q.jsonl", "revision": "v1"}, "data.revision is set, but neither"),
        (
            {"train": "reasoning_gym:aiw", "eval": "reasoning_gym:aiw?seed=999"},
            "share questions: question i is drawn from seed + i, 0 to 999",
        ),
        ({"train": "reasoning_gym:aiw", "eval": "reasoning_gym:sudoku"}, "'sudoku' cannot train"),
        ({"train": "q.jsonl", "answer_after": ""}, "data.answer_after"),
        ({"train": "q.jsonl", "split": ""}, "data.split"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        recipe(tmp_path, **data)
    assert said in str(caught.value)


def test_settings_that_fit() -> None:
    DataSettings(train="hub:a/b", eval="q.jsonl", streaming=True, limit=5)
    DataSettings(train="reasoning_gym:aiw?size=50", eval="reasoning_gym:aiw?seed=50")
    DataSettings(train="reasoning_gym:aiw", eval="reasoning_gym:maze?seed=0")


# --- words that a student does not know -----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "warned"), [("one two", False), ("one dos", True), ("<unk>", True)])
def test_unknown_tokens_are_said(tmp_path: Path, text: str, warned: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    questions = [Question("known", (Message("user", "one " * 20),), "1"), Question("q", (Message("user", f"{text} {text}"),), "1")]
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template))
    closing = tmp_path / "closing.jinja"
    closing.write_text("one", encoding="utf-8")
    renderer = PromptRenderer(PromptBook({"closing": closing}), chat)
    warning = unknown_tokens(renderer, [*questions[1:], *questions])
    assert bool(warning) == warned
    if warned:
        assert "'<unk>'" in warning and "question 'q'" in warning and "Choose a student" in warning
    assert unknown_tokens(PromptRenderer(PromptBook(), Chat(make_tokenizer())), questions) == unknown_tokens(renderer, []) == ""
    assert "of the prompts are" in unknown_tokens(PromptRenderer(PromptBook(), chat), questions[:1])  # the closing's words count too


# --- a run on each of them ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", ["train.csv", "folder", "saved", "hub:owner/name", "reasoning_gym:aiw?size=3"])
def test_a_run_on_each_kind_of_source(tmp_path: Path, tiny_qwen3_dir: Path, hub: list[dict[str, Any]], source: str) -> None:
    shutil.copytree(tiny_qwen3_dir, tmp_path / "student")
    world = World(tmp_path)
    (tmp_path / "train.csv").write_text("prompt,answer\n0?,0\n1?,1\n2?,2\n", encoding="utf-8")
    lines(tmp_path / "folder" / "train.jsonl")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    world.set("data.train", source)
    if source.startswith("hub:"):
        world.set("data", {"train": source, "config": "main", "answer_after": "####", "columns": {"prompt": "question", "id": "n.id"}})
    world.set("rollout.batch_size", 3)
    assert cli.main(world.arguments()) == 0
    rows = pq.read_table(world.output / "rollouts" / "step-000001.parquet").to_pylist()
    expected = load_data(load_recipe(world.output / "recipe.yaml"))[0]
    assert {(row["question_id"], row["question"], row["gold"]) for row in rows} == {
        (q.id, q.messages[-1].content, q.gold) for q in expected
    }
    assert len(expected) == 3


def test_held_out_questions_that_are_trained_on_are_said(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("test", 3), ("other", 9)):
        cells = [f"q{i},{i}" for i in range(first, first + 5)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["prompt,answer", *cells]), encoding="utf-8")
    train, test, other = (load(tmp_path / f"{name}.csv") for name in ("train", "test", "other"))
    assert "2 of 5 held-out questions are training questions too ('test.csv:2', for one)" in in_both(train, test)
    assert in_both(train, other) == in_both(train, []) == ""
