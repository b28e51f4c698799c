"""Every adapter on made-up rows of its data set's own schema: prompts, golds, media; and on rows that are no rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate_data import DOCS, GOLDEN, golden, items, rows, with_table, write_data
from zppo.core.types import IMAGE
from zppo.errors import DataError, SettingsError
from zppo.evals.adapters.choice import LETTERS, ask_about, bare_options, numbered_images, with_options
from zppo.evals.adapters.maths import listed_options, option_letters, split_options
from zppo.evals.adapters.row import DatasetRow, strip_directives
from zppo.evals.adapters.video import subtitle_text
from zppo.evals.benchmark import Benchmark
from zppo.evals.item import Item, conversation
from zppo.evals.registry import BENCHMARKS, find, suite
from zppo.prompts import PromptBook

EACH = pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
PAPER = Path(__file__).parents[1] / "src" / "zppo" / "report" / "data" / "paper_accuracy.csv"
KINDS = {
    "choice": "AI2D EmbSp MMMUPro MMLU MMLU-Pro MMLU-Rd CEval GPQA-D VisP WeMath MVBench VMME VMMES".split(),
    "number": "AIME25 AIME26".split(),
    "anls": ["InfoVQA"],
    "ocr": ["OCREN", "OCRZH"],
    "graded": ["MM-Vet"],
    "criterion": ["MultiCh"],
    "judged": ["CharXiv", "HLE", "MMVU"],
}
# What says how to reason or how to write an answer down; no question of the made-up rows needs any of it.
DIRECTIVE = re.compile(
    r"step by step|option's letter|option letter|single word or phrase|curly brackets|final answer|boxed|directly answer|directly without"
    r"|conduct reasoning|at the end|Answer with|e\.g\.",
    re.IGNORECASE,
)


def asked(item: Item) -> str:
    """The question as the model sees it, without the shared closing instruction."""
    closing = PromptBook().text("closing", {})
    text = conversation(item, PromptBook())[-1].content
    assert text.endswith(closing) and text.count(closing) == 1
    return text.removesuffix(closing)


@EACH
def test_the_rendering_is_the_golden_one(benchmark: Benchmark) -> None:
    """Prompt, gold, kind, options, facts and media of every made-up row, as a text that people have read."""
    assert golden(benchmark) == (GOLDEN / f"{benchmark.name}.txt").read_text(encoding="utf-8")


@EACH
def test_directives_are_gone_and_the_shared_one_is_there_once(benchmark: Benchmark) -> None:
    for item in items(benchmark):
        assert not DIRECTIVE.search(asked(item)), asked(item)


@EACH
def test_items_are_whole(benchmark: Benchmark) -> None:
    found = items(benchmark)
    assert len(found) >= 2
    assert len({item.id for item in found}) == len(found)
    for item in found:
        assert item.benchmark == benchmark.name
        assert sum(m.content.count(IMAGE) for m in item.messages) == len(item.images)
        assert all(gold.strip() for gold in item.golds)
        assert bool(item.frames) + (item.video is not None) == (benchmark.family == "video")
        assert benchmark.family != "vlm" or item.images
        if item.kind == "choice":
            assert set(item.golds[0].split(", ")) <= set(LETTERS[: len(item.options)])


@pytest.mark.parametrize(("kind", "names"), KINDS.items(), ids=KINDS)
def test_kinds_of_answers(kind: str, names: list[str]) -> None:
    for name in names:
        assert {item.kind for item in items(find(name))} == {kind}, name


def test_rows_that_are_no_part_of_a_benchmark_give_no_item() -> None:
    """Faulty rows of MMLU-Redux; each language of OCRBench v2 leaves the other's rows."""
    assert [len(find("MMLU-Rd").adapter(row)) for row in rows(find("MMLU-Rd"))] == [1, 0, 1]
    english, chinese = ([bool(find(name).adapter(row)) for row in rows(find("OCREN"))] for name in ("OCREN", "OCRZH"))
    assert english == [not c for c in chinese] and sum(chinese) == 2


