"""`zppo eval` from end to end: what is sent, what is kept, what is asked again, and what is said when something fails."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import zppo
from conftest import make_tiny
from eval_server import Reply, command, fair, results, right, rows, said, scripted, write_clip
from evaluate_data import write_data
from seeing import make_seeing
from serving import listening, wait_for
from zppo import cli
from zppo.errors import EvaluationError, SettingsError
from zppo.evals.endpoint import check_context, served
from zppo.evals.options import Decoding, EvalOptions, settings_of
from zppo.evals.registry import BENCHMARKS, find
from zppo.evals.results import EvalFolder, SampleResult, begin, summary, with_benchmark
from zppo.evals.scoring import verdicts as deciding

KEY, JUDGE_KEY, SERVED_KEY = (f"{whose}-key-that-nobody-may-see" for whose in ("model", "judge", "served"))


@pytest.fixture(autouse=True)
def other_loggers_keep_their_level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    assert logging.getLogger().level == level


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all benchmarks, and clips that can be decoded."""
    folder = write_data(tmp_path_factory.mktemp("rows"))
    for path in folder.rglob("*.mp4"):
        write_clip(path)
    return folder


# --- what is sent and kept ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_setting_of_the_protocol_is_sent_and_nothing_is_asked_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_KEY", KEY)
    monkeypatch.setenv("JUDGE_KEY", JUDGE_KEY)
    out = tmp_path / "out"
    with scripted(right, "m", KEY) as model, scripted(fair, "j", JUDGE_KEY) as judge:
        keys = ["--key-env", "MODEL_KEY", "--judge-key-env", "JUDGE_KEY", "--samples", "2"]
        arguments = command(model.url, judge, data, out, "IMO-AB,CEval", *keys)
        assert cli.main(arguments) == 0, capsys.readouterr()
        asked = [*model.requests]
        assert len(asked) == 8 and len(judge.requests) == 4  # 2 + 2 questions, 2 samples; letters need no judge
        wanted = {
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "min_p": 0.0,
            "presence_penalty": 1.5,
            "repetition_penalty": 1.0,
            "max_tokens": 12_288,
        }
        for body in asked:
            assert {name: body[name] for name in wanted} == wanted
            assert body.keys() == wanted.keys() | {"model", "messages"}
            assert "\\boxed{}" in said(body)
        for body in judge.requests:
            assert body["temperature"] == 0 and body["max_tokens"] == 512
            assert body["chat_template_kwargs"] == {"enable_thinking": False}
        again = [*arguments]
        assert cli.main(again) == 0
        assert (len(model.requests), len(judge.requests)) == (8, 4)
        # A longer suite asks for what is new alone.
        again[3] = "IMO-AB,CEval,GPQA-D"
        assert cli.main(again) == 0
        assert len(model.requests) == 12
        # More samples: the old ones count.
        again[again.index("--samples") + 1] = "3"
        assert cli.main(again) == 0
        assert len(model.requests) == 18
    state = results(out)
    imo = next(each for each in state["benchmarks"] if each["name"] == "IMO-AB")
    assert (imo["value"], imo["rows"], imo["units"], imo["by_judge"], imo["tokens_out"]) == (1.0, 6, 2, 6, 18)
    assert state["settings"]["decoding"] == {**wanted}
    row = rows(out, "IMO-AB")[0]
    assert row["text"] == r"<think>hm</think> \boxed{A}" and row["answer"] == "A" and row["by"] == "judge"
    assert row["reply"] == '{"verdict": "correct"}' and row["finish"] == "stop" and row["epoch"] in (1, 2, 3)
    assert not keys_in(out)
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err and JUDGE_KEY not in printed.out + printed.err
    assert "mean of 3 llm" in printed.out and "IMO-AB" in printed.out


def keys_in(out: Path) -> list[str]:
    """Files that hold a key, logs unpacked."""
    from inspect_ai.log import read_eval_log

    logs = {path: read_eval_log(str(path)).model_dump_json() for path in out.rglob("*.eval")}
    assert logs and all('"epoch"' in text for text in logs.values())
    texts = {path: path.read_bytes().decode("latin-1") for path in out.rglob("*") if path.is_file()} | logs
    return [str(path) for path, text in texts.items() if KEY in text or JUDGE_KEY in text]


