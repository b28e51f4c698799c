"""Minibatches of whole groups, and micro-batches under a token budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zppo.core.minibatch import deal_groups, micro_batches

counts = st.integers(0, 80)


@given(counts, st.integers(1, 12), st.integers(0, 9), st.integers(0, 99))
def test_every_group_once_and_sizes_differ_by_at_most_one(count: int, minibatches: int, seed: int, step: int) -> None:
    dealt = deal_groups(count, minibatches, seed=seed, step=step)
    assert sorted(g for batch in dealt for g in batch) == list(range(count))
    assert len(dealt) == min(count, minibatches)  # one without groups is left out
    if dealt:
        sizes = [len(batch) for batch in dealt]
        assert max(sizes) - min(sizes) <= 1
    assert dealt == deal_groups(count, minibatches, seed=seed, step=step)


@given(st.integers(1, 80), st.integers(0, 9), st.integers(0, 99))
def test_dealing_is_one_permutation_round_robin(count: int, seed: int, step: int) -> None:
    """How many minibatches there are changes the dealing, never the permutation."""
    (order,) = deal_groups(count, 1, seed=seed, step=step)
    for minibatches in (2, 3, 5):
        dealt = deal_groups(count, minibatches, seed=seed, step=step)
        assert [dealt[i % minibatches][i // minibatches] for i in range(count)] == order


def test_seed_and_step_change_the_permutation() -> None:
    orders = {tuple(deal_groups(30, 1, seed=seed, step=step)[0]) for seed in range(5) for step in range(5)}
    assert len(orders) == 25


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 200))
def test_micro_batches_keep_the_budget(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= budget
    ordered = [lengths[row] for batch in batches for row in batch]
    assert ordered == sorted(lengths, reverse=True)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * lengths[batch[0]] > budget or lengths[batch[0]] == 0, "one more row would have fitted"
        assert lengths[batch[-1]] >= lengths[following[0]]


def test_a_row_over_the_budget_stands_alone() -> None:
    assert micro_batches([3, 50, 4, 60], 10) == [[3], [1], [2, 0]]
