"""The optimizer step, with a guard against numbers that are not finite."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from zppo.train.weights import Weights, trained_parameters

MOST_SKIPPED_UPDATES = 3


class GuardedStep:
    """Clips the gradient norm and steps, unless loss or norm is not finite: then the update is skipped.

    Attributes:
        skipped_in_a_row: part of a checkpoint.
        fault: why the run has to stop after this step: too many skipped updates in a row; "" as long as there is no reason.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float, weights: Weights
    ) -> None:
        self.optimizer, self.accelerator, self.max_norm, self.weights = optimizer, accelerator, max_norm, weights
        self.skipped_in_a_row, self.fault = 0, ""

    def step(self, loss: float) -> tuple[float, float, bool]:
        """Loss of all processes together, gradient norm before clipping, and whether the weights moved; gradients are 0 afterwards.

        Args:
            loss: what this process's rows add to the loss.
        """
        parameters = trained_parameters(self.optimizer)
        loss = sum(self.weights.team.gather(loss))
        self.weights.sum_gradients(parameters)
        norm = float(_full(self.accelerator.clip_grad_norm_(parameters, self.max_norm)))
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.optimizer.step()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.optimizer.zero_grad(set_to_none=False)
        if self.skipped_in_a_row >= MOST_SKIPPED_UPDATES:
            self.fault = (
                f"loss {loss} and gradient norm {norm}: {self.skipped_in_a_row} updates in a row were not finite. The weights are "
                "unchanged since the last finite update. Lower train.learning_rate, or look for odd rewards in the rollout log"
            )
        return loss, norm, finite


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
