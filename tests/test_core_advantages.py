"""Advantages against the plain formulas (Eqs. 1-6), their exact zeros, and TRL's group normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from zppo.core.advantages import Scope, group_advantages, two_step_advantages
from zppo.core.loss import clipped_surrogate


def test_plain_lists_are_vectors_too() -> None:
    rewards, groups, graded = [1, 0, 0, 1, 1, 0.5], [0, 0, 0, 1, 1, 1], [True, True, True, True, False, True]
    same = [torch.tensor(rewards), torch.tensor(groups)]
    for compute in (two_step_advantages, group_advantages):
        assert compute(rewards, groups).tolist() == compute(*same).tolist()
        assert compute(rewards, groups, graded=graded).tolist() == compute(*same, graded=torch.tensor(graded)).tolist()
        assert compute(cast(Any, torch.tensor(rewards).numpy()), tuple(groups)).tolist() == compute(*same).tolist()
        with pytest.raises(TypeError, match="groups must be a vector of numbers"):
            compute(rewards, ["a"] * 6)  # type: ignore[list-item]
        with pytest.raises(TypeError, match="rewards must be a vector of numbers"):
            compute([None] * 6, groups)  # type: ignore[list-item]
        with pytest.raises(ValueError, match=r"graded \(2,\) must be as long as rewards \(6,\)"):
            compute(rewards, groups, graded=[True, False])
        with pytest.raises(ValueError, match="two vectors of one length"):
            compute([rewards], [groups])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="old_logprobs is a list: give a tensor"):
        clipped_surrogate(torch.zeros(1, 2), [[0.0, 0.0]], torch.zeros(1))  # type: ignore[arg-type]


SCOPES: tuple[Scope, ...] = ("nontrivial", "all", "none")
EPS = 1e-8
scopes = st.sampled_from(SCOPES)
reward = st.one_of(st.sampled_from([0.0, 1.0]), st.sampled_from([0.1, 0.3, -1.0, 0.5, 2.0]), st.floats(-3, 3, width=32))

Row = tuple[float, int, bool]  # reward, group id, graded
rows_of_a_step = st.lists(st.tuples(reward, st.integers(-2, 5), st.sampled_from([True, True, True, False])), max_size=40)


def tensors(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([r for r, _, _ in rows], dtype=torch.float64),
        torch.tensor([g for _, g, _ in rows], dtype=torch.int64),
        torch.tensor([v for _, _, v in rows], dtype=torch.bool),
    )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def plain_two_step(rows: Sequence[Row], scope: Scope, eps: float = EPS) -> list[float]:
    """Eqs. 2-5 in numbers: one rollout after the other."""
    by_group: dict[int, list[float]] = {}
    for r, g, graded in rows:
        if graded:
            by_group.setdefault(g, []).append(r)
    varied = {g for g, rewards in by_group.items() if max(rewards) > min(rewards)}
    first = [r - mean_and_deviation(by_group[g])[0] if v and g in varied else 0.0 for r, g, v in rows]
    if scope == "none":
        return first
    inside = [a for a, (_, g, v) in zip(first, rows, strict=True) if v and (scope == "all" or g in varied)]
    if not inside:
        return [0.0] * len(rows)
    mean, deviation = mean_and_deviation(inside)
    return [(a - mean) / (deviation + eps) if v and g in varied else 0.0 for a, (_, g, v) in zip(first, rows, strict=True)]


def plain_group(rows: Sequence[Row], eps: float = EPS) -> list[float]:
    """Eq. 1 in numbers."""
    by_group: dict[int, list[float]] = {}
    for r, g, graded in rows:
        if graded:
            by_group.setdefault(g, []).append(r)
    out = []
    for r, g, graded in rows:
        varied = graded and max(by_group[g]) > min(by_group[g])
        mean, deviation = mean_and_deviation(by_group[g]) if varied else (r, 1.0)
        out.append((r - mean) / (deviation + eps))
    return out


def close(found: torch.Tensor, expected: Sequence[float]) -> bool:
    return torch.allclose(found, torch.tensor(expected, dtype=torch.float32), rtol=2e-5, atol=2e-6)


@given(rows_of_a_step, scopes)
def test_two_step_is_the_plain_formula(rows: list[Row], scope: Scope) -> None:
    rewards, groups, graded = tensors(rows)
    found = two_step_advantages(rewards, groups, scope, graded=graded)
    assert found.dtype == torch.float32 and found.shape == (len(rows),)
    assert close(found, plain_two_step(rows, scope))


@given(rows_of_a_step)
def test_group_is_the_plain_formula(rows: list[Row]) -> None:
    rewards, groups, graded = tensors(rows)
    assert close(group_advantages(rewards, groups, graded=graded), plain_group(rows))


def test_a_worked_example() -> None:
    """A' = 3/4, -1/4 x3, then 1/2 x2, -1/2 x2, then zeros; over the 8 non-trivial rows the variance is 7/32."""
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.float32)
    groups = torch.tensor([5] * 4 + [9] * 4 + [2] * 4)
    first = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5, 0, 0, 0, 0])
    deviation = (7 / 32) ** 0.5
    assert two_step_advantages(rewards, groups, "none").tolist() == first.tolist()
    torch.testing.assert_close(two_step_advantages(rewards, groups), first / deviation)
    torch.testing.assert_close(two_step_advantages(rewards, groups, "all"), first / (deviation * (8 / 12) ** 0.5))
    by_group = torch.tensor([0.75 / 0.1875**0.5] + [-0.25 / 0.1875**0.5] * 3 + [1.0, 1.0, -1.0, -1.0] + [0.0] * 4)
    torch.testing.assert_close(group_advantages(rewards, groups), by_group)


