"""A remote teacher's settings and its start-up check: wrong key, model, address or fields are said before a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fault_server import Server
from ports import hold_port
from zppo.config.recipe import dump_recipe, load_recipe
from zppo.engines.base import Sampling
from zppo.errors import SettingsError, TeacherError
from zppo.planning.dry_run import make_plan, render_plan
from zppo.planning.needed import check_files
from zppo.teacher.interface import TeacherSampling
from zppo.teacher.remote import RemoteTeacher
from zppo.teacher.startup_check import PATIENCE, Found, Names, read_key

KEY = "sk-very-secret-0123456789"
NAMES = Names("teacher", "SOME_KEY")
USES = {
    "rollout": (TeacherSampling(Sampling(max_new_tokens=8)), 4),
    "compression": (TeacherSampling(Sampling(temperature=0.0, max_new_tokens=8), {"enable_thinking": False}), 1),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    server = Server(key=KEY)
    yield server
    server.kill()


@pytest.fixture
def server(shared: Server) -> Server:
    shared.control()
    return shared


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zppo.teacher.servers.FIRST_WAIT", 0.02)


def closed_port() -> str:
    return f"http://127.0.0.1:{hold_port()}/v1"


def checked(*urls: str, key: str = KEY, model: str = "tiny") -> tuple[list[str], RemoteTeacher]:
    """The warnings of a check of both uses, and the teacher."""
    warnings: list[str] = []
    teacher = RemoteTeacher(model, urls, key=key, names=NAMES, warn=warnings.append)
    try:
        for use, (how, n) in USES.items():
            teacher.check(how, use, n)
    finally:
        teacher.close()
    return warnings, teacher


def refused(*urls: str, **options: str) -> str:
    with pytest.raises(TeacherError) as caught:
        checked(*urls, **options)
    assert KEY not in str(caught.value)
    return str(caught.value)


# --- the check ------------------------------------------------------------------------------------------------------


def test_a_good_server_is_asked_once_per_use_and_for_a_group(server: Server) -> None:
    warnings, teacher = checked(server.url)
    assert (warnings, teacher.one_by_one) == ([], False)
    assert [(r["n"], "chat_template_kwargs" in r) for r in server.log] == [(1, False), (4, False), (1, True)]


@pytest.mark.parametrize("fault", [{"kind": "short", "choices": 1}, {"kind": "status", "status": 400, "body": "n"}])
def test_a_server_that_gives_one_choice_only_is_found_out(server: Server, fault: dict[str, Any]) -> None:
    server.control({"kind": "ok"}, fault)
    assert checked(server.url)[1].one_by_one


def test_a_server_that_breaks_on_several_choices_is_asked_for_one(server: Server) -> None:
    server.control({"kind": "ok"}, *[{"kind": "short", "choices": 0}] * PATIENCE)
    warnings, teacher = checked(server.url)
    assert (warnings, teacher.one_by_one) == ([], True)


def test_a_wrong_key(server: Server) -> None:
    assert "the environment variable SOME_KEY is not set" in refused(server.url, key="")
    said = refused(server.url, key="sk-not-the-right-one")
    assert "SOME_KEY holds a key that it refuses" in said and "status 401: Incorrect API key provided: [key]" in said
    assert "sk-not" not in said


def test_a_wrong_model_names_those_that_are_served(server: Server) -> None:
    said = refused(server.url, model="huge")
    assert "teacher.model: 'huge' is not served" in said and "it serves tiny" in said


def test_a_model_that_a_server_refuses_with_another_status(server: Server) -> None:
    server.control({"kind": "status", "status": 400, "body": "unknown model"})
    assert "teacher.rollout: the server refuses the request" in refused(server.url)  # tiny is served


def test_an_address_without_its_path(server: Server) -> None:
    said = refused(server.url.removesuffix("/v1"))
    assert "404" in said and "mostly /v1" in said


def test_an_address_that_sends_requests_on_elsewhere(server: Server) -> None:
    server.control(always={"kind": "status", "status": 308, "headers": {"Location": "https://elsewhere.example/v1/chat/completions"}})
    said = refused(server.url)
    assert (
        said.startswith("teacher.base_urls: ") and f"{server.url}/chat/completions sends requests on to https://elsewhere.example" in said
    )
    assert said.endswith("If that is where it lives, write that address into teacher.base_urls")


def test_an_address_that_nobody_answers_at() -> None:
    url = closed_port()
    said = refused(url)
    assert f"cannot be reached: {url}: " in said and "Start its server (`vllm serve tiny`" in said
    assert "Start its server (`zppo serve lab:unreachable/teacher`" in refused(url, model="lab:unreachable/teacher")


def test_a_host_that_does_not_exist() -> None:
    assert "http://no-such-host.invalid/v1: " in refused("http://no-such-host.invalid/v1")


def test_a_page_that_is_no_model_server(server: Server) -> None:
    server.control(always={"kind": "html"})
    said = refused(server.url)
    assert "no chat completion: a web page (the address may lack its path" in said and "'<html> [31m Welcome" in said and "\x1b" not in said


def test_fields_that_a_server_refuses(server: Server) -> None:
    server.control({"kind": "ok"}, {"kind": "ok"}, {"kind": "status", "status": 422, "body": "what is chat_template_kwargs"})
    said = refused(server.url)
    assert "teacher.compression" in said and "422: what is chat_template_kwargs" in said
    assert "teacher.compression.extra_body, e.g. {chat_template_kwargs: null}" in said


def test_a_token_limit_over_the_servers_context_is_found_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(USES, "rollout", (TeacherSampling(Sampling(max_new_tokens=600)), 4))
    server.control({"kind": "ok"}, {"kind": "status", "status": 400, "body": "the context holds 512"})
    said = refused(server.url)
    assert "teacher.rollout: " in said and "the context holds 512" in said and "max_new_tokens" in said
    assert [r["max_tokens"] for r in server.log] == [16, 600]
    # A server that takes the limit may need long for its answer: that is not waited for, and says nothing against it.
    server.control({"kind": "ok"}, {"kind": "hang"})
    assert checked(server.url)[0] == []
    assert [(r["max_tokens"], r["n"]) for r in server.log] == [(16, 1), (600, 1), (16, 4), (8, 1)]


def test_openai_gets_room_for_thoughts_in_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    async def check_servers(wires: Any, bodies: Any, use: str, names: Names, key: bool, whole: Any) -> Found:
        seen.extend([*bodies, whole])
        return Found((), True)

    monkeypatch.setattr("zppo.teacher.remote.check_servers", check_servers)
    teacher = RemoteTeacher("gpt", ["https://api.openai.com/v1"], key=KEY)
    try:
        teacher.check(TeacherSampling(Sampling(max_new_tokens=8192)))
    finally:
        teacher.close()
    assert [body["max_completion_tokens"] for body in seen] == [1024, 8192]


def test_a_busy_server_is_waited_for_a_little(server: Server) -> None:
    server.control(*[{"kind": "status", "status": 503}] * 3)
    assert checked(server.url)[0] == []
    server.control(always={"kind": "status", "status": 429, "body": "You exceeded your current quota"})
    assert "exceeded your current quota" in refused(server.url)


def test_one_good_address_is_enough_but_a_refusal_is_not_overlooked(server: Server) -> None:
    dead = closed_port()
    (warning,), _ = checked(dead, server.url)
    assert dead in warning and "starts without this address" in warning
    assert "404" in refused(server.url, server.url.removesuffix("/v1"))


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    local, official = ("http://localhost:1/v1",), ("https://api.openai.com/v1",)
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert read_key("SOME_KEY", official) == KEY
    assert read_key("", local) == ""
    monkeypatch.delenv("SOME_KEY")
    assert read_key("SOME_KEY", local) == ""
    with pytest.raises(TeacherError, match="SOME_KEY holds no key, and api.openai.com wants one"):
        read_key("SOME_KEY", official)
    monkeypatch.setenv("SOME_KEY", f"{KEY}\nX-Header: {KEY}")
    with pytest.raises(TeacherError) as caught:
        read_key("SOME_KEY", local)
    assert "is no key" in str(caught.value) and KEY not in str(caught.value)


# --- settings -------------------------------------------------------------------------------------------------------


def write(folder: Path, teacher: dict[str, Any], name: str = "recipe.yaml", **more: Any) -> Path:
    data = {"student": {"model": "s"}, "teacher": {"model": "t"} | teacher, "data": {"train": "x.jsonl"}} | more
    path = folder / name
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_settings_of_a_remote_teacher(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "base_urls": ["http://a:8000/v1/", "https://b/v1"],
            "key_env": "MY_KEY",
            "concurrency": 3,
            "deadline": 5,
            "retry_for": 7,
            "rollout": {"extra_body": {"a": None}},
        },
    )
    settings = load_recipe(path)
    teacher = settings.teacher
    assert teacher is not None
    assert teacher.base_urls == ("http://a:8000/v1", "https://b/v1")
    assert (teacher.key_env, teacher.concurrency, teacher.deadline, teacher.retry_for) == ("MY_KEY", 3, 5, 7)
    assert teacher.how(teacher.rollout).extra_body == {"a": None}
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(settings), encoding="utf-8")
    assert load_recipe(again) == settings


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"base_urls": ["localhost:8000/v1"]}, "'localhost:8000/v1' is no address of a server"),
        ({"base_urls": ["ftp://a/v1"]}, "is no address"),
        ({"base_urls": ["http:///v1"]}, "is no address"),
        ({"base_urls": ["http://a:99999/v1"]}, "Port out of range"),
        ({"base_urls": ["http://a/v1", "http://a/v1/"]}, "stands twice"),
        ({"base_urls": [f"http://user:{KEY}@a/v1"]}, "address 1 holds a user name, a password or a query"),
        ({"base_urls": [f"http://a/v1?api-key={KEY}"]}, "address 1 holds a user name, a password or a query"),
        ({"key_env": KEY}, "this is no name of an environment variable"),
        ({"base_urls": ["http://a/v1"], "device": "cuda:1"}, "device is set, and base_urls too"),
        ({"base_urls": ["http://a/v1"], "template": "x.jinja"}, "template is set, and base_urls too"),
        ({"base_urls": ["http://a/v1"], "attention": "sdpa"}, "attention is set, and base_urls too"),
        ({"base_urls": ["http://a/v1"], "revision": "main"}, "revision is set, and base_urls too"),
        ({"judge": {"extra_body": {"a": 1}}}, "judge.extra_body is set, and base_urls is not"),
        ({"compression": {"extra_body": {"a": 1}}}, "compression.extra_body is set, and base_urls is not"),
        ({"concurrency": 0}, "teacher.concurrency"),
        ({"deadline": 0}, "teacher.deadline"),
        ({"retry_for": -1}, "teacher.retry_for"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, teacher: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_recipe(write(tmp_path, teacher))
    assert said in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("method", ["on-distill", "off-distill"])
def test_distillation_needs_a_teacher_in_this_process(tmp_path: Path, method: str) -> None:
    with pytest.raises(SettingsError, match="which no chat server gives: teacher.base_urls must be empty"):
        load_recipe(write(tmp_path, {"base_urls": ["http://a/v1"]}, method=method))


def test_where_thoughts_have_no_room_a_remote_teacher_is_told_not_to_think(tmp_path: Path) -> None:
    def args(teacher: dict[str, Any], use: str) -> dict[str, Any]:
        settings = load_recipe(write(tmp_path, teacher)).teacher
        assert settings is not None
        return dict(settings.how(settings.uses()[use]).template_args)

    remote = {"base_urls": ["http://a/v1"]}
    assert args(remote, "compression") == args(remote, "hint") == {"enable_thinking": False}
    assert args(remote, "rollout") == args({}, "compression") == {}
    thinks = {"template_args": {"enable_thinking": True}}
    assert args(remote | thinks, "compression") == thinks["template_args"]
    assert args(remote | {"compression": thinks}, "compression") == thinks["template_args"]
    assert args(remote, "judge") == args({}, "judge") == {"enable_thinking": False}
    official = {"base_urls": ["https://api.openai.com/v1"]}
    assert args(official, "compression") == args(official, "judge") == {}


def test_a_served_model_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where one of that name lies about, nor where the name looks like a path."""
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path)
    url = {"base_urls": ["http://a/v1"]}
    further: dict[str, Any] = {"more_teachers": [{"model": "t"} | url, {"model": "t"}]}
    for path, overrides in (
        (write(tmp_path, url, "remote.yaml", **further), []),
        (write(tmp_path, {}, **further), ["--teacher.base_urls=[http://a/v1]"]),
        (write(tmp_path, {}, **further), ["--teacher={model: x, base_urls: [http://a/v1]}", "--teacher.model=t"]),
    ):
        settings = load_recipe(path, overrides)
        assert settings.teacher is not None and settings.teacher.model == "t"
        assert [t.model for t in settings.more_teachers] == ["t", str(tmp_path / "t")]
    settings = load_recipe(write(tmp_path, url), ["--teacher.base_urls=[]"])
    assert settings.teacher is not None and settings.teacher.model == str(tmp_path / "t")
    check_files(load_recipe(write(tmp_path, url | {"model": "/models/served"})))


def test_a_dry_run_shows_the_addresses_and_calls_none(tmp_path: Path) -> None:
    from rich.console import Console

    settings = load_recipe(write(tmp_path, {"base_urls": ["http://no-such-host.invalid/v1"]}))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_plan(settings, make_plan(settings, 10), "recipe.yaml", "runs/x"))
    assert "t at http://no-such-host.invalid/v1" in console.export_text()
