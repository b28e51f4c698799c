"""QLoRA: frozen weights in 4 bits below adapters. What needs bitsandbytes is run where it is installed: `make test` installs it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from same_run import records
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.errors import SettingsError
from zppo.models.quantized import four_bits
from zppo.models.student_model import load_student
from zppo.planning.memory import Memory, estimate

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
SMALL = ("--train.lora={}", "--student.quantize=4bit", "--rollout.batch_size=8", "--data.eval_limit=4", "--train.learning_rate=0.01")


def train(run: Path, *more: str) -> Path:
    AcceleratorState._reset_state(True)
    assert main(["train", "lab", *SMALL, "--train.checkpoint_every=1", "--train.keep_checkpoints=9", f"--output={run}", *more]) == 0
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("quantized") / "run", "--train.steps=2")


@needs_bitsandbytes
@pytest.mark.slow
def test_sampling_and_training_agree_and_adapters_alone_learn(run: Path) -> None:
    steps = [line for text in (run / "metrics.jsonl").read_text().splitlines() if (line := json.loads(text))["event"] == "step"]
    gaps = [line["logprob_gap_max"] for line in steps if line["logprob_gap_max"] is not None]  # none where no advantage is above 0
    assert gaps and max(gaps) < 1e-5 and all(line["engine_gap_max"] < 1e-5 and not line["logprob_fallback"] for line in steps)
    assert any(line["grad_norm"] > 0 for line in steps)
    saved = load_file(run / "checkpoints" / "step-000002" / "model" / "adapter_model.safetensors")
    second = {name: value for name, value in saved.items() if "lora_B" in name}
    assert len(second) == len(saved) / 2 == 7 * 3 and all(bool(value.any()) for value in second.values())


@needs_bitsandbytes
@pytest.mark.slow
def test_what_is_saved_computes_what_was_trained(run: Path) -> None:
    """final/ is whole, in fp32: the weights that 4 bits stand for, with the adapters."""
    config = json.loads((run / "final" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    final = AutoModelForCausalLM.from_pretrained(run / "final").eval()
    trained = load_student(load_recipe(run / "recipe.yaml"), run / "checkpoints" / "step-000002", bf16=False).model
    assert any("4bit" in type(module).__name__ for module in trained.modules())
    start = AutoModelForCausalLM.from_pretrained(cast(str, load_student(load_recipe("lab"), None, bf16=False).model.name_or_path)).eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        logits = {name: model(ids).logits for name, model in (("final", final), ("trained", trained), ("start", start))}
    assert torch.allclose(logits["final"], logits["trained"], atol=1e-4)
    assert (logits["final"] - logits["start"]).abs().max() > 1e-2


@needs_bitsandbytes
@pytest.mark.slow
def test_a_resumed_run_is_the_same(run: Path, tmp_path: Path) -> None:
    short = train(tmp_path / "run", "--train.steps=1")
    recipe = short / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 1\n", "steps: 2\n"))
    AcceleratorState._reset_state(True)
    assert main(["resume", str(short)]) == 0
    assert records(short) == records(run)
    for weights in ("final/model.safetensors", "checkpoints/step-000002/model/adapter_model.safetensors"):
        ours, theirs = load_file(run / weights), load_file(short / weights)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"without train.lora none are frozen: set train.lora to \{\}"):
        load_recipe("lab", ["--student.quantize=4bit"])
    with pytest.raises(SettingsError, match="does not go with rollout.engine: vllm"):
        load_recipe("lab", ["--student.quantize=4bit", "--train.lora={}", "--rollout.engine=vllm"])
    with pytest.raises(SettingsError, match="quantize is no setting"):
        load_recipe("lab", ["--teacher.quantize=4bit"])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match="student.quantize needs bitsandbytes.*`pip install bitsandbytes`"):
        four_bits(torch.float32)


def test_the_plan_counts_half_a_byte_a_weight() -> None:
    whole, packed = (estimate(load_recipe("single-gpu-lora", more), gpu=True) for more in ((), ["--student.quantize=4bit"]))
    assert isinstance(whole, Memory) and isinstance(packed, Memory)
    assert 0.3 < packed.weights / whole.weights < 0.6 and packed.gradients == whole.gradients  # embeddings stay as they are
