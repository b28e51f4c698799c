"""The answer of a completion: the last balanced box after the thinking (method.md section 7)."""

from __future__ import annotations

import re

_THINK_OPEN = "<think>"
_THINK_CLOSE = "</think>"
# A run of backslashes with a box or a brace behind it, or a brace. Runs are taken whole (possessive), so that a million
# backslashes, like ten thousand unclosed boxes, cost one pass over the text.
_TOKEN = re.compile(r"(?P<run>\\++)(?:(?P<box>boxed\s*+\{)|(?P<behind>[{}]?))|(?P<brace>[{}])")
_WHOLE_BOX = re.compile(r"\\++boxed\s*+\{(.*)\}", re.DOTALL)
_UNWRAPPED = 8  # boxes around one answer that are taken off; more is an attack, and each costs a pass


def final_part(text: str, think_open: bool = False) -> str | None:
    """The part of a completion that may hold the answer: what follows the last `</think>`.

    Args:
        text: the completion.
        think_open: whether the chat template ended the prompt inside an opened think block.

    Returns:
        The text after the last `</think>`; the whole text if there are no think tags; None where a think block is still
        open at the end.
    """
    close = text.rfind(_THINK_CLOSE)
    if text.rfind(_THINK_OPEN) > close or (think_open and close < 0):
        return None
    return text[close + len(_THINK_CLOSE) :] if close >= 0 else text


def last_box(text: str) -> str | None:
    """Content of the last balanced `\\boxed{...}`, the outer one of two nested ones; None without a box. Linear time."""
    opened: list[int | None] = []  # for every open brace: where a box's content starts, None for an ordinary brace
    span: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.end())
            continue
        escaped = token["run"] is not None and len(token["run"]) % 2 == 1
        brace = "" if escaped else token["brace"] or token["behind"]
        if brace == "{":
            opened.append(None)
        elif brace == "}" and opened:
            start = opened.pop()
            if start is not None:
                span = (start, token.start())
    return None if span is None else text[span[0] : span[1]]


def extract_boxed(text: str, think_open: bool = False) -> str | None:
    """The answer of a completion (method.md section 7).

    Args:
        text: the completion.
        think_open: whether the prompt already ended inside an opened think block.

    Returns:
        Content of the last balanced `\\boxed{}` after the last `</think>`, without surrounding white space. None if there is
        no box, the box is empty, or the thinking never ended. [zppo] Of boxes inside one another the outer one counts, so
        that `\\boxed{3 or \\boxed{5}}` is not 5; a box that only holds a box is unwrapped.
    """
    part = final_part(text, think_open)
    content = None if part is None else last_box(part)
    if content is None:
        return None
    for _ in range(_UNWRAPPED):
        inner = _WHOLE_BOX.fullmatch(content.strip())
        if inner is None or last_box(content) != inner[1]:
            break
        content = inner[1]
    return content.strip() or None