def test_one_chart_gives_five_questions() -> None:
    assert [item.id.rpartition("/")[2] for item in items(find("CharXiv"))[:5]] == ["r", "d1", "d2", "d3", "d4"]


def test_images_of_several_marks_come_in_the_order_of_the_text() -> None:
    """MMMU-Pro: marks in question and options; the second mention of an image is words."""
    item = items(find("MMMUPro"))[0]
    assert [path.name for path in item.images if isinstance(path, Path)] == ["red.png", "blue.png", "green.png"]
    text, order = numbered_images("<image 2> beside <image 1>, unlike <image 2> and <image_3>")
    assert text == f"{IMAGE} beside {IMAGE}, unlike (image 1) and {IMAGE}"
    assert order == (2, 1, 3)


def test_gpqa_draws_the_order_by_the_record_alone() -> None:
    """The same order at every load, whatever else is loaded; the right answer is not always at the same place."""
    row = rows(find("GPQA-D"))[0]
    assert find("GPQA-D").adapter(row) == find("GPQA-D").adapter(row)
    letters = {find("GPQA-D").adapter(DatasetRow("GPQA-D", 1, {**row.data, "Record ID": f"r{i}"}))[0].gold for i in range(40)}
    assert letters == set("ABCD")
    for item in items(find("GPQA-D")):
        assert item.options[LETTERS.index(item.golds[0])] in ("the neutron", "uracil")


def test_a_conversation_is_kept_and_only_its_end_gets_the_instruction() -> None:
    item = items(find("MultiCh"))[0]
    turns = conversation(item, PromptBook())
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[:2] == item.messages[:2] and turns[2].content.startswith("How is the weather?\n\n")


def test_a_conversation_is_read_in_both_shapes_of_a_sequence() -> None:
    """`datasets` gives a sequence of {role, content} as one object of two lists."""
    row = rows(find("MultiCh"))[0]
    columns = row.data["conversation"]
    turns = [{"role": role, "content": content} for role, content in zip(columns["role"], columns["content"], strict=True)]
    (item,) = find("MultiCh").adapter(DatasetRow("MultiCh", 1, {**row.data, "conversation": turns}))
    assert item == find("MultiCh").adapter(row)[0] and len(item.messages) == 3


@pytest.mark.parametrize(
    ("kind", "gold", "asked_for"),
    [
        (4, "9.17", "The answer is a number with 2 decimals."), (4, "0.5", "The answer is a number with 1 decimal."),
        (4, "12", "The answer is a whole number."), (3, "9.17", ""), (1, "94", ""),
        (None, "9.17", "The answer is a number with 2 decimals."), (None, "ours", ""),
    ],
)  # fmt: skip
def test_charxiv_names_the_decimals_that_its_judge_expects(kind: int | None, gold: str, asked_for: str) -> None:
    """Of numbers that are worked out; one that stands in the chart is asked for as it stands."""
    row = rows(find("CharXiv"))[1]
    change = {"reasoning_a_type": kind, "reasoning_a": gold}
    item = find("CharXiv").adapter(DatasetRow("CharXiv", 1, {**row.data, **change}))[0]
    assert item.messages[0].content == f"{IMAGE}\n{row.data['reasoning_q']}" + (f"\n{asked_for}" if asked_for else "")


