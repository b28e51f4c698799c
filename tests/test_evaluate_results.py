"""What an evaluation leaves: journals, rows, eval.json, its comparison, its place in a report, and what a dry run says."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval_server import write_clip
from evaluate_data import write_data
from report_runs import invented_run
from zppo import cli
from zppo.errors import DataError, EvaluationError, SettingsError, StorageError
from zppo.evals import view as estimate
from zppo.evals.endpoint import KEY, command_of
from zppo.evals.item import Item, Message
from zppo.evals.journal import Journal
from zppo.evals.media import chat_turns, media_key, spread
from zppo.evals.options import EvalOptions, fingerprint, settings_of
from zppo.evals.registry import BENCHMARKS, find, judge_prompts
from zppo.evals.results import (
    EvalFolder,
    SampleResult,
    begin,
    default_output,
    families,
    finished,
    several_samples,
    summary,
    with_benchmark,
    with_skipped,
)
from zppo.evals.view import ProgressDisplay, print_results
from zppo.prompts import PromptBook
from zppo.report.summary import Reader
from zppo.report.tables import as_accuracies, compare_evaluations, evaluation_table, read_evaluation

# --- journals -------------------------------------------------------------------------------------------------------------


def test_a_journal_finds_what_it_was_given_and_drops_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "AIME25.jsonl"
    journal = Journal(path)
    journal.add("a", {"text": "one \ud83d\n\u2028"})
    journal.add("b", {"text": "two"})
    assert journal.get("a") == {"text": "one \ud83d\n\u2028"} and journal.get("c") is None
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "value": {"te')
    journal = Journal(path)
    assert ("c" in journal, journal.get("b")) == (False, {"text": "two"})
    journal.add("c", {"text": "three"})
    journal.close()
    assert Journal(path).get("c") == {"text": "three"}
    path.write_bytes(b"[]\n" + whole)  # a line of somebody else's
    assert Journal(path).get("b") == {"text": "two"}


# --- rows -----------------------------------------------------------------------------------------------------------------


def row(id: str, epoch: int, value: float | None, **fields: Any) -> SampleResult:
    return SampleResult(id, epoch, "open" if value is None else "rule", value, **fields)


def test_samples_of_a_question_are_one_value_in_the_standard_error() -> None:
    """Four questions, each right in all samples or in none: as sure as with one sample, not as with ten."""
    aime = find("AIME25")
    once = [row(str(i), 1, float(i % 2)) for i in range(4)]
    often = [row(str(i), epoch, float(i % 2)) for i in range(4) for epoch in range(1, 11)]
    one, ten = summary(aime, once, 4), summary(aime, often, 40)
    assert (one["value"], one["error"]) == (ten["value"], ten["error"]) == (0.5, pytest.approx(0.5 / math.sqrt(3)))
    assert (ten["rows"], ten["units"]) == (40, 4)
    mixed = summary(aime, [row("a", 1, 1.0), row("a", 2, 0.0), row("b", 1, 1.0), row("b", 2, 0.0)], 4)
    assert (mixed["value"], mixed["error"]) == (0.5, 0.0)


def test_open_rows_are_counted_and_never_wrong() -> None:
    rows = [row("a", 1, 1.0), row("b", 1, None, finish="stop"), row("c", 1, None), row("d", 1, 0.0, boxless=True, finish="max_tokens")]
    part = summary(find("AIME25"), rows, 6)
    assert (part["value"], part["rows"], part["open"], part["judge_errors"]) == (0.5, 2, 4, 1)
    assert (part["no_answer"], part["truncated"]) == (1, 1)
    assert summary(find("AIME25"), [], 3)["value"] is None


def test_both_figures_are_kept_with_the_judge_and_strictly_by_box() -> None:
    """Of a question whose two samples the judge finds right one has no box."""
    rows = [row("a", 1, 1.0, boxless=True), row("a", 2, 1.0), row("b", 1, 0.0, boxless=True), row("b", 2, 0.0)]
    part = summary(find("MMLU"), rows, 4)
    assert (part["value"], part["by_box"], part["by_box_error"], part["no_answer"]) == (0.5, 0.25, 0.25, 2)


def test_several_samples_come_to_avg_pass_and_maj() -> None:
    """Question a: 2 of 5 right, and each wrong answer alone; b: the wrong 7 has most votes; c: a tie; d: no answer at all."""
    answers: dict[str, list[tuple[float, str | None]]] = {
        "a": [(1, "0.5"), (1, "1/2"), (0, "3"), (0, "4"), (0, "5")],
        "b": [(1, "2"), (0, "7"), (0, "\\text{7}"), (0, "8"), (1, "2.0")],
        "c": [(1, "2"), (1, None), (0, "9"), (0, "9 "), (0, None)],
        "d": [(0, None)] * 5,
    }
    rows = [row(id, n, float(value), answer=answer) for id, group in answers.items() for n, (value, answer) in enumerate(group, 1)]
    at_k = summary(find("MMLU"), rows, 20, 5)["at_k"]
    assert (at_k["k"], at_k["avg"], at_k["pass"], at_k["maj"]) == (5, pytest.approx(6 / 20), 0.75, (1 + 0.5 + 0.5 + 0) / 4)
    assert at_k["avg_error"] == pytest.approx(0.1) and at_k["pass_error"] == pytest.approx(0.25)
    assert summary(find("MMLU"), rows, 20)["at_k"] is None
    assert several_samples(find("MM-Vet"), rows)["maj"] is None and several_samples(find("MM-Vet"), rows)["pass"] == 0.75
    assert several_samples(find("MMLU"), [])["avg"] is None


def test_rows_left_out_are_neither_wrong_nor_open() -> None:
    rows = [row("a", 1, 1.0), SampleResult("b", 1, "left out", error="no images here")]
    part = summary(find("HLE"), rows, 2) | {"limit": None, "samples": 1}
    assert (part["value"], part["rows"], part["open"], part["left_out"]) == (1.0, 1, 0, 1)
    state = begin(EvalFolder(Path("nowhere")), "m", "m", settings_of(options(), "m", "j", "frames"))
    state = with_benchmark(state, part, ["HLE"])
    assert finished(state, "HLE", None, 1)
    console = Console(record=True, width=200)
    print_results(console, state)
    text = shown(console)
    assert "HLE: 1 of 2 rows are left out of its figure" in text and "(no images here)" in text


def test_a_familys_mean_and_error_are_over_benchmarks_with_a_figure() -> None:
    parts: list[dict[str, Any]] = [
        {"name": "A", "family": "vlm", "value": 0.2, "by_box": 0.1, "error": 0.03},
        {"name": "B", "family": "vlm", "value": 0.4, "by_box": 0.3, "error": 0.04},
        {"name": "C", "family": "vlm", "value": None, "by_box": None, "error": None},
        {"name": "D", "family": "llm", "value": 0.7, "by_box": 0.7, "error": None},
    ]
    result = families(parts)
    assert result["vlm"] == {
        "value": pytest.approx(0.3),
        "by_box": pytest.approx(0.2),
        "error": pytest.approx(0.025),
        "benchmarks": ["A", "B"],
    }
    assert result["llm"] == {"value": 0.7, "by_box": 0.7, "error": None, "benchmarks": ["D"]}


# --- questions as they are sent -----------------------------------------------------------------------------------------------


def test_frames_come_before_the_text_evenly_spaced_and_images_at_their_marks(tmp_path: Path) -> None:
    write_data(tmp_path)
    assert spread(range(10), 3) == [0, 4, 9] and spread(range(2), 16) == [0, 1] and spread([], 4) == [] and spread(range(3), 1) == [1]
    frames = tuple(tmp_path / "clips" / f"{i}.png" for i in range(3))
    item = Item("1", "VMME", (Message("user", "Where?"),), "A", "text", frames=frames)
    (turn,) = chat_turns(item, PromptBook(), store=tmp_path, as_file=False, frames=2)
    assert [part.kind for part in turn.parts] == ["image", "image", "text"]
    pictured = Item("2", "AI2D", (Message("user", "See <image> here."),), "A", "text", images=(tmp_path / "images" / "red.png",))
    (turn,) = chat_turns(pictured, PromptBook(), store=tmp_path, as_file=False, frames=2)
    assert [part.kind for part in turn.parts] == ["text", "image", "text"]
    assert turn.parts[1].value.startswith("data:image/png;base64,")
    write_clip(tmp_path / "clip.mp4")
    video = Item("3", "VMME", (Message("user", "Where?"),), "A", "text", video=tmp_path / "clip.mp4")
    (turn,) = chat_turns(video, PromptBook(), store=tmp_path, as_file=True, frames=2)
    whole = base64.b64encode((tmp_path / "clip.mp4").read_bytes()).decode()
    assert turn.parts[0].value == f"data:video/mp4;base64,{whole}"
    (tmp_path / "clip.mp4").write_bytes(b"no clip")
    for as_file in (True, False):
        with pytest.raises(DataError, match="cannot be decoded"):
            chat_turns(video, PromptBook(), store=tmp_path, as_file=as_file, frames=2)


def test_another_picture_under_the_same_name_is_another_question(tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    item = Item("1", "AI2D", (Message("user", "<image>?"),), "A", "text", images=(picture,))
    keys = []
    for data in (b"one", b"two", b"one"):
        picture.write_bytes(data)
        keys.append(media_key(item))
    assert keys[0] == keys[2] != keys[1] and keys[0] == media_key(replace(item, images=(b"one",)))
    picture.unlink()
    assert media_key(item) not in keys


def test_pictures_are_sent_within_the_protocols_limits(tmp_path: Path) -> None:
    import io

    from PIL import Image

    for name, size in {"small": (40, 40), "large": (3000, 1000)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        item = Item("1", "AI2D", (Message("user", "<image>"),), "A", "text", images=(tmp_path / f"{name}.png",))
        (turn,) = chat_turns(item, PromptBook(), store=tmp_path, as_file=False, frames=1)
        shown = Image.open(io.BytesIO(base64.b64decode(turn.parts[0].value.partition(",")[2])))
        assert 256 * 32 * 32 <= shown.width * shown.height <= 1280 * 32 * 32


# --- the folder -------------------------------------------------------------------------------------------------------------


def options(**fields: Any) -> EvalOptions:
    return EvalOptions(**{"model": "http://127.0.0.1:1/v1", "suite": "paper"} | fields)


def test_a_folder_takes_rows_of_one_protocol_alone(tmp_path: Path) -> None:
    folder = EvalFolder(tmp_path)
    own = settings_of(options(), "m", "j", "frames")
    folder.write(begin(folder, "m", "m", own))
    assert begin(folder, "m", "m", own)["settings"]["model"] == "m"
    closing = tmp_path / "closing.jinja"
    closing.write_text("Say it in one word.")
    template = tmp_path / "judge.jinja"
    template.write_text("{{ question }}")
    others = [
        settings_of(options(), "other", "j", "frames"),
        settings_of(options(), "m", "other", "frames"),
        settings_of(options(), "m", "j", "file"),
        settings_of(options(), "m", "j", "frames", "weights"),
        settings_of(options(max_tokens=7), "m", "j", "frames"),
        settings_of(options(frames=7), "m", "j", "frames"),
        settings_of(options(vllm={"quantization": "fp8"}), "m", "j", "frames"),
        settings_of(options(think_open=True), "m", "j", "frames"),
        settings_of(options(closing=closing), "m", "j", "frames"),
        settings_of(options(template_args={"enable_thinking": True}), "m", "j", "frames"),
        settings_of(options(data=tmp_path), "m", "j", "frames"),
        settings_of(options(clips=tmp_path), "m", "j", "frames"),
        settings_of(options(judge_prompts={"eval_hle": template}), "m", "j", "frames"),
    ]
    assert begin(folder, "m", "m", settings_of(options(vllm={"tensor_parallel_size": 2}), "m", "j", "frames"))
    for other in others:
        with pytest.raises(SettingsError, match="name another folder with --output"):
            begin(folder, "m", "m", other)
    folder.result.write_text('{"format": "another"}')
    with pytest.raises(DataError, match="no result of `zppo eval`"):
        folder.read()


def test_another_closing_instruction_is_another_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EvalFolder(tmp_path)
    folder.write(begin(folder, "m", "m", settings_of(options(), "m", "j", "frames")))
    monkeypatch.setattr(PromptBook, "text", lambda *a: "Say it in one word.")
    with pytest.raises(SettingsError, match="was made with closing = .*boxed.*, and now it is 'Say it in one word.'"):
        begin(folder, "m", "m", settings_of(options(), "m", "j", "frames"))


def test_two_evaluations_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    folder = EvalFolder(tmp_path / "out")
    with folder.alone():
        with pytest.raises(EvaluationError, match="another zppo eval is at work in .*out"), folder.alone():
            raise AssertionError("it is taken")
        with EvalFolder(tmp_path / "other").alone():
            pass
    with folder.alone():
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="name another folder"), EvalFolder(tmp_path / "file").alone():
        raise AssertionError("there is no folder")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "chat_template.jinja", "config.json"])
def test_another_model_in_the_same_folder_is_noticed(tmp_path: Path, name: str) -> None:
    """Down to one byte in the middle of a file that keeps its size and its time."""
    path = tmp_path / name
    path.write_bytes(bytes(3 << 20))
    first, before = fingerprint(tmp_path), path.stat()
    assert fingerprint(None) is None
    (tmp_path / "eval.json").write_text("{}")
    (tmp_path / "events.log").write_text("later")
    assert fingerprint(tmp_path) == first
    with open(path, "r+b") as file:
        file.seek(3 << 19)
        file.write(b"1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(tmp_path) != first


def test_a_benchmark_is_done_when_every_row_of_this_call_is_decided() -> None:
    state: dict[str, Any] = {"benchmarks": [], "skipped": [], "families": {}}
    part = summary(find("MMLU"), [row("a", 1, 1.0)], 1) | {"limit": None, "samples": 1}
    names = [benchmark.name for benchmark in BENCHMARKS]
    state = with_skipped(state, "MMLU", "llm", "MMLU: no network")
    state = with_benchmark(with_benchmark(state, part, names), part | {"name": "AI2D", "family": "vlm"}, names)
    assert [each["name"] for each in state["benchmarks"]] == ["AI2D", "MMLU"] and not state["skipped"]
    assert finished(state, "MMLU", None, 1)
    assert not finished(state, "MMLU", 5, 1) and not finished(state, "MMLU", None, 2) and not finished(state, "HLE", None, 1)
    assert not finished(with_benchmark(state, part | {"open": 1}, names), "MMLU", None, 1)


def test_a_runs_results_lie_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    assert default_output(options(model=str(tmp_path))) == tmp_path
    assert default_output(options()) == Path("runs/eval-127.0.0.1-1-v1")
    assert default_output(options(name="Qwen/Q")) == Path("runs/eval-Qwen-Q")


def test_how_servers_of_ours_are_started(tmp_path: Path) -> None:
    for vllm in (True, False):
        line = command_of(tmp_path, 1234, vllm, 16)
        assert "1234" in line and str(tmp_path) in line and "127.0.0.1" in line
        assert ("--generation-config" in line) == vllm and (KEY in line) == (not vllm)
    assert "--limit-mm-per-prompt" not in command_of(tmp_path, 1, True, 16)
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    assert '{"image": 16, "video": 1}' in command_of(tmp_path, 1, True, 16)


def test_a_benchmarks_name_stands_for_its_judge() -> None:
    assert judge_prompts(["hle=a.jinja", "eval_mmvu=b.jinja", "judge=c.jinja"]) == {
        "eval_hle": Path("a.jinja"),
        "eval_mmvu": Path("b.jinja"),
        "judge": Path("c.jinja"),
    }
    with pytest.raises(SettingsError, match="MMLU=x"):
        judge_prompts(["MMLU=x"])


# --- what is shown ------------------------------------------------------------------------------------------------------------


def written(folder: Path, values: dict[str, float], label: str = "m", **settings: Any) -> Path:
    """An eval.json with figures of benchmarks, as `zppo eval` writes it."""
    place = EvalFolder(folder)
    state = begin(place, label, label, settings_of(options(), label, "j", "frames") | settings)
    for name, value in values.items():
        rows = [row(str(i), 1, float(i < 10 * value)) for i in range(10)]
        part = summary(find(name), rows, 10) | {"limit": None, "samples": 1, "origin": "here", "revision": ""}
        state = with_benchmark(state, part, [benchmark.name for benchmark in BENCHMARKS])
    place.write(with_skipped(state, "HLE", "llm", "HLE: it is gated"))
    return place.result


def shown(console: Console) -> str:
    return " ".join(console.export_text().split())


def test_the_closing_table_says_what_was_decided_by_whom_and_what_was_skipped(tmp_path: Path) -> None:
    written(tmp_path, {"AI2D": 0.5, "MMLU": 0.2, "AIME25": 0.4})
    console = Console(record=True, width=150, force_terminal=False)
    print_results(console, EvalFolder(tmp_path).read() or {})
    text = shown(console)
    assert "AI2D 50.0 16.7 50.0 10 10 0 0 0 0" in text and "mean of 2 llm 30.0" in text and "skipped HLE: it is gated" in text
    assert text.startswith("m, judged by j benchmark score")


def test_other_figures_of_a_benchmark_are_shown_in_the_terminal_and_on_the_page(tmp_path: Path) -> None:
    result = written(tmp_path, {"WeMath": 0.5, "MVBench": 0.3})
    state = json.loads(result.read_text())
    state["benchmarks"][0]["beside"] = {"average": 0.625, "\x1b[31mconsistent": None}
    state["benchmarks"][1]["beside"] = {f"task {number}": 0.5 for number in range(20)}
    result.write_text(json.dumps(state))
    console = Console(record=True, width=150)
    print_results(console, state)
    text = console.export_text()
    assert "WeMath: average 62.5, " in text and "consistent –" in text and "\x1b" not in text
    assert "MVBench: 20 figures of its parts are in eval.json" in text and "task 7" not in text
    rows = evaluation_table(read_evaluation(tmp_path)).rows
    assert ("WeMath: average", "", "62.5%", "", "", "") in rows and len(rows) == 2 + 2 + 2


def test_the_closing_table_says_what_could_not_be_read(tmp_path: Path) -> None:
    state = EvalFolder(written(tmp_path, {"AI2D": 0.5, "MMLU": 0.2}).parent).read() or {}
    state["benchmarks"][1] |= {"unreadable": 2, "unreadable_first": "MMLU, row 7: no"}
    console = Console(record=True, width=150, force_terminal=False)
    print_results(console, state)
    text = shown(console)
    assert "MMLU: 2 rows are no part of it, since unreadable; the first: MMLU, row 7: no" in text and "AI2D:" not in text


def test_progress_is_a_line_now_and_then_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo.evals.view._EVERY", -1.0)
    console = Console(record=True, width=100, force_terminal=False)
    with ProgressDisplay(console, "MMLU", 3) as watch:
        watch.take(row("a", 1, 1.0))
        watch.take(row("b", 1, None))
    assert "MMLU: 2 of 3 (1 open, 1 rule)" in shown(console)
    console = Console(record=True, width=100, force_terminal=True)
    with ProgressDisplay(console, "MMLU", 3) as watch:
        watch.take(row("a", 1, 1.0))


def test_two_evaluations_are_compared_family_by_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path / "a", {"AI2D": 0.9, "VisP": 0.7, "MMLU": 0.5, "CEval": 0.5}, "tuned")
    other = written(tmp_path / "b", {"AI2D": 0.5, "VisP": 0.5, "MMLU": 0.5}, "plain", judge="another")
    console = Console(record=True, width=150)
    vlm, llm = compare_evaluations([one, other.parent], resamples=200, console=console)
    assert (vlm.minuend, vlm.interval.delta, vlm.interval.wins, vlm.interval.n) == ("tuned", pytest.approx(30), 2, 2)
    assert (llm.interval.delta, llm.interval.n) == (0.0, 1)
    text = shown(console)
    assert "left out, since not all have it: CEval" in text and "differ in judge: j and another" in text
    assert "llm: A - B = +0.00 points, on one benchmark: no interval" in text
    assert re.search(r"vlm: A - B = \+30.00 points, 95% interval .*, A higher on 2 of 2, which are too few for it", text)
    assert cli.main(["eval", "compare", str(one), str(other), "--resamples", "50", "--seed", "3"]) == 0
    assert "50 resamples of the benchmarks with seed 3" in capsys.readouterr().out
    out = tmp_path / "out.csv"
    assert cli.main(["bootstrap", str(one), str(other), "--minuend", "tuned", "--resamples", "50", "--csv", str(out)]) == 0
    assert "vlm,tuned,plain,30.00," in out.read_text() and "llm,tuned,plain,0.00,,,0,1" in out.read_text()
    assert re.search(r"llm +tuned +plain +\+0.00 +– +0 of 1", capsys.readouterr().out)
    assert cli.main(["bootstrap", str(one)]) == 2 and cli.main(["bootstrap", str(one), "table.csv"]) == 2
    same = [read_evaluation(path) for path in (one, one)]
    assert list(as_accuracies(same)[0]["-", "vlm"]) == [str(one)]
    state = json.loads(other.read_text())
    state["benchmarks"][0]["left_out"] = 3
    other.write_text(json.dumps(state))
    assert "AI2D: not the same questions" in " ".join(as_accuracies([read_evaluation(p) for p in (one, other)])[1])
    assert "takes none: AI2D 3." in evaluation_table(read_evaluation(other)).caption


@pytest.mark.parametrize("text", ["", "[]", '{"format": "zppo eval 1"}', '{"benchmarks": [{"name": 1, "value": "x"}]}', "[" * 100_000])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(DataError, match=r"eval\.json"):
        read_evaluation(tmp_path)


@pytest.mark.slow
def test_a_runs_report_shows_its_benchmarks(tmp_path: Path) -> None:
    run = invented_run(tmp_path / "run")
    before = Reader(run).read()
    assert all(table.section != "Benchmarks" for table in before.tables)
    written(run, {"AI2D": 0.9, "MMLU": 0.5}, "<b>tuned</b>")
    reader = Reader(run)
    table = reader.read().tables[-1]
    assert table.section == "Benchmarks" and table.rows[0] == ("AI2D", "vlm", "90.0%", "10.0%", "10", "0")
    assert ("mean of 1", "llm", "50.0%", "16.7%", "", "") in table.rows and "HLE" in table.caption
    assert table == evaluation_table(read_evaluation(run))
    stamp = reader.stamp()
    written(run, {"VisP": 0.1}, "<b>tuned</b>")
    assert reader.stamp() != stamp


# --- the dry run ----------------------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_network_no_server_and_no_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(*arguments: object) -> None:
        raise AssertionError("a dry run connects to nothing")

    monkeypatch.setattr(socket.socket, "connect", nowhere)
    monkeypatch.setattr("zppo.evals.evaluate.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["eval", "http://localhost:1/v1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(benchmark.name in said for benchmark in BENCHMARKS)
    assert "gated: accept its terms" in said and "not measured" in said
    write_data(tmp_path)
    assert cli.main(["eval", "http://localhost:1/v1", "--suite", "AI2D,MMLU", "--data", str(tmp_path), "--samples", "3", "--dry-run"]) == 0
    assert "AI2D 2 6" in " ".join(capsys.readouterr().out.split())
    # Rows that cannot be read are said, and the other benchmarks are estimated all the same.
    (tmp_path / "AI2D.jsonl").write_text("{}\n{}\n")
    with (tmp_path / "MMLU.jsonl").open("a") as file:
        file.write("{}\n")
    assert cli.main(["eval", "http://localhost:1/v1", "--suite", "AI2D,MMLU", "--data", str(tmp_path), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "AI2D ?" in said and "MMLU 2" in said and "1 row unreadable" in said


def test_a_dry_runs_table_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, width=80, force_terminal=False)
    estimate.print_estimates(console, [estimate.estimate_benchmark(each, options()) for each in BENCHMARKS], options())
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(BENCHMARKS)]] == [each.name for each in BENCHMARKS]
    assert any(line.endswith("gated: accept its terms and log in") and "HLE" in line for line in lines)


def test_an_estimate_has_no_judge_where_rules_decide_all() -> None:
    asked = {each.judged: estimate.estimate_benchmark(each, options()).judge_tokens > 0 for each in BENCHMARKS}
    assert asked == {True: True, False: False}


def test_an_estimate_grows_with_what_is_asked() -> None:
    aime = find("AIME25")
    plain = estimate.estimate_benchmark(aime, options())
    assert (plain.rows, plain.tokens_out) == (30, 30 * estimate.ANSWER_TOKENS)
    assert estimate.estimate_benchmark(aime, options(samples=4)).tokens_out == 4 * plain.tokens_out
    assert estimate.estimate_benchmark(aime, options(samples={"aime25": 8, "MMLU": 2, "": 4})).tokens_out == 8 * plain.tokens_out
    assert estimate.estimate_benchmark(aime, options(limit=5)).rows == 5
    assert estimate.estimate_benchmark(aime, options(max_tokens=10)).tokens_out == 300
    assert estimate.estimate_benchmark(find("VMME"), options(frames=4)).images == 4 * 2700
    assert json.dumps(plain.note) == '""' and plain.hours > 0
