"""`zppo serve` as people run it: a process of its own, asked by the `openai` client; its options, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch

import zppo
from conftest import make_tiny
from serving import wait_for
from zppo import cli
from zppo.grading import extract_boxed, normalise
from zppo.images.store import PixelLimits
from zppo.lab.questions import lab_questions
from zppo.prompts import PromptBook
from zppo.serve import command as run

KEY = "a-key-that-nobody-may-see"
TEACHER = "lab:unreachable/teacher"
CLOSING = Path(zppo.__file__).parent / "lab" / "prompts" / "closing.jinja"


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its address) of `zppo serve ARGUMENTS --port 0`, with a key."""
    command = [sys.executable, "-m", "zppo", "serve", *arguments, "--port", "0", "--key-env", "ZPPO_TEST_KEY"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"ZPPO_TEST_KEY": KEY})
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def client(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)


@pytest.mark.slow
def test_the_openai_client_speaks_with_a_lab_teacher() -> None:
    """Everything that a remote teacher needs, over the wire; the teacher solves what it was trained for."""
    with serving(TEACHER, "--name", "teacher") as (process, url):
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1"), url
        ai = client(url)
        assert [model.id for model in ai.models.list()] == ["teacher"]
        book, questions = PromptBook({"closing": CLOSING}), lab_questions("unreachable", "test")[:40]

        def solve(question: Any, seed: int = 0, n: int = 4) -> list[str]:
            messages: Any = [message._asdict() for message in book.plain(question)]
            reply = ai.chat.completions.create(model="teacher", messages=messages, n=n, seed=seed, max_tokens=24)
            assert len(reply.choices) == n and reply.usage is not None and reply.usage.completion_tokens > n
            return [choice.message.content or "" for choice in reply.choices]

        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(solve, questions))
        assert together[:3] == [solve(question) for question in questions[:3]]
        right = [
            normalise(extract_boxed(text) or "") == normalise(cast(str, question.gold))
            for question, answers in zip(questions, together, strict=True)
            for text in answers
        ]
        assert sum(right) / len(right) > 0.7

        hello: Any = {"model": "teacher", "messages": [{"role": "user", "content": "kelp lift→ ?"}]}
        listed = ai.chat.completions.create(**hello, logprobs=True, max_tokens=5, stop=["never there"]).choices[0]
        assert listed.logprobs is not None and listed.logprobs.content is not None
        assert len(listed.logprobs.content) <= 5 and all(token.logprob <= 0 for token in listed.logprobs.content)
        extra: Any = {"top_k": 1, "chat_template_kwargs": {"enable_thinking": False}}
        assert ai.chat.completions.create(**hello, extra_body=extra, max_completion_tokens=5).choices
        with pytest.raises(openai.BadRequestError) as refused:
            ai.chat.completions.create(**hello, temperature=5)
        assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
        assert "temperature is 5" in str(refused.value)
        whole = ai.chat.completions.create(**hello, seed=3, max_tokens=9).choices[0].message.content
        with ai.chat.completions.create(**hello, seed=3, max_tokens=9, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
        assert chunks[-1].usage is not None and chunks[-2].choices[0].finish_reason in ("stop", "length")
        with pytest.raises(openai.NotFoundError, match="this server has 'teacher'"):
            ai.chat.completions.create(**hello | {"model": "other"})
        with pytest.raises(openai.AuthenticationError):
            client(url, "wrong").models.list()

        assert KEY not in Path(f"/proc/{process.pid}/cmdline").read_text()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == ""
        assert 'serving: requests send "model": "teacher"; on cpu, context 512' in err and KEY not in err and "Traceback" not in err


@pytest.mark.slow
def test_a_server_that_is_told_to_end_finishes_what_runs_or_ends_at_once_when_told_twice(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, max_position_embeddings=100_000)
    hello: Any = {"model": str(path), "messages": [{"role": "user", "content": "1"}], "presence_penalty": -2}

    with serving(str(path)) as (process, url), ThreadPoolExecutor(2) as pool, openai.DefaultHttpxClient() as http:
        # 128 rows: the first batch must still go on when the second request has come, and rows of a random model end by chance.
        short = pool.submit(cast(Any, client(url).chat.completions.create), **hello, n=128, max_tokens=600)
        wait_for(lambda: b'"decoding":1' in http.get(url.removesuffix("v1") + "health").content)
        long = pool.submit(cast(Any, client(url).chat.completions.create), **hello, n=4, max_tokens=90_000)
        wait_for(lambda: b'"waiting":1' in http.get(url.removesuffix("v1") + "health").content)
        process.send_signal(signal.SIGTERM)
        assert len(short.result(60).choices) == 128
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            long.result(60)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "finishing 2 requests" in err and "Traceback" not in err, err


# --- options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, and the server has no key"),
        (["tiny", "--host", "nowhere.invalid"], "port 0 of 'nowhere.invalid' cannot be used"),
        (["tiny", "--key-env", "ZPPO_UNSET"], "the environment variable ZPPO_UNSET is not set or empty"),
        (["tiny", "--key-env", "ZPPO_BAD"], "ZPPO_BAD is not one word of printable ASCII"),
        (["tiny", "--key-env", "ZPPO_BAD", "--key-file", "key"], "--key-env and --key-file both name a key"),
        (["tiny", "--key-file", "none"], "the file none cannot be read"),
        (["tiny", "--max-rows", "0"], "--max-rows is 0: it must be 1 or more"),
        (["tiny", "--max-images", "-1"], "--max-images is -1: it must be 0 or more"),
        (["tiny", "--min-pixels", "5", "--max-pixels", "4"], "--min-pixels is 5, more than --max-pixels, 4: exchange them"),
        (["tiny", "--max-batch-tokens", "-1"], "--max-batch-tokens is -1"),
        (["tiny", "--max-queue", "0"], "--max-queue is 0"),
        (["tiny", "--max-body", "0"], "--max-body is 0"),
        (["tiny", "--port", "70000"], "port 70000 of '127.0.0.1' cannot be used"),
        (["tiny", "--device", "toaster"], "--device toaster is no device"),
        (["./none"], "there is no folder './none'"),
        (["unfinished"], "the run 'unfinished' has no final/ yet"),
        (["empty"], "model 'empty' cannot be loaded"),
        (["lab:nowhere/teacher"], "there is no bundled model 'lab:nowhere/teacher'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_the_options_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZPPO_BAD", "zwei Wörter")
    for folder in ("empty", "unfinished"):
        Path(folder).mkdir()
    Path("unfinished/recipe.yaml").touch()
    assert cli.main(["serve", "--port", "0", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == "" and "Wörter" not in captured.err


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "owner/model", "--port", port]) == 2
    assert f"port {port} of '127.0.0.1' cannot be used" in capsys.readouterr().err


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str]]:
    """Runs the command up to where the server would start: (its service, what it would print)."""
    found: list[Any] = []

    class Server:
        def __init__(self, service: Any, url: str, what: str) -> None:
            found[:] = [service, f"{url} {what}"]

        def run(self, sockets: list[socket.socket]) -> None:
            pass

    monkeypatch.setattr(run, "_Server", Server)

    def start(*arguments: str) -> tuple[Any, str]:
        assert cli.main(["serve", *arguments]) == 0
        return found[0], found[1]

    return start


