"""The measurement before training: what is asked and kept, what is written, and what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from zppo.cli import main
from zppo.config.data_settings import ColumnSettings
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.types import Message, Question
from zppo.data.load import load_questions, read_part
from zppo.errors import LauncherError
from zppo.measure import ask
from zppo.measure.answers import AnswerFile, Answers
from zppo.measure.command import write_rows
from zppo.measure.verdict import Measured, bins, charts, counts, judge_data, tables, useful_filter
from zppo.rollout.data import load_data
from zppo.runs.log import ROLLOUT_SCHEMA
from zppo.teacher.interface import TeacherReply, TeacherRequest
from zppo.teacher.local import LocalTeacher

STUDENT = ("student_accuracy", "no_answer_share", "truncated_share", "mean_tokens")
TEACHER = ("teacher_accuracy", "teacher_no_answer_share", "teacher_mean_tokens")


def measure(*arguments: str, status: int = 0, recipe: str = "lab") -> None:
    assert main(["data", "measure", recipe, *arguments]) == status


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what is asked, kept and written --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_measured_questions_are_a_source_with_accuracies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to a run that trains on what was measured."""
    out = tmp_path / "measured.jsonl"
    measure("--n=4", "--sample=12", "--teacher", f"--out={out}")
    printed = capsys.readouterr().out
    rows = rows_of(out)
    assert len(rows) == 12
    for row in rows:
        assert {*STUDENT, *TEACHER, "id", "prompt", "answer", "level"} == set(row)
        assert 4 * row["student_accuracy"] in range(5) and 4 * row["teacher_accuracy"] in range(5)
        assert row["mean_tokens"] > 0 and 0 <= row["truncated_share"] <= 1
    everything = {q.id: q for q in load_questions("lab:unreachable/train", ColumnSettings())}
    assert load_questions(str(out), ColumnSettings()) == [everything[row["id"]] for row in rows]
    assert re.search(r"^0 of 4 ", printed, re.M) and re.search(r"^4 of 4 ", printed, re.M) and "Verdict: " in printed
    facts = json.loads((tmp_path / "measured-measure.json").read_text())
    assert facts["student"]["accuracy"] == pytest.approx(sum(row["student_accuracy"] for row in rows) / 12)
    assert facts["teacher"]["accuracy"] == pytest.approx(sum(row["teacher_accuracy"] for row in rows) / 12)
    assert facts["questions"] == 12 and facts["words"][-1] in " ".join(printed.split())
    kept = pq.read_table(tmp_path / "measured-completions.parquet")
    assert kept.schema.equals(ROLLOUT_SCHEMA)
    given = {(row["id"], kind): [r for r in kept.to_pylist() if (r["question_id"], r["kind"]) == (row["id"], kind)]
             for row in rows for kind in ("plain", "teacher")}  # fmt: skip
    assert kept.num_rows == sum(map(len, given.values())) == 2 * 4 * 12
    for row in rows:
        mine, theirs = given[row["id"], "plain"], given[row["id"], "teacher"]
        assert [r["rollout"] for r in mine] == [0, 1, 2, 3] and all(row["prompt"] in r["prompt"] for r in (*mine, *theirs))
        assert (
            sum(r["correct"] for r in mine) == 4 * row["student_accuracy"]
            and sum(r["correct"] for r in theirs) == 4 * row["teacher_accuracy"]
        )
        assert sum(r["completion_tokens"] for r in mine) == 4 * row["mean_tokens"] and all(r["completion"] for r in theirs)
    assert main(["inspect", str(tmp_path / "measured-completions.parquet"), rows[0]["id"]]) == 0
    told = capsys.readouterr().out
    assert (
        "measured: plain" in told
        and "measured: teacher" in told
        and all(r["completion"][:20] in told for r in given[rows[0]["id"], "plain"])
    )
    assert main(["inspect", str(tmp_path / "measured-completions.parquet"), "none"]) == 2
    assert main(["inspect", str(out), "none"]) == 2
    assert "holds no rollouts" in capsys.readouterr().err
    page = (tmp_path / "measured.html").read_text(encoding="utf-8")
    assert facts["words"][-1] in page and "Teacher on hard questions" in page
    hard = [row["id"] for row in rows if row["student_accuracy"] < 0.9]
    assert 0 < len(hard) < 12  # the lab has easy questions and hard ones
    settings = load_recipe("lab", [f"--data.train={out}", "--data.filters=student_accuracy < 0.9"])
    assert [q.id for q in load_data(settings)[0]] == hard
    small = ["--train.steps=1", "--rollout.batch_size=2", "--data.eval=null", "--data.filters=student_accuracy < 0.9"]
    assert main(["train", "lab", f"--data.train={out}", *small, f"--output={tmp_path / 'run'}"]) == 0


