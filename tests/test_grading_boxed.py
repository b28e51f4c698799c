"""Extraction: the last balanced box after the thinking, in linear time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo.grading import extract_boxed, normalise


@pytest.mark.parametrize(
    ("text", "think_open", "answer"),
    [
        (r"so \boxed{5}", False, "5"),
        (r"\boxed{1} and \boxed{2}", False, "2"),
        (r"\boxed{\frac{1}{2}}", False, r"\frac{1}{2}"),
        (r"\boxed {7}", False, "7"),
        (r"\boxed{ 7 }", False, "7"),
        (r"\\boxed{7}", False, "7"),
        (r"\boxed{\{1,2\}}", False, r"\{1,2\}"),
        (r"\boxed{\left\{ 1 \right.}", False, r"\left\{ 1 \right."),
        (r"\boxed{\boxed{5}}", False, "5"),
        (r"\boxed{3 \text{ or } \boxed{5}}", False, r"3 \text{ or } \boxed{5}"),
        (r"\boxed{the answer is \boxed{5}", False, "5"),
        (r"\boxed{5} \boxed{6", False, "5"),
        (r"\boxed{5}}", False, "5"),
        (r"\boxed{1\\2}", False, r"1\\2"),
        (r"\boxed{None}", False, "None"),
        (r"\boxed{}", False, None),
        (r"\boxed{   }", False, None),
        ("no box", False, None),
        ("", False, None),
        (r"<think>\boxed{1}</think>\boxed{2}", False, "2"),
        (r"<think>\boxed{1}</think>two", False, None),
        (r"<think>\boxed{1}", False, None),
        (r"\boxed{1}<think>", False, None),
        (r"<think>a</think>\boxed{1}<think>b", False, None),
        (r"<think>a</think><think>\boxed{1}</think>\boxed{3}", False, "3"),
        (r"\boxed{1}", True, None),
        (r"\boxed{1}</think>\boxed{2}", True, "2"),
        (r"\boxed{1}</think>", True, None),
        (r"thinking</think>\boxed{2}", False, "2"),
    ],
)
def test_extraction(text: str, think_open: bool, answer: str | None) -> None:
    assert extract_boxed(text, think_open) == answer


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "{" * 1_000_000,
        "\\" * 1_000_001,
        "\\boxed{" * 140_000,
        "\\boxed{" * 10_000 + "5" + "}" * 10_000,
        ("\\boxed" + " " * 1000) * 1000,
        "<think>" * 140_000,
        "</think>" * 120_000,
        "\\boxed{" + "9" * 1_000_000 + "}",
        "\x00" * 1_000_000,
        "\ud800" * 1_000_000,
    ],
    ids=["letters", "braces", "backslashes", "open boxes", "nested boxes", "spaces", "think", "thought", "long", "null", "surrogates"],
)
@pytest.mark.timeout(60)  # more than linear in the text would take hours
def test_a_megabyte_takes_a_moment(text: str) -> None:
    extract_boxed(text)


@given(st.text(st.sampled_from("\\{}boxed 5<think>/\x00\ud800"), max_size=80), st.booleans())
@settings(max_examples=150, deadline=None)
def test_extraction_never_raises_and_finds_only_what_is_there(text: str, think_open: bool) -> None:
    answer = extract_boxed(text, think_open)
    assert answer is None or (answer in text and answer == answer.strip() != "")


@given(st.text(st.characters(exclude_characters="\\{}"), min_size=1).filter(lambda t: t.strip() and "<think>" not in t))
@settings(max_examples=50, deadline=None)
def test_what_is_boxed_is_found(content: str) -> None:
    assert extract_boxed("x</think>\\boxed{0} then \\boxed{" + content + "}.") == content.strip()


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (r"\text{New  York}", "new york"),
        ("  A\n B ", "a b"),
        (r"5 \text{ cm}", "5 cm"),
        (r"\text{a \text{b}}", "a b"),
        (r"\frac12", r"\frac12"),
        (r"\textbf{B}", r"\textbf{b}"),
    ],
)
def test_normalise(answer: str, form: str) -> None:
    assert normalise(answer) == form


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_normalise_is_stable_in_case_and_space(answer: str) -> None:
    assert normalise(normalise(answer)) == normalise(normalise(normalise(answer)))
    assert "  " not in normalise(answer)
