"""The optimizer of a recipe: AdamW, or AdamW with its state in 8 bits."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from zppo.config.settings import TrainSettings
from zppo.errors import SettingsError

_PROBE_SIZE = 8192  # bitsandbytes keeps tensors of fewer than 4,096 numbers in 32 bits


def make_optimizer(
    train: TrainSettings,
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    device: torch.device,
    *,
    offloaded: bool = False,
) -> Any:
    """The recipe's optimizer.

    Args:
        parameters: those that are trained among them (`requires_grad`), or groups of them with settings of their own.
        device: where the parameters will be; an optimizer that does not work there is refused now, not after the first rollouts.
        offloaded: AdamW steps on the processor, in one pass over its memory.

    Raises:
        SettingsError: bitsandbytes is not installed, or does not work on this device.
    """
    trained: list[Any] = [p for p in parameters if isinstance(p, dict) or p.requires_grad]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(trained, **_arguments(train), fused=offloaded or device.type == "cpu" or None)
    made = _adamw_8bit()
    _probe(made, train, device)
    return made(trained, **_arguments(train))


def _arguments(train: TrainSettings) -> dict[str, Any]:
    return {"lr": train.learning_rate, "betas": train.betas, "eps": train.adam_eps, "weight_decay": train.weight_decay}


def _adamw_8bit() -> Any:
    try:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit
    except Exception as error:  # not installed; or installed, and its compiled library does not load
        raise SettingsError(
            f"train.optimizer is adamw-8bit, and bitsandbytes cannot be used: {error}. Install it with `pip install bitsandbytes`, or "
            "take train.optimizer=adamw"
        ) from error


def _probe(make: Any, train: TrainSettings, device: torch.device) -> None:
    """One step on a tensor that is thrown away: older versions have no kernels for a CPU."""
    parameter = torch.nn.Parameter(torch.zeros(_PROBE_SIZE, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        make([parameter], **_arguments(train)).step()
    except Exception as error:
        raise SettingsError(
            f"train.optimizer is adamw-8bit, and this version of bitsandbytes does not work on {device}: {type(error).__name__}: {error}. "
            "Install a newer one, or take train.optimizer=adamw"
        ) from error
