"""Language models from a folder or the hub, with or without their vision tower: complete, or an error."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.hub import cached_file

from zppo.errors import MemoryLimitError, ModelError, one_line, used_up
from zppo.names import load_part
from zppo.packages import SLOW_KERNELS, distribution, install_line, kernels_of, slow_allowed

_MEND = (
    "name a folder that `save_pretrained` wrote, or a model on the hub that AutoModelForCausalLM loads (the first time "
    "that needs a network)"
)
_SHOWN = 3


def load_network(
    name: str | Path,
    *,
    dtype: torch.dtype | str,
    revision: str | None = None,
    attention: str | None = None,
    images: bool = False,
    unread: bool = False,
    **more: Any,
) -> PreTrainedModel:
    """A model with every weight from its checkpoint; `more` goes to `from_pretrained`.

    `transformers` fills weights that a checkpoint lacks with random numbers and goes on with a warning; here that is an error [zppo].

    Args:
        images: with its vision tower. Without, a checkpoint that has a text model of its own (Qwen3.5) is loaded as that, and others
            that read images (Qwen3-VL) whole.
        unread: the weights stay in their files: parameters are on the meta device. All else is as ever, what is checked too.

    Raises:
        ModelError: it cannot be loaded, or weights are missing or of another size than its configuration says.
        MemoryLimitError: this machine has no room for it.
    """
    check_kernels(name, more.get("device_map"), revision)
    if attention:
        more["attn_implementation"] = attention
    if unread:
        more["device_map"] = "meta"
    kind = AutoModelForImageTextToText if images or _sees_only_whole(name, revision) else AutoModelForCausalLM
    try:
        loaded: Any = load_part(kind, name, dtype=dtype, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    except ModelError:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"model {str(name)!r}: its weights cannot be read ({one_line(error)}): the file is damaged or was not copied whole; "
            "copy or download it again"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        if words := used_up(error):
            raise MemoryLimitError(f"model {str(name)!r}: {words}") from error
        raise ModelError(f"model {str(name)!r} cannot be loaded: {one_line(error)}; {_MEND}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {str(name)!r}: {len(missing)} of its weights are not in the checkpoint ({_some(missing)}) and would be random; "
            "copy or download it again, or name a checkpoint of that architecture"
        )
    if odd := sorted(f"{key}: {list(found)} instead of {list(wanted)}" for key, found, wanted in report["mismatched_keys"]):
        raise ModelError(
            f"model {str(name)!r}: {len(odd)} of its weights have other sizes than config.json says ({_some(odd)}); "
            "the two do not belong together: copy both from one place"
        )
    for config in (model.config, model.config.get_text_config()):
        vars(config).pop("auto_map", None)  # names code that was not run; what is saved from here does without
    if unread:
        _compute_buffers(model)
    return cast(PreTrainedModel, model)


def _compute_buffers(model: Any) -> None:
    """Gives a model on the meta device what no file holds (rotary frequencies), by its own code."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
                module._is_hf_initialized = False
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()


def safetensors_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """The folder that a checkpoint's safetensors lie in, downloaded where they are the hub's; None where it has none."""
    with suppress(OSError, ValueError):  # loading the model says what is wrong
        for file in ("model.safetensors", "model.safetensors.index.json"):
            if found := cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False):
                return Path(found).parent
    return None


def is_quantized(name: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint's configuration says that its weights are no plain numbers."""
    return getattr(_config(name, revision), "quantization_config", None) is not None


def check_kernels(name: str | Path, device: torch.device | str | None, revision: str | None = None) -> None:
    """Whether a GPU would compute a checkpoint's layers by the kernels that are made for them (Qwen3.5's linear attention).

    transformers does without a kernel whose package is missing or cannot be imported, after one warning, several times slower.

    Args:
        device: where the model will be; anything but a GPU is in order.

    Raises:
        ModelError: a package is missing, and the environment does not say that it may be slow.
    """
    if device is None or torch.device(device).type != "cuda" or slow_allowed():
        return
    config = _config(name, revision)
    absent: dict[str, str] = {}
    for module in kernels_of(config.get_text_config().model_type) if config is not None else ():
        try:
            import_module(module)
        except Exception as error:  # one that was built for another torch raises many kinds
            absent[module] = one_line(error, 120)
    if absent:
        why = "; ".join(f"{distribution(module)}: {error}" for module, error in absent.items())
        raise ModelError(
            f"model {str(name)!r} has layers that would run without their kernels on {device}, up to five times slower ({why}): "
            f"{install_line(absent)} (causal-conv1d is compiled there and needs nvcc), or set {SLOW_KERNELS}=1 in the environment to go "
            "on all the same"
        )


def empty_network(name: str | Path, revision: str | None = None) -> PreTrainedModel:
    """A model without weights, of a checkpoint's config.json alone: for its shape, its vocabulary, its end tokens.

    Raises:
        ModelError: the configuration cannot be read.
    """
    try:
        config = load_part(AutoConfig, name, revision=revision)
        kind: Any = AutoModelForImageTextToText if _sees_only_whole(name, revision) else AutoModelForCausalLM
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(f"the configuration of model {str(name)!r} cannot be read: {one_line(error)}; {_MEND}") from error
    with suppress(OSError, ValueError):  # a checkpoint need not have one
        model.generation_config = load_part(GenerationConfig, name, revision=revision)
    return cast(PreTrainedModel, model)


def reads_images(name: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint's architecture takes images and text; False too where its config.json cannot be read."""
    return type(_config(name, revision)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def context_of(name: str | Path, revision: str | None = None) -> int | None:
    """Positions that a checkpoint's model was made for; None where its config.json does not say, or cannot be read."""
    config = _config(name, revision)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return limit if isinstance(limit, int) and limit > 0 else None


def _sees_only_whole(name: str | Path, revision: str | None) -> bool:
    config = _config(name, revision)
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING


def _config(name: str | Path, revision: str | None) -> Any:
    try:
        return load_part(AutoConfig, name, revision=revision)
    except Exception:  # loading the model says what is wrong
        return None


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{'; '.join(list(names)[:_SHOWN])}{more}"
