"""From a rollout step to optimizer steps: I minibatches of whole groups, each process's share, micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zppo.core.credit import Credit
from zppo.core.draws import keyed_random
from zppo.core.types import Group, Prompt, Rollout, Row

if TYPE_CHECKING:  # a plan of a run splits rows before torch is needed
    import torch


def deal_groups(count: int, minibatches: int, *, seed: int, step: int) -> list[list[int]]:
    """Group indices per minibatch: permuted by (seed, step), dealt round-robin [zppo].

    Independent of the number of processes. Minibatches without a group are left out, so fewer than I may come back.
    """
    order = list(range(count))
    keyed_random(seed, "minibatches", step).shuffle(order)
    return [dealt for i in range(minibatches) if (dealt := order[i::minibatches])]


PASS_TOKENS = 64
"""What a forward and backward pass costs in addition to its tokens, in tokens, of a small model. Measured on a CPU: 70 with 4 layers of
width 128, 38 of width 256, 19 with 8 of width 512 (140 to 1,120 tokens a pass)."""

PASS_TOKENS_GPU = 1024
"""The same where a pass is at least as long as it takes to launch its kernels: an estimate, not a measurement (25 layers take about
50 ms there, in which a card computes some thousand tokens of a model of 1B; less of a larger one)."""


def pass_tokens(width: int, *, gpu: bool) -> int:
    """What a pass costs in addition to its tokens, in tokens: on a CPU the less, the wider the model is (9,000 / width, see above)."""
    return PASS_TOKENS_GPU if gpu else min(PASS_TOKENS, 9_000 // width + 1)


MERGED_TOKENS = 768
"""What a CPU computes of several packs in one pass, at most. Measured with models of width 128 to 576: two rows of 280 tokens take about 2%
less in one pass than in two, two of 560 tokens no less, and they hold twice as much."""


_HEAD_LOGITS, _HEAD_LOGITS_GPU = 1 << 24, 1 << 27  # so many that moving the output layer's weights is not most of a chunk's time
_DIVERGED = 4


def head_tokens(vocab: int, *, gpu: bool, diverges: bool = False) -> int:
    """Tokens whose logits an update looks at in one go, so that they take the same memory whatever the vocabulary is.

    Args:
        diverges: from a teacher's; that holds about `_DIVERGED` times as much of them as a log-prob.
    """
    return max(1, (_HEAD_LOGITS_GPU if gpu else _HEAD_LOGITS) // (_DIVERGED if diverges else 1) // vocab)


def micro_batches(lengths: Sequence[int], budget: int, overhead: int = PASS_TOKENS) -> list[list[int]]:
    """Row indices per micro-batch: sorted by length, rows x longest row <= budget; a row over the budget stands alone [zppo].

    Of all such splits it is one with the least padded tokens + `overhead` x micro-batches: a single micro-batch pads rows of
    mixed lengths to the longest, one for every length pads nothing and takes as many passes. The rows are sorted, so a split is a
    set of cuts, which dynamic programming finds.

    Args:
        lengths: tokens of each row, prompt and completion.
        budget: padded tokens of one micro-batch.
        overhead: what a pass costs in addition to its tokens, in tokens.

    Returns:
        Longest rows first, so that running out of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda r: (-lengths[r], r))
    rest = [0] * (len(order) + 1)  # least cost of the rows from here on
    cuts = [len(order)] * (len(order) + 1)  # where the first micro-batch of those ends
    for start in reversed(range(len(order))):
        longest = lengths[order[start]]
        # Never behind the best cut of the row after it: padding grows with the longest row (the costs are a Monge array).
        last = max(start + 1, min(start + budget // max(1, longest), cuts[start + 1]))
        rest[start], cuts[start] = min(((end - start) * longest + overhead + rest[end], -end) for end in range(start + 1, last + 1))
        cuts[start] *= -1
    batches, start = [], 0
    while start < len(order):
        batches.append(order[start : cuts[start]])
        start = cuts[start]
    return batches


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass computes.

    Attributes:
        packs: row indices; rows of one pack have the same prompt, which is computed once for them.
        width: tokens of the longest pack.
    """

    packs: list[list[int]]
    width: int

    @property
    def rows(self) -> list[int]:
        """Row indices, pack by pack."""
        return [row for pack in self.packs for row in pack]

    @property
    def padded(self) -> int:
        """Tokens, padding included."""
        return len(self.packs) * self.width


_DEARER = 1.05  # what smaller packs, which hold less at once, may cost: packs of half the tokens have half of the activations


def share_prompt(prompt: int, completions: Sequence[int], *, reach: int, most: int) -> list[list[int]]:
    """Completions of one prompt in packs that compute the prompt once, where that takes less than each on its own [zppo].

    A pack is one sequence, prompt and all its completions, in which no completion sees another. A pack takes its tokens, and the pairs of
    them that see one another / reach; of the splits that cost about the least, the one with the smallest packs is taken.

    Args:
        prompt: tokens of the prompt.
        completions: tokens of each completion.
        reach: length at which attention over all pairs costs as much as everything else in a model.
        most: tokens of the largest pack of several completions.

    Returns:
        Indices of `completions` per pack, each pack with long and short ones.
    """
    order = sorted(range(len(completions)), key=lambda i: (-completions[i], i))
    splits = [[order[i::count] for i in range(count)] for count in range(len(order), 0, -1)]
    lengths = [[prompt + sum(completions[i] for i in pack) for pack in packs] for packs in splits]
    own = sum(c * (prompt + c) for c in completions) / reach
    costs = [sum(each) + len(each) * prompt * prompt / reach + own for each in lengths]
    admitted = [i for i, each in enumerate(lengths) if i == 0 or max(each) <= most]
    least = min(costs[i] for i in admitted)
    cheap = [i for i in admitted if costs[i] <= _DEARER * least]
    return splits[min(cheap, key=lambda i: (max(lengths[i]), costs[i]))]


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices of `costs` dealt to `count` processes, costly ones first, each to the process with least to do [zppo].

    A function of its arguments, so that every process can work out what each of them does. No share costs more than the
    mean plus the costliest item; a share may be empty.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    load = [0.0] * count
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        process = min(range(count), key=lambda p: (load[p], len(dealt[p]), p))
        dealt[process].append(index)
        load[process] += costs[index]
    return [sorted(share) for share in dealt]


@dataclass(frozen=True, slots=True)
class Sharing:
    """When prompts are shared.

    Attributes:
        reach: length at which attention over all pairs of tokens costs as much as everything else (`share_prompt`).
        most: tokens of the longest pack: a mask has so many squared bits.
    """

    reach: int
    most: int = 4096


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout on its way into the loss.

    Attributes:
        row: what its gradient is of.
        sampled_logprobs: (T,) of the policy that drew it; NaN where nobody knows them.
        advantage: of the rollout.
        counted: stands in the token-level denominator.
        drawn: what it was sampled from, where that is another prompt than the row's.
        gamma: of `shaped_surrogate`; None for the clipped one.
    """

    row: Row
    sampled_logprobs: torch.Tensor
    advantage: float
    counted: bool
    drawn: Row | None = None
    gamma: float | None = None

    @property
    def tokens(self) -> int:
        return len(self.row.completion_ids)

    @property
    def length(self) -> int:
        return len(self.row.prompt_ids) + self.tokens

    @property
    def foreign(self) -> bool:
        """Whether the student did not sample it (Teacher response), so that no sampler knows its log-probs."""
        return bool(self.sampled_logprobs.isnan().any())

    @property
    def fixed(self) -> bool:
        """Whether its old log-probs are what they are said to be, whatever a forward pass says (LUFFY's: a probability of 1)."""
        return self.gamma is not None and self.drawn is None

    @property
    def comparable(self) -> bool:
        """Whether the sampler's log-probs should be the trainer's."""
        return self.gamma is None and self.drawn is None and not self.foreign

    @property
    def scored(self) -> Sample:
        """What a forward pass takes old log-probs from."""
        return self if self.drawn is None else replace(self, row=self.drawn)

    @property
    def live(self) -> bool:
        """Whether it has a gradient at all: with no KL term, a rollout with A = 0 has exactly none."""
        return self.counted and self.advantage != 0


def samples_of(
    groups: Sequence[Group], advantages: torch.Tensor, *, mask_truncated: bool, credit: Credit = "shown", gamma: float | None = None
) -> list[list[Sample]]:
    """Samples per group; an ungraded rollout stands in no statistics, and so not in the loss's denominator either [zppo].

    Args:
        credit: which prompt the gradient is on, for rollouts that were sampled from another one than their group's.
        gamma: how what the student did not sample from that prompt is shaped (`shaped_surrogate`); None: not at all.
    """
    values = iter(advantages.tolist())

    def sample(group: Group, rollout: Rollout) -> Sample:
        ids, drawn = tuple(rollout.ids.tolist()), rollout.drawn
        made = Sample(
            _row(group.prompt, ids), rollout.logprobs, next(values), rollout.graded and not (mask_truncated and rollout.truncated)
        )
        if drawn is None:
            taught = gamma is not None and made.foreign
            return replace(made, sampled_logprobs=rollout.logprobs.new_zeros(len(ids)), gamma=gamma) if taught else made
        if credit == "shown":
            return replace(made, row=_row(drawn, ids))
        on_plain = Row(group.prompt.ids + drawn.forced_ids, ids, group.prompt.images)
        return replace(made, row=on_plain, drawn=_row(drawn, ids), gamma=gamma)

    return [[sample(group, rollout) for rollout in group.rollouts] for group in groups]


def _row(prompt: Prompt, completion: tuple[int, ...]) -> Row:
    return Row(prompt.ids + prompt.forced_ids, completion, prompt.images)


@dataclass(frozen=True, slots=True)
class Share:
    """What one process does of a minibatch [zppo].

    Attributes:
        rows: (group, rollout) of its rows that have a gradient: whole groups.
        others: the rows of every other process.
    """

    rows: list[tuple[int, int]]
    others: list[list[tuple[int, int]]]


def share_minibatch(samples: Sequence[Sequence[Sample]], dealt: Sequence[int], *, rank: int, size: int) -> Share:
    """The share of a process in a minibatch of the groups `dealt`, balanced by tokens. All processes work out the same."""
    live = [[(g, i) for i, s in enumerate(samples[g]) if s.live] for g in dealt]
    parts = shares([sum(samples[g][i].length for g, i in rows) for rows in live], size)
    rows = [[row for part in mine for row in live[part]] for mine in parts]
    return Share(rows[rank], [*rows[:rank], *rows[rank + 1 :]])


def packed(samples: Sequence[Sample], sharing: Sharing, most: int) -> list[list[int]]:
    """Indices of samples in packs that compute their prompt once, where that pays; of at most `most` tokens, if several share one.

    Rows with images stay alone.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        if not sample.row.images:
            by_prompt.setdefault(tuple(sample.row.prompt_ids), []).append(i)
    packs = [[i] for i, sample in enumerate(samples) if sample.row.images]
    for prompt, members in by_prompt.items():
        tokens = [samples[i].tokens for i in members]
        dealt = share_prompt(len(prompt), tokens, reach=sharing.reach, most=min(most, sharing.most))
        packs += [[members[j] for j in pack] for pack in dealt]
    return packs


def pack_length(samples: Sequence[Sample], pack: Sequence[int]) -> int:
    """Tokens of a prompt and its completions."""
    return len(samples[pack[0]].row.prompt_ids) + sum(samples[i].tokens for i in pack)
