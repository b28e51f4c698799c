"""Settings that are gone: what to do instead, and how those of older runs are read.

A run's recipe.yaml and its checkpoints hold every setting of their day. One that has its old default since then means nothing now, and is
read over; any other value asks for what is no longer there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_OFF = {"min_p": 0, "presence_penalty": 0, "repetition_penalty": 1}
_ASKING = ("judge", "teacher.rollout", "teacher.hint", "teacher.compression", "teacher.judge")
_FSDP2 = "with DeepSpeed: take fsdp2, which shards weights, gradients and optimizer; checkpoints go on with it"

REMOVED: dict[str, str] = {
    **{f"rollout.{key}": ": rollouts are drawn by temperature, top_p and top_k; leave it out" for key in _OFF},
    **{
        f"{section}.{key}": f": leave it out, or ask a server for it with extra_body: {{{key}: VALUE}} in its place"
        for section in _ASKING
        for key in _OFF
    },
    "method.loss": ": every loss has methods of its own; take off-distill, on-distill or one with -replay, and leave it out",
    "advantage.eps": ": 1e-8 is added to the standard deviation, always; leave it out",
    "rollout.vllm.wait": ": a server is waited for 240 seconds; leave it out, and start the run when the server is up",
    "rollout.vllm.model_impl": ": vLLM chooses whose implementation of the model it runs; leave it out",
    "grading.box": ": it is grading.answer_from now, with after-thoughts, anywhere, line, or an expression",
    "teacher.ask: eager": ": take ahead for a teacher on a server, which begins while the student samples, else lazy; batches are the same",
    "train.sharding: zero2": f" {_FSDP2}",
    "train.sharding: zero3": f" {_FSDP2}",
}
"""Dotted key, or key and value -> how "... is gone" goes on."""

_DEFAULTS = _OFF | {"loss": None, "eps": 1e-8, "wait": 240, "model_impl": "auto", "box": "after-thoughts"}
_FURTHER = re.compile(r"more_teachers\.\d+")


@dataclass(frozen=True, slots=True)
class Gone:
    """A removed setting that asks for something: its dotted name, its value, and what to tell the user."""

    name: str
    value: Any
    message: str


def without_removed(data: Any, gone: list[Gone], name: str = "") -> Any:
    """A copy of a recipe's data, or of its part `name`, without removed settings; `gone` gets those that ask for something."""
    if isinstance(data, list):
        return [without_removed(entry, gone, f"{name}.{i}") for i, entry in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    kept = {}
    for key, value in data.items():
        dotted = f"{name}.{key}" if name else str(key)
        known = _FURTHER.sub("teacher", dotted)
        entry = next((entry for entry in (known, f"{known}: {value}") if entry in REMOVED), None)
        if entry is None:
            kept[key] = without_removed(value, gone, dotted)
        elif entry != known or isinstance(value, bool) or value != _DEFAULTS[key]:
            gone.append(Gone(dotted, value, f"{dotted}{entry.removeprefix(known)} is gone{REMOVED[entry]}"))
    return kept
