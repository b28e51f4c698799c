"""From hidden states to scores of tokens, the logits of a few tokens at a time.

A row of 17,000 tokens over a vocabulary of 248,320 has 15.7 GiB of logits in fp32, and as much again of their gradient. Here a chunk
of tokens goes through the model's own output layer, whatever that is (tied, with a bias, with adapters, in four bits), is turned into one
number a token, and is dropped; the backward pass computes it again. Values and gradients are those of the whole form.

What a model does to its logits behind that layer (Gemma's soft cap, Granite's and Cohere's factor) is found out by trying: a model is
shown a known line in place of its logits. One that does anything else keeps the whole form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from zppo.core.loss import jensen_shannon
from zppo.core.minibatch import head_tokens
from zppo.engines.out_of_memory import out_of_memory
from zppo.images.features import device_of

Result = TypeVar("Result")

_FAR = 1e30  # a logit that every soft cap cuts off
_NEAR = 2.0**-20  # and one that none touches


class HeadForm(NamedTuple):
    """What a model does behind its output layer: logits times `scale`, then `cap * tanh(logits / cap)`.

    Attributes:
        scale: 1 for nothing.
        cap: 0 for none.
        vocab: logits of a token.
    """

    scale: float
    cap: float
    vocab: int

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return (logits / self.cap).tanh() * self.cap if self.cap else logits


_FORMS: WeakKeyDictionary[nn.Module, HeadForm | None] = WeakKeyDictionary()


def head_form(model: Any, *, again: bool = False) -> HeadForm | None:
    """What is known of a model's output; None where its logits must be computed whole. Tried once, by a pass over two tokens.

    Args:
        again: try what is known too. Where weights are sharded a pass is everybody's: `ShardedWeights.prepare` asks in all processes at
            once, and one of them may have asked before.
    """
    inner = getattr(model, "module", model)  # without the wrapper of a distributed trainer
    if not isinstance(inner, nn.Module) or _head(inner) is None:
        return None
    if again or inner not in _FORMS:
        _FORMS[inner] = _tried(inner, _head(inner))
    return _FORMS[inner]


def _head(model: Any) -> Any:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


@torch.no_grad()
def _tried(model: nn.Module, head: Any) -> HeadForm | None:
    shown: list[torch.Tensor] = []

    def show(hidden: torch.Tensor) -> torch.Tensor:
        logits = head.forward(hidden)
        line = torch.linspace(-90, 90, logits.shape[-1], dtype=torch.float64, device=logits.device)
        line[0], line[-1] = _NEAR, _FAR
        shown.append(line.expand(logits.shape).clone())
        return shown[-1]

    ids = torch.zeros(1, 2, dtype=torch.int64, device=device_of(model))
    try:
        with _instead(head, show):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    except (RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        return None  # it gives its head more than hidden states, or needs real logits
    if len(shown) != 1 or logits.shape != shown[0].shape or logits.shape[1] not in (1, 2):
        return None
    line, found = shown[0][0, -1], logits[0, -1].double()
    cap = float(found[-1]) if found[-1] < _FAR**0.5 else 0.0
    form = HeadForm(_rounded(float(found[0] / line[0])), cap, len(line))
    return form if torch.allclose(form(line), found, rtol=1e-6, atol=1e-6) else None


def _rounded(value: float) -> float:
    """The number as a configuration would say it, where rounding lies between."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 2e-7 * abs(value) else value


