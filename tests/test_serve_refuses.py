"""`zppo serve`: every request that it refuses, and how it says so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serving import CONTEXT, QUESTION, URL, Counting, ask, connected, texts
from zppo.engines.chat import Chat
from zppo.serve.protocol import MAX_CHOICES, RequestError, read_body

WRONG = [
    ({"model": 3}, "model", "model is 3; it must be the name"),
    ({"model": None}, "model", "model is missing"),
    ({"messages": None}, "messages", "messages is missing"),
    ({"messages": []}, "messages", "messages is []"),
    ({"messages": "hi"}, "messages", 'messages is "hi"; it must be a list'),
    ({"messages": ["hi"]}, "messages[0]", 'messages[0] is "hi"'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "messages[0].role is missing"),
    ({"messages": [QUESTION | {"role": "tool"}]}, "messages[0].role", '"tool"; it must be system, user or assistant'),
    ({"messages": [QUESTION | {"weight": 1}]}, "messages[0].weight", "it knows role, content"),
    ({"messages": [QUESTION | {"content": None}]}, "messages[0].content", "messages[0].content is null"),
    (
        {"messages": [QUESTION | {"content": [{"type": "video", "video": "a"}]}]},
        "messages[0].content",
        'part 0 is no text part and no image part: it is of type "video", and this server reads texts and images',
    ),
    ({"messages": [QUESTION | {"content": [{"type": "text", "text": 3}]}]}, "messages[0].content", "part 0 is 3"),
    ({"messages": [QUESTION | {"content": [{"type": "text"}]}]}, "messages[0].content", "part 0 is no text part and"),
    ({"n": 0}, "n", "n is 0; it must be an integer from 1 to 128"),
    ({"n": MAX_CHOICES + 1}, "n", "n is 129"),
    ({"n": 1.5}, "n", "n is 1.5"),
    ({"n": True}, "n", "n is true"),
    ({"temperature": -1}, "temperature", "temperature is -1; it must be 0 (greedy), or a number from 0.01 to 2"),
    ({"temperature": 2.5}, "temperature", "2.5"),
    ({"temperature": 1e-40}, "temperature", "1e-40"),
    ({"temperature": "1"}, "temperature", '"1"'),
    ({"temperature": True}, "temperature", "true"),
    ({"top_p": 1.1}, "top_p", "top_p is 1.1; it must be a number from 0 to 1"),
    ({"top_k": -2}, "top_k", "top_k is -2"),
    ({"top_k": 2.5}, "top_k", "top_k is 2.5"),
    ({"min_p": 2}, "min_p", "min_p is 2"),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty is 3"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be a positive integer"),
    ({"max_completion_tokens": -3, "max_tokens": None}, "max_completion_tokens", "-3"),
    ({"max_completion_tokens": 3}, "max_tokens", "they mean the same; send one"),
    ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
    ({"seed": "a"}, "seed", 'seed is "a"'),
    ({"stop": ""}, "stop[0]", "not empty"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": [3]}, "stop[0]", "stop[0] is 3"),
    ({"logprobs": 5}, "logprobs", "logprobs is 5; it must be true or false"),
    ({"top_logprobs": 3}, "top_logprobs", "only the log-prob of the drawn token itself is kept"),
    ({"stream": "yes"}, "stream", 'stream is "yes"; it must be true or false'),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    ({"stream_options": {"more": True}}, "stream_options.more", "no field"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "chat_template_kwargs is []"),
    ({"tolls": []}, "tolls", "tolls is no field that this server knows; it knows model, messages, n, temperature"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is 0.5, which this server cannot do; it takes 0"),
    ({"echo": 0}, "echo", "it takes false"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'it takes {"type": "text"} or "text"'),
    ({"tools": [{"type": "function"}]}, "tools", "it takes []"),
    ({"tool_choice": "required"}, "tool_choice", 'it takes "none" or "auto"'),
    ({"user": 5}, "user", "no field that this server knows"),
    ({"unheard_of": 1}, "unheard_of", "no field that this server knows"),
    ({"x" * 500: "y" * 500}, "x" * 80 + "... (500 characters)", "(500 characters)"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize is no argument of a chat template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "cannot render"),
]


@pytest.mark.parametrize(("fields", "param", "said"), WRONG, ids=lambda v: str(v)[:40])
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    client: TestClient, fields: dict[str, Any], param: str, said: str
) -> None:
    error = ask(client, 400, **fields)["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert said in error["message"] and len(error["message"]) < 700
    assert error["code"] in ("invalid_value", "unknown_field", "missing_field", "template_refused")


def test_several_wrong_fields_are_named_at_once(client: TestClient) -> None:
    message = ask(client, 400, n=0, top_p=2, foo=1, seed="x", stop=3, min_p=-1)["error"]["message"]
    assert all(part in message for part in ("n is 0", "top_p is 2", "min_p is -1", 'seed is "x"', "stop is 3", "and 1 more"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "tiny", "temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b"\x00",
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_a_body_that_is_no_json_object_is_refused(client: TestClient, raw: bytes) -> None:
    answer = client.post(URL, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json", answer.text


def test_huge_numbers_are_wrong_values_not_crashes(client: TestClient) -> None:
    for number in (b"1e400", b"9" * 400, b"-1e400"):
        raw = b'{"model": "tiny", "messages": [], "temperature": ' + number + b"}"
        answer = client.post(URL, content=raw, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and "temperature is " in answer.json()["error"]["message"]


def test_a_conversation_that_does_not_fit_is_refused(client: TestClient) -> None:
    error = ask(client, 400, messages=[{"role": "user", "content": "x " * 300}])["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert f"the model's context holds {CONTEXT}" in error["message"]
    error = ask(client, 400, max_tokens=CONTEXT - 1)["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert f"{CONTEXT - 1} new ones are asked for" in error["message"]


def test_wrong_models_routes_and_types_are_refused(client: TestClient) -> None:
    error = ask(client, 404, model="other")["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model") and "'tiny'" in error["message"]
    assert len(ask(client, 404, model="x" * 10_000)["error"]["message"]) < 300
    assert len(ask(client, 400, chat_template_kwargs={"chat_template": "x" * 10_000})["error"]["message"]) < 600
    assert len(ask(client, 400, chat_template_kwargs={"messages": "x" * 10_000})["error"]["message"]) < 600
    for answer in (client.get("/v1/nothing"), client.get(URL), client.post("/health")):
        assert answer.status_code in (404, 405) and "there are POST /v1/chat" in answer.json()["error"]["message"]
    answer = client.post(URL, content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and "'text/plain'" in answer.json()["error"]["message"]


def test_a_template_may_refuse_a_conversation(engine: Counting, chat: Chat) -> None:
    strict = Chat(chat.tokenizer, template="{{ raise_exception('no system turns') if messages[0].role == 'system' }}hi")
    bare = Chat(chat.tokenizer)
    bare.template = None
    system = [{"role": "system", "content": "Be brief."}]
    with connected(engine, strict) as client:
        error = ask(client, 400, messages=system)["error"]
        assert (error["code"], error["param"]) == ("template_refused", "messages") and "no system turns" in error["message"]
    with connected(engine, bare) as client:
        assert texts(ask(client, messages=system))
        error = ask(client, 400, chat_template_kwargs={"enable_thinking": True})["error"]
        assert "no chat template" in error["message"]


def test_a_large_body_is_refused_however_it_comes(engine: Counting, chat: Chat) -> None:
    large = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    headers = {"Content-Type": "application/json"}
    with connected(engine, chat, max_body=1000) as client:
        for content in (large, iter([large[:900], large[900:]])):
            answer = client.post(URL, content=content, headers=headers)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert texts(ask(client))


def test_with_a_key_only_its_holder_is_served(engine: Counting, chat: Chat) -> None:
    key = "a-long-secret"
    with connected(engine, chat, key=key) as client:
        for sent in (None, "", key, f"Basic {key}", "Bearer", f"Bearer {key}x", f"Bearer {key[:-1]}", "Bearer ünï"):
            headers: dict[str, Any] = {} if sent is None else {"Authorization": sent.encode()}
            for answer in (client.get("/v1/models", headers=headers), client.post(URL, content=b"x", headers=headers)):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert key not in answer.text
        assert client.get("/health").status_code == 200
        client.headers["Authorization"] = f"Bearer {key}"
        assert texts(ask(client)) and client.get("/v1/models").status_code == 200


def test_without_a_key_only_own_names_are_answered(engine: Counting, chat: Chat) -> None:
    """A page of another site may point its own name at 127.0.0.1."""
    for loopback, host, status in (
        (True, "evil.example:8000", 403),
        (True, "", 403),
        (True, "localhost:8000", 200),
        (True, "[::1]:8000", 200),
        (False, "evil.example:8000", 200),
    ):
        with connected(engine, chat, loopback=loopback) as client:
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host


# --- hostile bodies -----------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
part = st.fixed_dictionaries({"type": st.just("text") | anything, "text": st.text(max_size=9)}) | anything
turn = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant"]) | anything,
        "content": st.text(max_size=9) | st.lists(part, max_size=3) | anything,
    }
)
fields = st.fixed_dictionaries(
    {"model": st.just("tiny"), "messages": st.lists(turn, min_size=1, max_size=3), "max_tokens": st.just(2)},
    optional={
        "n": st.integers(1, 3) | anything,
        "temperature": st.floats(0, 2) | anything,
        "top_p": st.floats(0, 1) | anything,
        "top_k": st.integers(-1, 500) | anything,
        "min_p": st.floats(0, 1) | anything,
        "presence_penalty": st.floats(-2, 2) | anything,
        "repetition_penalty": st.floats(0.1, 10) | anything,
        "seed": st.integers(-(2**63), 2**63 - 1) | anything,
        "stop": st.text(max_size=2) | st.lists(st.text(max_size=2)) | anything,
        "logprobs": st.booleans() | anything,
        "chat_template_kwargs": st.dictionaries(st.text(max_size=8) | st.just("tools"), anything, max_size=2) | anything,
    },
)


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(body=fields | anything)
def test_no_json_body_is_a_500(client: TestClient, body: Any) -> None:
    raw = json.dumps(body).encode()
    answer = client.post(URL, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"] and error["code"] and error["type"] == "invalid_request_error"


@settings(max_examples=200)
@given(raw=st.binary(max_size=60))
def test_no_bytes_get_past_the_reader_by_another_error(raw: bytes) -> None:
    with pytest.raises(RequestError):
        read_body(raw)