@given(st.integers(2, 8), st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_eq_6_scope_all_is_larger_by_one_over_root_f(size: int, right: list[int]) -> None:
    """The rows outside S have A' = 0 and every mean is 0, so var_all = f var_S, and A_all = A_S sqrt(var_S / var_all) = A_S / sqrt(f)."""
    right = [min(r, size) for r in right]
    varied = sum(0 < r < size for r in right)
    assume(varied)
    rewards = torch.tensor([[1.0] * r + [0.0] * (size - r) for r in right]).flatten()
    groups = torch.arange(len(right)).repeat_interleave(size)
    over_all = two_step_advantages(rewards, groups, "all", eps=0.0)
    over_varied = two_step_advantages(rewards, groups, "nontrivial", eps=0.0)
    torch.testing.assert_close(over_all, over_varied / (varied / len(right)) ** 0.5)


@given(st.floats(-1e6, 1e6), st.integers(1, 16), st.booleans(), st.booleans(), scopes, st.sampled_from([0.0, EPS]))
def test_equal_rewards_give_exactly_zero(value: float, size: int, beside: bool, single: bool, scope: Scope, eps: float) -> None:
    """Alone or beside a group that learns, whatever the mean of equal numbers rounds to, with eps = 0 too."""
    dtype = torch.float32 if single else torch.float64
    rewards = torch.tensor([value] * size + [0.0, 1.0] * beside, dtype=dtype)
    groups = torch.tensor([1] * size + [0, 0] * beside)
    for found in (two_step_advantages(rewards, groups, scope, eps=eps), group_advantages(rewards, groups, eps=eps)):
        assert found[:size].tolist() == [0.0] * size
        assert found.isfinite().all() and found[size:].count_nonzero() == 2 * beside


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e-30, 1e30])
def test_rewards_that_floats_cannot_average_exactly(value: float) -> None:
    rewards, groups = torch.full((24,), value, dtype=torch.float64), torch.arange(3).repeat_interleave(8)
    for scope in SCOPES:
        assert not two_step_advantages(rewards, groups, scope).any()
    assert not group_advantages(rewards, groups).any()


def test_rewards_that_differ_by_rounding_alone_push_nothing() -> None:
    """0.1 + 0.2 is not 0.3: such a group counts as non-trivial, but eps keeps its advantages at rounding size."""
    noisy = [0.1 + 0.2, 0.3] * 4
    for rest in ([], [0.0, 1.0]):
        rewards = torch.tensor(noisy + rest, dtype=torch.float64)
        groups = torch.tensor([0] * 8 + [1] * len(rest))
        for scope in SCOPES:
            assert two_step_advantages(rewards, groups, scope)[:8].abs().max() < 1e-6
        assert group_advantages(rewards, groups)[:8].abs().max() < 1e-6


