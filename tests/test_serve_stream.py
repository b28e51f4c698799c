"""`zppo serve` and chat front ends: streams, fields that ask for nothing, refusals that a client sees."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from conftest import make_tiny
from serving import QUESTION, URL, Gate, ask, connect, listening, service, texts, wait_for
from zppo.engines.chat import Chat


def stream(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    answer = client.post(URL, json={"model": "tiny", "messages": [QUESTION], "max_tokens": 8, "stream": True} | fields)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "") and all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stream_holds_what_a_whole_answer_does(client: TestClient) -> None:
    for fields in ({"n": 3}, {"n": 1, "logprobs": True}, {"temperature": 0, "stop": ["e"]}):
        whole = ask(client, seed=5, **fields)
        chunks = stream(client, seed=5, **fields)
        assert len({(c["id"], c["object"], c["model"]) for c in chunks}) == 1 and chunks[0]["object"] == "chat.completion.chunk"
        for choice in whole["choices"]:
            own = [part for c in chunks for part in c["choices"] if part["index"] == choice["index"]]
            assert own[0]["delta"]["role"] == "assistant"
            assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
            assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
            assert next((part["logprobs"] for part in own if part["logprobs"]), None) == choice["logprobs"]
        assert all("usage" not in c for c in chunks)
        *_, last = stream(client, seed=5, stream_options={"include_usage": True}, **fields)
        assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_a_stream_is_refused_before_it_begins(client: TestClient) -> None:
    assert ask(client, 400, stream=True, max_tokens=10_000)["error"]["code"] == "context_length_exceeded"
    assert texts(ask(client, stream=False, stream_options=None))


def test_an_error_after_the_beginning_is_an_event(chat: Chat) -> None:
    gate = Gate()
    served = service(gate, chat)
    with connect(served) as client, ThreadPoolExecutor(1) as pool:
        gate.sample = _fails  # type: ignore[method-assign]
        head, last = pool.submit(stream, client).result(30)
        assert head["choices"][0]["delta"]["role"] == "assistant"
        assert last["error"]["code"] == "decoding_failed"
    served.batcher.close(30)


def _fails(*_: object) -> Any:
    raise RuntimeError("no room")


def test_a_client_that_leaves_a_stream_ends_its_batch(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, max_position_embeddings=100_000)
    with listening(path, "k", max_body=1 << 20) as url:
        host, port = url.split("/")[2].split(":")
        body = json.dumps({"model": "tiny", "messages": [QUESTION], "max_tokens": 90_000, "presence_penalty": -2, "stream": True}).encode()
        with socket.create_connection((host, int(port))) as left:
            left.sendall(_head(host, len(body)) + body)
            assert b"text/event-stream" in left.recv(1 << 16)
        health = Watcher(url)
        wait_for(lambda: health.decoding() == 0, 60)


class Watcher:
    """Asks a real server how busy it is."""

    def __init__(self, url: str) -> None:
        self.host, port = url.split("/")[2].split(":")
        self.port = int(port)

    def decoding(self) -> int:
        with socket.create_connection((self.host, self.port)) as wire:
            wire.sendall(f"GET /health HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while part := wire.recv(1 << 16):
                answer += part
        return int(json.loads(answer.partition(b"\r\n\r\n")[2])["decoding"])


def _head(host: str, length: int) -> bytes:
    lines = [
        f"POST {URL} HTTP/1.1",
        f"Host: {host}",
        "Authorization: Bearer k",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0, "user": "me", "response_format": {"type": "text"}},
        {"frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"prediction": None, "a_field_of_tomorrow": None, "reasoning_effort": "none", "add_generation_prompt": True},
        {"frequency_penalty": None, "user": None, "response_format": None, "tools": None, "logit_bias": None, "service_tier": "auto"},
        {"store": False, "metadata": {}, "modalities": ["text"], "safety_identifier": "x", "prompt_cache_key": "y"},
        {"best_of": 1, "echo": False, "ignore_eos": False, "min_tokens": 0, "length_penalty": 1.0, "skip_special_tokens": True},
        {"messages": [{"role": "developer", "content": "Be brief."}, QUESTION]},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(client: TestClient, fields: dict[str, Any]) -> None:
    plain = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION]} if "messages" in fields else {}
    assert texts(ask(client, seed=1, **fields)) == texts(ask(client, seed=1, **plain))


@pytest.mark.parametrize("key", ["k", "wrong"])
def test_a_refusal_is_seen_by_a_client_that_is_still_sending(tmp_path: Path, key: str) -> None:
    """Where the connection were closed upon it, the system would throw the answer away."""
    path = make_tiny(tmp_path)
    with listening(path, "k", max_body=1 << 16) as url:
        host, port = url.split("/")[2].split(":")
        with socket.create_connection((host, int(port))) as wire:
            wire.sendall(_head(host, 64 << 20).replace(b"Bearer k", f"Bearer {key}".encode()))
            for _ in range(64):
                wire.sendall(b" " * (1 << 20))
            answer = wire.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 413" if key == "k" else b"HTTP/1.1 401")
