"""Keyed draws: the hash, the truncations and the penalties against plain re-statements of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.engines.base import Sampling
from zppo.engines.keyed_sampling import Drawer, inverse_cdf, key_states, truncate, uniforms

MASK = (1 << 64) - 1


def plain_mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_uniform(key: int, step: int) -> float:
    return (plain_mix((plain_mix(key) + (step + 1) * 0x9E3779B97F4A7C15) & MASK) >> 12) * 2.0**-52


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(0, 20_000))
def test_uniforms_are_a_counter_based_hash(keys: list[int], step: int) -> None:
    assert uniforms(key_states(keys), step).tolist() == [plain_uniform(key, step) for key in keys]


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    numbers = torch.stack([uniforms(key_states(range(2_000)), step) for step in range(20)])
    counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
    assert float(((counts - 2_000) ** 2 / 2_000).sum()) < 45  # chi-square, 19 degrees of freedom: 0.9993 quantile 45
    flat = numbers - 0.5
    assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 0.002  # neighbouring keys
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 0.002  # neighbouring steps


def plain_truncation(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids that stay, each rule on what the one before it left."""
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        kept = kept[:top_k]
    total = sum(math.exp(logits[i]) for i in kept)
    if top_p < 1:
        mass, nucleus = 0.0, []
        for i in kept:
            if nucleus and mass >= top_p:
                break
            nucleus.append(i)
            mass += math.exp(logits[i]) / total
        kept = nucleus
    best = math.exp(logits[kept[0]])
    return {i for i in kept if math.exp(logits[i]) >= min_p * best}


@settings(max_examples=200, deadline=None)
@given(
    st.permutations(range(12)),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]),
    st.sampled_from([0.0, 0.07, 0.4, 1.0]),
    st.floats(0.05, 0.9),
)
def test_truncations_match_a_plain_restatement(order: list[int], top_k: int, top_p: float, min_p: float, spread: float) -> None:
    logits = [spread * i + 0.013 * i * i for i in order]  # no ties
    values, ids = truncate(torch.tensor([logits]), Sampling(top_k=top_k, top_p=top_p, min_p=min_p))
    places = values[0].isfinite().nonzero()[:, 0]
    kept = places if ids is None else ids[0, places]
    assert set(kept.tolist()) == plain_truncation(logits, top_k, top_p, min_p)
    assert torch.equal(values[0, places], torch.tensor(logits)[kept])


