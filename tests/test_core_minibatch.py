"""Minibatches of whole groups, and micro-batches under a token budget."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo.core.minibatch import deal_groups, micro_batches, pass_tokens, shares

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


def filled_up(lengths: list[int], budget: int) -> list[list[int]]:
    """Sorted rows, each micro-batch as full as the budget admits: the fewest passes, and no look at padding."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[r] for r in batch) for batch in batches)


def least_cost(lengths: list[int], budget: int, overhead: int) -> int:
    """Padded tokens and overheads of the best split, by trying every cut."""
    ordered = sorted(lengths, reverse=True)
    rest = [0]
    for start in reversed(range(len(ordered))):
        ends = [end for end in range(start + 1, len(ordered) + 1) if end == start + 1 or (end - start) * ordered[start] <= budget]
        rest.insert(0, min((end - start) * ordered[start] + overhead + rest[end - start - 1] for end in ends))
    return rest[0]


@given(st.lists(st.integers(1, 60), max_size=25), st.integers(1, 400), st.sampled_from([0, 1, 7, 64, 10_000]))
def test_micro_batches_keep_the_budget_and_cost_least(lengths: list[int], budget: int, overhead: int) -> None:
    batches = micro_batches(lengths, budget, overhead)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= budget
    ordered = [lengths[row] for batch in batches for row in batch]
    assert ordered == sorted(lengths, reverse=True)
    cost = padded(batches, lengths) + overhead * len(batches)
    assert cost == least_cost(lengths, budget, overhead)
    full = filled_up(lengths, budget)
    assert cost <= padded(full, lengths) + overhead * len(full) and len(batches) >= len(full)
    if len(batches) == len(full):
        assert padded(batches, lengths) <= padded(full, lengths)


def test_passes_that_cost_nothing_pad_nothing_and_costly_ones_are_few() -> None:
    lengths = [5, 5, 9, 9, 9, 2]
    assert micro_batches(lengths, 1000, 0) == [[2, 3, 4], [0, 1], [5]]
    assert micro_batches(lengths, 1000, 10_000) == [[2, 3, 4, 0, 1, 5]]


@pytest.mark.parametrize("trivial", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("reformulated", [0, 8])
def test_the_benchmark_batch_computes_at_most_a_tenth_too_much(trivial: float, reformulated: int) -> None:
    """16 prompts of 40-80 tokens, 8 of several hundred; 8 completions each, of 80 on average and 160 at most; I = 4, default budget."""
    needed = computed = full = 0
    for step in range(20):
        rng = random.Random(step)
        prompts = [rng.randint(40, 80) for _ in range(16)] + [rng.randint(200, 600) for _ in range(reformulated)]
        groups = [[p + min(160, max(1, round(rng.gauss(80, 40)))) for _ in range(8)] if rng.random() >= trivial else [] for p in prompts]
        for dealt in deal_groups(len(groups), 4, seed=0, step=step):
            lengths = [length for g in dealt for length in groups[g]]
            needed += sum(lengths)
            computed += padded(micro_batches(lengths, 16_384), lengths)
            full += padded(filled_up(lengths, 16_384), lengths)
    assert computed <= 1.10 * needed < 1.4 * needed < full


def test_a_row_over_the_budget_stands_alone() -> None:
    assert micro_batches([3, 50, 4, 60], 10) == [[3], [1], [2, 0]] and micro_batches([3, 50], 10, 0) == [[1], [0]]


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


def test_a_pass_costs_the_fewer_tokens_the_wider_a_model_is() -> None:
    assert [pass_tokens(width, gpu=False) for width in (32, 128, 256, 576, 4096)] == [64, 64, 36, 16, 3]
    assert pass_tokens(576, gpu=True) == 1024
    lengths = [100, 90, 80, 70]
    assert len(micro_batches(lengths, 10**6, pass_tokens(576, gpu=False))) > len(micro_batches(lengths, 10**6, pass_tokens(64, gpu=False)))
