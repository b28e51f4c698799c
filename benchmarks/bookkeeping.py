"""What keeping the books of a run takes: the replay buffer at a million entries, the log of rollouts, grading, checkpoints.

Sizes are those of the paper's step: 480 plain groups and 96 reformulated ones of 8 rollouts, each of about 13 kB of text. Seconds are of
one thread beside nothing else; they are put in relation to a step of 60 seconds, which no step of that size is below on one GPU.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Options, run
from benchmarks.tables import markdown

STEP = 60.0
EVERY = 50  # steps between checkpoints, the default
NEW, REPLAYED, AGAIN, GROUP = 384, 96, 96, 8
WORDS = [f"word{i}" for i in range(3000)]


def seconds(work: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def make_question(i: int) -> Any:
    """A question of 300 characters."""
    from zppo.core.types import Message, Question

    return Question(f"q{i}", (Message("user", "a question of some length " * 12),), str(i))


def of_buffer(entries: int) -> dict[str, float]:
    """Of a full buffer: what each step does with it, and what a checkpoint does."""
    from zppo.core.replay import PromptReplayBuffer

    buffer = PromptReplayBuffer(entries)
    buffer.update([(make_question(i), 0.125) for i in range(entries)], 1)
    new = [(make_question(entries + i), (0.125, 0.75)[i % 2]) for i in range(NEW)]

    def step() -> None:
        again = buffer.sample(REPLAYED, {q.id for q, _ in new})
        buffer.update([*new, *((q, 0.5 * (i % 2)) for i, q in enumerate(again))], 2)
        buffer.occupancy()

    found = {"step": seconds(step)}
    text: list[str] = []
    return {**found, "checkpoint": seconds(lambda: text.append(json.dumps(buffer.state_dict()))), "bytes": len(text[0])}


def make_groups(count: int) -> list[Any]:
    """Groups with rollouts as long as those of a reasoning model."""
    import torch

    from zppo.core.types import PLAIN, Group, Prompt, Rollout

    rng, ids, logprobs = random.Random(0), torch.ones(3000, dtype=torch.int64), torch.zeros(3000)
    groups = []
    for i in range(count):
        question = make_question(i)
        texts = [" ".join(rng.choices(WORDS, k=1700)) + f" \\boxed{{{rng.randrange(99)}}}" for _ in range(GROUP)]
        rollouts = tuple(Rollout(ids, logprobs, text, "12", False, 0.0) for text in texts)
        groups.append(Group(Prompt(PLAIN, question, question.messages, tuple(range(200))), rollouts))
    return groups


def of_log(groups: list[Any], folder: Path, before: int) -> float:
    """Writing one step's rollouts where those of so many steps lie already."""
    from zppo.runs.log import ROLLOUTS, RunLog

    log = RunLog(folder)
    log.open()

    def write(step: int) -> None:
        zeros = [0.0] * len(groups) * GROUP
        log.rollouts(step, groups, zeros, replayed=frozenset(), entry_accuracy={}, show=lambda ids: "x" * 800)

    write(1)  # not counted
    first = folder / ROLLOUTS / "step-000001.parquet"
    for step in range(2, before + 1):
        (first.parent / f"step-{step:06d}.parquet").hardlink_to(first)
    return min(seconds(lambda: write(before + 1)) for _ in range(3))


def of_grading(groups: list[Any]) -> float:
    """By rule, all at once; in a run it is done beside the sampling."""
    from zppo.grading import Grader

    items = [(r.text, g.question.gold) for g in groups for r in g.rollouts]
    with Grader() as grader:
        grader.grade_many(items[:GROUP])
        return seconds(lambda: grader.grade_many(items))


def of_checkpoint(folder: Path, width: int, vocabulary: int) -> dict[str, float]:
    """A checkpoint with AdamW's state: how long a step stands still for it, in the foreground and in the background."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from zppo.config.settings import TrainSettings
    from zppo.distributed.parallel import ReplicatedWeights
    from zppo.models.student_model import Student
    from zppo.train.checkpointer import Checkpointer

    config = Qwen3Config(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, vocab_size=vocabulary)
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = {"parameters": float(sum(p.numel() for p in model.parameters()))}
    for name, beside in (("foreground", False), ("background", True)):
        settings = TrainSettings(checkpoint_in_background=beside)
        write = Checkpointer(settings, folder / name, Student(model, None), optimizer, {}, ReplicatedWeights())
        found[name] = seconds(lambda: write(1, {}, None, later=True))  # noqa: B023 - called at once
        found[f"{name}, to the end"] = found[name] + seconds(write.wait)
    return found


def measure(options: Options) -> Mapping[str, Any]:
    """All parts, each alone."""
    groups = make_groups(4 if options.quick else NEW + REPLAYED + AGAIN)
    steps = 10 if options.quick else 1 + 1_000_000 // (len(groups) * GROUP)
    entries = [100, 1000] if options.quick else [10_000, 1_000_000]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "rollouts": len(groups) * GROUP,
            "buffer": {str(n): of_buffer(n) for n in entries},
            "log": {str(n * len(groups) * GROUP): of_log(groups, folder / f"log-{n}", n) for n in (1, steps)},
            "grading": of_grading(groups),
            "checkpoint": of_checkpoint(folder / "run", *((32, 64) if options.quick else (1024, 8192))),
        }


def table(result: Mapping[str, Any]) -> str:
    """Seconds per step, and what they are of a step of 60 s; a checkpoint is shared by the steps between two of them."""
    written = result["checkpoint"]
    size = f"{written['parameters'] / 1e6:.0f} million weights"
    rows = [(f"replay buffer of {int(n):,} entries", part["step"], part["step"]) for n, part in result["buffer"].items()]
    rows += [(f"log of rollouts, {int(n):,} written before", part, part) for n, part in result["log"].items()]
    rows += [("grading by rule (beside the sampling)", result["grading"], result["grading"])]
    rows += [
        (f"checkpoint's copy of a buffer of {int(n):,}, {part['bytes'] / 1e6:,.0f} MB", part["checkpoint"], part["checkpoint"] / EVERY)
        for n, part in result["buffer"].items()
    ]
    rows += [(f"checkpoint of {size}, in the {name}", written[name], written[name] / EVERY) for name in ("foreground", "background")]
    largest, longest = max(result["buffer"], key=int), max(result["log"], key=int)
    buffer = result["buffer"][largest]
    waited = buffer["step"] + result["log"][longest] + (buffer["checkpoint"] + written["foreground"]) / EVERY
    rows += [("**together, at their largest and in the foreground, without what is beside the sampling**", waited, waited)]
    return markdown(
        ["what", "seconds", f"per step (a checkpoint every {EVERY})", f"of a step of {STEP:.0f} s"],
        [(name, f"{once:.3f}", f"{each:.4f}", f"{each / STEP:.3%}") for name, once, each in rows],
    )


if __name__ == "__main__":
    sys.exit(run("bookkeeping", measure))
