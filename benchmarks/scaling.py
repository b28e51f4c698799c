"""How the ratio to stock TRL holds up with more prompts per step, longer prompts and other group sizes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.pair import sides
from benchmarks.tables import markdown, span
from benchmarks.world import QUICK, Shape

BASE = Shape(steps=4)
PEER_ROWS = 32
CASES: dict[str, tuple[Shape, int, int]] = {
    "16 questions": (BASE, 1, 2),
    "64 questions": (dataclasses.replace(BASE, questions=64), 0, 2),
    "256 questions": (dataclasses.replace(BASE, questions=256), 0, 1),
    "prompts of 200 to 240 tokens": (dataclasses.replace(BASE, prompt=(200, 240)), 1, 2),
    "groups of 4": (dataclasses.replace(BASE, group=4), 1, 2),
    "groups of 16": (dataclasses.replace(BASE, group=16), 1, 1),
}
"""Shape, steps that are not counted, and steps that are: few where a step is long, and warm-up is nothing beside it."""


def measure(options: Options) -> Mapping[str, Any]:
    """Our GRPO and TRL's, half of the groups without a gradient, everything but the named as in `step_vs_trl`."""
    cases = {"quick": (QUICK, 0, 1)} if options.quick else CASES
    rows = 8 if options.quick else PEER_ROWS
    found = {}
    for name, (shape, warm, repetitions) in cases.items():
        with sides(shape, options.threads, peer_rows=(rows,)) as started:
            turns = {n: partial(worker.ask, {"trivial": 0.5}) for n, worker in started.items()}
            interleaved(warm, turns)
            steps = interleaved(repetitions, turns)
        ours, theirs = steps["grpo"], steps[f"trl {rows}"]
        found[name] = {
            "repetitions": repetitions,
            "ratio": ratio(ours, theirs, "step"),
            "cpu_ratio": ratio(ours, theirs, "cpu"),
            "memory_ratio": max(r["memory"] for r in ours) / max(r["memory"] for r in theirs),
            "ours": medians(ours),
            "theirs": medians(theirs),
        }
    return {"cases": found, "peer_rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """One line per case."""
    rows = [
        (
            name,
            span(case["ratio"]),
            case["cpu_ratio"]["median"],
            case["ours"]["sampling"] / case["theirs"]["sampling"],
            (case["ours"]["update"] + case["ours"]["logprobs"]) / case["theirs"]["update"],
            case["memory_ratio"],
            case["ours"]["step"],
            case["theirs"]["step"],
            case["repetitions"],
        )
        for name, case in result["cases"].items()
    ]
    header = ["", "**step, ours / TRL**", "processor seconds", "sampling", "training", "peak memory", "our s", "TRL's s", "steps"]
    return markdown(header, rows)


if __name__ == "__main__":
    sys.exit(run("scaling", measure))
