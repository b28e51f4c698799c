"""Settings of a model that is reached over HTTP, for the sections that may have one."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator

OPENAI_HOST = "api.openai.com"


class RemoteSettings(BaseModel):
    """OpenAI-compatible addresses and how patiently they are called."""

    base_urls: tuple[str, ...] = Field(
        (), description="addresses of servers, e.g. [http://localhost:8000/v1]; empty: the model runs in this process"
    )
    key_env: str = Field(
        "OPENAI_API_KEY",
        description="name of the environment variable that holds the key for base_urls; empty or not set: no key is sent",
    )
    concurrency: int = Field(64, ge=1, description="requests to base_urls that are under way at once, all together")
    deadline: float = Field(
        600.0, gt=0, description="seconds for one attempt of a request to base_urls, to its last byte"
    )
    retry_for: float = Field(
        600.0,
        ge=0,
        description="seconds for which a request to base_urls is tried again, and after which a silent teacher counts as down",
    )

    @field_validator("base_urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for number, url in enumerate(urls, 1):
            parts = urlsplit(url)
            if parts.username is not None or parts.query or parts.fragment:
                raise ValueError(  # not shown: it may hold a key
                    f"address {number} holds a user name, a password or a query; give http://HOST:PORT/PATH alone, and the key in the "
                    "environment variable that key_env names"
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no address of a server; write http://HOST:PORT/v1 or https://HOST/v1")
            if parts.port == 0:  # a port that is no number, or too large, is a ValueError
                raise ValueError(f"{url!r} has no port that can be called; write http://HOST:PORT/v1")
        urls = tuple(url.rstrip("/") for url in urls)
        if len(set(urls)) != len(urls):
            raise ValueError("an address stands twice; name each server once")
        return urls

    @field_validator("key_env")
    @classmethod
    def _name_of_a_variable(cls, name: str) -> str:
        if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(  # not shown: it may be the key itself
                "this is no name of an environment variable; if it is the key, put it into a variable and name that: a key in a recipe "
                "ends up in files"
            )
        return name

    @property
    def official(self) -> bool:
        """Whether OpenAI's own address is among them, which refuses the fields that other servers add."""
        return any(urlsplit(url).hostname == OPENAI_HOST for url in self.base_urls)
