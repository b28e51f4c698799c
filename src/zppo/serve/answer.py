"""Completions as the protocol writes them."""

from __future__ import annotations

import time
import uuid
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from zppo.engines.base import Completion
from zppo.serve.words import Words


def answer(
    words: Words,
    model: str,
    prompt_tokens: int,
    completions: Sequence[Completion],
    *,
    stop: Sequence[str] = (),
    logprobs: bool = False,
) -> dict[str, Any]:
    """The body of an answer.

    `usage` counts what was decoded: end tokens, and what stood behind a stop text, too.

    Args:
        model: name that the model is served under.
        prompt_tokens: length of the prompt.
        completions: one per choice.
        stop: a text ends before the first of these.
        logprobs: whether to list the tokens of each choice.
    """
    generated = sum(len(completion.ids) for completion in completions)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(words, i, completion, stop, logprobs) for i, completion in enumerate(completions)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        },
    }


def _choice(words: Words, index: int, completion: Completion, stop: Sequence[str], logprobs: bool) -> dict[str, Any]:
    ids = completion.ids.tolist()
    text = words.decode(ids)
    stops = [place for place in (text.find(s) for s in stop) if place >= 0]
    if stops:
        text = text[: min(stops)]
        ids = ids[: _tokens_to_stop(words, ids, stop)]
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": {"content": _tokens(words, ids, completion.logprobs.tolist()), "refusal": None}
        if logprobs
        else None,
        "finish_reason": "length" if completion.truncated and not stops else "stop",
    }


def _tokens_to_stop(words: Words, ids: Sequence[int], stop: Sequence[str]) -> int:
    """How many tokens it takes until a stop text is complete."""

    def complete(count: int) -> bool:
        text = words.decode(ids[:count])
        return any(s in text for s in stop)

    return bisect_left(range(len(ids)), True, key=complete)


def _tokens(words: Words, ids: Sequence[int], logprobs: Sequence[float]) -> list[dict[str, Any]]:
    """The protocol's list of tokens; `bytes` is null for a token that is a part of a character."""
    listed = []
    for index, logprob in zip(ids, logprobs, strict=False):
        text = words.token(index)
        listed.append(
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else list(text.encode()),
                "top_logprobs": [],
            }
        )
    return listed