COUNT = "Give the number of the following statements that are true: (1) x, (2) y."
GRID = "<image1>\nSelect the letter from the given grid that completes the pattern."


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("What is it?\nAnswer with the option's letter from the given choices directly.", "What is it?"),
        ("How? Please answer the question directly with a single word or phrase.", "How?"),
        ("Touching? Answer with Yes/No.", "Touching?"),
        ("How many? Answer with a number in curly brackets, e.g., {5}.", "How many?"),
        ("Count total squares. Answer with only the number in numerical format in curly brackets e.g. {3}.", "Count total squares."),
        ("How many paths go from B to D? Answer with a number in curly brackets e.g. {3}", "How many paths go from B to D?"),
        ("Which letter is it? Please provide your answer in curly brackets, e.g. {a}", "Which letter is it?"),
        ("Find x. Put your final answer within \\boxed{}.", "Find x."),
        ("Find x.\nLet's think step by step.", "Find x."),
        ("Hint: Please answer the question and provide the final value, e.g., 1, 2.5, at the end.\nHow many?", "How many?"),
        ("Do not generate any intermediate reasoning process. Who is it?", "Who is it?"),
        ("Which?\nThe best answer is:", "Which?"),
        ("Find x. According to the question shown in the image, please directly answer the question, e.g., 1, 2.5.", "Find x."),
        ("Find x. Based on the problem in the figure, please first conduct reasoning, and then answer the question at the end.", "Find x."),
        ("According to the question shown in the image, who won?",) * 2,
        ("求面积。请一步一步推理。", "求面积。"),
        ("Which?\nSelect the letter of the correct answer from the given choices.", "Which?"),
        ("Which? Provide the option letter from the following options (A, B, C or D) directly.", "Which?"),
        ("Which? Give the number of the correct option.", "Which?"),
        ("Which? Choose the correct answer from the choices below, e.g., A.", "Which?"),
        # What looks like a directive and is the question.
        (COUNT, COUNT),
        (GRID, GRID),
        ("It is so. Give the number of the following options that are true.",) * 2,
        ("Look. Answer with the number of cats in the picture.",) * 2,
        ("Look. Answer with the word that fills the gap.",) * 2,
        ("Look. Choose the correct answer from the given table of values.",) * 2,
        ("Select the correct option from the given choices: A. x B. y",) * 2,
        # Nothing would be left.
        ("Answer the question using a single word.",) * 2,
        ("<image1> Answer with Yes/No.",) * 2,
        ("Answer the question based on the chart: who won?", "Answer the question based on the chart: who won?"),
        ("Give the reasoning of the judge. What follows?", "Give the reasoning of the judge. What follows?"),
        ("Select the best title for the passage.", "Select the best title for the passage."),
        ("Find the area. Answer in square centimetres.", "Find the area. Answer in square centimetres."),
        ("Solve the problem. What is 2+2?", "Solve the problem. What is 2+2?"),
        ("What is the answer?", "What is the answer?"),
        ("Which step is not step-by-step?", "Which step is not step-by-step?"),
    ],
)  # fmt: skip
def test_directives_are_taken_out_and_questions_stay(text: str, left: str) -> None:
    assert strip_directives(text) == left
    assert strip_directives(left) == left


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=400))
def test_taking_directives_out_only_takes_away(text: str) -> None:
    left = strip_directives(text)
    kept = iter("".join(text.split()))
    assert all(char in kept for char in "".join(left.split()))


def test_directives_in_a_long_text_take_no_time() -> None:
    """Linear: a hostile row does not stall an evaluation (the test's own time limit is the bound)."""
    for text in ("please answer the question " * 4000, "a. " * 20_000, "Hint: please answer the question requiring " * 2000):
        strip_directives(text)


@pytest.mark.parametrize(
    ("given", "bare"),
    [
        (["A. one", "B. two"], ("one", "two")),
        (["(A) one", "(B) two"], ("one", "two")),
        (["A) one", "B: two"], ("one", "two")),
        (["A. one", "C. two"], ("A. one", "C. two")),
        (["A. Lincoln", "Washington"], ("A. Lincoln", "Washington")),
        ([" one ", "two"], ("one", "two")),
    ],
)
def test_options_lose_their_letters_where_all_have_theirs(given: list[str], bare: tuple[str, ...]) -> None:
    assert bare_options(given) == bare


def test_options_are_written_one_way() -> None:
    assert with_options("Which?", ("one", "two")) == "Which?\nA. one\nB. two"
    assert with_options("Which?", ("A", "B")) == "Which?"  # they stand in the picture


