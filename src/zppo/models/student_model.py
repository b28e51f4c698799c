"""Models from disk or hub: the student in fp32, with its chat.

Gradient checkpointing: activations inside a layer are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from zppo.config.model_settings import ModelSettings
from zppo.config.settings import Settings
from zppo.engines.chat import Chat
from zppo.engines.loading import is_quantized, load_network, safetensors_folder
from zppo.errors import CheckpointError, ModelError, SettingsError
from zppo.images.processor import PixelCache
from zppo.images.store import PixelLimits
from zppo.models.lora import ADAPTER_CONFIG, Adapters, add_adapters
from zppo.models.quantized import compute_alike, four_bits
from zppo.names import check_file, model_folder, readable
from zppo.runs import checkpoint


def read_template(settings: ModelSettings) -> str | None:
    """The recipe's own chat template, None for the tokenizer's. SettingsError where the file cannot be read."""
    if settings.template is None:
        return None
    check_file(settings.template, SettingsError)
    try:
        return readable(settings.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"template {settings.template} cannot be read: {error}. Name a text file that holds a chat template") from error


def load_chat(settings: ModelSettings, images: PixelLimits | None = None, cache: PixelCache | None = None) -> Chat:
    """Tokenizer and chat template of a checkpoint, with the recipe's template and arguments.

    Args:
        images, cache: see `Chat.load`.
    """
    return Chat.load(
        model_folder(settings.model),
        settings.template_args,
        read_template(settings),
        images=images,
        cache=cache,
        revision=settings.revision,
    )


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    attention: str | None = None,
    images: bool = False,
    quantize: bool = False,
    unread: bool = False,
) -> PreTrainedModel:
    """A language model in evaluation mode (no dropout anywhere in a run: old and new log-probs must be comparable).

    Args:
        images: with its vision tower.
        quantize: linear layers in 4 bits, to be trained by adapters alone.
        unread: the weights stay in their files; see `load_network`.

    Raises:
        SettingsError: bitsandbytes is wanted for that and is not there.
        ModelError: it cannot be loaded whole; the message names the model and says why.
    """
    more = {"quantization_config": four_bits(dtype)} if quantize else {}
    model = load_network(folder, dtype=dtype, revision=revision, attention=attention, images=images, unread=unread, **more)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model {str(folder)!r} holds adapters only, and the weights below them were loaded with it: merge them first (`final/` of a "
            "run is merged), and name the folder that the merged model is in"
        )
    model.eval()
    note_untied(model)
    if quantize:
        compute_alike(model)
    return model


def note_untied(model: PreTrainedModel) -> None:
    """Says in a model's configuration that its two embedding matrices are two, where they are.

    `transformers` leaves matrices that differ in a checkpoint untied, whatever config.json says; a reader that believes a copy of that
    config.json (vLLM, older versions) would tie them, and show another model.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(end, "weight", None) for end in ends)
    if first is None or last is None or first is last:
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


@dataclass(frozen=True, slots=True)
class Student:
    """The model that is trained.

    Attributes:
        model: what samples and trains.
        adapters: what of it is trained and saved; None where that is all of it.
    """

    model: PreTrainedModel
    adapters: Adapters | None

    @property
    def saved(self) -> checkpoint.Savable:
        """What of it goes into a checkpoint."""
        return self.adapters or self.model


def load_student(settings: Settings, start: Path | None, *, bf16: bool, images: bool = False) -> Student:
    """The student, from where a recipe says or from a checkpoint; with LoRA the checkpoint has the adapters, and only them.

    Args:
        start: the checkpoint; None for the recipe's model.
        images: with its vision tower.
        bf16: whether autocast is on. Frozen weights are held in bf16 then: multiplications would round them to it anyway.

    Raises:
        ModelError, SettingsError: the model cannot be loaded, or the adapters do not fit it.
        CheckpointError: the checkpoint has adapters and the recipe has not, or the other way round.
    """
    own, lora, saved = settings.student, settings.train.lora, _saved(settings, start)
    name, revision = (saved, None) if saved is not None and lora is None else (model_folder(own.model), own.revision)
    model = load_model(
        name,
        dtype=torch.bfloat16 if lora and bf16 else torch.float32,
        revision=revision,
        attention=own.attention,
        images=images,
        quantize=own.quantize is not None,
    )
    if lora is None:
        return Student(model, None)
    adapters = add_adapters(model, lora, base=model_folder(own.model), revision=own.revision, seed=settings.seed)
    if saved is not None:
        adapters.load(saved)
    return Student(model, adapters)


@dataclass(frozen=True, slots=True)
class UnreadStudent:
    """A student whose weights are still in their files.

    Attributes:
        student: its parameters are on the meta device.
        folder: of the safetensors.
    """

    student: Student
    folder: Path


def unread_student(settings: Settings, start: Path | None, *, images: bool = False) -> UnreadStudent | str:
    """What `load_student` gives, without its weights, for processes that each read a part of them; or why they cannot.

    Raises:
        ModelError, CheckpointError: as there.
    """
    own, saved = settings.student, _saved(settings, start)
    if settings.train.lora is not None:
        return "adapters are trained, and the weights below them are read with them"
    name, revision = (model_folder(own.model), own.revision) if saved is None else (saved, None)
    if is_quantized(name, revision):
        return "its weights are quantized"
    folder = safetensors_folder(name, revision)
    if folder is None:
        return "its weights are no safetensors"
    model = load_model(name, dtype=torch.float32, revision=revision, attention=own.attention, images=images, unread=True)
    return UnreadStudent(Student(model, None), folder)


def _saved(settings: Settings, start: Path | None) -> Path | None:
    """Where the weights of a checkpoint are that fit a recipe; CheckpointError where they do not."""
    saved, lora = checkpoint.weights_folder(start) if start else None, settings.train.lora
    if saved is not None and (saved / ADAPTER_CONFIG).exists() != (lora is not None):
        raise CheckpointError(
            f"{saved} holds {'all weights' if lora else 'LoRA adapters'}, and train.lora of the recipe is {'on' if lora else 'off'}: "
            "go back to the settings that the run was started with"
        )
    return saved


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for, None where its configuration does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def recompute_layers(model: PreTrainedModel) -> int:
    """Makes every layer of a model keep its input only while gradients are on; returns how many layers there are.

    The library's own switch acts in training mode alone, and a run keeps its model in evaluation mode (no dropout), where that
    switch would do nothing without a word. Sampling and evaluation, which have no gradients, are left as they are.

    Raises:
        ModelError: the model's code marks no layers for this.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"train.gradient_checkpointing is on, but {type(model).__name__} has no layers that can be computed again; turn it off and "
            "lower train.tokens_per_microbatch instead"
        )
    for layer in layers:
        layer.forward = _recomputed(layer.forward)
    return len(layers)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:  # a cache must not be written twice
            return forward(*args, **kwargs)
        # There is no dropout, so there is no random state to keep.
        return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputing
