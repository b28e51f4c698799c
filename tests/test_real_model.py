"""The stories of `benchmarks.real_model` and the program that teaches them; with a tiny random model, all of its stages."""

from __future__ import annotations

import json
import random
import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from benchmarks import real_model, real_pictures, stories

from ports import hold_port
from zppo.grading.answer_form import answer_form_of
from zppo.teacher.compression import accept


def test_answers_are_exact() -> None:
    made = stories.make_stories(dict.fromkeys(stories.FAMILIES, 50), 3)
    assert len({story.text for story in made}) == len(made) == 50 * len(stories.FAMILIES)
    for story in made:
        first, second, *_ = [*map(int, re.findall(r"\d+", story.text)), stories.QUINT]
        expected = {"gets": first + second, "gives": first - second}.get(story.family, first * second)
        assert story.answer == expected
        assert story.solution.endswith(f"= {expected}.\nAnswer: {expected}")
        assert story.family != "quint" or len(re.findall(r"\d+", story.text)) == 1  # how many a quint has is not said


def test_held_out_stories_are_new() -> None:
    train = stories.make_stories(dict.fromkeys(stories.FAMILIES, 20), 1)
    assert not {s.text for s in train} & {s.text for s in stories.make_stories(dict.fromkeys(stories.FAMILIES, 20), 2, train)}


def test_the_teacher_is_wrong_as_often_as_it_says_and_never_by_chance_right() -> None:
    made, rng = stories.make_stories(dict.fromkeys(stories.FAMILIES, 100), 4), random.Random(0)
    solved = [(story, stories.solve(story, rng)) for story in made for _ in range(5)]
    wrong = [text for story, text in solved if text != story.solution]
    assert 0.17 < len(wrong) / len(solved) < 0.23
    assert all(not text.endswith(f"Answer: {story.answer}") for story, text in solved if text != story.solution)


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("Tom has 3*4=12 cards, so 12 * 2 = 24.\nAnswer: 24", "12 x 2 = 24.\nAnswer: 24"),
        ("8 + 5 = 14.\nAnswer: 14.", "8 + 5 = 14.\nAnswer: 14"),  # the mistake stays
        ("It is 24.\nAnswer: 24", ""),  # without an equation it would stand out
        ("3 x 4 = 12.\nAnswer: 13", ""),
        ("3 x 4 = 12.", ""),
    ],
)
def test_candidates_are_shown_in_one_style(response: str, shown: str) -> None:
    assert stories.shorten(response) == shown
    kept = accept(f"<summary>\n{shown}\n</summary>", shown[-2:] or "24", lambda text: text, form=answer_form_of("line"))
    assert kept == (shown or None)


def test_right_and_wrong_solutions_have_one_style() -> None:
    rng = random.Random(1)
    for story in stories.make_stories(dict.fromkeys(stories.FAMILIES, 30), 5):
        for text in (story.solution, stories.slip(story, rng)):
            assert stories.shorten(text) == text
            assert re.fullmatch(r"\d+ [-+x] \d+ = -?\d+\.\nAnswer: -?\d+", text)


def ask(url: str, said: str, **fields: Any) -> list[str]:
    body = json.dumps({"model": stories.TEACHER, "messages": [{"role": "user", "content": said}], **fields}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body), timeout=10) as reply:
        return [choice["message"]["content"] for choice in json.load(reply)["choices"]]


def test_the_teacher_speaks_the_protocol() -> None:
    made = stories.make_stories(dict.fromkeys(stories.FAMILIES, 2), 6)
    with stories.StoryTeacher(made) as teacher:
        with urllib.request.urlopen(f"{teacher.url}/models", timeout=10) as reply:
            assert json.load(reply)["data"][0]["id"] == stories.TEACHER
        said = f"{made[0].text}\n\nWork it out."
        texts = ask(teacher.url, said, n=20, seed=1)
        assert made[0].solution in texts and texts == ask(teacher.url, said, n=20, seed=1) != ask(teacher.url, said, n=20, seed=2)
        assert ask(teacher.url, "Shorten.\n<response>\n1 + 1 = 3.\nAnswer: 3\n</response>") == [
            "<summary>\n1 + 1 = 3.\nAnswer: 3\n</summary>"
        ]
        assert ask(teacher.url, "Say ok.") == ["ok"]


def test_the_table_tells_teachers_and_numbers_of_steps_apart() -> None:
    study = real_model.read(real_model.RESULTS / "real-model.jsonl")
    base = next(row for row in reversed(study) if row["what"] == "base")
    run = next(row for row in study if row["what"] == "run" and row["teacher"] == "program")
    longer = {**run, "steps": 72, "held_out": dict.fromkeys(stories.FAMILIES, [3, 4])}
    found = real_model.table([base, run, longer, {**longer, "teacher": "model"}])
    assert re.findall("Teacher: .*", found) == ["Teacher: program; 24 steps", "Teacher: program; 72 steps", "Teacher: model; 72 steps"]
    assert found.count("| before |") == 3 and found.count(f"| {run['method']} | 1 | 0.75 ") == 2
    assert "paired over seeds" not in found  # there is one method


@pytest.mark.long
def test_every_stage_with_a_tiny_random_model(
    tiny_qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_model, "TRAIN", dict.fromkeys(stories.FAMILIES, 3))
    monkeypatch.setattr(real_model, "HELD_OUT", dict.fromkeys(stories.FAMILIES, 2))
    shutil.copytree(tiny_qwen3_dir, tmp_path / "student")
    small = ["--train.steps=1", "--train.precision=fp32", "--rollout.max_new_tokens=4", "--rollout.group_size=2", "--eval.max_new_tokens=4"]
    small += ["--data.max_prompt_tokens=8192"]
    results, port = tmp_path / "rows.jsonl", hold_port()

    def stage(name: str, *more: str) -> None:
        assert real_model.main([str(tmp_path), name, f"--results={results}", f"--port={port}", *more]) == 0

    stage("prepare")
    stage("probe", "--samples=6", *small)
    stage("teach")
    runs = ["--methods=zppo", "--seeds=0", *small]
    stage("runs", *runs)
    stage("evaluate", *small)
    shutil.rmtree(tmp_path / "runs")
    stage("runs", *runs)  # it has its row
    assert not (tmp_path / "runs").exists()
    stage("runs", "--teacher=model", *runs)
    stage("evaluate", *small)
    first, taught, by_program, by_model = real_model.read(results)
    assert taught["what"] == "teacher" and taught["held_out"]["quint"] == [0, 2] and taught["sampled"]["quint"][2] == 3
    assert first["quint by sampling"] == [0, 6] and first["held_out"]["gets"][1] == 2
    assert (by_program["teacher"], by_model["teacher"]) == ("program", "model")
    assert by_program["admitted"] and by_program["student_tokens"] > 0 and by_program["processor_seconds"] > 0
    stage("table")
    assert "| zppo | 1 | 0.00 [0.00, 0.66] |" in capsys.readouterr().out
    assert real_pictures.main([str(results), str(tmp_path / "pictures")]) == 0
    assert {path.name for path in (tmp_path / "pictures").glob("*.svg")} == {"accuracy.svg", "prompts.svg"}