@pytest.mark.parametrize(
    ("text", "head", "options"),
    [
        ("Which?\nChoices:\nA:60\nB:70", "Which?", ("60", "70")),
        ("A. 3; B. 6; C. No correct answer", "", ("3", "6", "No correct answer")),
        ("Is it? choice: (A) Yes (B) No", "Is it?", ("Yes", "No")),
        ("Which? choice:(A) A (B) the same", "Which?", ("A", "the same")),
        ("Plan A: go. Plan B: stay.", "Plan A: go. Plan B: stay.", ()),
        ("Which?\nA: 1\nC: 2", "Which?\nA: 1\nC: 2", ()),
    ],
)
def test_options_inside_a_text_are_found(text: str, head: str, options: tuple[str, ...]) -> None:
    assert split_options(text) == (head, options)


@pytest.mark.parametrize(
    ("text", "letters", "options"),
    [
        ("A. ①; B．②; C．③; D. No correct answer", "ABCD", ("①", "②", "③", "No correct answer")),
        ("A. ①; ③;B. ②; ③;C. ④", "ABC", ("①; ③", "②; ③", "④")),
        ("A. 45° B. 60° ;C. 120°; D. none", "ABCD", ("45°", "60°", "120°", "none")),
        ("A. North to ;C.  ;B. West to ;C.  ;C. West to B ;D. none", "ABCD", ("North to C.", "West to C.", "West to B", "none")),
        ("A. Around ;O.;B. Around ;P.;C. No.; F. none", "ABCF", ("Around O.", "Around P.", "No.", "none")),
        ("B. 1; A. 2", "", ()), ("A. 1", "", ()), ("three or six", "", ()),
    ],
)  # fmt: skip
def test_a_list_of_options_is_read_as_real_ones_are_written(text: str, letters: str, options: tuple[str, ...]) -> None:
    """We-Math: full-width stops, a missing `;`, a `;` inside a text, a letter left out."""
    assert listed_options(text) == (letters, options)


def test_a_letter_that_was_left_out_moves_the_right_answer() -> None:
    row = rows(find("WeMath"))[0]
    (item,) = find("WeMath").adapter(DatasetRow("WeMath", 1, {**row.data, "option": "A. 3; B. 6; F. none", "answer": "F"}))
    assert (item.gold, item.options) == ("C", ("3", "6", "none")) and item.messages[0].content.endswith("\nC. none")
    (item,) = find("WeMath").adapter(DatasetRow("WeMath", 1, {**row.data, "option": "A. ①; B．②", "answer": "B．②"}))
    assert item.gold == "B"


@pytest.mark.parametrize(
    ("gold", "letters"),
    [("B", "B"), ("(C)", "C"), ("C\nD", "C, D"), ("A and C", "A, C"), ("A, (B)", "A, B"), ("False", "B"), ("090^\\circ T", "A"), ("7", "7"),
     ("AB", "AB"), ("", "")],
)  # fmt: skip
def test_a_right_answer_may_be_several_letters_or_the_text_of_an_option(gold: str, letters: str) -> None:
    """MathVerse: six of its multi-choice problems."""
    assert option_letters(gold, ("090^\\circ T", "False", "True", "x")) == letters


def test_the_version_in_the_picture_is_asked_without_words_and_judged_with_them() -> None:
    only = [item for item in items(find("MVerse")) if item.facts["version"] == "Vision Only"]
    assert {asked(item).strip() for item in only} == {f"{IMAGE}\nAnswer the question that is shown in the image."}
    assert [item.facts["shown"].split()[0] for item in only] == ["As", "True", "Find"]
    assert only[1].options == ("False", "True") and only[1].gold == "A"


def test_subtitles_are_what_is_said() -> None:
    srt = "\ufeff1\n00:00:01,000 --> 00:00:02,000\n<b>Hello</b>\nHello\n\n2\n00:00:03,000 --> 00:00:04,000\nBye\n"
    assert subtitle_text(srt) == "Hello\nBye"


