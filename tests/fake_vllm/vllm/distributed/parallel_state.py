"""vLLM's own process groups; the stand-in has none."""

from __future__ import annotations

_WORLD = None


def destroy_model_parallel() -> None:
    """Nothing to end."""
