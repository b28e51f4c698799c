"""Benchmarks of the user's own: a YAML file, a Python adapter, or Python alone, through `zppo eval` from end to end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval_server import Reply, Scripted, said, scripted
from zppo import cli
from zppo.errors import DataError, SettingsError, ZPPOError
from zppo.evals.benchmark_rows import load_items
from zppo.evals.registry import suite


def bench(folder: Path, text: str, rows: list[dict[str, Any]] | None = None, name: str = "my-bench") -> Path:
    """A YAML file and its rows beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows or [{"prompt": "What is 1 + 1?", "answer": 2}])))
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def items(path: Path | str) -> Any:
    return load_items(suite(str(path))[-1]).items


CHOICE = """
source: rows.jsonl
kind: choice
title: Shapes and colours
columns: {prompt: question, options: choices, images: picture, level: topic}
"""
SHAPES: list[dict[str, Any]] = [
    {"question": "Which colour?", "choices": ["red", "green"], "answer": "A", "picture": "red.png", "topic": "colour"},
    {"question": "See <image>: which?", "choices": {"text": ["green", "red"], "label": ["1", "2"]}, "answer": "2", "picture": "red.png"},
    {"question": "Which letter is first?", "choices": ["A. b", "B. a"], "answer": "a", "topic": "letters"},
    {"question": "Which one is last?", "choices": '["x", "y", "z"]', "answer": 2, "topic": "letters"},
]  # fmt: skip


def evaluate(model: Scripted, judge: Scripted, names: str, out: Path, *more: str) -> int:
    return cli.main(["eval", model.url, "--suite", names, "--judge", judge.url, "--output", str(out), *more])


@pytest.mark.slow
def test_a_benchmark_of_ones_own_runs_next_to_a_known_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench(tmp_path / "mine", CHOICE, SHAPES)
    Image.new("RGB", (600, 600), "red").save(tmp_path / "mine" / "red.png")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "AIME25.jsonl").write_text(json.dumps({"question": "What is 4 + 4?", "answer": "8"}))

    def reply(body: dict[str, Any]) -> Reply:
        return r"\boxed{8}" if "4 + 4" in said(body) else r"\boxed{A}"

    with scripted(reply, "m") as model, scripted(lambda body: '{"verdict": "wrong"}', "j") as judge:
        names = f"AIME25,{path}"
        assert evaluate(model, judge, names, out, "--data", str(data)) == 0, capsys.readouterr()
        printed = capsys.readouterr().out
        assert "my-bench" in printed and "mean of 1 own" in printed and "mean of 1 llm" in printed
        asked = {said(body).strip().partition("\n")[0]: body for body in model.requests}
        assert len(model.requests) == 5 and not judge.requests
        pictured = asked["Which colour?"]["messages"][-1]["content"]
        assert [part["type"] for part in pictured] == ["image_url", "text"]
        assert "A. red\nB. green" in pictured[1]["text"] and "\\boxed{}" in pictured[1]["text"]
        second = next(b for t, b in asked.items() if t.startswith("See"))["messages"][-1]["content"]
        assert [part["type"] for part in second] == ["text", "image_url", "text"]
        state = json.loads((out / "eval.json").read_text())
        aime, mine = state["benchmarks"]
        assert (aime["name"], aime["value"]) == ("AIME25", 1.0)
        assert (mine["name"], mine["title"], mine["family"], mine["value"]) == ("my-bench", "Shapes and colours", "own", 0.25)
        assert mine["beside"] == {"part colour": 1.0, "part letters": 0.0}
        golds = {r["id"]: r["gold"] for r in map(json.loads, (out / "eval/rows/my-bench.jsonl").read_text().splitlines())}
        assert list(golds.values()) and {k: v[0] for k, v in golds.items()} == {
            "rows.jsonl:1": "A", "rows.jsonl:2": "B", "rows.jsonl:3": "B", "rows.jsonl:4": "C",
        }  # fmt: skip
        # Nothing is asked again; a mended row is decided anew though its question was answered.
        assert evaluate(model, judge, names, out, "--data", str(data)) == 0 and len(model.requests) == 5
        bench(tmp_path / "mine", CHOICE, [*SHAPES[:2], {**SHAPES[2], "answer": "b"}, SHAPES[3]])
        assert evaluate(model, judge, names, out, "--data", str(data)) == 0 and len(model.requests) == 5
        assert json.loads((out / "eval.json").read_text())["benchmarks"][1]["value"] == 0.5


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "by", "value"),
    [
        ("number", "1/2", "0.5", "rule", 1.0),
        ("maths", "#### 12", "13", "rule", 0.0),
        ("text", "Paris", "paris", "rule", 1.0),
        ("text", "Paris", "the capital", "judge", 1.0),
        ("judge", "Paris", "Paris", "rule", 1.0),
        ("judge", "Paris", "It is Paris.", "judge", 1.0),
    ],
)
def test_every_kind_of_answer(tmp_path: Path, kind: str, gold: str, answer: str, by: str, value: float) -> None:
    more = "answer_after: '####'\n" if "####" in gold else ""
    path = bench(tmp_path, f"source: rows.jsonl\nkind: {kind}\nname: one\n{more}", [{"id": "q", "prompt": "Well?", "answer": gold}])
    with scripted(lambda body: rf"\boxed{{{answer}}}", "m") as model, scripted(lambda body: '{"verdict": "correct"}', "j") as judge:
        assert evaluate(model, judge, str(path), tmp_path / "out") == 0
    (row,) = map(json.loads, (tmp_path / "out/eval/rows/one.jsonl").read_text().splitlines())
    assert (row["id"], row["by"], row["value"]) == ("q", by, value)


