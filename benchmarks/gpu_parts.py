"""The parts of `benchmarks.gpu_check`: Qwen3.5-0.8B's shape with random weights, and a small model whose every weight is looked at."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_training
from benchmarks.common import ROOT, Options

FP32_MEAN, BF16_MEAN = 1e-4, 0.05  # nats a token; the first for TF32-free fp32, the second is the guard's own
SMALL_STEPS = 4
GIB = 2**30

# A process whose vLLM is never told about new weights: what a broken transfer looks like from outside.
DEAF = """
import sys
from zppo.engines.vllm.vllm_colocate import ColocatedVLLM
ColocatedVLLM.load = lambda self, weights: None
from zppo.cli import main
sys.exit(main(sys.argv[1:]))
"""
# One that writes down the most that it held.
WATCHED = """
import os, sys
from zppo.cli import main
status = main(sys.argv[1:])
import torch
from zppo.planning.memory import peak_of_process
held = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak_of_process()
open(os.environ["PEAK"], "w").write(str(held))
sys.exit(status)
"""


@dataclass(frozen=True)
class Check:
    """One line of the table; bound "-" for what is told and not judged."""

    part: str
    what: str
    value: float | str | None
    bound: str
    passed: bool


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        run: folder to write in, whether on a CPU in tiny -> what it finds.
        least: seconds that it takes on a card of today, about; it is not begun with fewer.
    """

    run: Callable[[Path, bool], Iterator[Check]]
    least: int


@dataclass(frozen=True)
class Run:
    """What a finished training process left."""

    code: int
    said: str
    steps: Sequence[Mapping[str, Any]]
    peak: int | None


def told(part: str, what: str, value: float | str | None) -> Check:
    return Check(part, f"{what} (information)", value, "-", True)


def kernels(folder: Path, cpu: bool) -> Iterator[Check]:
    """Are Qwen3.5's kernels here, do they compute what plain PyTorch does, and how much faster?"""
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5 as layers

    from zppo.packages import distribution, kernels_of, missing

    absent = ", ".join(map(distribution, missing(kernels_of("qwen3_5"))))
    yield Check("kernels", "not installed", absent or "none", "none", not absent or cpu)
    device = "cpu" if cpu else "cuda"
    tokens, heads, size = (70, 2, 16) if cpu else (4096, 16, 128)
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, *shape, device=device, dtype=torch.float32 if cpu else torch.bfloat16, requires_grad=True)

    inputs = [draw(size), draw(size), draw(size)]
    how = {"g": -draw().float().abs() * 0.1, "beta": draw().sigmoid(), "use_qk_l2norm_in_kernel": True}
    kernel = layers.torch_chunk_gated_delta_rule
    results, seconds = [], []
    for rule in (kernel, inspect.unwrap(kernel)):
        best = math.inf
        for _ in range(3):
            _wait(cpu)
            began = time.perf_counter()
            out, _ = rule(*inputs, **how)
            grads = torch.autograd.grad(out.float().square().mean(), inputs, retain_graph=True)
            _wait(cpu)
            best = min(best, time.perf_counter() - began)
        results.append([out.detach(), *grads])
        seconds.append(best)
    gap = max(float((a - b).float().abs().max() / b.float().abs().max()) for a, b in zip(*results, strict=True))
    bound = 1e-5 if cpu else 0.05
    yield Check("kernels", "gated delta rule, output and gradients, against plain PyTorch", gap, f"<= {bound:g}", gap <= bound)
    faster = seconds[1] / seconds[0]  # 1 where plain PyTorch was compared with itself
    yield Check("kernels", "plain PyTorch takes so many times as long", faster, ">= 1.2", faster >= 1.2 or bool(absent) or cpu)


def _wait(cpu: bool) -> None:
    import torch

    if not cpu:
        torch.cuda.synchronize()


