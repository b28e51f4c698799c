"""Two checks of what samples against what is trained [zppo]; without them an error would go unseen, and training astray.

`SamplerCheck`: are the sampler's log-probs the trainer's? The ratio of the clipped surrogate is exp(trainer's now - old). Where the
sampler is exact its log-probs are old log-probs and a forward pass is saved; where something has come between the two (another kernel,
a lower precision, a broken cache) every ratio would be off, so from then on the trainer computes them itself.

`EngineCheck`: does the sampling engine hold the trainer's weights? A fixed prompt is sampled and scored by both after every sync. A stale
or wrong engine samples from another policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from zppo.config.settings import TrainSettings
from zppo.core.draws import draw_key
from zppo.core.types import Prompt, Row
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Engine, SampleRequest, Sampling
from zppo.engines.logprobs import ForwardPass
from zppo.errors import EngineError

SAMPLER_TOLERANCE_FP32 = 1e-4
"""Ten times the mean difference up to which Qwen3.5, whose recurrent form is not its chunked one, counts as exact in fp32."""

SAMPLER_TOLERANCE_ROUNDED = 0.05
"""Where bf16 or another engine rounds, and the recipe wants the sampler's log-probs all the same: `EngineCheck`'s tolerance."""

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
        say: called with a message once, when they are refused.
        processes: the processes; all of them come to the same decision.

    Attributes:
        refused: part of a checkpoint.
    """

    def __init__(self, tolerance: float, say: Callable[[str], None] | None = None, processes: Processes = ONE_PROCESS) -> None:
        self.tolerance, self.say, self.processes = tolerance, say, processes
        self.refused = False

    def refuses(self, step: int, own: Gap) -> bool:
        """Whether this step and all that follow take old log-probs from a forward pass. Every process must call it.

        Args:
            own: between sampler and trainer before the first update, over this process's rows; no tokens: nothing to hold against it.
        """
        gap = Gap()
        for part in self.processes.gather(own):
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
    train: TrainSettings, exact: bool, say: Callable[[str], None] | None = None, processes: Processes = ONE_PROCESS
) -> SamplerCheck:
    """The check of a recipe; `exact`: sampler and trainer do the same arithmetic, in fp32."""
    return SamplerCheck(train.logprob_tolerance or (SAMPLER_TOLERANCE_FP32 if exact else SAMPLER_TOLERANCE_ROUNDED), say, processes)


TOLERANCE_FP32 = 1e-3
"""Same weights, same arithmetic: the recurrent form of Qwen3.5 differs from its chunked one by this in single tokens, less on average."""

TOLERANCE_ROUNDED = 0.05
"""bf16 has 8 bits: two orders of the same sums, or two sets of kernels, differ by 0.01 to 0.03 a token on average."""

_CHECK = (1, 8)  # completions and their token limit: a look at every sync,
_RECHECK = (8, 64)  # and what decides where the look was over the tolerance: one unlikely token must not end a run
_STALE = 0.1  # of the tolerance: how far the trainer may move while the engine says the same to the last bit


class _Probe(NamedTuple):
    """Log-probs of the same tokens, (N,) float32 each: what the engine said and what the trainer says."""

    ids: torch.Tensor
    engine: torch.Tensor
    trainer: torch.Tensor

    @property
    def gap(self) -> torch.Tensor:
        return (self.engine - self.trainer).abs()


class _GapStats(NamedTuple):
    """Difference of log-probs, nats a token."""

    mean: float
    largest: float


