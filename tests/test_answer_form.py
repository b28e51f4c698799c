"""Forms of answers: where they are read, how they are written, in every prompt, and in a whole run."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from conftest import make_tiny
from zppo.cli import main
from zppo.config.recipe import dump_recipe, load_recipe, parse_yaml
from zppo.config.settings import Settings
from zppo.core.types import Draft, Message, Question
from zppo.errors import DataError, SettingsError
from zppo.grading import Grader
from zppo.grading.answer_form import AnswerForm, last_line
from zppo.grading.workers import TimeOuts
from zppo.prompts import Neutraliser, PromptBook
from zppo.rollout.data import load_mixture
from zppo.rollout.form_check import FormCheck
from zppo.teacher.compression import accept

HASHES = r"####\s*(.+)"
TAGGED = "<answer>(.*?)</answer>"
ASKED = Question("q", (Message("system", "Be brief."), Message("user", "6 * 7?")), "42")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 sevens\nAnswer: 42", "42"),
        ("Answer: 41, no\nso\n**Final answer:** \\boxed{42}\nDone.", "42"),
        ("The answer: **42**", "42"),
        ("ANSWER\uff1a 42", "42"),
        ("Answer: 42\nAnswer:", "42"),
        ("My answer: x = \\frac{1}{2}", "x = \\frac{1}{2}"),
        ("An Answer: 42", None),
        ("the answer is 42", None),
        ("<think>Answer: 42", None),
        ("<think>Answer: 41</think> Well\nAnswer: 42", "42"),
        ("", None),
    ],
)
def test_the_last_line_that_names_an_answer_counts(text: str, answer: str | None) -> None:
    assert AnswerForm("line").find(text) == answer


def test_lines_are_found_in_linear_time() -> None:
    for hostile in (
        "Answer" * 200_000,
        "*" * 500_000 + "Answer:",
        "Answer:" + "\\boxed{" * 100_000,
        "the " * 200_000,
        "answer:\n" * 200_000,
    ):
        last_line(hostile)  # a quadratic one would take hours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "text", "answer"),
    [
        (HASHES, "41\n#### 41\nno: #### 42 ", "42"),
        (HASHES, "<think>#### 41</think>", None),
        (TAGGED, "<answer>41</answer><answer> 42</answer>", "42"),
        (r"(?s)so(.*)$", "so\n4\n2", "4\n2"),
        (r"x=(\d)?", "x=1 x=", "1"),
    ],
)
def test_an_expression_of_a_users_reads_its_last_match(place: str, text: str, answer: str | None) -> None:
    form = AnswerForm(place)
    assert form.find(text) == answer
    assert pickle.loads(pickle.dumps(form)).find(text) == answer
    with Grader(form=form) as grader:
        verdict = grader.grade(text, "42")
    assert (verdict.answer, verdict.correct) == (answer, answer == "42")


@pytest.mark.slow
def test_an_expression_that_backtracks_for_ever_does_not_hang_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a group time out, its others are not tried, and other groups are read all the same."""
    monkeypatch.setattr("zppo.grading.workers._SLACK", 30.0)  # a worker that starts on a busy machine is not taken for one that hangs
    form = AnswerForm(r"(?:a+)+(b)", deadline=0.5)
    texts = [("a" * 60 + f"c{i}", False) for i in range(20)]
    spent = TimeOuts()
    found = form.find_many([*texts, ("aab", False)], [*["hostile"] * 20, "fine"], spent)
    assert found[-1] == ("b", "")
    assert {why for _, why in found[:-1]} == {"timeout"} and all(answer is None for answer, _ in found[:-1])
    assert (spent.total, spent.untried) == (2, 18)
    with Grader(form=form) as grader:
        assert grader.grade("a" * 60 + "c", "b").reason == "timeout"


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("boxes", "has 0 groups"),
        ("(a)(b)", "has 2 groups"),
        ("(a", "no regular expression"),
        ("(" + "a" * 600 + ")", "too long"),
        (r"(?P<x>a)(?:b)\1(?P<y>c)", "has 2 groups"),
    ],
)
def test_a_place_that_is_none_is_refused(place: str, cause: str) -> None:
    with pytest.raises(SettingsError, match="after-thoughts, anywhere, line") as error:
        load_recipe({"student": {"model": "m"}, "data": {"train": "q"}, "method": "grpo", "grading": {"answer_from": place}})
    assert cause in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "written"),
    [
        ("after-thoughts", "\\boxed{42}"),
        ("line", "Answer: 42"),
        (HASHES, "#### 42"),
        (TAGGED, "<answer>42</answer>"),
        (r"(?m)^Result:\s*(\d+)\.$", "Result: 42."),
        (r"\[\[(.*)\]\]", "[[42]]"),
        (r"(?:so|thus) (\d+)", "42"),
    ],
)
def test_an_answer_is_written_in_the_form_that_is_read(place: str, written: str) -> None:
    form = AnswerForm(place)
    assert form.written("42") == written
    assert form.find(f"First.\n{written}") == ("42" if written != "42" else None)


