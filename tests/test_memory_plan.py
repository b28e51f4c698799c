"""The memory estimate of a dry run against what real models hold, and its verdicts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import make_tiny
from zppo.config.recipe import load_recipe
from zppo.config.settings import LoraSettings, Settings
from zppo.core.minibatch import MERGED_TOKENS
from zppo.core.types import Message, Question
from zppo.engines import output_head
from zppo.engines.logprobs import completion_logprobs
from zppo.errors import ModelError
from zppo.models.lora import add_adapters
from zppo.models.student_model import recompute_layers
from zppo.planning import memory
from zppo.planning.dry_run import memory_rows
from zppo.planning.machine import Machine, _pick, _ram, find_machine
from zppo.planning.memory import GIB, Memory, activations_per_token, estimate, head_bytes, prompt_tokens, within
from zppo.planning.model_shapes import DecoderShape, shape_of, vision_shape_of
from zppo.prompts import PromptBook

pytestmark = pytest.mark.slow

FACTOR = 1.35
"""How far the estimate of activations and logits may be from a measured peak, up or down; docs/train-your-model.md states it."""

WIDTHS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LINEAR: dict[str, Any] = {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDTHS, num_hidden_layers=3, head_dim=24)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDTHS, num_hidden_layers=2, head_dim=16, tie_word_embeddings=True)),
    "qwen3.5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**WIDTHS, **LINEAR, num_hidden_layers=4, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDTHS, num_hidden_layers=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDTHS, num_hidden_layers=2)),
}


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.eval()
    return model


def shape(model: PreTrainedModel, folder: Path) -> DecoderShape:
    model.config.save_pretrained(folder)
    found = shape_of(str(folder))
    assert found is not None
    return found


def peak(work: Callable[[], Any]) -> int:
    """Bytes that are allocated at most while something runs, over what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = trace.profiler.kineto_results.events()
    held = top = 0
    for _, count in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += count
        top = max(top, held)
    return top


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    assert shape(model, tmp_path).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "*.mlp.*"), ("in_proj_a", "*layers.1.*_proj", "up_proj")])
def test_adapters_are_those_of_peft(kind: str, targets: Any, tmp_path: Path) -> None:
    if kind == "qwen3" and "in_proj_a" in targets:
        targets = targets[1:]
    model = made(kind)
    found = shape(model, tmp_path)
    add_adapters(model, LoraSettings(rank=3, targets=targets), base="x")
    assert found.adapters(3, targets) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen3.5-0.8B", 0.75), ("Qwen3.5-2B", 1.88), ("Qwen3.5-4B", 4.2), ("Qwen3.5-9B", 8.95), ("Qwen3.5-27B-FP8", 26.9)],
)
def test_known_names_need_no_files(name: str, billions: float) -> None:
    known = shape_of(f"Qwen/{name}")
    assert known is not None
    assert known.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_unknown_models_have_no_shape(tmp_path: Path) -> None:
    assert shape_of("someone/unheard-of") is None
    assert shape_of("not a name/at all/of a model") is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 8, **WIDTHS, "num_hidden_layers": 2}))
    assert shape_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        shape_of(str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen3.5 student, a teacher and a recipe."""
    root = tmp_path_factory.mktemp("memory")
    made("qwen3.5").save_pretrained(root / "student")
    make_tiny(root / "teacher")
    (root / "recipe.yaml").write_text(
        "student: {model: student}\nteacher: {model: teacher, compression: {max_new_tokens: 16}, rollout: {max_new_tokens: 32}}\n"
        "data: {train: questions.jsonl, max_prompt_tokens: 64}\nrollout: {max_new_tokens: 64, batch_size: 8, group_size: 4}\n"
        "train: {tokens_per_microbatch: 4096}\n"
    )
    return root


def settings(folder: Path, *overrides: str) -> Settings:
    return load_recipe(folder / "recipe.yaml", overrides)


def estimated(folder: Path, *overrides: str, gpu: bool = False) -> Memory:
    found = estimate(settings(folder, *overrides), gpu=gpu)
    assert isinstance(found, Memory)
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_optimizer_are_exact(folder: Path, lora: bool) -> None:
    model = made("qwen3.5")
    if lora:
        add_adapters(model, LoraSettings(), base="x")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    real = (sum(p.nbytes for p in model.parameters()), sum(p.grad.nbytes for p in trained if p.grad is not None), moments)
    memory = estimated(folder, *(["--train.lora={}"] if lora else []))
    assert (memory.weights, memory.gradients, memory.optimizer) == real


def test_precision_optimizer_and_frozen_models_count(folder: Path) -> None:
    whole, gpu = estimated(folder), estimated(folder, gpu=True)
    n = whole.weights // 4
    assert (gpu.weights, gpu.cast, gpu.stepping, whole.cast) == (4 * n, 2 * n, 4 * n, 0)
    assert whole.others == 2 * gpu.others == 4 * sum(p.numel() for p in Qwen3ForCausalLM.from_pretrained(folder / "teacher").parameters())
    assert whole.optimizer / estimated(folder, "--train.optimizer=adamw-8bit").optimizer == pytest.approx(4, rel=0.02)
    adapters = estimated(folder, "--train.lora={}", gpu=True)
    assert adapters.cast == 0 and adapters.weights == 2 * n + adapters.gradients
    remote = ("--teacher.base_urls=[http://localhost:1/v1]", "--method=grpo-both")
    assert estimated(folder, *remote).others == 0 == estimated(folder, "--method=grpo").others
    assert estimated(folder, *remote, f"--judge.model={folder / 'teacher'}").others == whole.others


def test_a_process_holds_its_share_and_what_it_gathers(folder: Path) -> None:
    """Of weights, gradients and optimizer; a pass has two layers whole and what lies outside of them, and gradients of a layer."""
    fsdp2 = "--train.sharding=fsdp2"

    def shared(processes: int, *overrides: str, gpu: bool = True) -> Memory:
        found = estimate(settings(folder, fsdp2, *overrides), gpu=gpu, processes=processes)
        assert isinstance(found, Memory)
        return found

    whole, four = estimated(folder, gpu=True), shared(4)
    for name in ("weights", "gradients", "optimizer", "stepping"):
        assert getattr(four, name) == getattr(whole, name) // 4
    assert shared(8, "--train.shard_within=4") == four and estimated(folder, fsdp2, gpu=True) == whole
    sizes = {name: p.numel() for name, p in made("qwen3.5").named_parameters()}
    outside = sum(n for name, n in sizes.items() if ".layers." not in name)
    layer = (sum(sizes.values()) - outside) / sum(name.endswith(".input_layernorm.weight") for name in sizes)
    for found, width in ((four, 2), (shared(4, gpu=False), 4)):
        assert found.passing == pytest.approx((outside + 2 * layer) * width + (outside + layer) * (width + 4), rel=0.02)
        assert found.cast == width * sum(sizes.values())  # the transformers engine samples with all of them
    assert shared(4, "--rollout.engine=vllm").cast == 0
    away = shared(4, "--train.offload=true")
    assert (away.weights, away.gradients, away.optimizer, away.stepping) == (0, 0, 0, 0)
    assert away.host == four.weights + four.gradients + four.optimizer and away.passing == four.passing
    assert shared(4, "--train.offload=true", gpu=False).weights == four.weights  # the same memory


def test_what_stays_whole_in_every_process_is_not_shared_out(folder: Path) -> None:
    """The parts that see, adapters, and weights in 4 bits; with offload they stay on the GPU."""

    def planned(*overrides: str, processes: int = 10**12) -> Memory:  # so many that only what is whole is left
        chosen = settings(folder, "--train.sharding=fsdp2", "--student.model=Qwen/Qwen3.5-9B", *overrides)
        found = estimate(chosen, gpu=True, images=1, processes=processes)
        assert isinstance(found, Memory)
        return found

    shape, tower = shape_of("Qwen/Qwen3.5-9B"), vision_shape_of("Qwen/Qwen3.5-9B")
    assert shape is not None and tower is not None
    seeing, adapters = tower.tower + tower.projector, shape.adapters(8, "all-linear")
    for more in ((), ("--train.offload=true",)):
        for given, weights, moving in (
            ((), 4 * seeing, seeing),
            (("--train.vision={freeze_tower: true}",), 4 * seeing, tower.projector),
            (("--train.lora={rank: 8}",), 4 * adapters + 2 * seeing, adapters),
        ):
            found = planned(*given, *more)
            assert (found.weights, found.gradients, found.optimizer, found.stepping) == (weights, 4 * moving, 8 * moving, 4 * moving)
    bits = planned("--train.lora={rank: 8}", "--student.quantize=4bit").weights - planned("--train.lora={rank: 8}").weights
    assert bits == pytest.approx(0.516 * sum(a * b for _, a, b in shape.linear_maps()))
    full, frozen = planned(processes=8), planned("--train.lora={rank: 8}", processes=8)
    assert full.passing and frozen.passing and full.passing > 2 * frozen.passing  # what is frozen has no gradients
    assert frozen.cast == full.cast == 2 * shape.parameters


def test_the_fewest_processes_that_have_room_are_found(folder: Path) -> None:
    recipe = ("--train.sharding=fsdp2", "--student.model=Qwen/Qwen3.5-9B", "--method=grpo", "--rollout.engine=vllm")
    chosen = settings(folder, *recipe, "--train.gradient_checkpointing=true", "--rollout.vllm.gpu_memory_utilization=0.3")
    rows = dict(memory_rows(chosen, machine=Machine("GPU", True, 80 * GIB)))
    assert rows["verdict"] == "fits" and rows["sharding"].startswith("counted for 8 processes; at most in each of 2: "), rows
    assert "sharding" not in dict(memory_rows(chosen, machine=Machine("GPU", True, 80 * GIB), processes=8))


def test_a_vision_tower_that_is_not_loaded_does_not_count(folder: Path, tmp_path: Path) -> None:
    model = made("qwen3.5")
    model.config.save_pretrained(tmp_path)
    extra = {"model.visual.blocks.0.w": torch.zeros(100, 100), "mtp.fc.weight": torch.zeros(100, 100)}
    save_file({**{name: p.detach().clone() for name, p in model.named_parameters()}, **extra}, tmp_path / "model.safetensors")
    assert estimated(folder, f"--student.model={tmp_path}").weights == estimated(folder).weights


def test_vllm_takes_its_share_and_the_run_keeps_no_cache(folder: Path) -> None:
    within_process = estimate(settings(folder, "--rollout.engine=vllm"), gpu=True, capacity=100 * GIB)
    beside = estimate(settings(folder, "--rollout.engine=vllm", "--rollout.vllm.mode=server"), gpu=True, capacity=100 * GIB)
    assert isinstance(within_process, Memory) and isinstance(beside, Memory)
    assert (within_process.vllm, within_process.rows) == (30 * GIB, 0) and beside.vllm == 0
    asleep = estimate(settings(folder, "--rollout.engine=vllm", "--rollout.vllm.enable_sleep_mode=true"), gpu=True, capacity=100 * GIB)
    assert isinstance(asleep, Memory)
    assert asleep.total - asleep.standing == max(asleep.update, 30 * GIB + asleep.cast)  # an update has vLLM's share too
    assert asleep.standing == within_process.standing - 30 * GIB


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5", "chunks"])
def test_the_update_holds_about_what_is_estimated(
    kind: str, bf16: bool, recomputed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "chunks" the vocabulary is wide, and its logits are looked at in eight goes: whole they would be most of all."""
    if kind == "chunks":
        for module in (memory, output_head):
            monkeypatch.setattr(module, "head_tokens", lambda *_, **__: 128)
        torch.manual_seed(0)
        model: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**{**WIDTHS, "vocab_size": 20_000}, num_hidden_layers=2, head_dim=16)).eval()
    else:
        model = made(kind)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if recomputed:
        recompute_layers(model)
    rows = [((1,) * 8, tuple(range(1, 249))) for _ in range(4)]

    def update() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
            logprobs, _ = completion_logprobs(model, rows)
        logprobs.sum().backward()

    update()  # the first time allocates what stays
    tokens, n = 4 * 256, sum(p.numel() for p in model.parameters())
    kept, again = activations_per_token(shape(model, tmp_path), bf16=bf16, recomputed=recomputed)
    logits = head_bytes(shape(model, tmp_path), 4 * 248, bf16=bf16, gpu=False)
    guess, real = tokens * kept + max(logits, tokens * again) + (2 * n if bf16 else 0), peak(update)
    assert kind != "chunks" or real < 4 * 248 * 20_000 * 4 * 1.2  # not much more than the logits would have been alone, in fp32
    assert 1 / FACTOR < guess / real < FACTOR, (guess, real)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_a_rollouts_cache_is_exact(kind: str, tmp_path: Path) -> None:
    model, rows, length = made(kind), 3, 70
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(rows, length, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        values = [list(v.values()) if isinstance(v, dict) else v for v in vars(layer).values()]
        tensors = [t for value in values for t in (value if isinstance(value, (list, tuple)) else [value])]
        held += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    found = shape(model, tmp_path)
    assert rows * (found.cache_per_token(4) * length + found.cache_per_row(4)) == held


def test_lengths_follow_the_settings_and_the_questions(folder: Path) -> None:
    base = estimated(folder)
    assert base.longest == 64 + 4 * 16 + 300 + 64 and base.tokens == 4096 // base.longest * base.longest
    assert estimated(folder, "--method=grpo").longest == 128
    assert estimated(folder, "--train.tokens_per_microbatch=10").tokens == base.longest
    assert estimated(folder, "--train.minibatches=3", "--method=grpo").tokens == 128 * 4 * 3
    assert (estimated(folder, "--method=grpo-replay").rows, estimated(folder, "--rollout.max_rows=5").rows) == (40, 5)
    assert base.rows == 8 and base.row == base.widest  # reformulated ones, which are longer
    short = [Question("q", (Message("user", "é" * 10),), "1")]
    assert within(settings(folder, "--data.max_prompt_tokens=4096"), short).data.max_prompt_tokens == 320
    assert within(settings(folder), short).data.max_prompt_tokens == 64
    assert within(settings(folder), short, 1).rollout.batch_size == 1
    assert within(settings(folder), short, 10**6).rollout.batch_size == settings(folder).rollout.batch_size
    wide = estimated(folder, "--method=off-distill")
    assert wide.logits / wide.tokens > 4 * base.logits / base.tokens


def test_a_micro_batch_holds_what_a_minibatch_has(folder: Path, tmp_path: Path) -> None:
    """No more rows than there are, reformulated ones where there are some; prompts that are shared count once; no logits of prompts."""
    made("qwen3").save_pretrained(tmp_path / "plain")
    own = (f"--student.model={tmp_path / 'plain'}", "--train.minibatches=1", "--train.tokens_per_microbatch=100000")
    apart = estimated(folder, *own, "--method=grpo", "--train.share_prompts=off")
    assert apart.tokens == 8 * 4 * 128  # all rows of the step, whatever the budget
    shared = estimated(folder, *own, "--method=grpo")
    assert shared.tokens == 2 * (64 + 4 * 64) <= MERGED_TOKENS and shared.logits < apart.logits and shared.activations < apart.activations
    assert estimated(folder, *own, "--method=grpo", gpu=True).tokens == apart.tokens  # auto shares on a CPU
    chosen = settings(folder, *own, "--method=grpo", "--train.share_prompts=off")
    known = estimate(chosen, gpu=False, shortest=40)
    head = 512 * 64 * 4  # the output layer's gradient, whatever is scored
    assert isinstance(known, Memory) and known.logits - head == (apart.logits - head) * (128 - 40) // 128
    helped = estimated(folder, *own, "--train.share_prompts=off", "--train.tokens_per_microbatch=2000")
    assert helped.tokens == 2000 // helped.longest * helped.longest
    # A candidate is no longer than what it shortens.
    capped = estimated(folder, "--teacher.compression.max_new_tokens=4000")
    assert capped.longest == 64 + 4 * 64 + 300 + 64


def test_prompts_are_as_long_as_those_of_the_data(folder: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "student")
    chosen = settings(folder, f"--student.model={tmp_path / 'student'}", "--data.max_prompt_tokens=4096", "--prompts.closing=boxed")
    asked = [Question(f"q{i}", (Message("user", "What is 3 plus 4? " * i),), "7") for i in (1, 5, 9)]
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "student")
    real = [
        len(
            tokenizer.apply_chat_template([m._asdict() for m in PromptBook(chosen.prompts).plain(q)], add_generation_prompt=True)[
                "input_ids"
            ]
        )
        for q in asked
    ]
    low, high, mean, counted, over = prompt_tokens(chosen, asked)
    assert counted and low < mean < high and over == 0
    assert low <= real[0] and real[-1] <= high <= real[-1] + 2  # words are counted apart that a tokenizer may join
    tight = settings(folder, f"--student.model={tmp_path / 'student'}", f"--data.max_prompt_tokens={real[1]}")
    assert prompt_tokens(tight, asked).over == 1
    shown = (Message("user", "What is 3 plus 4?"), Message("assistant", "7"))
    assert within(chosen, asked, 3, shown).data.max_prompt_tokens > within(chosen, asked, 3).data.max_prompt_tokens == high
    assert within(chosen, asked, 3).zone.rho_replay == 0  # every question is new in every step
    (tmp_path / "student" / "tokenizer.json").write_text("{")
    assert prompt_tokens(chosen, asked)[0] == 0 and prompt_tokens(chosen, asked)[1] > high and not prompt_tokens(chosen, asked).counted


