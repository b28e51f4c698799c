"""What a sampling engine is. Engines know token ids only: no questions, no words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the command line reads these types before it needs torch
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
        return (
            self.temperature > 0
            and self.top_p >= 1
            and self.top_k == 0
            and self.min_p == 0
            and self.presence_penalty == 0
            and self.repetition_penalty == 1
        )


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt and the keys of its rollouts: `len(keys)` completions are sampled, each drawn from its own key alone."""

    prompt_ids: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled completion.

    Attributes:
        ids: (T,) int64 on the CPU, T >= 1, with the end token where it finished by itself.
        logprobs: (T,) float32 on the CPU, of `ids` under the distribution that they were drawn from.
        truncated: True where the limit stopped it.
        entropy: mean entropy over its tokens of the sampling distribution, nats.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    truncated: bool
    entropy: float


class Engine(Protocol):
    """Samples completions from the current weights of one model."""

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        """Completions per request, in the order of its keys."""
        ...