def test_every_option_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Callable[..., tuple[Any, str]]) -> None:
    """The run folder's final/ is what is served."""
    make_tiny(tmp_path / "run" / "final", max_position_embeddings=64)
    (tmp_path / "run" / "recipe.yaml").touch()
    (tmp_path / "key").write_text(f"{KEY}\n", encoding="utf-8")
    loaded: list[dict[str, Any]] = []
    load = run.load
    monkeypatch.setattr(run, "load", lambda *a, **kw: (loaded.append(kw), load(*a, **kw))[1])

    service, said = served(str(tmp_path / "run"), "--port", "0")
    assert (service.model, service.context, service.key, service.max_body) == (str(tmp_path / "run"), 64, None, 8 << 20)
    assert said.startswith("http://127.0.0.1:") and service.loopback
    engine = service.batcher._engine
    assert (engine.max_rows, engine.max_tokens, engine.model.dtype) == (64, None, torch.float32)
    assert engine.banned_ids == frozenset() and not any(p.requires_grad for p in engine.model.parameters())

    options = "--port 0 --name small --device cpu --dtype bfloat16 --max-rows 3 --max-batch-tokens 99 --max-queue 5"
    more = f"--max-images 3 --min-pixels 5 --max-pixels 7 --max-body 2 --revision main --host 0.0.0.0 --key-file {tmp_path / 'key'}"
    service, said = served(str(tmp_path / "run"), *options.split(), *more.split())
    assert (service.model, service.key, service.max_body, service.loopback) == ("small", KEY, 2 << 20, False)
    assert said.startswith("http://0.0.0.0:") and '"model": "small"; on cpu' in said and KEY not in said
    engine, batcher = service.batcher._engine, service.batcher
    assert (engine.max_rows, engine.max_tokens, engine.model.dtype) == (3, 99, torch.bfloat16)
    assert (batcher._max_rows, batcher._max_tokens, batcher._max_queue) == (3, 99, 5)
    assert (loaded[0]["revision"], loaded[1]["revision"]) == (None, "main")
    assert (loaded[0]["images"], loaded[1]["images"]) == (PixelLimits(), PixelLimits(5, 7))
    assert (service.pictures.most, service.pictures.text_only) == (3, "this model reads text only")
    assert not service.pictures.folder.exists()  # the server has ended
    assert batcher.closed

    monkeypatch.setenv("ZPPO_TEST_KEY", KEY)
    assert served(str(tmp_path / "run" / "final"), "--port", "0", "--key-env", "ZPPO_TEST_KEY")[0].key == KEY
    assert served(str(tmp_path / "run" / "final"), "--port", "0", "--host", "::", "--no-key")[0].key is None
    assert served(str(tmp_path / "run" / "final"), "--port", "0", "--host", "::1")[1].startswith("http://[::1]:")


