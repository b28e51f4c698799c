"""`zppo serve`: full queues, failing batches, clients that leave, and the end."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from conftest import make_tiny
from serving import CONTEXT, QUESTION, URL, Counting, Gate, ask, connect, service, texts, wait_for
from zppo.core.types import Message
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.serve.batcher import Batcher, StoppedError
from zppo.serve.command import load
from zppo.serve.protocol import LockedChat
from zppo.serve.server import _completed, make_app


def test_too_many_waiting_requests_are_told_to_come_back(chat: Chat) -> None:
    gate = Gate()
    served = service(gate, chat, max_queue=2)
    with connect(served) as client, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, client)]
        assert gate.entered.wait(30)
        running += [pool.submit(ask, client) for _ in range(2)]
        wait_for(lambda: client.get("/health").json() == {"status": "ok", "waiting": 2, "decoding": 1})
        answer = client.post(URL, json={"model": "tiny", "messages": [QUESTION], "max_tokens": 8})
        assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 60
        assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == ("rate_limit_error", "queue_full")
        gate.open.set()
        assert all(len(texts(future.result(30))) == 1 for future in running)
        assert texts(ask(client))


def test_a_request_that_cannot_be_decoded_fails_alone(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    def conversation(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "1" + " 2" * i}]

    poison = len(chat.encode([Message("user", conversation(3)[0]["content"])]))
    gate = Gate(poison)
    served = service(gate, chat)
    with connect(served) as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, client, 500 if i == 3 else 200, messages=conversation(i)) for i in range(8)]
        gate.open.set()
        error = answers[3].result(30)["error"]
        assert (error["type"], error["code"]) == ("server_error", "decoding_failed")
        assert "OutOfMemoryError: no room for the cache" in error["message"]
        assert all(len(texts(answer.result(30))) == 1 for i, answer in enumerate(answers) if i != 3)
        assert texts(ask(client)), "the server lives on"
    assert [record.getMessage() for record in caplog.records if record.name == "zppo.serve"] == [
        f"a request of {poison} tokens could not be decoded: OutOfMemoryError: no room for the cache"
    ]


def test_a_defect_is_a_500_in_the_same_shape(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    served = service(Gate(), chat)
    monkeypatch.setattr(LockedChat, "encode", lambda *_: 1 / 0)
    with TestClient(make_app(served), base_url="http://localhost", raise_server_exceptions=False) as client:
        error = ask(client, 500)["error"]
        assert (error["type"], error["code"]) == ("server_error", "defect") and "ZeroDivisionError" in error["message"]


def test_requests_of_unlike_sampling_take_turns_and_the_oldest_goes_first() -> None:
    gate = Gate()
    batcher = Batcher(cast(Any, gate), max_rows=4, max_tokens=60, max_queue=100)
    hot, cold = Sampling(max_new_tokens=5), Sampling(temperature=0, max_new_tokens=5)
    first = batcher.submit(SampleRequest((1,), (1,)), hot)
    assert gate.entered.wait(30)
    lengths = [2, 3, 4, 5, 6, 7, 40]  # 40 + 5 leaves no second row under 60; 7 rows of hot ones are more than 4
    jobs = [
        batcher.submit(SampleRequest((0,) * length, (1, 2) if length == 5 else (1,)), cold if length == 3 else hot) for length in lengths
    ]
    gate.open.set()
    for job in (first, *jobs):
        job.future.result(30)
    batcher.close()
    assert gate.batches == [[1], [2, 4, 5], [3], [6, 7], [40]]


def test_a_client_that_leaves_frees_its_place(chat: Chat) -> None:
    gate = Gate()
    served = service(gate, chat)
    gate.check = served.batcher.check
    body = json.dumps({"model": "tiny", "messages": [QUESTION], "max_tokens": 8}).encode()

    async def leave() -> list[Any]:
        sent: list[Any] = []
        left = asyncio.Event()
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": headers}
        messages = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            message = next(messages, None)
            if message is None:
                await left.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        answering = asyncio.ensure_future(make_app(served)(scope, receive, send))
        while not gate.entered.is_set():
            await asyncio.sleep(0.005)
        left.set()
        await answering
        return sent

    assert asyncio.run(leave())[0]["status"] == 499
    wait_for(lambda: served.batcher.load == (0, 0))
    assert gate.batches == []
    # One that still waits is dropped before it is decoded, and the batch of another one goes on.
    gate.entered.clear()
    running = served.batcher.submit(SampleRequest((1,), (1,)), Sampling())
    assert gate.entered.wait(30)
    waiting = served.batcher.submit(SampleRequest((1, 2), (1,)), Sampling())
    served.batcher.abandon(waiting)
    gate.open.set()
    assert running.future.result(30)
    wait_for(lambda: served.batcher.load == (0, 0))
    assert gate.batches == [[1]]


def test_closing_ends_a_running_batch_and_what_waits(chat: Chat) -> None:
    gate = Gate()
    served = service(gate, chat)
    gate.check = served.batcher.check
    with connect(served) as client, ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, client, 503)
        assert gate.entered.wait(30)
        waiting = pool.submit(ask, client, 503)
        wait_for(lambda: served.batcher.load == (1, 1))
        served.batcher.close(30)
        assert {f.result(30)["error"]["code"] for f in (running, waiting)} == {"stopping"}
        assert ask(client, 503)["error"]["type"] == "server_error"
        assert client.get("/health").status_code == 503
    with pytest.raises(StoppedError):
        served.batcher.submit(SampleRequest((1,), (1,)), Sampling())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_thread_that_dies_leaves_nobody_waiting() -> None:
    gate = Gate()
    gate.check = lambda: sys.exit("out of luck")
    batcher = Batcher(cast(Any, gate), max_rows=8, max_queue=8)
    job = batcher.submit(SampleRequest((1,), (1,)), Sampling())
    with pytest.raises(StoppedError):
        job.future.result(30)
    wait_for(lambda: batcher.closed)
    with pytest.raises(StoppedError):
        batcher.submit(SampleRequest((1,), (1,)), Sampling())
    batcher.close(30)


def test_a_real_model_stops_at_its_next_step_when_nobody_waits(tmp_path: Path) -> None:
    loaded = load(str(make_tiny(tmp_path, max_position_embeddings=CONTEXT)), device="cpu")
    counting = Counting(loaded.engine)
    counting.engine.eos_ids = frozenset({10**6})  # never ends by itself
    batcher = Batcher(cast(Any, counting), max_rows=8, max_queue=8)
    loaded.engine.watch = batcher.watch
    abandoned = threading.Event()

    def hold(*_: Any) -> None:
        if counting.steps == 4:
            assert abandoned.wait(60)

    counting.engine.model.register_forward_pre_hook(hold)
    job = batcher.submit(SampleRequest((1, 2, 3), (1,)), Sampling(max_new_tokens=CONTEXT))
    wait_for(lambda: counting.steps > 2)
    batcher.abandon(job)
    abandoned.set()
    wait_for(lambda: batcher.load == (0, 0))
    assert counting.steps < CONTEXT - 5
    following = batcher.submit(SampleRequest((1, 2, 3), (1,)), Sampling(max_new_tokens=3))
    assert len(following.future.result(30)) == 1
    batcher.close()


@pytest.mark.parametrize("stopping", [True, False])
def test_what_the_end_cuts_off_is_given_up_without_a_traceback(stopping: bool) -> None:
    """Told twice to end: the loop goes while a request still waits, which is answered. Cancelled by anybody else, it says so."""
    given_up: list[Any] = []
    job: Any = SimpleNamespace(future=Future())
    batcher: Any = SimpleNamespace(closed=stopping, abandon=given_up.append)
    request: Any = SimpleNamespace(receive=lambda: asyncio.sleep(60))

    async def cut_off() -> Any:
        task = asyncio.ensure_future(_completed(batcher, job, request))
        await asyncio.sleep(0)
        task.cancel()
        return await task

    with pytest.raises(StoppedError if stopping else asyncio.CancelledError):
        asyncio.run(cut_off())
    assert given_up == [job]
