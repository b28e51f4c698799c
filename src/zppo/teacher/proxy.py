"""The way to a server: straight, or through the proxy that the environment names; never through one to this machine itself."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from zppo.errors import SettingsError
from zppo.http_client import httpx

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy.

    Attributes:
        url: with its password, if it has one.
        variable: where it comes from.
        host: of the server that it leads to.
    """

    url: str
    variable: str
    host: str

    def __str__(self) -> str:
        place = urlsplit(self.url)
        return f"the proxy {place.scheme}://{place.hostname}:{place.port or _PORTS.get(place.scheme, 1080)} of {self.variable}"

    @property
    def around(self) -> str:
        """How to go without it."""
        return f"NO_PROXY={self.host} goes without it"


def proxy_to(url: str) -> Proxy | None:
    """The proxy between this machine and an address; None where it is asked straight.

    As of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY (names, endings of names, networks, `*`; also in lower case), and as the system
    is set where none of them is. A server on this machine is never behind a proxy.

    Raises:
        SettingsError: the proxy cannot be used: a kind that needs a package that is missing, or no address.
    """
    place = urlsplit(url)
    host, given = place.hostname or "", urllib.request.getproxies()
    found = given.get(place.scheme) or given.get("all")
    if not found or _is_local(host) or _is_excepted(host, place.port or _PORTS.get(place.scheme), given.get("no", "")):
        return None
    names = [name for kind in (place.scheme, "all") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())]
    variable = next((name for name in names if os.environ.get(name) == found), "the system's settings")
    proxy = Proxy(found if "://" in found else f"http://{found}", variable, host)
    try:
        kind, usable = urlsplit(proxy.url).scheme, bool(urlsplit(proxy.url).hostname) and urlsplit(proxy.url).port != 0
    except ValueError:
        kind, usable = "", False
    if not usable or kind not in ("http", "https", "socks5", "socks5h"):
        raise SettingsError(
            f"{url}: {variable} names no proxy that can be used (http://HOST:PORT, https:// and socks5:// can): correct it; {proxy.around}"
        )
    if kind.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise SettingsError(
            f"{url}: {proxy} is a SOCKS proxy, which needs the package socksio: pip install socksio, unset {variable}, or {proxy.around}"
        )
    return proxy


def transport_to(proxy: Proxy | None, limits: Any = None) -> Any:
    """What an HTTP client takes as `transport`, so that it does not look for proxies itself."""
    options: dict[str, Any] = {} if limits is None else {"limits": limits}
    return httpx.AsyncHTTPTransport(proxy=proxy.url if proxy else None, **options)


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _is_excepted(host: str, port: int | None, exceptions: str) -> bool:
    """Whether NO_PROXY names a host."""
    for entry in exceptions.lower().replace(" ", ",").split(","):
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False):
                return True
        except ValueError:  # one of them is a name
            pass
        name, _, only = entry.rpartition("://")[2].partition(":")
        name = name.lstrip("*").lstrip(".")
        if entry == "*" or (name and only in ("", str(port)) and (host == name or host.endswith(f".{name}"))):
            return True
    return False