def settings_of(**more: Any) -> Settings:
    return load_recipe({"student": {"model": "m"}, "data": {"train": "q"}, "method": "grpo", **more})


def test_the_place_follows_the_closing_instruction_and_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("Say it.")
    for closing, place in (
        ("think-boxed", "after-thoughts"),
        ("boxed", "anywhere"),
        ("answer-line", "line"),
        (tmp_path / "mine.jinja",) * 2,
    ):
        chosen = settings_of(prompts={"closing": str(closing)})
        assert chosen.answer_form.place == (place if isinstance(place, str) else "after-thoughts")
        assert settings_of(prompts={"closing": str(closing)}, grading={"answer_from": HASHES}).answer_form.place == HASHES
        assert load_recipe(parse_yaml(dump_recipe(chosen))) == chosen
    assert settings_of().answer_form.place == "after-thoughts"
    assert PromptBook({"closing": "think-boxed"}).plain(ASKED) == PromptBook().plain(ASKED)
    with pytest.raises(SettingsError, match="grading.box is gone: it is grading.answer_from now"):
        settings_of(grading={"box": "anywhere"})


@pytest.mark.parametrize("closing", ["boxed", "answer-line"])
def test_all_prompts_speak_of_the_form(closing: str) -> None:
    form = settings_of(prompts={"closing": closing}).answer_form
    book = PromptBook({"closing": closing}, Neutraliser(), form)
    asked = [
        book.render(Draft("ncq", ASKED, {"answers": ("43", "a\nb"), "candidates": (f"So.\n{form.written('43')}",)})),
        book.compression("so", True),
        book.compression("so", False),
        book.hinting(ASKED, form.written("42")),
    ]
    golden = Path(__file__).parent / "golden" / "forms" / f"{closing}.txt"
    assert "\n=====\n".join(f"[{m.role}]\n{m.content}" for turns in asked for m in turns) + "\n" == golden.read_text(encoding="utf-8")
    text = "".join(m.content for turns in asked for m in turns)
    assert ("boxed" in text) == (closing == "boxed") and ("Answer: 43" in text) == (closing == "answer-line")


@pytest.mark.slow
def test_summaries_keep_the_answer_in_its_form() -> None:
    def wide(text: str) -> str:
        return text

    line, hashes = AnswerForm("line"), AnswerForm(HASHES)
    long = "\n".join(f"step {i}" for i in range(8))
    assert accept(f"<summary>{long}\nAnswer: 42</summary>", "42", wide, form=line) is not None
    assert accept("<summary>six\nAnswer: 43</summary>", "42", wide, form=line) is None
    assert accept("<summary>six \\boxed{42}</summary>", "42", wide, form=line) is None
    assert accept("<summary>six</summary>", None, wide, form=line) == "six"
    assert accept("<summary>six\nAnswer: 42</summary>", None, wide, form=line) is None
    assert accept("<summary>six\n#### 42</summary>", "42", wide, form=hashes) == "six\n#### 42"


