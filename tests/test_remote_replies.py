"""Replies as servers send them: contents in parts, thoughts alone, refusals, errors in a reply, empty accounts, packed bodies."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any, cast

import pytest

from fault_server import Server
from test_remote import HOW, ask, hurry, make, many, pings, server, shared, take_service, words  # noqa: F401 - fixtures
from test_remote_check import USES, checked, refused
from zppo.engines.base import Sampling
from zppo.errors import EvaluationError
from zppo.evals.endpoint import find_model
from zppo.teacher.interface import TeacherSampling
from zppo.teacher.reply import split_content

pytestmark = pytest.mark.slow


def replied(finish: str | None = "stop", choice: dict[str, Any] | None = None, **message: Any) -> dict[str, Any]:
    """A fault: a reply with this message."""
    choices = [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **(choice or {})}]
    return {"kind": "reply", "reply": json.dumps({"choices": choices})}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([text("a "), text("b")], "a b"),
        ([{"type": "thinking", "thinking": [text("hm")]}, text("b")], "b"),
        ([{"type": "thinking", "thinking": "hm", "closed": True}, text("b")], "b"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "b"}], "b"),
        ([text("b"), {"type": "reference", "reference_ids": [1]}, {"type": "image_url", "image_url": "x"}], "b"),
        ([text("half a \ud83d")], "half a ?"),
    ],
)
def test_a_content_in_parts_is_its_texts(server: Server, make: Any, content: Any, expected: str) -> None:  # noqa: F811
    server.control(replied(content=content))
    (reply,) = make(server).complete([ask("x")], HOW)
    assert (reply.texts, reply.error, len(server.log)) == ((expected,), "", 1)


@pytest.mark.parametrize("content", [["a", "list"], [7], [{"text": "no type"}], [{"type": ["text"]}], {"type": "text"}, 7, True])
def test_a_content_of_another_shape_is_asked_for_again(server: Server, make: Any, content: Any) -> None:  # noqa: F811
    server.control(replied(content=content))
    (reply,) = make(server).complete([ask("x")], HOW)
    assert (reply.texts, len(server.log)) == ((words("x"),), 2)


def test_odd_parts_break_nothing() -> None:
    assert split_content([{"type": "thinking"}, {"type": "thinking", "thinking": {"a": 1}}, {"type": "text"}, text("b")]) == ("b", "")
    assert split_content(None) == ("", "") and split_content(5) == (None, "")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "reasoning_details"])
@pytest.mark.parametrize("content", [None, "", "\n\n", [{"type": "thinking", "thinking": "all of it"}]])
def test_thoughts_alone_are_said_once(server: Server, make: Any, field: str, content: Any) -> None:  # noqa: F811
    warnings: list[str] = []
    teacher = make(server, warn=warnings.append)
    server.control(*[replied(content=content, **cast(Any, {field: [{"text": "all"}] if field.endswith("s") else "the whole answer"}))] * 3)
    for _ in range(3):
        (reply,) = teacher.complete([ask("x")], HOW)
        assert (reply.texts[0] or "").strip() == "" and reply.texts[0] is not None  # the model ended by itself, so it is wrong
    (warning,) = warnings
    assert "a reply has thoughts and no text" in warning and "--reasoning-parser" in warning


def test_the_start_says_that_there_are_thoughts_alone(server: Server) -> None:  # noqa: F811
    server.control(always=replied(content=None, reasoning_content="ok"))
    (warning,), _ = checked(server.url, key="")
    assert "a reply has thoughts and no text" in warning


def test_the_start_says_that_thinking_cannot_be_turned_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    server.control(always=replied("length", content=None, reasoning_content="Let me think"))
    (warning,), _ = checked(server.url, key="")  # of the two uses, one asked for it
    assert "'tiny' thinks although enable_thinking: false was sent" in warning and "teacher.compression.extra_body" in warning
    monkeypatch.setitem(USES, "compression", (TeacherSampling(Sampling(max_new_tokens=8)), 1))
    assert checked(server.url, key="")[0] == []


def test_a_refusal_is_no_completion(server: Server, make: Any) -> None:  # noqa: F811
    server.control(always=replied(content=None, refusal="I can't help with that."))
    (reply,) = make(server).complete([ask("x")], HOW)
    assert reply.texts == (None,) and len(server.log) == 1
    assert 'the model refuses: "I can\'t help with that."' in reply.error
    (warning,), _ = checked(server.url, key="")
    assert "the model refuses" in warning


@pytest.mark.parametrize(
    "error", [{}, {"error": {"code": "insufficient_quota"}, "status": 429}, {"error": {"type": "insufficient_quota"}, "status": 429}]
)
def test_an_empty_account_is_said_and_not_waited_for(server: Server, make: Any, error: dict[str, Any]) -> None:  # noqa: F811
    server.control(always={"kind": "status", "status": 402, "body": "Insufficient Balance", **error})
    (reply,) = make(server).complete([ask("x")], HOW)
    assert reply.texts == (None,) and "Insufficient Balance" in reply.error and len(server.log) == 1
    said = refused(server.url, key="sk-an-empty-account")
    assert "teacher.key_env: the account of the key in SOME_KEY has no credit left" in said and "Top it up" in said
    with pytest.raises(EvaluationError, match="no credit left: top it up"):
        find_model(server.url, "sk-an-empty-account", None, "judge")


def test_an_empty_account_passes_requests_on(server: Server, make: Any) -> None:  # noqa: F811
    other = Server()
    try:
        server.control(always={"kind": "status", "status": 402})
        (reply,) = make(server, other).complete([ask("x")], HOW)
        assert reply.texts == (words("x"),)
    finally:
        other.kill()


def test_an_overloaded_server_is_waited_for_and_said(server: Server, make: Any) -> None:  # noqa: F811
    overloaded = {"kind": "status", "status": 529, "body": "Overloaded"}
    server.control(*[overloaded] * 3)
    (reply,) = make(server).complete([ask("x")], HOW)
    assert (reply.texts, len(server.log)) == ((words("x"),), 4)
    server.control(always=overloaded)
    said = refused(server.url, key="")
    assert "is not served" in said and "status 529: Overloaded" in said and "busy or out of order" in said and "Start its" not in said


@pytest.mark.parametrize(
    ("error", "requests", "said"),
    [
        ({"message": "Provider returned error", "code": 502}, 2, "code 502): Provider returned error"),
        ({"message": "Rate limit exceeded", "code": "429"}, 2, "code 429): Rate limit exceeded"),
        ({"message": "no"}, 2, "code 500): no"),
        ("it broke", 2, "it broke"),
        ({"message": "bad field", "code": 400}, 1, "code 400): bad field"),
        ({"message": "pay", "code": 402}, 1, "code 402): pay"),
        ({"message": "bad key", "code": "invalid_api_key"}, 1, "code 401): bad key"),
        ({"message": "bad key", "status": "UNAUTHENTICATED"}, 1, "code 401): bad key"),
        ({"message": "wait", "type": "overloaded_error"}, 2, "code 529): wait"),
        ({"code": [1], "type": {"a": 1}}, 2, "{'code': [1]"),
    ],
)
def test_an_error_within_a_reply_is_one(server: Server, make: Any, error: Any, requests: int, said: str) -> None:  # noqa: F811
    fault = {"kind": "reply", "reply": json.dumps({"error": error})}
    server.control(fault)
    (reply,) = make(server).complete([ask("x")], HOW)
    assert len(server.log) == requests
    assert reply.texts == ((words("x") if requests > 1 else None),)
    server.control(always=fault)
    assert "an error in a reply of status 200 (" in refused(server.url, key="")
    with pytest.raises(EvaluationError) as caught:
        find_model(server.url, "", None, "model")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        [{"error": {"code": 400, "message": "API key not valid. Please pass one.", "status": "INVALID_ARGUMENT"}}],
        {"error": "Incorrect API key provided"},
        {"code": "400", "error": {"message": "No api key passed in."}},
    ],
)
def test_a_wrong_key_that_is_called_a_bad_request(server: Server, make: Any, body: Any) -> None:  # noqa: F811
    server.control(always={"kind": "bytes", "status": 400, "hex": json.dumps(body).encode().hex()})
    said = refused(server.url, key="")
    assert said.startswith("teacher.key_env: ") and "status 400: " in said and "[{" not in said


def test_other_errors_within_a_reply(server: Server, make: Any) -> None:  # noqa: F811
    choice = replied(None, {"error": {"message": "upstream died", "code": 502}}, content="")
    server.control(choice, {"kind": "reply", "reply": json.dumps({"object": "error", "message": "old form", "code": 40303})})
    (reply,) = make(server).complete([ask("x")], HOW)
    assert (reply.texts, len(server.log)) == ((words("x"),), 3)
    server.control(*[choice] * 3)
    (reply,) = make(server).complete([ask("x")], HOW)
    assert reply.texts == (None,) and "upstream died" in reply.error


def test_packed_replies_are_read_within_the_limit(server: Server, make: Any) -> None:  # noqa: F811
    packed = replied(content="packed") | {"kind": "gzip"}
    teacher = make(server)
    server.control(packed)
    (reply,) = teacher.complete([ask("x")], HOW)
    assert reply.texts == ("packed",)
    for encoding in ("br", "zstd", "gzip, br"):
        server.control({"kind": "gzip", "encoding": encoding})
        (reply,) = teacher.complete([ask("x")], HOW)
        assert reply.texts == (None,) and f"the reply is compressed ({encoding})" in reply.error and "turn compression off" in reply.error
    assert take_service(teacher).oversized == 0
    server.control(always={"kind": "gzip", "encoding": "br"})
    said = refused(server.url, key="")
    assert "teacher.base_urls: " in said and "turn compression off in the server, or in the proxy before it" in said


@pytest.mark.parametrize("fault", [{"instead": "no gzip"}, {"instead": ""}, {"reply": '{"choices": [{}]}', "cut": 12}])
def test_what_says_that_it_is_packed_and_is_not(server: Server, make: Any, fault: dict[str, Any]) -> None:  # noqa: F811
    server.control({"kind": "gzip", **fault})
    (reply,) = make(server).complete([ask("x")], HOW)
    assert (reply.texts, len(server.log)) == ((words("x"),), 2)


def test_a_refusal_among_the_parts_is_one_too(server: Server, make: Any) -> None:  # noqa: F811
    server.control(always=replied(content=[{"type": "refusal", "refusal": "not this"}]))
    (reply,) = make(server).complete([ask("x")], HOW)
    assert reply.texts == (None,) and "the model refuses: 'not this'" in reply.error


# --- replies of status 200 that are no completion ---------------------------------------------------------------------------

NONE: dict[str, tuple[Any, str]] = {
    "another API": ({"id": "x", "text": "an answer of another API"}, "no chat completion"),
    "detail": ({"detail": "quota exceeded"}, "quota exceeded"),
    "message": ({"message": "log in first"}, "log in first"),
    "Message": ({"Message": "not authorised"}, "not authorised"),
    "msg": ({"code": 1001, "msg": "quota exhausted", "success": False}, "quota exhausted"),
    "errors": ({"errors": [{"message": "bad account"}], "choices": []}, "bad account"),
    "no choices": ({"object": "chat.completion", "choices": []}, "a chat completion without choices"),
    "null choices": ({"choices": None, "usage": None}, "a chat completion without choices"),
    "no field of them": ({"id": "x", "object": "chat.completion", "usage": 7}, "no chat completion"),
    "choices of a wrong type": ({"choices": {"message": {"content": "x"}}}, "no chat completion"),
    "choices in words": ({"choices": "hello"}, "no chat completion"),
    "null among the choices": ({"choices": [None, None]}, "no chat completion"),
    "an empty choice": ({"choices": [{"index": 0}]}, "a chat completion without a message"),
    "no message": ({"choices": [{"message": None, "finish_reason": "stop"}]}, "a chat completion without a message"),
    "nothing in the message": ({"choices": [{"message": {"role": "assistant", "content": None}}]}, "a chat completion without a message"),
    "the older API": ({"choices": [{"text": "hello", "finish_reason": "stop"}]}, "the older API, /completions"),
    "a chunk": ({"choices": [{"delta": {"content": "hello"}, "finish_reason": "stop"}]}, "a stream, which was not asked for"),
    "a stream": ('data: {"choices": [{"delta": {}}]}\n\ndata: [DONE]\n\n', "a stream, which was not asked for"),
    "Ollama's": ({"model": "x", "message": {"role": "assistant", "content": "hi"}, "done": True}, "Ollama's own API"),
    "a list": ([{"generated_text": "hello"}], '[{"generated_text": "hello"}]'),
    "a text": ('"hello"', "hello"),
    "nothing": ("", "an empty body"),
    "white space": (" \n", "an empty body"),
    "a page": ("<!DOCTYPE html><title>Log in</title>", "a web page (the address may lack its path"),
}


def plain(body: Any) -> dict[str, Any]:
    return {"kind": "reply", "reply": body if isinstance(body, str) else json.dumps(body)}


@pytest.mark.parametrize("name", NONE)
def test_a_reply_of_status_200_that_is_no_completion(server: Server, make: Any, name: str) -> None:  # noqa: F811
    """It shows at the start: the server is there, so that nobody is sent to start it. In a run it is tried again."""
    body, said = NONE[name]
    server.control(always=plain(body))
    told = refused(server.url, key="")
    assert said in told and "Start its server" not in told and "the model 'tiny' is not served" in told
    with pytest.raises(EvaluationError, match="busy or out of order: try again when it serves, or correct the address"):
        find_model(server.url, "", None, "judge")
    server.control(plain(body))
    (reply,) = make(server).complete([ask("x")], HOW)
    assert (reply.texts, len(server.log)) == ((words("x"),), 2)


@pytest.mark.parametrize("name", ["no choices", "null choices", "an empty choice", "nothing", "a page", "the older API"])
def test_a_server_that_gives_no_completions_rests(server: Server, make: Any, name: str) -> None:  # noqa: F811
    """As one that answers 503: later calls neither ask nor wait."""
    teacher = make(server, retry_for=0.5)
    server.control(always=plain(NONE[name][0]))
    assert all(r.texts == (None, None) and NONE[name][1] in r.error for r in teacher.complete(many(10), HOW))
    assert take_service(teacher).retries > 0
    for _ in range(5):
        assert all("unreachable for" in r.error and NONE[name][1] in r.error for r in teacher.complete(many(5), HOW))
    service = take_service(teacher)
    assert (service.requests, service.given_up, service.short) == (0, 25, 0) and pings(server.log) >= 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (replied("content_filter", content=None), "a filter kept the text back"),
        (replied("tool_calls", content=None, tool_calls=[{}]), "calls a tool and says nothing"),
        (replied(content={"text": "a"}), "the content of a choice is no text"),
        (replied(content=7), "the content of a choice is no text ('7')"),
        (replied(), "'tiny' answers `Say ok.` with an empty text"),
        (replied(content=""), "'tiny' answers `Say ok.` with an empty text"),
        (replied(content=None), "'tiny' answers `Say ok.` with an empty text"),
    ],
)
def test_the_start_says_once_what_else_is_odd_about_the_replies(server: Server, fault: dict[str, Any], said: str) -> None:  # noqa: F811
    server.control(always=fault)
    (warning,), _ = checked(server.url, key="")  # of two uses
    assert said in warning


PACKED = json.dumps({"choices": [{"message": {"content": "packed"}, "finish_reason": "stop"}]}).encode()
RAW = zlib.compressobj(wbits=-zlib.MAX_WBITS)
PACKINGS = {
    "gzip, not said": (gzip.compress(PACKED), ""),
    "deflate, not said": (zlib.compress(PACKED), ""),
    "deflate, said": (zlib.compress(PACKED), "deflate"),
    "deflate, without its header": (RAW.compress(PACKED) + RAW.flush(), "deflate"),
    "gzip, said in capitals": (gzip.compress(PACKED), "GZIP"),
    "said, and not packed": (PACKED, "gzip"),
    "identity": (PACKED, "identity"),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_a_packed_reply_is_told_by_its_bytes(server: Server, make: Any, name: str) -> None:  # noqa: F811
    body, encoding = PACKINGS[name]
    server.control({"kind": "bytes", "hex": body.hex(), "encoding": encoding})
    (reply,) = make(server).complete([ask("x")], HOW)
    assert (reply.texts, len(server.log)) == (("packed",), 1)


def test_an_oversized_reply_that_does_not_say_that_it_is_packed(server: Server, make: Any) -> None:  # noqa: F811
    server.control({"kind": "bytes", "hex": gzip.compress(b" " * 10_000_000).hex()})
    teacher = make(server)
    (reply,) = teacher.complete([ask("x")], HOW)
    assert "the reply is longer than" in reply.error and take_service(teacher).oversized == 1


@pytest.mark.parametrize(
    ("start", "said"), [("28b52ffd2400", "is compressed (zstd)"), ("1b2f000024c2e299", "the reply is no text"), ("ff" * 9, "is no text")]
)
def test_packings_that_are_not_read_and_not_said(server: Server, start: str, said: str) -> None:  # noqa: F811
    server.control(always={"kind": "bytes", "hex": start})
    told = refused(server.url, key="")
    assert said in told and "turn compression off in the server, or in the proxy before it" in told and "Start its" not in told


# --- keys and accounts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "without", "with_one"),
    [
        (402, "wants to be paid, and no key was sent: the environment variable SOME_KEY is not set", "the account of the key in SOME_KEY"),
        (401, "SOME_KEY is not set", "SOME_KEY holds a key that it refuses"),
        (403, "SOME_KEY is not set", "SOME_KEY holds a key that it refuses"),
        (429, "no key was sent, and one may raise the limit", "busy or out of order: start again when it serves"),
        (529, "busy or out of order", "busy or out of order"),
    ],
)
def test_what_is_said_with_and_without_a_key(server: Server, status: int, without: str, with_one: str) -> None:  # noqa: F811
    server.control(always={"kind": "status", "status": status, "body": "no"})
    for key, said in (("", without), ("sk-a-key-of-somebody", with_one)):
        told = refused(server.url, key=key)
        assert said in told and f"status {status}: no" in told
        assert ("no key was sent" in told) == (not key and status in (402, 429))
    mends = {401: ("holds its key", "holds a valid one"), 402: ("the key of an account", "top it up"), 529: ("try again", "try again")}
    for key, mend in zip(("", "sk-a-key-of-somebody"), mends.get(status, ("", "")), strict=True):
        with pytest.raises(EvaluationError) as caught:
            find_model(server.url, key, None, "judge")
        assert mend in str(caught.value)


@pytest.mark.parametrize("status", [304, 405])
def test_an_address_of_something_else(server: Server, status: int) -> None:  # noqa: F811
    server.control(always={"kind": "status", "status": status})
    told = refused(server.url, key="")
    assert "no chat completions are served there" in told and "its path is mostly /v1" in told
