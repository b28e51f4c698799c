"""A whole step of ours, GRPO and ZPPO, against a step of stock TRL GRPO on the same questions, in turn."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.pair import sides
from benchmarks.tables import markdown, span
from benchmarks.world import QUICK, Shape

SHARES = (0.5, 0.3, 0.7)
PEER_ROWS = (8, 32, 64)
WARM = 2  # steps that are not counted: imports, caches, and a buffer to replay from
NAMES = {"grpo": "our GRPO", "zppo": "our ZPPO"}
PARTS = ("sampling", "logprobs", "update", "teacher", "other", "step")
TARGETS = {"grpo": 0.45, "zppo": 0.75}


def measure(options: Options) -> Mapping[str, Any]:
    """TRL with three micro-batch sizes at the first share; the fastest one at the others too."""
    shape = QUICK if options.quick else Shape()
    peer_rows, shares = ((8,), SHARES[:1]) if options.quick else (PEER_ROWS, SHARES)
    found: dict[str, Any] = {}
    with sides(shape, options.threads, peer_rows=peer_rows, methods=("grpo", "zppo")) as started:
        for _ in range(WARM):
            for worker in started.values():
                worker.ask({"trivial": 0.5})
        names = list(started)
        for share in shares:
            turns = {n: partial(started[n].ask, {"trivial": share}) for n in names}
            turns["rates"] = partial(started["grpo"].ask, {"rates": True})
            steps = interleaved(options.repetitions, turns)
            best = min((n for n in names if n.startswith("trl")), key=lambda n: medians(steps[n])["step"])
            names = [*NAMES, best]
            found[f"{share:.0%}"] = {
                "peer": best,
                "ratios": {n: ratio(steps[n], steps[best], "step") for n in NAMES},
                "cpu_ratios": {n: ratio(steps[n], steps[best], "cpu") for n in NAMES},
                "medians": {n: medians(rows) for n, rows in steps.items()},
                "peak_bytes": {n: max(row["memory"] for row in steps[n]) for n in started if n in steps},
            }
    return {"shape": vars(shape), "repetitions": options.repetitions, "shares": found}


def table(result: Mapping[str, Any]) -> str:
    """Ratios first, then seconds by part, how far each part is from its floor, and memory."""
    shares = result["shares"]
    return "\n\n".join((_ratios(shares), _parts(shares), _floors(shares), _memory(shares)))


def _ratios(shares: Mapping[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = [
        (f"**{name} / TRL GRPO**", *(span(s["ratios"][n]) for s in shares.values())) for n, name in NAMES.items()
    ]
    rows += [(f"{name}, in processor seconds", *(span(s["cpu_ratios"][n]) for s in shares.values())) for n, name in NAMES.items()]
    rows.append(("tokens computed / needed, GRPO", *(_waste(s["medians"]["grpo"]) for s in shares.values())))
    rows.append(("tokens computed / needed, ZPPO", *(_waste(s["medians"]["zppo"]) for s in shares.values())))
    return markdown(["groups without a gradient", *shares], rows)


def _waste(row: Mapping[str, float]) -> float:
    return row["train_tokens_computed"] / row["train_tokens_needed"]


def _parts(shares: Mapping[str, Any]) -> str:
    rows = [
        (share, _called(name), *(f"{row[part]:.3f}" for part in PARTS), row["student_tokens"])
        for share, s in shares.items()
        for name, row in s["medians"].items()
        if name != "rates"
    ]
    return markdown(["", "seconds of", *PARTS, "tokens sampled"], rows)


def _floors(shares: Mapping[str, Any]) -> str:
    rows = []
    for share, s in shares.items():
        for name in NAMES:
            row, rates = s["medians"][name], s["medians"]["rates"]
            for part in ("sampling", "update"):
                floor = row[f"{part}_operations"] / rates[part]
                cells = (row[f"{part}_operations"] / 1e9, rates[part] / 1e9, floor, row[part], row[part] / floor)
                rows.append((share, _called(name), part, *cells))
    return markdown(["", "", "part", "must do, GFLOP", "matrix product, GFLOP/s", "floor, s", "took, s", "times the floor"], rows)


def _memory(shares: Mapping[str, Any]) -> str:
    peaks: dict[str, float] = next(iter(shares.values()))["peak_bytes"]
    best = next(iter(shares.values()))["peer"]
    rows = [(_called(n), peak / 2**20, peak / peaks[best]) for n, peak in peaks.items()]
    return markdown(["peak memory above the loaded model", "MiB", "of the fastest TRL's"], rows)


def _called(name: str) -> str:
    return NAMES.get(name) or f"TRL GRPO, {name.split()[1]} rows a micro-batch"


if __name__ == "__main__":
    sys.exit(run("step_vs_trl", measure))