@pytest.mark.slow
def test_answers_do_not_hang_on_what_is_asked_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw is keyed by question and index: chunks, the size of the sample and a stop change nothing."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    measure("--n=3", "--sample=6", "--teacher", f"--out={one}")
    monkeypatch.setattr(ask, "AT_ONCE", 1)
    measure("--n=3", "--sample=4", "--teacher", f"--out={other}")
    assert rows_of(other) == [row for row in rows_of(one) if row["id"] in {row["id"] for row in rows_of(other)}]
    measure("--n=3", "--sample=6", "--teacher", f"--out={other}")
    assert other.read_bytes() == one.read_bytes()
    assert pq.read_table(tmp_path / "other-completions.parquet").equals(pq.read_table(tmp_path / "one-completions.parquet"))
    keys = [line["key"] for line in rows_of(tmp_path / "other-answers.jsonl")]
    assert len(keys) == len(set(keys)) == 12


@pytest.mark.slow
def test_what_was_answered_is_not_asked_again_under_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'm'}"

    def left(*more: str) -> list[str]:
        measure("--sample=5", out, *more)
        return re.findall(r"^(?:student|teacher): (\d+) of 5 questions to ask", capsys.readouterr().out, re.M)

    assert left("--n=2") == ["5"]
    assert left("--n=2") == ["0"]
    assert left("--n=2", "--teacher") == ["0", "5"]  # the student's answers hang on nothing of the teacher
    assert left("--n=2", "--teacher", "--train.steps=7", "--zone.threshold=0.9") == ["0", "0"]
    assert left("--n=3") == ["5"]
    assert left("--n=2", "--rollout.temperature=0.5") == ["5"]
    assert left("--n=2", "--seed=5") == ["5"]
    assert left("--n=2", "--teacher", "--teacher.rollout.temperature=0.5") == ["0", "5"]
    assert left("--n=2", "--student.model=lab:reachable/student") == ["5"]


def lab_measure(out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zppo", "data", "measure", "lab", "--n=2", "--rollout.batch_size=1", f"--out={out}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(path: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long), pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_measurement_that_is_ended_goes_on_and_ends_the_same(how: signal.Signals, tmp_path: Path) -> None:
    """The real process: killed in the middle, the last line torn, and the same command again."""
    out, whole = tmp_path / "ended.jsonl", tmp_path / "whole.jsonl"
    process = lab_measure(out)
    wait_for(tmp_path / "ended-answers.jsonl", 6, process)
    process.send_signal(how)
    said = process.communicate()[0].decode()
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how), said
    if how != signal.SIGKILL:
        assert "the same command goes on" in said and "Traceback" not in said
        assert "questions say so far:" in said
    assert not out.exists()
    kept = (tmp_path / "ended-answers.jsonl").read_bytes()
    assert 6 <= kept.count(b"\n") < 180
    (tmp_path / "ended-answers.jsonl").write_bytes(kept[:-20])
    measure("--n=2", "--rollout.batch_size=32", f"--out={out}")
    measure("--n=2", "--rollout.batch_size=32", f"--out={whole}")
    assert out.read_bytes() == whole.read_bytes() and len(rows_of(out)) == 180
    keys = [line["key"] for line in rows_of(tmp_path / "ended-answers.jsonl")]
    assert len(keys) == len(set(keys)) == 180


