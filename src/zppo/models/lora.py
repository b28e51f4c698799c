"""LoRA: low-rank adapters on frozen weights, by `peft`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from zppo.config.settings import LoraSettings, names_vision_layers
from zppo.core.draws import draw_key
from zppo.errors import CheckpointError, SettingsError
from zppo.models.quantized import config_of_whole, make_whole
from zppo.models.vision_parts import Part, parts_of
from zppo.names import check_checkpoint

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapters:
    """The adapters inside a model: what a LoRA run trains and saves.

    Attributes:
        handle: peft's wrapper around the model. The model itself, with the adapters in it, is what samples and trains.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def save_pretrained(self, folder: Path) -> None:
        """Weights and configuration in peft's format, in fp32; `PeftModel.from_pretrained(base, folder)` loads them."""
        from peft import get_peft_model_state_dict

        folder.mkdir(parents=True, exist_ok=True)
        # Without the flag peft asks the hub whether the vocabulary has grown.
        state = get_peft_model_state_dict(self.handle, save_embedding_layers=False)
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / _WEIGHTS, metadata={"format": "pt"})
        config = copy.copy(self._config)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Takes the weights that `save_pretrained` wrote.

        Raises:
            CheckpointError: they cannot be read, or are those of other LoRA settings.
        """
        from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

        check_checkpoint(folder)
        try:
            saved = LoraConfig.from_pretrained(str(folder))
            state = load_file(folder / _WEIGHTS)
        except Exception as error:  # many kinds: no file, no JSON, no safetensors, unknown keys
            raise CheckpointError(
                f"the adapters in {folder} cannot be read: {error}. Remove the checkpoint that they are in; the one before it is used then"
            ) from error
        ours = get_peft_model_state_dict(self.handle, save_embedding_layers=False)
        same = (saved.r, saved.lora_alpha) == (self._config.r, self._config.lora_alpha)
        if not same or {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in ours.items()}:
            raise CheckpointError(
                f"the adapters in {folder} (rank {saved.r}, alpha {saved.lora_alpha:g}) are not those of the recipe's train.lora (rank "
                f"{self._config.r}, alpha {self._config.lora_alpha:g}, {len(ours)} tensors, saved {len(state)}): go back to the "
                "settings that the run was started with"
            )
        set_peft_model_state_dict(self.handle, state)

    def merge(self) -> PreTrainedModel:
        """The model in fp32 with the adapters added to its weights and gone; nothing can be trained with them afterwards.

        Weights in 4 bits become what they stand for, so that the merged model computes what was trained.
        """
        make_whole(self.handle)
        torch.nn.Module.to(self.handle, torch.float32)
        merged: PreTrainedModel = self.handle.merge_and_unload()
        return merged

    def merged(self, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
        """What `merge` gives, as another model: this one, whose weights lie in shards, stays.

        Args:
            state: all weights by name, merged, in fp32; the model takes them over.
        """
        model: Any = self.handle.get_base_model()
        with torch.device("meta"):
            merged: Any = type(model)(config_of_whole(model))
        held = {**dict(model.named_buffers()), **state}
        merged.load_state_dict({name: held[name] for name in merged.state_dict() if name in held}, assign=True, strict=False)
        merged.tie_weights()
        merged.generation_config = model.generation_config
        if hasattr(model, "_weight_conversions"):  # how names on disk differ, which `from_pretrained` notes
            merged._weight_conversions = model._weight_conversions
        return cast(PreTrainedModel, merged)

    @property
    def _config(self) -> Any:
        return self.handle.peft_config["default"]


def add_adapters(model: PreTrainedModel, lora: LoraSettings, *, base: str, revision: str | None = None, seed: int = 0) -> Adapters:
    """Freezes a model and puts fresh adapters into it, in fp32; the model stays the object that it was.

    Fresh adapters change nothing: their second matrix is 0. The first is drawn by the seed alone.

    Args:
        base, revision: where the frozen weights are from; written into the adapters' configuration.

    Raises:
        SettingsError: peft is not installed, or the targets do not fit the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SettingsError(
            f"train.lora needs peft, which cannot be used: {error}. Install it with `pip install peft`, or set train.lora to null"
        ) from error
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a fraction works too
        target_modules=find_targets(model, lora.targets),
        task_type="CAUSAL_LM",
        revision=revision,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks a property of the model that the library renames
        torch.manual_seed(draw_key(seed, "lora") % 2**63)
        handle = get_peft_model(model, config)
    handle.peft_config["default"].base_model_name_or_path = base
    model.eval()  # new modules come in training mode
    return Adapters(handle)


def find_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that get adapters.

    "all-linear" is every linear layer of the language model but the output embedding (lm_head). In a list every entry is a
    layer's last name (q_proj) or a pattern of full names (*.mlp.*, *layers.1?.*); layers of a vision tower or its projector are
    taken only by a pattern that names them (*visual*, *connector*).

    Raises:
        SettingsError: an entry takes no linear layer, or an output embedding that shares its weights with the input.
    """
    head, parts = model.get_output_embeddings(), parts_of(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if targets == "all-linear":
        found = [name for name, module in linear.items() if module is not head and parts[name] == "language"]
        if not found:
            raise SettingsError(f"train.lora: {type(model).__name__} has no linear layers that peft adapts; set it to null")
        return found
    taken: dict[str, None] = {}
    for entry in targets:
        names = [name for name in linear if _takes(entry, name, parts[name])]
        if not names:
            last = sorted({name.rpartition(".")[2] for name in linear})
            raise SettingsError(
                f"train.lora.targets: {entry!r} takes no linear layer of {type(model).__name__}. Its layers are called {', '.join(last)}; "
                "name some of these, patterns such as '*.mlp.*', or all-linear"
            )
        taken.update(dict.fromkeys(names))
    embedding = model.get_input_embeddings()
    if any(linear[name] is head for name in taken) and head.weight is getattr(embedding, "weight", None):
        raise SettingsError(
            "train.lora.targets: the output embedding of this model shares its weights with the input embedding, and adapters on it "
            "could not be merged: leave it out"
        )
    return list(taken)


def _takes(entry: str, name: str, part: Part) -> bool:
    if part != "language" and not names_vision_layers(entry):
        return False
    return entry == name.rpartition(".")[2] or fnmatchcase(name, entry)
