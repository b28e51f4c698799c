"""Two checks of what samples against what is trained [zppo]; without them an error would go unseen, and training astray.

`SamplerCheck`: are the sampler's log-probs the trainer's? The ratio of the clipped surrogate is exp(trainer's now - old). Where the
sampler is exact its log-probs are old log-probs and a forward pass is saved; where something has come between the two (another kernel,
a lower precision, a broken cache) every ratio would be off, so from then on the trainer computes them itself.

`EngineCheck`: does the sampling engine hold the trainer's weights? Before and after each update both say what they think of the same
tokens: where the trainer has moved, the engine must have moved the same way. A stale or wrong engine samples from another policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import takewhile
from typing import NamedTuple, TypeVar

import torch

from zppo.config.settings import TrainSettings
from zppo.core.advantages import trivial
from zppo.core.draws import draw_key
from zppo.core.types import Group, Prompt, Row
from zppo.distributed.parallel import ReplicatedWeights
from zppo.distributed.processes import ONE_PROCESS, Processes
from zppo.engines.base import Completion, Engine, SampleRequest, Sampling
from zppo.engines.logprobs import ForwardPass
from zppo.errors import EngineError

Result = TypeVar("Result")

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

TOLERANCE_ROUNDED_SHARED = 0.2
"""The same where the engine samples from the trainer's own module, which cannot be stale: what is looked for is a cache, a precision or a
temperature that came between, and rounding grows as a student becomes sure (0.054 after 140 steps of a model of 135M)."""

_START = (1, 8)  # completions of a fixed prompt and their token limit: a look at a new engine,
_RECHECK = (8, 64)  # and what decides where a look was over the tolerance: one unlikely token must not end a run
_PROBED, _TOKENS = 4, 64  # rollouts that are looked at around an update, and how far
_PLACES = 4  # of the fixed prompt,
_FEW = 8  # and its first tokens, which are enough for an engine over the trainer's module
_NOTICED = 1e-6  # nats: a movement of the trainer that is more than the rounding of fp32 on average,
_NOTICED_FEW = 1e-4  # and in fewer than `_MANY` tokens, where one may round by a hundred-thousandth, and there is no spread to judge it by,
_NOTICED_ROUNDED = 1e-3  # and one that bf16 cannot round away in all tokens
_MANY = 16  # tokens: where so many have moved, and none has in the engine, it is no rounding either
_HEARD = 0.5  # how much of the trainer's movement the engine must have made,
_APART = 0.1  # and how much of it the two may be apart afterwards,
_GROWN = 30  # where that is so many times what they were apart before: a part of the weights is old


class Look(NamedTuple):
    """What engine and trainer say of the same completions: their tokens, and (T,) float32 log-probs of each."""

    ids: list[torch.Tensor]
    engine: list[torch.Tensor]
    trainer: list[torch.Tensor]

    @property
    def gaps(self) -> torch.Tensor:
        """(N,) differences, of all tokens."""
        return (torch.cat(self.engine) - torch.cat(self.trainer)).abs()


class _Probe(NamedTuple):
    """What an engine is asked before and after an update."""

    requests: tuple[SampleRequest, ...]
    tokens: int


class _GapStats(NamedTuple):
    """Difference of log-probs, nats a token."""

    mean: float
    largest: float


class Movement(NamedTuple):
    """How far log-probs have moved in an update, (N,) each: those of tokens that were drawn again after the same tokens.

    `noise` is how far engine and trainer were apart on them before, a root mean square.
    """

    engine: torch.Tensor
    trainer: torch.Tensor
    noise: float = math.inf

    @classmethod
    def between(cls, before: Look, now: Look) -> Movement:
        """From one look to another of the same requests."""
        engine, trainer, apart = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)]
        for i, (old, new) in enumerate(zip(before.ids, now.ids, strict=True)):
            width = min(len(old), len(new))
            same = int((old[:width] == new[:width]).int().cumprod(0).sum())
            engine.append(now.engine[i][:same] - before.engine[i][:same])
            trainer.append(now.trainer[i][:same] - before.trainer[i][:same])
            apart.append(before.engine[i][:same] - before.trainer[i][:same])
        return cls(torch.cat(engine).double(), torch.cat(trainer).double(), _root_mean_square(torch.cat(apart)))

    def share(self) -> tuple[float, float]:
        """How much of the trainer's movement the engine has made, as a least-squares factor, and four of its standard deviations."""
        size = float(self.trainer @ self.trainer)
        factor = float(self.engine @ self.trainer) / size
        rest = self.engine - factor * self.trainer
        return factor, 4 * (float(rest @ rest) / len(rest) / size) ** 0.5

    def fault(self, *, rounded: bool) -> str:
        """Why the engine cannot have the trainer's update; "" where nothing speaks against it.

        Args:
            rounded: the engine or the trainer computes in bf16, where small changes of weights may be rounded away.
        """
        moved = _root_mean_square(self.trainer)
        noticed = _NOTICED_ROUNDED if rounded else _NOTICED if len(self.trainer) >= _MANY else _NOTICED_FEW
        if not self.engine.any():
            many = not rounded and int(self.trainer.count_nonzero()) >= _MANY
            if many or moved > noticed:
                return f"it says the same to the last bit while the trainer's log-probs moved by {moved:.3g}"
            return ""
        if rounded or moved <= noticed:
            return ""
        factor, margin = self.share()
        if factor + margin < _HEARD:
            return f"its log-probs moved by {factor:.2g} of what the trainer's did, {moved:.3g} a token"
        apart = _root_mean_square(self.engine - self.trainer)
        if apart > max(_APART * moved, _GROWN * max(self.noise, _NOTICED)):
            return f"its log-probs did not move as the trainer's did, {moved:.3g} a token: {apart:.3g} are missing"
        return ""

    def heard(self, *, rounded: bool) -> bool:
        """Whether it is certain that the engine has the update, as far as log-probs tell."""
        if not self.engine.any():
            return not len(self.trainer)  # other tokens from the first one on
        if rounded or not self.trainer.any():
            return True
        factor, margin = self.share()
        return factor - margin > _HEARD


