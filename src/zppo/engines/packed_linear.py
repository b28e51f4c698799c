"""Linear layers by oneDNN: with packed weights while a CPU samples, and in three products while it trains.

Decoding multiplies few rows with every weight, and a matrix product that lays the weight out anew at each call, or reads it in the
order of a file, takes up to twice as long as one that finds it as its kernel wants it. oneDNN, which PyTorch ships, packs a weight once
and multiplies with it then: `torch.compile` does the same to a frozen model. Here the weights change at every optimizer step, so a
layer is packed when a sampling first comes to it, and the copy is dropped when the sampling ends. A GPU needs none of it.

Training multiplies many rows. There oneDNN reads weights as they are, which is a tenth faster than the library that `F.linear` calls, for
outputs and for gradients of inputs. Gradients of weights are as fast by either; they are added by the product that makes them. What a gated
MLP keeps for its backward pass is half of what a model keeps, and half of that is computed again from the rest in no time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from zppo.engines.output_head import sums_in_place

Layer = TypeVar("Layer", bound=nn.Module)

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
        return _multiplied(x.to(self.dtype), self._weight, self._bias)


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
    with _instead(layers, lambda layer: PackedLinear(layer, dtype)):
        yield


@contextlib.contextmanager
def trained_linears(model: nn.Module) -> Iterator[None]:
    """Inside, the model's large linear layers on a CPU in fp32 compute outputs and gradients by oneDNN; backward passes belong inside too.

    Both differ from the layers' own by the order of sums. Gradients of weights that may be summed in place (`output_head.sum_in_place`)
    are, those of embeddings too: a pass touches a few hundred of their rows. Gated MLPs keep two tensors of their inner width, not four.
    """
    layers = [layer for layer in model.modules() if _can_train(layer)]
    gated = [module for module in model.modules() if type(module).__name__ in _GATED and _is_gated(module)]
    tables = [module for module in model.modules() if _can_add(module)]
    with _instead(layers, _TrainedLinear), _instead(gated, _TrainedMLP), _instead(tables, _TrainedEmbedding):
        yield


@contextlib.contextmanager
def _instead(layers: Sequence[Layer], make: Callable[[Layer], Any]) -> Iterator[None]:
    for layer in layers:
        layer.forward = make(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def _can_train(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return can_pack(layer) and layer.weight.dtype == torch.float32 and _multiplies(torch.float32)


class _TrainedLinear:
    """What takes the place of a layer's `forward`; under autocast it is the layer's own."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return nn.Linear.forward(self.layer, x)
        made: torch.Tensor = _Product.apply(x.flatten(0, -2), self.layer.weight, self.layer.bias)  # type: ignore[no-untyped-call]
        return made.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """x W' + b of (N, in), and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # itself: what is saved may come back without its gradient
        return _multiplied(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), weight, wanted = ctx.saved_tensors, ctx.weight, ctx.needs_input_grad
        of_x = _multiplied(upstream, weight.t(), None) if wanted[0] else None
        of_weight = _weight_gradient(weight, upstream, x) if wanted[1] else None
        return of_x, of_weight, upstream.sum(0) if wanted[2] else None


def _weight_gradient(weight: torch.Tensor, upstream: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Of `weight` (out, in) in a product of x (N, in); None where it has been added to what the weight has."""
    if not sums_in_place(weight):
        return upstream.t() @ x
    assert weight.grad is not None
    weight.grad.addmm_(upstream.t(), x)
    return None


_GATED = frozenset({"LlamaMLP", "Qwen2MLP", "Qwen3MLP"})
"""Classes of the library that compute down(silu(gate(x)) * up(x)). Tested one by one."""


def _is_gated(module: Any) -> bool:
    """Whether it is one of the library's own, as it came, with a last layer that is trained here and that nobody looks into."""
    if not type(module).__module__.startswith("transformers.models.") or "forward" in vars(module):
        return False
    last = module.down_proj
    hooked = last._forward_hooks or last._forward_pre_hooks or last._backward_hooks or last._backward_pre_hooks
    return type(module.act_fn) is type(ACT2FN["silu"]) and not hooked and _can_train(last)


class _TrainedMLP:
    """What takes the place of a gated MLP's `forward`; under autocast it is the MLP's own."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        mlp = self.mlp
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
        gate, up = mlp.gate_proj(x).flatten(0, -2), mlp.up_proj(x).flatten(0, -2)
        made: torch.Tensor = _Gated.apply(gate, up, mlp.down_proj.weight, mlp.down_proj.bias)  # type: ignore[no-untyped-call]
        return made.view(*x.shape[:-1], -1)


class _Gated(torch.autograd.Function):
    """(silu(gate) * up) W' + b of two (N, inner), and its gradients; only these two are kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.weight = weight
        return _multiplied(silu(gate).mul_(up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gate, up), weight, wanted = ctx.saved_tensors, ctx.weight, ctx.needs_input_grad
        opened = silu(gate)
        of_weight = _weight_gradient(weight, upstream, opened * up) if wanted[2] else None
        of_gate, of_up = None, None
        if wanted[0] or wanted[1]:
            of_inner = _multiplied(upstream, weight.t(), None)
            of_up = opened.mul_(of_inner)
            of_gate = torch.ops.aten.silu_backward(of_inner.mul_(up), gate)
        return of_gate, of_up, of_weight, upstream.sum(0) if wanted[3] else None


def _can_add(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether it is an embedding of `torch` itself over a whole, plain weight on a CPU, that does nothing else to it."""
    if type(module) is not nn.Embedding or "forward" in vars(module) or module.max_norm is not None or module.scale_grad_by_freq:
        return False
    return type(module.weight) is nn.Parameter and module.weight.device.type == "cpu"


class _TrainedEmbedding:
    """What takes the place of an embedding's `forward`."""

    def __init__(self, table: nn.Embedding) -> None:
        self.table = table

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.table
        if not sums_in_place(table.weight):
            return nn.Embedding.forward(table, ids)
        made: torch.Tensor = _Lookup.apply(ids, table.weight, table.padding_idx)  # type: ignore[no-untyped-call]
        return made


class _Lookup(torch.autograd.Function):
    """Rows of a table, whose gradients are added to those of the table where they belong; padding has none."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            upstream = upstream.masked_fill((ids == ctx.padding)[..., None], 0)
        ctx.weight.grad.index_add_(0, ids.flatten(), upstream.flatten(0, -2))
        return None, None, None
