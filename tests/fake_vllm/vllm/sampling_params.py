"""vLLM's sampling parameters, those that the project uses; others are refused."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    regex: str | None = None


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    if TYPE_CHECKING:  # callers unpack dictionaries with values of several types

        def __init__(self, **parameters: Any) -> None: ...

    def __post_init__(self) -> None:
        assert self.n >= 1 and self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0 and 0 <= self.min_p <= 1
        assert -2 <= self.presence_penalty <= 2 and self.repetition_penalty > 0 and self.max_tokens >= 1
        assert self.logprobs == 0 and all(isinstance(i, int) for i in self.stop_token_ids or ())
        assert all(-100 <= bias <= 100 for bias in (self.logit_bias or {}).values())