def test_the_decoding_is_the_protocols() -> None:
    assert Decoding() == Decoding(0.6, 0.95, 20, 0.0, 1.5, 1.0, 12_288)


# --- what fails -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_judge_leaves_rows_open_and_only_the_judging_is_repeated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deciding, "DOWN", 0.2)
    out = tmp_path / "out"
    with scripted(right, "m") as model, scripted(lambda body: "it is right", "j") as judge:
        arguments = command(model.url, judge, data, out, "IMO-AB,CEval", "--strict")
        assert cli.main(arguments) == 2
        assert "IMO-AB 2" in capsys.readouterr().err
        ceval, imo = results(out)["benchmarks"]
        assert (imo["value"], imo["rows"], imo["open"], imo["judge_errors"]) == (None, 0, 2, 2)
        assert ceval["open"] == 0 and results(out)["families"]["llm"]["benchmarks"] == ["CEval"]
        assert {row["error"] for row in rows(out, "IMO-AB")} == {"the judge's reply is malformed"}
        judge.reply = lambda body: 503
        assert cli.main(arguments) == 2
        assert "did not answer" in rows(out, "IMO-AB")[0]["error"]
        before = len(judge.requests)
        judge.reply = fair
        assert cli.main(arguments) == 0
        assert (len(model.requests), len(judge.requests) - before) == (4, 2)
        assert results(out)["benchmarks"][1]["value"] == 1.0