@contextmanager
def _instead(module: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """For its next call a module does something else; its hooks (what gathers its weights, among others) run around it as ever."""
    own = module.__dict__.get("forward")

    def put_back() -> None:
        if own is not None:
            module.forward = own
        elif "forward" in module.__dict__:
            del module.forward

    def once(hidden: torch.Tensor) -> torch.Tensor:
        put_back()
        return forward(hidden)

    module.forward = once
    try:
        yield
    finally:
        put_back()


class Output:
    """From hidden states to logits, as a pass does it.

    Args:
        head: the output layer; None where rows are logits already.
        like: (M, H) hidden states of the pass, or (M, V) logits.
    """

    def __init__(self, head: Any, form: HeadForm | None, like: torch.Tensor) -> None:
        self.head, self.form = head, form
        self.vocab = form.vocab if form else like.shape[-1]
        self.device = like.device.type
        self._type, self._enabled = torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device)

    def autocast(self) -> torch.autocast:
        """That of the pass. Around several chunks it turns the weights once for all of them."""
        return torch.autocast(self.device, self._type, self._enabled)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, V) of (n, H) hidden states."""
        if self.head is None or self.form is None:
            return rows
        with self.autocast():
            return self.form(self.head.forward(rows[None])).squeeze(0)


class Late(NamedTuple):
    """Logits of chosen tokens of a pass, when they are wanted, without gradients.

    Attributes:
        output: from hidden states to logits.
        flat: (M, H) hidden states.
        places: (N,) rows of it.
    """

    output: Output
    flat: torch.Tensor
    places: torch.Tensor

    def part(self, part: slice) -> torch.Tensor:
        """(n, V) logits of some of the tokens."""
        with torch.no_grad():
            return self.output.logits(self.flat[self.places[part]])


class ChunkScore(Protocol):
    """A number for every token from its logits, a chunk at a time."""

    diverges: bool
    """Whether it holds several times as much of a chunk as a log-prob does."""

    def value(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        """(n, V) logits of the tokens in `part` -> (n,) float32. It must not change the logits."""
        ...

    def gradient(self, logits: torch.Tensor, part: slice, upstream: torch.Tensor) -> torch.Tensor:
        """(n, V) gradient of sum(upstream * value), in the type of the logits, whose memory it may take."""
        ...


class TargetLogprobs:
    """log softmax(logits / temperature)[target], and entropies where they are wanted (not differentiable).

    Args:
        targets: (N,) token ids.
        banned_ids: those that take no probability.
    """

    diverges = False

    def __init__(self, targets: torch.Tensor, temperature: float, banned_ids: Collection[int], *, entropies: bool = False) -> None:
        self.targets, self.temperature, self.banned_ids = targets, temperature, banned_ids
        self._norms = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
        self._banned: torch.Tensor | None = None
        self.entropies = torch.empty_like(self._norms) if entropies else None

    def value(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        scores = self._scores(logits)
        norms = self._norms[part] = scores.logsumexp(-1)
        if self.entropies is not None:
            self.entropies[part] = torch.special.entr((scores - norms[:, None]).exp_()).sum(-1)
        return scores.gather(1, self.targets[part, None])[:, 0] - norms

    def gradient(self, logits: torch.Tensor, part: slice, upstream: torch.Tensor) -> torch.Tensor:
        """d logprob / d logit_v = (1[v = target] - p_v) / temperature."""
        scale = (upstream / self.temperature)[:, None]
        probs = self._scores(logits).sub_(self._norms[part, None]).exp_()
        return probs.mul_(-scale).scatter_add_(1, self.targets[part, None], scale).to(logits.dtype)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 logits after temperature and bans."""
        scores = logits.float()
        if self.temperature != 1:
            scores = scores / self.temperature
        if self._banned is None:
            known = sorted(i for i in self.banned_ids if i < logits.shape[-1])
            self._banned = torch.tensor(known, dtype=torch.int64).to(logits.device, non_blocking=True)
        return scores.index_fill(1, self._banned, float("-inf")) if len(self._banned) else scores


class DivergenceFrom:
    """Jensen-Shannon divergence from a teacher, over the ids that both have.

    Args:
        teacher: its logits of the same tokens.
    """

    diverges = True

    def __init__(self, teacher: Late) -> None:
        self.teacher = teacher

    def value(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        wanted = self.teacher.part(part)
        size = min(logits.shape[-1], wanted.shape[-1])  # embeddings may be padded to different sizes
        return jensen_shannon(logits[:, :size], wanted[:, :size].to(logits.device))

    def gradient(self, logits: torch.Tensor, part: slice, upstream: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf, part), leaf, upstream)[0]


def late_logits(model: Any, inputs: Mapping[str, Any], width: int, places: torch.Tensor) -> Late:
    """Runs a model, and keeps what the logits of some tokens can be computed from.

    Args:
        inputs: of its forward pass, but for how many logits are kept.
        width: the last tokens of every row that `places` counts.
        places: (N,) tokens, counted row by row.
    """
    return _passed(model, inputs, width, lambda output, flat: Late(output, flat, places))


def scored(model: Any, inputs: Mapping[str, Any], width: int, places: torch.Tensor, score: ChunkScore) -> torch.Tensor:
    """(N,) float32 scores of the tokens in `places`, with gradients where they are on; args as of `late_logits`."""

    def apply(output: Output, flat: torch.Tensor) -> torch.Tensor:
        weights = [p for p in output.head.parameters() if p.requires_grad] if output.head is not None else []
        grads = torch.is_grad_enabled()
        values: torch.Tensor = _Chunked.apply(score, output, grads, places, flat, *weights)  # type: ignore[no-untyped-call]
        return values

    return _passed(model, inputs, width, apply)


