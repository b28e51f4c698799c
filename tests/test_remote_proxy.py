"""Servers and the proxies that the environment names: which one is asked, which one never is, and what is said where one fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fault_server import Server
from test_remote_check import checked, closed_port, hurry, refused  # noqa: F401 - `hurry` is a fixture
from zppo.errors import EvaluationError, SettingsError
from zppo.evals.endpoint import find_model
from zppo.evals.task import served_model
from zppo.teacher.proxy import proxy_to

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server, and what a request through a proxy meets: its address is no path of this one, which answers 404."""
    server = Server()
    yield server
    server.kill()


@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:9", "socks4://x", "ftp://x", "http://a:b:c", "http://127.0.0.1:9", "http://[broken", "x"]
)
def test_a_server_on_this_machine_is_asked_straight(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str) -> None:
    monkeypatch.setenv(name, proxy)
    for host in ("127.0.0.1", "localhost", "127.0.0.1"):
        assert checked(server.url.replace("127.0.0.1", host), key="")[0] == []
    assert find_model(server.url, "", None, "judge").name == "tiny"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "me.localhost", "[::1]", "127.8.8.8", "0.0.0.0"])
def test_this_machine_has_no_proxy(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:1")
    assert proxy_to(f"http://{host}:8000/v1") is None


@pytest.mark.parametrize(
    ("no_proxy", "asked"),
    [
        ("", True),
        ("*", False),
        ("gpu-1.cluster", False),
        ("cluster", False),
        (".cluster", False),
        ("*.cluster", False),
        ("other, GPU-1.CLUSTER", False),
        ("http://gpu-1.cluster", False),
        ("gpu-1.cluster:8000", False),
        ("gpu-1.cluster:9000", True),
        ("luster", True),
        ("10.0.0.0/8", True),
    ],
)
def test_no_proxy(monkeypatch: pytest.MonkeyPatch, no_proxy: str, asked: bool) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        with monkeypatch.context() as patched:
            patched.setenv("HTTP_PROXY", "proxy.example:3128")
            patched.setenv(name, no_proxy)
            assert (proxy_to("http://gpu-1.cluster:8000/v1") is not None) == asked


def test_no_proxy_takes_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,[fd00::1]")
    assert proxy_to("http://10.1.2.3/v1") is None and proxy_to("http://[fd00::1]:8000/v1") is None
    found = proxy_to("http://11.1.2.3/v1")
    assert found is not None and str(found) == "the proxy http://proxy.example:3128 of ALL_PROXY"


def test_a_proxy_that_is_asked_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:a-password@127.0.0.1:{server.port}")
    said = refused("http://teacher.example/v1", key="")
    assert f"(through the proxy http://127.0.0.1:{server.port} of http_proxy; NO_PROXY=teacher.example goes without it)" in said
    assert "status 404" in said and "a-password" not in said
    monkeypatch.setenv("http_proxy", closed_port().removesuffix("/v1"))
    said = refused("http://teacher.example/v1", key="")
    assert "cannot be reached" in said and "of http_proxy; NO_PROXY=teacher.example" in said
    with pytest.raises(EvaluationError, match="of http_proxy; NO_PROXY=teacher.example"):
        find_model("http://teacher.example/v1", "", None, "model")


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("socks5://proxy:1080", "needs the package socksio: pip install socksio, unset ALL_PROXY, or NO_PROXY=teacher.example"),
        ("socks5h://proxy", "of ALL_PROXY is a SOCKS proxy"),
        ("socks4://proxy:1080", "ALL_PROXY names no proxy that can be used"),
        ("ftp://proxy", "ALL_PROXY names no proxy that can be used"),
        ("http://a:b:c", "ALL_PROXY names no proxy that can be used"),
        ("http://[broken", "ALL_PROXY names no proxy that can be used"),
        ("http://", "ALL_PROXY names no proxy that can be used"),
    ],
)
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str, said: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    for ask in (lambda: checked("https://teacher.example/v1"), lambda: find_model("https://teacher.example/v1", "", None, "judge")):
        with pytest.raises(SettingsError) as caught:
            ask()
        assert said in str(caught.value)


def test_the_client_of_an_evaluation_has_the_same_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from zppo.evals.options import Decoding

    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert served_model(server.url, "tiny", "", Decoding(), 1, {}).name == "tiny"