@given(rows_of_a_step, scopes, st.sampled_from([float("nan"), float("inf"), 0.0, 7.0]))
def test_ungraded_rows_get_zero_and_touch_nobody(rows: list[Row], scope: Scope, junk: float) -> None:
    rewards, groups, graded = tensors(rows)
    rewards = rewards.where(graded, junk)
    for found, without in (
        (two_step_advantages(rewards, groups, scope, graded=graded), two_step_advantages(rewards[graded], groups[graded], scope)),
        (group_advantages(rewards, groups, graded=graded), group_advantages(rewards[graded], groups[graded])),
    ):
        assert found[~graded].tolist() == [0.0] * int((~graded).sum())
        torch.testing.assert_close(found[graded], without)


@given(rows_of_a_step, scopes, st.randoms(use_true_random=False))
def test_the_order_of_rows_and_the_names_of_groups_say_nothing(rows: list[Row], scope: Scope, rng: object) -> None:
    rewards, groups, graded = tensors(rows)
    order = list(range(len(rows)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    index = torch.tensor(order, dtype=torch.int64)
    moved = two_step_advantages(rewards[index], 1000 - 7 * groups[index], scope, graded=graded[index])
    torch.testing.assert_close(moved, two_step_advantages(rewards, groups, scope, graded=graded)[index], atol=1e-6, rtol=1e-5)


@given(rows_of_a_step)
def test_two_step_has_mean_zero_and_deviation_one_over_its_groups(rows: list[Row]) -> None:
    rewards, groups, graded = tensors(rows)
    assume(float(two_step_advantages(rewards, groups, "none", graded=graded).abs().sum()) > 1e-3)
    found = two_step_advantages(rewards, groups, "nontrivial", graded=graded, eps=0.0).double()
    members = sum(v and len({r for r, other, w in rows if w and other == g}) > 1 for _, g, v in rows)
    assert abs(float(found.sum())) < 1e-4
    assert float((found**2).sum()) == pytest.approx(members, rel=1e-4)


@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 2**30))
def test_group_advantages_are_trl_s_up_to_its_sample_deviation(size: int, count: int, seed: int) -> None:
    """TRL divides by the sample deviation (n - 1) plus 1e-4, Eq. 1 by the population's (n): ours are sqrt(n / (n - 1)) times as large."""
    from trl.trainer.utils import nanstd

    rewards = torch.rand(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / nanstd(rewards, dim=1).unsqueeze(1)
    ours = group_advantages(rewards.flatten(), torch.arange(count).repeat_interleave(size), eps=0.0)
    torch.testing.assert_close(ours, (theirs * (size / (size - 1)) ** 0.5).flatten().float())


def test_rewards_far_from_zero_lose_nothing() -> None:
    """float64 inside: fp32 could not tell 1e9 from 1e9 + 1."""
    rewards, groups = (torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1]))
    for scope in SCOPES:
        torch.testing.assert_close(two_step_advantages(rewards + 1e9, groups, scope), two_step_advantages(rewards, groups, scope))
    torch.testing.assert_close(group_advantages(rewards + 1e9, groups), group_advantages(rewards, groups))


def test_an_empty_step_gives_an_empty_tensor() -> None:
    empty, no_groups = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for scope in SCOPES:
        assert two_step_advantages(empty, no_groups, scope).shape == (0,)
    assert group_advantages(empty, no_groups).shape == (0,)


def test_what_is_refused() -> None:
    rewards, groups = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])
    for call in (two_step_advantages, group_advantages):
        with pytest.raises(ValueError, match="one length"):
            call(rewards, torch.tensor([0]))
        with pytest.raises(ValueError, match="one length"):
            call(rewards.view(1, 2), groups.view(1, 2))
        with pytest.raises(ValueError, match="NaN or infinite"):
            call(torch.tensor([0.0, float("nan")]), groups)
    with pytest.raises(ValueError, match="'best'"):
        two_step_advantages(rewards, groups, "best")  # type: ignore[arg-type]
