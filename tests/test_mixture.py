"""Several sources of training questions as one set: filters, copies, caps, weights, ids, and what a plan and a start say of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zppo.cli import main
from zppo.config.data_settings import ColumnSettings
from zppo.config.recipe import dump_recipe, load_recipe
from zppo.config.settings import Settings
from zppo.core.draws import draw_key
from zppo.core.types import Golds, ImageRef, Message, Question
from zppo.data.load import load_questions, read_part
from zppo.data.local_files import Place, SourceSettings
from zppo.data.mixture import Part, PartRead, as_row, mix, question_key, row_of, short_names
from zppo.data.row_filters import RowFilters, check_filters, parse_filter
from zppo.errors import DataError, SettingsError, ZPPOError
from zppo.rollout.data import load_data

LAB = {"student": {"model": "lab:unreachable/student"}, "method": "grpo"}
COLUMNS = ColumnSettings()


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def settings_of(**data: Any) -> Settings:
    return load_recipe({**LAB, "data": data})


def load(**data: Any) -> tuple[list[Question], list[str], list[str]]:
    """(training questions, what was warned of, what was said of the sources)."""
    warned, said = list[str](), list[str]()
    return load_data(settings_of(**data), warned.append, said.append)[0], warned, said


def sums(n: int, first: int = 0, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"q{first + i}", "prompt": f"{first + i} + 1?", "answer": first + i + 1, **more} for i in range(n)]


# --- filters --------------------------------------------------------------------------------------------------------


def truth(text: str, **row: Any) -> bool | None:
    test, _ = parse_filter(text)
    return test(row.get)


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        ("pass_rate <= 0.5", {"pass_rate": 0.5}, True),
        ("pass_rate <= 0.5", {"pass_rate": 0.75}, False),
        ("pass_rate <= 0.5", {"pass_rate": None}, None),
        ("pass_rate <= 0.5", {"pass_rate": float("nan")}, None),
        ("pass_rate <= 0.5", {"pass_rate": "0.25"}, True),  # of a CSV table
        ("pass_rate <= 0.5", {"pass_rate": " "}, None),
        ("not pass_rate <= 0.5", {"pass_rate": None}, None),
        ("pass_rate == null or pass_rate <= 0.5", {"pass_rate": None}, True),
        ("pass_rate != null", {"pass_rate": 0}, True),
        ("pass_rate != null", {"pass_rate": None}, False),
        ("null == pass_rate", {"pass_rate": None}, True),
        ("0 < x < 1", {"x": 0.5}, True),
        ("0 < x < 1", {"x": 1}, False),
        ("x > -1.5e1", {"x": -14}, True),
        ("level in ['hard', \"harder\"]", {"level": "hard"}, True),
        ("level not in ['hard']", {"level": "hard"}, False),
        ("level in [1, 2]", {"level": "2"}, True),
        ("level in ['hard']", {"level": None}, None),
        ("'geo' in source", {"source": "geometry"}, True),
        ("'b' in tags", {"tags": ["a", "b"]}, True),
        ("ok", {"ok": True}, True),
        ("ok", {"ok": "False"}, False),
        ("not ok and x == 1", {"ok": False, "x": 1}, True),
        ("ok == true", {"ok": 1}, False),  # 1 is a number
        ("a == 1 or b == 1 and c == 1", {"a": 1, "b": 0, "c": 0}, True),
        ("(a == 1 or b == 1) and c == 1", {"a": 1, "b": 0, "c": 0}, False),
        ("a == 1 or b == 1", {"a": None, "b": 1}, True),
        ("a == 1 and b == 1", {"a": None, "b": 0}, False),
        ("level == 3", {"level": "hard"}, False),
        ("`pass rate` < 1", {"pass rate": 0}, True),
        ("name == 'and'", {"name": "and"}, True),
    ],
)
def test_filters_say_which_rows_pass(text: str, row: dict[str, Any], expected: bool | None) -> None:
    assert truth(text, **row) is expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pass_rate <=", "it ends where a column or a value should stand"),
        ("pass_rate = 1", "equal is =="),
        ("pass_rate <= 0.5 0", "'0' is one too many"),
        ("(x < 1", "')' is missing before its end"),
        ("x in [1, 2", "is missing"),
        ("1 < 2", "it names no column"),
        ("x < and", "'and' stands where"),
        ("__import__('os').system('true')", "cannot be read"),
        ("x.__class__.__mro__[0] < 1", "is one too many"),
        ("x < 1; y", "cannot be read"),
        ("(" * 900 + "x" + ")" * 90, "nested too deeply"),
        ("x < " + "1" * 1000, "more than 1,000 characters"),
        ("", "it ends"),
    ],
)
def test_what_is_no_filter_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        check_filters([text])


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(ValueError, match="filter"):
        check_filters(["not " * 240 + "("])
    assert truth("not " * 240 + "ok", ok=True) is True


@given(st.text(max_size=30), st.dictionaries(st.sampled_from(["a", "b"]), st.none() | st.booleans() | st.integers() | st.text(max_size=3)))
def test_any_text_is_a_filter_or_an_error(text: str, row: dict[str, Any]) -> None:
    """And a filter says true, false or unknown of any row, or names what it cannot compare."""
    try:
        check_filters([text])
    except ValueError as error:
        assert str(error).startswith("filter ")
        return
    place = Place("f", "f", 1, Path())
    try:
        assert RowFilters([text]).passes(row, place, lambda name: 1) in (True, False)
    except DataError as error:
        assert "f, row 1, filter" in str(error)


def test_values_without_an_order_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", *sums(1, tags=["x"]))
    with pytest.raises(DataError, match=r"a.jsonl, row 1, filter 'tags < 3': a list and int 3 have no order"):
        load(train=str(path), filters="tags < 3")
    path = write(tmp_path, "a.jsonl", *sums(1, rate="high"))
    with pytest.raises(DataError, match=r"filter 'rate < 3': str 'high' and int 3 have no order"):
        load(train=str(path), filters="rate < 3")


def test_an_unknown_column_is_an_error_that_names_those_seen(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", *sums(2, rate=1))
    with pytest.raises(DataError) as caught:
        load(train=str(path), filters=["pass_rate <= 0.5"])
    assert "a.jsonl: no row has the column 'pass_rate' of the filter 'pass_rate <= 0.5'; the rows have id, prompt, answer, rate" in str(
        caught.value
    )
    rare = write(tmp_path, "b.jsonl", *sums(2), *sums(1, 9, rate=1))  # one row has it: the others are null
    questions, _, said = load(train=str(rare), filters="rate == 1")
    assert [q.id for q in questions] == ["q9"]
    assert said == ["b: 3 rows, 1 kept; 2 dropped by rate == 1 (2 of them null)"]


def test_each_filter_is_counted_with_its_nulls(tmp_path: Path) -> None:
    rows = [*sums(2, rate=0.25), *sums(3, 2, rate=0.75), *sums(4, 5, rate=None), *sums(1, 9, rate=0.5)]
    rows[0]["prompt"] = "x" * 100
    questions, _, said = load(train=str(write(tmp_path, "a.jsonl", *rows)), filters=["rate <= 0.5", "prompt_length < 50"])
    assert [q.id for q in questions] == ["q1", "q9"]
    assert said == ["a: 10 rows, 2 kept; 7 dropped by rate <= 0.5 (4 of them null), 1 dropped by prompt_length < 50"]


def test_a_row_that_a_filter_drops_need_not_be_a_question(tmp_path: Path) -> None:
    """Rows with a null answer are in published sets; what is worked out is asked only of rows that came so far."""
    path = write(tmp_path, "a.jsonl", *sums(1), {"prompt": "?", "answer": None})
    with pytest.raises(DataError, match="is null"):
        load(train=str(path))
    questions, _, said = load(train=str(path), filters=["answer != null", "answer_length <= 512"])
    assert len(questions) == 1 and said == ["a: 2 rows, 1 kept; 1 dropped by answer != null, 0 dropped by answer_length <= 512"]


def test_what_is_worked_out_of_a_question(tmp_path: Path) -> None:
    Image.new("RGB", (120, 90)).save(tmp_path / "a.png")
    Image.new("RGB", (300, 80)).save(tmp_path / "b.png")
    rows: list[dict[str, Any]] = [
        {"id": "two", "prompt": "12345", "answer": ["1", "123"], "answer_list": "any", "images": ["a.png", "b.png"]},
        {"id": "none", "prompt": "1", "answer": "1"},
    ]
    path = str(write(tmp_path, "a.jsonl", *rows))
    for text, kept in {
        "image_width == 120": ["two"],
        "image_height == 80": ["two"],
        "image_height >= 100": [],
        "image_count == 2": ["two"],
        "image_count == 0": ["none"],
        "image_width == null": ["none"],
        "answer_length == 3": ["two"],
        "prompt_length == 5": ["two"],
    }.items():
        part = settings_of(train=path, filters=text).data.parts[0]
        found = [q.id for q in read_part(part).questions] if kept else "none"
        if kept:
            assert found == kept, text
        else:
            with pytest.raises(DataError, match="none of its 2 rows passes the filters"):
                read_part(part)
    own = write(tmp_path, "b.jsonl", *sums(1, answer_length=99))  # the row's own column wins
    assert load(train=str(own), filters="answer_length == 99")[0]


def test_filters_of_parquet_csv_folders_and_generated_questions(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(sums(4, meta={"rate": 0.5}) + sums(1, 8, meta={"rate": 1.0})), tmp_path / "a.parquet")
    assert len(load(train=str(tmp_path / "a.parquet"), filters="meta.rate < 1")[0]) == 4
    (tmp_path / "a.csv").write_text("prompt,answer,rate\na,1,0.5\nb,2,\nc,3,0.7\n", encoding="utf-8")
    assert load(train=str(tmp_path / "a.csv"), filters="rate < 0.6")[2] == ["a: 3 rows, 1 kept; 2 dropped by rate < 0.6 (1 of them null)"]
    write(tmp_path / "set", "train.jsonl", *sums(3, rate=1), *sums(1, 5, rate=0))
    assert [q.id for q in load(train=str(tmp_path / "set"), filters="rate < 1")[0]] == ["q5"]
    one_level = load(train="lab:unreachable/train", filters="level != 'easy'")[0]
    everything = load(train="lab:unreachable/train")[0]
    assert 0 < len(one_level) < len(everything) and one_level == [q for q in everything if q.level != "easy"]


def test_filters_read_all_columns_of_a_saved_set(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(sums(3, rate=0.2) + sums(1, 7, rate=0.9)).save_to_disk(tmp_path / "saved")
    assert [q.id for q in load(train=str(tmp_path / "saved"), filters="rate > 0.5")[0]] == ["q7"]


# --- one source -----------------------------------------------------------------------------------------------------


def test_a_recipe_with_one_source_is_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", *sums(5))
    questions, warned, said = load(train=str(path))
    assert questions == load_questions(str(path), COLUMNS) and said == []
    assert not any("copies" in text for text in warned)
    as_list, _, said = load(train=[{"source": str(path)}])
    assert as_list == questions and said == []
    assert load(train=str(path), limit=2)[0] == questions[:2]


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copies_are_told_with_their_count_and_one_setting_keeps_one(tmp_path: Path) -> None:
    """170 questions 10 times each, as known data sets have them."""
    rows = [{"prompt": f"What is  {i} + 1? ", "answer": i + 1 + (i == 0 and copy > 6)} for copy in range(10) for i in range(170)]
    path = str(write(tmp_path, "a.jsonl", *rows))
    questions, warned, said = load(train=path)
    assert len(questions) == 1700 and said == []
    [told] = [text for text in warned if "copies" in text]
    assert "1,530 of 1,700 training questions are copies" in told and "stands 10 times" in told and "leaves 170 different ones" in told
    assert "3 have another right answer than the first" in told and "data.duplicates: one" in told
    questions, warned, said = load(train=path, duplicates="one")
    assert [q.id for q in questions] == [f"a.jsonl:{i + 1}" for i in range(170)]
    assert not any("copies" in text for text in warned)
    assert said == ["a: 1,700 rows, 170 kept; 1,530 copies"]


def test_copies_have_the_same_text_whatever_its_space_and_the_same_images() -> None:
    def question(text: str, *digests: str) -> Question:
        return Question("x", (Message("user", text),), "1", tuple(ImageRef(f"{d}.png", d) for d in digests))

    assert question_key(question("a  b\n", "1")) == question_key(question("a b", "1"))
    different = [question("a b"), question("a b", "1"), question("a b", "2"), question("ab"), question("a b", "1", "2")]
    assert len({question_key(q) for q in different}) == len(different)


def test_copies_over_sources_go_where_a_source_says_so(tmp_path: Path) -> None:
    a, b = (write(tmp_path, "a.jsonl", *sums(4)), write(tmp_path, "b.jsonl", *sums(4, 2), {"prompt": "5 + 1?", "answer": 6}))
    both: list[dict[str, Any]] = [{"source": str(a)}, {"source": str(b)}]
    questions, warned, said = load(train=both, duplicates="one")
    assert [q.messages[0].content for q in questions] == [f"{i} + 1?" for i in range(6)]
    assert said == ["a: 4 rows, 4 kept; 0 copies", "b: 5 rows, 2 kept; 3 copies"]
    both[1]["duplicates"] = "keep"
    assert load(train=both, duplicates="one")[2][1] == "b: 5 rows, 5 kept"
    questions, warned, _ = load(train=both)
    assert any("3 of 9 training questions are copies" in text for text in warned)


def test_training_questions_that_are_held_out_are_told_and_can_be_left_out(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.jsonl", *sums(4)), write(tmp_path, "b.jsonl", *sums(4, 2))
    held = write(tmp_path, "held.jsonl", {"prompt": " 3 + 1?", "answer": 4}, *sums(1, 99))
    train = [{"source": str(a)}, {"source": str(b)}]
    _, warned, _ = load(train=train, eval=str(held))
    [told] = [text for text in warned if "held-out questions are training questions" in text]
    assert "1 of 2 held-out questions are training questions too ('held.jsonl:1', for one)" in told and "a 1, b 1" in told
    questions, warned, said = load(train=train, eval=str(held), filters="not held_out")
    assert not any("held-out" in text for text in warned)
    assert [q.messages[0].content for q in questions] == ["0 + 1?", "1 + 1?", "2 + 1?", "2 + 1?", "4 + 1?", "5 + 1?"]
    assert said[0] == "a: 4 rows, 3 kept; 1 dropped by not held_out"


# --- caps and weights -----------------------------------------------------------------------------------------------


def test_a_cap_draws_by_seed_and_id_and_a_larger_one_adds_to_it(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.jsonl", *sums(50)), write(tmp_path, "b.jsonl", *sums(30, 100))

    def drawn(cap: int, seed: int = 0, first: bool = True) -> list[str]:
        entry, other = {"source": str(a), "cap": cap}, {"source": str(b)}
        settings = load_recipe({**LAB, "seed": seed, "data": {"train": [entry, other] if first else [other, entry]}})
        return [q.id for q in load_data(settings)[0] if int(q.id[1:]) < 100]

    ten = drawn(10)
    assert len(ten) == 10 and ten == sorted(ten, key=lambda name: int(name[1:]))  # in the order of the file
    keys = {f"q{i}": draw_key(0, "cap", f"q{i}") for i in range(50)}
    assert set(ten) == set(sorted(keys, key=keys.__getitem__)[:10])
    assert set(ten) < set(drawn(20)) and drawn(50) == drawn(60) == [f"q{i}" for i in range(50)]
    assert drawn(10, seed=1) != ten and drawn(10, first=False) == ten
    a.write_text("".join(reversed(a.read_text().splitlines(keepends=True))))  # the order of the rows does not matter
    assert set(drawn(10)) == set(ten)


def test_weights_are_shares_and_the_scarcest_source_gives_all(tmp_path: Path) -> None:
    names = {"a": 40, "b": 30, "c": 100}
    for number, (name, n) in enumerate(names.items()):
        write(tmp_path, f"{name}.jsonl", *sums(n, 1000 * number))
    weights = {"a": 2.0, "b": 1.0, "c": 0.5}
    train: list[dict[str, Any]] = [{"source": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in weights.items()]
    questions, _, said = load(train=train)
    assert [line.partition(" kept")[0] for line in said] == ["a: 40 rows, 40", "b: 30 rows, 20", "c: 100 rows, 10"]
    assert said[1].endswith("10 left out by the weight of 1") and len(questions) == 70
    train[0]["cap"] = 20
    assert [len(load(train=train)[0]), load(train=train)[2][0]] == [35, "a: 40 rows, 20 kept; 20 over the cap of 20"]
    del train[2]["weight"]
    with pytest.raises(SettingsError, match="2 of the 3 sources of data.train have a weight"):
        load(train=train)


@given(st.lists(st.tuples(st.integers(0, 30), st.none() | st.integers(1, 20)), min_size=1, max_size=4), st.booleans(), st.integers(0, 3))
def test_what_is_read_is_kept_or_counted(sizes: list[tuple[int, int | None]], one: bool, seed: int) -> None:
    parts = [Part(str(i), f"p{i}", SourceSettings(), COLUMNS, one=one, cap=cap) for i, (_, cap) in enumerate(sizes)]
    read = [
        PartRead([Question(f"q{j % 20}{'' if j < 20 else 'x'}", (Message("user", f"{j % 17}"),), "1") for j in range(n)], n)
        for n, _ in sizes
    ]
    if not any(n for n, _ in sizes):
        with pytest.raises(DataError, match="no training question is left"):
            mix(parts, read, seed)
        return
    mixture = mix(parts, read, seed)
    assert len({q.id for q in mixture.questions}) == len(mixture.questions)
    assert sum(c.kept for c in mixture.counts) == len(mixture.questions) == len(mixture.places)
    for counts, (n, cap) in zip(mixture.counts, sizes, strict=True):
        assert counts.rows == n == counts.copies + counts.left_out + counts.kept
        assert cap is None or counts.kept <= cap
    for question, (number, place) in zip(mixture.questions, mixture.places, strict=True):
        assert read[number].questions[place].messages == question.messages
    keys = [question_key(q) for q in mixture.questions]
    assert not one or len(set(keys)) == len(keys)


# --- ids ------------------------------------------------------------------------------------------------------------


def test_ids_that_two_sources_have_get_the_name_of_the_later_one(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a.jsonl", *sums(3, rate=0)), write(tmp_path, "b.jsonl", *sums(3, 2, rate=1))
    train: list[dict[str, Any]] = [{"source": str(a)}, {"source": str(b)}]
    assert [q.id for q in load(train=train)[0]] == ["q0", "q1", "q2", "b/q2", "q3", "q4"]
    train[0]["cap"] = 1  # what of the first source is used does not change what the other's questions are called
    assert [q.id for q in load(train=train)[0]][1:] == ["b/q2", "q3", "q4"]
    train[0] |= {"cap": None, "filters": "id == 'q0'"}
    assert [q.id for q in load(train=train)[0]] == ["q0", "b/q2", "q3", "q4"]
    train[1]["name"] = "second"
    assert "second/q2" in [q.id for q in load(train=train)[0]]
    one = [q.id for q in load(train=[{"source": str(a)}, {"source": str(a)}, {"source": str(a)}])[0]]
    assert one == ["q0", "q1", "q2", "a-2/q0", "a-2/q1", "a-2/q2", "a-3/q0", "a-3/q1", "a-3/q2"]


def test_sources_have_short_names_of_their_own() -> None:
    def named(*sources: Any) -> list[str]:
        return short_names([(s if isinstance(s, tuple) else (s, None, None)) for s in sources])

    assert named("data/a.jsonl.gz", "hub:owner/name?config=x", "reasoning_gym:aiw?size=3", "lab:unreachable/train", "data/zppo-77k") == [
        "a", "name", "aiw", "unreachable-train", "zppo-77k",
    ]  # fmt: skip
    vero = [("hub:z/vero", None, config) for config in ("ai2d", "tqa", None)]
    assert named(*vero) == ["vero", "vero-tqa", "vero-2"]
    assert named(("a.jsonl", None, None), ("b.jsonl", "a", None)) == ["a-2", "a"]
    with pytest.raises(ValueError, match="two sources of data.train have the name 'a'"):
        named(("x", "a", None), ("y", "a", None))


# --- settings -------------------------------------------------------------------------------------------------------


def test_what_a_source_does_not_say_is_as_data_says(tmp_path: Path) -> None:
    a = write(tmp_path, "a.jsonl", {"q": "1?", "solution": "so #### 2"}, {"q": "2?", "solution": "so #### 3"})
    b = write(tmp_path, "b.jsonl", {"prompt": "3?", "answer": "is: 4"})
    train = [{"source": str(a)}, {"source": str(b), "columns": {}, "answer_after": "is:"}]
    questions, _, _ = load(train=train, columns={"prompt": "q", "answer": "solution"}, answer_after="####", limit=1)
    assert [(q.messages[0].content, q.gold) for q in questions] == [("1?", "2"), ("3?", "4")]
    write(tmp_path / "set", "train.jsonl", *sums(1))
    write(tmp_path / "set", "test.jsonl", *sums(2, 5))
    assert len(load(train=[{"source": str(tmp_path / "set"), "split": "test"}, {"source": str(tmp_path / "set")}])[0]) == 3


def test_sources_are_looked_for_beside_the_recipe_and_survive_its_copy(tmp_path: Path) -> None:
    write(tmp_path / "recipes", "a.jsonl", *sums(2))
    text = (
        "student: {model: s}\nmethod: grpo\ndata:\n  train:\n"
        "    - {source: a.jsonl, filters: 'id != null'}\n    - {source: lab:unreachable/train, cap: 3}\n"
    )
    (tmp_path / "recipes" / "r.yaml").write_text(text, encoding="utf-8")
    settings = load_recipe(tmp_path / "recipes" / "r.yaml")
    assert [part.source for part in settings.data.parts] == [str(tmp_path / "recipes" / "a.jsonl"), "lab:unreachable/train"]
    (tmp_path / "copy.yaml").write_text(dump_recipe(settings), encoding="utf-8")
    assert load_recipe(tmp_path / "copy.yaml") == settings
    assert settings.data.train_name == "2 sources (a, unreachable-train)"
    over = load_recipe(
        tmp_path / "recipes" / "r.yaml", ["--data.train=[{source: lab:reachable/train, cap: 1}]", "--data.filters=id != null"]
    )
    assert [(part.source, part.cap, part.filters) for part in over.data.parts] == [("lab:reachable/train", 1, ("id != null",))]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": [{"source": "a", "weigth": 1}]}, "data.train.0.weigth is no setting; the nearest one is data.train.0.weight"),
        ({"train": [{"source": "a"}, {"sourc": "b"}]}, "data.train.1.source is missing (where its questions are"),
        ({"train": [{"source": "a", "cap": 0}]}, "data.train.0.cap: '0' does not fit; expected integer >= 1, or empty (at most so many"),
        ({"train": [{"source": "a", "filters": ["x <"]}]}, "data.train.0.filters: filter 'x <': it ends where"),
        ({"train": "a", "filters": ["x = 1"]}, "data.filters: filter 'x = 1': '= 1' cannot be read; equal is =="),
        ({"train": []}, "data.train names no source"),
        ({"train": ["a", "b"]}, "data.train.0: 'a' does not fit"),
        ({"train": 5}, "data.train: '5' does not fit; expected text or list of"),
        ({"train": [{"source": "a", "revision": "v1"}]}, "data.train.0.revision is set, and "),
        ({"train": [{"source": "hub:a/b"}], "streaming": True}, "data.streaming needs data.train.0.limit for data.train.0=hub:a/b"),
        ({"train": [{"source": "a", "name": "x"}, {"source": "b", "name": "x"}]}, "two sources of data.train have the name 'x'"),
        ({"train": "a", "duplicates": "two"}, "data.duplicates: 'two' does not fit; expected keep | one"),
        ({"train": [{"source": "reasoning_gym:aiw?size=10"}], "eval": "reasoning_gym:aiw?size=5&seed=9"}, "share questions"),
    ],
)
def test_mistakes_in_a_list_of_sources_are_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ZPPOError) as caught:
        settings_of(**data)
    assert said in str(caught.value)


# --- rows that are written again ------------------------------------------------------------------------------------


def test_rows_are_the_same_questions_when_they_are_written_and_read_again(tmp_path: Path) -> None:
    import base64

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    inline = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    rows: list[dict[str, Any]] = [
        {"problem": "<image>Which?", "answer": "x #### A", "pics": ["a.png"], "meta": {"k": [1]}},
        {"problem": "Which?", "answer": "#### B", "pics": {"bytes": inline, "path": None}, "id": "b"},
        {
            "messages": [{"role": "user", "content": [{"type": "image", "image": inline}, {"type": "text", "text": "?"}]}],
            "answer": "#### 2",
        },
    ]
    path = write(tmp_path, "a.jsonl", *rows)
    data: dict[str, Any] = {
        "columns": {"prompt": "problem", "images": "pics"},
        "answer_after": "####",
        "images": {"folder": str(tmp_path / "kept")},
    }
    part = settings_of(train=str(path), **data).data.parts[0]
    read = read_part(part, keep_rows=True)
    assert read.kept_rows[0]["meta"] == {"k": [1]} and "base64" not in json.dumps(read.kept_rows)
    elsewhere = write(tmp_path / "elsewhere", "b.jsonl", *read.kept_rows)
    # What came as bytes was kept under its digest; a path is absolute now.
    assert read_part(settings_of(train=str(elsewhere), **data).data.parts[0]).questions == read.questions


def test_generated_questions_are_rows_too(tmp_path: Path) -> None:
    golds = Golds("any", ("1", "2"))
    questions = [
        Question("a", (Message("user", "x"),), "1", level="3"),
        Question("b", (Message("system", "s"), Message("user", "y")), golds, grading="judge"),
    ]
    path = write(tmp_path, "a.jsonl", *(as_row(q, COLUMNS) for q in questions))
    assert load_questions(str(path), COLUMNS) == questions
    assert row_of({"prompt": "x", "more": 1}, questions[0], COLUMNS) == {"prompt": "x", "more": 1, "id": "a"}


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_plan_says_what_each_source_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        tmp_path,
        "a.jsonl",
        *sums(8, rate=0.25),
        *sums(4, 8, rate=0.75),
        *sums(1, rate=None) and [{"prompt": "z", "answer": 1, "rate": None}],
    )
    write(tmp_path, "b.jsonl", *sums(6, 4))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "student: {model: owner/student}\nmethod: grpo\ndata:\n  duplicates: one\n  train:\n"
        "    - {source: a.jsonl, filters: ['rate <= 0.5']}\n    - {source: b.jsonl, cap: 1}\n",
        encoding="utf-8",
    )
    assert main(["train", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "9 from 2 sources (a, b)" in out
    assert re.search(r"^a +13 rows, 8 kept; 5 dropped by rate <= 0.5 \(1 of them null\), 0 copies *$", out, re.M)
    assert re.search(r"^b +6 rows, 1 kept; 4 copies, 1 over the cap of 1 *$", out, re.M)


@pytest.mark.parametrize("size", ["0.8b", "2b", "4b", "9b"])
def test_recipes_of_the_paper_say_how_their_corpus_is_built(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[1] / "recipes" / f"qwen3.5-{size}.yaml"
    assert main(["train", str(recipe), "--dry-run"]) == 2
    assert "zppo data build zppo-77k --out" in capsys.readouterr().err
    write(tmp_path / "data" / "zppo-77k", "train.jsonl", *sums(3))
    assert main(["train", str(recipe), "--dry-run", "--data.eval=null"]) == 0
    assert f"3 from {tmp_path / 'data' / 'zppo-77k'}" in capsys.readouterr().out


@pytest.mark.slow
def test_training_says_what_each_source_gives_and_goes_on_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the lab, through the command line: two sources with the same ids; a run that goes on is the one that did not stop."""
    recipe = str(Path(__file__).parents[1] / "recipes" / "lab.yaml")
    lab = "source: lab:unreachable"
    train = f"[{{{lab}/train, cap: 6}}, {{{lab}/test, cap: 3}}, {{{lab}/train, cap: 4, name: again}}]"
    small = [f"--data.train={train}", "--method=grpo", "--rollout.batch_size=4", "--rollout.group_size=2", "--data.eval=null"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert main(["train", recipe, *small, "--train.steps=2", f"--output={whole}"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^unreachable-train: [\d,]+ rows, 6 kept; [\d,]+ over the cap of 6$", out, re.M)
    assert re.search(r"^again: [\d,]+ rows, 4 kept; [\d,]+ over the cap of 4$", out, re.M)
    assert re.search(r"warning: 4 of 13 training questions are copies", out)
    assert main(["train", recipe, *small, "--train.steps=1", f"--output={parted}"]) == 0
    kept = (parted / "recipe.yaml").read_text(encoding="utf-8")
    (parted / "recipe.yaml").write_text(kept.replace("steps: 1\n", "steps: 2\n"), encoding="utf-8")
    assert main(["resume", str(parted)]) == 0
    rows = [[pq.read_table(file).to_pylist() for file in sorted((run / "rollouts").glob("*.parquet"))] for run in (whole, parted)]
    assert len(rows[0]) == 2 and [[row["question_id"] for row in step] for step in rows[0]] == [
        [row["question_id"] for row in step] for step in rows[1]
    ]
    asked = {row["question_id"] for step in rows[0] for row in step}
    assert len(asked) == 8 and any(name.startswith("again/") for name in asked)