def test_the_key_is_no_argument() -> None:
    assert "key" not in vars(cli._parser().parse_args(["serve", "tiny"]))


@pytest.mark.slow
def test_a_small_model_that_sees_has_its_own_limits(monkeypatch: pytest.MonkeyPatch, served: Callable[..., tuple[Any, str]]) -> None:
    loaded: list[Any] = []
    load = run.load
    monkeypatch.setattr(run, "load", lambda *a, **kw: (loaded.append(kw["images"]), load(*a, **kw))[1])
    assert served("lab:vision/teacher", "--port", "0")[0].pictures.text_only == ""
    for given in (["--max-pixels", "1024"], ["--min-pixels", "300"], ["--max-pixels", "100"], ["--min-pixels", "4000"]):
        served("lab:vision/teacher", "--port", "0", *given)
    sizes = [(256, 48 * 48), (256, 1024), (300, 48 * 48), (100, 100), (4000, 4000)]
    assert loaded == [PixelLimits(*size) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.long), True])
def test_what_does_not_end_in_time_is_answered(tmp_path: Path, stream: bool) -> None:
    """The grace of 30 seconds made a second: a batch that takes minutes, one that waits, and a body that is not whole."""
    path = make_tiny(tmp_path, max_position_embeddings=100_000)
    code = "import sys, zppo.serve.command as c; c._GRACE = 1; from zppo.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", str(path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        # 128 rows, since a row of a random model ends by itself after some hundred tokens, and a batch with the last of its rows.
        hello = {"model": str(path), "messages": [{"role": "user", "content": "1"}], "n": 128, "presence_penalty": -2, "stream": stream}
        with ThreadPoolExecutor(4) as pool, openai.DefaultHttpxClient(timeout=100) as http:
            asked = [pool.submit(http.post, f"{url}/chat/completions", json=hello | {"max_tokens": most}) for most in (90_000, 90_001)]
            wait_for(lambda: b'"waiting":1,"decoding":1' in http.get(url.removesuffix("v1") + "health").content)
            host, port = url.split("/")[2].split(":")
            with socket.create_connection((host, int(port))) as half:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
                half.sendall(head.encode())
                process.send_signal(signal.SIGTERM)
                answers = [future.result(60) for future in asked]
                if stream:
                    assert [a.status_code for a in answers] == [200, 200]
                    assert all('"code": "stopping"' in a.text and a.text.endswith("data: [DONE]\n\n") for a in answers)
                else:
                    assert [a.status_code for a in answers] == [503, 503] and answers[0].json()["error"]["code"] == "stopping"
                half.settimeout(60)
                half.sendall(b" " * 10)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err
    finally:
        process.kill()
        process.communicate()
