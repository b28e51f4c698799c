"""How many tokens one forward and backward holds: a number, or what the memory turns out to hold.

The optimizer step, with a guard against numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator

from zppo.config.settings import TOKENS_PER_MICROBATCH, TrainSettings
from zppo.core.minibatch import PASS_TOKENS, PASS_TOKENS_GPU, MicroBatch, micro_batches
from zppo.distributed.parallel import ReplicatedWeights
from zppo.engines.memory import out_of_memory, release
from zppo.errors import MemoryLimitError, SettingsError

Result = TypeVar("Result")


class TokenBudget:
    """The padded tokens of a micro-batch.

    Args:
        setting: `train.tokens_per_microbatch`; "auto" starts at the default and halves whenever memory runs out.
        say: told when memory has run out and what fits from then on; None for nobody.
        overhead: what a pass costs beside its tokens, in tokens; decides between padding and more micro-batches.

    Attributes:
        tokens: the budget now; with "auto" part of a checkpoint.
    """

    def __init__(
        self,
        setting: int | Literal["auto"],
        say: Callable[[str], None] | None = None,
        *,
        overhead: int = PASS_TOKENS,
    ) -> None:
        self.overhead = overhead
        self.adaptive = setting == "auto"
        self.tokens = TOKENS_PER_MICROBATCH if setting == "auto" else setting
        self.say = say

    def split(self, lengths: Sequence[int], packs: Sequence[list[int]] | None = None) -> list[MicroBatch]:
        """Micro-batches under the budget as it is now: of packs of these lengths, or of rows."""
        packs = packs if packs is not None else [[row] for row in range(len(lengths))]
        batches = micro_batches(lengths, self.tokens, self.overhead)
        return [MicroBatch([packs[i] for i in batch], lengths[batch[0]]) for batch in batches]

    def run(
        self,
        lengths: Sequence[int],
        work: Callable[[list[MicroBatch]], Result],
        split: Callable[[], list[MicroBatch]] | None = None,
    ) -> Result:
        """What `work` makes of rows of these lengths, given as micro-batches; `split` gives them under the budget as it is then.

        Where memory runs out, all of `work` is done again with smaller micro-batches, so it must start from nothing: what a failed
        micro-batch has already added to a gradient cannot be told from the rest of it.

        Raises:
            MemoryLimitError: memory ran out, and the budget is fixed or a micro-batch holds one row.
        """
        before = self.tokens
        while True:
            batches = split() if split is not None else self.split(lengths)
            try:
                result = work(batches)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                largest = max(batch.padded for batch in batches)
                if not self.adaptive or all(len(batch.rows) == 1 for batch in batches):
                    raise MemoryLimitError(self._too_large(largest, max(lengths))) from error
            else:
                if self.tokens != before and self.say is not None:
                    self.say(
                        f"memory ran out in the update; micro-batches hold {self.tokens:,} tokens from now on, where it were {before:,} "
                        "(train.tokens_per_microbatch)"
                    )
                return result
            release()
            self.tokens = max(1, min(self.tokens, largest) // 2)

    def state_dict(self) -> dict[str, int]:
        """What was found out, JSON-ready; empty where the budget is fixed."""
        return {"tokens_per_microbatch": self.tokens} if self.adaptive else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with what was found out; a fixed budget stays as it is."""
        if self.adaptive:
            self.tokens = state.get("tokens_per_microbatch", self.tokens)

    def _too_large(self, largest: int, longest: int) -> str:
        lighter = "turn train.gradient_checkpointing on, train with train.lora or train.optimizer=adamw-8bit"
        if largest > longest and not self.adaptive:
            return (
                f"memory ran out in a micro-batch of {largest:,} tokens: set train.tokens_per_microbatch to auto or to less than "
                f"{self.tokens:,}, or {lighter}"
            )
        return (
            f"memory ran out with a single row of {longest:,} tokens in the update: lower rollout.max_new_tokens or "
            f"data.max_prompt_tokens, or {lighter}"
        )


def make_budget(
    train: TrainSettings, sharded: bool, say: Callable[[str], None] | None = None, *, gpu: bool = False
) -> TokenBudget:
    """The budget of a recipe.

    Raises:
        SettingsError: "auto" with sharded weights: while one process started over, the others would wait for it in vain.
    """
    if train.tokens_per_microbatch == "auto" and sharded:
        raise SettingsError(
            "train.tokens_per_microbatch is auto, and the weights are sharded over several processes, which must do equally many passes: "
            "give a number"
        )
    return TokenBudget(train.tokens_per_microbatch, say, overhead=PASS_TOKENS_GPU if gpu else PASS_TOKENS)


MOST_SKIPPED_UPDATES = 3


class OptimizerStep:
    """Clips the gradient norm and steps, unless loss or norm is not finite: then the update is skipped.

    Attributes:
        skipped_in_a_row: part of a checkpoint.
        fault: why the run has to stop after this step: too many skipped updates in a row; "" as long as there is no reason.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_norm: float, weights: ReplicatedWeights
    ) -> None:
        self.optimizer, self.accelerator, self.max_norm, self.weights = optimizer, accelerator, max_norm, weights
        self.skipped_in_a_row, self.fault = 0, ""

    def step(self, loss: float) -> tuple[float, float, bool]:
        """Loss of all processes together, gradient norm before clipping, and whether the weights moved; gradients are 0 afterwards.

        Args:
            loss: what this process's rows add to the loss.
        """
        loss = sum(self.weights.processes.gather(loss))
        norm, moved = self.weights.step(self.optimizer, self.accelerator, self.max_norm, finite=math.isfinite(loss))
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED_UPDATES:
            self.fault = (
                f"loss {loss} and gradient norm {norm}: {self.skipped_in_a_row} updates in a row were not finite. The weights are "
                "unchanged since the last finite update. Lower train.learning_rate, or look for odd rewards in the rollout log"
            )
        return loss, norm, moved
