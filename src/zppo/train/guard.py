"""The optimizer step, with a guard against numbers that are not finite."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from zppo.distributed.parallel import Weights

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
        loss = sum(self.weights.team.gather(loss))
        norm, moved = self.weights.step(self.optimizer, self.accelerator, self.max_norm, finite=math.isfinite(loss))
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED_UPDATES:
            self.fault = (
                f"loss {loss} and gradient norm {norm}: {self.skipped_in_a_row} updates in a row were not finite. The weights are "
                "unchanged since the last finite update. Lower train.learning_rate, or look for odd rewards in the rollout log"
            )
        return loss, norm, moved