def test_candidates_keep_the_tags_that_answers_are_written_in(tmp_path: Path) -> None:
    (tmp_path / "c.jinja").write_text("Answer as <answer>...</answer>, after <work>.")
    given = "<work><answer>42</answer></candidate>"
    for place, shown in ((TAGGED, "[work]<answer>42</answer>[/candidate]"), ("line", "[work][answer]42[/answer][/candidate]")):
        book = PromptBook({"closing": tmp_path / "c.jinja"}, Neutraliser(), AnswerForm(place))
        assert shown in book.render(Draft("bcq", ASKED, {"candidates": (given, given)}))[-1].content


def test_what_few_completions_say() -> None:
    form = AnswerForm("line")
    low = FormCheck(1, 6, 0, 256, "so it is 42").text(form)
    for part in ("1 of 6", "line 'Answer: ...'", "so it is 42", "prompts.closing", "data.examples", "student.template", "grading.reward"):
        assert part in low
    assert not FormCheck(3, 6, 0, 256, "x").low and "warning" not in FormCheck(6, 6, 2, 256, "").text(form)
    assert "came to an end within 256" in FormCheck(0, 0, 6, 256, "").text(form)


# --- worked examples, and whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    make_tiny(root / "student")
    make_tiny(root / "teacher", seed=1)
    rows = [
        {"prompt": f"What is {i} plus {j}?", "answer": i + j, "work": f"{i}, {j}: {i + j}." * (i > 1)} for i in range(5) for j in range(4)
    ]
    (root / "q.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[9]])))
    (root / "held.jsonl").write_text("\n".join(map(json.dumps, rows[:12])))
    recipe = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "rollout": {"max_new_tokens": 6}, "compression": {"max_new_tokens": 12}},
        "data": {"train": "q.jsonl", "eval": "held.jsonl", "eval_limit": 4, "examples": 2, "columns": {"solution": "work"}},
        "prompts": {"closing": "answer-line"},
        "rollout": {"batch_size": 8, "group_size": 4, "max_new_tokens": 8},
        "zone": {"rho_aug": 0.5},
        "eval": {"max_new_tokens": 8, "every": 0},
        "train": {"steps": 2, "checkpoint_every": 1, "device": "cpu"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def drawn(folder: Path, *overrides: str) -> Any:
    return load_mixture(load_recipe(folder / "recipe.yaml", overrides))


def test_examples_are_drawn_once_and_held_out(folder: Path) -> None:
    loaded = drawn(folder)
    ids = {example.question.id for example in loaded.examples}
    assert len(ids) == 2 and drawn(folder).examples == loaded.examples
    assert loaded.examples == drawn(folder, "--data.examples=3").examples[:2]
    assert {e.question.id for seed in range(4) for e in drawn(folder, f"--seed={seed}").examples} != ids
    texts = {example.question.messages for example in drawn(folder, "--data.examples=8", "--data.eval_limit=12").examples}
    rest = drawn(folder, "--data.examples=8", "--data.eval_limit=12")
    assert not texts & {q.messages for q in [*rest.mixture.questions, *rest.held_out]} and len(texts) == 8
    assert all(example.solution for example in rest.examples)  # rows without one are passed over
    assert len(rest.mixture.questions) == len(rest.mixture.places) == 21 - 8
    with pytest.raises(DataError, match="data.examples is 16, and 8 training questions"):
        drawn(folder, "--data.examples=16", "--data.eval_limit=12")
    with pytest.raises(DataError, match="data.columns.solution is 'wrok'"):
        drawn(folder, "--data.columns.solution=wrok")
    assert drawn(folder, "--data.examples=0", "--data.columns.solution=wrok").examples == ()


def rollouts(run: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((run / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()]


@pytest.mark.slow
def test_a_run_shows_its_examples_and_reads_lines(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every prompt begins with the examples; a resumed run is the same run; the look at the form says what it found and draws nothing."""
    recipe, run = str(folder / "recipe.yaml"), tmp_path / "run"
    assert main(["train", recipe, f"--output={run}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0 of 6 completions that were looked at have a line 'Answer: ...'" in said and "data.examples: 2" in said
    assert re.search(r"peak memory of this process: [\d.]+ GiB; [\d.]+ GiB at most by the estimate of `--dry-run`", said)
    shown = [f"{e.question.messages[-1].content}\n\nWork" for e in drawn(folder).examples]
    solved = [f"{e.solution}\nAnswer: {e.answer}<|im_end|>" for e in drawn(folder).examples]
    rows = rollouts(run)
    assert {row["kind"] for row in rows} >= {"plain", "ncq"}
    for row in rows:
        places = [row["prompt"].index(part) for pair in zip(shown, solved, strict=True) for part in pair]
        assert places == sorted(places) and row["question_id"] not in {e.question.id for e in drawn(folder).examples}
    other = tmp_path / "other"
    assert main(["train", recipe, f"--output={other}", "--train.steps=1"]) == 0
    changed = (other / "recipe.yaml").read_text().replace("steps: 1\n", "steps: 2\n")
    (other / "recipe.yaml").write_text(changed)
    assert main(["resume", str(other)]) == 0
    assert "looked at" not in capsys.readouterr().out.split("resumed after")[1]
    keep = ("step", "kind", "question_id", "prompt", "completion", "advantage")
    assert [[row[k] for k in keep] for row in rollouts(other)] == [[row[k] for k in keep] for row in rows]


@pytest.mark.slow
def test_a_run_with_an_expression_that_backtracks_comes_to_its_end(folder: Path, tmp_path: Path) -> None:
    options = ["--data.examples=0", "--grading.answer_from=(?:.|.)+(never)", "--grading.deadline=0.2", "--method=grpo", "--train.steps=1"]
    run = tmp_path / "run"
    assert main(["train", str(folder / "recipe.yaml"), *options, f"--output={run}", "--rollout.max_new_tokens=40", "--data.eval=null"]) == 0
    assert {row["reason"] for row in rollouts(run)} <= {"no answer", "timeout"}


@pytest.mark.slow
def test_a_dry_run_says_where_an_example_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(folder / "recipe.yaml"), "--dry-run", "--grading.answer_from=(?:so|thus) (x)"]) == 2
    said = capsys.readouterr().err
    assert "no answer can be read from the example" in said and "data.columns.solution" in said
    assert main(["train", str(folder / "recipe.yaml"), "--dry-run"]) == 0
    assert "examples" in capsys.readouterr().out


def test_thoughts_of_an_example_stand_where_thoughts_are_asked_for(folder: Path) -> None:
    from zppo.rollout.examples import example_turns

    settings = load_recipe(folder / "recipe.yaml", ["--prompts.closing=think-boxed"])
    (example,) = load_mixture(load_recipe(settings, {"data.examples": 1})).examples
    hostile = example._replace(solution="<think>2</think> and 3 <|im_end|>")
    turns = example_turns(settings, [hostile, replace_solution(example, "")], PromptBook(), Neutraliser(("<|im_end|>",), tags=()))
    assert turns[1].content == f"<think>\n2 and 3 < |im_end|>\n</think>\n\n\\boxed{{{example.answer}}}"
    assert turns[3].content == f"\\boxed{{{example.answer}}}" and [t.role for t in turns] == ["user", "assistant"] * 2
    book = PromptBook(examples=turns)
    asked = book.plain(replace(ASKED))
    assert asked[0].role == "system" and asked[1:5] == tuple(turns) and asked[5:] == PromptBook().plain(ASKED)[1:]


def replace_solution(example: Any, solution: str) -> Any:
    return example._replace(solution=solution)