def training(folder: Path, cpu: bool) -> Iterator[Check]:
    """Tokens a second of the update, and the share of the card's matrix rate."""
    found = gpu_training.measure(Options(quick=cpu, threads=os.cpu_count() or 1, repetitions=1 if cpu else 3, results=folder))
    yield told("training", "tokens/s, log-prob pass, forward and backward", found["tokens_per_second"])
    yield told("training", "share of the card's matrix rate", found["share_of_card"])
    yield told("training", "matrix rate, TFLOP/s", found["rates"]["card"] / 1e12)
    yield told("training", "peak memory, GiB", found["peak_bytes"] / GIB)
    padded = found["tokens_computed"] / found["tokens_needed"]
    yield Check("training", "tokens computed / needed", padded, "<= 1.5", padded <= 1.5 or cpu)


def logprobs(folder: Path, cpu: bool) -> Iterator[Check]:
    """Log-probs of one long row and their gradients: against plain log_softmax, and what they hold beside whole logits."""
    import torch
    from transformers import Qwen3_5ForCausalLM

    from zppo.engines.logprobs import completion_logprobs

    device = "cpu" if cpu else "cuda"
    config = gpu_training.tiny_config() if cpu else gpu_training.full_config()
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3_5ForCausalLM(config).eval()
    draw = random.Random(0)

    def row(prompt: int, completion: int) -> tuple[list[int], list[int]]:
        ids = [draw.randrange(config.vocab_size) for _ in range(prompt + completion)]
        return ids[:prompt], ids[prompt:]

    short = row(8, 24 if cpu else 120)
    scores, _ = completion_logprobs(model, [short])
    with torch.no_grad():
        ids = torch.tensor([[*short[0], *short[1]]], device=device)
        logits = model(input_ids=ids).logits[0, len(short[0]) - 1 : -1].double()
        plain = logits.log_softmax(-1).gather(1, ids[0, len(short[0]) :, None])[:, 0]
    gap = float((scores[0].detach().double() - plain).abs().max())
    yield Check("logprobs", "largest difference to plain log_softmax", gap, "<= 1e-4", gap <= 1e-4)
    if cpu:
        return
    model.requires_grad_(True)
    long = row(500, 16_384)
    for gradients in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(gradients):
            scores, _ = completion_logprobs(model, [long])
            if gradients:
                scores.sum().backward()
        torch.cuda.synchronize()
        held = torch.cuda.max_memory_allocated() - before
        what = "forward and backward" if gradients else "forward"
        yield told("logprobs", f"{what} of a row of 16,884 tokens, seconds", time.perf_counter() - began)
        yield told("logprobs", f"{what}, memory beside the weights / whole logits in fp32", held / (16_384 * config.vocab_size * 4))


def step(folder: Path, cpu: bool) -> Iterator[Check]:
    """A whole ZPPO step with the engine that shares the trainer's weights."""
    yield from whole_step("step", folder, cpu)


def step_vllm(folder: Path, cpu: bool) -> Iterator[Check]:
    """The same with vLLM in the training process."""
    if importlib.util.find_spec("vllm") is None:
        yield Check("step-vllm", "vLLM", "not installed", "not checked", True)
        return
    yield from whole_step("step-vllm", folder, cpu, "--rollout.engine=vllm", "--rollout.vllm.max_model_length=8192")


def whole_step(part: str, folder: Path, cpu: bool, *engine: str) -> Iterator[Check]:
    """Two steps of ZPPO on invented questions; of the second, seconds by part, tokens a second, log-prob gap, memory beside the plan's."""
    recipe = invented(folder, cpu)
    begun = folder / part
    done = train(recipe, begun, *engine, program=("-c", WATCHED), steps=2)
    if done.code or len(done.steps) != 2:
        yield Check(part, "finished", tail(done), "exit code 0", False)
        return
    last = done.steps[-1]
    for name, seconds in last["seconds"].items():
        yield told(part, f"seconds of {name}", seconds)
    yield told(part, "sampled tokens/s", last["student_tokens"] / last["seconds"]["sampling"])
    yield told(part, "trained tokens/s", last["train_tokens_needed"] / last["seconds"]["update"])
    again = sum(last.get(f"{kind}_prompts", 0) for kind in ("bcq", "ncq"))
    yield Check(part, "BCQ and NCQ prompts", again, "> 0", again > 0)
    yield from gaps(part, done, BF16_MEAN if engine or not cpu else FP32_MEAN)
    if done.peak is not None:
        plan = planned(recipe, engine)
        yield told(part, "peak memory, GiB", done.peak / GIB)
        yield told(part, "peak memory of the plan (--dry-run), GiB", plan / GIB)
        fits = done.peak <= 1.25 * plan
        yield Check(part, "peak / plan", done.peak / plan, "<= 1.25", fits or cpu)