def test_several_sources_are_written_to_files_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [{"q": f"{name} {name}", "a": "x", "note": {"n": 1}} for name in ("amber", "maple")]
    (tmp_path / "first.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in first))
    train = f"[{{source: {tmp_path}/first.jsonl, columns: {{prompt: q, answer: a}}}}, {{source: lab:unreachable/train, cap: 4}}]"
    out = tmp_path / "m"
    measure("--n=2", f"--data.train={train}", f"--out={out}")
    assert "By source" in capsys.readouterr().out
    one, other = rows_of(out / "first.jsonl"), rows_of(out / "unreachable-train.jsonl")
    assert [(row["q"], row["note"], row["id"]) for row in one] == [
        ("amber amber", {"n": 1}, "first.jsonl:1"),
        ("maple maple", {"n": 1}, "first.jsonl:2"),
    ]
    assert len(other) == 4 and all("student_accuracy" in row for row in [*one, *other])


@pytest.mark.slow
def test_images_stay_references(tmp_path: Path) -> None:
    out = tmp_path / "seen.jsonl"
    measure("--n=2", "--sample=2", f"--out={out}", recipe="lab-vision")
    for row in rows_of(out):
        assert all(Path(image).is_file() and os.path.isabs(image) for image in row["images"])
        assert len(json.dumps(row)) < 2000 and 0 <= row["student_accuracy"] <= 1
    part = load_recipe("lab-vision", [f"--data.train={out}"]).data.parts[0]
    everything = {q.id: q for q in load_questions("lab:vision/train", ColumnSettings())}
    assert read_part(part).questions == [everything[row["id"]] for row in rows_of(out)]


def test_rows_as_parquet_and_what_json_has_no_form_for(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1, "raw": b"\x00\xff"}, {"prompt": "b", "answer": 2, "student_accuracy": 0.5}]
    write_rows(tmp_path / "a.parquet", rows)
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == [
        {"prompt": "a", "answer": 1, "raw": b"\x00\xff", "student_accuracy": None},
        {"prompt": "b", "answer": 2, "raw": None, "student_accuracy": 0.5},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    assert rows_of(tmp_path / "a.jsonl")[0]["raw"] == "AP8="
    assert not list(tmp_path.glob("*.partial"))


def test_parquet_from_the_command_line(tmp_path: Path) -> None:
    measure("--n=2", "--sample=3", "--train.sharding=fsdp2", f"--out={tmp_path / 'm.parquet'}")
    assert len(load_questions(str(tmp_path / "m.parquet"), ColumnSettings())) == 3
    assert "student_accuracy" in pq.read_schema(tmp_path / "m.parquet").names


def test_a_teacher_that_cannot_be_reached_leaves_questions_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it did not answer is no wrong answer, and is asked again."""
    real = LocalTeacher.complete

    def broken(self: LocalTeacher, requests: Sequence[TeacherRequest], *more: Any) -> list[TeacherReply]:
        replies = real(self, requests, *more)
        return [TeacherReply((None, *r.texts[1:]), error="no route") if i % 2 else r for i, r in enumerate(replies)]

    out = tmp_path / "m.jsonl"
    monkeypatch.setattr(LocalTeacher, "complete", broken)
    measure("--n=2", "--sample=6", "--teacher", f"--out={out}")
    assert "3 times a question stayed open" in capsys.readouterr().out
    assert [row.get("teacher_accuracy") is None for row in rows_of(out)] == [False, True] * 3
    monkeypatch.setattr(LocalTeacher, "complete", real)
    measure("--n=2", "--sample=6", "--teacher", f"--out={out}")
    printed = capsys.readouterr().out
    assert "teacher: 3 of 6 questions to ask" in printed and "stayed open" not in printed
    assert all(row["teacher_accuracy"] is not None for row in rows_of(out))


def test_a_teacher_that_answers_nothing_ends_the_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def dead(self: LocalTeacher, requests: Sequence[TeacherRequest], *more: Any) -> list[TeacherReply]:
        asked.append(len(requests))
        return [TeacherReply((None,) * len(request.keys), error="no route") for request in requests]

    monkeypatch.setattr(LocalTeacher, "complete", dead)
    monkeypatch.setattr(ask, "AT_ONCE", 2)
    measure("--n=2", "--sample=6", "--teacher", f"--out={tmp_path / 'm.jsonl'}")
    printed = capsys.readouterr().out
    assert asked == [2] and "cannot be had any more: no route" in printed and "6 times a question stayed open" in printed
    assert len(rows_of(tmp_path / "m.jsonl")) == 6  # the student's answers are there


def test_how_far_it_is_and_how_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ask, "EVERY", 0)
    monkeypatch.setattr(ask, "AT_ONCE", 2)
    measure("--n=2", "--sample=6", "--teacher", f"--out={tmp_path / 'm'}")
    printed = capsys.readouterr().out
    for who in ("student", "teacher"):
        done = [int(n) for n in re.findall(rf"^asking the {who}: (\d+) of 12 answers, about \d+ min left$", printed, re.M)]
        assert done == sorted(done) and {4, 8, 12} <= set(done)


@pytest.mark.slow
def test_only_models_that_are_needed_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"--out={tmp_path / 'm'}"
    measure("--n=2", "--sample=2", out)
    monkeypatch.setattr(ask, "load_student", lambda *a, **k: pytest.fail("the student was loaded"))
    measure("--n=2", "--sample=2", out)
    measure("--n=2", "--sample=2", "--teacher", out)
    monkeypatch.setattr(LocalTeacher, "load", lambda *a, **k: pytest.fail("the teacher was loaded"))
    measure("--n=2", "--sample=2", "--teacher", out)


@pytest.mark.slow
def test_both_are_asked_as_in_a_run_examples_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    def recorded(asked: Callable[..., Any], renderer_of: Callable[..., Any]) -> Callable[..., Any]:
        def ask_and_record(*given: Any) -> Any:
            *_, questions, _ = given
            shown.extend(len(renderer_of(given).book.plain(question)) for question in questions)
            return asked(*given)

        return ask_and_record

    monkeypatch.setattr(ask, "_ask_student", recorded(ask._ask_student, lambda given: given[0].renderer))
    monkeypatch.setattr(ask, "_ask_teacher", recorded(ask._ask_teacher, lambda given: given[2]))
    out = f"--out={tmp_path / 'm'}"
    measure("--n=2", "--sample=2", "--teacher", "--data.examples=2", "--data.max_prompt_tokens=64", out)
    assert shown == [5] * 4  # two questions with their answers, and the one that is asked: of the student and of the teacher
    measure("--n=2", "--sample=2", "--teacher", "--data.max_prompt_tokens=64", out)
    assert shown[4:] == [1] * 4  # other prompts: nothing of before is taken for an answer to these


def test_one_process_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from zppo.measure.command import measure as run

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(LauncherError, match="a measurement runs in one process"):
        run(load_recipe("lab"), "lab", n=2, sample=1, teacher=False, out=tmp_path / "m", console=Console(quiet=True))


def test_damaged_answers_are_asked_about_again(tmp_path: Path) -> None:
    settings = load_recipe("lab")
    questions = [Question(f"q{i}", (Message("user", f"{i}?"),), "1") for i in range(3)]
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, settings, 4)
    file.add("student", [(question, Answers(4, i, 0, 0, 10)) for i, question in enumerate(questions)])
    file.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00garbage\n" + lines[2][:-9])
    file = AnswerFile(path, settings, 4)
    assert [file.get("student", question) is None for question in questions] == [False, True, True]
    file.add("student", [(questions[2], Answers(4, 2, 0, 0, 10))])
    file.close()
    file = AnswerFile(path, settings, 4)
    assert file.get("student", questions[2]) == Answers(4, 2, 0, 0, 10) and file.get("teacher", questions[2]) is None
    changed = Question("q0", (Message("user", "another text?"),), "1")
    assert file.get("student", changed) is None


# --- what it says ---------------------------------------------------------------------------------------------------


def settings_of(**parts: Any) -> Settings:
    return load_recipe({"method": "grpo", "student": {"model": "s"}, "data": {"train": "x"}} | parts)


def of(student: Sequence[int], teacher: Sequence[int | None] = (), n: int = 8, none: int = 0, truncated: int = 0) -> list[Measured]:
    """Questions by right answers."""
    other = [*teacher, *[None] * (len(student) - len(teacher))]
    return [
        Measured("a", "", Answers(n, k, none, truncated, 10 * n), None if t is None else Answers(n, t, 0, None, 20 * n))
        for k, t in zip(student, other, strict=True)
    ]


@pytest.mark.parametrize(
    ("questions", "useful", "said"),
    [
        (of([4] * 60), 1.0, "Verdict: this data suits the student; there is something to learn from 100.0% of the questions."),
        (of([8] * 90 + [4] * 10), 0.1, "Verdict: this data does not suit the student: it is too easy"),
        (of([0] * 90 + [4] * 10), 0.1, "whether help reaches the 90.0% that are never right is open: measure with --teacher"),
        (of([0] * 90 + [4] * 10, [0] * 100), 0.1, "Verdict: this data does not suit student and teacher: it is too hard"),
        (of([0] * 90 + [4] * 10, [3] * 100), 1.0, "Verdict: this data suits student and teacher"),
        (of([8] * 70 + [4] * 30, [8] * 100), 0.3, "suits student and teacher in part; there is something to learn from 30.0%"),
        (of([0] * 60, [8] * 60), 1.0, "the student is never right, so that its plain groups have no gradient"),
        (of([0] * 60, [8] * 60, none=6), 1.0, "Verdict: open. Nothing could be read in 75.0% of the student's answers"),
    ],
)
def test_the_verdict_is_plain(questions: list[Measured], useful: float, said: str) -> None:
    verdict = judge_data(questions, settings_of(), 8)
    assert verdict.useful == pytest.approx(useful) and said in verdict.words[-1]


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        (of([0] * 60, none=6, truncated=6), "most of these were cut off: raise rollout.max_new_tokens (12,288)"),
        (of([0] * 60, none=6), "it does not end as the closing instruction asks"),
        (of([0] * 60, none=6), "show it the form (data.examples: 2)"),
        (of([8] * 30 + [4] * 30), "What is always right teaches nothing. Leave it out: data.filters: student_accuracy < 1"),
        (of([0] * 30 + [4] * 30, [0] * 30 + [8] * 30), "Where neither is ever right, the right answer may be wrong"),
        (of([0] * 60, [0] * 55 + [1] * 5), "On hardly any hard question there would be a right answer to show: take a stronger teacher"),
        (of([4] * 60, [3] * 60), "The teacher is no better than the student"),
        (of([4] * 10), "These are 10 questions: the shares are rough."),
    ],
)
def test_what_is_wrong_comes_with_its_mend(questions: list[Measured], said: str) -> None:
    assert any(said in words for words in judge_data(questions, settings_of(), 8).words)


def test_good_data_needs_no_mend() -> None:
    words = judge_data(of([4] * 30 + [0] * 30, [8] * 60), settings_of(), 8).words
    assert len(words) == 3


def test_the_shares_are_those_of_the_answers() -> None:
    questions = [*of([0, 0, 4, 8], [0, 8, 8, 8]), Measured("b", "", None, Answers(8, 8, 0, None, 1)), *of([3])]
    verdict = judge_data(questions, settings_of(zone={"threshold": 0.5}), 8)
    assert verdict.student.accuracy == 15 / 40 and verdict.student.never == 2 / 5 and verdict.student.always == 1 / 5
    assert verdict.hard == 3 / 5 and verdict.solved == 1 / 2 and verdict.neither == 1 / 4
    assert verdict.useful == 3 / 5 and verdict.unknown == 0
    assert verdict.teacher.count == 5 and verdict.teacher.truncated is None
    assert useful_filter(verdict) == "student_accuracy < 1 and (student_accuracy > 0 or teacher_accuracy > 0)"
    assert [table.id for table in tables(verdict)] == ["models", "source"]
    assert [chart.id for chart in charts(verdict)] == ["student", "teacher", "teacher-hard"]
    assert judge_data(of([4]), settings_of(zone={"threshold": 0.6}), 8).hard == 1


@pytest.mark.parametrize("n", [1, 2, 8, 12, 13, 16, 64, 100])
def test_every_count_is_in_one_bin(n: int) -> None:
    answers = [Answers(n, k, 0, 0, 1) for k in range(n + 1)]
    assert sum(counts(answers, n)) == n + 1
    assert all(sum(belongs(each) for _, belongs in bins(n)) == 1 for each in answers)
    assert counts(answers, n)[0] == counts(answers, n)[-1] == 1
    if n == 100:
        assert counts(answers, n) == [1, *[10] * 9, 9, 1]


@pytest.mark.parametrize("columns", [80, 120])
def test_what_is_printed_fits_the_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from zppo.measure.verdict import print_verdict

    console = Console(file=io.StringIO(), width=columns)
    print_verdict(judge_data(of([0] * 4000 + [8] * 30, [7] * 4030), settings_of(), 8), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= columns
    assert any(re.match(r"0 of 8  █+ +4,000 +99.3%", line) for line in lines)