@pytest.mark.slow
def test_a_refused_question_stays_open_and_the_key_in_the_refusal_is_in_no_file(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_KEY", KEY)
    out = tmp_path / "out"
    first: list[str] = []

    def picky(body: dict[str, Any]) -> Reply:
        first.append(said(body))
        return 400 if said(body) == first[0] else r"\boxed{A}"

    with scripted(picky, "m", KEY) as model, scripted(fair, "j") as judge:
        arguments = command(model.url, judge, data, out, "CEval", "--key-env", "MODEL_KEY")
        assert cli.main(arguments) == 2
        (ceval,) = results(out)["benchmarks"]
        assert (ceval["rows"], ceval["open"], ceval["judge_errors"]) == (1, 1, 0)
        opened = next(row for row in rows(out, "CEval") if row["by"] == "open")
        assert "no, [key]" in opened["error"] and len(opened["error"]) < 500
        assert not keys_in(out)
        model.reply = right
        assert cli.main(arguments) == 0
        assert len(model.requests) == 3
    assert KEY not in "".join(capsys.readouterr())


def test_a_context_without_room_for_any_question_is_refused_at_the_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        model.context = 12_288
        assert cli.main(command(model.url, judge, data, tmp_path / "out", "CEval")) == 2
        assert not model.requests and not (tmp_path / "out" / "eval.json").exists()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("12,288") == 2 and "--max-tokens" in said
    check_context(12_289, 12_288)
    check_context(None, 12_288)


@pytest.mark.slow
def test_questions_that_are_too_long_are_said_and_asked_again_elsewhere(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of `zppo serve` and of vLLM, which gives no code."""
    refusals: list[Reply] = [
        {"error": {"message": "the prompt has 9 tokens", "code": "context_length_exceeded", "type": "invalid_request_error"}},
        {"error": {"message": "This model's maximum context length is 40 tokens. You asked for more", "code": 400}},
    ]  # fmt: skip
    out = tmp_path / "out"
    with scripted(lambda body: refusals[len(model.requests) % 2], "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, out, "CEval", "--concurrency", "1")) == 0
        assert {(row["value"], row["reason"]) for row in rows(out, "CEval")} == {(0.0, "too long for the model's context")}
        (part,) = results(out)["benchmarks"]
        assert (part["too_long"], part["no_answer"], part["truncated"], part["open"]) == (2, 0, 0, 0)
        assert "CEval: 2 of 2 rows are 0 since" in capsys.readouterr().out
        assert not (out / "eval" / "answers" / "CEval.jsonl").read_bytes()


@pytest.mark.slow
def test_questions_with_pictures_are_left_out_for_a_model_that_takes_none(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(body: dict[str, Any]) -> Reply:
        if isinstance(body["messages"][-1]["content"], str):
            return right(body)
        return {"error": {"message": "send text alone", "code": "images_refused"}}

    out = tmp_path / "out"
    with scripted(blind, "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, out, "HLE", "--concurrency", "1")) == 0
    (part,) = results(out)["benchmarks"]
    assert (part["left_out"], part["open"], part["rows"]) == (1, 0, 1)
    assert "HLE: 1 of 2" in capsys.readouterr().out


@pytest.mark.slow
def test_other_servers_words_for_a_model_without_eyes() -> None:
    from zppo.evals.task import blind

    def refusal(text: str, status: int = 400) -> Exception:
        error = RuntimeError(text)
        error.status_code = status  # type: ignore[attr-defined]
        return error

    for text in (
        "Qwen/Qwen3-1.7B is not a multimodal model",
        "At most 0 image(s) may be provided in one prompt.",
        "this model does not support image input",
        "image input is not supported - hint: you may need to provide the mmproj",
    ):
        assert blind(refusal(text)) and not blind(refusal(text, 500))
    for text in ("At most 5 image(s) may be provided", "At most 0 video(s) may be provided", "the image is broken"):
        assert not blind(refusal(text))


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(data: Path, tmp_path: Path) -> None:
    out, hold, reached = tmp_path / "out", threading.Event(), threading.Event()

    def slow(body: dict[str, Any]) -> Reply:
        if len(model.requests) == 4:  # the fourth of 10 never gets its answer
            reached.set()
            hold.wait(60)
        return right(body)

    with scripted(slow, "m") as model, scripted(fair, "j") as judge:
        arguments = command(model.url, judge, data, out, "CharXiv,IMO-AB", "--concurrency", "1")
        process = subprocess.Popen([sys.executable, "-m", "zppo", *arguments], stdout=subprocess.DEVNULL, env={**os.environ})
        try:
            assert reached.wait(200)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        hold.set()
        assert cli.main(arguments) == 0
        asked = Counter(json.dumps(body["messages"]) for body in model.requests)
    assert sorted(asked.values()) == [1] * 11 + [2]
    assert [each["open"] for each in results(out)["benchmarks"]] == [0, 0]


@pytest.mark.slow
def test_a_server_that_is_gone_ends_the_asking(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zppo.evals import task
    from zppo.evals import task as inspected

    monkeypatch.setattr(inspected, "RETRIES", 0)
    monkeypatch.setattr(task, "DOWN_AFTER", 2)
    out = tmp_path / "out"
    with scripted(lambda body: 500, "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, out, "CharXiv", "--concurrency", "1")) == 2
        assert len(model.requests) == 2
    (part,) = results(out)["benchmarks"]
    assert part["value"] is None and part["open"] == 10
    assert "not asked" in rows(out, "CharXiv")[-1]["error"]


@pytest.mark.slow
def test_from_python_where_a_loop_runs(data: Path, tmp_path: Path) -> None:
    async def cell(model: str, **options: Any) -> zppo.Evaluated:
        quiet = Console(quiet=True)
        return zppo.evaluate(model, "CEval", data=str(data), output=str(tmp_path / "out"), console=quiet, **options)

    assert repr(asyncio.run(cell("http://localhost:1/v1", dry_run=True))) == f"<Evaluated {tmp_path / 'out'}: no results>"
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        done = asyncio.run(cell(model.url, judge=judge.url))
        asked = len(model.requests)
        assert asyncio.run(cell(model.url, judge=judge.url)) == done and len(model.requests) == asked
        with pytest.raises(SettingsError, match="--judge-prompt 'x=y'"):
            asyncio.run(cell(model.url, judge=judge.url, judge_prompts={"x": "y"}))
    assert done.accuracies == {"CEval": 0.5} and done.results == results(tmp_path / "out")
    assert repr(done) == f"<Evaluated {tmp_path / 'out'}: CEval 0.500>"


@pytest.mark.slow
def test_a_finished_evaluation_is_shown_only_where_model_judge_and_options_are_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is behind an address is asked, not taken from the last time."""
    out = tmp_path / "out"
    with scripted(right, "m") as model, scripted(fair, "j") as judge, scripted(fair, "k") as other:
        place = EvalFolder(out)
        options = EvalOptions(model.url, "IMO-AB", data=data)
        state = begin(place, "m", model.url, settings_of(options, "m", "j", "frames"))
        by_judge = [SampleResult("1", 1, "judge", 1.0)]
        part = summary(find("IMO-AB"), by_judge, 1) | {"limit": None, "samples": 1, "origin": "", "revision": ""}
        place.write(with_benchmark(state, part, ["IMO-AB"]))
        arguments = command(model.url, judge, data, out, "IMO-AB")
        assert cli.main(arguments) == 0 and "m, judged by j" in capsys.readouterr().out
        assert cli.main([*arguments, "--video", "file", "--judge-model", "j"]) == 2
        assert "video = " in capsys.readouterr().err
        assert cli.main(command(model.url, other, data, out, "IMO-AB")) == 2
        assert "judge = 'j', and now it is 'k'" in capsys.readouterr().err
        model.model = "n"
        assert cli.main(arguments) == 2
        assert "model = 'm', and now it is 'n'" in capsys.readouterr().err
        assert not model.requests and not judge.requests
    assert cli.main(arguments) == 2
    assert "the model cannot be asked" in capsys.readouterr().err


# --- thoughts -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thoughts_are_found_wherever_a_server_puts_them(data: Path, tmp_path: Path) -> None:
    from inspect_ai.model import ModelOutput

    from zppo.evals.task import message_text

    replies: list[Reply] = [
        {"content": r"\boxed{A}", "reasoning_content": r"\boxed{B}?"},
        {"content": r"<think>\boxed{B} and on", "finish": "length"},
    ]
    out = tmp_path / "out"
    with scripted(lambda body: replies[len(model.requests) - 1], "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, out, "CEval", "--concurrency", "1")) == 0
    split, cut = rows(out, "CEval")
    assert (split["answer"], split["text"]) == ("A", r"<think>\boxed{B}?</think>\boxed{A}")
    assert (cut["answer"], cut["by"], cut["reason"], cut["finish"]) == (None, "judge", "no answer", "max_tokens")
    (part,) = results(out)["benchmarks"]
    assert (part["truncated"], part["no_answer"]) == (1, 1)
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": r"\boxed{B}?"}]}, {"type": "text", "text": r"\boxed{A}"}]
    with scripted(lambda body: {"content": parts}, "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, tmp_path / "parts", "CEval")) == 0
    assert {row["text"] for row in rows(tmp_path / "parts", "CEval")} == {r"<think>\boxed{B}?</think>\boxed{A}"}
    with scripted(lambda body: r"\boxed{A} or", "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, tmp_path / "open", "CEval", "--think-open")) == 0
    assert {row["answer"] for row in rows(tmp_path / "open", "CEval")} == {None}
    assert message_text(ModelOutput.from_content("mock", r"<think>hm</think>\boxed{A}")) == r"<think>hm</think>\boxed{A}"


# --- all of them ----------------------------------------------------------------------------------------------------------


SAYS_NO = "correct: no\nscore: 0\ncorrectness: 0\nanswer: no"
"""A reply that every judge with words of its own may give."""


def make_saying(path: Path, text: str) -> Path:
    """A checkpoint that answers everything with `text`: one token, then the end."""
    from tokenizers import AddedToken

    make_tiny(path, vocab_size=512, max_position_embeddings=32_768)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([AddedToken(text, normalized=False)])
    tokenizer.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    said, end = tokenizer.convert_tokens_to_ids(text), tokenizer.eos_token_id
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to the token itself
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[said] = torch.eye(2, 32)[1]
        model.lm_head.weight[said, 0] = model.lm_head.weight[end, 1] = 20.0
    model.save_pretrained(path)
    return path


@pytest.mark.slow
def test_all_benchmarks_through_servers_of_our_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny vision-language checkpoint behind `zppo serve`, a judge behind another: texts, pictures and frames of clips."""
    monkeypatch.setenv("ZPPO_TEST_KEY", SERVED_KEY)
    student, out = make_seeing(tmp_path / "student", "smolvlm"), tmp_path / "out"
    more = ["--max-tokens", "4", "--frames", "3", "--video", "frames", "--judge-key-env", "ZPPO_TEST_KEY"]
    with listening(make_saying(tmp_path / "judge", SAYS_NO), SERVED_KEY, model="j") as judge:
        assert cli.main(command(str(student), judge, data, out, "paper", *more)) == 0, capsys.readouterr()
    state = results(out)
    assert [each["name"] for each in state["benchmarks"]] == [benchmark.name for benchmark in BENCHMARKS]
    assert not state["skipped"] and all(each["open"] == 0 and each["value"] is not None for each in state["benchmarks"])
    assert {each["name"] for each in state["benchmarks"] if each["by_judge"]} >= {"MM-Vet", "MultiCh"}
    assert state["families"].keys() == {"vlm", "llm", "video"}
    assert state["label"] == str(student)
    assert all(each["tokens_out"] <= 4 * each["rows"] for each in state["benchmarks"])
    # The judge is gone, and with its name nobody misses it; other weights in the same folder are not taken for these.
    assert cli.main(command(str(student), judge, data, out, "paper", *more, "--judge-model", "j")) == 0
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"1")
    assert cli.main(command(str(student), judge, data, out, "paper", *more, "--judge-model", "j")) == 2
    assert "was made with weights" in capsys.readouterr().err


@pytest.mark.slow
def test_clips_go_whole_to_servers_that_take_them_and_judges_are_asked_in_given_words(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("Mine: {{ question }}")
    (tmp_path / "rows").mkdir()
    for name in ("MVBench", "MMVU"):
        (tmp_path / "rows" / f"{name}.jsonl").write_bytes((data / f"{name}.jsonl").read_bytes())
    more = ("--video", "file", "--clips", str(data), "--judge-prompt", f"MMVU={tmp_path / 'mine.jinja'}")
    with scripted(right, "m") as model, scripted(lambda body: '{"verdict": "wrong"}', "j") as judge:
        assert cli.main(command(model.url, judge, tmp_path / "rows", tmp_path / "out", "MVBench,MMVU", *more)) == 0
        parts = [part for body in model.requests for part in body["messages"][-1]["content"]]
        assert judge.requests and all(said(body).startswith("Mine: ") for body in judge.requests)
    kinds = Counter(part["type"] for part in parts)
    videos = [part["video_url"]["url"] for part in parts if part["type"] == "video_url"]
    assert videos and all(url.startswith("data:video/mp4;base64,") for url in videos)
    assert kinds["image_url"] >= 3  # of the clip of which a part alone is asked about


# --- the server of a checkpoint ---------------------------------------------------------------------------------------------


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    for deadline, script, message in (
        (200.0, "raise SystemExit('no such model')", "status 1 .* no such model"),
        (0.2, "import time; time.sleep(300)", "within 0.2 s"),
    ):
        monkeypatch.setattr("zppo.evals.endpoint.command_of", lambda *a, s=script: [sys.executable, "-c", s])
        with pytest.raises(EvaluationError, match=message), served(tmp_path, log, images=1, deadline=deadline, vllm=False):
            raise AssertionError("it cannot be there")


STAND_IN = """
import http.server, os, subprocess, sys
helper = subprocess.Popen(["sleep", "300"])
open(sys.argv[1], "w").write(f"{os.getpid()} {helper.pid}")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
"""
PARENT = """
import sys, time
from pathlib import Path
from zppo.evals import endpoint as child
child.command_of = lambda folder, port, *more: [sys.executable, "-c", sys.argv[1], sys.argv[2], str(port)]
with child.served(Path("."), Path(sys.argv[2] + ".log"), images=1, vllm=False) as server:
    assert server.key not in repr(server)
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_the_server_of_a_checkpoint_ends_with_the_evaluation(tmp_path: Path, killed: bool) -> None:
    """With its helpers where the block ends; by itself where the evaluation is killed (on Linux)."""
    pids = tmp_path / "pids"
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, STAND_IN, str(pids)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
    server, helper = map(int, pids.read_text().split())
    assert alive(server) and alive(helper)
    if killed:
        process.kill()
    process.communicate("\n" if not killed else None)
    wait_for(lambda: not alive(server), 60)
    if killed:
        os.kill(helper, signal.SIGKILL)  # a stand-in forgets its helper; vLLM ends its own
    wait_for(lambda: not alive(helper), 60)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- mistakes -------------------------------------------------------------------------------------------------------------


def test_data_that_cannot_be_had_or_read_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "CEval.jsonl").write_text('{"id": 1}\n')
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, tmp_path, tmp_path / "out", "MMLU,CEval")) == 2
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "skipped MMLU:" in printed and "no benchmark could be evaluated" in printed
    state = results(tmp_path / "out")
    assert not state["benchmarks"] and [each["name"] for each in state["skipped"]] == ["CEval", "MMLU"] and not model.requests


MISTAKES: dict[str, tuple[Callable[[str, str, Path], list[str]], str]] = {
    "an unknown benchmark": (lambda m, j, f: [m, "--suite", "MMLUX", "--judge", j], "'MMLUX'"),
    "no judge": (lambda m, j, f: [m], "--judge URL"),
    "no closing instruction": (lambda m, j, f: [m, "--judge", j, "--closing", str(f / "none")], "think-boxed, boxed, answer-line"),
    "arguments that are none": (lambda m, j, f: [m, "--judge", j, "--template-args", "thinking"], "'thinking' is no mapping"),
    "arguments that are no YAML": (lambda m, j, f: [m, "--judge", j, "--template-args", "{"], "is no YAML"),
    "a model that is nowhere": (lambda m, j, f: [str(f / "none"), "--judge", j], "is no folder"),
    "a folder without a model": (lambda m, j, f: [str(f), "--judge", j], "is no checkpoint"),
    "a wrong address": (lambda m, j, f: ["http://127.0.0.1:1/v1", "--judge", j], "the model cannot"),
    "a wrong address of the judge": (lambda m, j, f: [m, "--judge", "http://127.0.0.1:1/v1"], "the judge cannot"),
    "an address without http": (lambda m, j, f: [m, "--judge", "localhost:1"], "is no URL"),
    "a model that is not served": (lambda m, j, f: [m, "--judge", j, "--model", "huge"], "'huge'; it serves m"),
    "a key that is not set": (lambda m, j, f: [m, "--judge", j, "--key-env", "NOT_SET"], "NOT_SET is not set"),
    "addresses of two models": (lambda m, j, f: [f"{m},{j}", "--judge", j], "serve different models"),
    "vLLM for a URL": (lambda m, j, f: [m, "--judge", j, "--vllm.max-model-len=9"], "is served already"),
    "vLLM's address": (lambda m, j, f: [str(f), "--judge", j, "--vllm.port=9"], "--vllm.port is given by zppo itself"),
    "no samples": (lambda m, j, f: [m, "--judge", j, "--samples", "0"], "--samples is 0"),
    "no samples of one": (lambda m, j, f: [m, "--judge", j, "--samples", "4,AIME25=0"], "--samples is AIME25=0"),
    "samples of what is nowhere": (lambda m, j, f: [m, "--judge", j, "--samples", "AIME24=2"], "'AIME24'"),
    "samples that are no number": (lambda m, j, f: [m, "--judge", j, "--samples", "AIME25"], "'AIME25' holds no number"),
    "no data folder": (lambda m, j, f: [m, "--judge", j, "--data", str(f / "none")], "--data: "),
    "a judge without a name": (lambda m, j, f: [m, "--judge", j, "--judge-prompt", "x"], "write JUDGE=PATH"),
    "a prompt that is nowhere": (lambda m, j, f: [m, "--judge", j, "--judge-prompt", "HLE=no.jinja"], "no.jinja"),
    "two models": (lambda m, j, f: [m, "other", "--judge", j], "takes one model"),
    "one evaluation to compare": (lambda m, j, f: ["compare", "a.json"], "not 1"),
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_said_before_anything_is_asked(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[wrong]
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        extra = [] if "compare" in wrong else ["--output", str(tmp_path / "out")]
        assert cli.main(["eval", *arguments(model.url, judge.url, tmp_path), *extra]) == 2
        assert not model.requests and not judge.requests
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "eval.json").exists()


WITHOUT_EXTRAS = """
import sys
for name in ("inspect_ai", "rapidfuzz", "av", "nltk", "jieba", "anls"):
    sys.modules[name] = None
from zppo import cli
assert cli.main(["eval", "http://localhost:1/v1", "--dry-run", "--data", sys.argv[1]]) == 0
sys.exit(cli.main(["eval", "http://127.0.0.1:1/v1", "--judge", "http://127.0.0.1:1/v1"]))
"""


@pytest.mark.slow
def test_without_its_extras_a_dry_run_works_and_all_else_says_what_to_install(tmp_path: Path) -> None:
    """In a process of its own, in which none of their packages can be imported."""
    write_data(tmp_path)
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, str(tmp_path)], capture_output=True, text=True)
    assert "AIME25" in run.stdout and "?" not in run.stdout
    assert "Traceback" not in run.stderr and run.returncode == 2
    assert "inspect_ai and rapidfuzz" in run.stderr and "pip install 'zppo[eval]'" in run.stderr
