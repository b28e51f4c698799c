"""The vision parts of a model: which are trained, at which learning rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from zppo.config.settings import TrainSettings
from zppo.errors import SettingsError

Part = Literal["language", "projector", "tower"]
SEEING: tuple[Part, ...] = ("projector", "tower")
PARTS: tuple[Part, ...] = ("language", *SEEING)
_PROJECTS = re.compile(r"merger|project|connector|adapter|resampler|perceiver")
_ADAPTERS = re.compile(r"\.(lora_[AB]|base_layer)(\.|$).*")  # what peft puts below a layer's name


def parts_of(model: PreTrainedModel) -> dict[str, Part]:
    """Which part every module and parameter belongs to, by its name.

    The tower turns pixels into features, the projector brings these into the language model's space (Qwen's merger, which lies
    inside the tower's module, belongs to it), and all else is the language model, which is all of a model that reads text only.
    """
    names = {id(module): name for name, module in model.named_modules()}
    finder: Any = model
    tower, decoder = finder.get_encoder(modality="image"), finder.get_decoder()
    if tower is model or tower is getattr(model, "base_model", None) or id(tower) not in names or decoder is model:
        return dict.fromkeys(_names(model), "language")
    heads = [m for m in (model.get_output_embeddings(), model.get_input_embeddings()) if m is not None]
    language = tuple(f"{names[id(m)]}." for m in (decoder, *heads) if id(m) in names)
    prefix = f"{names[id(tower)]}."

    def part(name: str) -> Part:
        if f"{name}.".startswith(language):
            return "language"
        inside = f"{name}.".startswith(prefix)
        return "tower" if inside and not _PROJECTS.search(_ADAPTERS.sub("", name.removeprefix(prefix))) else "projector"

    return {name: part(name) for name in _names(model)}


def freeze_parts(model: PreTrainedModel, train: TrainSettings, *, images: bool = True, say: Callable[[str], None] | None = None) -> None:
    """Takes the frozen parts of a recipe out of training: no gradients, no optimizer state; they are still saved.

    In a run without images all parts that see are frozen, which is said: weight decay would shrink them, and they would take memory.

    Args:
        images: whether a question has one.
        say: called with a message where parts are frozen by default.

    Raises:
        SettingsError: the recipe sets something for a part that this model, which is shown images, has not.
    """
    parts = parts_of(model)
    if images:
        _check_settings(model, train, set(parts.values()))
    frozen = {part for part in SEEING if not images or getattr(train.vision, f"freeze_{part}")}
    taken = [p for name, p in model.named_parameters() if parts[name] in frozen and p.requires_grad]
    for parameter in taken:
        parameter.requires_grad_(False)
    if taken and not images and say is not None:
        count = sum(p.numel() for p in taken)
        say(f"no question has an image: the parts of {type(model).__name__} that see ({count:,} parameters) stay as they are")


def _check_settings(model: PreTrainedModel, train: TrainSettings, found: Collection[Part]) -> None:
    given = train.vision.model_dump(exclude_defaults=True)
    for name, value in given.items():
        part = name.removeprefix("freeze_").removesuffix("_rate")
        if part not in found:
            raise SettingsError(
                f"train.vision.{name} is {value}, and no {part} is found in {type(model).__name__}, which would be trained like the "
                "language model: leave it out, or take a model of a family that docs/images.md names"
            )


def parameter_groups(model: torch.nn.Module, train: TrainSettings) -> list[torch.nn.Parameter] | list[dict[str, Any]]:
    """What the optimizer is made over: the trained parameters, in a group for each part with its own learning rate.

    Equal rates have groups too, so that a resumed run may edit them.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = {"language": 1.0, "projector": train.vision.projector_rate, "tower": train.vision.tower_rate}
    parts = parts_of(cast(PreTrainedModel, model))
    if len({parts[name] for name, _ in trained}) == 1 and set(rates.values()) == {1.0}:
        return [p for _, p in trained]
    groups = {part: [p for name, p in trained if parts[name] == part] for part in PARTS}
    return [{"params": params, "lr": train.learning_rate * rates[part]} for part, params in groups.items() if params]


def _names(model: PreTrainedModel) -> Iterable[str]:
    return dict.fromkeys((*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())))
