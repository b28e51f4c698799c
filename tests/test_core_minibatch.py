"""Minibatches of whole groups, and micro-batches under a token budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zppo.core.minibatch import deal_groups, micro_batches, shares

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


@given(st.lists(st.floats(0, 1e6), max_size=30), st.integers(1, 6))
def test_shares_deal_everything_once_and_evenly(costs: list[float], count: int) -> None:
    dealt = shares(costs, count)
    assert len(dealt) == count and sorted(i for share in dealt for i in share) == list(range(len(costs)))
    heaviest = max(sum(costs[i] for i in share) for share in dealt)
    assert heaviest <= sum(costs) / count + max(costs, default=0) + 1e-3
    assert dealt == shares(list(costs), count)


def test_equal_items_are_dealt_in_turn() -> None:
    assert shares([1.0] * 5, 2) == [[0, 2, 4], [1, 3]] and shares([0.0] * 4, 2) == [[0, 2], [1, 3]]
    assert shares([1.0], 3) == [[0], [], []]
