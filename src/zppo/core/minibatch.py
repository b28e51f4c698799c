"""From a rollout step to optimizer steps: I minibatches of whole groups, and micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence

from zppo.core.draws import keyed_random


def deal_groups(count: int, minibatches: int, *, seed: int, step: int) -> list[list[int]]:
    """Group indices per minibatch: permuted by (seed, step), dealt round-robin (ours).

    Independent of the number of processes. Minibatches without a group are left out, so fewer than I may come back.
    """
    order = list(range(count))
    keyed_random(seed, "minibatches", step).shuffle(order)
    return [dealt for i in range(minibatches) if (dealt := order[i::minibatches])]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row indices per micro-batch: sorted by length, rows x longest row <= budget; a row over the budget stands alone.

    Args:
        lengths: tokens of each row, prompt and completion.
        budget: padded tokens of one micro-batch.

    Returns:
        Longest rows first, so that running out of memory shows at once.
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if not batches or len(batches[-1]) >= room:
            batches.append([])
            room = max(1, budget // max(1, lengths[row]))
        batches[-1].append(row)
    return batches


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Indices of `costs` dealt to `count` processes, costly ones first, each to the process with least to do (ours).

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
