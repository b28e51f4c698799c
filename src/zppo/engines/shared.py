"""The training forward with the prompt computed once for several of its completions, where a model can do that exactly.

A pack is one sequence: the prompt without its last token, then for each completion a branch of that last token and the
completion. A branch sees the prompt and itself, by an attention mask, and its positions go on from the prompt's, so every
token has the context that it was sampled in. The last prompt token is repeated in every branch so that each token predicts one.

It needs attention that takes such a mask. A recurrence (linear attention) runs through a sequence in its order and cannot branch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from zppo.engines.forward import Row, completion_logprobs, score_targets

LONGEST = 4096
"""Tokens of the longest pack: a mask has so many squared bits, and kernels make numbers of them."""

_PAD = -1  # the branch of padding; 0 is the prompt, completions count from 1


class Pack(NamedTuple):
    """A prompt and completions of it, all non-empty."""

    prompt_ids: Sequence[int] | torch.Tensor
    completions: Sequence[Sequence[int] | torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sharing:
    """When prompts are shared.

    Attributes:
        reach: length at which attention over all pairs of tokens costs as much as everything else (`core.minibatch.share_prompt`).
        most: tokens of the longest pack.
    """

    reach: int
    most: int = LONGEST


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
    model: Callable[..., Any],
    packs: Sequence[Pack],
    *,
    temperature: float = 1.0,
    banned_ids: Collection[int] = (),
    pad_id: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logprobs` gives for the completions, pack by pack: log-probs (R, T) float32 and the mask (R, T) bool.

    Args:
        model: one for which `sharing_of` is not None, wrapped for distributed training or not.
        packs: P of them, of N tokens at most; R completions in all, T tokens the longest.
        temperature, banned_ids, pad_id: as there.
    """
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    first = (
        min(len(pack.prompt_ids) for pack in packs) - 1
    )  # place of the earliest token that predicts one of a completion
    laid = [_lay(pack) for pack in packs]
    ids, places, branches = (
        pad_sequence([pack[i] for pack in laid], True, fill).to(device, non_blocking=True)
        for i, fill in enumerate((pad_id, 0, _PAD))
    )
    targets = pad_sequence([pack[3] for pack in laid], True)[:, first:].to(device, non_blocking=True)
    seen = (branches[:, :, None] == branches[:, None]) | (branches[:, None] == 0)  # (P, N, N): query, key
    out = model(
        input_ids=ids,
        position_ids=places,
        attention_mask=seen.tril()[:, None],
        use_cache=False,
        logits_to_keep=ids.shape[1] - first,
    )
    logprobs, _ = score_targets(out.logits[:, first - ids.shape[1] :], targets, temperature, banned_ids)

    lengths = torch.tensor([len(c) for pack in packs for c in pack.completions])
    steps = torch.arange(int(lengths.max()))
    mask = steps < lengths[:, None]
    where = (_starts(packs, first, ids.shape[1] - first)[:, None] + steps).where(mask, torch.tensor(0))
    mask, where = mask.to(device, non_blocking=True), where.to(device, non_blocking=True)
    return logprobs.flatten().gather(0, where.flatten()).view(where.shape).masked_fill(~mask, 0.0), mask


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
