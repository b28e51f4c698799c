"""LoRA: which layers, exactness of sampling, what is trained and saved, resume, and the merged student."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from test_engine import BANNED, SIZE, assert_lean_is_exact, engine, flat, requests, tiny
from zppo.cli import main
from zppo.config.recipe import load_recipe
from zppo.config.settings import LoraSettings
from zppo.engines.base import Sampling
from zppo.engines.logprobs import completion_logprobs
from zppo.errors import CheckpointError, ModelError, SettingsError
from zppo.models.lora import Adapters, add_adapters, find_targets
from zppo.models.student_model import load_model, load_student
from zppo.runs.checkpoint import weights_folder

LORA = "--train.lora={rank: 4, alpha: 8}"
TIME_FIELDS = ("seconds", "tokens_per_second", "teacher_wait_seconds", "system")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """`accelerate` fixes its precision once per process; every run here stands for a process of its own."""
    AcceleratorState._reset_state(True)


def adapted(model: PreTrainedModel, std: float = 0.2, **settings: Any) -> Adapters:
    """Adapters in a model, with both matrices large enough to show errors."""
    adapters = add_adapters(model, LoraSettings(rank=4, alpha=8, **settings), base="base")
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                weight.normal_(std=std, generator=generator)
    return adapters


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_lean_step_goes_through_the_adapters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    adapted(model)
    assert_lean_is_exact(model, monkeypatch)


# --- which layers ---------------------------------------------------------------------------------------------------


def with_vision() -> PreTrainedModel:
    """A Qwen3.5 with its vision tower."""
    text = SIZE | {"head_dim": 16, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))


def test_all_linear_leaves_the_output_embedding_and_a_vision_tower_alone() -> None:
    names = find_targets(tiny(), "all-linear")
    assert len(names) == 2 * 7 and "model.layers.0.self_attn.q_proj" in names and "lm_head" not in names
    names = find_targets(with_vision(), "all-linear")
    assert {"in_proj_qkv", "in_proj_a", "q_proj", "down_proj"} <= {name.rpartition(".")[2] for name in names}
    assert not any("visual" in name or "lm_head" in name for name in names)


def test_targets_are_last_names_and_patterns() -> None:
    assert find_targets(tiny(), ("q_proj", "model.layers.1.mlp.*")) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert find_targets(tiny(), ("lm_head",)) == ["lm_head"]
    vision = with_vision()
    with pytest.raises(SettingsError, match="'qkv' takes no linear layer"):
        find_targets(vision, ("qkv",))  # only the tower has one
    assert find_targets(vision, ("*visual*.qkv",)) == ["model.visual.blocks.0.attn.qkv"]


def test_targets_that_cannot_be() -> None:
    with pytest.raises(SettingsError, match="'q_prj' takes no linear layer of Qwen3ForCausalLM.*k_proj.*all-linear"):
        find_targets(tiny(), ("v_proj", "q_prj"))
    with pytest.raises(SettingsError, match="takes no linear layer"):
        find_targets(tiny(), ("embed_tokens",))
    with pytest.raises(SettingsError, match="shares its weights with the input embedding"):
        find_targets(tiny(tie_word_embeddings=True), ("lm_head",))
    assert "lm_head" not in find_targets(tiny(tie_word_embeddings=True), "all-linear")


# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_sampling_sees_the_adapters_and_its_log_probs_are_the_training_forward_s(kind: str) -> None:
    """Qwen3 max <= 1e-5; Qwen3.5 mean <= 1e-5, max <= 1e-3, with adapters of standard deviation 0.2."""
    model, asked, how = tiny(kind), requests([3, 40, 17, 1, 70]), Sampling(max_new_tokens=12, temperature=0.9)
    plain = flat(engine(model).sample(asked, how))
    adapted(model)
    assert not any(module.training for module in model.modules())
    done = engine(model).sample(asked, how)
    assert flat(done) != plain
    rows = [(request.prompt_ids, c.ids) for request, group in zip(asked, done, strict=True) for c in group]
    with torch.no_grad():
        expected, mask = completion_logprobs(model, rows, temperature=0.9, banned_ids=BANNED)
    error = (torch.cat([c.logprobs for group in done for c in group]) - expected[mask]).abs()
    assert error.max() <= (1e-3 if kind == "qwen3.5" else 1e-5)
    assert error.mean() <= 1e-5


def test_fresh_adapters_change_nothing_and_are_drawn_by_the_seed() -> None:
    ids, state = torch.arange(5, 45)[None], torch.random.get_rng_state()
    with torch.no_grad():
        models = [tiny() for _ in range(3)]
        torch.random.set_rng_state(state)
        before = models[0](ids).logits
        for model, seed in zip(models, (0, 0, 1), strict=True):
            add_adapters(model, LoraSettings(), base="base", seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(models[0](ids).logits, before)
    first, again, other = (torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]) for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other) and first.std() > 0.01
    trained = [name for name, weight in models[0].named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapters_load_and_merge(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also from frozen weights in bf16: adapters stay in fp32, and the merged model is their sum in fp32."""
    model = cast(Any, tiny(kind)).to(dtype)
    adapters = adapted(model, targets=("q_proj", "in_proj_z", "*.mlp.*") if kind == "qwen3.5" else "all-linear")
    assert {w.dtype for n, w in model.named_parameters() if "lora_" in n} == {torch.float32}
    adapters.save_pretrained(tmp_path)
    other = cast(Any, tiny(kind)).to(dtype)
    loaded = add_adapters(other, adapters_settings(adapters), base="base")
    loaded.load(tmp_path)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(other(ids).logits, before)
        parts = {name: value.clone() for name, value in model.state_dict().items()}
        merged = adapters.merge()
        for name, weight in merged.state_dict().items():
            stem = name.removesuffix(".weight")
            whole = parts.get(name, parts.get(f"{stem}.base_layer.weight")).float()
            if f"{stem}.lora_B.default.weight" in parts:
                whole = whole + 2 * parts[f"{stem}.lora_B.default.weight"] @ parts[f"{stem}.lora_A.default.weight"]
            assert weight.dtype == torch.float32
            torch.testing.assert_close(weight, whole, rtol=0, atol=1e-6)
        if dtype == torch.float32:
            assert (merged(ids).logits - before).abs().max() <= 1e-4 * before.abs().max()


