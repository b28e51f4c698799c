"""When a device has no room: how that is recognised, how what a failed attempt held is let go, and how less is tried."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from zppo.core.minibatch import PASS_TOKENS, MicroBatch, micro_batches
from zppo.engines.base import Completion, Engine, SampleRequest, Sampling
from zppo.errors import MemoryLimitError, ZPPOError

# What torch and the libraries below it say; only some of it comes as `torch.OutOfMemoryError`.
_SAID = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class MemoryElsewhereError(RuntimeError):
    """Memory ran out in another process, with which this one shares an attempt."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, so that the same work in smaller parts may succeed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and not isinstance(error, ZPPOError) and any(s in str(error) for s in _SAID)


def release() -> None:
    """Lets go of what a failed attempt held; to be called outside of the `except` block, which holds its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sample_in_halves(engine: Engine, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion] | str]:
    """Completions per request, or the reason why there are none.

    Where sampling a batch fails (out of memory, a device fault, a model's own error), its halves are tried on their own.
    """
    if not requests:
        return []
    try:
        return list(engine.sample(requests, sampling))
    except Exception as error:
        if len(requests) == 1:
            return [f"{type(error).__name__}: {error}"]
    # Outside of the handler, where the failed attempt's tensors are released.
    half = len(requests) // 2
    return sample_in_halves(engine, requests[:half], sampling) + sample_in_halves(engine, requests[half:], sampling)


class _Failed(NamedTuple):
    """Where memory ran out: padded tokens of the largest micro-batch, those of the longest row, and whether each held one row."""

    largest: int
    longest: int
    single: bool


class TokenBudget:
    """The padded tokens of a micro-batch: a number, or what the memory turns out to hold.

    Args:
        tokens: the budget at the start.
        adaptive: halve it whenever memory runs out (`train.tokens_per_microbatch: auto`).
        say: called with a message when memory has run out and what fits from then on.
        overhead: what a pass costs in addition to its tokens, in tokens; decides between padding and more micro-batches.
        merged: padded tokens of a micro-batch of several packs that share a prompt, if that is less; None: it is not.

    Attributes:
        tokens: the budget now; where it is adaptive part of a checkpoint.
    """

    def __init__(
        self,
        tokens: int,
        *,
        adaptive: bool = False,
        say: Callable[[str], None] | None = None,
        overhead: int = PASS_TOKENS,
        merged: int | None = None,
    ) -> None:
        self.tokens, self.adaptive, self.say, self.overhead, self.merged = tokens, adaptive, say, overhead, merged
        self._before = tokens  # the first failed attempt

    def split(self, lengths: Sequence[int], packs: Sequence[list[int]] | None = None) -> list[MicroBatch]:
        """Micro-batches under the budget as it is now: of packs of these lengths, or of rows."""
        packs = packs if packs is not None else [[row] for row in range(len(lengths))]
        limited = self.merged is not None and any(len(pack) > 1 for pack in packs)
        batches = micro_batches(lengths, min(self.tokens, self.merged or 0) if limited else self.tokens, self.overhead)
        return [MicroBatch([packs[i] for i in batch], lengths[batch[0]]) for batch in batches]

    def shrink(
        self,
        error: RuntimeError,
        batches: Sequence[MicroBatch],
        longest: int,
        of_all: Callable[[_Failed | None], Sequence[_Failed | None]] = lambda own: [own],
    ) -> None:
        """Halve the budget after `batches` ran out of memory; the caller begins again from nothing, with smaller micro-batches.

        Args:
            error: what the attempt raised.
            longest: tokens of the longest row.
            of_all: tells what failed to all processes that share the attempt, which have one budget, and gives what failed in each.

        Raises:
            RuntimeError: `error` itself, where it says something else.
            MemoryLimitError: the budget is fixed, or where memory ran out every micro-batch holds one row.
        """
        if not out_of_memory(error):
            raise error
        own = None
        if not isinstance(error, MemoryElsewhereError):
            largest, single = max((batch.padded for batch in batches), default=0), all(len(batch.rows) == 1 for batch in batches)
            own = _Failed(largest, longest, single)
        failed = [each for each in of_all(own) if each is not None]
        worst = min(failed, key=lambda each: (not each.single, each.largest))
        if not self.adaptive or worst.single:
            raise MemoryLimitError(self._too_large(worst.largest, worst.longest)) from error
        self.tokens = max(1, min(self.tokens, worst.largest) // 2)

    def fits(self) -> None:
        """An attempt has succeeded: where others have failed before it, say what fits from now on."""
        if self.tokens != self._before and self.say is not None:
            self.say(
                f"memory ran out in the update; micro-batches hold {self.tokens:,} tokens from now on, where it were {self._before:,} "
                "(train.tokens_per_microbatch)"
            )
        self._before = self.tokens

    def state_dict(self) -> dict[str, int]:
        """What was found out, JSON-ready; empty where the budget is fixed."""
        return {"tokens_per_microbatch": self.tokens} if self.adaptive else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with what was found out; a fixed budget stays as it is."""
        if self.adaptive:
            self.tokens = self._before = state.get("tokens_per_microbatch", self.tokens)

    def _too_large(self, largest: int, longest: int) -> str:
        lighter = "turn train.gradient_checkpointing on, train with train.lora or train.optimizer=adamw-8bit"
        if largest > longest and not self.adaptive:
            return (
                f"memory ran out in a micro-batch of {largest:,} tokens: set train.tokens_per_microbatch to auto or to less than "
                f"{self.tokens:,}, or {lighter}"
            )
        return (
            f"memory ran out with a single row of {longest:,} tokens in the update: lower rollout.max_new_tokens or "
            f"data.max_prompt_tokens, or {lighter}"
        )
