"""What a server's reply comes to: choices of text, thoughts apart, words that can be printed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REASON_CHARACTERS = 300
SHORTEST_SECRET = 8  # characters; a shorter key could be a word of an honest completion

_BASE64 = re.compile(r"(data:[\w/+.;=-]{1,60}?base64,)?([A-Za-z0-9+/]{60,}={0,2})")


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion.

    Attributes:
        text: None where there is none.
        why: there is none, or what a person should know about the server where the text is empty.
        again: asking again may help.
        thoughts: some came, in a field of their own.
    """

    text: str | None
    why: str = ""
    again: bool = False
    thoughts: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply: its choices, and the tokens that the server says it took."""

    choices: tuple[Choice, ...]
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Scrubber:
    """Takes the key out of texts, and makes a server's words fit to print."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "Scrubber()"

    def words(self, value: object, limit: int = REASON_CHARACTERS) -> str:
        """One line of at most `limit` characters without control characters, without the key and without images."""
        text = str(value)
        if self._key:  # before any cut, which could leave a piece of it
            text = text.replace(self._key, "[key]")
        text = _BASE64.sub(_without_data, text)[: 100 * limit]  # a refused request comes back in some errors, images and all
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= limit else f"{text[:limit]}..."

    def completion(self, text: str) -> str:
        """A completion that can be written to any file: no lone surrogates, and no key if the server echoes it."""
        text = sound(text)
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else text


def _without_data(found: re.Match[str]) -> str:
    """`[data]` for what is encoded data; a long word that merely could be some stays."""
    head, body = found.groups()
    mixed = head or (not body.isupper() and not body.islower() and any(c.isdigit() for c in body))
    return "[data]" if mixed else found[0]


def sound(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 file takes, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def split_content(content: object) -> tuple[str | None, str]:
    """(text, thoughts) of a message's content: a text, none, or a list of parts as Mistral sends them, thinking ones among them.

    Text parts are joined. (None, "") where it is none of these.
    """
    if isinstance(content, str) or content is None:
        return content or "", ""
    if not isinstance(content, list) or not all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in content):
        return None, ""
    thinking = [part.get(part["type"]) for part in content if part["type"] in ("thinking", "reasoning")]
    inner = [part for given in thinking for part in (given if isinstance(given, list) else [{"type": "text", "text": given}])]
    return _texts(content), _texts(inner)


def _texts(parts: Sequence[Any]) -> str:
    """The text parts, joined; others (references, pictures) are passed over."""
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def refusal_within(content: object) -> str:
    """The refusal among the parts of a message's content; "" without one."""
    parts = content if isinstance(content, list) else []
    return next((str(p.get("refusal") or "(no reason given)") for p in parts if isinstance(p, dict) and p.get("type") == "refusal"), "")


def is_hollow(choice: object) -> bool:
    """Whether a choice holds nothing that could be a completion: no message, or one without anything in it and without a reason to end."""
    if not isinstance(choice, dict) or choice.get("error"):
        return not isinstance(choice, dict)
    message = choice.get("message")
    if not isinstance(message, dict):
        return True
    return not isinstance(choice.get("finish_reason"), str) and not any(value for name, value in message.items() if name != "role")


_ERROR_WORDS = ("message", "detail", "msg", "error_msg", "error_message", "errorMessage", "Message", "error_description", "errors")


def error_within(reply: Mapping[str, Any]) -> object:
    """What an error says, as servers and the gateways before them name the field; None where it is none of these."""
    return next(
        (value for name in _ERROR_WORDS if (value := reply.get(name)) and not (name == "message" and isinstance(value, dict))), None
    )


def what_came(reply: object, content: bytes, scrub: Scrubber) -> str:
    """What a reply is that is no chat completion, in words that can be printed, with the mend where its shape tells it.

    Args:
        reply: its JSON, None where it is none.
        content: its bytes.
    """
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return "the reply is no text: if it is compressed without saying so, turn compression off in the server, or in the proxy before it"
    first = reply.get("choices") if isinstance(reply, dict) else None
    first = first[0] if isinstance(first, list) and first else None
    keys = first.keys() if isinstance(first, dict) else ()
    if not text:
        why = "an empty body"
    elif text.startswith("<"):
        why = "a web page (the address may lack its path, mostly /v1, or a login stands before it)"
    elif text.startswith(("data:", "event:")) or "delta" in keys:
        why = "a stream, which was not asked for (turn streaming off in the server, or with `stream: false` in extra_body)"
    elif "text" in keys and "message" not in keys:
        why = "a completion of the older API, /completions (the server must serve /chat/completions)"
    elif isinstance(reply, dict) and "done" in reply and "choices" not in reply:
        why = "one of Ollama's own API (the address of the other one ends in /v1)"
    elif isinstance(reply, dict) and "choices" in reply and not reply["choices"]:
        why = "a chat completion without choices"
    elif keys:
        why = "a chat completion without a message"
    else:
        why = ""
    start = scrub.words(text, 80)
    return f"the reply is no chat completion: {why}{': ' if why and start else ''}{repr(start) if start or not why else ''}"
