"""Autocast without copies that nobody needs."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator


def keep_logits_small(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Makes a model that `accelerator.prepare` put under autocast give its outputs in autocast's own type.

    accelerate turns them into fp32: for a vocabulary of 250,000 a copy of all logits and one of their gradient, the largest tensors of
    a training step. Losses turn bf16 logits into fp32 themselves, part by part, to the same numbers.
    """
    forward = getattr(model, "_original_forward", None)
    if forward is None:  # no autocast
        return

    @wraps(forward)
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = under_autocast
