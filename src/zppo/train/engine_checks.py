"""Are the sampler's log-probs the trainer's? Looked at in every step before its first update [zppo].

The ratio of the clipped surrogate is exp(trainer's now - old). Where the sampler is exact its log-probs are old log-probs and a
forward pass is saved; where something has come between the two (another kernel, a lower precision, a broken cache) every ratio would be
off without any error, so from then on the trainer computes them itself.

Does the sampling engine hold the trainer's weights? A fixed prompt is sampled and scored by both after every sync.

A stale or wrong engine samples from another policy without any error: rollouts look well and training goes astray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from zppo.config.settings import TrainSettings
from zppo.core.draws import draw_key
from zppo.core.types import ImageRef
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Completion, Engine, SampleRequest, Sampling
from zppo.engines.logprobs import Row, completion_logprobs
from zppo.errors import EngineError
from zppo.images.processor import ImageProcessor

SAMPLER_TOLERANCE_FP32 = 1e-4
"""Ten times the mean difference up to which Qwen3.5, whose recurrent form is not its chunked one, counts as exact in fp32."""

SAMPLER_TOLERANCE_ROUNDED = 0.05
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
        processes: the processes; all of them come to the same decision.

    Attributes:
        refused: part of a checkpoint.
    """

    def __init__(
        self, tolerance: float, say: Callable[[str], None] | None = None, processes: Processes = ONE_PROCESS
    ) -> None:
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
    return SamplerCheck(
        train.logprob_tolerance or (SAMPLER_TOLERANCE_FP32 if exact else SAMPLER_TOLERANCE_ROUNDED), say, processes
    )


TOLERANCE_FP32 = 1e-3
"""Same weights, same arithmetic: the recurrent form of Qwen3.5 differs from its chunked one by this in single tokens, less on average."""

TOLERANCE_ROUNDED = 0.05
"""bf16 has 8 bits: two orders of the same sums, or two sets of kernels, differ by 0.01 to 0.03 a token on average."""

_LOOK = (1, 8)  # completions and their token limit: a look at every sync,
_LOOK_TWICE = (8, 64)  # and what decides where the look was over the tolerance: one unlikely token must not end a run
_STALE = 0.1  # of the tolerance: how far the trainer may move while the engine says the same to the last bit


class _Probe(NamedTuple):
    """Log-probs of the same tokens, (N,) float32 each: what the engine said and what the trainer says."""

    ids: torch.Tensor
    engine: torch.Tensor
    trainer: torch.Tensor

    @property
    def gap(self) -> torch.Tensor:
        return (self.engine - self.trainer).abs()


class _Gap(NamedTuple):
    """Difference of log-probs, nats a token."""

    mean: float
    largest: float