def _passed(model: Any, inputs: Mapping[str, Any], width: int, work: Callable[[Output, torch.Tensor], Result]) -> Result:
    """What `work` makes of a pass's hidden states: inside of the output layer's call, where its weights are there even if sharded."""
    form, done = head_form(model), list[Result]()
    head = _head(getattr(model, "module", model)) if form else None

    def instead(hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden[:, -width:].flatten(0, 1)
        done.append(work(Output(head, form, flat), flat))
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with _instead(head, instead) if head is not None else nullcontext():
        out = model(**inputs, logits_to_keep=width)
    if done:
        return done[0]
    flat = out.logits[:, -width:].flatten(0, 1)
    return work(Output(None, None, flat), flat)


class _Chunked(torch.autograd.Function):
    """Scores of tokens from rows of hidden states. Kept until the backward pass: those rows, and the last chunk's logits."""

    @staticmethod
    def forward(
        ctx: Any, score: ChunkScore, output: Output, grads: bool, places: torch.Tensor, flat: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        wanted = grads and any(ctx.needs_input_grad)
        values = torch.empty(len(places), dtype=torch.float32, device=flat.device)
        size = head_tokens(output.vocab, gpu=output.device != "cpu", diverges=score.diverges)
        short = len(places) % size  # comes first: the last chunk is the one that is not computed again
        ends = range(short or size, len(places) + 1, size)
        parts = [slice(max(0, end - size), end) for end in ends]
        ctx.save_for_backward(places, flat)
        ctx.score, ctx.output, ctx.weights, ctx.parts, ctx.kept = score, output, weights, parts, None
        with output.autocast():
            for part in parts:
                # With gradients even if nothing is kept: autocast keeps the weights that it turns, for later passes too.
                rows, logits = _run(output, flat, places[part], wanted)
                values[part] = score.value(logits.detach(), part)
                if wanted and part is parts[-1]:
                    ctx.kept = rows, logits
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, weights = ctx.output, ctx.weights
        places, flat = ctx.saved_tensors
        of_rows = torch.zeros_like(flat)
        of_weights: list[torch.Tensor | None] = [None] * len(weights)
        with output.autocast():
            for part in reversed(ctx.parts):  # the last one's logits are still there
                rows, logits = ctx.kept or _run(output, flat, places[part], True)
                ctx.kept = None
                gradient = ctx.score.gradient(logits.detach(), part, upstream[part])
                with torch.autocast(output.device, enabled=False):
                    own, *others = torch.autograd.grad(logits, (rows, *weights), gradient, allow_unused=True)
                del rows, logits, gradient
                of_rows[places[part]] = own.to(of_rows.dtype)
                of_weights = [_sum(w, total, other) for w, total, other in zip(weights, of_weights, others, strict=True)]
        return None, None, None, None, of_rows, *(g if g is None else g.to(w.dtype) for g, w in zip(of_weights, weights, strict=True))


def _run(output: Output, flat: torch.Tensor, places: torch.Tensor, grads: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of hidden states as a leaf, and their logits."""
    with torch.set_grad_enabled(grads):
        rows = flat.detach()[places].requires_grad_(grads)
        return rows, output.logits(rows)


_IN_PLACE = "zppo_sums_in_place"


def sum_in_place(parameter: torch.Tensor) -> None:
    """The gradient of this parameter may be added to its `grad` outside of autograd: no hook of anybody waits for it there.

    An output layer's gradient is as large as its weight: through autograd it would be held until those of all layers are done, and summed
    with that of a tied embedding into a third one.
    """
    setattr(parameter, _IN_PLACE, True)


def sums_in_place(parameter: torch.Tensor) -> bool:
    """Whether that was said of it, and there is a plain gradient to add to."""
    return getattr(parameter, _IN_PLACE, False) and type(parameter.grad) is torch.Tensor


def _sum(weight: torch.Tensor, total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """What autograd is given of a weight's gradient so far: in fp32, whatever a chunk's part came in; None where it is summed in place."""
    if more is None:
        return total
    if sums_in_place(weight) and weight.grad is not None:
        weight.grad.add_(more)
        return None
    return more if total is None else total.float().add_(more)
