"""The training part on a GPU: Qwen3.5-0.8B's shape with random weights in bf16, tokens a second and share of the card's matrix rate.

python -m benchmarks gpu_training        on a machine with a GPU; exit code 2 without one
python -m benchmarks.gpu_training --quick      tiny and on a CPU: shows that this program works, no more
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import flops
from benchmarks.common import Options, run
from benchmarks.tables import markdown
from benchmarks.world import correct

NAME = "Qwen3.5-0.8B"
GROUPS, SIZE, TRIVIAL = 32, 8, 0.5
LENGTHS = {"prompt": (200, 600), "completion": (200, 2000)}  # tokens, uniform between


def measure(options: Options) -> Mapping[str, Any]:
    """Seconds of an update, log-prob pass included where bf16 needs one, over the rows that have a gradient."""
    import torch
    import transformers
    from accelerate import Accelerator

    from zppo.config.settings import Settings
    from zppo.engines.logprobs import ForwardPass
    from zppo.step_log import StepLog
    from zppo.train.learner import OptimizerStep
    from zppo.train.policy_gradient import PolicyGradient, make_budget

    cpu = options.quick
    config = tiny_config() if cpu else full_config()
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16")
    device = accelerator.device
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen3_5ForCausalLM(config).eval().requires_grad_(True)
    settings = Settings(
        method="grpo", student={"model": "-"}, data={"train": "-"}, train={"minibatches": 1, "tokens_per_microbatch": "auto"}
    )
    train = settings.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    step_of = OptimizerStep(prepared, optimizer, accelerator, train.max_grad_norm)
    learner = PolicyGradient(
        settings, ForwardPass(prepared), step_of, make_budget(train, gpu=not cpu, width=config.hidden_size), sampler_is_exact=False
    )
    groups, advantages = batch(config.vocab_size, 2 if cpu else GROUPS, 50 if cpu else 1)
    lines = lines_of(groups, advantages)
    needed = sum(line.prompt + line.completion for line in lines)
    seconds, metrics = [], {}
    for step in range(1, 2 + options.repetitions):
        began = time.perf_counter()
        log = StepLog(step)
        learner.optimizer_steps(groups, advantages, log)
        metrics = log.counts
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    took = statistics.median(seconds[1:])
    counted = operations(config, lines)
    side = 256 if cpu else 8192
    fitting = (512, config.hidden_size, config.intermediate_size) if cpu else (16384, config.hidden_size, config.intermediate_size)
    rates = {
        "card": flops.rate(side, side, side, torch.bfloat16, device.type),
        "fitting": flops.rate(*fitting, torch.bfloat16, device.type),
    }
    return {
        "device": "cpu" if cpu else torch.cuda.get_device_name(),
        "model": f"{NAME}'s shape" if not cpu else "tiny",
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": len(lines),
        "tokens_needed": needed,
        "tokens_computed": metrics["train_tokens_computed"],
        "tokens_per_microbatch": metrics["tokens_per_microbatch"],
        "seconds": took,
        "tokens_per_second": needed / took,
        "operations": counted,
        "rates": rates,
        "share_of_card": counted / took / rates["card"],
        "share_of_fitting": counted / took / rates["fitting"],
        "peak_bytes": 0 if cpu else torch.cuda.max_memory_allocated(),
        "repetitions": options.repetitions,
    }


def full_config() -> Any:
    """The text model of Qwen3.5-0.8B."""
    from transformers import Qwen3_5TextConfig

    from zppo.planning.model_shapes import shape_of

    shape = shape_of(NAME)
    assert shape is not None
    return Qwen3_5TextConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=len(shape.layers),
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        linear_num_key_heads=shape.linear_key_heads,
        linear_num_value_heads=shape.linear_value_heads,
        tie_word_embeddings=shape.tied,
    )


def tiny_config() -> Any:
    """The same architecture, small enough for a smoke test."""
    from transformers import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        tie_word_embeddings=True,
    )


def batch(vocabulary: int, count: int, shorter: int) -> tuple[list[Any], Any]:
    """Groups of random tokens, and their advantages; lengths divided by `shorter`."""
    import torch

    from zppo.core.advantages import step_advantages
    from zppo.core.types import PLAIN, Group, Message, Prompt, Question, Rollout

    rng, groups = random.Random(0), []

    def ids(kind: str) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(rng.randint(*LENGTHS[kind]) // shorter)]

    for i, flags in enumerate(correct(count, SIZE, TRIVIAL, 0)):
        question = Question(f"q{i}", (Message("user", "?"),), "0")
        prompt = Prompt(PLAIN, question, question.messages, tuple(ids("prompt")))
        texts = [torch.tensor(ids("completion")) for _ in flags]
        rollouts = [Rollout(t, torch.zeros(len(t)), "", None, f, float(f)) for t, f in zip(texts, flags, strict=True)]
        groups.append(Group(prompt, tuple(rollouts)))
    return groups, step_advantages(groups, "nontrivial")


def lines_of(groups: Sequence[Any], advantages: Any) -> list[flops.Line]:
    """The rows that have a gradient."""
    live = iter((advantages != 0).tolist())
    lines = [flops.Line(len(g.prompt.ids), len(r.ids), next(live)) for g in groups for r in g.rollouts]
    return [line for line in lines if line.live]


def operations(config: Any, lines: Sequence[flops.Line]) -> float:
    """Of one pass for log-probs, forward and backward: linear layers, full attention and logits. Linear attention's own are left out."""
    from zppo.planning.model_shapes import FULL, LINEAR, DecoderShape

    shape = DecoderShape(
        config.vocab_size, config.hidden_size, config.intermediate_size,
        tuple(FULL if kind == FULL else LINEAR for kind in config.layer_types),
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, True, True, False, config.tie_word_embeddings,
        config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
    )  # fmt: skip
    layers = sum(wide * high for _, wide, high in shape.linear_maps())
    full = sum(kind == FULL for kind in shape.layers)
    cost = flops.Cost(2 * layers, 4 * full * shape.heads * shape.head_dim, 2 * shape.vocab * shape.hidden)
    return float(sum(4 * cost.forward(line.prompt, line.completion) for line in lines))


def table(result: Mapping[str, Any]) -> str:
    """One column."""
    rows = [
        ("device", result["device"]),
        ("parameters", f"{result['parameters'] / 1e9:.2f} billion"),
        ("**tokens a second**, log-prob pass, forward and backward", result["tokens_per_second"]),
        ("**share of the card's matrix rate**", f"{result['share_of_card']:.0%}"),
        ("of the rate in the model's shapes", f"{result['share_of_fitting']:.0%}"),
        ("matrix rate, TFLOP/s", result["rates"]["card"] / 1e12),
        ("seconds of an update", result["seconds"]),
        ("tokens computed / needed", result["tokens_computed"] / result["tokens_needed"]),
        ("peak memory, GiB", result["peak_bytes"] / 2**30),
    ]
    return markdown(["", result["model"]], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 where there is no GPU, unless `--quick` asks for none."""
    import torch

    given = sys.argv[1:] if argv is None else argv
    if not {"--quick", "-h", "--help"} & set(given) and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False, so there is nothing to measure; see `nvidia-smi`", file=sys.stderr)
        return 2
    return run("gpu_training", measure, argv)


if __name__ == "__main__":
    sys.exit(main())