def test_an_image_that_is_only_talked_about_is_no_image() -> None:
    row = DatasetRow("HLE", 1, {})
    assert ask_about(row, "What does <image> do in SVG?")[0].content == "What does <image> do in SVG?"
    with pytest.raises(DataError, match=r"^HLE, row 1, field 'question': has 2 marks"):
        ask_about(row, "<image> and <image>", 1)


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("AI2D", {"options": None}, r"AI2D, row 1, field 'options': missing or empty \(fields of the row: question"),
    ("AI2D", {"answer": "7"}, "field 'answer': is option 7"),
    ("AI2D", {"options": ["only one"]}, "field 'options': has 1 options"),
    ("AI2D", {"image": "../secret.png"}, "leads out of the folder"),
    ("AI2D", {"image": "/etc/secret.png"}, "leads out of the folder"),
    ("AI2D", {"image": "hello world"}, "neither the path of a picture nor base64"),
    ("AI2D", {"question": {"a": 1}}, "field 'question': is an object; a text is expected"),
    ("BabyV", {"ansType": "essay"}, "one of choice, blank is expected"),
    ("CharXiv", {"descriptive_q2": 20}, "field 'descriptive_q2': is 20; one of the questions 1 to 19"),
    ("CharXiv", {"reasoning_a_type": 5}, "field 'reasoning_a_type': is 5; 1 to 4 is expected"),
    ("MMVU", {"answer": "F"}, "the letter of one of the 5 options"),
    ("DynaM", {"_split": "", "id": "3"}, "field 'variant': missing"),
    ("MVista", {"question_type": "multi_choice", "choices": ["1", "2"]}, "is none of the choices"),
    ("MVista", {"precision": "one"}, "field 'precision': is 'one'; a whole number"),
    ("MVision", {"options": ["a", "b"], "answer": "F"}, "the letter of one of the 2 options"),
    ("MMMUPro", {"image_2": None}, "field 'image_2': missing"),
    ("WeMath", {"option": "three or six"}, "no options A, B, ... can be made out"),
    ("MultiCh", {"conversation": [{"role": "user"}]}, "holds a turn"),
    ("MultiCh", {"conversation": {"role": ["user"], "content": []}}, "an object of lists of one length, is expected"),
    ("MultiCh", {"conversation": {"role": [], "content": []}}, "holds nothing"),
    ("MultiCh", {"pass_criteria": "MAYBE"}, "YES or NO is expected"),
    ("MultiCh", {"conversation": [{"role": "assistant", "content": "hi"}]}, "ends with a turn of the assistant"),
    ("MVBench", {"answer": "Slept."}, "is none of the candidates"),
    ("MVBench", {"start": 30.0}, "is not behind start"),
    ("MMVU", {"video": "https://huggingface.co/datasets/a/b/resolve/main/../../x.mp4"}, "leads out of the folder"),
    ("OCREN", {"bbox_list": [[1, 2]]}, "field 'bbox_list': holds something"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BROKEN, ids=[f"{n}-{'-'.join(c)}" for n, c, _ in BROKEN])