def invented(folder: Path, cpu: bool) -> Path:
    """A recipe with a student of Qwen3.5-0.8B's shape, a small teacher, and questions, answers and rewards that mean nothing."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config = gpu_training.tiny_config() if cpu else gpu_training.full_config()
    special = ["<pad>", "<end>", "<unk>"]
    words = special + [f"w{i}" for i in range(config.vocab_size - len(special))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    config.pad_token_id, config.eos_token_id = 0, 1
    torch.manual_seed(0)
    small = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=32_768,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.device("cpu" if cpu else "cuda"):
        made = {"student": Qwen3_5ForCausalLM(config), "teacher": Qwen3ForCausalLM(small)}
    for name, model in made.items():
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw, count, (low, high) = random.Random(0), 8 if cpu else 96, (5, 9) if cpu else (200, 600)
    rows = [{"prompt": " ".join(draw.choices(words[3:], k=draw.randint(low, high))), "answer": "1"} for _ in range(count)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward(folder)
    new, batch = (8, 4) if cpu else (1024, 32)
    recipe = folder / "recipe.yaml"
    settings = {
        "method": "zppo",
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher"), "rollout": {"max_new_tokens": 32}, "compression": {"max_new_tokens": 32}},
        "data": {"train": str(folder / "questions.jsonl")},
        "rollout": {"batch_size": batch, "group_size": 8, "max_new_tokens": new},
        "grading": {"reward": f"{folder / 'reward.py'}:reward"},
        "train": {"minibatches": 4, "gradient_checkpointing": True, "device": "cpu" if cpu else "auto", "checkpoint_every": 0},
    }
    recipe.write_text(json.dumps(settings), encoding="utf-8")  # which is YAML too
    return recipe


def reward(folder: Path) -> Path:
    """A random model is right by chance alone: a reward that every fifth text gets keeps the groups mixed."""
    path = folder / "reward.py"
    path.write_text(
        "import zlib\ndef reward(completion, question):\n"
        "    drawn = zlib.crc32((completion + question.id).encode('utf-8', 'replace'))\n"
        "    return {'correct': drawn % 5 == 0, 'reward': float(drawn % 5 == 0), 'answer': str(drawn)}\n"
    )
    return path


def planned(recipe: Path, engine: Sequence[str]) -> int:
    """Bytes that the dry run would say."""
    from zppo.config.recipe import load_recipe
    from zppo.planning.machine import find_machine
    from zppo.planning.memory import expected
    from zppo.rollout.data import load_questions_of

    settings = load_recipe(recipe, list(engine))
    found = find_machine(settings.train.device)
    gpu = found is not None and found.gpu
    questions = load_questions_of(settings).mixture.questions
    memory = expected(settings, questions, [], (), gpu=gpu, capacity=found.total if found and gpu else 0)
    assert not isinstance(memory, str), memory
    return memory.total


def train(recipe: Path, run: Path, *overrides: str, program: Sequence[str] = ("-m", "zppo"), steps: int = SMALL_STEPS) -> Run:
    """One training run in a process of its own."""
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *program, "train", str(recipe), f"--output={run}", f"--train.steps={steps}", "--eval.every=0", *overrides]
    peak = run.parent / f"{run.name}.peak"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PEAK": str(peak)})
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    found = [record for record in map(json.loads, lines) if record["event"] == "step"]
    return Run(done.returncode, (done.stdout + done.stderr)[-2000:], found, int(peak.read_text()) if peak.exists() else None)


def small(folder: Path, cpu: bool) -> Iterator[Check]:
    """The lab's questions and teacher, a small student: fp32 and bf16, the engine that shares the trainer's weights."""
    student = small_student(folder / "student")
    for precision, bound in (("fp32", FP32_MEAN), ("bf16", BF16_MEAN)):
        yield from small_run(f"small {precision}", student, folder, cpu, bound, f"--train.precision={precision}")


def small_vllm(folder: Path, cpu: bool) -> Iterator[Check]:
    """vLLM in the trainer's process with its memory given back, and one that is deaf to new weights: that must stop its run."""
    if importlib.util.find_spec("vllm") is None:
        yield Check("small vllm", "vLLM", "not installed", "not checked", True)
        return
    student = small_student(folder / "student")
    vllm = "--rollout.engine=vllm"
    yield from small_run("small vllm sleeping", student, folder, cpu, BF16_MEAN, vllm, "--rollout.vllm.enable_sleep_mode=true")
    more = (vllm, "--train.learning_rate=2e-3", *of_the_lab(student, folder, cpu))
    done = train(ROOT / "recipes" / "lab.yaml", folder / "deaf", *more, program=("-c", DEAF), steps=40)
    stopped = "does not hold the trainer's weights" in " ".join(done.said.split())
    yield Check("small vllm deaf", "steps until the guard stops it", len(done.steps) if stopped else tail(done), "< 40", stopped)