def adapters_settings(adapters: Adapters) -> LoraSettings:
    config = adapters.handle.peft_config["default"]
    targets = tuple(f"*{name}" for name in config.target_modules)
    return LoraSettings(rank=config.r, alpha=config.lora_alpha, targets=targets)


# --- whole runs -----------------------------------------------------------------------------------------------------


def train(recipe: Path, output: Path, *overrides: str) -> Path:
    AcceleratorState._reset_state(True)
    assert main(["train", str(recipe), f"--output={output}", *overrides]) == 0
    return output


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe, tmp_path_factory.mktemp("lora") / "whole", LORA)


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


def back_to(run: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as it was when it had gone on for a while after the checkpoint of a step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


@pytest.mark.slow
def test_checkpoints_hold_adapters_only_and_final_is_merged(finished: Path, recipe: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-000005"
    assert sorted(p.name for p in (checkpoint / "model").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    adapters = load_file(checkpoint / "model" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * 7 and all(w.dtype == torch.float32 for w in adapters.values())
    assert sum(w.numel() for w in adapters.values()) < 7000
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(adapters)
    base = load_file(recipe.parent / "student" / "model.safetensors")
    final = load_file(finished / "final" / "model.safetensors")
    assert final.keys() == base.keys()
    for name, weight in base.items():
        low = [adapters.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{m}.weight") for m in "AB"]
        if low[0] is None or low[1] is None:
            assert torch.equal(final[name], weight), name  # frozen
        else:
            assert low[1].abs().max() > 0
            torch.testing.assert_close(final[name], weight + 8 / 4 * low[1] @ low[0], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_final_loads_by_itself_and_its_adapters_on_the_base(finished: Path, recipe: Path) -> None:
    from peft import PeftModel

    merged = AutoModelForCausalLM.from_pretrained(finished / "final")
    assert not hasattr(merged, "peft_config")
    base = AutoModelForCausalLM.from_pretrained(recipe.parent / "student")
    on_top = PeftModel.from_pretrained(base, str(finished / "final" / "adapter"))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, on_top(ids).logits, rtol=0, atol=1e-4)
    config = json.loads((finished / "final" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(recipe.parent / "student") and config["r"] == 4
    card = (finished / "final" / "README.md").read_text(encoding="utf-8")
    assert "Low-rank adapters (rank 4, alpha 8)" in card and "`adapter/`" in card
    steps = [r for r in records(finished) if r["event"] == "step"]
    assert all(r["logprob_gap_max"] <= 1e-4 for r in steps)  # the sampler is the trainer


@pytest.mark.slow
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    run = back_to(finished, 4, tmp_path / "resumed")
    assert main(["resume", str(run)]) == 0
    assert records(run) == records(finished)
    for path in sorted((finished / "rollouts").iterdir()):
        assert pq.read_table(path).equals(pq.read_table(run / "rollouts" / path.name))
    for name in (
        "final/model.safetensors",
        "final/adapter/adapter_model.safetensors",
        "checkpoints/step-000005/model/adapter_model.safetensors",
    ):
        ours, theirs = load_file(run / name), load_file(finished / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ours, theirs = (torch.load(r / "checkpoints" / "step-000005" / "optimizer.pt", weights_only=True) for r in (run, finished))
    for index, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][index][name]) for name, value in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["on-distill", "off-distill", "hint"])
def test_other_methods_train_adapters(recipe: Path, tmp_path: Path, method: str) -> None:
    run = train(recipe, tmp_path / method, LORA, f"--method={method}", "--train.steps=2", "--data.eval=null")
    base = load_file(recipe.parent / "student" / "model.safetensors")
    final = load_file(run / "final" / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], final[name])}
    assert len(moved) == 14 and all(name.endswith("_proj.weight") for name in moved)


@pytest.mark.slow
def test_under_bf16_the_frozen_weights_are_bf16_and_the_trained_ones_fp32(recipe: Path, tmp_path: Path) -> None:
    settings = load_recipe(recipe, [LORA])
    student = load_student(settings, None, bf16=True)
    kinds = {("lora_" in name, weight.dtype) for name, weight in student.model.named_parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    assert {w.dtype for w in load_student(settings, None, bf16=False).model.parameters()} == {torch.float32}
    run = train(recipe, tmp_path / "bf16", LORA, "--train.precision=bf16", "--train.steps=2", "--data.eval=null")
    assert all(r["loss"] is not None and r["skipped_updates"] == 0 for r in records(run))
    final = load_file(run / "final" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in final.values())


# --- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_other_settings_is_refused(
    finished: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = back_to(finished, 4, tmp_path / "run")
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    for changed, said in (("rank: 2", "rank 4, alpha 8"), ("alpha: 16", "alpha 16"), (None, "train.lora of the recipe is off")):
        AcceleratorState._reset_state(True)
        lora = text.index("  lora:")
        new = text.replace("rank: 4", changed) if changed == "rank: 2" else text
        new = text.replace("alpha: 8.0", "alpha: 16.0") if changed == "alpha: 16" else new
        if changed is None:
            end = text.index("  gradient_checkpointing")
            new = f"{text[:lora]}  lora: null\n{text[end:]}"
        assert new != text
        (run / "recipe.yaml").write_text(new, encoding="utf-8")
        assert main(["resume", str(run)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    whole = load_recipe(recipe, [LORA])
    (tmp_path / "full" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds all weights, and train.lora of the recipe is on"):
        load_student(whole, tmp_path / "full", bf16=False)
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    weights = weights_folder(run / "checkpoints" / "step-000004") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_student(load_recipe(run / "recipe.yaml", []), run / "checkpoints" / "step-000004", bf16=False)


def test_a_folder_of_adapters_is_no_student(tiny_qwen3_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    add_adapters(model, LoraSettings(), base=str(tiny_qwen3_dir)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds adapters only"):
        load_model(tmp_path, dtype=torch.float32)


def test_without_peft_the_mend_is_said_and_nothing_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["train", str(recipe), LORA, f"--output={tmp_path / 'run'}"]) == 2
    assert "pip install peft" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
