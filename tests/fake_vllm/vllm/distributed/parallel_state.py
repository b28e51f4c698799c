"""vLLM's own process groups; the stand-in has none."""

from __future__ import annotations


def cleanup_dist_env_and_memory() -> None:
    """Nothing to end."""
