"""What a run shows while it goes on."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from zppo.runs.display import Progress


def test_running_means_begin_unbiased() -> None:
    """The mean after n steps weighs them by 0.9 ** age over the sum of these weights: no step counts more because it came first."""
    progress = Progress(Console(file=io.StringIO()), 100, ("plain",), replay=False)
    values = [0.0, 1.0, 0.5, 0.25, 1.0] * 4
    for step, value in enumerate(values, 1):
        progress.step(step, {"seconds": {"step": 1.0}, "accuracy": {"plain": value}, "tokens_per_second": 1.0}, SimpleNamespace())
        weights = [0.9 ** (step - i) for i in range(1, step + 1)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert progress._means["plain"] == pytest.approx(expected)