@pytest.mark.parametrize("width", [7, 256, 257, 5_000])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0])
def test_the_inverse_equals_one_cumulative_sum(width: int, spread: float) -> None:
    """Over the vocabulary as a whole, with half of it impossible in every other row; the ends of the unit interval are possible tokens."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(400, width, generator=generator) * spread
    logits[::2, torch.randperm(width, generator=generator)[: width // 2]] = float("-inf")
    probs, numbers = logits.softmax(-1), uniforms(key_states(range(400)), 3)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(cdf, (numbers * cdf[:, -1])[:, None], right=True)
    assert torch.equal(inverse_cdf(probs, numbers), expected)
    for end in (0.0, 1 - 2.0**-52):
        assert (probs.gather(1, inverse_cdf(probs, torch.full_like(numbers, end))) > 0).all()


def test_numbers_that_are_none_stay_within_the_vocabulary() -> None:
    assert inverse_cdf(torch.full((2, 300), float("nan")), uniforms(key_states([1, 2]), 0)).max() < 300


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=4)])
def test_frequencies_and_scores_follow_the_distribution(sampling: Sampling) -> None:
    rows = 20_000
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0, 0.9])
    expected = logits / sampling.temperature
    if sampling.top_k:
        expected[expected.topk(2, largest=False).indices] = -math.inf
    probs = expected.softmax(-1)
    drawer = Drawer(sampling, range(rows), [(0,)] * rows)
    draws = drawer.draw(logits.repeat(rows, 1), 0)
    counts, live = draws.tokens.bincount(minlength=6), probs > 0
    assert int(counts[~live].sum()) == 0
    chi = ((counts - rows * probs) ** 2 / (rows * probs))[live].sum()
    assert float(chi) < 22  # 5 degrees of freedom: 0.9995 quantile 22
    torch.testing.assert_close(draws.logprobs, probs.log()[draws.tokens])
    torch.testing.assert_close(draws.entropies, torch.full((rows,), float(torch.special.entr(probs).sum())))


def test_bans_take_their_share_away_from_the_others() -> None:
    drawer = Drawer(Sampling(), range(500), [(0,)] * 500, banned_ids=(1, 99))
    draws = drawer.draw(torch.tensor([[0.0, 5.0, 0.0]]).repeat(500, 1), 0)
    assert set(draws.tokens.tolist()) == {0, 2}
    torch.testing.assert_close(draws.logprobs, torch.full((500,), math.log(0.5)))


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((4_000, 7), -math.inf)
    logits[:, [2, 4]] = 0.0
    assert set(Drawer(Sampling(), range(4_000), [(0,)] * 4_000).draw(logits, 3).tokens.tolist()) == {2, 4}


def test_penalties_look_at_the_completion_and_repetition_at_the_prompt_too() -> None:
    sampling = Sampling(temperature=0, presence_penalty=1.5, repetition_penalty=2.0)
    drawer = Drawer(sampling, [1, 2], [(0,), (3, 3)])
    logits = torch.tensor([3.0, 2.0, -1.0, 1.8])
    # Row 0 read 0 (3.0 / 2); row 1 read 3 (1.8 / 2).
    assert drawer.draw(logits.repeat(2, 1), 0).tokens.tolist() == [1, 0]
    # Row 0 wrote 1 (2 / 2 - 1.5); row 1 wrote 0 (3 / 2 - 1.5).
    assert drawer.draw(logits.repeat(2, 1), 1).tokens.tolist() == [3, 1]
    drawer.keep(torch.tensor([1]))  # row 1 alone: 0 is at 0.0, 1 at -0.5, 3 at 0.9
    assert drawer.draw(logits.repeat(1, 1), 2).tokens.tolist() == [3]


def test_presence_penalty_changes_the_scores() -> None:
    drawer = Drawer(Sampling(presence_penalty=1.0), [5], [(0,)])
    first = drawer.draw(torch.zeros(1, 3), 0)
    second = drawer.draw(torch.zeros(1, 3), 1)
    logits = torch.zeros(3)
    logits[first.tokens[0]] = -1.0
    torch.testing.assert_close(second.logprobs[0], logits.log_softmax(-1)[second.tokens[0]])


def test_a_draw_depends_on_key_and_step_alone() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    keys = [11, 22, 33, 44, 55, 66]
    together = Drawer(Sampling(), keys, [(0,)] * 6).draw(logits.clone(), 4).tokens
    order = [4, 1, 5]
    apart = Drawer(Sampling(), [keys[i] for i in order], [(0,)] * 3).draw(logits[order], 4).tokens
    assert together[order].tolist() == apart.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_show_as_nan(temperature: float) -> None:
    drawer = Drawer(Sampling(temperature=temperature), [1, 2, 3], [(0,)] * 3)
    logits = torch.tensor([[math.nan, 1.0], [-math.inf, -math.inf], [0.0, 1.0]])
    draws = drawer.draw(logits, 0)
    assert draws.logprobs.isnan().tolist() == [True, True, False]
    assert 0 <= int(draws.tokens.min()) <= int(draws.tokens.max()) < 2


def test_greedy_takes_the_best_with_certainty() -> None:
    draws = Drawer(Sampling(temperature=0), [1], [(0,)]).draw(torch.tensor([[0.1, 0.7, 0.2]], dtype=torch.bfloat16), 0)
    assert (draws.tokens.item(), draws.logprobs.item(), draws.entropies.item()) == (1, 0.0, 0.0)
