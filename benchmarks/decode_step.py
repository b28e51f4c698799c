"""One decoding step of a plain decoder, lean (zppo.engines.kv_cache) and by the library's own forward, on the same cache."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.common import Options, interleaved, medians, ratio, run
from benchmarks.tables import markdown, span
from benchmarks.world import QUICK, VOCABULARY, Shape, model_config

PROMPTS = (1, 4, 20)
STEPS = 80


def measure(options: Options) -> Mapping[str, Any]:
    """Groups of completions that do not end; every way draws the same tokens, which is checked."""
    import torch
    from transformers import Qwen3ForCausalLM

    from zppo.engines import kv_cache as cache
    from zppo.engines.base import SampleRequest, Sampling
    from zppo.engines.transformers import TransformersEngine

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape, repetitions = (QUICK, 1) if options.quick else (Shape(), options.repetitions)
    model, rng, found = Qwen3ForCausalLM(model_config(shape)).eval(), random.Random(0), {}
    engine, is_plain = TransformersEngine(model, [VOCABULARY - 1], 0, ()), cache.is_plain
    engine.eos_ids = frozenset()  # nothing ends early
    steps = shape.limit if options.quick else STEPS

    def sample(asked: list[SampleRequest], lean: bool) -> tuple[dict[str, float], list[Any]]:
        cache.is_plain = is_plain if lean else lambda _: False  # type: ignore[assignment]
        began, processor = time.perf_counter(), time.process_time()
        done = engine.sample(asked, Sampling(max_new_tokens=steps))
        took = {"step": (time.perf_counter() - began) / steps, "cpu": (time.process_time() - processor) / steps}
        cache.is_plain = is_plain  # type: ignore[assignment]
        return took, [c for group in done for c in group]

    def timed(asked: list[SampleRequest], lean: bool) -> dict[str, float]:
        return sample(asked, lean)[0]

    for prompts in PROMPTS[: 1 if options.quick else None]:
        lengths = [rng.randint(*shape.prompt) for _ in range(prompts)]
        asked = [
            SampleRequest(tuple(rng.randrange(5, VOCABULARY - 1) for _ in range(n)), tuple(range(i << 8, (i << 8) + shape.group)))
            for i, n in enumerate(lengths)
        ]
        ours, theirs = (sample(asked, lean)[1] for lean in (True, False))
        same = all(torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs) for a, b in zip(ours, theirs, strict=True))
        ways = {"lean": True, "library": False}
        rows = interleaved(repetitions, {n: partial(timed, asked, lean) for n, lean in ways.items()})
        found[str(prompts * shape.group)] = {
            "ratio": ratio(rows["lean"], rows["library"], "step"),
            "cpu": ratio(rows["lean"], rows["library"], "cpu"),
            "medians": {name: medians(taken) for name, taken in rows.items()},
            "same": same,
        }
    return {"shape": vars(shape), "repetitions": repetitions, "rows": found}


def table(result: Mapping[str, Any]) -> str:
    """A row per number of rollouts that are decoded together."""
    rows = [
        (
            count,
            span(found["ratio"]),
            span(found["cpu"]),
            *(f"{1e3 * found['medians'][way]['step']:.1f}" for way in ("lean", "library")),
            "yes" if found["same"] else "NO",
        )
        for count, found in result["rows"].items()
    ]
    head = ["rollouts", "lean / library", "in processor seconds", "lean, ms a step", "library, ms a step", "same tokens and log-probs"]
    return markdown(head, rows)


if __name__ == "__main__":
    sys.exit(run("decode_step", measure))
