"""What a sampling engine is. Engines know token ids only: no questions, no words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zppo.core.types import ImageRef
from zppo.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p 1, top_k 0, min_p 0 and the penalties' neutral values mean off.

    presence_penalty and repetition_penalty act on the completion's own tokens (the usual serving convention for presence; repetition
    counts the prompt too).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 12_288

    @property
    def exact(self) -> bool:
        """Whether sampling log-probs equal those of a training forward at the same temperature (no truncation, no penalties)."""
        return self.temperature > 0 and self == Sampling(self.temperature, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt and the keys of its rollouts: `len(keys)` completions are sampled, each drawn from its own key alone.

    `images` are those that stand in the prompt, in order; its ids hold one token for every feature of them.
    """

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled completion.

    Attributes:
        ids: (T,) int64 on the CPU, T >= 1, with the end token where it finished by itself.
        logprobs: (T,) float32 on the CPU, of `ids` under the distribution that they were drawn from.
        truncated: True where the limit stopped it.
        entropy: mean entropy over its tokens of the sampling distribution, nats; NaN where the engine does not tell.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    truncated: bool
    entropy: float


def check_requests(requests: Sequence[SampleRequest], sampling: Sampling, vocab_size: int, context: int | None) -> None:
    """Refuses what no engine can sample.

    Args:
        vocab_size, context: ids that the model knows, and its positions (None: unknown).

    Raises:
        ModelError: no requests; a request without prompt tokens, without keys, with ids outside the vocabulary or with a
            prompt that fills the model's context; a limit below 1.
    """
    if not requests:
        raise ModelError("nothing to sample: the list of requests is empty; give at least one prompt")
    if sampling.max_new_tokens < 1:
        raise ModelError(f"max_new_tokens is {sampling.max_new_tokens}: a completion has at least one token; give 1 or more")
    for i, request in enumerate(requests):
        if not request.prompt_ids or not request.keys:
            what = "prompt tokens" if not request.prompt_ids else "keys"
            raise ModelError(f"request {i} has no {what}: every request needs a prompt and one key per completion")
        low, high = min(request.prompt_ids), max(request.prompt_ids)
        if low < 0 or high >= vocab_size:
            raise ModelError(
                f"request {i} holds token id {low if low < 0 else high}, but the model knows ids 0 to "
                f"{vocab_size - 1}: tokenizer and model do not belong together; load both from one checkpoint"
            )
        if context is not None and len(request.prompt_ids) >= context:
            raise ModelError(
                f"request {i} has a prompt of {len(request.prompt_ids)} tokens, but the model's context is "
                f"{context}: shorten the prompt or drop the question (the recipe's prompt limit does that)"
            )


def check_end_tokens(eos_ids: Collection[int], banned_ids: Collection[int]) -> None:
    """Raises `ModelError` where every end token is banned: completions would never end."""
    if not set(eos_ids) - set(banned_ids):
        raise ModelError(
            f"no end token is left to draw (end tokens {sorted(eos_ids)}, banned {sorted(banned_ids)}): "
            "completions would never end; set the tokenizer's eos_token or the generation config's eos_token_id"
        )


Watcher = Callable[[int, Callable[[], list[tuple[int, int]]]], Collection[int]]
"""Told at each step of a batch: the step, from 0, and how to get the (row, token) that were drawn; gives the rows that end here."""

Ended = tuple[int, int, Completion]
"""A completion that has ended: its request's place, its key's place, what was sampled."""


class Engine(Protocol):
    """Samples completions from the current weights of one model."""

    def sync(self) -> None:
        """Takes over the model's weights; called before the first sampling and whenever they have changed."""
        ...

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        """Completions per request, in the order of its keys."""
        ...

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        """The same completions, each as soon as it has ended, so that it can be graded while others are sampled."""
        ...


Listed = tuple[list[list[int]], list[list[float]] | None]


class FunctionEngine:
    """An engine of a function that samples as it likes: its draws are its own, not keyed, and it knows how it samples.

    Args:
        function: takes the ids of R prompts and a number n; gives R * n lists of ids, n of each prompt in turn, with the end token where
            there is one, and as many lists of their log-probs, or None.
        ends: ids that end a completion; one that ends otherwise was truncated.
    """

    def __init__(self, function: Callable[[list[list[int]], int], Listed], ends: Collection[int]) -> None:
        self.function, self.ends = function, frozenset(ends)

    def sync(self) -> None:
        """The function's own business."""

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        """As `stream`."""
        return in_order(requests, list(self.stream(requests, sampling)))

    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        """Completions of requests with equally many keys. ModelError where the function gives another number of them, or an empty one."""
        import torch

        n = len(requests[0].keys)
        made, logprobs = self.function([list(request.prompt_ids) for request in requests], n)
        if len(made) != len(requests) * n or not all(made):
            raise ModelError(f"the sampling function gave {len(made)} completions for {len(requests)} prompts, of {n} each with a token")
        for place, ids in enumerate(made):
            known = torch.tensor(logprobs[place] if logprobs else [math.nan] * len(ids), dtype=torch.float32)
            yield place // n, place % n, Completion(torch.tensor(ids), known, ids[-1] not in self.ends, math.nan)


def in_order(requests: Sequence[SampleRequest], ended: Sequence[Ended]) -> list[list[Completion]]:
    """What `Engine.stream` gave as `Engine.sample` gives it."""
    done = {(request, key): completion for request, key, completion in ended}
    return [[done[i, j] for j in range(len(request.keys))] for i, request in enumerate(requests)]
