"""`zppo serve`: what it answers, and that company in a batch changes nothing."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving import CONTEXT, QUESTION, Counting, ask, texts, wait_for
from zppo.core.draws import draw_key
from zppo.core.types import Message
from zppo.engines.base import Completion, SampleRequest, Sampling
from zppo.engines.chat import Chat
from zppo.serve.protocol import Body, read_body

pytestmark = pytest.mark.slow


def sampled(engine: Counting, chat: Chat, seed: int, n: int, sampling: Sampling) -> list[Completion]:
    prompt = chat.encode([Message("user", QUESTION["content"])])
    keys = tuple(draw_key(seed, "serve", i) for i in range(n))
    return engine.engine.sample([SampleRequest(prompt, keys)], sampling)[0]


def test_an_answer_is_the_engines_completion_in_the_protocols_shape(client: TestClient, engine: Counting, chat: Chat) -> None:
    answer = ask(client, n=80, seed=7, max_tokens=24, logprobs=True)
    expected = sampled(engine, chat, 7, 80, Sampling(max_new_tokens=24))
    assert texts(answer) == [chat.decode(c.ids.tolist()) for c in expected]
    assert [c["index"] for c in answer["choices"]] == list(range(80))
    reasons = [c["finish_reason"] for c in answer["choices"]]
    assert reasons == ["length" if c.truncated else "stop" for c in expected] and set(reasons) == {"length", "stop"}
    for choice, completion in zip(answer["choices"], expected, strict=True):
        listed = choice["logprobs"]["content"]
        assert [t["logprob"] for t in listed] == pytest.approx(completion.logprobs.tolist(), abs=1e-6)
        assert [t["token"] for t in listed] == [chat.show([i]) for i in completion.ids.tolist()]
        assert all(t["bytes"] is None or bytes(t["bytes"]).decode() == t["token"] for t in listed)
    prompt, new = len(chat.encode([Message("user", QUESTION["content"])])), sum(len(c.ids) for c in expected)
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and answer["id"].startswith("chatcmpl-")
    assert abs(answer["created"] - time.time()) < 100
    assert ask(client)["choices"][0]["logprobs"] is None


def test_a_seed_gives_the_same_answer_and_none_another_one(client: TestClient) -> None:
    three = texts(ask(client, n=3, seed=1, max_tokens=12))
    assert len(set(three)) == 3 and texts(ask(client, n=3, seed=1, max_tokens=12)) == three
    assert texts(ask(client, seed=1, max_tokens=12)) == three[:1]
    assert texts(ask(client, seed=2, max_tokens=12)) != three[:1]
    assert texts(ask(client, n=8, max_tokens=12)) != texts(ask(client, n=8, max_tokens=12))
    assert len(set(texts(ask(client, n=3, temperature=0)))) == 1


def test_company_in_a_batch_changes_nothing(client: TestClient, engine: Counting) -> None:
    asked: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{i} " * (i % 5 + 1)}], "seed": i, "n": i % 3 + 1, "max_tokens": 24} for i in range(16)
    ]
    engine.steps = 0
    alone = [texts(ask(client, **fields)) for fields in asked]
    steps_alone = engine.steps
    engine.batches.clear()
    engine.steps = 0
    with ThreadPoolExecutor(16) as pool:
        together = [texts(answer) for answer in pool.map(lambda fields: ask(client, **fields), asked)]
    assert together == alone
    assert len(engine.batches) < 8 and max(count for count, _ in engine.batches) > 2
    assert engine.steps < steps_alone / 2


def test_every_setting_reaches_the_engine(client: TestClient, engine: Counting) -> None:
    engine.batches.clear()
    settings: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "presence_penalty": 1.5,
        "repetition_penalty": 1.1,
    }
    ask(client, **settings, max_tokens=3)
    ask(client, max_tokens=None, max_completion_tokens=4, top_k=-1)
    ask(client, max_tokens=None, seed=3, temperature=None)
    expected = [Sampling(**settings, max_new_tokens=3), Sampling(max_new_tokens=4), Sampling(max_new_tokens=CONTEXT)]
    assert [sampling for _, sampling in engine.batches] == expected


def test_without_a_limit_an_answer_ends_with_the_context(client: TestClient) -> None:
    answer = ask(client, max_tokens=None, n=16, seed=0, presence_penalty=-2, logprobs=True)
    lengths = {c["finish_reason"]: len(c["logprobs"]["content"]) for c in answer["choices"]}
    assert answer["usage"]["prompt_tokens"] + lengths["length"] == CONTEXT


def test_a_stop_text_ends_the_answer_before_it(client: TestClient) -> None:
    plain = ask(client, seed=5, max_tokens=40, logprobs=True)
    (whole,) = texts(plain)
    first, second = whole[12:15], whole[6:8]
    for stop in (first, [first], ["never there", first, second]):
        choice = ask(client, seed=5, max_tokens=40, stop=stop, logprobs=True)["choices"][0]
        place = min(whole.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in whole)
        assert choice["message"]["content"] == whole[:place] and choice["finish_reason"] == "stop"
        listed = choice["logprobs"]["content"]
        assert listed == plain["choices"][0]["logprobs"]["content"][: len(listed)]
        assert len(listed) < len(plain["choices"][0]["logprobs"]["content"])
    stopped = ask(client, seed=5, max_tokens=40, stop=first)
    assert stopped["usage"] == plain["usage"], "what was decoded is what is counted"
    assert texts(ask(client, seed=5, max_tokens=40, stop="never there")) == [whole]


def test_text_parts_are_one_text(client: TestClient) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "3 plus 4?"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": ""}]
    split = ask(client, seed=1, messages=[*turns, {"role": "user", "content": parts}])
    whole = ask(client, seed=1, messages=[*turns, {"role": "user", "content": "What is\n3 plus 4?"}])
    assert texts(split) == texts(whole) and split["usage"] == whole["usage"]


def test_template_arguments_reach_the_template(client: TestClient, engine: Counting, chat: Chat) -> None:
    """The template opens the think block in the prompt: `content` begins inside it, as it was written."""
    thinking = Chat(chat.tokenizer, {"enable_thinking": True})
    assert "<think>" in chat.show(thinking.encode([Message("user", QUESTION["content"])])[-4:])
    for given_args, asked in (({"enable_thinking": True}, thinking), ({"enable_thinking": False}, chat), ({}, chat)):
        answer = ask(client, seed=3, chat_template_kwargs=given_args)
        assert answer["usage"]["prompt_tokens"] == len(asked.encode([Message("user", QUESTION["content"])]))
        assert texts(answer) == [chat.decode(c.ids.tolist()) for c in sampled(engine, asked, 3, 1, Sampling(max_new_tokens=8))]
    for i in range(20):  # a client cannot fill the memory with arguments
        ask(client, max_tokens=1, chat_template_kwargs={"enable_thinking": i})


def test_models_and_health(client: TestClient) -> None:
    (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == ("tiny", "model", CONTEXT)
    wait_for(lambda: client.get("/health").json() == {"status": "ok", "waiting": 0, "decoding": 0})


def test_sampling_of_a_body_is_frozen_and_equal_for_equal_settings() -> None:
    raw = json.dumps({"model": "m", "messages": [QUESTION], "top_p": 1}).encode()
    assert read_body(raw).sampling(7) == replace(Sampling(), max_new_tokens=7)


def test_the_page_about_it_names_every_field_and_every_option() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    for name in Body.model_fields:
        assert f"`{name}`" in page, name
    for option in ("--host", "--port", "--name", "--key-env", "--key-file", "--no-key", "--max-rows", "--max-queue"):
        assert option in page, option