class EngineCheck:
    """Syncs the engine after a change of weights and compares it with the trainer.

    Args:
        engine: what samples.
        forward: the training forward of the student; under the trainer's autocast.
        prompt: the fixed prompt.
        tolerance: largest mean difference of log-probs, nats a token.
        every: steps between comparisons; 0 for none.
        seed: keys the draws.
        weights: how the student's weights lie over the processes; each looks at its own engine, and where one is wrong all of them say so.
    """

    def __init__(
        self,
        engine: Engine,
        forward: ForwardPass,
        prompt: Prompt,
        *,
        tolerance: float,
        every: int,
        seed: int,
        weights: ReplicatedWeights | None = None,
    ) -> None:
        self.engine, self.forward, self.prompt = engine, forward, prompt
        self.tolerance, self.every, self.seed = tolerance, every, seed
        self.weights = weights or ReplicatedWeights()
        self._synced: int | None = None  # the step whose weights the engine has
        self._gap: _GapStats | None = None  # of these weights
        self._last: _Probe | None = None  # since when the engine says the same

    def refresh(self, step: int) -> dict[str, float]:
        """Brings the engine up to the trainer's weights after `step` (0: before the first) and looks whether they arrived.

        Every process must call it.

        Returns:
            Metrics of the comparison; none where it did not look.

        Raises:
            EngineError: the engine's weights are not the trainer's.
        """
        if step != self._synced:
            with self.weights.whole():
                self.engine.sync()
            self._synced, self._gap = step, None
        if not self.every or step % self.every:
            return {}
        self._gap = self._gap or self._compare_together(step)
        return {"engine_gap_mean": self._gap.mean, "engine_gap_max": self._gap.largest}

    def _compare_together(self, step: int) -> _GapStats:
        """The largest numbers of all processes."""
        with self.weights.whole():
            try:
                found: _GapStats | str = self._compare(step)
            except EngineError as error:
                found = str(error)
        all_found = self.weights.processes.gather(found)
        if fault := next((f for f in all_found if isinstance(f, str)), None):
            raise EngineError(fault)
        gaps = [f for f in all_found if isinstance(f, _GapStats)]
        return _GapStats(max(gap.mean for gap in gaps), max(gap.largest for gap in gaps))

    def _compare(self, step: int) -> _GapStats:
        probe = self._probe(*_CHECK)
        if not _mean(probe.gap) <= self.tolerance:
            probe = self._probe(*_RECHECK)
        if not _mean(probe.gap) <= self.tolerance:
            raise self._error(
                step, f"its log-probs differ by {_mean(probe.gap):.3g} on average over {len(probe.gap)} tokens of a fixed prompt"
            )
        self._check_that_it_moves(step, probe)
        return _GapStats(_mean(probe.gap), float(probe.gap.max()))

    def _check_that_it_moves(self, step: int, probe: _Probe) -> None:
        """Small updates stay below the tolerance for many steps; an engine that never moves at all shows earlier."""
        last = self._last
        if last is None or not torch.equal(last.ids, probe.ids) or not torch.equal(last.engine, probe.engine):
            self._last = probe
        elif (moved := _mean(probe.trainer - last.trainer)) > _STALE * self.tolerance:
            raise self._error(step, f"it says the same to the last bit while the trainer's log-probs moved by {moved:.3g}")

    def _probe(self, size: int, tokens: int) -> _Probe:
        keys = tuple(draw_key(self.seed, "engine", i) for i in range(size))
        sampling = Sampling(temperature=self.forward.temperature, max_new_tokens=tokens)
        request = SampleRequest(self.prompt.ids, keys, self.prompt.images)
        (completions,) = self.engine.sample([request], sampling)
        with torch.no_grad():
            rows = [Row(self.prompt.ids, c.ids, self.prompt.images) for c in completions]
            logprobs, mask = self.forward.logprobs(rows)
        return _Probe(torch.cat([c.ids for c in completions]), torch.cat([c.logprobs for c in completions]), logprobs[mask].float().cpu())

    def _error(self, step: int, fact: str) -> EngineError:
        when = f"after step {step}" if step else "before the first step"
        return EngineError(
            f"{when} the sampling engine does not hold the trainer's weights: {fact} (allowed: {self.tolerance:g}). Its weights are "
            "stale, or it runs another model, precision or temperature. Nothing was sampled from them. Start the engine again with "
            "student.model and continue with `zppo resume RUN`; where the difference is rounding, raise train.engine_tolerance"
        )


def _mean(values: torch.Tensor) -> float:
    return float(values.abs().mean())
