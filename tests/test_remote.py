"""The remote teacher against a real server process that misbehaves: killed, hanging, trickling, storms, broken and endless replies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fault_server import Server
from zppo.core.types import Message
from zppo.engines.base import Sampling
from zppo.errors import EvaluationError
from zppo.teacher.http import RedirectError, retry_after
from zppo.teacher.interface import TeacherReply, TeacherRequest, TeacherSampling
from zppo.teacher.remote import PING, RemoteTeacher, seed_of
from zppo.teacher.reply import Scrubber
from zppo.teacher.servers import FAULTS, Service, backoff

pytestmark = pytest.mark.slow

HOW = TeacherSampling(Sampling(max_new_tokens=16))
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Back-off begins at a twentieth of a second, where it is not what is tested."""
    if "backoff" not in request.node.name:
        monkeypatch.setattr("zppo.teacher.servers.FIRST_WAIT", 0.05)


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.fixture
def server(shared: Server) -> Server:
    """The shared server, well-behaved again."""
    if shared.process is None:
        shared.start()
    shared.control()
    return shared


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes teachers that are closed at the end."""
    made: list[RemoteTeacher] = []

    def teacher(*servers: Server, **options: Any) -> RemoteTeacher:
        made.append(RemoteTeacher("tiny", [s.url for s in servers], **{"retry_for": 120.0, "deadline": 60.0} | options))
        return made[-1]

    yield teacher
    for teacher_ in made:
        teacher_.close()


def take_service(teacher: RemoteTeacher) -> Service:
    """What serving took since the last call of this."""
    taken, teacher.servers.service = teacher.servers.service, Service()
    return taken


def ask(text: str = "hello", *keys: int) -> TeacherRequest:
    return TeacherRequest((Message("user", text),), keys or (1,))


def words(text: str, *keys: int) -> str:
    """What the server says to such a request."""
    return f"{text} seed {seed_of(keys or (1,))}"


def many(count: int) -> list[TeacherRequest]:
    return [ask(f"question {i}", i, -i) for i in range(count)]


def right(replies: list[TeacherReply]) -> bool:
    """Whether `many` was answered in order and in full."""
    wanted = [(words(f"question {i}", i, -i), f"{words(f'question {i}', i, -i)} #1") for i in range(len(replies))]
    return [r.texts for r in replies] == wanted and not any(r.error for r in replies)


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_replies_in_order_several_choices_in_one_request_and_only_the_content(server: Server, make: Any) -> None:
    teacher = make(server)
    replies = teacher.complete([ask("one", 1, 2, 3), ask("two", 4)], HOW)
    first = words("one", 1, 2, 3)
    assert [r.texts for r in replies] == [(first, f"{first} #1", f"{first} #2"), (words("two", 4),)]
    assert [(r.prompt_tokens, r.completion_tokens, r.think_open, r.error) for r in replies] == [(7, 9, False, ""), (7, 3, False, "")]
    assert sorted(request["n"] for request in server.log) == [1, 3]
    assert teacher.complete([], HOW) == []
    assert teacher.complete([ask("one", 1, 2, 3)], HOW)[0] == replies[0]
    assert take_service(teacher) == Service(requests=3)
    assert take_service(teacher) == Service()


def test_what_is_sent(server: Server, make: Any) -> None:
    teacher = make(server)
    sampling = Sampling(0.7, 0.9, 20, max_new_tokens=33)
    body = {"top_p": 0.5, "seed": None, "min_p": 0.05, "guided": {"a": 1}}
    how = TeacherSampling(sampling, {"enable_thinking": False}, body)
    teacher.complete([TeacherRequest((Message("system", "be"), Message("user", "x\ud800")), (5,))], how)
    assert server.log == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "x?"}],
            "n": 1,
            "temperature": 0.7,
            "top_p": 0.5,
            "top_k": 20,
            "min_p": 0.05,
            "max_tokens": 33,
            "chat_template_kwargs": {"enable_thinking": False},
            "guided": {"a": 1},
        }
    ]
    server.control()
    teacher.complete([ask("x", 5)], HOW)
    assert server.log[0].keys() == {"model", "messages", "n", "seed", "temperature", "top_p", "max_tokens"}
    official = make(replace_url(server, "https://api.openai.com/v1"))
    assert official.body([Message("user", "x")], 1, 0, HOW)["max_completion_tokens"] == 16


class replace_url:  # noqa: N801 - stands for a server
    def __init__(self, server: Server, url: str) -> None:
        self.url = url


def test_greedy_asks_once_for_all_keys(server: Server, make: Any) -> None:
    greedy = TeacherSampling(replace(HOW.sampling, temperature=0.0))
    server.control({"kind": "text", "content": None, "finish": None})
    (reply,) = make(server).complete([ask("x", 1, 2, 3)], greedy)
    assert reply.texts == (words("x", 1, 2, 3),) * 3
    assert [request["n"] for request in server.log] == [1, 1]


def test_a_server_that_gives_one_choice_only_is_asked_one_by_one(server: Server, make: Any) -> None:
    teacher = make(server)
    teacher.one_by_one = True
    (reply,) = teacher.complete([ask("x", 1, 2, 3)], HOW)
    assert reply.texts == tuple(words("x", key) for key in (1, 2, 3))
    assert [request["n"] for request in server.log] == [1, 1, 1]


def test_the_cap_on_requests_under_way(server: Server, make: Any) -> None:
    server.control(always={"kind": "slow", "seconds": 0.2})
    assert len(make(server, concurrency=3).complete([ask(str(i)) for i in range(12)], HOW)) == 12
    assert server.most_open == 3


# --- replies that are not what was asked for ------------------------------------------------------------------------


def test_missing_choices_are_asked_for_again(server: Server, make: Any) -> None:
    teacher = make(server)
    server.control({"kind": "short", "choices": 2}, {"kind": "short", "choices": 0})
    (reply,) = teacher.complete([ask("x", 1, 2, 3)], HOW)
    assert reply.texts == (words("x", 1, 2, 3), words("x", 1, 2, 3), words("x", 3))
    assert [request["n"] for request in server.log] == [3, 1, 1]
    service = take_service(teacher)
    assert (service.short, service.retries, service.given_up) == (1, 2, 0)  # a reply without any is tried again as any broken one


def test_choices_that_never_come_are_none(server: Server, make: Any) -> None:
    server.control(always={"kind": "text", "content": 7})
    teacher = make(server)
    (reply,) = teacher.complete([ask("x", 1, 2)], HOW)
    assert reply.texts == (None, None)
    assert "no text ('7')" in reply.error
    assert len(server.log) == 1 + 2 * 2
    assert take_service(teacher).given_up == 2


def test_more_choices_than_asked_for_are_cut(server: Server, make: Any) -> None:
    server.control({"kind": "short", "choices": 5})
    (reply,) = make(server).complete([ask("x", 1, 2)], HOW)
    assert len(reply.texts) == 2


@pytest.mark.parametrize(
    ("content", "finish", "text", "requests"),
    [
        ("", "stop", "", 1),  # the model said nothing: a wrong answer
        (None, "stop", "", 1),
        (None, "length", None, 1),  # thoughts ate the limit
        ("", "content_filter", None, 1),
        (None, None, "again", 2),  # a broken choice
        ("", "unheard-of", "again", 2),
        (["a", "list"], "stop", "again", 2),
        ("half a \ud83d", "stop", "half a ?", 1),  # no file takes a lone surrogate
        ("null \x00 byte", "length", "null \x00 byte", 1),
    ],
)
def test_empty_and_odd_texts(server: Server, make: Any, content: Any, finish: Any, text: Any, requests: int) -> None:
    server.control({"kind": "text", "content": content, "finish": finish})
    (reply,) = make(server).complete([ask("x")], HOW)
    assert reply.texts == ((words("x") if text == "again" else text),)
    assert bool(reply.error) == (text is None)
    assert len(server.log) == requests


@pytest.mark.parametrize(
    "reply",
    [
        "null",
        "[]",
        '{"choices": null}',
        '{"choices": {"0": {}}}',
        '{"error": {"message": "no"}}',
        '{"choices": [null, 5], "usage": []}',
        '{"choices": [{"message": "text", "finish_reason": "stop"}], "usage": {"prompt_tokens": "many"}}',
        '{"choices": [{"message": {"content": 7}, "finish_reason": []}], "usage": {"prompt_tokens": -1}}',
        '{"choices": 1' + "0" * 5000 + "}",
        "",
    ],
)
def test_replies_of_odd_shapes_are_retried(server: Server, make: Any, reply: str) -> None:
    server.control({"kind": "reply", "reply": reply})
    (got,) = make(server).complete([ask("x")], HOW)
    assert (got.texts, got.prompt_tokens, got.error) == ((words("x"),), 7, "")


@pytest.mark.parametrize("kind", ["malformed", "html", "drop", "bomb"])
def test_replies_that_are_none_are_retried(server: Server, make: Any, kind: str) -> None:
    teacher = make(server)
    server.control(*[{"kind": kind}] * 2)
    assert right(teacher.complete(many(2), HOW))
    assert take_service(teacher).retries == 2


@pytest.mark.parametrize("fault", [{"kind": "big", "bytes": 2_000_000}, {"kind": "flood"}, {"kind": "gzip"}])
def test_huge_replies_are_cut_off_and_counted(server: Server, make: Any, fault: dict[str, Any]) -> None:
    teacher = make(server)
    server.control(fault)
    replies = teacher.complete([ask("x"), ask("y")], HOW)
    assert sorted(r.texts == (None,) for r in replies) == [False, True]
    assert any("longer than" in r.error for r in replies)
    assert take_service(teacher).oversized == 1
    assert server.flooded < 20_000_000  # what sockets hold, not a billion


def test_a_long_limit_allows_a_long_reply(server: Server, make: Any) -> None:
    server.control({"kind": "big", "bytes": 1_000_000})
    how = TeacherSampling(replace(HOW.sampling, max_new_tokens=12_288))
    (reply,) = make(server).complete([ask("x")], how)
    assert reply.texts == ("x" * 1_000_000,)


# --- weather --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_restarted_every_request_recovers(server: Server, make: Any) -> None:
    teacher = make(server, concurrency=8)
    server.control(always={"kind": "slow", "seconds": 0.3})
    replies: list[TeacherReply] = []
    work = threading.Thread(target=lambda: replies.extend(teacher.complete(many(40), HOW)))
    work.start()
    server.wait_for(10)
    server.kill()
    time.sleep(3)
    server.start()
    work.join(timeout=120)
    assert right(replies) and len(replies) == 40
    service = take_service(teacher)
    assert service.retries >= 8 and service.given_up == 0 and 0 < service.waited_seconds < 60


@pytest.mark.parametrize("fault", [{"kind": "hang"}, {"kind": "trickle", "pause": 0.1}])
def test_a_server_that_never_ends_its_reply_is_given_up_in_time(
    server: Server, make: Any, back: Callable[[], None], fault: dict[str, Any]
) -> None:
    """A byte now and then keeps every time-out of an HTTP client from running out."""
    teacher = make(server, deadline=1.0, retry_for=1.0)
    server.control(always=fault)
    replies = teacher.complete(many(100), HOW)
    assert all(r.texts == (None, None) and r.error for r in replies)
    assert "no whole reply within 1 s" in replies[0].error
    assert len(server.log) <= 64 + 64  # those that wait in line are not even tried
    assert take_service(teacher).given_up == 100
    server.control()
    back()
    assert right(teacher.complete(many(3), HOW))


@pytest.mark.parametrize("fault", [{"kind": "hang"}, {"kind": "trickle", "pause": 0.05}])
def test_one_request_that_hangs_is_sent_again(server: Server, make: Any, fault: dict[str, Any]) -> None:
    server.control(fault)
    assert right(make(server, deadline=1.5).complete(many(4), HOW))


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_a_storm_passes(server: Server, make: Any, status: int) -> None:
    teacher = make(server, concurrency=4)
    server.control(*[{"kind": "status", "status": status}] * 6)
    assert right(teacher.complete(many(8), HOW))
    service = take_service(teacher)
    assert (service.retries, service.requests, service.given_up) == (6, 14, 0)


def test_retry_after_is_honoured_by_those_who_come_later_too(server: Server, make: Any) -> None:
    teacher = make(server, concurrency=1)
    server.control({"kind": "status", "status": 429, "headers": {"Retry-After": "1"}})
    assert right(teacher.complete(many(3), HOW))
    assert take_service(teacher).waited_seconds >= 0.9  # not a second for each
    assert len(server.log) == 4


def test_a_storm_that_does_not_pass_is_given_up_in_time(server: Server, make: Any) -> None:
    """Retry-After beyond all patience does not stretch it."""
    teacher = make(server, retry_for=1.0)
    server.control(always={"kind": "status", "status": 429, "headers": {"Retry-After": "86400"}, "body": "quota"})
    replies = teacher.complete(many(200), HOW)
    assert all(r.texts == (None, None) and "quota" in r.error for r in replies)


def test_an_address_that_is_open_before_the_time_it_gave_is_used(server: Server, make: Any) -> None:
    """A Retry-After of a day must not cost every later call all of the patience."""
    teacher = make(server, retry_for=2.0)
    server.control({"kind": "status", "status": 503, "headers": {"Retry-After": "86400"}})
    assert right(teacher.complete(many(1), HOW))
    take_service(teacher)
    assert right(teacher.complete(many(3), HOW))
    assert take_service(teacher) == Service(requests=3)


def test_a_long_silence_is_said_once_and_so_is_its_end(server: Server, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo.teacher.servers.SILENCE_SECONDS", 0.2)
    said: list[str] = []
    teacher = make(server, warn=said.append)
    server.control(*[{"kind": "status", "status": 503, "body": "loading"}] * 6)
    assert right(teacher.complete(many(1), HOW))
    assert right(teacher.complete(many(2), HOW))
    assert len(said) == 2
    assert "teacher.base_urls: no reply for" in said[0] and "for up to 120 s" in said[0] and "503: loading" in said[0]
    assert said[1] == f"teacher.base_urls: {server.url} replies again"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_refusals_are_not_retried_and_give_the_reason(server: Server, make: Any, status: int) -> None:
    teacher = make(server, key=KEY)
    said = f"bad \x1b[31m thing {KEY} " + "y" * 5000
    server.control({"kind": "status", "status": status, "body": said})
    (reply,) = teacher.complete([ask("x", 1, 2)], HOW)
    assert reply.texts == (None, None)
    assert f"status {status}: bad [31m thing [key] yyy" in reply.error
    assert len(reply.error) < 500 and reply.error.isprintable()
    assert len(server.log) == 1
    assert take_service(teacher).given_up == 1


def test_a_request_that_breaks_the_server_is_given_up_when_others_are_served(server: Server, make: Any) -> None:
    """Always 500 for one request: after some attempts, not after all of the minutes."""
    teacher = make(server, retry_for=600.0, concurrency=2)
    server.control(always={"kind": "status", "status": 500, "when": "poison"})
    first, *others = teacher.complete([ask("poison"), *many(20)], HOW)
    assert first.texts == (None,) and "500" in first.error
    assert right(others)
    assert sum(request["messages"][0]["content"] == "poison" for request in server.log) == FAULTS


def until_up(teacher: RemoteTeacher, seconds: float = 60.0) -> None:
    """Until a ping in the background has found it."""
    end = time.monotonic() + seconds
    while teacher.servers._failing_since is not None:
        assert time.monotonic() < end
        time.sleep(0.01)


def pings(log: Sequence[dict[str, Any]]) -> int:
    return sum(request["messages"][-1]["content"] == PING[0].content for request in log)


@pytest.fixture
def back(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called where a teacher has come back: the next call waits for its word, however busy the machine is."""
    return lambda: monkeypatch.setattr("zppo.teacher.servers.LOOK_SECONDS", 60.0)


