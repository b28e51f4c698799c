"""Keyed draws of tokens: a draw depends on a rollout's key and the token's place alone (method.md section 3) [zppo].

The uniform number of token t of a rollout with key k is a counter-based hash of (k, t), so the batch that a rollout
happens to be in, its row there and the order of arrival change nothing. The token is the inverse of the cumulative
distribution at that number, over the distribution after penalties, bans, temperature and truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from zppo.engines.base import Sampling

_GAMMA = 0x9E3779B97F4A7C15  # the increment and the two multipliers of the SplitMix64 generator
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 1 << 64


class Draws(NamedTuple):
    """One drawn token per row: tokens (R,) int64, logprobs (R,) float32, entropies (R,) float32 in nats."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    entropies: torch.Tensor


def _signed(word: int) -> int:
    """A 64-bit word as the signed integer with the same bits: torch has no full arithmetic on unsigned ones."""
    word %= _WORD
    return word - _WORD if word >= _WORD >> 1 else word


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right (torch's own on int64 drags the sign along)."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, elementwise; products wrap around at 64 bits."""
    words = (words ^ _shifted(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shifted(words, 27)) * _signed(_MIX_2)
    return words ^ _shifted(words, 31)


def key_states(keys: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """The generator states of rollouts with these keys, (R,) int64; mixed once, so that neighbours share no numbers."""
    return _mix(torch.tensor([_signed(key) for key in keys], dtype=torch.int64)).to(device)


def uniforms(states: torch.Tensor, step: int) -> torch.Tensor:
    """The uniform numbers in [0, 1) of token `step` (from 0) of every rollout, (R,).

    52 bits in float64: the largest one times any total still rounds below that total, so a draw never runs off the
    end.
    """
    words = _mix(states + _signed((step + 1) * _GAMMA))
    if states.device.type == "mps":  # has no float64
        return _shifted(words, 41).to(torch.float32) * 2.0**-23
    return _shifted(words, 12).to(torch.float64) * 2.0**-52


class Drawer:
    """Draws the tokens of a batch of rollouts, step by step.

    Args:
        sampling: how tokens are drawn. Penalties come first (repetition, then presence), on the raw logits; then bans;
            then temperature, top-k, top-p and min-p, each on what the one before it left.
        keys: one key per row.
        prompts: the prompt of each row; looked at by the repetition penalty only.
        banned_ids: ids that are never drawn; ids beyond the vocabulary are ignored.
    """

    def __init__(
        self,
        sampling: Sampling,
        keys: Sequence[int],
        prompts: Sequence[Sequence[int]],
        banned_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampling = sampling
        self._states = key_states(keys, device)
        self._prompts = prompts if sampling.repetition_penalty != 1 else None
        self._penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty != 0
        self._banned = torch.tensor(sorted(banned_ids), dtype=torch.int64, device=device)
        self._written: torch.Tensor | None = None  # (R, V) bool: in the completion so far
        self._read: torch.Tensor | None = None  # (R, V) bool: in the prompt

    def draw(self, logits: torch.Tensor, step: int) -> Draws:
        """Token `step` (from 0) of every rollout.

        Args:
            logits: (R, V), any float type; its memory is used up.
            step: place of the token in the completion.

        Returns:
            The draws. At temperature 0 all mass lies on the arg max: log-prob and entropy are 0. Logits that are not
            numbers (or a row without a finite one) show as NaN log-probs; the token is then meaningless but within the
            vocabulary.
        """
        logits = logits.float()
        if self._penalised:
            logits = self._penalise(logits)
        if len(self._banned):
            logits.index_fill_(1, self._banned[self._banned < logits.shape[1]], float("-inf"))
        draws = _greedy(logits) if self.sampling.temperature == 0 else self._inverse_cdf(logits, step)
        if self._written is not None:
            self._written.scatter_(1, draws.tokens[:, None], True)
        return draws

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows only, (R',) int64, in this order."""
        self._states = self._states[rows]
        if self._written is not None and self._read is not None:
            self._written, self._read = self._written[rows], self._read[rows]

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        if self._written is None or self._read is None:
            self._written = torch.zeros_like(logits, dtype=torch.bool)
            self._read = torch.zeros_like(self._written)
            for row, prompt in enumerate(self._prompts or ()):
                self._read[row, torch.tensor(prompt, device=logits.device)] = True
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            seen = self._written | self._read
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        return logits - self.sampling.presence_penalty * self._written

    def _inverse_cdf(self, logits: torch.Tensor, step: int) -> Draws:
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        kept, ids = truncate(logits, self.sampling)
        logprobs = kept.log_softmax(-1)
        probs = logprobs.exp()
        numbers = uniforms(self._states, step)
        places = inverse_cdf(probs, numbers)
        tokens = places if ids is None else ids.gather(1, places)
        drawn = logprobs.gather(1, places)[:, 0]
        logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)  # 0 log 0 is 0
        return Draws(tokens[:, 0], drawn, -torch.linalg.vecdot(probs, logprobs))


_BLOCK = 256
"""Tokens whose probabilities are summed first: most of a vocabulary of 150,000 is passed over by their sums."""


def inverse_cdf(probs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Where the cumulative distribution first exceeds a number's share of the whole, (R, 1) int64.

    First over blocks of the vocabulary, then inside of the block that was found, so that only few sums are cumulative ones.

    Args:
        probs: (R, C) float32.
        numbers: (R,) in [0, 1), of the type that sums are taken in: float64 but where there is none.
    """
    rows, width = probs.shape
    blocks = (torch.nn.functional.pad(probs, (0, -width % _BLOCK)) if width % _BLOCK else probs).view(rows, -1, _BLOCK)
    cdf = blocks.sum(-1, dtype=numbers.dtype).cumsum(-1)
    sought = (numbers * cdf[:, -1])[:, None]
    found = torch.searchsorted(cdf, sought, right=True).clamp_(max=blocks.shape[1] - 1)  # only NaN gets beyond
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, found)
    inside = blocks[torch.arange(rows, device=probs.device), found[:, 0]]  # (R, B)
    within = torch.searchsorted(inside.cumsum(-1, dtype=numbers.dtype) + before, sought, right=True)
    # Where the two sums of a block differ by their rounding, the number may lie between them: its last possible token is meant.
    possible = torch.arange(_BLOCK, device=probs.device) * (inside > 0)
    within = torch.minimum(within, possible.amax(-1, keepdim=True))
    return (found * _BLOCK + within).clamp_(max=width - 1)


def _greedy(logits: torch.Tensor) -> Draws:
    best = logits.max(-1)
    zero = best.values - best.values  # 0, or NaN where there is no finite best: found like any other NaN
    return Draws(best.indices, zero, zero)


def truncate(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Top-k, top-p and min-p.

    Args:
        logits: (R, V) float32 after temperature.

    Returns:
        (R, C) logits of the candidates, -inf where cut off, and their ids (R, C), or None where candidates are simply
        the vocabulary. top-p keeps the smallest set of likeliest tokens whose mass reaches top_p, the first one
        always.
    """
    ids = None
    if 0 < sampling.top_k < logits.shape[1]:
        logits, ids = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    if sampling.top_p < 1:
        probs = logits.softmax(-1)
        before = probs.cumsum(-1) - probs
        before[:, 0] = -1.0  # top_p = 0 still leaves one
        logits = logits.masked_fill(before >= sampling.top_p, float("-inf"))
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log().item()
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits, ids
