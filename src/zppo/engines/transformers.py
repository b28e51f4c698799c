"""Sampling with a `transformers` model: one prefill per prompt, finished rows dropped, exact log-probs.

Prompts of unequal length are padded on the *left*: their last tokens line up, so one position ends all of them, and a
linear-attention layer (Qwen3.5) starts from a zero state that padding leaves at zero. Padding on the right would decay
the state that a prompt leaves behind.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from zppo.engines.base import Completion, Ended, SampleRequest, Sampling, Watcher, check_end_tokens, check_requests, in_order
from zppo.engines.keyed_sampling import Drawer, Draws
from zppo.engines.kv_cache import DecodeState
from zppo.engines.out_of_memory import out_of_memory, release
from zppo.engines.packed_linear import packed_linears
from zppo.errors import MemoryLimitError, ModelError
from zppo.images.features import Positions, Seen, picture_inputs, positions_of
from zppo.images.processor import ImageProcessor

DROP_SHARE = 16  # rows are dropped once one in so many has finished
WORTH_PACKING = 16  # new tokens: packing a weight takes as long as reading it ten times


class Rows:
    """Notes what is drawn, drops rows that have finished, and hands their completions over when it does.

    Args:
        limits: (R,) most tokens of each row.
        ends: (V,) bool, which ids end a completion.
        look_every: steps between looks at what has finished.

    Attributes:
        rows: numbers of the rows that go on, in the order in which they lie in the batch now, (R',).
        longest: steps after which all have finished.
    """

    def __init__(self, limits: torch.Tensor, ends: torch.Tensor, look_every: int) -> None:
        self.rows = torch.arange(len(limits), device=limits.device)
        self.longest, self._shortest = int(limits.max()), int(limits.min())
        self._limits, self._ends, self._look_every = limits, ends, look_every
        self._live = torch.ones_like(self.rows, dtype=torch.bool)
        nothing = torch.zeros(len(limits), 0, device=limits.device)
        self._before = Draws(nothing.long(), nothing, nothing)  # (R', T') of the rows as they lie now
        self._since: list[Draws] = []  # (R',) each
        self._step = 0

    def record(self, draws: Draws) -> tuple[torch.Tensor | None, list[tuple[int, Completion]]]:
        """Notes one step; `rows` is empty once all are done.

        Returns:
            The places in the batch to go on with, None for all; and of each row that is dropped its number and its completion, up to
            its first end token, else up to its limit.

        Raises:
            ModelError: a log-prob of a row that has finished is not a number.
        """
        self._since.append(draws)
        self._step += 1
        self._live &= ~self._ends[draws.tokens]
        if self._step >= self._shortest:
            self._live &= self._limits[self.rows] > self._step
        if self._step % self._look_every and self._step < self._shortest:
            return None, []
        count = int(self._live.sum())
        if count and (len(self.rows) - count) * DROP_SHARE < len(self.rows):
            return None, []
        # The last live rows fill the gaps, so that most stay where they are.
        kept = torch.arange(count, device=self.rows.device)
        kept[~self._live[:count]] = self._live[count:].nonzero()[:, 0] + count
        return kept, self._drop((~self._live).nonzero()[:, 0], kept)

    def drawn(self, draws: Draws) -> list[tuple[int, int]]:
        """(row, token) of a step that is not recorded yet, of the rows to whose completions it belongs; waits for a GPU."""
        return list(zip(self.rows[self._live].tolist(), draws.tokens[self._live].tolist(), strict=True))

    def end(self, rows: Collection[int]) -> None:
        """These rows end with the step that is recorded next: nobody waits for them."""
        ended = torch.tensor(sorted(rows), device=self.rows.device)
        self._limits[ended] = self._limits[ended].clamp(max=self._step + 1)
        self._live &= ~torch.isin(self.rows, ended)

    def _drop(self, gone: torch.Tensor, kept: torch.Tensor) -> list[tuple[int, Completion]]:
        """The rows at the places `gone`; those at `kept` go on."""
        new = (torch.stack(part, 1) for part in zip(*self._since, strict=True))
        whole = Draws(*(torch.cat(parts, 1) for parts in zip(self._before, new, strict=True)))
        rows, ended = self.rows[gone], Draws(*(part[gone] for part in whole))
        self._before, self._since = Draws(*(part[kept] for part in whole)), []
        self.rows, self._live = self.rows[kept], self._live[kept]
        places = torch.arange(self._step, device=rows.device)
        first_end = torch.where(self._ends[ended.tokens], places, self._step).amin(-1)
        lengths = torch.minimum(first_end + 1, self._limits[rows])
        written = places < lengths[:, None]
        if bool((ended.logprobs.isnan() & written).any()):
            raise ModelError(
                "the model's logits are not numbers while sampling: its weights have diverged or its precision overflows; "
                "go back to a checkpoint with a lower learning rate, or use bf16 or fp32 instead of fp16"
            )
        means = ((ended.entropies * written).sum(-1) / lengths).tolist()
        truncated = (first_end + 1 > self._limits[rows]).tolist()
        tokens, logprobs = ended.tokens.cpu(), ended.logprobs.cpu()
        return [
            (row, Completion(tokens[i, :n].clone(), logprobs[i, :n].clone(), truncated[i], means[i]))
            for i, (row, n) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True))
        ]


class Piece(NamedTuple):
    """Rollouts `start` to `stop` of a request."""

    request: int
    start: int
    stop: int


class TransformersEngine:
    """Samples from the current weights of a causal language model of `transformers`.

    Draws are keyed (`zppo.engines.keyed_sampling`): a rollout's tokens do not depend on what else is in the batch, up to the
    rounding of the model's own arithmetic.

    Args:
        model: the model itself, without a wrapper of a distributed trainer. Its modules are put into evaluation mode
            while sampling and back afterwards.
        eos_ids: ids that end a completion; the end token is part of it.
        pad_id: any valid id; fills up shorter prompts and is masked.
        banned_ids: ids that are never drawn (image tokens). The training forward masks the same ids.
        max_rows: most rollouts decoded at once; None for all. Longest prompts go first, equal ones in request order.
        max_tokens: most cached tokens at once, counted as rows * (longest prompt + new-token limit); None for no
            limit. A single rollout is decoded whatever it needs. Where memory runs out, the rows are halved and tried
            again, and `max_tokens` is what they came to: later batches start there.
        autocast_dtype: run the model under autocast with this type (bfloat16 on a GPU); None for the weights' own.
        look_every: decoding steps between looks at which rollouts have finished; a look waits for a GPU's queue of
            work. None for 1 on a CPU and 8 elsewhere.
        say: called with a message once, when memory has run out and what fits from then on.
        image_processor: for the images of requests; None for one that reads text only.

    Attributes:
        watch: asked before each batch with the (request, place of a key) of its rows who is to be told of each token; None for nobody.
    """

    shares_weights = True  # with the trainer

    def __init__(
        self,
        model: PreTrainedModel,
        eos_ids: Collection[int],
        pad_id: int,
        banned_ids: Collection[int] = (),
        *,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        look_every: int | None = None,
        say: Callable[[str], None] | None = None,
        image_processor: ImageProcessor | None = None,
    ) -> None:
        self.model, self.image_processor = model, image_processor
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id
        self.banned_ids = frozenset(banned_ids)
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.autocast_dtype = autocast_dtype
        self.say = say
        self.watch: Callable[[Sequence[tuple[SampleRequest, int]]], Watcher] | None = None
        self._failed_rows = 0  # of the attempt that ran out of memory, until a smaller one succeeds
        self.look_every = look_every or (1 if model.device.type == "cpu" else 8)
        config = model.config.get_text_config(decoder=True)
        self.vocab_size: int = config.vocab_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        check_end_tokens(self.eos_ids, self.banned_ids)

    def sync(self) -> None:
        """Nothing to do: the engine samples from the trainer's own weights."""

    def sample(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[list[Completion]]:
        """Completions per request, in the order of its keys; see `stream`."""
        return in_order(requests, list(self.stream(requests, sampling)))

    @torch.no_grad()
    def stream(self, requests: Sequence[SampleRequest], sampling: Sampling) -> Iterator[Ended]:
        """Completions as they end, each as soon as its row is dropped.

        Every completion has at most `sampling.max_new_tokens` tokens; where prompt and limit together exceed the
        model's context, it ends at the context. Both count as truncated.

        Raises:
            ModelError: no requests; a request without prompt tokens, without keys, with ids outside the vocabulary or
                with a prompt that fills the model's context; images, and no image processor; a limit below 1; logits that are
                not numbers.
            DataError: an image cannot be read.
            MemoryLimitError: the memory does not hold a single rollout.
        """
        check_requests(requests, sampling, self.vocab_size, self.context)
        done: list[set[int]] = [set() for _ in requests]  # places of keys whose completions have been given
        waiting = deque(plan(requests, sampling.max_new_tokens, self.max_rows, self.max_tokens))
        with _evaluating(self.model), self.autocast(), self._packed(sampling.max_new_tokens):
            while waiting:
                batch = [piece for whole in waiting.popleft() for piece in _missing(whole, done[whole.request])]
                if not batch:
                    continue
                rows, tokens = _size(batch, requests, sampling.max_new_tokens)
                if rows > 1 and self.max_tokens is not None and tokens > self.max_tokens:
                    waiting.extendleft(reversed(halves(batch)))
                    continue
                places = [(piece.request, i) for piece in batch for i in range(piece.start, piece.stop)]
                try:
                    for row, completion in self._decode([(requests[p.request], p) for p in batch], sampling):
                        request, key = places[row]
                        done[request].add(key)
                        yield request, key, completion
                except RuntimeError as error:
                    self._halve_or_raise(error, rows, tokens, sampling)
                else:
                    self._say_what_fits(rows, tokens)
                    continue
                release()  # outside of the handler, which holds the tensors of the failed attempt
                waiting.appendleft(batch)

    def _halve_or_raise(self, error: RuntimeError, rows: int, tokens: int, sampling: Sampling) -> None:
        """Where memory ran out, `max_tokens` admits half of the rows from now on; any other error is raised again.

        Nothing is lost by the attempt: what has finished stays, and every draw is keyed, so the other rows come to the same tokens in
        any company.
        """
        if not out_of_memory(error):
            raise error
        if rows == 1:
            raise MemoryLimitError(
                f"the memory of {self.model.device} does not hold one rollout of {tokens:,} tokens besides the model: lower "
                f"max_new_tokens (now {sampling.max_new_tokens:,}) or the prompt limit, or take a smaller model"
            ) from error
        self._failed_rows = self._failed_rows or rows
        self.max_tokens = rows // 2 * (tokens // rows)

    def _say_what_fits(self, rows: int, tokens: int) -> None:
        """After an attempt that succeeded, where larger ones had run out of memory."""
        if self._failed_rows and self.say is not None and self.max_tokens is not None:
            # More than now, where the failed attempt had finished some.
            fit = max(1, self.max_tokens // (tokens // rows))
            self.say(
                f"memory ran out with {self._failed_rows:,} rollouts at once; {fit:,} fit, and no more than "
                f"{self.max_tokens:,} cached tokens are tried from now on (rollout.max_rows sets a limit of your own)"
            )
        self._failed_rows = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What the model is run under."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast_dtype)

    def _packed(self, new_tokens: int) -> contextlib.AbstractContextManager[None]:
        """Packed weights, where there are decoding steps enough to win back what packing takes."""
        return packed_linears(self.model, self.autocast_dtype) if new_tokens >= WORTH_PACKING else contextlib.nullcontext()

    def _prefill(self, prompts: Sequence[SampleRequest]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor, torch.Tensor]:
        """Logits after the last token (P, V), the cache, which places hold tokens (P, L), and the next positions (P,)."""
        device, width = self.model.device, max(len(p.prompt_ids) for p in prompts)
        ids = torch.tensor([[self.pad_id] * (width - len(p.prompt_ids)) + list(p.prompt_ids) for p in prompts], device=device)
        pads = torch.tensor([width - len(p.prompt_ids) for p in prompts], device=device)
        places = torch.arange(width, device=device) - pads[:, None]
        mask = places >= 0
        padded = min(len(p.prompt_ids) for p in prompts) < width
        positions: torch.Tensor | None = places.clamp(min=0) if padded else None
        following = mask.sum(-1)
        pictures = picture_inputs(self.model, self.image_processor, [p.images for p in prompts], ids)
        if pictures and self.image_processor is not None:
            ranked = [positions_of(self.model, self.image_processor, Seen(torch.tensor(p.prompt_ids), p.images)) for p in prompts]
            positions = _left_padded(ranked, width).to(device)
            following = torch.tensor([rank.next for rank in ranked], device=device)
        cache = DynamicCache(config=self.model.config)
        out = self.model(
            input_ids=ids,
            attention_mask=mask.long() if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **pictures,
        )
        return out.logits[:, -1], cache, mask, following

    def _decode(self, batch: Sequence[tuple[SampleRequest, Piece]], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        """One batch: prefill, then token by token on the rows that still live; gives the rows that have finished, by number."""
        device = self.model.device
        prompts = [request.prompt_ids for request, _ in batch]
        owners = [i for i, (_, piece) in enumerate(batch) for _ in range(piece.start, piece.stop)]
        keys = [key for request, piece in batch for key in request.keys[piece.start : piece.stop]]
        room = [sampling.max_new_tokens if self.context is None else self.context - len(prompts[i]) for i in owners]
        limits = torch.tensor([min(sampling.max_new_tokens, r) for r in room], device=device)
        ends = torch.zeros(self.vocab_size, dtype=torch.bool, device=device)
        ends[[i for i in self.eos_ids if i < self.vocab_size]] = True
        drawer = Drawer(sampling, keys, [prompts[i] for i in owners], tuple(self.banned_ids), device)
        progress = Rows(limits, ends, self.look_every)
        watcher = self.watch([(r, key) for r, piece in batch for key in range(piece.start, piece.stop)]) if self.watch else None

        logits, cache, mask, following = self._prefill([request for request, _ in batch])
        owner = torch.tensor(owners, device=device)
        logits, state = logits[owner], None
        for step in range(progress.longest):
            draws = drawer.draw(logits, step)
            if watcher is not None and (gone := watcher(step, partial(progress.drawn, draws))):
                progress.end(gone)
            tokens, (kept, ended) = draws.tokens, progress.record(draws)
            yield from ended
            if len(progress.rows) == 0:
                break
            if kept is not None:
                tokens = tokens[kept]
                drawer.keep(kept)
            if state is None:
                state = DecodeState(self.model, cache, mask, following, owner if kept is None else owner[kept])
            elif kept is not None:
                state.keep(kept)
            logits = state.step(tokens)


def plan(requests: Sequence[SampleRequest], new: int, max_rows: int | None, max_tokens: int | None) -> list[list[Piece]]:
    """Splits the rollouts of all requests into batches within both limits, the longest prompts first.

    A function of the requests alone, so nothing hangs on timing. A group is split only where a batch cannot hold it.
    """
    everything = sum(len(request.keys) for request in requests)
    batches: list[list[Piece]] = []
    free = 0
    for i in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids)):
        length, keys, start = len(requests[i].prompt_ids), len(requests[i].keys), 0
        while start < keys:
            if free < keys - start:
                batches.append([])
                free = everything if max_rows is None else max_rows
                if max_tokens is not None:  # the first prompt of a batch is its longest
                    free = min(free, max(1, max_tokens // (length + new)))
            stop = min(keys, start + free)
            batches[-1].append(Piece(i, start, stop))
            free -= stop - start
            start = stop
    return batches


def halves(batch: Sequence[Piece]) -> list[list[Piece]]:
    """A batch of at least two rollouts as two, in the same order, the first half the smaller one."""
    room = sum(piece.stop - piece.start for piece in batch) // 2
    parts: list[list[Piece]] = [[], []]
    for piece in batch:
        cut = min(piece.stop, piece.start + room)
        room -= cut - piece.start
        for part, start, stop in ((parts[0], piece.start, cut), (parts[1], cut, piece.stop)):
            if stop > start:
                part.append(Piece(piece.request, start, stop))
    return parts


def _left_padded(ranked: Sequence[Positions], width: int) -> torch.Tensor:
    """Positions of prompts as a model takes them: (P, L), or (A, P, L) on A axes; 0 on the padding."""
    padded = [torch.nn.functional.pad(rank.places, (width - rank.places.shape[1], 0)) for rank in ranked]
    places = torch.stack(padded, 1)
    return places[0] if len(places) == 1 else places


def _size(batch: Sequence[Piece], requests: Sequence[SampleRequest], new: int) -> tuple[int, int]:
    """Rollouts of a batch, and the most tokens that its cache may come to hold."""
    rows = sum(piece.stop - piece.start for piece in batch)
    return rows, rows * (max(len(requests[piece.request].prompt_ids) for piece in batch) + new)


def _missing(piece: Piece, done: Collection[int]) -> list[Piece]:
    """What of a piece is not done yet: an attempt that ran out of memory may have finished some of its rollouts."""
    return [Piece(piece.request, i, i + 1) for i in range(piece.start, piece.stop) if i not in done] if done else [piece]


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode back afterwards (a frozen part may be in it all along)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
