"""When two run folders hold the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

TIME_FIELDS = ("seconds", "tokens_per_second", "teacher_wait_seconds", "system")


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines of a log without what differs from run to run: times, and what the machine was like."""
    lines = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


def assert_same_run(one: Path, other: Path, aside: Sequence[str] = ()) -> None:
    """Bit for bit: metrics, buffer events, completions, weights, the newest checkpoint; times and fields named in `aside` left out."""
    kept = [[{k: v for k, v in line.items() if k not in aside} for line in records(run)] for run in (one, other)]
    assert kept[0] == kept[1]
    assert records(one, "buffer.jsonl") == records(other, "buffer.jsonl")
    for folder in ("rollouts", "held_out"):
        names = sorted(p.name for p in (one / folder).glob("*"))
        assert names == sorted(p.name for p in (other / folder).glob("*"))
        for name in names:
            assert pq.read_table(one / folder / name).equals(pq.read_table(other / folder / name))
    newest = sorted((one / "checkpoints").iterdir())[-1].name
    for weights in ("final", f"checkpoints/{newest}/model"):
        ours, theirs = (load_file(run / weights / "model.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ours, theirs = (torch.load(run / "checkpoints" / newest / "optimizer.pt", weights_only=True) for run in (one, other))
    for index, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][index][name]) for name, value in state.items())
    states = [json.loads((run / "checkpoints" / newest / "state.json").read_text(encoding="utf-8")) for run in (one, other)]
    for state in states:
        del state["origin"]
        for name in ("seconds", "teacher_wait_seconds", *aside):
            state["totals"].pop(name, None)
    assert states[0] == states[1]
