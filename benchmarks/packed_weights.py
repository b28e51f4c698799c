"""A linear layer of SmolLM2-135M with packed weights (zppo.engines.packed_linear) and as the library has it, by rows and precision."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.common import Options, run
from benchmarks.tables import markdown

SIZE = (576, 1536)
LAYERS = 30  # so that weights come from memory, as in a model
ROWS = (1, 4, 8, 16, 32, 64, 600)
TURNS = 25


def measure(options: Options) -> Mapping[str, Any]:
    """GFLOP/s: the fastest of some turns, which other work disturbs least."""
    import torch

    from zppo.engines.packed_linear import PackedLinear

    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    turns = 1 if options.quick else TURNS
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            layers = [torch.nn.Linear(*SIZE, bias=False, dtype=dtype) for _ in range(LAYERS)]
            ways: dict[str, list[Callable[[Any], Any]]] = {"packed": [PackedLinear(layer, None) for layer in layers], "plain": [*layers]}
            for rows in ROWS[: 1 if options.quick else None]:
                given = torch.randn(rows, SIZE[0], dtype=dtype)
                rates = {name: _rate(way, given, turns) for name, way in ways.items()}
                found.setdefault(str(dtype).removeprefix("torch."), {})[str(rows)] = rates
    return {"size": SIZE, "layers": LAYERS, "rates": found}


def _rate(layers: list[Callable[[Any], Any]], given: Any, turns: int) -> float:
    best = float("inf")
    for turn in range(turns + 1):  # packs in the first
        began = time.perf_counter()
        for layer in layers:
            layer(given)
        best = min(best, time.perf_counter() - began) if turn else best
    return 2 * len(given) * SIZE[0] * SIZE[1] * len(layers) / best / 1e9


def table(result: Mapping[str, Any]) -> str:
    """Rates side by side."""
    rows = [
        (f"{dtype}, {count} rows", rates["packed"], rates["plain"], f"**{rates['packed'] / rates['plain']:.2f}**")
        for dtype, by_rows in result["rates"].items()
        for count, rates in by_rows.items()
    ]
    return markdown(["", "packed, GFLOP/s", "the library's, GFLOP/s", "times as fast"], rows)


if __name__ == "__main__":
    sys.exit(run("packed_weights", measure))
