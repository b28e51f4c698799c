"""Sampling that survives what one batch cannot do."""

from __future__ import annotations

from collections.abc import Sequence

from zppo.engines.base import Completion, Engine, SampleRequest, Sampling


def sample_in_halves(
    engine: Engine, requests: Sequence[SampleRequest], sampling: Sampling
) -> list[list[Completion] | str]:
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