def of_the_lab(student: Path, folder: Path, cpu: bool) -> list[str]:
    fixed = [f"--student.model={student}", "--data.eval_limit=32", f"--grading.reward={reward(folder)}:reward"]
    return [*fixed, *["--train.device=cpu", "--rollout.batch_size=4"] * cpu]


def small_run(part: str, student: Path, folder: Path, cpu: bool, bound: float, *more: str) -> Iterator[Check]:
    """Four steps: the gap, and whether the weights moved."""
    run = folder / part.replace(" ", "-")
    done = train(ROOT / "recipes" / "lab.yaml", run, *of_the_lab(student, folder, cpu), *more)
    if done.code or len(done.steps) != SMALL_STEPS:
        yield Check(part, "finished", tail(done), "exit code 0", False)
        return
    yield from gaps(part, done, bound)
    finite = all(each["loss"] is not None and not each["skipped_updates"] for each in done.steps)
    yield Check(part, "losses are numbers, no update skipped", str(finite), "True", finite)
    yield moved(part, student, run)


def small_student(folder: Path) -> Path:
    """A random Qwen3 over the lab's vocabulary, with heads of a size that vLLM's kernels have."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from zppo.lab.questions import bundled_model

    tokenizer = AutoTokenizer.from_pretrained(bundled_model("lab:unreachable/student"))
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            initializer_range=0.1,  # small weights hide errors
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gaps(part: str, done: Run, bound: float) -> Iterator[Check]:
    """How far sampling and training are apart in log-probs, at the worst step."""
    for name in ("logprob_gap_mean", "engine_gap_mean"):
        gap = max((each[name] for each in done.steps if each.get(name) is not None), default=math.nan)
        yield Check(part, f"{name}, worst step", gap, f"<= {bound:g}", gap <= bound)


def moved(part: str, student: Path, run: Path) -> Check:
    """Share of the weights that training changed."""
    from safetensors.torch import load_file

    before, after = load_file(student / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    share = sum(int((before[k] != after[k]).sum()) for k in before) / sum(v.numel() for v in before.values())
    return Check(part, "share of weights that moved", round(share, 3), ">= 0.9", share >= 0.9)


def tail(done: Run) -> str:
    """How a process ended, on one line."""
    return f"exit code {done.code} after {len(done.steps)} steps: ...{' '.join(done.said.split())[-400:]}"


PARTS = {
    "kernels": Part(kernels, 20),
    "training": Part(training, 60),
    "logprobs": Part(logprobs, 30),
    "step": Part(step, 120),
    "step-vllm": Part(step_vllm, 120),
    "small": Part(small, 60),
    "small-vllm": Part(small_vllm, 100),
}
