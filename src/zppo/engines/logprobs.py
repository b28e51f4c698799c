"""The training forward: per-token log-probs of completions, under the distribution that they were sampled from.

Rows are padded on the right and trimmed to their longest one. A causal model never looks at what comes after, so no
attention mask is passed: the attention kernels without one are the fast ones.

Where a model can do that exactly, a prompt is computed once for several of its completions. Such a pack is one sequence: the prompt
without its last token, then for each completion a branch of that last token and the completion. A branch sees the prompt and itself, by
an attention mask, and its positions go on from the prompt's, so every token has the context that it was sampled in. The last prompt token
is repeated in every branch so that each token predicts one. It needs attention that takes such a mask: a recurrence (linear attention)
runs through a sequence in its order and cannot branch. PyTorch's attention is given the parts that see one another, and no pair of others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from zppo.core.minibatch import Sharing
from zppo.core.types import Row
from zppo.engines.output_head import DivergenceFrom, Late, TargetLogprobs, late_logits, scored
from zppo.images.features import Seen, device_of, picture_inputs, positions_of
from zppo.images.processor import ImageProcessor


class TokenScores(NamedTuple):
    """Per-token scores of completions, padded on the right.

    Attributes:
        logprobs: (B, T) float32, 0 where there is no token; carries gradients where gradients are on.
        mask: (B, T) bool, True on completion tokens.
        entropies: (B, T) float32, nats, without gradients; 0 where there is no token. None unless asked for.
    """

    logprobs: torch.Tensor
    mask: torch.Tensor
    entropies: torch.Tensor | None


def token_scores(
    model: Callable[..., Any],
    rows: Sequence[Row | tuple[Sequence[int] | torch.Tensor, Sequence[int] | torch.Tensor]],
    *,
    temperature: float = 1.0,
    banned_ids: Collection[int] = (),
    pad_id: int = 0,
    entropies: bool = False,
    device: torch.device | str | None = None,
    image_processor: ImageProcessor | None = None,
) -> TokenScores:
    """Scores every completion token given what stands before it, as the sampler drew it (method.md section 6).

    Args:
        model: a causal language model of `transformers`, wrapped for distributed training or not. Gradients and
            autocast are the caller's. Only completion tokens reach its output layer, a chunk of them at a time.
        rows: (prompt, completion) pairs, both non-empty, with images or without; T is the longest completion.
        temperature: divides the logits, as in sampling; > 0.
        banned_ids: ids that the sampler never draws; they take no probability here either.
        pad_id: any valid id.
        entropies: also compute the entropy of every token's distribution.
        device: where the model's inputs go; None for where it computes.
        image_processor: for the images of rows; features of a picture are computed once for all rows that hold it.

    Returns:
        The scores, on the model's device.
    """
    if not rows or temperature <= 0:
        raise ValueError(f"token_scores needs rows and a temperature > 0; got {len(rows)} rows and {temperature}")
    if device is None:
        device = device_of(model) if isinstance(model, torch.nn.Module) else "cpu"
    read = _read([Row(*row) for row in rows], model, pad_id, device, image_processor)
    score = TargetLogprobs(read.targets, temperature, banned_ids, entropies=entropies)
    values = scored(model, read.inputs, read.width, read.where.places(device), score)
    spread = None if score.entropies is None else read.where.spread(score.entropies)
    return TokenScores(read.where.spread(values), read.where.mask.to(device, non_blocking=True), spread)


class _Read(NamedTuple):
    """Rows as a model reads them: what it is given, the (N,) tokens to score, how many of each row's last tokens `where` counts."""

    inputs: dict[str, Any]
    targets: torch.Tensor
    width: int
    where: _Where


def _read(rows: Sequence[Row], model: Any, pad_id: int, device: torch.device | str, image_processor: ImageProcessor | None) -> _Read:
    prompts = [torch.as_tensor(row.prompt_ids) for row in rows]
    completions = [torch.as_tensor(row.completion_ids) for row in rows]
    starts, lengths = torch.tensor([[len(p), len(c)] for p, c in zip(prompts, completions, strict=True)]).unbind(1)
    if int(torch.minimum(starts, lengths).min()) < 1:
        raise ValueError("token_scores needs at least one prompt token and one completion token in every row")
    ids = pad_sequence([torch.cat(pair) for pair in zip(prompts, completions, strict=True)], batch_first=True, padding_value=pad_id)
    ids = ids.to(device, non_blocking=True)  # a copy that is waited for would wait for all work before it
    first = int(starts.min())  # position of the earliest completion token
    inputs, width = ids[:, :-1], ids.shape[1] - first  # the last token is predicted, never read
    seen = image_inputs(model, image_processor, rows, inputs)
    where = _Where(lengths, torch.arange(len(rows)) * width + starts - first)
    targets = torch.cat(completions).to(device, torch.int64, non_blocking=True)
    return _Read({"input_ids": inputs, "use_cache": False, **seen}, targets, width, where)


