"""One command for a machine with a GPU: does training on it do what it does on a CPU?

    make gpu-check                    the transformers engine
    make gpu-check VLLM=1             vLLM too, in an environment of its own
    python benchmarks/gpu_check.py    in an environment that is there already; vLLM where it can be imported

It trains a small random model by ZPPO, the lab's questions and the lab's teacher in whole runs of their own processes, and looks at what
they logged: how far sampling and training are apart in log-probs, whether the weights moved, whether a vLLM that takes no weights stops
its run. A table, a dated JSON file in benchmarks/results/, exit code 0 where everything held, 1 where something did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "lab.yaml"
STEPS = 4
FP32_MEAN, BF16_MEAN = 1e-4, 0.05  # nats a token; the first for TF32-free fp32, the second is the guard's own

# A process whose vLLM is never told about new weights: what a broken transfer looks like from outside.
DEAF = """
import sys
from zppo.engines.vllm_colocate import ColocatedVLLM
ColocatedVLLM.load = lambda self, weights: None
from zppo.cli import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    part: str
    what: str
    value: float | str | None
    bound: str
    passed: bool


@dataclass(frozen=True)
class Run:
    """What a finished training process left."""

    code: int
    said: str
    seconds: float
    steps: Sequence[Mapping[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON file goes")
    parser.add_argument("--cpu", action="store_true", help="run the same on a CPU: shows that this program works, no more")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.cpu:
        print(
            "no GPU: torch.cuda.is_available() is False, so there is nothing to check. On a machine with one, install a torch build for "
            "it (https://pytorch.org/get-started/locally/) and look at `nvidia-smi`",
            file=sys.stderr,
        )
        return 2
    device = "cpu" if options.cpu else torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        student = make_student(Path(folder) / "student")
        small = ["--train.device=cpu", "--rollout.batch_size=4"] if options.cpu else []
        checks = [*check_transformers(student, Path(folder), small), *check_vllm(student, Path(folder), small)]
    show(device, checks)
    save(options.results, device, checks)
    return 0 if all(check.passed for check in checks) else 1


def make_student(folder: Path) -> Path:
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


def train(student: Path, run: Path, *overrides: str, program: Sequence[str] = ("-m", "zppo")) -> Run:
    """One training run in a process of its own."""
    # A random model is right by chance alone: a reward that every fifth text gets keeps the groups mixed.
    reward = run.parent / "reward.py"
    reward.write_text(
        "import zlib\ndef reward(completion, question):\n"
        "    return float(zlib.crc32((completion + question.id).encode('utf-8', 'replace')) % 5 == 0)\n"
    )
    command = [sys.executable, *program, "train", str(RECIPE), f"--output={run}", f"--student.model={student}"]
    fixed = [f"--train.steps={STEPS}", "--eval.every=0", "--data.eval_limit=32", f"--grading.reward={reward}:reward"]
    began = time.perf_counter()
    done = subprocess.run([*command, *fixed, *overrides], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    steps = [record for record in map(json.loads, lines) if record["event"] == "step"]
    return Run(done.returncode, (done.stdout + done.stderr)[-2000:], time.perf_counter() - began, steps)


def check_transformers(student: Path, folder: Path, more: Sequence[str]) -> Iterator[Check]:
    """fp32 and bf16 runs with the engine that shares the trainer's weights."""
    for precision, bound in (("fp32", FP32_MEAN), ("bf16", BF16_MEAN)):
        run = folder / precision
        done = train(student, run, f"--train.precision={precision}", *more)
        yield from look_at(f"transformers {precision}", done, bound)
        if done.code == 0:
            yield moved(f"transformers {precision}", student, run)


def check_vllm(student: Path, folder: Path, more: Sequence[str]) -> Iterator[Check]:
    """A run with vLLM in the trainer's process, one with its memory given back, and one that is deaf to new weights."""
    if importlib.util.find_spec("vllm") is None:
        yield Check("vllm", "installed", "no", "not checked", True)
        return
    engine = ["--rollout.engine=vllm", *more]
    for name, sleeps in (("vllm", "false"), ("vllm sleeping", "true")):
        run = folder / name.replace(" ", "-")
        done = train(student, run, *engine, f"--rollout.vllm.enable_sleep_mode={sleeps}")
        yield from look_at(name, done, BF16_MEAN)
        if done.code == 0:
            yield moved(name, student, run)
    done = train(student, folder / "deaf", *engine, "--train.steps=40", "--train.learning_rate=2e-3", program=("-c", DEAF))
    told = "does not hold the trainer's weights" in " ".join(done.said.split())
    yield Check("vllm deaf", "steps until the guard stops it", len(done.steps) if told else tail(done), "< 40", told)


def look_at(part: str, done: Run, bound: float) -> Iterator[Check]:
    """What every run has to show."""
    if done.code or len(done.steps) != STEPS:
        yield Check(part, "finished", tail(done), "exit code 0", False)
        return
    rates = [step["student_tokens"] / step["seconds"]["sampling"] for step in done.steps[1:]]
    yield Check(part, "sampled tokens/s (information)", round(max(rates)), "-", True)
    for name in ("logprob_gap_mean", "engine_gap_mean"):
        gap = max((step[name] for step in done.steps if step.get(name) is not None), default=math.nan)
        yield Check(part, f"{name}, worst step", gap, f"<= {bound:g}", gap <= bound)
    finite = all(step["loss"] is not None and not step["skipped_updates"] for step in done.steps)
    yield Check(part, "losses are numbers, no update skipped", str(finite), "True", finite)


def moved(part: str, student: Path, run: Path) -> Check:
    """Share of the weights that training changed."""
    from safetensors.torch import load_file

    before, after = load_file(student / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    share = sum(int((before[k] != after[k]).sum()) for k in before) / sum(v.numel() for v in before.values())
    return Check(part, "share of weights that moved", round(share, 3), ">= 0.9", share >= 0.9)


def tail(done: Run) -> str:
    """How a process ended, on one line."""
    return f"exit code {done.code} after {len(done.steps)} steps: ...{' '.join(done.said.split())[-400:]}"


def show(device: str, checks: Sequence[Check]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"gpu-check on {device}")
    for name in ("part", "what", "value", "bound", ""):
        table.add_column(name, overflow="fold")
    for check in checks:
        value = f"{check.value:.3g}" if isinstance(check.value, float) else str(check.value)
        table.add_row(check.part, check.what, value, check.bound, "ok" if check.passed else "FAILED")
    Console(width=140).print(table)


def save(folder: Path, device: str, checks: Sequence[Check]) -> None:
    """The dated result."""
    day = time.strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "vllm")}
    result = {"date": day, "device": device, "versions": versions, "checks": [asdict(check) for check in checks]}
    path = folder / f"gpu-check-{day}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
