"""The training forward: per-token log-probs of completions, under the distribution that they were sampled from.

Rows are padded on the right and trimmed to their longest one. A causal model never looks at what comes after, so no
attention mask is passed: the attention kernels without one are the fast ones.

Where a model can do that exactly, a prompt is computed once for several of its completions. Such a pack is one sequence: the prompt
without its last token, then for each completion a branch of that last token and the completion. A branch sees the prompt and itself, by
an attention mask, and its positions go on from the prompt's, so every token has the context that it was sampled in. The last prompt token
is repeated in every branch so that each token predicts one. It needs attention that takes such a mask: a recurrence (linear attention)
runs through a sequence in its order and cannot branch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from zppo.core.minibatch import Sharing
from zppo.core.types import Row
from zppo.images.features import Seen, picture_inputs, positions_of
from zppo.images.processor import ImageProcessor

_CHUNK = 1 << 24  # logits looked at in one go: bounds the float32 copies that log-probs need besides the logits


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
            autocast are the caller's. Logits are computed from the shortest prompt's end on only.
        rows: (prompt, completion) pairs, both non-empty, with images or without; T is the longest completion.
        temperature: divides the logits, as in sampling; > 0.
        banned_ids: ids that the sampler never draws; they take no probability here either.
        pad_id: any valid id.
        entropies: also compute the entropy of every token's distribution.
        device: where the model's inputs go; None for the device of its first parameter.
        image_processor: for the images of rows; features of a picture are computed once for all rows that hold it.

    Returns:
        The scores, on the model's device.
    """
    if not rows or temperature <= 0:
        raise ValueError(f"token_scores needs rows and a temperature > 0; got {len(rows)} rows and {temperature}")
    if device is None:
        device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else "cpu"
    whole = [Row(*row) for row in rows]
    prompts = [torch.as_tensor(row.prompt_ids) for row in whole]
    completions = [torch.as_tensor(row.completion_ids) for row in whole]
    starts, lengths = torch.tensor([[len(p), len(c)] for p, c in zip(prompts, completions, strict=True)]).unbind(1)
    if int(torch.minimum(starts, lengths).min()) < 1:
        raise ValueError("token_scores needs at least one prompt token and one completion token in every row")
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.cat(pair) for pair in zip(prompts, completions, strict=True)], batch_first=True, padding_value=pad_id
    ).to(device, non_blocking=True)  # a copy that is waited for would wait for all work before it

    first = int(starts.min())  # position of the earliest completion token
    inputs, targets = ids[:, :-1], ids[:, first:]  # (B, L - 1), (B, N): the last token is predicted, never read
    seen = image_inputs(model, image_processor, whole, inputs)
    out = model(input_ids=inputs, use_cache=False, logits_to_keep=targets.shape[1], **seen)
    logits = out.logits[:, -targets.shape[1] :]
    logprobs, spread = score_targets(logits, targets, temperature, banned_ids, entropies)

    steps = torch.arange(int(lengths.max()))
    mask = (steps < lengths[:, None]).to(device, non_blocking=True)
    places = (starts[:, None] - first + steps).clamp_(max=targets.shape[1] - 1).to(device, non_blocking=True)  # (B, T)
    return TokenScores(
        logprobs.gather(1, places).masked_fill(~mask, 0.0), mask, spread.gather(1, places).masked_fill(~mask, 0.0) if entropies else None
    )


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


def score_targets(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, banned_ids: Collection[int], entropies: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, V) logits and (B, N) targets to (B, N) float32 log-probs and entropies (empty unless wanted)."""
    banned = torch.tensor(sorted(i for i in banned_ids if i < logits.shape[-1]), dtype=torch.int64)
    scored: tuple[torch.Tensor, torch.Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, targets, temperature, banned.to(logits.device, non_blocking=True), entropies
    )
    return scored


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[target] in little memory: nothing of the logits' size is kept but the logits.

    With a vocabulary of 250,000 those are most of a training step's memory. Autograd's own log-softmax and gather
    keep a float32 copy and make two more on the way back; this keeps one number per token and makes only the gradient
    itself.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, banned: torch.Tensor, want_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N, V) logits and (B, N) targets to (B, N) float32 log-probs and entropies (empty unless wanted)."""
        flat = targets.reshape(-1)
        logprobs = torch.empty(flat.shape, dtype=torch.float32, device=logits.device)
        norms = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if want_entropy else logprobs.new_empty(0)
        for part, scores in _parts(logits, temperature, banned):
            norm = norms[part] = scores.logsumexp(-1)
            logprobs[part] = scores.gather(1, flat[part, None])[:, 0] - norm
            if want_entropy:
                entropies[part] = torch.special.entr((scores - norm[:, None]).exp_()).sum(-1)
        ctx.save_for_backward(logits, targets, norms, banned)
        ctx.temperature = temperature
        logprobs = logprobs.view_as(targets)
        entropies = entropies.view_as(targets) if want_entropy else entropies
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d logprob / d logit_v = (1[v = target] - p_v) / temperature."""
        logits, targets, norms, banned = ctx.saved_tensors
        flat, scale = targets.reshape(-1), grad.reshape(-1) / ctx.temperature
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows = out.view(-1, logits.shape[-1])
        for part, scores in _parts(logits, ctx.temperature, banned):
            probs = (scores - norms[part, None]).exp_()
            probs.mul_(-scale[part, None]).scatter_add_(1, flat[part, None], scale[part, None])
            rows[part] = probs.to(out.dtype)
        return out, None, None, None, None


def _parts(logits: torch.Tensor, temperature: float, banned: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of the flattened tokens, with their (n, V) float32 logits after temperature and bans (not to be changed)."""
    rows = logits.reshape(-1, logits.shape[-1])
    size = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        part = slice(start, min(start + size, rows.shape[0]))
        scores = rows[part].float()
        if temperature != 1:
            scores = scores / temperature
        if len(banned):
            scores = scores.index_fill(1, banned, float("-inf"))
        yield part, scores


