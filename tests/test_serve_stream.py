"""`zppo serve` and chat front ends: streams, fields that ask for nothing, refusals that a client sees."""

from __future__ import annotations

import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from conftest import make_tiny
from serving import CONTEXT, QUESTION, URL, Counting, Gate, ask, connect, listening, service, texts, wait_for
from serving import texts as texts_of
from zppo.core.types import Message
from zppo.engines.base import SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.http_client import httpx
from zppo.serve.batcher import Batcher
from zppo.serve.events import TextSoFar
from zppo.serve.protocol import LockedChat


def stream(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    answer = client.post(URL, json={"model": "tiny", "messages": [QUESTION], "max_tokens": 8, "stream": True} | fields)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "") and all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stream_holds_what_a_whole_answer_does(client: TestClient) -> None:
    for fields in ({"n": 3}, {"n": 1, "logprobs": True}, {"temperature": 0, "stop": ["e"]}, {"n": 4, "stop": ["a", "th", "\ufffd"]}):
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


def test_text_is_sent_while_it_is_decoded(tmp_path: Path) -> None:
    """The model goes on only when the client has some of the text."""
    path, seen = make_tiny(tmp_path, max_position_embeddings=CONTEXT), threading.Event()
    with listening(path, "k") as url, httpx.Client(headers={"Authorization": "Bearer k"}, timeout=60) as http:
        steps: list[bool] = []
        listening.engine.model.register_forward_pre_hook(  # type: ignore[attr-defined]
            lambda *_: steps.append(len(steps) < 40 or seen.wait(60))
        )
        fields = {"model": "tiny", "messages": [QUESTION], "max_tokens": 100, "seed": 3, "n": 2, "presence_penalty": -2}
        parts: dict[int, list[str]] = {0: [], 1: []}
        with http.stream("POST", f"{url}/chat/completions", json=fields | {"stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        parts[choice["index"]].append(choice["delta"].get("content", ""))
                if all(map(any, parts.values())):
                    seen.set()
        assert len(steps) > 40 and all(steps)
        whole = http.post(f"{url}/chat/completions", json=fields | {"logprobs": True}).json()
        assert ["".join(texts) for texts in parts.values()] == texts_of(whole)
        # A choice that went on after the model had waited has a piece from before and one from after; a shorter one may be one piece.
        lengths = [len(choice["logprobs"]["content"]) for choice in whole["choices"]]
        assert max(lengths) > 50 and all(sum(map(bool, texts)) > 1 for texts, n in zip(parts.values(), lengths, strict=True) if n > 50)


def test_rows_of_a_client_that_left_are_freed(served: tuple[Counting, Chat]) -> None:
    """The others of its batch go on as they would without it."""
    counting, chat = served
    engine, rows = counting.engine, list[int]()
    ids = chat.encode([Message("user", QUESTION["content"])])
    hook = engine.model.register_forward_pre_hook(lambda *given: rows.append(len(given[-1]["input_ids"])), with_kwargs=True)
    sampling = Sampling(max_new_tokens=40, presence_penalty=-2)
    gate = Gate()
    batcher = Batcher(cast(Any, gate), max_rows=64, max_queue=9)
    try:
        first = batcher.submit(SampleRequest(ids, (9,)), sampling)
        assert gate.entered.wait(30)
        stays = batcher.submit(SampleRequest(ids, (1, 2)), sampling, lambda step, drawn: told.append((step, list(drawn))))
        told: list[tuple[int, list[tuple[int, int]]]] = []
        leaves: Any = batcher.submit(
            SampleRequest(ids, (3, 4, 5)), sampling, cast(Any, lambda step, drawn: step == 10 and batcher.abandon(leaves))
        )
        batcher._engine, engine.watch = engine, batcher.watch
        gate.open.set()
        kept = stays.future.result(60)
        assert first.future.done()
    finally:
        hook.remove()
        engine.watch = None
        gate.open.set()
        batcher.close(30)
    assert max(rows[1:10]) == 5 and max(rows[12:]) == 2
    alone = engine.sample([SampleRequest(ids, (1, 2))], sampling)[0]
    assert [c.ids.tolist() for c in kept] == [c.ids.tolist() for c in alone]
    assert [[t for _, drawn in told for choice, t in drawn if choice == i] for i in (0, 1)] == [c.ids.tolist() for c in kept]
    assert [step for step, _ in told] == list(range(len(told)))


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: a space at the beginning of a text is no part of it, and bytes stand for characters that it does not know."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcde", "▁", "▁a", "▁the", "ab", "▁▁"]
    own = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_pieces_of_any_tokens_join_to_the_whole_text(chat: Chat, kind: str) -> None:
    """Characters of several tokens, broken ones, spaces, stop texts over several tokens, one within the other."""
    words = LockedChat(chat if kind == "bytes" else Chat(sentencepiece()))
    size = len(chat.tokenizer) if kind == "bytes" else 267
    draw = random.Random(5)
    sent_early = 0
    for _ in range(150):
        ids = [draw.choice([draw.randrange(size), draw.randrange(size - 12, size)]) for _ in range(40)]
        for letter in "äé語🙂" if kind == "sentencepiece" else "":
            place = draw.randrange(len(ids))
            ids[place:place] = [1 + byte for byte in letter.encode()]
        whole = words.decode(ids)
        start = draw.randrange(len(whole))
        stop = draw.choice(
            [[], [whole[start : start + draw.randrange(1, 9)]], [whole[start + 2 : start + 4] or "x", whole[start : start + 9]]]
        )
        text = whole[: min((p for p in map(whole.find, stop) if p >= 0), default=len(whole))]
        feed, said, count = TextSoFar(words, stop), "", 0
        while count < len(ids):
            count = min(len(ids), count + draw.randrange(1, 4))
            said += feed.more(ids[:count])
            assert text.startswith(said) and len(said) == feed.sent
        sent_early += len(said)
        assert said + text[feed.sent :] == text
    assert sent_early > 150 * 10


@pytest.mark.parametrize("name", ["seed", "n", "top_k", "max_tokens", "max_completion_tokens", "top_logprobs"])
def test_whole_numbers_as_json_has_them(client: TestClient, name: str) -> None:
    value = 0 if name == "top_logprobs" else 2
    fields: dict[str, Any] = {"seed": 1} | ({"max_tokens": None} if name == "max_completion_tokens" else {})
    assert texts(ask(client, **fields | {name: float(value)})) == texts(ask(client, **fields | {name: value}))
    for wrong in (value + 0.5, True, str(value), 1e300):
        if name != "seed" or wrong is not True:
            assert f"{name} is " in ask(client, 400, **fields | {name: wrong})["error"]["message"]


def test_a_stream_is_refused_before_it_begins(client: TestClient) -> None:
    assert ask(client, 400, stream=True, max_tokens=10_000)["error"]["code"] == "context_length_exceeded"
    assert texts(ask(client, stream=False, stream_options=None))


def test_an_error_after_the_beginning_is_an_event(chat: Chat) -> None:
    gate = Gate()
    served = service(gate, chat)
    with connect(served) as client, ThreadPoolExecutor(1) as pool:
        gate.sample = _fails  # type: ignore[method-assign, assignment]
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
        {"max_completion_tokens": 8, "verbosity": "medium", "typical_p": 1, "mirostat": 0},
        {"messages": [{"role": "developer", "content": "Be brief."}, QUESTION]},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(client: TestClient, fields: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION]} if "messages" in fields else {}
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