class EngineCheck:
    """Syncs the engine after a change of weights and compares it with the trainer.

    A fixed prompt is looked at first. Then, around each update, an engine with a copy of the weights samples a few rollouts that the
    update learns from once more, from the same keys. One that says it shares the trainer's weights draws the next token at a few places
    of the fixed prompt; where it is seen to sample from the very module that is trained, at a single one near its beginning.

    Args:
        engine: what samples. One that says `shares_weights` has no copy of them; one that has `rest` is told when it may.
        forward: the training forward of the student; under the trainer's autocast.
        prompt: the fixed prompt.
        tolerance: largest mean difference of log-probs, nats a token.
        every: steps between comparisons; 0 for none.
        seed: keys the draws.
        weights: how the student's weights lie over the processes; each looks at its own engine, and where one is wrong all of them say so.
        rounded: engine or trainer computes in bf16.
        exact: log-probs of rollouts are the trainer's (`Sampling.exact`), so that those of trained rows are watched too.
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
        rounded: bool = False,
        exact: bool = True,
    ) -> None:
        self.engine, self.forward, self.prompt = engine, forward, prompt
        self.tolerance, self.every, self.seed = tolerance, every, seed
        self.weights = weights or ReplicatedWeights()
        self.rounded, self.exact = rounded, exact
        self.shared = bool(getattr(engine, "shares_weights", False))
        self._synced: int | None = None  # the step whose weights the engine has
        self._gap: _GapStats | None = None  # of these weights
        self._watched: tuple[_Probe, Look] | None = None  # what was said before the update,
        self._open = False  # and whether the last update was too small to tell
        self._trained = 0.0  # mean gap of the rows of the last update

    def refresh(self, step: int) -> dict[str, float]:
        """Brings the engine up to the trainer's weights after `step` (0: before the first) and looks whether they arrived.

        Every process must call it.

        Returns:
            Metrics of the comparison; none where it did not look.

        Raises:
            EngineError: the engine's weights are not the trainer's.
        """
        if step != self._synced:
            self.engine.sync()
            self._synced, self._gap = step, None
        if not self._due(step):
            return {}
        self._gap = self._gap or self._after(step)
        return {"engine_gap_mean": self._gap.mean, "engine_gap_max": self._gap.largest}

    def before_update(self, step: int, groups: Sequence[Group]) -> None:
        """Looks at a few rollouts that the update of `step` learns from; then the engine rests until the next `refresh`.

        Every process must call it.

        Raises:
            EngineError: the engine's weights are not the trainer's.
        """
        self._trained = 0.0
        if self._due(step) and not self.shared:
            self._before(step, groups)
        if rest := getattr(self.engine, "rest", None):
            rest()

    def trained(self, counts: Mapping[str, float | None]) -> None:
        """Takes the gap between sampler and trainer over the rows of an update, which the next `refresh` judges.

        Args:
            counts: of the step; the same in all processes.
        """
        if self.exact:
            self._trained = counts.get("logprob_gap_mean") or 0.0

    def _due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    def _all(self, value: Result, fault: str = "") -> list[Result]:
        """Everybody's value; EngineError in all processes where one of them has found a fault."""
        found = self.weights.processes.gather((value, fault))
        if first := next((fault for _, fault in found if fault), None):
            raise EngineError(first)
        return [value for value, _ in found]

    def _before(self, step: int, groups: Sequence[Group]) -> _GapStats:
        probe = self._chosen(step, groups)
        look = self._look(probe)
        if not self._open:  # otherwise the rollouts of an earlier step are watched on
            self._watched = probe, look
        return self._judged(step, look)

    def _after(self, step: int) -> _GapStats:
        if not self._trained <= self.tolerance:
            fact = f"its log-probs differ by {self._trained:.3g} on average over the rollouts that the step learnt from"
            raise EngineError(self._words(step, fact))
        if self._watched is None:
            first = self._fixed(*_START)
            look = self._look(first)
            found = self._judged(step, look)
            self._watched = first, look
            if not self.shared:
                return found
            self._watched = self._places(), self._look(self._places())
        probe, before = self._watched
        now = self._look(probe)
        found = self._judged(step, now)
        movement = Movement.between(before, now)
        fault = movement.fault(rounded=self.rounded)
        self._all(None, self._words(step, fault) if fault else "")
        self._open = not (self.shared or movement.heard(rounded=self.rounded))
        if not self._open:
            self._watched = probe, now
        return found

    def _judged(self, step: int, look: Look) -> _GapStats:
        """The largest numbers of all processes."""
        gaps = look.gaps
        if not all(self._all(_mean(gaps) <= self.tolerance)):
            gaps = self._look(self._fixed(*_RECHECK)).gaps
        fact = f"its log-probs differ by {_mean(gaps):.3g} on average over {len(gaps)} tokens of a fixed prompt"
        found = self._all(_GapStats(_mean(gaps), float(gaps.max())), "" if _mean(gaps) <= self.tolerance else self._words(step, fact))
        return _GapStats(max(gap.mean for gap in found), max(gap.largest for gap in found))

    def _fixed(self, size: int, tokens: int) -> _Probe:
        keys = tuple(draw_key(self.seed, "engine", i) for i in range(size))
        return _Probe((SampleRequest(self.prompt.ids, keys, self.prompt.images),), tokens)

    def _places(self) -> _Probe:
        """The next token at places of the fixed prompt; at its end where it has images, which must be whole.

        Over the trainer's own module no weights can be stale, and a step must not pay for that: a few tokens of text show whether a
        cache, a precision or a temperature has come between.
        """
        ids, key = self.prompt.ids, (draw_key(self.seed, "engine", 0),)
        if getattr(self.engine, "model", self) is getattr(self.forward.model, "module", self.forward.model):
            images = self.forward.image_processor.image_ids if self.forward.image_processor else ()
            if few := tuple(takewhile(lambda i: i not in images, ids[:_FEW])):
                return _Probe((SampleRequest(few, key),), 1)
        cuts = [len(ids)] if self.prompt.images else sorted({max(1, len(ids) * i // _PLACES) for i in range(1, _PLACES + 1)})
        return _Probe(tuple(SampleRequest(ids[:cut], key, self.prompt.images) for cut in cuts), 1)

    def _chosen(self, step: int, groups: Sequence[Group]) -> _Probe:
        """Of the groups that have a gradient those with the shortest prompts, and a rollout of each."""
        live = sorted((g for g in groups if not trivial(g)), key=lambda g: len(g.prompt.ids))[:_PROBED]
        if not live:
            return self._fixed(_PROBED, _TOKENS)
        requests = []
        for prompt in (group.prompt for group in live):
            key = draw_key(self.seed, "rollout", step, prompt.question.id, prompt.kind, 0)  # the engine comes to the very rollout
            requests.append(SampleRequest(prompt.ids + prompt.forced_ids, (key,), prompt.images))
        return _Probe(tuple(requests), _TOKENS)

    def _look(self, probe: _Probe) -> Look:
        """Engine and trainer; the trainer's forward pass is one of all processes together where its weights are sharded."""
        sampling = Sampling(temperature=self.forward.temperature, max_new_tokens=probe.tokens)
        done, fault = list[list[Completion]](), ""
        with self.weights.whole() if self.shared else nullcontext():
            try:
                done = self.engine.sample(probe.requests, sampling)
            except EngineError as error:
                fault = str(error)
        self._all(None, fault)
        pairs = [(request, c) for request, row in zip(probe.requests, done, strict=True) for c in row]
        with torch.no_grad(), self.weights.scoring():
            logprobs, mask = self.forward.logprobs([Row(request.prompt_ids, c.ids, request.images) for request, c in pairs])
        trainer = [line[known] for line, known in zip(logprobs.float().cpu(), mask.cpu(), strict=True)]
        return Look([c.ids for _, c in pairs], [c.logprobs for _, c in pairs], trainer)

    def _words(self, step: int, fact: str) -> str:
        when = f"after step {step}" if step else "before the first step"
        return (
            f"{when} the sampling engine does not hold the trainer's weights: {fact} (allowed: {self.tolerance:g}). Its weights are "
            "stale, or it runs another model, precision or temperature. Nothing was sampled from them. Start the engine again with "
            "student.model and continue with `zppo resume RUN`; where the difference is rounding, raise train.engine_tolerance"
        )


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if len(values) else 0.0


def _mean(values: torch.Tensor) -> float:
    return float(values.abs().mean())