_PAD = -1  # the branch of padding; 0 is the prompt, completions count from 1


class Pack(NamedTuple):
    """A prompt and completions of it, all non-empty."""

    prompt_ids: Sequence[int] | torch.Tensor
    completions: Sequence[Sequence[int] | torch.Tensor]


def sharing_of(model: PreTrainedModel) -> Sharing | None:
    """How a model shares prompts; None where it cannot, or not exactly.

    Asked of it: text only, full attention in every layer, PyTorch's attention kernels, rotary positions; and that a prompt with two
    completions scores them as each on its own, which is tried. In a layer of width w attention over t^2 pairs takes 4 t^2 w multiplications
    and additions, everything else about 24 t w^2: equal at t = 6 w.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    text_only = config.get_text_config() is config
    full = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    rotary = getattr(config, "rope_parameters", None) is not None
    if not (text_only and full and rotary and config._attn_implementation == "sdpa" and _agrees(model)):
        return None
    return Sharing(reach=6 * config.hidden_size)


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Whether a small pack scores its completions as rows do, up to rounding."""
    size = model.config.vocab_size
    prompt, *completions = ([i % size for i in ids] for ids in (range(1, 8), range(11, 16), range(21, 24)))
    packed, mask = shared_logprobs(model, [Pack(prompt, completions)])
    plain, _ = completion_logprobs(model, [Row(prompt, c) for c in completions])
    bound = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((packed - plain)[mask].abs().max() < bound)


def shared_logprobs(
    model: Callable[..., Any], packs: Sequence[Pack], *, temperature: float = 1.0, banned_ids: Collection[int] = (), pad_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logprobs` gives for the completions, pack by pack: log-probs (R, T) float32 and the mask (R, T) bool.

    Args:
        model: one for which `sharing_of` is not None, wrapped for distributed training or not.
        packs: P of them, of N tokens at most; R completions in all, T tokens the longest.
        temperature, banned_ids, pad_id: as there.
    """
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    first = min(len(pack.prompt_ids) for pack in packs) - 1  # place of the earliest token that predicts one of a completion
    laid = [_lay(pack) for pack in packs]
    ids, places, branches = (
        pad_sequence([pack[i] for pack in laid], True, fill).to(device, non_blocking=True) for i, fill in enumerate((pad_id, 0, _PAD))
    )
    targets = pad_sequence([pack[3] for pack in laid], True)[:, first:].to(device, non_blocking=True)
    seen = (branches[:, :, None] == branches[:, None]) | (branches[:, None] == 0)  # (P, N, N): query, key
    out = model(
        input_ids=ids, position_ids=places, attention_mask=seen.tril()[:, None], use_cache=False, logits_to_keep=ids.shape[1] - first
    )
    logprobs, _ = score_targets(out.logits[:, first - ids.shape[1] :], targets, temperature, banned_ids)

    lengths = torch.tensor([len(c) for pack in packs for c in pack.completions])
    steps = torch.arange(int(lengths.max()))
    mask = steps < lengths[:, None]
    where = (_starts(packs, first, ids.shape[1] - first)[:, None] + steps).where(mask, torch.tensor(0))
    mask, where = mask.to(device, non_blocking=True), where.to(device, non_blocking=True)
    return logprobs.flatten().gather(0, where.flatten()).view(where.shape).masked_fill(~mask, 0.0), mask


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

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """(N, V) logits of the N completion tokens of all rows, in the order of rows and tokens."""
        device = next(self.model.parameters()).device
        lengths = [(len(row.prompt_ids), len(row.completion_ids)) for row in rows]
        ids = [torch.tensor([*row.prompt_ids, *row.completion_ids]) for row in rows]
        padded = pad_sequence(ids, batch_first=True, padding_value=self.pad_id).to(device)
        first = min(prompt for prompt, _ in lengths)
        inputs = padded[:, :-1]
        seen = image_inputs(self.model, self.image_processor, rows, inputs)
        logits = self.model(input_ids=inputs, use_cache=False, logits_to_keep=padded.shape[1] - first, **seen).logits
        return torch.cat([row[p - first : p - first + c] for row, (p, c) in zip(logits, lengths, strict=True)])


def _lay(pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions, branches and targets of a pack, (N,) each; no target in the prompt."""
    prompt, *completions = (torch.as_tensor(ids) for ids in (pack.prompt_ids, *pack.completions))
    begins, lengths = len(prompt) - 1, [len(c) for c in completions]
    ids = torch.cat([prompt[:-1], *(part for c in completions for part in (prompt[-1:], c[:-1]))])
    places = torch.cat([torch.arange(begins), *(torch.arange(begins, begins + n) for n in lengths)])
    branches = torch.arange(len(completions) + 1).repeat_interleave(torch.tensor([begins, *lengths]))
    return ids, places, branches, torch.cat([torch.zeros(begins, dtype=torch.int64), *completions])


def _starts(packs: Sequence[Pack], first: int, width: int) -> torch.Tensor:
    """(R,) place of each completion's first token among the targets of all packs, `width` a pack."""
    starts = []
    for i, pack in enumerate(packs):
        place = i * width + len(pack.prompt_ids) - 1 - first
        for completion in pack.completions:
            starts.append(place)
            place += len(completion)
    return torch.tensor(starts)
