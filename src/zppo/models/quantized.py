"""Frozen weights in 4 bits below LoRA adapters (QLoRA), by bitsandbytes, and back to whole ones."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zppo.errors import SettingsError

_QUANTIZATION = "quantization_config"  # of a configuration


def four_bits(dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes to hold linear layers (all but the output embedding) in NF4 with double quantization.

    Args:
        dtype: in which they compute.

    Raises:
        SettingsError: bitsandbytes cannot be used.
    """
    try:
        import bitsandbytes  # noqa: F401 - `transformers` says less clearly that it is missing
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise SettingsError(
            f"student.quantize needs bitsandbytes, which cannot be used: {error}. Install it with `pip install bitsandbytes`, or set "
            "student.quantize to null"
        ) from error
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def compute_alike(model: nn.Module) -> None:
    """Makes layers in 4 bits compute the same with and without gradients.

    On some processors bitsandbytes packs the weights anew at the first pass without gradients, rounds their scales to bf16 and multiplies
    in it from then on: sampling and training would disagree, and layers that are no multiple of 64 wide fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def make_whole(handle: Any) -> None:
    """Puts whole linear layers, in fp32, in the place of those in 4 bits, the adapters on them added; nothing where there are none.

    Args:
        handle: peft's wrapper around the model.
    """
    model = handle.get_base_model()
    if getattr(model, "hf_quantizer", None) is None:
        return
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", module)
        if isinstance(base, Linear4bit) and not name.endswith("base_layer"):
            model.set_submodule(name, _whole(module, base))
    for holder, attribute in (
        (model.config, _QUANTIZATION),
        *((model, name) for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method")),
    ):
        vars(holder).pop(attribute, None)


def unpacked(layer: Any) -> torch.Tensor:
    """The weight that a linear layer in 4 bits stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def config_of_whole(model: PreTrainedModel) -> PreTrainedConfig:
    """A model's configuration as it is with whole weights in fp32."""
    config: Any = copy.deepcopy(model.config)
    vars(config).pop(_QUANTIZATION, None)
    config.dtype = torch.float32
    return cast(PreTrainedConfig, config)


def _whole(module: Any, base: Any) -> nn.Linear:
    with torch.no_grad():
        weight = unpacked(base).float()
        if module is not base:
            weight = weight + module.get_delta_weight("default").float()
    whole = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    whole.weight = nn.Parameter(weight)
    if base.bias is not None:
        whole.bias = nn.Parameter(base.bias.data.float())
    return whole.eval()
