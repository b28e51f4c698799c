"""Are the sampler's log-probs the trainer's? Looked at in every step before its first update [zppo].

The ratio of the clipped surrogate is exp(trainer's now - old). Where the sampler is exact its log-probs are old log-probs and a
forward pass is saved; where something has come between the two (another kernel, a lower precision, a broken cache) every ratio would be
off without any error, so from then on the trainer computes them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from zppo.config.settings import TrainSettings
from zppo.distributed.processes import ALONE, Team

TOLERANCE_FP32 = 1e-4
"""Ten times the mean difference up to which Qwen3.5, whose recurrent form is not its chunked one, counts as exact in fp32."""

TOLERANCE_ROUNDED = 0.05
"""Where bf16 or another engine rounds, and the recipe wants the sampler's log-probs all the same: the engine guard's bound."""

SINGLE = 100
"""How many times the tolerance a single token may be off: the same step from mean to maximum as in the bounds of the tests (1e-5, 1e-3)."""


class Gap(NamedTuple):
    """Differences of log-probs, nats a token.

    Attributes:
        total: their sum.
        largest: the largest one.
        tokens: how many there are.
    """

    total: float = 0.0
    largest: float = 0.0
    tokens: int = 0

    def plus(self, other: Gap) -> Gap:
        """Of both together."""
        return Gap(self.total + other.total, max(self.largest, other.largest), self.tokens + other.tokens)


class SamplerCheck:
    """Decides whether the sampler's log-probs go on to be old log-probs. A refusal holds for the rest of the run.

    Args:
        tolerance: largest mean difference, nats a token; a single token may be off by `SINGLE` times as much.
        say: told once, when they are refused; None for nobody.
        team: the processes; all of them come to the same decision.

    Attributes:
        refused: part of a checkpoint.
    """

    def __init__(self, tolerance: float, say: Callable[[str], None] | None = None, team: Team = ALONE) -> None:
        self.tolerance, self.say, self.team = tolerance, say, team
        self.refused = False

    def refuses(self, step: int, own: Gap) -> bool:
        """Whether this step and all that follow take old log-probs from a forward pass. Every process must call it.

        Args:
            own: between sampler and trainer before the first update, over this process's rows; no tokens: nothing to hold against it.
        """
        gap = Gap()
        for part in self.team.gather(own):
            gap = gap.plus(part)
        if not gap.tokens:
            return self.refused
        mean = gap.total / gap.tokens
        if mean <= self.tolerance and gap.largest <= SINGLE * self.tolerance:
            return self.refused
        if not self.refused and self.say is not None:
            self.say(
                f"step {step}: the sampler's log-probs differ from the trainer's by {mean:.2g} a token on average and {gap.largest:.2g} "
                f"at most, over {gap.tokens:,} tokens (allowed: {self.tolerance:g} and {SINGLE * self.tolerance:g}): from now on old "
                "log-probs take a forward pass of their own. Training stays right, and each step takes longer. Look for what changed in "
                "the sampling engine, or raise train.logprob_tolerance if this is its rounding"
            )
        self.refused = True
        return True

    def state_dict(self) -> dict[str, int]:
        """JSON-ready; empty as long as nothing was refused."""
        return {"sampler_refused": 1} if self.refused else {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state."""
        self.refused = bool(state.get("sampler_refused", 0))


def make_check(
    train: TrainSettings, exact: bool, say: Callable[[str], None] | None = None, team: Team = ALONE
) -> SamplerCheck:
    """The check of a recipe; `exact`: sampler and trainer do the same arithmetic, in fp32."""
    return SamplerCheck(train.logprob_tolerance or (TOLERANCE_FP32 if exact else TOLERANCE_ROUNDED), say, team)