def test_what_is_wrong_is_said_with_benchmark_row_and_field(name: str, change: dict[str, Any], message: str) -> None:
    row = rows(find(name))[0]
    split = change.get("_split", row.split)
    with pytest.raises(DataError, match=message) as caught:
        find(name).adapter(DatasetRow(name, 1, {**row.data, **change}, row.config, split, row.folder))
    assert str(caught.value).startswith(f"{name}, row 1, field ")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.binary(max_size=8)
    | st.sampled_from(["A", "[1, 2]", "['a'", "<image>", "choice", "multiple-choice", "\0", "A. x; B. y", "nan", "-1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("bytes"), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@EACH
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_malformed_row_raises_nothing_but_a_data_error(benchmark: Benchmark, data: st.DataObject) -> None:
    """Some fields of a good row replaced by junk or taken away: an item, or an error that names the benchmark."""
    row = data.draw(st.sampled_from(rows(benchmark)))
    fields = data.draw(st.lists(st.sampled_from(sorted(row.data)), min_size=1, max_size=3, unique=True))
    broken = dict(row.data) | {field: data.draw(JUNK) for field in fields}
    if data.draw(st.booleans()):
        broken.pop(fields[0])
    try:
        result = benchmark.adapter(DatasetRow(benchmark.name, 1, broken, row.config, row.split, row.folder))
    except DataError as error:
        assert str(error).startswith(benchmark.name)
    else:
        assert all(isinstance(item, Item) for item in result)


# The registry.


def test_the_registry_has_the_31_of_the_paper_and_no_other() -> None:
    lines = [line.split(",") for line in PAPER.read_text(encoding="utf-8").splitlines()[1:]]
    paper = {(family, name) for _, _, family, name, _ in lines}
    assert {(b.family, b.name) for b in BENCHMARKS} == paper
    assert len(BENCHMARKS) == 31


@EACH
def test_a_row_of_the_registry_says_what_it_knows(benchmark: Benchmark) -> None:
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", benchmark.source.id)
    for source in (benchmark.source, *benchmark.also):
        assert source.splits and source.configs
        assert source.revision is None or re.fullmatch(r"[0-9a-f]{40}|video", source.revision)
    assert benchmark.differs.endswith(".") and benchmark.differs.count(". ") == 0  # one sentence
    assert benchmark.rows is None or benchmark.rows > 0
    fixture = [json.loads(line) for line in (GOLDEN.parent / f"{benchmark.name}.jsonl").read_text().splitlines()]
    for record in fixture:
        assert record.get("_config", benchmark.source.configs[0]) in benchmark.source.configs
        assert record.get("_split", benchmark.source.splits[0]) in benchmark.source.splits


def test_what_cards_have_settled_is_no_open_question() -> None:
    """Numbers of questions and licences as the cards of the sets have them; every other doubt stands with its row."""
    settled = {
        "DynaM": (501 * 10, "apache-2.0"), "AIME25": (30, "mit"), "AIME26": (30, "cc-by-nc-sa-4.0"), "BabyV": (388, "mit"),
        "VBlind": (8016, "mit"), "MMVU": (1000, "cc-by-sa-4.0"), "OCREN": (7400, "mit"), "OCRZH": (2600, "mit"),
    }  # fmt: skip
    assert {name: (find(name).rows, find(name).licence) for name in settled} == settled
    assert not any(find(name).unverified for name in ("AIME25", "AIME26", "BabyV"))
    assert not any("column" in b.unverified or "field" in b.unverified for b in BENCHMARKS if b.name != "IMO-AB")
    assert [s.splits[0] for s in (find("VisP").source, *find("VisP").also)] == ["train", "test"]


def test_five_benchmarks_have_a_judge_of_their_own() -> None:
    """method.md section 10."""
    own = {b.name for b in BENCHMARKS if b.judge != "judge"}
    assert own == {"MM-Vet", "MultiCh", "MMVU", "HLE", "CharXiv"}


def test_the_docs_have_every_benchmark_as_the_registry_has_it() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert with_table(text) == text
    assert all(benchmark.differs in text and benchmark.unverified in text for benchmark in BENCHMARKS)


def test_suites() -> None:
    assert suite("paper") == BENCHMARKS
    assert [len(suite(family)) for family in ("vlm", "llm", "video")] == [16, 10, 5]
    assert [b.name for b in suite("mmlu, AI2D,mmlu")] == ["AI2D", "MMLU"]
    assert len(suite(["video", "HLE"])) == 6
    for wrong in ("MMLUU", ",", ""):
        with pytest.raises(SettingsError):
            suite(wrong)


def test_the_media_of_the_rows_can_be_drawn(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    for benchmark in BENCHMARKS:
        for item in items(benchmark, folder):
            for media in (*item.images, *item.frames):
                assert isinstance(media, bytes) or media.is_file()