class _Where:
    """Where the N tokens of R completions stand: in the rows that a model reads, and in (R, T).

    Args:
        lengths: (R,) of the completions.
        starts: (R,) places of their first tokens, counted over the last tokens of all rows.
    """

    def __init__(self, lengths: torch.Tensor, starts: torch.Tensor) -> None:
        steps = torch.arange(int(lengths.max()))
        self.mask = steps < lengths[:, None]  # (R, T) bool, on the CPU
        self._places = (starts[:, None] + steps)[self.mask]
        self._own = self.mask.flatten().nonzero()[:, 0]

    def places(self, device: torch.device | str) -> torch.Tensor:
        """(N,) of every token, completion by completion."""
        return self._places.to(device, non_blocking=True)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) numbers as (R, T), 0 where there is no token."""
        flat = values.new_zeros(self.mask.numel())
        return flat.index_copy(0, self._own.to(values.device, non_blocking=True), values).view(self.mask.shape)


def image_inputs(model: Any, image_processor: ImageProcessor | None, rows: Sequence[Row], inputs: torch.Tensor) -> dict[str, Any]:
    """What a forward pass over right-padded rows is given for their images; empty where none has one.

    Args:
        inputs: (B, L) token ids as they go into the model, on its device.

    Raises:
        ModelError: there are images, and no image processor.
        DataError: an image cannot be read.
    """
    given = picture_inputs(model, image_processor, [row.images for row in rows], inputs)
    if not given or image_processor is None:
        return {}
    width, known, places = inputs.shape[1], {}, []
    for row in rows:
        ids = torch.as_tensor(row.prompt_ids)
        key = (tuple(ids.tolist()), row.images)
        if key not in known:
            known[key] = positions_of(model, image_processor, Seen(ids, row.images))
        ranked, start = known[key]
        rest = torch.arange(start, start + max(0, width - len(ids)))
        places.append(torch.cat([ranked, rest.expand(len(ranked), -1)], 1)[:, :width])
    positions = torch.stack(places, 1).to(inputs.device)
    if len(positions) > 1:  # one axis: the model counts them itself
        given["position_ids"] = positions
    return given


def completion_logprobs(
    model: Callable[..., Any],
    rows: Sequence[Row | tuple[Sequence[int] | torch.Tensor, Sequence[int] | torch.Tensor]],
    *,
    temperature: float = 1.0,
    banned_ids: Collection[int] = (),
    pad_id: int = 0,
    image_processor: ImageProcessor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_scores` without entropies: log-probs (B, T) float32 and the completion mask (B, T) bool."""
    scores = token_scores(model, rows, temperature=temperature, banned_ids=banned_ids, pad_id=pad_id, image_processor=image_processor)
    return scores.logprobs, scores.mask


_PAD = -1  # the branch of padding; 0 is the prompt, completions count from 1


class Pack(NamedTuple):
    """A prompt and completions of it, all non-empty."""

    prompt_ids: Sequence[int] | torch.Tensor
    completions: Sequence[Sequence[int] | torch.Tensor]