def test_a_dead_teacher_costs_its_patience_once_and_is_used_again_when_it_is_back(
    server: Server, make: Any, back: Callable[[], None]
) -> None:
    teacher = make(server, retry_for=1.0)
    server.kill()
    replies = teacher.complete(many(300), HOW)
    waited = teacher.servers.service.waited_seconds
    assert all(r.texts == (None, None) and "connect" in r.error for r in replies)
    replies = teacher.complete(many(300), HOW)
    assert all("unreachable for" in r.error for r in replies)
    assert teacher.servers.service.waited_seconds == waited  # a teacher that is down is not waited for a second time
    assert take_service(teacher).given_up == 600
    server.start()
    back()
    assert right(teacher.complete(many(20), HOW))


WAYS: dict[str, dict[str, Any]] = {
    "hangs": {"kind": "hang"},
    "trickles": {"kind": "trickle", "pause": 0.2},
    "503": {"kind": "status", "status": 503, "headers": {"Retry-After": "3600"}},
    "429": {"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_that_is_down_is_not_asked_by_every_call(server: Server, make: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was found down: the next call looks whether it is back, others neither ask nor wait."""
    monkeypatch.setattr("zppo.teacher.servers.LOOK_SECONDS", 0.1)
    teacher = make(server, retry_for=1.0, deadline=0.6)
    server.control(always=WAYS[way])
    assert all(r.texts == (None, None) and r.error for r in teacher.complete(many(100), HOW))
    service, asked = replace(teacher.servers.service), len(server.log)
    for _ in range(20):  # calls of later steps
        assert all("unreachable for" in r.error for r in teacher.complete(many(5), HOW))
    assert teacher.servers.service == replace(service, given_up=service.given_up + 100)  # no request, no second of waiting
    log = server.log
    assert len(log) - asked == pings(log) == 1


@pytest.mark.parametrize(
    "fault", [{"kind": "status", "status": 503}, {"kind": "status", "status": 500}, {"kind": "html"}, {"kind": "drop"}]
)
def test_one_that_is_down_is_looked_for_in_the_background(
    server: Server, make: Any, back: Callable[[], None], fault: dict[str, Any]
) -> None:
    teacher = make(server, retry_for=0.5)
    server.control(always=fault)
    teacher.complete(many(10), HOW)
    before = server.log  # it is looked for all the while: pings may be among these too
    assert teacher.complete(many(3), HOW)[0].error
    log = server.log
    assert len(log) - pings(log) == len(before) - pings(before) and pings(log) >= 1
    server.control()
    if fault["kind"] != "drop":  # a connection that fails at once is looked for by the next call
        until_up(teacher)
        log = server.log
        assert pings(log) == len(log) >= 1
    back()
    assert right(teacher.complete(many(20), HOW))


@pytest.mark.parametrize("way", ["no such host", "no TLS", "never answered", "refused and hanging"])
def test_one_that_cannot_be_reached_in_another_way_rests_too(server: Server, make: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo.teacher.servers.LOOK_SECONDS", 0.1)
    server.control(always={"kind": "hang"})
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        closed, quiet = (f"http://127.0.0.1:{each.getsockname()[1]}/v1" for each in (gone, silent))
        gone.close()
        urls = {
            "no such host": ["http://no-such-host.invalid/v1"],
            "no TLS": [server.url.replace("http:", "https:")],
            "never answered": [quiet],
            "refused and hanging": [closed, server.url],
        }[way]
        teacher = make(*(replace_url(server, url) for url in urls), retry_for=1.0, deadline=0.6)
        assert all(r.texts == (None, None) and r.error for r in teacher.complete(many(20), HOW))
        service = replace(teacher.servers.service)
        for _ in range(10):  # calls of later steps
            assert all("unreachable for" in r.error for r in teacher.complete(many(5), HOW))
        assert teacher.servers.service == replace(service, given_up=service.given_up + 50)  # no request, no second of waiting


def test_one_that_answers_pings_alone_soon_rests_again(
    server: Server, make: Any, back: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zppo.teacher.servers.PROBATION_SECONDS", 0.0)
    teacher = make(server, retry_for=1.0)
    server.control(always={"kind": "status", "status": 503, "when": "question"})
    teacher.complete(many(4), HOW)
    assert take_service(teacher).retries > 0
    assert all(r.texts == (None, None) for r in teacher.complete(many(4), HOW)) and pings(server.log) == 1
    assert take_service(teacher).retries == 0
    server.control()
    back()
    assert right(teacher.complete(many(4), HOW)) and not teacher.servers._probation


def test_an_interruption_ends_the_call(server: Server, make: Any) -> None:
    """What a signal raises in the caller ends the work in the thread, and the teacher can be used again."""
    teacher = make(server)
    server.control({"kind": "hang"})
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        teacher.complete([ask("x")], HOW)
    assert right(teacher.complete(many(2), HOW))


def test_close_ends_the_thread_and_may_be_called_twice(server: Server) -> None:
    teacher = RemoteTeacher("tiny", [server.url], key=KEY)
    assert right(teacher.complete(many(2), HOW))
    assert KEY not in repr(teacher) + repr(vars(teacher)) + repr(teacher.servers.addresses)
    teacher.close()
    teacher.close()
    assert "teacher" not in {thread.name for thread in threading.enumerate()}


# --- several addresses ----------------------------------------------------------------------------------------------


@pytest.fixture
def other() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_is_not_followed(server: Server, other: Server, make: Any, status: int) -> None:
    other.control()
    server.control(always={"kind": "status", "status": status, "headers": {"Location": f"{other.url}/chat/completions?key=a"}})
    reply = make(server).complete([ask("a secret question")], HOW)[0]
    assert reply.texts == (None,) and other.log == []
    assert f"{server.url}/chat/completions sends requests on to {other.url}/chat/completions, and zppo follows" in reply.error
    assert make(server, other).complete([ask()], HOW)[0].texts == (words("hello"),)  # the other one was named too


def test_a_redirect_within_the_origin_is_followed(server: Server, make: Any) -> None:
    server.control({"kind": "status", "status": 307, "headers": {"Location": "/v1/chat/completions"}})
    assert make(server).complete([ask()], HOW)[0].texts == (words("hello"),)
    assert len(server.log) == 2


def test_an_evaluation_follows_to_no_other_origin_either(server: Server, other: Server) -> None:
    """Nor does the client of inspect-ai, where the redirects begin later."""
    from inspect_ai.model import GenerateConfig

    from zppo.evals.endpoint import find_model
    from zppo.evals.task import ServedAPI

    other.control()
    server.control(always={"kind": "status", "status": 307, "headers": {"Location": f"{other.url}/chat/completions"}})
    with pytest.raises(EvaluationError, match=f"{server.url}.*sends requests on to {other.url}.*if that is where it lives"):
        find_model(server.url, "", None, "judge")

    async def ask_later() -> None:
        api = ServedAPI("tiny", server.url, "", GenerateConfig())
        async with api.http_client as client:
            await client.post(f"{server.url}/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "x"}]})

    with pytest.raises(RedirectError, match=other.url):
        asyncio.run(ask_later())
    assert other.log == []


def test_two_addresses_share_the_load_and_one_stands_in_for_the_other(server: Server, other: Server, make: Any) -> None:
    teacher = make(server, other, concurrency=8)
    for each in (server, other):
        each.control(always={"kind": "slow", "seconds": 0.1})
    assert right(teacher.complete(many(20), HOW))
    assert abs(len(server.log) - len(other.log)) <= 4
    other.kill()
    assert right(teacher.complete(many(20), HOW))
    assert take_service(teacher).given_up == 0
    other.start()
    other.control()
    end = time.monotonic() + 60
    while not other.log and time.monotonic() < end:  # its rest ends, one request finds it alive
        assert right(teacher.complete(many(4), HOW))
        time.sleep(0.2)
    other.control()
    assert right(teacher.complete(many(20), HOW))
    assert len(other.log) >= 5


def test_a_hanging_address_is_left_alone(server: Server, other: Server, make: Any) -> None:
    teacher = make(server, other, deadline=4.0)
    other.control(always={"kind": "hang"})
    assert right(teacher.complete(many(20), HOW))
    before = len(other.log)
    assert right(teacher.complete(many(40), HOW))
    assert len(other.log) - before <= 2  # at most now and then one to see


def test_an_address_that_refuses_the_key_passes_its_requests_on(server: Server, make: Any) -> None:
    locked = Server(key="another-key")
    try:
        assert right(make(server, locked, key=KEY).complete(many(6), HOW))
        (reply,) = make(locked, key=KEY).complete([ask("x")], HOW)
        assert reply.texts == (None,) and "401" in reply.error and KEY not in reply.error
    finally:
        locked.kill()


# --- small parts ----------------------------------------------------------------------------------------------------


def test_backoff_grows_to_a_bound_with_jitter() -> None:
    waits = [[backoff(times) for _ in range(200)] for times in (1, 2, 3, 50)]
    for longest, drawn in zip((0.5, 1.0, 2.0, 30.0), waits, strict=True):
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
        assert max(drawn) - min(drawn) > longest / 4


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({}, 0, 0),
        ({"retry-after": "3"}, 3, 3),
        ({"retry-after": "0.5"}, 0.5, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25, 0.25),
        ({"retry-after": "-5"}, 0, 0),
        ({"retry-after": "nan"}, 0, 0),
        ({"retry-after": "inf"}, 0, 0),
        ({"retry-after": "soon"}, 0, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, 0),
        ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, 1e9, 1e10),
        ({"retry-after": "Wed, 99 Oct 99999 07:28:00 GMT"}, 0, 0),
    ],
)
def test_retry_after(headers: dict[str, str], low: float, high: float) -> None:
    assert low <= retry_after(headers) <= high


def test_scrubbing() -> None:
    scrub = Scrubber(KEY)
    assert scrub.words(f"a\n\x07{KEY}\u202eb") == "a [key] b"
    assert scrub.completion(f"the key is {KEY}") == "the key is [key]"
    long = "".join(f"{i:04}" for i in range(500))  # no cut leaves a piece of a key
    said = Scrubber(long).words(" ".join([long] * 200), 300)
    assert not re.search(r"\d", said)
    assert Scrubber("x").completion("x = 5") == "x = 5"  # too short to be told from a word
    assert KEY not in repr(scrub)


def test_seeds_are_in_31_bits_and_follow_from_the_keys() -> None:
    seeds = [seed_of((i, j)) for i in range(20) for j in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of((1, 2)) == seed_of((1, 2)) != seed_of((2, 1))
