"""Keyed draws: the same parts give the same draw everywhere, other parts another one."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from zppo.core.draws import draw_key, keyed_random

part = st.one_of(st.integers(), st.text(alphabet=st.characters(exclude_characters="\x1f"), max_size=8))


def test_keys_are_fixed_for_all_time() -> None:
    """A run must resume on another machine, so these numbers may never change."""
    assert draw_key(0, 3, "question-7", "plain", 5) == 8482681684243701304
    assert draw_key("é", -1) == 714201110979145385


@given(st.lists(part, max_size=5), st.lists(part, max_size=5))
def test_equal_parts_equal_keys_and_other_parts_other_keys(first: list[str | int], second: list[str | int]) -> None:
    assert 0 <= draw_key(*first) < 2**63
    assert (draw_key(*first) == draw_key(*second)) == (first == second)


def test_type_and_order_of_parts_count() -> None:
    assert len({draw_key(1, "2"), draw_key("1", 2), draw_key(1, 2), draw_key(2, 1), draw_key("12"), draw_key("1", "2")}) == 6


def test_text_that_is_no_utf8_has_a_key() -> None:
    assert draw_key("\ud800") != draw_key("?")


def test_generators_are_their_own() -> None:
    expected = keyed_random("a", 1).random()
    random.seed(0)
    other = keyed_random("a", 2)
    other.random()
    before = random.getstate()
    assert keyed_random("a", 1).random() == expected
    assert random.getstate() == before