class EngineCheck:
    """Syncs the engine after a change of weights and compares it with the trainer.

    Attributes:
        stale: the weights have changed since the last sync; the trainer says so.
        found: metrics of the last `refresh`, none where it did not look.

    Args:
        engine: what samples.
        model: the trainer's model; under the trainer's autocast.
        prompt_ids: the fixed prompt.
        temperature, banned_ids, pad_id: as in sampling and training.
        tolerance: largest mean difference of log-probs, nats a token.
        every: updates between comparisons; 0 for none.
        seed: keys the draws.
        processes: the processes; each looks at its own engine, and where one is wrong all of them say so.
        whole: inside it this process has all weights.
        images, image_processor: of the fixed prompt, and how the trainer's model sees them.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        prompt_ids: tuple[int, ...],
        *,
        temperature: float,
        banned_ids: tuple[int, ...],
        pad_id: int,
        tolerance: float,
        every: int,
        seed: int,
        processes: Processes = ONE_PROCESS,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
        images: tuple[ImageRef, ...] = (),
        image_processor: ImageProcessor | None = None,
    ) -> None:
        self.images, self.image_processor = images, image_processor
        self.engine, self.model, self.prompt_ids = engine, model, prompt_ids
        self.temperature, self.banned_ids, self.pad_id = temperature, banned_ids, pad_id
        self.tolerance, self.every, self.seed = tolerance, every, seed
        self.processes, self.whole = processes, whole
        self.stale = True
        self.found: dict[str, float] = {}
        self._gap: _Gap | None = None  # of the weights that the engine has now
        self._last: _Probe | None = None  # since when the engine says the same

    def refresh(self, step: int) -> None:
        """Brings the engine up to the trainer's weights after `step` (0: before the first) and looks whether they arrived.

        Every process must call it.

        Raises:
            EngineError: the engine's weights are not the trainer's.
        """
        if self.stale:
            with self.whole():
                self.engine.sync()
            self.stale, self._gap = False, None
        self.found = {}
        if self.every and step % self.every == 0:
            self._gap = self._gap or self._look_together(step)
            self.found = {"engine_gap_mean": self._gap.mean, "engine_gap_max": self._gap.largest}

    def _look_together(self, step: int) -> _Gap:
        """The largest numbers of all processes."""
        with self.whole():
            try:
                found: _Gap | str = self._look(step)
            except EngineError as error:
                found = str(error)
        all_found = self.processes.gather(found)
        if fault := next((f for f in all_found if isinstance(f, str)), None):
            raise EngineError(fault)
        gaps = [f for f in all_found if isinstance(f, _Gap)]
        return _Gap(max(gap.mean for gap in gaps), max(gap.largest for gap in gaps))

    def _look(self, step: int) -> _Gap:
        probe = self._probe(*_LOOK)
        if not _mean(probe.gap) <= self.tolerance:
            probe = self._probe(*_LOOK_TWICE)
        if not _mean(probe.gap) <= self.tolerance:
            raise self._error(
                step,
                f"its log-probs differ by {_mean(probe.gap):.3g} on average over {len(probe.gap)} tokens of a fixed prompt",
            )
        self._look_for_standstill(step, probe)
        return _Gap(_mean(probe.gap), float(probe.gap.max()))

    def _look_for_standstill(self, step: int, probe: _Probe) -> None:
        """Small updates stay below the tolerance for many steps; an engine that never moves at all shows earlier."""
        last = self._last
        if last is None or not torch.equal(last.ids, probe.ids) or not torch.equal(last.engine, probe.engine):
            self._last = probe
        elif (moved := _mean(probe.trainer - last.trainer)) > _STALE * self.tolerance:
            raise self._error(
                step, f"it says the same to the last bit while the trainer's log-probs moved by {moved:.3g}"
            )

    def _probe(self, size: int, tokens: int) -> _Probe:
        keys = tuple(draw_key(self.seed, "engine", i) for i in range(size))
        sampling = Sampling(temperature=self.temperature, max_new_tokens=tokens)
        (completions,) = self.engine.sample([SampleRequest(self.prompt_ids, keys, self.images)], sampling)
        return _Probe(
            torch.cat([c.ids for c in completions]),
            torch.cat([c.logprobs for c in completions]),
            self._scored(completions),
        )

    def _scored(self, completions: list[Completion]) -> torch.Tensor:
        with torch.no_grad():
            logprobs, mask = completion_logprobs(
                self.model,
                [Row(self.prompt_ids, c.ids, self.images) for c in completions],
                temperature=self.temperature,
                banned_ids=self.banned_ids,
                pad_id=self.pad_id,
                image_processor=self.image_processor,
            )
        return logprobs[mask].float().cpu()

    def _error(self, step: int, fact: str) -> EngineError:
        when = f"after step {step}" if step else "before the first step"
        return EngineError(
            f"{when} the sampling engine does not hold the trainer's weights: {fact} (allowed: {self.tolerance:g}). Its weights are "
            "stale, or it runs another model, precision or temperature. Nothing was sampled from them. Start the engine again with "
            "student.model and continue with `zppo resume RUN`; where the difference is rounding, raise train.engine_tolerance"
        )


def _mean(values: torch.Tensor) -> float:
    return float(values.abs().mean())
