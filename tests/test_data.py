"""Questions in: files, rows, errors that name file, row and column; and the order of the data."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zppo.config.data_settings import ColumnSettings
from zppo.config.recipe import load_recipe
from zppo.core.types import Golds, Message, Question
from zppo.data import load
from zppo.data.gold_checks import MENDS, unmatchable
from zppo.data.load import drop_long, load_questions
from zppo.data.local_files import SourceSettings
from zppo.data.order import batch_ids, effective_batch, steps_per_epochs
from zppo.errors import DataError
from zppo.rollout.data import idle_parts

COLUMNS = ColumnSettings()
GOOD = {"prompt": "p", "answer": "1"}


def write(folder: Path, *rows: Any, name: str = "q.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def message(path: Path | str, columns: ColumnSettings = COLUMNS) -> str:
    with pytest.raises(DataError) as caught:
        load_questions(str(path), columns)
    return str(caught.value)


# --- what comes in --------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "1+1?", "answer": "2"},
        "",
        {"prompt": "é\u2028?", "answer": 3, "id": 17, "level": "easy"},
        {"prompt": None, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": 0.5, "id": "x"},
        {"prompt": "p", "messages": None, "answer": " 4 "},
    )
    first, second, third, fourth = load_questions(str(path), COLUMNS)
    assert first == Question("q.jsonl:1", (Message("user", "1+1?"),), "2")
    assert second == Question("17", (Message("user", "é\u2028?"),), "3", level="easy")
    assert third == Question("x", (Message("system", "s"), Message("user", "u")), "0.5")
    assert fourth == Question("q.jsonl:5", (Message("user", "p"),), "4")
    assert [q.id for q in load_questions(str(path), COLUMNS, limit=2)] == ["q.jsonl:1", "17"]


def test_messages_win_over_prompt_and_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}]
    path = write(tmp_path, {"prompt": "p", "messages": [{"role": "user", "content": parts, "name": None}], "answer": "x"})
    assert load_questions(str(path), COLUMNS)[0].messages == (Message("user", "ab"),)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answer": "1"}\r\n{"prompt": "q", "answer": "2"}\r\n')
    assert [q.gold for q in load_questions(str(path), COLUMNS)] == ["1", "2"]


def test_mapped_columns(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "p", "solution": "1", "key": "k", "prompt": 5}, name="q.json")
    columns = ColumnSettings(prompt="question", answer="solution", id="key")
    assert load_questions(str(path), columns) == [Question("k", (Message("user", "p"),), "1")]


def test_parquet_equals_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "messages": None, "answer": "1", "id": 5},
        {"prompt": None, "messages": [{"role": "user", "content": "u"}], "answer": "2", "id": 6},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    from_parquet = load_questions(str(tmp_path / "q.parquet"), COLUMNS)
    assert from_parquet == load_questions(str(write(tmp_path, *rows)), COLUMNS)
    assert [q.id for q in from_parquet] == ["5", "6"]


def test_parquet_rows_are_numbered_across_batches(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "1"} for _ in range(3000)]
    rows[2999]["answer"] = ""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert "q.parquet, row 3000, column 'answer': is empty" in message(tmp_path / "q.parquet")
    assert load_questions(str(tmp_path / "q.parquet"), COLUMNS, limit=2500)[-1].id == "q.parquet:2500"


def gold_of(folder: Path, row: dict[str, Any], how: Any = None, after: str | None = None) -> Any:
    path = write(folder, {"prompt": "p", **row})
    return load_questions(str(path), COLUMNS, reading=SourceSettings(answer_list=how, answer_after=after))[0].gold


@pytest.mark.parametrize(
    ("answer", "how", "gold"),
    [
        (["a", 2, 0.5], "any", Golds("any", ("a", "2", "0.5"))),
        (["b", "a"], "set", Golds("set", ("b", "a"))),
        (["b", "a", "b"], "ordered", Golds("ordered", ("b", "a", "b"))),
        (["b", " a ", "b"], "any", Golds("any", ("b", "a"))),  # what comes twice is one answer, unless there is an order
        (["b", "b"], "set", "b"),
        (["b"], "ordered", "b"),
        (["b"], None, "b"),
        ("a, b", "any", "a, b"),  # a text is one answer
        ("a, b", "set", "a, b"),
        ("68, 27, 20", "ordered", Golds("ordered", ("68", "27", "20"))),  # but a bare list is one, where its order counts
        ("1,234", "ordered", "1,234"),
        ("(1, 2]", "ordered", "(1, 2]"),
        ({"ground_truth": ["x", "y"]}, "any", Golds("any", ("x", "y"))),
    ],
)
def test_several_right_answers(tmp_path: Path, answer: Any, how: Any, gold: Any) -> None:
    assert gold_of(tmp_path, {"answer": answer}, how) == gold
    if how:
        assert gold_of(tmp_path, {"answer": answer, "answer_list": f" {how}"}, "any") == gold  # a row's own word wins


def test_several_right_answers_of_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["p", "q"], "answer": [["1", "2"], ["3"]]}), tmp_path / "q.parquet")
    questions = load_questions(str(tmp_path / "q.parquet"), COLUMNS, reading=SourceSettings(answer_list="any"))
    assert [q.gold for q in questions] == [Golds("any", ("1", "2")), "3"]
    assert [q.golds for q in questions] == [("1", "2"), ("3",)]


@pytest.mark.parametrize(
    ("after", "answer", "gold"),
    [
        ("####", "5 #### 6\n#### 42", "42"),
        ("\\boxed", "Thus \\boxed{1}, so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("boxed", "\\boxed{\\boxed{5}}", "\\boxed{5}"),
        ("<answer>", "<think>3</think> <answer>1</answer><answer> 42 </answer> done", "42"),
        ("<answer>", "so <answer>42", "42"),
        ("</think>", "<think>3</think> 42", "42"),
        ("Answer:", "Answer: 1\nAnswer: <b>", "<b>"),
    ],
)
def test_the_part_of_an_answer_that_is_the_gold(tmp_path: Path, after: str, answer: str, gold: str) -> None:
    assert gold_of(tmp_path, {"answer": answer}, after=after) == gold
    assert gold_of(tmp_path, {"answer": [answer, answer.replace("42", "43")]}, "any", after) in (gold, Golds("any", (gold, "43")))


@pytest.mark.parametrize(
    ("after", "answer"), [("\\boxed", "42"), ("\\boxed", "\\boxed{ }"), ("<answer>", "42</answer>"), ("<answer>", "<answer></answer>")]
)
def test_answers_without_that_part_are_errors(tmp_path: Path, after: str, answer: str) -> None:
    with pytest.raises(DataError, match=r"row 1, column 'answer': (holds no|nothing follows).*mend the row or data.answer_after"):
        gold_of(tmp_path, {"answer": answer}, after=after)


# --- right answers that cannot match ---------------------------------------------------------------------------------

UNMATCHABLE = {
    "#### 42": ("mark", "data.answer_after: '####'"),
    "She sold 48/2 = 24.\nSo 72 in all.\n#### 72": ("mark", "data.answer_after: '####'"),
    "So the answer is \\boxed{42}.": ("box", "data.answer_after: '\\boxed'"),
    "$x=2$, thus \\boxed{4}": ("box", "data.answer_after: '\\boxed'"),
    "<answer>42</answer>": ("tag", "data.answer_after: '<answer>'"),
    "<think>6*7</think>\n<answer>42</answer>": ("tag", "data.answer_after: '<answer>'"),
    "<Final_Answer> 42 </Final_Answer>": ("tag", "data.answer_after: '<Final_Answer>'"),
    "<think>6*7</think> 42": ("thought", "data.answer_after: '</think>'"),
    "x = 2\ny = 3": ("lines", "data.answer_after"),
    "Because ice is less dense than liquid water": ("words", "`grading` that says judge"),
    "\\text{the length of the hypotenuse of that triangle}": ("words", "`grading` that says judge"),
    "水の沸点は摂氏百度であることが知られている": ("words", "`grading` that says judge"),
}
MATCHABLE = [
    *("42", "\\boxed{42}", "The answer is 42", "Answer: 42", "1,234", "5 km per hour", "$\\frac{1}{2}$", "x<y", "a#b", "#5", "北京市"),
    *("B. The sum of all the forces that act upon the body", "Yes, since water expands when it freezes", "(C)", "no real solutions"),
    *("red, green, blue, yellow, black, white, orange", "Paris, the capital of France", "United States of America", "H<sub>2</sub>O"),
    "\\begin{pmatrix}1 & 2 \\\\\n3 & 4\\end{pmatrix}",
    "sin x + cos y + tan z + log w + exp v + sqrt u",
    "\\sin{\\alpha} + \\cos{\\beta} + \\tan{\\gamma} + \\operatorname{lcm}(a,b) + \\text{const}",
    "ab + cd + ef + gh + ij + kl + mn",
]


@pytest.mark.parametrize("gold", UNMATCHABLE)
def test_right_answers_that_cannot_match_are_told(gold: str, tmp_path: Path) -> None:
    kind, mend = UNMATCHABLE[gold]
    assert unmatchable(gold)[0] == kind
    said: list[str] = []
    path = write(tmp_path, GOOD, {"prompt": "p", "answer": gold, "id": "x"}, {"prompt": "q", "answer": "7"})
    load_questions(str(path), COLUMNS, warn=said.append)
    (text,) = said
    assert text.startswith(f"warning: {path}, row 2, column 'answer': the right answer ")
    assert gold[:20] in text.replace("\\n", "\n").replace("\\\\", "\\") and mend in text


@pytest.mark.parametrize("gold", MATCHABLE)
def test_right_answers_that_can_match_are_let_be(gold: str) -> None:
    assert unmatchable(gold) == ("", "")


def test_the_mend_that_is_told_mends(tmp_path: Path) -> None:
    for gold, (_, mend) in UNMATCHABLE.items():
        if "answer_after: '" in mend:
            said: list[str] = []
            path = write(tmp_path, {"prompt": "p", "answer": gold})
            reading = SourceSettings(answer_after=mend.partition("'")[2][:-1])
            (question,) = load_questions(str(path), COLUMNS, reading=reading, warn=said.append)
            assert not said and str(question.gold) in ("42", "72", "4")


@pytest.mark.slow
def test_of_each_kind_the_first_is_named_and_the_others_counted(tmp_path: Path) -> None:
    said: list[str] = []
    golds = [f"#### {n}" for n in range(1000)] + [f"Thus \\boxed{{{n}}}" for n in range(1000)] + ["5"] * 10
    path = write(tmp_path, *({"prompt": "p", "answer": gold} for gold in golds))
    load_questions(str(path), COLUMNS, warn=said.append)
    assert len(said) == 2
    assert "row 1," in said[0] and "'#### 0'" in said[0] and "(1,000 of 2,010 are like it)" in said[0]
    assert "row 1001," in said[1] and "boxed{0}" in said[1]


def test_a_long_right_answer_is_shown_from_both_ends(tmp_path: Path) -> None:
    said: list[str] = []
    load_questions(str(write(tmp_path, {"prompt": "p", "answer": "She has " + "x" * 5000 + " #### 42"})), COLUMNS, warn=said.append)
    assert "'She has xxx" in said[0] and "#### 42'" in said[0] and len(said[0]) < 500


def test_golds_that_no_rule_compares_are_not_doubted(tmp_path: Path) -> None:
    said: list[str] = []
    load_questions(str(write(tmp_path, {"prompt": "p", "answer": "#### 5", "grading": "judge"})), COLUMNS, warn=said.append)
    assert not said
    path = write(tmp_path, {"prompt": "p", "answer": ["5", "Thus \\boxed{6}"], "answer_list": "any"})
    load_questions(str(path), COLUMNS, warn=said.append)
    assert len(said) == 1 and "Thus" in said[0]


@pytest.mark.slow
@given(st.text(alphabet="#<>/answer \\boxed{}\n,;5é水", max_size=60))
def test_doubts_about_any_text_are_no_faults(gold: str) -> None:
    kind, _ = unmatchable(gold)
    assert kind == "" or kind in MENDS


def test_decimal_answers_of_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["p"], "answer": [Decimal("1.50")]}), tmp_path / "q.parquet")
    assert load_questions(str(tmp_path / "q.parquet"), COLUMNS)[0].gold == "1.50"


def test_images_are_references(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "pictures" / "a.png")
    path = write(tmp_path, {"prompt": "p", "answer": "1", "images": ["pictures/a.png"]}, {"prompt": "q", "answer": "1", "images": []})
    with_image, without = load_questions(str(path), COLUMNS)
    data = (tmp_path / "pictures" / "a.png").read_bytes()
    assert with_image.images == ((str(tmp_path / "pictures/a.png"), hashlib.sha256(data).hexdigest()),)
    assert without.images == ()


# --- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "p", "answer": ', "row 2: is no JSON"),
        ("5", "row 2: is int 5; every row must be an object"),
        ('["p"]', "row 2: is a bare list of 1 values, and nothing says which column each is"),
        ("[" * 100_000, "row 2: is no usable JSON"),
        ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", "row 2: is no usable JSON"),
        ({"question": "p", "answer": "1"}, "row 2, column 'prompt': missing, and so is 'messages'; the row has 'question', 'answer'"),
        ({"prompt": 5, "answer": "1"}, "row 2, column 'prompt': is int 5; expected text"),
        ({"prompt": "  ", "answer": "1"}, "row 2, column 'prompt': is empty"),
        ('{"prompt": "\\ud800", "answer": "1"}', "row 2, column 'prompt': holds half of a surrogate pair at character 1"),
        ({"prompt": "p", "solution": "1"}, "row 2, column 'answer': missing; the row has 'prompt', 'solution'. Name it with"),
        ({"prompt": "p", "answer": None}, "row 2, column 'answer': is null"),
        ({"prompt": "p", "answer": " "}, "row 2, column 'answer': is empty"),
        ({"prompt": "p", "answer": True}, "row 2, column 'answer': is true; an answer is a text or a number"),
        ({"prompt": "p", "answer": ["1", "2"]}, "row 2, column 'answer': is a list of 2; say with data.answer_list whether any one"),
        (
            {"prompt": "p", "answer": ["1", "2"], "answer_list": "all"},
            "row 2, column 'answer_list': is str 'all'; write any or set or ordered",
        ),
        ({"prompt": "p", "answer": "1", "answer_list": ["a"]}, "or name another column with data.columns.answer_list"),
        (
            {"prompt": "p", "answer": ["1", None], "answer_list": "any"},
            "column 'answer': answer 2 of the list: is null; an answer is a text",
        ),
        ({"prompt": "p", "answer": [["1"], "2"], "answer_list": "set"}, "column 'answer': answer 1 of the list: is a list"),
        ({"prompt": "p", "answer": ["1", " "], "answer_list": "set"}, "column 'answer': answer 2 of the list: is empty"),
        ({"prompt": "p", "answer": []}, "row 2, column 'answer': is an empty list"),
        ({"prompt": "p", "answer": {"a": 1}}, "is an object; name the value in it with data.columns.answer (answer.a)"),
        ({"prompt": ["p"], "answer": "1"}, "row 2, column 'prompt': is a list; expected a text, or a list of {role, content}"),
        ({"prompt": "p", "answer": float("nan")}, "row 2, column 'answer': is nan, which is no number"),
        ({"messages": [], "answer": "1"}, "row 2, column 'messages': is an empty list"),
        ({"messages": "p", "answer": "1"}, "row 2, column 'messages': is str 'p'"),
        ({"messages": ["p"], "answer": "1"}, "row 2, column 'messages': turn 1 is str 'p'"),
        ({"messages": [{"role": "tool", "content": "p"}], "answer": "1"}, "turn 1 has the role 'tool'; expected one of system, user"),
        ({"messages": [{"role": ["user"], "content": "p"}], "answer": "1"}, "turn 1 has the role ['user']"),
        ({"messages": [{"role": "user", "content": ""}], "answer": "1"}, "turn 1, content: is empty"),
        ({"messages": [{"role": "user"}], "answer": "1"}, "turn 1, content: is null; expected text"),
        ({"messages": [{"role": "user", "content": "p", "tool_calls": [{}]}], "answer": "1"}, "turn 1 has the key 'tool_calls'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}], "answer": "1"}, "a part of the kind 'video' is not supported"),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "system", "content": "s"}], "answer": "1"},
            "turn 2 is a system turn; only the first turn may be one",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "answer": "1"},
            "column 'messages': the last turn is the assistant's; it must be the user's",
        ),
        (
            {"messages": [{"role": "system", "content": "p"}, {"role": "assistant", "content": "a"}], "answer": "1"},
            "column 'messages': before the model's answer is the system's; it must be the user's",
        ),
        ({"prompt": "p", "answer": "1", "id": True}, "row 2, column 'id': is true; expected a text or a number"),
        ({"prompt": "p", "answer": "1", "id": "q.jsonl:1"}, "rows 1 and 2, column 'id': both have the id 'q.jsonl:1'"),
        ({"prompt": "p", "answer": "1", "level": ["a"]}, "row 2, column 'level': is a list"),
    ],
)
def test_errors_name_file_row_and_column(tmp_path: Path, row: Any, said: str) -> None:
    path = write(tmp_path, GOOD, row)
    text = message(path)
    assert text.startswith(str(path))
    assert said in text


def test_an_empty_id_is_no_id(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "id": ""}, {**GOOD, "id": None})
    assert [q.id for q in load_questions(str(path), COLUMNS)] == ["q.jsonl:1", "q.jsonl:2"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no such file" in message(tmp_path / "none.jsonl")
    assert "files of the kind .txt cannot be read; bring JSON lines, JSON, CSV or parquet" in message(tmp_path / "q.txt")
    assert "without an ending" in message(tmp_path / "q")
    assert "holds no questions" in message(write(tmp_path, "", " "))
    assert "the file is one JSON list; call it .json" in message(write(tmp_path, [GOOD], name="q.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder without data files" in message(tmp_path / "folder.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "p", "answer": "1"}\n{"prompt": "caf\xe9", "answer": "1"}\n')
    assert "latin.jsonl, row 2: is not UTF-8 (byte 16 of the line is 0xe9)" in message(tmp_path / "latin.jsonl")
    (tmp_path / "q.parquet").write_bytes(b"not parquet")
    assert "cannot be read as parquet" in message(tmp_path / "q.parquet")


# --- sources above the data -----------------------------------------------------------------------------------------


def toy(name: str) -> list[Question]:
    return [Question(str(i), (Message("user", name),), "1") for i in range(3 if name == "toy:a/train" else 0)]


def test_sources_above_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.QUESTIONS, "toy", f"{__name__}:toy")
    assert load_questions("toy:a/train", COLUMNS) == toy("toy:a/train")
    assert load_questions("toy:a/train", COLUMNS, limit=2) == toy("toy:a/train")[:2]
    assert "toy:b: holds no questions" in message("toy:b")
    assert "'tory' is no source of questions (known: hub:, lab:, reasoning_gym:, toy:)" in message("tory:a/train")
    assert len(load_questions("lab:unreachable/train", COLUMNS, limit=2)) == 2


def test_long_prompts_are_dropped_with_a_count() -> None:
    questions = [Question(str(i), (Message("user", "x" * i),), "1") for i in (1, 5, 3, 4)]
    assert drop_long(questions, lambda q: len(q.messages[0].content), 3) == ([questions[0], questions[2]], 2)
    assert drop_long(questions, lambda q: 0, 0) == (questions, 0)


# --- order ----------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 40)


@given(sizes, sizes, st.integers(0, 5), st.integers(1, 5))
def test_each_epoch_covers_every_question_exactly_once(n: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = steps_per_epochs(n, batch_size, epochs)
    batches = [batch_ids(n, batch_size, seed, step, epochs) for step in range(steps)]
    stream = [index for batch in batches for index in batch]
    assert len(stream) == n * epochs
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert all(len(batch) == effective_batch(n, batch_size) for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= min(n, batch_size)
    with pytest.raises(ValueError, match=f"no step {steps}"):
        batch_ids(n, batch_size, seed, steps, epochs)


@given(sizes, sizes, st.integers(0, 5), st.integers(0, 400))
def test_no_question_stands_twice_in_a_batch(n: int, batch_size: int, seed: int, step: int) -> None:
    batch = batch_ids(n, batch_size, seed, step)
    assert len(set(batch)) == len(batch) == min(n, batch_size)
    assert set(batch) <= set(range(n))


@given(sizes, sizes, st.lists(st.integers(0, 300), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(n: int, batch_size: int, steps: list[int]) -> None:
    from zppo.data import order

    any_order = {step: batch_ids(n, batch_size, 1, step) for step in steps}
    order._known_orders.cache_clear()
    for step in sorted(steps, reverse=True):
        assert batch_ids(n, batch_size, 1, step) == any_order[step]


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(batch_ids(30, 30, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_place_is_equally_likely() -> None:
    first = Counter(batch_ids(5, 5, seed, 0)[0] for seed in range(2000))
    assert set(first) == set(range(5))
    assert all(abs(count - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for count in first.values())


def test_a_far_step_is_at_hand() -> None:
    assert len(batch_ids(7, 5, 0, 40_000)) == 5


def test_the_data_end_where_the_epochs_end() -> None:
    assert steps_per_epochs(10, 4, 1) == 3
    assert steps_per_epochs(10, 4, 2) == 5
    assert [len(batch_ids(10, 4, 0, step, 1)) for step in range(3)] == [4, 4, 2]
    assert len(batch_ids(10, 4, 0, 2)) == 4
    assert steps_per_epochs(3, 384, 2) == 2
    with pytest.raises(ValueError, match="no batches"):
        effective_batch(0, 4)
    with pytest.raises(ValueError, match="no step -1"):
        batch_ids(3, 1, 0, -1)


def test_a_batch_or_a_data_set_too_small_for_replay_and_help_is_said() -> None:
    def said(questions: int, *overrides: str) -> list[str]:
        return idle_parts(load_recipe(Path(__file__).parents[1] / "recipes" / "lab.yaml", overrides), questions)

    assert said(1000) == []
    assert [text.split(":")[0] for text in said(1000, "--rollout.batch_size=3", "--zone.rho_aug=0.25")] == [
        "no question is ever replayed",
        "no hard question is ever asked again with help, so the teacher is of no use",
    ]
    assert "each of the 20 is new in every step" in said(20)[0]
    assert said(20, "--method=grpo") == said(1000, "--rollout.batch_size=3", "--zone.rho_replay=0", "--zone.rho_aug=0") == []


@pytest.mark.parametrize("name", ["id", "level", "grading", "answer_list", "choices"])
def test_a_column_that_is_named_and_in_no_row_is_said(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2", "topic": None}]
    said: list[str] = []
    for column in (name, "topic", "topik"):
        columns = ColumnSettings.model_validate({name: column})
        assert len(load_questions(str(write(tmp_path, *rows)), columns, warn=said.append)) == 2
    (line,) = said
    assert f"no row has the column 'topik' that data.columns.{name} names" in line
