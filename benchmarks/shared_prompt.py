"""The prompt's part of a training pass, once for several completions of it: two ways to do it, against rows on their own.

`packs` is what the update does (zppo.engines.logprobs): prompt and completions as one sequence with an attention mask, in as many packs as
should take least. `cache` was the other candidate: the prompt's keys and values, with gradients, repeated for every completion.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.common import Options, interleaved, ratio, run
from benchmarks.tables import markdown
from benchmarks.world import QUICK, VOCABULARY, Shape, model_config

PROMPTS, SURVIVORS = (60, 300, 1000), (2, 4, 8)
Work = Callable[[], Any]


def by_rows(model: Any, prompt: list[int], completions: list[list[int]]) -> Any:
    """Micro-batches of rows: the sum of all log-probs, weighted by place, so that every gradient counts."""
    from zppo.core.minibatch import micro_batches
    from zppo.engines.logprobs import completion_logprobs

    total = 0.0
    for micro in micro_batches([len(prompt) + len(c) for c in completions], 16_384):
        logprobs, _ = completion_logprobs(model, [(prompt, completions[i]) for i in micro])
        loss = sum(line.sum() * (i + 1) for i, line in zip(micro, logprobs, strict=True))
        loss.backward()
        total += float(loss)
    return total


def by_packs(model: Any, prompt: list[int], completions: list[list[int]]) -> Any:
    """The same in packs."""
    from zppo.core.minibatch import micro_batches, share_prompt
    from zppo.engines.logprobs import Pack, shared_logprobs

    reach = 6 * model.config.hidden_size
    packs = share_prompt(len(prompt), [len(c) for c in completions], reach=reach, most=4096)
    total = 0.0
    for micro in micro_batches([len(prompt) + sum(len(completions[i]) for i in pack) for pack in packs], 16_384):
        rows = [i for m in micro for i in packs[m]]
        logprobs, _ = shared_logprobs(model, [Pack(prompt, [completions[i] for i in packs[m]]) for m in micro])
        loss = sum(line.sum() * (i + 1) for i, line in zip(rows, logprobs, strict=True))
        loss.backward()
        total += float(loss)
    return total


def by_cache(model: Any, prompt: list[int], completions: list[list[int]]) -> Any:
    """One pass over the prompt, whose cache carries gradients, then one over all completions with it."""
    import torch
    from transformers import DynamicCache

    cache, count = DynamicCache(config=model.config), len(completions)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in completions], True)
    first = model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    for layer in cache.layers:
        layer.keys, layer.values = (t.expand(count, -1, -1, -1) for t in (layer.keys, layer.values))
    rest = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
    logits = torch.cat([first.expand(count, -1, -1), rest], 1)
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss = sum(logprobs[i, : len(c)].sum() * (i + 1) for i, c in enumerate(completions))
    loss.backward()
    return float(loss)


WAYS = {"rows": by_rows, "packs": by_packs, "cache": by_cache}


def timed(model: Any, work: Work) -> dict[str, float]:
    """Seconds of the processor."""
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    work()
    return {"cpu": time.process_time() - began}


def kept(model: Any, work: Work) -> tuple[int, list[Any]]:
    """Bytes that autograd holds at most between forward and backward, and the gradients."""
    import torch

    held, most = [0], [0]

    def pack(tensor: Any) -> Any:
        held[0] += tensor.numel() * tensor.element_size()
        most[0] = max(most[0], held[0])
        return tensor

    def unpack(tensor: Any) -> Any:
        held[0] = max(0, held[0] - tensor.numel() * tensor.element_size())
        return tensor

    model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        work()
    return most[0], [p.grad.clone() for p in model.parameters()]


def measure(options: Options) -> Mapping[str, Any]:
    """Every prompt length with every number of survivors."""
    import torch
    from transformers import Qwen3ForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape, repetitions = (QUICK, 1) if options.quick else (Shape(), 7)
    model = Qwen3ForCausalLM(model_config(shape)).eval()
    rng, found = random.Random(0), {}
    for length in PROMPTS[: 1 if options.quick else 3]:
        for survivors in SURVIVORS:
            prompt = [rng.randrange(VOCABULARY) for _ in range(length)]
            sizes = [min(shape.limit, 1 + int(rng.expovariate(1 / shape.mean))) for _ in range(survivors)]
            said = [[rng.randrange(VOCABULARY) for _ in range(size)] for size in sizes]
            works = {name: partial(way, model, prompt, said) for name, way in WAYS.items()}
            held = {name: kept(model, work) for name, work in works.items()}
            rows = interleaved(repetitions, {name: partial(timed, model, work) for name, work in works.items()})
            expected = held["rows"][1]
            biggest = max(float(g.abs().max()) for g in expected)
            found[f"{length} x {survivors}"] = {
                name: {
                    "cpu": ratio(rows[name], rows["rows"], "cpu"),
                    "kept": held[name][0] / held["rows"][0],
                    "difference": max(float((a - b).abs().max()) / biggest for a, b in zip(held[name][1], expected, strict=True)),
                }
                for name in ("packs", "cache")
            }
    return {"repetitions": repetitions, "shape": vars(shape), "grid": found}


def table(result: Mapping[str, Any]) -> str:
    """A row per prompt length and number of survivors."""
    rows = [
        [
            case,
            *(f"**{way['cpu']['median']:.2f}** ({way['cpu']['low']:.2f}-{way['cpu']['high']:.2f})" for way in ways.values()),
            *(f"{way['kept']:.2f}" for way in ways.values()),
            f"{max(way['difference'] for way in ways.values()):.0e}",
        ]
        for case, ways in result["grid"].items()
    ]
    return markdown(
        ["prompt x survivors", "time: packs / rows", "cache / rows", "memory: packs / rows", "cache / rows", "gradient difference"], rows
    )


if __name__ == "__main__":
    sys.exit(run("shared_prompt", measure))