def sharing_of(model: PreTrainedModel, *, rounded: bool = False) -> Sharing | None:
    """How a model shares prompts; None where it cannot, or not exactly.

    Asked of it: text only, full attention in every layer, PyTorch's attention kernels, rotary positions; and that a prompt with two
    completions scores them as each on its own, which is tried. In a layer of width w attention over t^2 pairs takes 4 t^2 w multiplications
    and additions, everything else about 24 t w^2: equal at t = 6 w. `share_prompt` counts the pairs that are computed.

    Args:
        rounded: it computes in bf16, whatever its weights are.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    text_only = config.get_text_config() is config
    full = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    rotary = getattr(config, "rope_parameters", None) is not None
    if not (text_only and full and rotary and config._attn_implementation == "sdpa" and _agrees(model, rounded)):
        return None
    return Sharing(reach=6 * config.hidden_size)


@torch.no_grad()
def _agrees(model: PreTrainedModel, rounded: bool) -> bool:
    """Whether a small pack scores its completions as rows do, up to rounding."""
    size = model.config.vocab_size
    prompt, *completions = ([i % size for i in ids] for ids in (range(1, 8), range(11, 16), range(21, 24)))
    packed, mask = shared_logprobs(model, [Pack(prompt, completions)])
    plain, _ = completion_logprobs(model, [Row(prompt, c) for c in completions])
    gaps = (packed - plain)[mask].abs()
    if rounded or model.dtype != torch.float32:
        return bool(gaps.mean() < 0.1)  # a single token may be off by more
    return bool(gaps.max() < 1e-3)


def shared_logprobs(
    model: Callable[..., Any], packs: Sequence[Pack], *, temperature: float = 1.0, banned_ids: Collection[int] = (), pad_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logprobs` gives for the completions, pack by pack: log-probs (R, T) float32 and the mask (R, T) bool.

    Args:
        model: one for which `sharing_of` is not None, wrapped for distributed training or not.
        packs: P of them, of N tokens at most; R completions in all, T tokens the longest.
        temperature, banned_ids, pad_id: as there.
    """
    device = device_of(model) if isinstance(model, torch.nn.Module) else torch.device("cpu")
    first = min(len(pack.prompt_ids) for pack in packs) - 1  # place of the earliest token that predicts one of a completion
    laid = [_lay(pack) for pack in packs]
    ids, places, branches = (
        pad_sequence([pack[i] for pack in laid], True, fill).to(device, non_blocking=True) for i, fill in enumerate((pad_id, 0, _PAD))
    )
    seen = (branches[:, :, None] == branches[:, None]) | (branches[:, None] == 0)  # (P, N, N): query, key
    mask = BranchMask.of(seen.tril()[:, None], [[len(p.prompt_ids) - 1, *map(len, p.completions)] for p in packs], _kv_heads(model))
    inputs = {"input_ids": ids, "position_ids": places, "attention_mask": mask, "use_cache": False}
    completions, width = [torch.as_tensor(c) for pack in packs for c in pack.completions], ids.shape[1] - first
    where = _Where(torch.tensor([len(c) for c in completions]), _starts(packs, first, width))
    targets = torch.cat(completions).to(device, torch.int64, non_blocking=True)
    values = scored(model, inputs, width, where.places(device), TargetLogprobs(targets, temperature, banned_ids))
    return where.spread(values), where.mask.to(device, non_blocking=True)


def _kv_heads(model: Any) -> int | None:
    """How many heads of keys and values an attention layer has, where the configuration says it."""
    return getattr(getattr(getattr(model, "module", model), "config", None), "num_key_value_heads", None)


