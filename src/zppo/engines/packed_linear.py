"""Linear layers with packed weights, while a CPU samples.

Decoding multiplies few rows with every weight, and a matrix product that lays the weight out anew at each call, or reads it in the
order of a file, takes up to twice as long as one that finds it as its kernel wants it. oneDNN, which PyTorch ships, packs a weight once
and multiplies with it then: `torch.compile` does the same to a frozen model. Here the weights change at every optimizer step, so a
layer is packed when a sampling first comes to it, and the copy is dropped when the sampling ends. A GPU needs none of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import nn

_ROWS = 16
"""The batch that the layout is made for. Measured from 1 to 600 rows in fp32 and bf16, no other was more than 15% faster."""
_SMALLEST = 1 << 16
"""Weights with fewer numbers fit the fast caches, and what a call costs is most of their time."""


class PackedLinear:
    """What takes the place of a layer's `forward`: the same product, with the packed weight.

    Args:
        layer: keeps its own weight, which must not change meanwhile.
        dtype: what the product is computed in, as under autocast; None for the weight's own.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype | None) -> None:
        self.layer, self.dtype = layer, dtype or layer.weight.dtype
        self._weight: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out); where a gradient is wanted, as the layer itself does it."""
        if torch.is_grad_enabled():
            return nn.Linear.forward(self.layer, x)
        if self._weight is None:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self.layer.weight.detach().to(self.dtype), _ROWS)
            self._bias = None if self.layer.bias is None else self.layer.bias.detach().to(self.dtype)
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._weight, self._bias, "none", [], "")
        return made


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN, where PyTorch has it, multiplies numbers of this type on this processor: an older one has no bf16."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def can_pack(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer of `torch` itself with a whole, plain weight on a CPU that oneDNN multiplies with."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight  # sharded and quantized ones have a class of their own
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
    return plain and weight.numel() >= _SMALLEST


@contextlib.contextmanager
def packed_linears(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, the model's large linear layers on a CPU multiply with packed weights; outside everything is as it was.

    Results differ from the layers' own by the order of sums. Takes the memory of one more copy of these weights while it lasts, less than
    what an update takes when it is over. Does nothing where PyTorch has no oneDNN, or none for the type.

    Args:
        dtype: of the products, where the model is run under autocast.
    """
    layers = [layer for layer in model.modules() if can_pack(layer) and _multiplies(dtype or layer.weight.dtype)]
    for layer in layers:
        layer.forward = PackedLinear(layer, dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
