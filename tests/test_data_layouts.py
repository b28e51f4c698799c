"""Layouts in which public sets for post-training come: read as they are meant, or told which layout it is and which settings read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from zppo.config.data_settings import ColumnSettings
from zppo.core.types import Golds, Message, Question
from zppo.data.load import load_questions
from zppo.data.local_files import SourceSettings
from zppo.errors import DataError
from zppo.grading import equal

USER = {"role": "user", "content": "1+1?"}
SAID = {"role": "assistant", "content": "2"}


def load(folder: Path, rows: object, name: str = "q.jsonl", reading: SourceSettings | None = None, **columns: str) -> list[Question]:
    path = folder / name
    if isinstance(rows, str | bytes):
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        assert isinstance(rows, list)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_questions(str(path), ColumnSettings(**columns), reading=reading)


def one(folder: Path, row: object, **more: Any) -> Question:
    (question,) = load(folder, [row], **more)
    return question


def refused(folder: Path, rows: object, name: str = "q.jsonl", **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, rows, name, **more)
    assert len(str(caught.value)) < 700
    return str(caught.value)


# --- conversations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [USER, SAID]}, {}),
        ({"messages": [USER, SAID | {"weight": 1}]}, {}),  # OpenAI's fine-tuning
        ({"messages": [USER | {"weight": 0, "name": "x"}, SAID | {"weight": 0.5}]}, {}),
        ({"messages": [USER, SAID | {"reasoning_content": "one and one", "tool_calls": []}]}, {}),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "2"}]}]}, {}),
        ({"messages": [USER | {"timestamp": "now", "toxic": False, "turn": 1}, SAID]}, {}),
        (
            {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2", "weight": 1}]},
            {"messages": "conversations"},
        ),
        ({"conversations": [{"from": "user", "value": "1+1?"}, {"from": "chatgpt", "value": "2"}]}, {"messages": "conversations"}),
        ({"conversation": [{"role": "human", "content": "1+1?"}, {"role": "model", "content": "2"}]}, {"messages": "conversation"}),
        ({"conversations": json.dumps([{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}])}, {"messages": "conversations"}),
        ({"prompt": [USER], "answer": 2}, {}),
        ({"prompt": json.dumps([USER]), "answer": "2"}, {}),  # verl's, as pandas writes it
        ({"prompt": repr([USER]), "reward_model": repr({"ground_truth": "2"})}, {"answer": "reward_model"}),
        ({"prompt": [USER], "completion": [SAID]}, {"answer": "completion"}),  # TRL's
        ({"prompt": "1+1?", "completion": "2"}, {"answer": "completion"}),
        ({"prompt": [USER], "solution": "2", "task": "x"}, {"answer": "solution"}),
        ({"body": {"messages": [USER, SAID]}, "custom_id": "1"}, {"messages": "body.messages"}),
        ({"input": [USER], "ideal": "2"}, {"prompt": "input", "answer": "ideal"}),
        ({"messages": {"role": ["user", "assistant"], "content": ["1+1?", "2"]}}, {}),  # a sequence of objects, as `datasets` gives it
        (
            {"contents": [{"role": "user", "parts": [{"text": "1+1?"}]}, {"role": "model", "parts": [{"text": "2"}]}]},  # Vertex AI's
            {"messages": "contents"},
        ),
        ({"question": "1+1?", "answers": {"text": ["2"], "answer_start": [0]}}, {"prompt": "question", "answer": "answers.text.0"}),
        ({"question": "1+1?", "answer": '["2"]'}, {"prompt": "question"}),
        ({"question": "1+1?", "answer": "['2']"}, {"prompt": "question"}),
        (
            {"id": 1, "data": {"text": "1+1?"}, "annotations": [{"result": [{"value": {"choices": ["2"]}, "type": "choices"}]}]},
            {"prompt": "data.text", "answer": "annotations.0.result.0.value.choices.0"},
        ),
    ],
)
@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.parquet"])
def test_chats_and_answers(tmp_path: Path, row: dict[str, Any], columns: dict[str, Any], name: str) -> None:
    mixed = any(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in row.get("messages", ())
    )  # no column of parquet can hold both
    (question,) = load(tmp_path, [row], "q.json" if mixed else name, **columns)
    assert (question.messages, question.gold) == ((Message("user", "1+1?"),), "2")


def test_what_the_model_said_last_is_no_part_of_the_question(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        USER,
        SAID,
        {"role": "user", "content": "and 2 more?"},
        {"role": "assistant", "content": "4"},
    ]
    question = one(tmp_path, {"messages": turns})
    assert [m.role for m in question.messages] == ["system", "user", "assistant", "user"] and question.gold == "4"
    assert one(tmp_path, {"messages": turns, "answer": "four"}).gold == "four"
    tool = [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert one(tmp_path, {"messages": tool, "answer": 2}).messages == (Message("user", "1+1?"),)
    assert "column 'answer': missing" in refused(tmp_path, [{"messages": tool}])


@pytest.mark.parametrize("key", ["reasoning_content", "tool_call_id", "images", "thinking"])
def test_a_key_that_a_model_would_see_is_not_passed_over(tmp_path: Path, key: str) -> None:
    said = refused(tmp_path, [{"messages": [USER, SAID | {key: "x"}, USER], "answer": 2}])
    assert f"turn 2 has the key {key!r}" in said


def test_a_text_under_messages_names_the_setting(tmp_path: Path) -> None:
    assert "a text is named with data.columns.prompt" in refused(tmp_path, [{"question": "1+1?", "answer": 2}], messages="question")


def test_sharegpt_with_its_system_column(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    question = one(tmp_path, {"conversations": turns, "system": "Be brief.", "tools": ""}, messages="conversations")
    assert question.messages == (Message("system", "Be brief."), Message("user", "1+1?"))
    own = [{"from": "system", "value": "Mine."}, *turns]
    assert one(tmp_path, {"conversations": own, "system": "Be brief."}, messages="conversations").messages[0].content == "Mine."


def test_alpaca(tmp_path: Path) -> None:
    names = {"prompt": "instruction", "answer": "output"}
    row = {"instruction": "Add these.", "input": "1 and 1", "output": "2"}
    assert one(tmp_path, row, **names).messages == (Message("user", "Add these.\n\n1 and 1"),)
    assert one(tmp_path, row | {"input": ""}, **names).messages == (Message("user", "Add these."),)
    full = row | {"system": "Be brief.", "history": [["Hi", "Hello"]]}
    assert [m.content for m in one(tmp_path, full, **names).messages] == ["Be brief.", "Hi", "Hello", "Add these.\n\n1 and 1"]
    assert "no list of [instruction, answer]" in refused(tmp_path, [row | {"history": ["Hi"]}], **names)


def test_a_system_prompt_in_its_own_column(tmp_path: Path) -> None:
    row = {"system_prompt": "Be brief.", "question": "1+1?", "response": "2"}
    assert one(tmp_path, row, prompt="question", answer="response").messages == (Message("system", "Be brief."), Message("user", "1+1?"))
    assert one(tmp_path, row | {"system_prompt": ""}, prompt="question", answer="response").messages == (Message("user", "1+1?"),)


def test_dolly(tmp_path: Path) -> None:
    row = {"instruction": "Add these.", "context": "1 and 1", "response": "2", "category": "sums"}
    assert one(tmp_path, row, prompt="instruction", answer="response").messages == (Message("user", "Add these.\n\n1 and 1"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("array([{'content': '1+1?', 'role': 'user'}], dtype=object)", "as numpy or pandas print it, which cannot be read back"),
        ("[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]", "save the set as parquet or JSON lines"),
        ("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "in the marks of a chat template (<|im_start|>)"),
        ("<s>[INST] 1+1? [/INST]", "write its turns as {role, content}, without them"),
        ("<|begin_of_text|><|start_header_id|>user", "in the marks of a chat template"),
    ],
)
def test_a_text_that_is_a_whole_chat_is_no_question(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, [{"prompt": text, "answer": "2"}])
    assert said in refused(tmp_path, [{"messages": text, "answer": "2"}])
    assert one(tmp_path, {"prompt": f"What does {text!r} mean?", "answer": "2"}).messages[0].content.startswith("What")


def test_lines_that_were_encoded_twice(tmp_path: Path) -> None:
    row = json.dumps(json.dumps({"prompt": "1+1?", "answer": 2}))
    assert load(tmp_path, f"{row}\n{row}\n")[1].gold == "2"


# --- choices ----------------------------------------------------------------------------------------------------------------


TOWNS = ["Rome", "Paris", "Oslo", "Bern"]
SHOWN = "Capital of France?\n\nA. Rome\nB. Paris\nC. Oslo\nD. Bern"


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        ({"choices": TOWNS}, 1),  # MMLU
        ({"choices": TOWNS}, 1.0),
        ({"choices": TOWNS}, "1"),
        ({"choices": TOWNS}, "B"),
        ({"choices": TOWNS}, "(b)"),
        ({"choices": TOWNS}, "B. Paris"),
        ({"choices": TOWNS}, "Paris"),
        ({"choices": TOWNS}, ["B"]),
        ({"options": TOWNS}, "B"),
        ({"options": ["A. Rome", "B. Paris", "C. Oslo", "D. Bern"]}, "B"),
        ({"options": ["(A) Rome", "(B) Paris", "(C) Oslo", "(D) Bern"]}, "B"),
        ({"options": json.dumps(TOWNS)}, 1),
        ({"options": repr(TOWNS)}, "B"),
        ({"options": dict(zip("ABCD", TOWNS, strict=True))}, "B"),
        ({"choices": {"text": TOWNS, "label": ["A", "B", "C", "D"]}}, "B"),  # ARC
        ({"choices": {"text": TOWNS, "label": ["1", "2", "3", "4"]}}, "2"),
        ({"choices": [{"label": label, "text": text} for label, text in zip("ABCD", TOWNS, strict=True)]}, "B"),
        (dict(zip("ABCD", TOWNS, strict=True)), "B"),  # MMBench
    ],
)
def test_a_question_is_shown_with_its_choices(tmp_path: Path, choices: dict[str, Any], answer: object) -> None:
    question = one(tmp_path, {"prompt": "Capital of France?", "answer": answer, **choices})
    assert question.messages == (Message("user", SHOWN),)
    assert question.gold == "B. Paris" and equal("B. Paris", "B") and equal("B. Paris", "Paris") and not equal("B. Paris", "C")
    plain = one(tmp_path, {"prompt": "Capital of France?", "answer": answer, **choices}, choices="")
    assert plain.messages == (Message("user", "Capital of France?"),)


def test_choices_that_the_question_has_are_not_written_twice(tmp_path: Path) -> None:
    for text in (
        SHOWN,
        "Capital of France? (A) Rome (B) Paris (C) Oslo (D) Bern",
        "Capital of France?\nA) Rome\nB) Paris\nC) Oslo\nD) Bern",
    ):
        question = one(tmp_path, {"prompt": text, "choices": TOWNS, "answer": 1})
        assert (question.messages[0].content, question.gold) == (text, "B. Paris")
    assert one(tmp_path, {"prompt": "In 1234?", "choices": ["1", "2"], "answer": "A"}).messages[0].content == "In 1234?\n\nA. 1\nB. 2"


def test_numbers_as_choices(tmp_path: Path) -> None:
    texts, numbers = ["0", "1", "3"], [0, 1, 3]
    assert one(tmp_path, {"prompt": "?", "choices": texts, "answer": 2}).gold == "C"
    assert one(tmp_path, {"prompt": "?", "choices": numbers, "answer": 3}).gold == "C"
    assert one(tmp_path, {"prompt": "?", "choices": texts, "answer": "3"}).gold == "C"
    assert one(tmp_path, {"prompt": "?", "choices": ["10", "20"], "answer": "20"}).gold == "B. 20"
    said = refused(tmp_path, [{"prompt": "?", "choices": ["1", "0", "3"], "answer": "1"}])
    assert "is '1', which could be A or B; write the letter in brackets: (B)" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": TOWNS, "answer": 4}, "is '4', which is none of the 4 choices by letter, number or text (numbers count from 0)"),
        ({"choices": TOWNS, "answer": "Berlin"}, "is 'Berlin', which is none of the 4 choices"),
        ({"choices": TOWNS, "answer": "E"}, "data.columns.choices, or '' to leave them out"),
        ({"choices": TOWNS, "answer": [0, 1]}, "is a list of 2; say with data.answer_list"),
        ({"choices": TOWNS, "answer": None}, "is null"),
        ({"choices": ["Rome"], "answer": "A"}, "column 'choices': is a list; expected a list of 2 to 26 texts"),
        ({"options": "a ) 38 , b ) 27", "answer": "a"}, "'options' beside it is str 'a ) 38 , b ) 27'; expected a list"),
    ],
)
def test_choices_that_cannot_be_read_are_told(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, [{"prompt": "Capital?", **row}])


@pytest.mark.parametrize(
    ("row", "columns", "hidden"),
    [
        ({"ctx": "q", "endings": TOWNS, "label": "1"}, {"prompt": "ctx", "answer": "label"}, "endings"),  # HellaSwag
        ({"question": "q", "opa": "a", "opb": "b", "cop": 1}, {"prompt": "question", "answer": "cop"}, "opa, opb"),  # MedMCQA
        ({"goal": "q", "sol1": "a", "sol2": "b", "label": 0}, {"prompt": "goal", "answer": "label"}, "sol1, sol2"),  # PIQA
        ({"prompt": "q", "option_a": "x", "option_b": "y", "answer": "b"}, {}, "option_a, option_b"),
        (
            {"question": {"stem": "q", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}, "answerKey": "B"},
            {"prompt": "question.stem", "answer": "answerKey"},
            "choices",
        ),
    ],
)
def test_choices_that_nobody_would_be_shown_are_told(tmp_path: Path, row: dict[str, Any], columns: dict[str, str], hidden: str) -> None:
    said = refused(tmp_path, [row], **columns)
    assert f"and {hidden} beside the question seem to hold its choices, which nobody would be shown" in said
    assert "data.columns.choices, or '' to leave them out" in said
    assert one(tmp_path, row, **columns, choices="").gold == str(row.get(columns.get("answer", "answer")))


def test_a_free_answer_needs_no_choices(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": "q", "endings": TOWNS, "answer": "Paris"}).messages == (Message("user", "q"),)


def test_several_right_choices(tmp_path: Path) -> None:
    row = {"prompt": "Which are towns?", "choices": [*TOWNS[:2], "Spain"], "answer": [0, "Paris"]}
    assert one(tmp_path, row, reading=SourceSettings(answer_list="set")).gold == Golds("set", ("A", "B"))


# --- files ------------------------------------------------------------------------------------------------------------------


VIEWED = {
    "features": [{"feature_idx": 0, "name": "prompt", "type": {"dtype": "string"}}],
    "rows": [{"row_idx": i, "row": {"prompt": f"{i}+1?", "answer": str(i + 1)}, "truncated_cells": []} for i in range(3)],
    "num_rows_total": 3,
    "num_rows_per_page": 100,
    "partial": False,
}


def test_rows_of_the_hubs_viewer(tmp_path: Path) -> None:
    for data, name in ((VIEWED, "q.json"), (VIEWED["rows"], "q.json"), (VIEWED["rows"], "q.jsonl")):
        questions = load(tmp_path, data, name)
        assert [(q.messages[0].content, q.gold) for q in questions] == [("0+1?", "1"), ("1+1?", "2"), ("2+1?", "3")]
    cut = {"rows": [{"row_idx": 7, "row": {"prompt": "1+"}, "truncated_cells": ["prompt"]}]}
    assert "cells of row 7 are cut ('prompt'); name the set itself, as hub:owner/name" in refused(tmp_path, cut, "q.json")


def test_lists_within_objects(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "answer": 2}] * 2
    for data in ({"data": {"rows": rows}}, {"result": {"data": {"items": rows}}}):
        assert len(load(tmp_path, data, "q.json")) == 2


@pytest.mark.parametrize("text", ['["1+1?", "2"]\n["2+2?", "4"]\n', '["prompt", "answer"]\n["1+1?", "2"]\n', "[1, 2]\n", "[]\n{}\n"])
def test_lines_of_bare_lists_are_called_so(tmp_path: Path, text: str) -> None:
    said = refused(tmp_path, text)
    assert ("row 1: is a bare list of" in said and "CSV file whose first line names the columns" in said) or text.startswith("[]")
    assert "q.jsonl, row 1" in said


def test_one_json_list_under_the_wrong_name(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "answer": 2}]
    for indent in (None, 1):
        assert "the file is one JSON list; call it .json" in refused(tmp_path, json.dumps(rows, indent=indent))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["q.csv", "q.tsv"])
def test_tables_as_spreadsheets_save_them(tmp_path: Path, encoding: str, sign: str, name: str) -> None:
    text = f'prompt{sign}answer\r\n"Ist 1{sign}5 größer?"{sign}ja\r\n'
    (question,) = load(tmp_path, text.encode(encoding), name)
    assert (question.messages[0].content, question.gold) == (f"Ist 1{sign}5 größer?", "ja")


def test_a_table_with_one_column_has_no_separator(tmp_path: Path) -> None:
    assert "column 'answer': missing" in refused(tmp_path, "prompt\n1+1?\n", "q.csv")


@pytest.mark.parametrize("gold", ["nan", "None", "null", "NaN"])
def test_an_empty_cell_that_became_a_text_is_warned_of(tmp_path: Path, gold: str) -> None:
    (tmp_path / "q.csv").write_text(f"prompt,answer\n1+1?,2\n2+2?,{gold}\n")
    said: list[str] = []
    load_questions(str(tmp_path / "q.csv"), ColumnSettings(), warn=said.append)
    assert (
        len(said) == 1 and f"row 3, column 'answer': the right answer {gold!r} is what an empty cell is written as: take these" in said[0]
    )


# --- what the layout is called --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "laid out as Alpaca: write data.columns: {prompt: instruction, answer: output}"),
        ({"conversations": []}, "laid out as ShareGPT and LLaVA: write data.columns: {messages: conversations}"),
        (
            {"prompt": [USER], "reward_model": {"ground_truth": "2"}},
            "laid out as verl: write data.columns: {answer: reward_model.ground_truth}",
        ),
        ({"prompt": "1+1?", "completion": "2"}, "TRL's prompts and completions: write data.columns: {answer: completion}"),
        ({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, "laid out as preferences, which hold no right answer"),
        ({"chosen": [USER, SAID], "rejected": [USER, SAID]}, "laid out as preferences, which hold no right answer"),
        ({"prompt": "1+1?", "completion": "2", "label": True}, "laid out as KTO's good and bad answers, so keep the good ones alone"),
        ({"input": {"messages": [USER]}, "preferred_output": [SAID], "non_preferred_output": [SAID]}, "laid out as OpenAI's preferences"),
        ({"id": "1", "items": [USER, SAID]}, "Perhaps data.columns: {messages: items}"),
        ({"id": 1, "data": {"text": "a"}, "annotations": []}, "laid out as Label Studio: write data.columns: {prompt: data.text"),
        ({"title": "a", "paragraphs": []}, "laid out as SQuAD's articles, which hold many questions a row"),
        ({"input": [USER], "ideal": "2"}, "laid out as OpenAI's evals: write data.columns: {prompt: input, answer: ideal}"),
        ({"question": "1+1?", "answer": "2"}, "Perhaps data.columns: {prompt: question}"),
        ({"problem": "1+1?", "solution": "x", "final_answer": "2"}, "Perhaps data.columns: {prompt: problem, answer: final_answer}"),
        ({"query": "1+1?", "response": "2"}, "Perhaps data.columns: {prompt: query, answer: response}"),
        ({"prompt": "1+1?", "ground_truth": "2"}, "Perhaps data.columns: {answer: ground_truth}"),
        ({"item": {"question": "1+1?", "answer": "2"}}, "the row has 'item' {question, answer}"),
        (
            {"prompt": "1+1?", "answer": True},
            'is true; an answer is a text or a number. Write what the student is to answer, such as "yes"',
        ),
    ],
)
def test_a_layout_is_called_by_its_name(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, [row])


def test_a_saved_set_says_its_layout_too(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"instruction": "a", "input": "b", "output": "c"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="laid out as Alpaca"):
        load_questions(str(tmp_path / "saved"), ColumnSettings())
    (question,) = load_questions(str(tmp_path / "saved"), ColumnSettings(prompt="instruction", answer="output"))
    assert question.messages[0].content == "a\n\nb"
    Dataset.from_list([{"messages": [USER, SAID]}]).save_to_disk(tmp_path / "chats")
    assert load_questions(str(tmp_path / "chats"), ColumnSettings())[0].gold == "2"
    Dataset.from_list([{"prompt": "?", "choices": TOWNS, "answer": 1}]).save_to_disk(tmp_path / "choices")
    assert load_questions(str(tmp_path / "choices"), ColumnSettings())[0].gold == "B. Paris"
