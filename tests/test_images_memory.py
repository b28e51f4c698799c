"""What a dry run says of the memory that images take."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

from seeing import make_picture, make_seeing
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.types import Message, Question
from zppo.planning.dry_run import memory_rows
from zppo.planning.machine import Machine
from zppo.planning.memory import GIB, Memory, estimate, within
from zppo.planning.model_shapes import VisionTowerShape, vision_shape_of


def settings(folder: Path, *overrides: str) -> Settings:
    (folder / "recipe.yaml").write_text(
        json.dumps({"method": "grpo", "student": {"model": "student"}, "data": {"train": "questions.jsonl"}}), encoding="utf-8"
    )
    return load_recipe(folder / "recipe.yaml", [f"--student.model={folder / 'student'}", *overrides])


def kept_per_patch(shape: VisionTowerShape, *, bf16: bool) -> float:
    """Bytes that autograd keeps of a real tower, weights aside."""
    config: Any = Qwen3_5Config(
        vision_config={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "depth": shape.layers,
            "num_heads": 4,
            "out_hidden_size": shape.out,
            "num_position_embeddings": 64,
        }
    ).vision_config
    tower, grid = Qwen3_5VisionModel(config), torch.tensor([[1, 16, 16], [1, 8, 8]])
    own = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    held: dict[int, int] = {}
    tensors = []  # kept alive, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        tensors.append(tensor)
        return tensor

    cast: Any = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), cast:
        tower(torch.randn(320, 3 * 2 * 16 * 16), grid_thw=grid)
    return sum(held.values()) / 320


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(("hidden", "mlp"), [(96, 160), (128, 512)])
def test_what_a_tower_keeps_is_estimated_to_a_quarter(hidden: int, mlp: int, bf16: bool) -> None:
    shape = VisionTowerShape(hidden, mlp, layers=5, out=64, patch=16, merge=2)
    assert kept_per_patch(shape, bf16=bf16) == pytest.approx(shape.kept_per_patch(bf16=bf16, recomputed=False), rel=0.25)
    assert shape.kept_per_patch(bf16=bf16, recomputed=True) < 0.6 * shape.kept_per_patch(bf16=bf16, recomputed=False)


@pytest.mark.parametrize(("kind", "tokens"), [("qwen3_5", 9), ("smolvlm", 9), ("gemma3", 4)])
def test_the_shape_is_the_checkpoint_s(kind: str, tokens: int, tmp_path: Path) -> None:
    shape = vision_shape_of(str(make_seeing(tmp_path / kind, kind)))
    assert shape is not None
    assert (shape.hidden, shape.mlp, shape.layers, shape.out, shape.patch, shape.merge) == (16, 24, 2, 32, 4, 2)
    assert shape.tokens(24 * 24) == tokens


def test_a_student_that_is_not_here_counts_with_the_largest_tower_of_its_family() -> None:
    shape = vision_shape_of("Qwen/Qwen3.5-2B")
    assert shape is not None and 4e8 < shape.tower < 4.2e8
    assert vision_shape_of("Qwen/Qwen3-1.7B") is None


def test_images_add_the_tower_its_activations_and_their_tokens(tmp_path: Path) -> None:
    make_seeing(tmp_path / "student", "qwen3_5")
    recipe = settings(tmp_path, "--data.images.min_pixels=64", "--data.images.max_pixels=576")
    ref = make_picture(tmp_path, 1)
    plain, seen = (Question("a", (Message("user", "?" * 20),), "1", images) for images in ((), (ref, ref)))
    assert within(recipe, [plain]).data.max_prompt_tokens == 69
    assert within(recipe, [seen]).data.max_prompt_tokens == 69 + 2 * 9

    def found(images: int, *overrides: str, gpu: bool = True) -> Memory:
        limits = ["--data.images.max_pixels=65536", "--data.images.min_pixels=64"]
        memory = estimate(settings(tmp_path, *limits, *overrides), gpu=gpu, images=images)
        assert isinstance(memory, Memory)
        return memory

    text, one, two = (found(n) for n in (0, 1, 2))
    assert one.weights > text.weights and text.tower == 0 < one.tower < two.tower
    assert one.total > text.total and one.images == 0 and found(1, gpu=False).images == 4 * GIB
    assert found(1, "--data.images.cache_gib=1.5", gpu=False).images == 1.5 * GIB
    assert found(1, "--train.gradient_checkpointing=true").tower < one.tower
    frozen = found(1, "--train.vision.freeze_tower=true")
    assert frozen.tower == 0 and frozen.gradients < one.gradients and frozen.optimizer == 2 * frozen.gradients
    assert found(1, "--train.vision.freeze_projector=true").gradients < one.gradients
    assert found(1, "--train.lora={}").tower == 0 == found(1, "--train.lora={targets: [q_proj, '*.mlp.*']}").tower
    assert found(1, "--train.lora={targets: [q_proj, '*visual*']}").tower == one.tower
    machine = Machine("a card", True, 80 * GIB, 80 * GIB)
    shown = dict(memory_rows(recipe, machine=machine, images=1))
    assert "roughly" in shown["update: vision tower"] and "update: vision tower" not in dict(memory_rows(recipe, machine=machine))
