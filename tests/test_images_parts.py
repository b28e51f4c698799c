"""What of a model that sees is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import make_tiny
from seeing import KINDS, make_seeing
from zppo.config.settings import TrainSettings, VisionSettings
from zppo.engines.loading import load_network
from zppo.errors import SettingsError
from zppo.models.student_model import load_model
from zppo.models.vision_parts import freeze_parts, parameter_groups, parts_of


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    folder = tmp_path_factory.mktemp("parts")

    def made(kind: str) -> PreTrainedModel:
        path = folder / kind
        model = load_network(path if path.exists() else make_seeing(path, kind), dtype=torch.float32, images=True)
        return model.requires_grad_(True)

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_sees_is_frozen_where_there_is_nothing_to_see(kind: str, load: Callable[[str], PreTrainedModel]) -> None:
    """Said once, and only where something was to be trained; weight decay would shrink it."""
    model, said = load(kind), list[str]()
    parts = parts_of(model)
    freeze_parts(model, TrainSettings(), images=True, say=said.append)
    assert all(p.requires_grad for p in model.parameters()) and not said
    freeze_parts(model, TrainSettings(), images=False, say=said.append)
    assert {parts[n] for n, p in model.named_parameters() if p.requires_grad} == {"language"}
    assert {parts[n] for n, p in model.named_parameters() if not p.requires_grad} == {"tower", "projector"}
    assert len(said) == 1 and type(model).__name__ in said[0]
    freeze_parts(model, TrainSettings(), images=False, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("name", ["freeze_tower", "freeze_projector", "tower_rate", "projector_rate"])
def test_a_setting_for_a_part_that_is_not_there_is_refused(name: str, tiny_qwen3_dir: Path) -> None:
    """As of a family whose tower is not found: it would be trained all the same."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    train = TrainSettings(vision=VisionSettings(**{name: True if "freeze" in name else 0.5}))
    with pytest.raises(SettingsError, match=f"train.vision.{name} is .* no {name.replace('freeze_', '').replace('_rate', '')} is found"):
        freeze_parts(model, train, images=True)
    freeze_parts(model, train, images=False)
    assert all(p.requires_grad for p in model.parameters())


def test_equal_rates_have_groups_too(tmp_path: Path) -> None:
    """A resumed run may edit the rate of a part; a model that reads text alone has one group."""
    model = load_model(make_seeing(tmp_path / "seeing"), dtype=torch.float32, images=True)
    train = TrainSettings(learning_rate=1.0, vision=VisionSettings(tower_rate=0.5))
    groups: Any = parameter_groups(model, train)
    assert [group["lr"] for group in groups] == [1.0, 1.0, 0.5]
    equal: Any = parameter_groups(model, TrainSettings(learning_rate=1.0))
    assert [group["lr"] for group in equal] == [1.0] * 3
    assert [[id(p) for p in group["params"]] for group in equal] == [[id(p) for p in group["params"]] for group in groups]
    blind = load_model(make_tiny(tmp_path / "blind"), dtype=torch.float32)
    assert all(isinstance(p, torch.nn.Parameter) for p in parameter_groups(blind, TrainSettings()))
