"""Which questions a step trains on: a function of (seed, step) alone, so a resumed run needs no state for it."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from math import gcd

from zppo.core.draws import keyed_random


def batch_ids(n: int, batch_size: int, seed: int, step: int, epochs: int | None = None) -> list[int]:
    """Indices of the new questions of a step (X_new, Algorithm 1), each in [0, n) and none twice.

    Every epoch covers every question once, in an order of its own. A last batch that is smaller than `batch_size` is carried into the
    next epoch; with `epochs` given, the last batch of the last one is returned as it is ([zppo], method.md section 3). [zppo] Where a
    batch crosses into an epoch, the questions that it holds already come later in that epoch, and a data set smaller than
    `batch_size` makes batches of its own size: a question never stands twice in one batch, where equal keys would draw equal rollouts.

    Args:
        n: number of questions.
        batch_size: questions per step.
        seed: of the run.
        step: from 0.
        epochs: where the data end; None: they never do.

    Raises:
        ValueError: no questions, a step below 0, or a step after the end of the data.
    """
    size = effective_batch(n, batch_size)
    first = step * size
    end = first + size if epochs is None else min(first + size, n * epochs)
    if step < 0 or first >= end:
        raise ValueError(f"there is no step {step}: {n} questions in batches of {size}, epochs={epochs}")
    batch: list[int] = []
    for epoch in range(first // n, (end - 1) // n + 1):
        start = epoch * n
        batch += _epoch_order(n, size, seed, epoch)[max(first - start, 0) : end - start]
    return batch


def steps_per_epochs(n: int, batch_size: int, epochs: int) -> int:
    """Steps that `epochs` passes over `n` questions take, the last one possibly smaller."""
    return -(-n * epochs // effective_batch(n, batch_size))


def effective_batch(n: int, batch_size: int) -> int:
    """Questions in a full batch: `batch_size`, or all of a data set that is smaller [zppo]."""
    if n < 1 or batch_size < 1:
        raise ValueError(f"no batches of {batch_size} out of {n} questions")
    return min(n, batch_size)


def _epoch_order(n: int, size: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch. Its head depends on the end of the epoch before, so the walk starts at the last one that is known."""
    known = _known_orders(n, size, seed)
    if epoch not in known:
        # Every so many epochs a batch ends with the epoch; nothing is carried there, so no earlier epoch matters.
        period = size // gcd(n, size)
        last = max((e for e in known if e < epoch), default=-1)
        for e in range(max(last + 1, epoch - epoch % period), epoch + 1):
            carried = e * n % size
            known[e] = _order(n, seed, e, known[e - 1][n - carried :] if carried else [], size - carried)
            known.pop(e - 2, None)
    return known[epoch]


@lru_cache(maxsize=4)
def _known_orders(n: int, size: int, seed: int) -> dict[int, list[int]]:
    """Orders of the epochs worked out last: a cache, nothing that decides anything."""
    return {}


def _order(n: int, seed: int, epoch: int, carried: list[int], head_size: int) -> list[int]:
    """A keyed permutation of which the first `head_size` entries are none of `carried`."""
    order = list(range(n))
    keyed_random(seed, "epoch", epoch).shuffle(order)
    if not carried:
        return order
    taken = set(carried)
    head = list(islice((index for index in order if index not in taken), head_size))
    in_head = set(head)
    return head + [index for index in order if index not in in_head]
