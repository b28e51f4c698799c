"""A whole step of ours, GRPO and ZPPO, against a step of stock TRL GRPO on the same questions, in turn."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.pair import sides
from benchmarks.tables import markdown
from benchmarks.world import QUICK, Shape

SHARES = (0.5, 0.3, 0.7)
PEER_ROWS = (16, 32, 64)
WARM = 2  # steps that are not counted: imports, caches, and a buffer to replay from


def measure(options: Options) -> Mapping[str, Any]:
    """TRL with three micro-batch sizes at the first share; the fastest one at the others too."""
    shape, repetitions = (QUICK, 1) if options.quick else (Shape(), 7)
    peer_rows = (4,) if options.quick else PEER_ROWS
    shares = SHARES[:1] if options.quick else SHARES
    found: dict[str, Any] = {}
    with sides(shape, options.threads, peer_rows=peer_rows, methods=("grpo", "zppo")) as started:
        for _ in range(WARM):
            for worker in started.values():
                worker.ask({"trivial": 0.5})
        names = list(started)
        for share in shares:
            steps = interleaved(repetitions, {n: partial(started[n].ask, {"trivial": share}) for n in names})
            peers = [n for n in names if n.startswith("trl")]
            best = min(peers, key=lambda n: medians(steps[n])["step"])
            names = ["grpo", "zppo", best]
            found[f"{share:.0%}"] = {
                "peer": best,
                "ratios": {n: ratio(steps[n], steps[best], "step") for n in ("grpo", "zppo")},
                "cpu_ratios": {n: ratio(steps[n], steps[best], "cpu") for n in ("grpo", "zppo")},
                "medians": {n: medians(rows) for n, rows in steps.items()},
                "repetitions": repetitions,
            }
    return {"shape": vars(shape), "shares": found}


PARTS = ("sampling", "logprobs", "update", "teacher", "other", "step")


def table(result: Mapping[str, Any]) -> str:
    """Ratios first, then seconds by part."""
    shares = result["shares"]
    names = {"grpo": "our GRPO", "zppo": "our ZPPO"}
    ratios = [
        (
            f"{name} / TRL GRPO",
            *(
                f"**{s['ratios'][n]['median']:.2f}** ({s['ratios'][n]['low']:.2f}-{s['ratios'][n]['high']:.2f})"
                for s in shares.values()
            ),
        )
        for n, name in names.items()
    ]
    ratios += [
        (f"the same in processor seconds, {n}", *(f"{s['cpu_ratios'][n]['median']:.2f}" for s in shares.values()))
        for n in names
    ]
    parts = [
        (
            f"{share}, {names.get(n, n)}",
            *(f"{m[part]:.3f}" for part in PARTS),
            f"{m['student_tokens']:,.0f}",
            f"{m['memory'] / 2**20:.0f}",
        )
        for share, s in shares.items()
        for n, m in s["medians"].items()
    ]
    return (
        markdown(["groups without a gradient", *shares], ratios)
        + "\n\n"
        + markdown(["seconds of a step", *PARTS, "tokens sampled", "peak MiB"], parts)
    )


if __name__ == "__main__":
    sys.exit(run("step_vs_trl", measure))
