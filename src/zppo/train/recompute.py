"""Gradient checkpointing: activations inside a layer are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from zppo.errors import ModelError


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
        if (
            not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None
        ):  # a cache must not be written twice
            return forward(*args, **kwargs)
        # There is no dropout, so there is no random state to keep.
        return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputing
