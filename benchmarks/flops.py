"""The floor: floating-point operations that a step cannot do without, and the rate at which this machine multiplies matrices.

Counted are multiplications of matrices, two operations per multiplication and addition: linear layers, attention over what stands
before a token, and logits where a token is predicted. Norms, activations, softmax, the optimizer and everything that moves memory
count as nothing, so no program reaches the floor; how far it is away says how much there is to gain at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.common import best_of


class Line(NamedTuple):
    """One rollout: tokens of prompt and completion, and whether it has a gradient."""

    prompt: int
    completion: int
    live: bool


class Cost(NamedTuple):
    """Of a decoder.

    Attributes:
        token: operations of the linear layers per token.
        pair: of attention, per token and token that it looks at.
        logits: of the output layer, per predicted token.
    """

    token: int
    pair: int
    logits: int

    @classmethod
    def of(cls, config: Any) -> Cost:
        """From a configuration of a dense decoder (Qwen3)."""
        heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        attention = config.hidden_size * size * (2 * heads + 2 * kv)
        mlp = 3 * config.hidden_size * config.intermediate_size
        layers = config.num_hidden_layers
        return cls(2 * layers * (attention + mlp), 4 * layers * heads * size, 2 * config.hidden_size * config.vocab_size)

    def forward(self, prompt: int, completion: int) -> int:
        """One row, scored: its last token is predicted and never read."""
        read = prompt + completion - 1
        return read * self.token + read * (read + 1) // 2 * self.pair + completion * self.logits

    def training(self, lines: Sequence[Line]) -> int:
        """Forward and backward, twice the forward, of every row that has a gradient, each by itself."""
        return sum(3 * self.forward(line.prompt, line.completion) for line in lines if line.live)

    def sampling(self, groups: Sequence[Sequence[Line]]) -> int:
        """Every prompt is read once for all its rollouts, every token of a completion once but the last."""
        total = 0
        for lines in groups:
            prompt = lines[0].prompt
            total += prompt * self.token + prompt * (prompt + 1) // 2 * self.pair
            for line in lines:
                read = line.completion - 1
                total += read * self.token + (read * prompt + read * (read + 1) // 2) * self.pair
                total += line.completion * self.logits
        return total


def rate(rows: int, inner: int, columns: int, dtype: Any = None, device: str = "cpu") -> float:
    """Operations a second of the plain product (rows, inner) x (inner, columns), the fastest of several tries."""
    import torch

    left = torch.randn(rows, inner, dtype=dtype, device=device)
    right = torch.randn(inner, columns, dtype=dtype, device=device)
    times = max(1, int(2e8 // (2 * rows * inner * columns)))

    def products() -> None:
        for _ in range(times):
            left @ right
        if device != "cpu":
            torch.cuda.synchronize()

    return times * 2 * rows * inner * columns / best_of(7, products)


def rates(config: Any, training_tokens: int, sampling_rows: int) -> dict[str, float]:
    """Of the product that the model is mostly made of, in the shapes of a micro-batch and of a step of decoding."""
    width, wide = config.hidden_size, config.intermediate_size
    return {"update": rate(training_tokens, width, wide), "sampling": rate(sampling_rows, width, wide)}
