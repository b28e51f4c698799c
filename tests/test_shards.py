"""Memory of sharded weights: who reads, gathers and writes how much of them, and in which type. Four real processes on loopback."""

from __future__ import annotations

import json
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from conftest import make_tiny
from distributed_worker import load
from seeing import make_seeing
from shards_worker import make_learner, train
from test_distributed import assert_near, distance, newest, records
from test_update import make_groups
from victims import Victims
from zppo.config.settings import Settings
from zppo.distributed.checkpoint_parts import WeightFiles, files_of, read_moments, untied
from zppo.distributed.parallel import ReplicatedWeights
from zppo.errors import CheckpointError, ModelError
from zppo.models.student_model import UnreadStudent, load_model, unread_student
from zppo.runs import checkpoint


@pytest.mark.slow
@pytest.mark.long
def test_four_processes_hold_shares_and_train_as_one(tmp_path: Path, victims: Victims) -> None:
    """Shards within two (HSDP), the optimizer on the processor, bf16, and checkpoints in parts, each against one process."""
    AcceleratorState._reset_state(True)
    path = make_tiny(tmp_path / "model", num_hidden_layers=8, tie_word_embeddings=True)
    model = load(str(path))
    rewards = [[[1.0, 0.0, 0.0, 1.0], [0.0] * 4, [0.0, 0.0, 1.0, 0.0]], [[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]]]
    recorded = [make_groups(model, rows, seed=step) for step, rows in enumerate(rewards)]
    (tmp_path / "recorded.pickle").write_bytes(pickle.dumps(recorded))
    for name in ("tied", "untied"):  # an odd vocabulary: shards are of two sizes
        other: Any = make_tiny(tmp_path / name, seed=1, vocab_size=501, tie_word_embeddings=name == "tied")
        AutoModelForCausalLM.from_pretrained(other, dtype=torch.bfloat16).save_pretrained(other)
    learner = make_learner(model, ReplicatedWeights())
    expected = train(learner, recorded)
    model.save_pretrained(tmp_path / "one")

    status = victims.run(path, tmp_path / "recorded.pickle", tmp_path, run=tmp_path, call="shards_worker:main", processes=4)
    assert status == 0, victims.said[-3000:]
    assert distance(tmp_path / "one", path) > 1e-4  # it has learnt something
    for rank in range(4):
        for ours, theirs in zip(expected, pickle.loads((tmp_path / f"within-{rank}.pickle").read_bytes()), strict=True):
            known = {k: v for k, v in ours.items() if k != "train_tokens_computed"}
            assert_near(known, {k: theirs[k] for k in known})
        assert (tmp_path / f"refused-{rank}").exists()  # one disk is full, and every process knows
    for name in ("within/model", "final"):  # tied weights have one name there
        assert distance(tmp_path / "one", tmp_path / name) <= 1e-6, name
    assert distance(tmp_path / "one", tmp_path / "two" / "model") <= 1e-6
    assert distance(tmp_path / "one", tmp_path / "bf16" / "model") <= 1e-3

    # What four have written one reads, and goes on from.
    files = sorted(p.name for p in (tmp_path / "two" / "model").iterdir())
    assert [name for name in files if name.endswith(".safetensors")] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    fresh = load(str(tmp_path / "two" / "model"))
    other = make_learner(fresh, ReplicatedWeights())
    other.weights.load_optimizer(tmp_path / "two", other.optimizer.optimizer, fresh)
    ours, theirs = (each.optimizer.optimizer.state_dict()["state"] for each in (learner, other))
    assert ours.keys() == theirs.keys()
    for index, values in ours.items():
        for name, value in values.items():
            torch.testing.assert_close(theirs[index][name], value, rtol=1e-3, atol=1e-7)
    trained = dict(fresh.named_parameters())
    more = {**trained, "more": torch.nn.Parameter(torch.zeros(2))}
    wider = {**trained, "model.norm.weight": torch.nn.Parameter(torch.zeros(64))}
    for wrong in (more, wider):
        with pytest.raises(CheckpointError, match="does not fit the student"):
            read_moments(tmp_path / "two", other.optimizer.optimizer, wrong)
    (tmp_path / "two" / "optimizer" / "steps.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="cannot be used"):
        read_moments(tmp_path / "two", other.optimizer.optimizer, trained)


def test_whose_weights_are_read_in_parts(tmp_path: Path) -> None:
    """By name and form of what its files hold; nothing else of the model differs, and no weight is read."""

    def unread(folder: Path, images: bool = False, **train: Any) -> UnreadStudent | str:
        settings = Settings(method="grpo", student={"model": str(folder)}, data={"train": "-"}, train=train)
        return unread_student(settings, None, images=images)

    def files(folder: Path, images: bool = False) -> WeightFiles | str:
        found = unread(folder, images)
        assert isinstance(found, UnreadStudent) and found.student.adapters is None
        model, whole = found.student.model, load_model(folder, dtype=torch.float32, images=images)
        assert all(p.is_meta for p in model.parameters()) and type(model) is type(whole) and not model.training
        assert model.config.to_dict() == whole.config.to_dict()
        buffers = dict(whole.named_buffers())
        assert buffers and all(torch.equal(value, buffers.pop(name)) for name, value in model.named_buffers()) and not buffers
        named = files_of(model, found.folder)
        if isinstance(named, WeightFiles):
            state = load_file(folder / "model.safetensors")
            assert all(torch.equal(state[named.names[name]], value) for name, value in untied(whole).items())
        return named

    seeing = make_seeing(tmp_path / "seeing", "qwen3_5")
    for images in (False, True):  # without images its text model alone, whose names are others
        assert isinstance(files(seeing, images), WeightFiles)
    plain = make_tiny(tmp_path / "plain", tie_word_embeddings=True)
    assert isinstance(files(plain), WeightFiles)
    state = load_file(plain / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, plain / "model.safetensors", {"format": "pt"})
    found = unread(plain)
    assert isinstance(found, UnreadStudent) and "are tied, and its files hold both" in str(files_of(found.student.model, found.folder))

    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 64}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **experts)).save_pretrained(tmp_path / "experts")
    assert "in another form" in str(files(tmp_path / "experts"))

    assert "adapters" in str(unread(plain, lora={}))
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    assert unread(plain) == "its weights are no safetensors"
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert unread(plain) == "its weights are quantized"
    damaged = make_tiny(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        unread(damaged)


@pytest.mark.slow
@pytest.mark.long
def test_a_start_takes_a_fourth_of_the_weights_in_each_of_four_processes(tmp_path: Path, victims: Victims) -> None:
    size = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 16, "num_attention_heads": 12, "head_dim": 64}
    path = make_tiny(tmp_path / "model", **size, num_key_value_heads=4, vocab_size=8000)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(path)
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert victims.run(path, tmp_path, run=tmp_path, call="shards_worker:started", processes=4) == 0, victims.said[-3000:]
    grown = {way: [int((tmp_path / f"{way}-{rank}").read_text()) for rank in range(4)] for way in ("parts", "whole")}
    print(f"of {whole / 1e6:.0f} MB, MB a process: { ({way: [round(b / 1e6) for b in found] for way, found in grown.items()}) }")
    assert max(grown["parts"]) < 0.3 * whole, grown
    assert grown["whole"][0] > 0.9 * whole, grown