@pytest.mark.long
def test_the_peak_of_a_run_is_within_its_estimate(tmp_path: Path) -> None:
    """A student whose activations are much: the closing table's own figures, of a process of its own."""
    make_tiny(tmp_path / "student", hidden_size=256, intermediate_size=1024, num_hidden_layers=6, head_dim=64, merges=150)
    rows = [{"prompt": f"What is {i} plus {j}?", "answer": i + j} for i in range(4) for j in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text("def reward(completion, question):\n    return float(len(completion) % 2)\n")
    (tmp_path / "recipe.yaml").write_text(
        "student: {model: student}\nmethod: grpo\ndata: {train: q.jsonl}\ngrading: {reward: reward.py:reward}\n"
        "rollout: {batch_size: 8, group_size: 8, max_new_tokens: 64}\n"
        "train: {steps: 1, minibatches: 1, device: cpu, checkpoint_every: 0, share_prompts: 'off'}\n"
    )
    command = [sys.executable, "-m", "zppo", "train", str(tmp_path / "recipe.yaml"), f"--output={tmp_path / 'run'}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"peak memory of this process: ([\d.]+) GiB; ([\d.]+) GiB at most", said)
    assert found, said
    measured, guess = map(float, found.groups())
    assert 0.2 < measured < guess < 3 * measured, (measured, guess)


def verdict(chosen: Settings, machine: Machine) -> str:
    rows = dict(memory_rows(chosen, machine=machine))
    return rows["verdict"]


@pytest.mark.parametrize("gigabytes", [16, 24, 48, 80, 141])
@pytest.mark.parametrize("student", ["Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B"])
def test_what_is_advised_fits(student: str, gigabytes: int) -> None:
    machine = Machine("GPU", True, gigabytes * 10**9)
    recipe = Path(__file__).parents[1] / "recipes" / "my-data.yaml"
    base = [f"--student.model={student}", "--teacher.base_urls=[http://localhost:1/v1]", "--rollout.batch_size=32"]
    said = verdict(load_recipe(recipe, base), machine)
    if "even with LoRA" in said:
        assert gigabytes <= 24
        return
    changes = re.findall(r"--(?:train|student)\.\S+", said.replace("'", "")) + [
        f"--{r}" for r in re.findall(r"rollout\.max_rows=\d+", said)
    ]
    again = verdict(load_recipe(recipe, [*base, *changes]), machine)
    assert again.startswith("fits"), (said, again)
    if changes:
        assert not said.startswith("fits")


def test_verdicts_in_words(folder: Path) -> None:
    memory = estimated(folder, gpu=True)
    fits = Machine("GPU", True, 2 * memory.total)
    assert verdict(settings(folder), fits) == "fits"
    assert "tight" in verdict(settings(folder), Machine("GPU", True, memory.total + 1))
    assert "free now" in dict(memory_rows(settings(folder), machine=Machine("GPU", True, 4 * memory.total, 2 * memory.total)))["at most"]
    small = Machine("GPU", True, memory.standing + memory.cast + 2 * memory.row)
    auto = verdict(settings(folder, "--train.tokens_per_microbatch=auto", "--rollout.batch_size=64"), small)
    assert "rollouts fit at once" in auto
    none = verdict(settings(folder), Machine("GPU", True, GIB))
    assert "even with LoRA, weights in 4 bits" in none and "what stands all the while takes" in none and "lower" not in none
    bare = verdict(settings(folder), Machine("GPU", True, memory.standing + 1000))
    assert "lower rollout.max_new_tokens" in bare and "not even one rollout" in bare
    assert "sharding" not in dict(memory_rows(settings(folder), machine=fits))
    assert "not known" in dict(memory_rows(settings(folder, "--student.model=someone/else"), machine=fits))["estimate"]


def test_the_gpu_that_a_run_would_see_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = "0, GPU-aaa, NVIDIA A, 24564, 24000\n1, GPU-bbb, NVIDIA B, 81559, 100\n2, GPU-ccc, Cut, [N/A], [N/A]\n"
    assert _pick(table, "") == Machine("NVIDIA A", True, 24564 * 2**20, 24000 * 2**20)
    for chosen in ("1", "GPU-bb"):
        found = _pick(table, chosen)
        assert found is not None and found.name == "NVIDIA B" and found.usable == 100 * 2**20
    assert _pick(table, "2") is None and _pick("", "") is None and _pick("no devices were found", "") is None

    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{table}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu, ram = find_machine("auto"), find_machine("cpu")
    assert gpu is not None and gpu.name == "NVIDIA A" and ram is not None and not ram.gpu and ram.total > GIB // 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_machine("auto") == _pick(table, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert is_ram(find_machine("auto"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert is_ram(find_machine("auto"))


def is_ram(found: Machine | None) -> bool:
    return found is not None and not found.gpu and found.name.startswith("RAM")


@pytest.mark.parametrize("version", [1, 2])
def test_ram_is_what_is_available_now_within_the_control_group(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every group above the process's own too; file pages that can be dropped count as free; one without a limit bounds nothing."""
    monkeypatch.setattr("zppo.planning.machine.psutil.virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=40 * GIB))
    assert _ram(tmp_path) == Machine("RAM", False, 64 * GIB, 40 * GIB)
    top = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    (top / "job/step").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:cpu:/other\n4:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    most, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    (top / "job/step" / most).write_text(f"{2**63 - 4096 if version == 1 else 'max'}\n")
    (top / "job/step" / used).write_text(f"{3 * GIB}\n")
    assert _ram(tmp_path) == Machine("RAM", False, 64 * GIB, 40 * GIB)
    (top / "job" / most).write_text(f"{16 * GIB}\n")
    (top / "job" / used).write_text(f"{10 * GIB}\n")
    (top / "job" / "memory.stat").write_text(f"anon 5\ninactive_file {4 * GIB}\n")
    assert _ram(tmp_path) == Machine("RAM, as much as the control group may have", False, 16 * GIB, 10 * GIB)


def test_the_verdict_is_about_what_is_free_and_both_are_said(folder: Path) -> None:
    needs = estimated(folder, gpu=False).total
    rows = dict(memory_rows(settings(folder), machine=Machine("RAM", False, 4 * needs, needs // 2)))
    assert (
        "(RAM; " in rows["at most"]
        and "of it free now" in rows["at most"]
        and rows["verdict"].startswith("others hold ")
        and "it would fit" in rows["verdict"]
    )
    assert dict(memory_rows(settings(folder), machine=Machine("RAM", False, 4 * needs, 2 * needs)))["verdict"] == "fits"


def test_a_small_card_is_sent_to_lora_and_to_a_teacher_that_fits() -> None:
    """All weights of a 0.8B student beside a 4B teacher: the recipe that everybody copies."""
    machine = Machine("GPU", True, 20 * GIB)
    recipe = Path(__file__).parents[1] / "recipes" / "my-data.yaml"
    said = verdict(load_recipe(recipe), machine)
    assert "--train.lora='{}'" in said and "recipes/single-gpu-lora.yaml" in said
    assert "a smaller one than 'Qwen/Qwen3.5-4B' takes less, and one on a server (teacher.base_urls) nothing" in said
    lighter = ["--train.gradient_checkpointing=true", "--train.lora={}", "--teacher.model=Qwen/Qwen3.5-2B"]
    assert verdict(load_recipe(recipe, lighter), machine) == "fits"
    away = verdict(load_recipe(recipe, ["--teacher.base_urls=[http://localhost:1/v1]"]), machine)
    assert "smaller one" not in away


def test_a_teacher_that_no_setting_makes_room_for_is_named() -> None:
    machine, recipe = Machine("GPU", True, 16 * GIB), Path(__file__).parents[1] / "recipes" / "my-data.yaml"
    said = verdict(load_recipe(recipe, ["--teacher.model=Qwen/Qwen3.5-9B"]), machine)
    assert "beside the 16.7 GiB of Qwen/Qwen3.5-9B: put them on a server (base_urls), or take smaller ones, of " in said
    assert "both with --train." in said and "lower rollout.max_new_tokens" not in said
    away = ["--teacher.base_urls=[http://localhost:1/v1]", *said.partition("both with ")[2].split(";")[0].split()]
    assert verdict(load_recipe(recipe, away), machine).startswith("fits")  # the advice holds
    two = verdict(load_recipe(recipe, ["--judge.model=Qwen/Qwen3.5-9B"]), machine)
    assert "Qwen/Qwen3.5-4B, Qwen/Qwen3.5-9B: put them on a server" in two


def test_a_teacher_of_unknown_size_leaves_the_students_part() -> None:
    machine, recipe = Machine("GPU", True, 80 * GIB), Path(__file__).parents[1] / "recipes" / "my-data.yaml"
    rows = dict(memory_rows(load_recipe(recipe, ["--teacher.model=acme/mystery"]), machine))
    alone = dict(memory_rows(load_recipe(recipe, ["--teacher.base_urls=[http://localhost:1/v1]"]), machine))
    assert rows["not counted"].startswith("acme/mystery: not on this machine")
    assert rows["at most"] == alone["at most"] and alone["verdict"] == "fits"
    assert rows["verdict"].startswith("fits, if acme/mystery takes no more than ")
    assert dict(memory_rows(load_recipe(recipe, ["--student.model=acme/mystery"]), machine)).keys() == {"estimate"}
