"""The start-up check of a remote model: address, key, model and fields, tried before anything of a run is written."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from zppo.errors import TeacherError
from zppo.teacher.http import OPENAI_HOST, PAYMENT, REPLY_BYTES, Trouble, Wire
from zppo.teacher.reply import Choice
from zppo.teacher.servers import backoff

CHECK_SECONDS = 60.0  # for one small completion
LIMIT_SECONDS = 3.0  # in which a server refuses a token limit, if it does
PING_IMAGE = (  # a white PNG of 64 by 64 pixels: smaller ones are refused by some servers that do read images
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAATUlEQVR42u3PQQ0AAAgEILV/5zOFDzdoQCepz6aeExAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQELi3cqoDfaKuZM4AAAAASUVORK5CYII="
)
PING_WORDS = "Say ok."
PATIENCE = 5  # attempts where the server is busy or faulty


@dataclass(frozen=True, slots=True)
class Names:
    """How messages name what to change: the section of the recipe, and the environment variable of the key."""

    section: str = "teacher"
    key_env: str = ""

    def of(self, use: str) -> str:
        """The section of one use."""
        return f"{self.section}.{use}" if use else self.section


@dataclass(frozen=True, slots=True)
class Found:
    """What a check found.

    Attributes:
        unreachable: addresses that cannot be reached now, and why.
        several: all others give several choices at once.
        notes: what a person should know about the replies.
    """

    unreachable: tuple[str, ...]
    several: bool
    notes: tuple[str, ...] = ()


def read_key(key_env: str, base_urls: Sequence[str], section: str = "teacher") -> str:
    """The key in an environment variable; "" where none is set. Its value appears in no message.

    Raises:
        TeacherError: it cannot be a key, or there is none and OpenAI's own address is called.
    """
    key = os.environ.get(key_env, "").strip() if key_env else ""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise TeacherError(
            f"{section}.key_env: the value of the environment variable {key_env} is no key: it holds spaces or characters that no "
            "key has. Set it to the key alone"
        )
    if not key and any(urlsplit(url).hostname == OPENAI_HOST for url in base_urls):
        raise TeacherError(
            f"{section}.key_env: the environment variable {key_env or '(none)'} holds no key, and {OPENAI_HOST} wants one. Set it, "
            f"or name another variable in {section}.key_env"
        )
    return key


async def check_servers(
    wires: Sequence[Wire],
    bodies: Sequence[Mapping[str, Any]],
    use: str,
    names: Names,
    key_given: bool,
    whole: Mapping[str, Any] | None = None,
) -> Found:
    """Sends every address a small completion with the fields of one use.

    Args:
        bodies: requests for one choice, and for several where a request of this use asks for several.
        whole: a request with the token limit of this use, where it is higher: a server whose context is shorter refuses it.

    Raises:
        TeacherError: no address can be reached, or one refuses key, model or fields. The message names value, cause and mend.
    """
    results = await asyncio.gather(*(_check_one(wire, bodies, whole) for wire in wires))
    for wire, (trouble, _, _) in zip(wires, results, strict=True):
        if trouble is not None and not trouble.again:
            raise await _refusal(wire, trouble, str(bodies[0]["model"]), use, names, key_given)
    unreachable = tuple(trouble.reason for trouble, _, _ in results if trouble is not None)
    if len(unreachable) == len(wires):
        model = bodies[0]["model"]
        if all(trouble is not None and trouble.status is not None for trouble, _, _ in results):
            limited = not key_given and any(trouble is not None and trouble.status == 429 for trouble, _, _ in results)
            raise TeacherError(
                f"{names.section}.base_urls: the model {model!r} is not served: {'; '.join(unreachable)}. The server is there, and busy "
                "or out of order: start again when it serves, or correct the address"
                + (f"; no key was sent, and one may raise the limit ({names.section}.key_env)" if limited else "")
            )
        server = "zppo" if str(model).startswith("lab:") else "vllm"  # only zppo knows the bundled models
        raise TeacherError(
            f"{names.section}.base_urls: the model {model!r} cannot be reached: {'; '.join(unreachable)}. Start its server "
            f"(`{server} serve {model}` serves http://HOST:8000/v1), or correct the address"
        )
    notes = tuple(note for _, _, choices in results for note in _notes(choices, bodies[0], names.of(use)))
    return Found(unreachable, all(several for _, several, _ in results), notes)


def _notes(choices: Sequence[Choice], body: Mapping[str, Any], use: str) -> list[str]:
    """What the replies to the small completions say about a server that answers."""
    off = (body.get("chat_template_kwargs") or {}).get("enable_thinking") is False
    notes = [choice.why for choice in choices if choice.why and (choice.text is not None or not choice.thoughts)]
    if any(choice.text is not None and not choice.text.strip() and not choice.why for choice in choices):
        notes.append(
            f"{body['model']!r} answers `{PING_WORDS}` with an empty text: see in the server's log what it makes of it (a base model "
            "without a chat template?)"
        )
    if off and any(choice.thoughts and choice.text is None for choice in choices):
        notes.append(
            f"{body['model']!r} thinks although enable_thinking: false was sent, and thoughts count against {use}.max_new_tokens: raise it "
            f"or turn thinking off as this server wants it, with {use}.extra_body"
        )
    return list(dict.fromkeys(notes))


async def check_images(wires: Sequence[Wire], body: Mapping[str, Any], count: int, use: str, names: Names) -> None:
    """Sends every address a request about images. An address that cannot be reached is passed over: `check_servers` has said so.

    Raises:
        TeacherError: one refuses it.
    """
    for wire, (trouble, _) in zip(wires, await asyncio.gather(*(_ping(wire, body) for wire in wires)), strict=True):
        if trouble is not None and not trouble.again:
            raise TeacherError(
                f"{names.of(use)}: questions have up to {count} image(s), and {body['model']!r} at {wire.url} refuses them "
                f"({trouble.reason}). Name a vision-language model in {names.section}.model, let the server take as many "
                "(`--limit-mm-per-prompt` of vLLM), or leave the questions with images out"
            )


async def _check_one(
    wire: Wire, bodies: Sequence[Mapping[str, Any]], whole: Mapping[str, Any] | None
) -> tuple[Trouble | None, bool, Sequence[Choice]]:
    """What went wrong at one address, whether it gives several choices, and what it replied to the first of them."""
    trouble, first = await _ping(wire, bodies[0])
    if trouble is None and whole is not None:
        trouble = await _limit_refused(wire, whole)
    if trouble is not None or len(bodies) == 1:
        return trouble, True, first
    trouble, choices = await _ping(wire, bodies[1])
    # One that answers a request for one choice and breaks on another for several is asked one by one.
    return trouble if trouble is not None and trouble.again and not trouble.fault else None, len(choices) >= bodies[1]["n"], first


async def _ping(wire: Wire, body: Mapping[str, Any]) -> tuple[Trouble | None, Sequence[Choice]]:
    """What went wrong with a small completion, and the choices that came. A server that is busy is asked again, for some seconds."""
    for attempt in range(1, PATIENCE + 1):
        try:
            answer = await wire.chat(body, REPLY_BYTES, CHECK_SECONDS)
        except Trouble as trouble:
            if not trouble.again or trouble.status is None or attempt == PATIENCE:
                return trouble, ()
            await asyncio.sleep(max(backoff(attempt), min(trouble.wait, 10.0)))
        else:
            return None, answer.choices
    raise AssertionError("the last attempt returns")


async def _limit_refused(wire: Wire, whole: Mapping[str, Any]) -> Trouble | None:
    """Why a server refuses a token limit. It does so before it decodes anything: the answer itself is not waited for."""
    try:
        await wire.chat(whole, REPLY_BYTES, LIMIT_SECONDS)
    except Trouble as trouble:
        return trouble if trouble.status is not None and not trouble.again else None
    return None


async def _refusal(wire: Wire, trouble: Trouble, model: str, use: str, names: Names, key_given: bool) -> TeacherError:
    """What to change."""
    if trouble.moved:
        return TeacherError(
            f"{names.section}.base_urls: {trouble.reason}. If that is where it lives, write that address into {names.section}.base_urls"
        )
    if trouble.status in (401, 403):
        variable = names.key_env or "(none)"
        state = "holds a key that it refuses" if key_given else "is not set"
        return TeacherError(
            f"{names.section}.key_env: the environment variable {variable} {state} ({trouble.reason}). Put a valid key into it, one that "
            f"may use {model!r}, or name another one in {names.section}.key_env"
        )
    if trouble.status == PAYMENT and not key_given:
        return TeacherError(
            f"{names.section}.key_env: {wire.url} wants to be paid, and no key was sent: the environment variable "
            f"{names.key_env or '(none)'} is not set ({trouble.reason}). Put the key of an account into it, or name another server in "
            f"{names.section}.base_urls"
        )
    if trouble.status == PAYMENT:
        return TeacherError(
            f"{names.section}.key_env: the account of the key in {names.key_env or '(none)'} has no credit left ({trouble.reason}). Top it "
            "up, or name another server"
        )
    if trouble.status is None:
        return TeacherError(f"{names.section}.base_urls: {trouble.reason}")
    if trouble.status < 400 or trouble.status == 405:
        return TeacherError(
            f"{names.section}.base_urls: no chat completions are served there ({trouble.reason}). Correct the address: its path "
            "is mostly /v1"
        )
    served = await wire.models()
    if trouble.status == 404 or (served and model not in served):
        known = f"it serves {', '.join(served[:10])}" if served else "it does not say which models it serves"
        return TeacherError(
            f"{names.section}.model: {model!r} is not served ({trouble.reason}); {known}. Correct {names.section}.model, or "
            f"{names.section}.base_urls if the address lacks its path, mostly /v1"
        )
    return TeacherError(
        f"{names.of(use)}: the server refuses the request ({trouble.reason}). Change its sampling (max_new_tokens must fit the server's "
        f"context beside the prompt), or leave a field out with {names.of(use)}.extra_body, e.g. {{chat_template_kwargs: null}} "
        "or {seed: null}"
    )
