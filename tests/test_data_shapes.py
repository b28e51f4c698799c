"""Data files as people have them: other shapes of JSON and tables, chats of APIs, packed files; read, or told which shape it is."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zppo.config.data_settings import ColumnSettings
from zppo.core.types import Gold, Message, Question
from zppo.data import local_files
from zppo.data.load import load_questions
from zppo.errors import DataError

ROWS = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": "4"}]
ASKED = [("1+1?", "2"), ("2+2?", "4")]
USER = {"role": "user", "content": "1+1?"}


def load(path: Path, **columns: str) -> list[Question]:
    return load_questions(str(path), ColumnSettings(**columns))


def asked(questions: list[Question]) -> list[tuple[str, Gold]]:
    return [(q.messages[-1].content, q.gold) for q in questions]


def write(path: Path, data: object) -> Path:
    text = data if isinstance(data, str | bytes) else json.dumps(data)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **columns)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# --- JSON ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        {"data": ROWS},
        {"version": "1.1", "data": ROWS, "splits": ["a"]},
        {"rows": ROWS},
        {"schema": {"fields": []}, "data": ROWS},
        {"my problems": ROWS},
        {"prompt": ["1+1?", "2+2?"], "answer": ["2", "4"]},
        {"prompt": {"0": "1+1?", "1": "2+2?"}, "answer": {"0": "2", "1": "4"}},
        {"columns": ["prompt", "answer"], "index": [0, 1], "data": [["1+1?", "2"], ["2+2?", "4"]]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n\n"])
def test_shapes_of_one_json_file(tmp_path: Path, data: object, indent: int | None, mark: str) -> None:
    assert asked(load(write(tmp_path / "q.json", mark + json.dumps(data, indent=indent)))) == ASKED


@pytest.mark.parametrize(
    "row",
    [
        ROWS[0],
        {"messages": [USER], "answer": "2"},
        {"messages": [USER], "answer": ["2"]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "answer": {"ground_truth": "2"}},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    ],
)
def test_one_object_is_one_row(tmp_path: Path, row: dict[str, Any]) -> None:
    names = {"messages": "conversations"} if "conversations" in row else {}
    for indent in (None, 2):
        assert asked(load(write(tmp_path / "q.json", json.dumps(row, indent=indent)), **names)) == ASKED[:1]
    two = "\n".join(json.dumps(row) for _ in range(2))
    assert asked(load(write(tmp_path / "q.json", two), **names)) == ASKED[:1] * 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": ROWS, "test": ROWS}, "holds several lists of rows (train, test); write each into a file of its own"),
        ({"q1": ROWS[0], "q2": ROWS[1]}, "is one object with a row under every key ('q1', 'q2', ...)"),
        ([USER, {"role": "assistant", "content": "2"}], "is one conversation, a list of turns"),
        ([[USER, {"from": "assistant", "ground_truth": {"value": "2"}}]], "row 1: is a list of turns, one conversation a row"),
        ([[USER], [USER]], 'row 1: is a list of turns, one conversation a row; write {"messages": [...], "answer": ...}'),
        ([["1+1?", "2"]], "row 1: is a bare list of 2 values, and nothing says which column each is; write objects"),
        (["1+1?"], "row 1: is str '1+1?'; every row must be an object"),
        ({}, "holds no questions"),
        ({"prompt": ["a", "b"], "answer": ["1"]}, "column 'prompt': is a list"),
        ('{\n"prompt": "a",\n"answer": }', "line 3, character 11: is no JSON"),
        ('{"prompt": "a", "answer": }', "row 1: is no JSON"),
        (json.dumps(USER) + "\n" + json.dumps(USER), "row 1, column 'prompt': missing: the row is one turn of a conversation"),
    ],
)
def test_other_shapes_are_named(tmp_path: Path, data: object, said: str) -> None:
    text = data if isinstance(data, str) else json.dumps(data, indent=1)
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "q.json", text))
    assert said in str(caught.value) or (data == {} and "empty object" in str(caught.value))


def test_lines_of_conversations(tmp_path: Path) -> None:
    assert "row 2: is a list of turns" in refused(write(tmp_path / "q.ndjson", " \n" + json.dumps([USER])))


# --- columns and chats ---------------------------------------------------------------------------------------------------


def test_a_named_column_beats_the_usual_messages(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "something else"}]
    path = write(tmp_path / "q.json", [{"question": "1+1?", "messages": other, "answer": "2"}])
    assert asked(load(path, prompt="question")) == ASKED[:1]
    assert asked(load(path)) == [("something else", "2")]  # as ever, where none is named
    assert asked(load(path, prompt="question", messages="messages")) == ASKED[:1]
    path = write(
        tmp_path / "q.json", [{"question": None, "messages": other, "answer": "2"}, {"question": "", "messages": other, "answer": 2}]
    )
    assert asked(load(path, prompt="question")) == [("something else", "2")] * 2
    path = write(tmp_path / "q.json", [{"question": "1+1?", "turns": other, "answer": "2"}])
    assert asked(load(path, prompt="question", messages="turns")) == [("something else", "2")]


@pytest.mark.parametrize("write_text", [json.dumps, repr, lambda value: f"\n {json.dumps(value, indent=1)} "])
def test_messages_and_golds_as_text(tmp_path: Path, write_text: Callable[[object], str]) -> None:
    turns = [{"role": "system", "content": "Be brief, don't say why."}, USER]
    row = {"messages": write_text(turns), "reward_model": write_text({"style": "rule", "ground_truth": "2"})}
    for answer in ("reward_model.ground_truth", "reward_model"):
        (question,) = load(write(tmp_path / "q.json", [row]), answer=answer)
        assert question.messages == (Message("system", "Be brief, don't say why."), Message("user", "1+1?")) and question.gold == "2"
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    assert asked(load(tmp_path / "q.parquet", answer="reward_model.ground_truth")) == ASKED[:1]


@pytest.mark.parametrize("text", ["no list", "[1, 2", "[open('x')]", "[" * 5000, "{'a': 1}", "'text'"])
def test_messages_that_are_no_list_of_turns(tmp_path: Path, text: str) -> None:
    assert "row 1, column 'messages': " in refused(write(tmp_path / "q.json", [{"messages": text, "answer": "2"}]))


def test_a_gold_that_looks_like_json_stays_a_text(tmp_path: Path) -> None:
    for gold in ("[1, 2]", '{"a": 1}', "{1, 2}", "[0, 1)"):
        assert load(write(tmp_path / "q.json", [{"prompt": "p", "answer": gold}]))[0].gold == gold


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "developer", "content": "Be brief."}, USER],
        [{"role": "system", "content": "Be brief.", "name": "me"}, USER | {"name": "you", "tool_calls": [], "function_call": None}],
        [{"role": "system", "content": "Be brief."}, USER | {"tool_calls": None, "refusal": "", "annotations": [], "audio": {}}],
    ],
)
def test_what_chat_apis_add_is_nothing(tmp_path: Path, turns: list[Any]) -> None:
    (question,) = load(write(tmp_path / "q.json", [{"messages": turns, "answer": 2}]))
    assert question.messages == (Message("system", "Be brief."), Message("user", "1+1?"))


@pytest.mark.parametrize("empty", ["", "  ", None, []])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_an_empty_system_turn_is_none(tmp_path: Path, role: str, empty: object) -> None:
    (question,) = load(write(tmp_path / "q.json", [{"messages": [{"role": role, "content": empty}, USER], "answer": 2}]))
    assert question.messages == (Message("user", "1+1?"),)


@pytest.mark.parametrize("turn", [{"role": "tool", "content": "x"}, USER | {"tool_calls": [{"id": "1"}]}, {"role": "user", "content": ""}])
def test_what_has_a_meaning_is_not_dropped(tmp_path: Path, turn: dict[str, Any]) -> None:
    assert "column 'messages': turn " in refused(write(tmp_path / "q.json", [{"messages": [turn, USER], "answer": 2}]))


# --- tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "prompt,answer\n1+1?,2\n2+2?,4\n",
        "prompt,answer,,\n1+1?,2,,\n2+2?,4,,\n",
        ",prompt,answer\n0,1+1?,2\n1,2+2?,4\n",
        ",,prompt,answer\n0,x,1+1?,2\n1,y,2+2?,4\n",
        "prompt,answer\n,\n1+1?,2\n, \n2+2?,4\n,,,\n\n",
        "sep=;\nprompt;answer\n1+1?;2\n2+2?;4\n",
        '"sep=;"\r\nprompt;answer\r\n1+1?;2\r\n2+2?;4\r\n',
        "\ufeffsep=,\r\nprompt,answer\r\n1+1?,2\r\n2+2?,4\r\n",
        "sep=\t\nprompt\tanswer\n1+1?\t2\n2+2?\t4\n",
        " prompt , answer \n1+1?,2\n2+2?,4\n",
        'prompt, answer\n"1+1?", "2"\n"2+2?", "4"\n',
        "\n\nprompt,answer\n1+1?,2\n2+2?,4\n",
        ",,\nprompt,answer\n1+1?,2,\n2+2?,4,,,,\n",
    ],
)
def test_what_spreadsheets_leave(tmp_path: Path, text: str) -> None:
    assert asked(load(write(tmp_path / "q.csv", text))) == ASKED


def test_rows_are_counted_as_a_spreadsheet_does(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "sep=;\nprompt;answer\n1+1?;2\n;;\n2+2?;\n")
    assert "row 5, column 'answer'" in refused(path)
    assert [q.id for q in load(write(tmp_path / "q.csv", "prompt,answer\n,\n1+1?,2\n"))] == ["q.csv:3"]
    assert "row 2: has 3 cells" in refused(write(tmp_path / "q.csv", "prompt,answer\n1,000,2\n"))


# --- packed files, files of another kind -------------------------------------------------------------------------------------


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def packed(path: Path, data: bytes) -> Path:
    if path.suffix in (".zst", ".zstd"):
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(data)
    else:
        path.write_bytes(PACK[path.suffix[1:]](data))
    return path


TEXTS = {
    "jsonl": "\n".join(map(json.dumps, ROWS)),
    "json": json.dumps({"data": ROWS}, indent=1),
    "csv": "\ufeffprompt,answer\n1+1?,2\n2+2?,4\n",
    "tsv": "prompt\tanswer\n1+1?\t2\n2+2?\t4\n",
}


@pytest.mark.parametrize("ending", ["gz", "zst", "zstd", "bz2", "xz"])
@pytest.mark.parametrize("kind", TEXTS)
def test_packed_files(tmp_path: Path, kind: str, ending: str) -> None:
    path = packed(tmp_path / f"q.{kind}.{ending}", TEXTS[kind].encode())
    assert asked(load(path)) == ASKED
    assert asked(load(path.rename(tmp_path / f"q.{kind}"))) == ASKED  # whatever it is called
    cut = write(tmp_path / f"cut.{kind}.{ending}", (tmp_path / f"q.{kind}").read_bytes()[:-9])
    assert "is packed, and cannot be unpacked" in refused(cut)


def test_packed_files_in_a_folder(tmp_path: Path) -> None:
    packed(tmp_path / "train.jsonl.gz", TEXTS["jsonl"].encode())
    assert asked(load(tmp_path)) == ASKED
    write(tmp_path / "plain.jsonl.gz", TEXTS["jsonl"])
    assert asked(load(tmp_path / "plain.jsonl.gz")) == ASKED  # some servers unpack what they send


def test_a_packed_file_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_LONGEST_LINE", 1 << 16)
    monkeypatch.setattr(local_files, "_LONGEST_FILE", 1 << 16)
    for kind in ("jsonl", "json"):
        assert "q." in refused(packed(tmp_path / f"q.{kind}.gz", b'{"prompt": "' + b" " * (1 << 20)))


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.jsonl.gz"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (json.dumps(ROWS).encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"PK\x03\x04rest", "is a zip archive, or a workbook of Excel"),
        (b"\xd0\xcf\x11\xe0rest", "is a workbook of Excel"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"<HTML>", "is a web page"),
        (b"SQLite format 3\0", "is a database of SQLite"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    packed(path, data) if path.suffix == ".gz" else write(path, data)
    if name != "q.csv" or "UTF-16" not in said:  # tables in it are read
        assert said in refused(path)


def test_parquet_by_another_name_and_packed_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "q.parquet")
    data = (tmp_path / "q.parquet").read_bytes()
    assert "is a parquet file; call it .parquet" in refused(write(tmp_path / "q.jsonl", data))
    assert "is a packed parquet file" in refused(packed(tmp_path / "q.parquet.gz", data))
    assert "is a web page" in refused(write(tmp_path / "page.parquet", "<html>"))