@pytest.mark.parametrize(
    ("text", "needed"),
    [("kind: choice", False), ("kind: number", False), ("kind: maths", False), ("kind: text", True), ("kind: judge", True),
     ("kind: number\njudged: true", True), ("kind: text\njudged: false", False), ("adapter: adapter.py:adapt", True),
     ("adapter: adapter.py:adapt\njudged: false", False)],
)  # fmt: skip
def test_a_judge_is_asked_for_only_where_rules_do_not_decide_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, needed: bool
) -> None:
    (tmp_path / "adapter.py").write_text(ADAPTER)
    row = {"prompt": "Well?", "answer": "2", "options": ["1", "2"], "n": 1, "text": "Well?", "right": "2"}
    path = bench(tmp_path, f"source: rows.jsonl\n{text}\n", [row])
    with scripted(lambda body: "I do not know.", "m") as model:
        code = cli.main(["eval", model.url, "--suite", str(path), "--output", str(tmp_path / "out")])
    if needed:
        assert code == 2 and "no judge for rows that rules cannot decide (my-bench)" in capsys.readouterr().err
    else:
        assert code == 0
        (part,) = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"]
        assert (part["value"], part["rows"], part["by_judge"], part["open"]) == (0.0, 1, 0, 0)


def test_python_alone_says_by_its_items_whether_it_needs_a_judge(tmp_path: Path) -> None:
    (tmp_path / "kinds.py").write_text(
        ADAPTER + ADAPTER[ADAPTER.index("def sums") :].replace("sums", "words").replace('"number"', '"text"')
    )
    assert [suite(f"{tmp_path / 'kinds.py'}:{name}")[0].judged for name in ("sums", "words")] == [False, True]


