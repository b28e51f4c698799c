"""A step on the shape of a real small model, SmolLM2-135M: ours, GRPO and ZPPO, against stock TRL GRPO, in turn.

Random weights. Completions have log-normal lengths, the same for both sides: each is told by its own engine's way (a logits processor
of `generate`, the watcher of ours) where a row ends, which takes microseconds in steps of a tenth of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.pair import sides
from benchmarks.tables import markdown, span
from benchmarks.world import Shape, make_llama

SHAPE = Shape(questions=4, group=8, prompt=(150, 150), limit=96, layers=30, width=576, steps=16, lognormal=(32.0, 0.6), vocabulary=49_152)
QUICK = replace(SHAPE, layers=2, width=192, limit=12, lognormal=(6.0, 0.6), vocabulary=300)
PEER_ROWS = (8,)  # more of them are compared by a first step, and the fastest goes on
NAMES = {"grpo": "our GRPO", "zppo": "our ZPPO"}
TARGETS = {"grpo": 0.15, "zppo": 0.27, "memory": 0.35}
PARTS = ("sampling", "logprobs", "update", "teacher", "other", "step")


def measure(options: Options) -> Mapping[str, Any]:
    """Each side has a step that is not counted, ZPPO two; the peer's micro-batch sizes are compared in it."""
    shape, peer_rows = (QUICK, (8,)) if options.quick else (SHAPE, PEER_ROWS)
    peers = [f"trl {rows}" for rows in peer_rows]
    with sides(shape, options.threads, peer_rows=peer_rows, methods=tuple(NAMES), make=make_llama) as started:
        first = {name: started[name].ask({"trivial": 0.5}) for name in started}
        started["zppo"].ask({"trivial": 0.5})  # a buffer to replay from
        best = min(peers, key=lambda name: first[name]["cpu"])
        for name in set(peers) - {best}:
            started[name].close()
        names = [*NAMES, best]
        steps = interleaved(options.repetitions, {name: partial(started[name].ask, {"trivial": 0.5}) for name in names})
    return {
        "shape": vars(shape),
        "repetitions": options.repetitions,
        "peer": best,
        "peers_first": {name: first[name]["cpu"] for name in peers},
        "cpu_ratios": {name: ratio(steps[name], steps[best], "cpu") for name in NAMES},
        "medians": {name: medians(rows) for name, rows in steps.items()},
        "peak_bytes": {name: max(row["memory"] for row in steps[name]) for name in names},
    }


def table(result: Mapping[str, Any]) -> str:
    """Processor seconds and memory first, then where the time goes."""
    found, peaks, best = result["medians"], result["peak_bytes"], result["peer"]
    rows = [
        (f"**{name} / TRL GRPO**", span(result["cpu_ratios"][n]), TARGETS[n], peaks[n] / peaks[best], TARGETS["memory"])
        for n, name in NAMES.items()
    ]
    ratios = markdown(["", "processor seconds", "target", "peak memory", "target"], rows)
    called = {**NAMES, best: f"TRL GRPO, {best.split()[1]} rows a micro-batch"}
    parts = [
        (called[n], f"{row['cpu']:.1f}", *(f"{row[part]:.1f}" for part in PARTS), peaks[n] / 2**20, row["student_tokens"])
        for n, row in found.items()
    ]
    return ratios + "\n\n" + markdown(["", "processor s", *(f"{part}, s" for part in PARTS), "peak MiB", "tokens sampled"], parts)


if __name__ == "__main__":
    sys.exit(run("real_shape", measure))
