"""The servers of an evaluation: keys, names of models, and whether they answer at all, before the first question is asked."""

from __future__ import annotations

import asyncio
import os
from typing import NamedTuple
from urllib.parse import urlsplit

from zppo.errors import EvaluationError, SettingsError
from zppo.teacher.http import REPLY_BYTES, Trouble, Wire

_PATIENCE = 60.0  # seconds for the first answer


class Found(NamedTuple):
    """A model that answers.

    Attributes:
        context: tokens of prompt and answer together; None where the server does not say.
    """

    name: str
    context: int | None


def is_url(model: str) -> bool:
    """Whether this is an address, and no folder."""
    return urlsplit(model).scheme in ("http", "https")


def read_key(variable: str | None, flag: str) -> str:
    """The key in an environment variable, "" where none is named. Its value appears in no message.

    Raises:
        SettingsError: it is not set, or is no key.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        cause = "holds spaces or characters that no key has" if key else "is not set or empty"
        raise SettingsError(f"{flag}: the environment variable {variable} {cause}; put the server's key there")
    return key


def find_model(url: str, key: str, name: str | None, what: str, name_flag: str, key_flag: str) -> Found:
    """The model to ask a server for, after it has answered a small request.

    Args:
        what: of messages: model or judge.

    Raises:
        SettingsError: the address is none, or the server has several models and none is named.
        EvaluationError: it cannot be reached, or refuses key or model.
    """
    if not is_url(url) or not urlsplit(url).hostname:
        raise SettingsError(f"the {what}'s address {url!r} is no URL; write http://HOST:PORT/v1")
    return asyncio.run(_find(url, key, name, what, name_flag, key_flag))


async def _find(url: str, key: str, name: str | None, what: str, name_flag: str, key_flag: str) -> Found:
    wire = Wire(url, key, _PATIENCE, 1)
    try:
        contexts = await wire.contexts()
        served = list(contexts)
        if name is None and len(served) > 1:
            raise SettingsError(f"{url} serves {', '.join(served[:10])}: name one with {name_flag}")
        if name is not None and served and name not in served:
            raise SettingsError(
                f"{url} does not serve {name!r}; it serves {', '.join(served[:10])}: correct {name_flag}"
            )
        chosen = name or (served[0] if served else "default")
        body = {"model": chosen, "messages": [{"role": "user", "content": "Say ok."}], "max_tokens": 16}
        try:
            await wire.chat(body, REPLY_BYTES)
        except Trouble as trouble:
            if trouble.status in (401, 403):
                mend = f"name the environment variable that holds its key with {key_flag}"
            elif trouble.status is None:
                mend = "start the server, or correct the address"
            else:
                mend = f"correct the address (it mostly ends in /v1), or name the model with {name_flag}"
            raise EvaluationError(f"the {what} cannot be asked ({trouble.reason}): {mend}") from None
        return Found(chosen, contexts.get(chosen))
    finally:
        await wire.close()


def check_context(context: int | None, max_tokens: int) -> None:
    """Whether an answer of the wanted length and a question fit together. SettingsError where no question can."""
    if context is not None and context <= max_tokens:
        raise SettingsError(
            f"the model's context holds {context:,} tokens and answers may have {max_tokens:,}, which leaves no room for a question: every "
            "one would be refused; serve the model with a longer context, or leave the protocol with a smaller --max-tokens"
        )