class BranchMask(torch.Tensor):
    """Which token of a pack sees which, (P, 1, N, N) bool. PyTorch's attention with it computes the pairs that see one another, few others.

    To any other function it is the plain mask that it holds. A kernel that is given a mask computes what the mask hides too: of a prompt
    and eight branches that is three quarters of all pairs. As an argument of the layers it is still there where they are computed again.

    Attributes:
        sizes: of every pack the tokens of its prompt and of each branch; what is left of N is padding.
        heads: of keys and values, before they were repeated for the queries; None where that is not known.
    """

    sizes: list[list[int]]
    heads: int | None
    _late: torch.Tensor

    @classmethod
    def of(cls, seen: torch.Tensor, sizes: list[list[int]], heads: int | None) -> BranchMask:
        """A plain mask with what else is known of it."""
        made = seen.as_subclass(cls)
        made.sizes, made.heads = sizes, heads
        prompt, longest = max(parts[0] for parts in sizes), max(max(parts[1:]) for parts in sizes)
        made._late = torch.ones(longest, prompt + longest, dtype=torch.bool, device=seen.device).tril(prompt)
        return made

    def late(self, prompt: int, branch: int) -> torch.Tensor:
        """(branch, prompt + branch) bool: what the tokens of a branch see of the prompt and of themselves."""
        start = self._late.shape[1] - self._late.shape[0] - prompt
        return self._late[:branch, start : start + prompt + branch]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return _attend(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: BranchMask, **how: Any) -> torch.Tensor:
    """`scaled_dot_product_attention` by blocks: the prompt causally, then every branch with keys and values of the prompt and its own."""
    if not query.shape[2] == key.shape[2] == attn_mask.shape[-1] or how.get("is_causal"):
        return scaled_dot_product_attention(query, key, value, attn_mask.as_subclass(torch.Tensor), **how)
    heads, repeated = attn_mask.heads, key.shape[1]
    if query.device.type == "cpu" and heads is not None and heads < repeated == query.shape[1]:
        # Its kernel needs no copies: what is kept for the backward pass is a fraction.
        key, value, how = key[:, :: repeated // heads], value[:, :: repeated // heads], {**how, "enable_gqa": True}
    made = []
    for pack, (prompt, *branches) in zip(zip(query.split(1), key.split(1), value.split(1), strict=True), attn_mask.sizes, strict=True):
        padding = query.shape[2] - prompt - sum(branches)
        (q, *queries), (k, *keys), (v, *values) = (x.split([prompt, *branches, padding], 2) for x in pack)
        k, v = k.contiguous(), v.contiguous()  # of views all of a tensor would be kept
        parts = [scaled_dot_product_attention(q, k, v, **{**how, "is_causal": True})]
        for branch, own_q, own_k, own_v in zip(branches, queries, keys, values, strict=False):
            late = attn_mask.late(prompt, branch)
            parts.append(scaled_dot_product_attention(own_q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2), late, **how))
        parts.append(value.new_zeros(1, query.shape[1], padding, value.shape[3]))
        made.append(torch.cat([part.transpose(1, 2) for part in parts], 1))  # laid out as its reader wants it
    return torch.cat(made).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The training forward of one model, under the distribution that its completions are sampled from.

    Attributes:
        model: wrapped for distributed training or not; gradients and autocast are the caller's.
        pad_id: any valid id.
        temperature, banned_ids: as in sampling.
        image_processor: for the images of rows; None for one that reads text only.
    """

    model: Any
    pad_id: int = 0
    temperature: float = 1.0
    banned_ids: tuple[int, ...] = ()
    image_processor: ImageProcessor | None = None

    def logprobs(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (B, T) float32 and completion mask (B, T) bool."""
        return completion_logprobs(
            self.model,
            rows,
            temperature=self.temperature,
            banned_ids=self.banned_ids,
            pad_id=self.pad_id,
            image_processor=self.image_processor,
        )

    def shared_logprobs(self, rows: Sequence[Row], packs: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the rows in `packs`, pack by pack; the prompt of a pack's rows is computed once."""
        return shared_logprobs(
            self.model,
            [Pack(rows[pack[0]].prompt_ids, [rows[i].completion_ids for i in pack]) for pack in packs],
            temperature=self.temperature,
            banned_ids=self.banned_ids,
            pad_id=self.pad_id,
        )

    def divergence(self, rows: Sequence[Row], wanted: Late) -> torch.Tensor:
        """(N,) Jensen-Shannon divergences from a teacher, of the N completion tokens of all rows in their order; with gradients.

        Args:
            wanted: what the teacher's own `late` gave for the rows.
        """
        read = self._read(rows)
        return scored(self.model, read.inputs, read.width, read.where.places(read.targets.device), DivergenceFrom(wanted))

    @torch.no_grad()
    def late(self, rows: Sequence[Row]) -> Late:
        """What the logits of the completion tokens can be computed from, a part of them at a time."""
        read = self._read(rows)
        return late_logits(self.model, read.inputs, read.width, read.where.places(read.targets.device))

    def _read(self, rows: Sequence[Row]) -> _Read:
        return _read(rows, self.model, self.pad_id, device_of(self.model), self.image_processor)


def _lay(pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and branches of a pack, (N,) each."""
    prompt, *completions = (torch.as_tensor(ids) for ids in (pack.prompt_ids, *pack.completions))
    begins, lengths = len(prompt) - 1, [len(c) for c in completions]
    ids = torch.cat([prompt[:-1], *(part for c in completions for part in (prompt[-1:], c[:-1]))])
    places = torch.cat([torch.arange(begins), *(torch.arange(begins, begins + n) for n in lengths)])
    return ids, places, torch.arange(len(completions) + 1).repeat_interleave(torch.tensor([begins, *lengths]))


def _starts(packs: Sequence[Pack], first: int, width: int) -> torch.Tensor:
    """(R,) place of each completion's first token among the targets of all packs, `width` a pack."""
    starts = []
    for i, pack in enumerate(packs):
        place = i * width + len(pack.prompt_ids) - 1 - first
        for completion in pack.completions:
            starts.append(place)
            place += len(completion)
    return torch.tensor(starts)