@pytest.mark.parametrize(
    ("text", "row", "reply", "value"),
    [
        ("kind: text\nanswer_list: any", {"answer": ["Paris", "Lutetia"]}, "Lutetia", 1.0),
        ("kind: number\nanswer_list: set", {"answer": [1, 2]}, "2, 1", 1.0),
        ("kind: number\nanswer_list: set", {"answer": [1, 2]}, "2", 0.0),
        ("kind: number\nanswer_list: ordered", {"answer": [1, 2]}, "1, 2", 1.0),
        ("kind: number\nanswer_list: ordered", {"answer": [1, 2]}, "2, 1", 0.0),
        ("kind: number\nanswer_list: set", {"answer": [1, 2], "answer_list": "any"}, "2", 1.0),
        ("kind: choice\nanswer_list: set", {"answer": ["z", "A"], "options": ["x", "y", "z"]}, "A, C", 1.0),
        ("kind: choice\nanswer_list: set", {"answer": [0, 2], "options": ["x", "y", "z"]}, "AC", 1.0),
        ("kind: choice\nanswer_list: set", {"answer": [0, 2], "options": ["x", "y", "z"]}, "A", 0.0),
        ("kind: judge\nanswer_list: set", {"answer": ["a", "b"]}, "b and a", 1.0),
    ],
)  # fmt: skip
def test_several_right_answers_are_those_of_training_data(tmp_path: Path, text: str, row: dict[str, Any], reply: str, value: float) -> None:
    path = bench(tmp_path, f"source: rows.jsonl\nname: one\n{text}\n", [{"prompt": "Well?", **row}])

    def judge(body: dict[str, Any]) -> Reply:
        return '{"verdict": "%s"}' % ("correct" if "all of these, in any order: a; b" in said(body) else "wrong")

    with scripted(lambda body: rf"\boxed{{{reply}}}", "m") as model, scripted(judge, "j") as server:
        assert evaluate(model, server, str(path), tmp_path / "out") == 0
    (row,) = map(json.loads, (tmp_path / "out/eval/rows/one.jsonl").read_text().splitlines())
    assert row["value"] == value


def test_options_in_columns_of_their_own_and_conversations(tmp_path: Path) -> None:
    columns = "columns: {messages: chat, options: [a, b, c]}"
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which?"}]
    path = bench(tmp_path, f"source: rows.jsonl\nkind: choice\n{columns}", [{"chat": chat, "a": "x", "b": "y", "c": "", "answer": "y"}])
    (item,) = items(path)
    assert (item.options, item.gold, len(item.messages)) == (("x", "y"), "B", 2)
    assert item.messages[-1].content == "Which?\nA. x\nB. y"


def test_folders_and_other_files_are_read_as_training_data_is(tmp_path: Path) -> None:
    path = bench(tmp_path, "source: set\nkind: choice\nsplit: validation\n")
    for split, count in (("train", 3), ("validation", 2)):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        lines = ["prompt,options,answer", *(f'q{i},"[""x"", ""y""]",B' for i in range(count))]
        (folder / "a.csv").write_text("\n".join(lines))
    assert [item.id for item in items(path)] == ["validation/a.csv:2", "validation/a.csv:3"]
    import datasets

    datasets.Dataset.from_list([{"prompt": "q", "options": ["x", "y"], "answer": "A", "more": 1}]).save_to_disk(str(tmp_path / "saved"))
    path.write_text("source: saved\nkind: choice\n")
    assert [item.options for item in items(path)] == [("x", "y")]