@pytest.mark.slow
@pytest.mark.long
def test_killed_amid_a_checkpoint_it_goes_on_from_the_one_before_bit_for_bit(recipe: Path, tmp_path: Path, victims: Victims) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = ("train", recipe, "--train.sharding=fsdp2", "--data.eval=null")
    assert victims.run(*command, f"--output={whole}", run=whole, processes=2) == 0, victims.said[-3000:]
    amid = "zppo.distributed.checkpoint_parts:write_moments"
    assert victims.run(*command, f"--output={run}", run=run, processes=2, at=amid, nth=2) == -signal.SIGKILL
    before, partial = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert partial.endswith(".partial") and checkpoint.existing(run) == [run / "checkpoints" / before]
    assert victims.run("resume", run, run=run, processes=2) == 0, victims.said[-3000:]
    assert records(run) == records(whole) and distance(run / "final", whole / "final") == 0
    parts = sorted(path.name for path in (newest(whole) / "optimizer").glob("*.safetensors"))
    assert len(parts) == 2
    for name in parts:
        ours, theirs = (load_file(newest(folder) / "optimizer" / name) for folder in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # One process's part is missing: it is no checkpoint.
    next((newest(run) / "optimizer").glob("shard-*")).unlink()
    good, damaged = checkpoint.newest_good(run)
    assert good == sorted((run / "checkpoints").iterdir())[0] and "is missing" in damaged[newest(run)]