def test_a_set_of_the_hub_is_read_as_the_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([{"prompt": "q", "answer": 3}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    path = bench(tmp_path, "source: me/sums\nkind: number\nconfig: hard\nsplit: dev\nrevision: abc\n")
    assert [item.gold for item in items(path)] == ["3"]
    assert asked == [("me/sums", "hard", "dev", "abc")]


ADAPTER = """
from zppo.evals.benchmark import Benchmark, HubDataset
from zppo.evals.item import Item, Message

def adapt(row):
    if row.text("text") == "skip":
        return None
    return Item(row.text("n"), "x", (Message("user", row.text("text")),), row.text("right"), "number")

def broken(row):
    return 1 / 0

def sums():
    for n in range(3):
        yield Item(str(n), "sums", (Message("user", f"What is {n} + {n}?"),), str(2 * n), "number")

BENCH = Benchmark("Named", "Named one", "llm", HubDataset("nowhere", ()), adapt, differs="", reader=lambda: iter(()))
NUMBER = 3
"""


def test_an_adapter_in_python_is_used_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter.py").write_text(ADAPTER)
    rows: list[dict[str, Any]] = [{"n": 1, "text": "What is 1?", "right": "1"}, {"text": "skip"}]
    path = bench(tmp_path, "source: rows.jsonl\nadapter: adapter.py:adapt\n", rows)
    with scripted(lambda body: r"\boxed{1}", "m") as model, scripted(lambda body: "no", "j") as judge:
        assert evaluate(model, judge, str(path), tmp_path / "out") == 0
    (part,) = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"]
    assert (part["name"], part["value"], part["rows"]) == ("my-bench", 1.0, 1)
    assert f"my-bench runs code of your own: {tmp_path / 'adapter.py'}:adapt" in capsys.readouterr().out


def test_python_alone_may_be_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_sums.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    with scripted(lambda body: r"\boxed{2}", "m") as model, scripted(lambda body: "no", "j") as judge:
        assert evaluate(model, judge, "my_sums:sums", tmp_path / "out") == 0
    (part,) = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"]
    assert (part["name"], part["family"], part["rows"]) == ("sums", "own", 3) and part["value"] == pytest.approx(1 / 3)
    assert "my_sums.py" in capsys.readouterr().out
    with pytest.raises(DataError, match="Named: nowhere has no rows"):
        suite("my_sums:BENCH")
    with pytest.raises(SettingsError, match="failed with TypeError"):
        suite("my_sums:NUMBER")
    with pytest.raises(SettingsError, match="'my_sums' has no 'gone'"):
        suite("my_sums:gone")
    sys.modules.pop("my_sums", None)


def test_no_code_imports_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{ADAPTER}")
    path = bench(tmp_path, "source: rows.jsonl\nadapter: adapter.py:adapt\n")
    for suite_of in (str(path), f"{tmp_path / 'adapter.py'}:sums"):
        assert cli.main(["eval", "m", "--suite", suite_of, "--dry-run", "--no-code"]) == 2
        assert "and --no-code imports none" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "ran").exists()
    harmless = bench(tmp_path, "source: rows.jsonl\nkind: number\n", name="harmless")
    assert cli.main(["eval", "http://localhost:1/v1", "--suite", str(harmless), "--dry-run", "--no-code"]) == 0


def test_a_pipe_is_no_benchmark(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(SettingsError, match="it is a pipe or a device"):
        suite(str(tmp_path / "pipe.yaml"))


def test_a_dry_run_looks_for_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench(tmp_path, "source: rows.jsonl\nkind: number\n")
    for model, what in ((tmp_path / "gone", "is no folder"), (tmp_path, "is no checkpoint"), ("Qwen/Qwen3.5-0.8B", "is no folder")):
        assert cli.main(["eval", str(model), "--suite", str(path), "--dry-run"]) == 2
        assert f"'{model}' {what}; name a checkpoint folder, a finished run, or the URL" in capsys.readouterr().err


def test_a_dry_run_counts_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench(tmp_path, "source: rows.jsonl\nkind: number\n")
    assert cli.main(["eval", "http://localhost:1/v1", "--suite", str(path), "--dry-run"]) == 0
    assert "my-bench 1 0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "rows", "said"),
    [
        ("", None, "holds NoneType; a benchmark needs keys and values"),
        ("source: [", None, "is no YAML: .*; mend it there"),
        ("kind: text", None, "source is missing. Known keys: source, kind, "),
        ("source: rows.jsonl", None, r"give either kind \(choice, number, maths, text, judge\) or adapter"),
        ("source: rows.jsonl\nkind: essay", None, "kind is 'essay': input should be 'choice'"),
        ("source: rows.jsonl\nkind: text\ncolumn: {}", None, "there is no key 'column'"),
        ("source: gone.jsonl\nkind: text", None, "gone.jsonl' does not exist; name a file or folder beside it, or owner/name"),
        ("source: rows.jsonl\nkind: text\nname: a/b", None, "the name 'a/b' is none that files can have"),
        ("source: rows.jsonl\nkind: text\nname: mmlu", None, "another benchmark or suite is called 'mmlu'"),
        ("source: rows.jsonl\nkind: text", [{"q": "?"}], r"rows.jsonl, row 1, column 'prompt': .*the row has 'q'.*with columns.prompt or"),
        ("source: rows.jsonl\nkind: text", [{"prompt": "?"}], "column 'answer': missing.*Name it with columns.answer"),
        ("source: rows.jsonl\nkind: choice", [{"prompt": "?", "answer": "A"}], "'options': missing or empty.*in columns.options"),
        ("source: rows.jsonl\nkind: choice", [{"prompt": "?", "answer": "C", "options": ["x", "y"]}], "'C' is none of the 2 options"),
        ("source: rows.jsonl\nkind: choice", [{"prompt": "?", "answer": 1, "options": [1, 2]}], "'1' may mean A and B; write the letter"),
        ("source: rows.jsonl\nkind: text", [{"prompt": "?", "answer": 1, "image": "a.png"}], "'image' seems to hold images.*columns"),
        ("source: rows.jsonl\nkind: text", [{"prompt": "?", "answer": 1, "images": ["no.png"]}], "no.png"),
        ("source: rows.jsonl\nkind: text", [{"prompt": "?", "answer": [1, 2]}], "is a list of 2; say with answer_list whether any one"),
        ("source: rows.jsonl\nkind: text\nanswer_list: set", [{"prompt": "?", "answer": ["1, 2", "3"]}], "'1, 2', one of .*kind: judge"),
        ("source: rows.jsonl\nkind: number", [{"prompt": "?", "answer": 1, "grading": "judge"}], "asks for a judge, .* write judged: true"),
        ("source: rows.jsonl\nkind: judge\njudged: false", None, "kind judge is judged: leave judged out"),
        (
            "source: rows.jsonl\nkind: choice\nanswer_list: any",
            [{"prompt": "?", "answer": ["A", "B"], "options": ["x", "y"]}],
            "several options that are right as 'any'",
        ),
        ("source: rows.jsonl\nadapter: adapter.py:broken", None, "row 1: adapter .*:broken failed with ZeroDivisionError"),
        ("source: rows.jsonl\nadapter: adapter.py:gone", None, "has no 'gone'. Check the spelling"),
        ("source: rows.jsonl\nadapter: nowhere.at_all:f", None, "importing 'nowhere.at_all' failed"),
    ],
)
def test_mistakes_are_said_before_anything_is_asked(tmp_path: Path, text: str, rows: list[dict[str, Any]] | None, said: str) -> None:
    path = bench(tmp_path, text, rows)
    (tmp_path / "adapter.py").write_text(ADAPTER)
    with pytest.raises(ZPPOError, match=said):
        suite(str(path))


def test_two_benchmarks_of_one_name_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    one, other = (bench(tmp_path / name, "source: rows.jsonl\nkind: number\n") for name in ("a", "b"))
    with pytest.raises(SettingsError, match="another benchmark or suite is called 'my-bench'"):
        suite(f"{one},{other}")
    assert [each.name for each in suite(f"{one},AIME25,{one}")] == ["AIME25", "my-bench"]
    with pytest.raises(SettingsError, match=r"there is no file .*none\.yaml"):
        suite(str(tmp_path / "none.yaml"))


def test_the_examples_of_the_docs_are_true(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = text[text.index("### A benchmark of your own") :]
    row = {"prompt": "Which?", "answer": "B", "options": ["x", "y"], "level": "easy"}
    (item,) = items(bench(tmp_path, section.partition("```yaml\n")[2].partition("```")[0], [row]))
    assert (item.gold, item.kind, item.facts) == ("B", "choice", {"part": "easy"})
    (tmp_path / "docs_sums.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    found = items(f"{tmp_path / 'docs_sums.py'}:sums")
    assert len(found) == 100 and (found[7].gold, found[7].benchmark) == ("14", "sums")
