"""Extraction: the last balanced box after the thinking, in linear time."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from test_judge import WRONG, answered, ask, grade, make_judge, make_settings
from zppo.grading import Grader, extract_boxed, normalise
from zppo.grading.answer_form import AFTER_THOUGHTS, ANYWHERE, AnswerForm
from zppo.rollout.grading import Scorer, rule_grading


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


def papers_box(text: str) -> str | None:
    """The last box of a response by counting braces from it on, one character after the other (App. D.1)."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end]
    return None


PIECES = [r"\boxed{1}", r"\boxed{ \frac{2}{3} }", r"\boxed{x \{y}", "<think>", "</think>", " so ", "{", "}", "4", r"\boxed{}", "\n"]


@given(st.lists(st.sampled_from([p for p in PIECES if p not in "{}" and "y" not in p]), max_size=8), st.booleans())
@example(["<think>", r"\boxed{1}"], False)
@example([r"\boxed{1}", "</think>", "4"], True)
def test_anywhere_is_the_last_box_of_the_whole_response(pieces: list[str], think_open: bool) -> None:
    """Thoughts that were cut off, or that hold the only box, count; without thoughts both ways are one."""
    text = "".join(pieces)
    expected = papers_box(text)
    assert extract_boxed(text, think_open, anywhere=True) == ((expected or "").strip() or None)
    if "think>" not in text and not think_open:
        assert extract_boxed(text, think_open, anywhere=True) == extract_boxed(text)


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans())
def test_anywhere_finds_whatever_is_found_after_the_thoughts(pieces: list[str], think_open: bool) -> None:
    text = "".join(pieces)
    if extract_boxed(text, think_open) is not None and "{" not in pieces and "}" not in pieces and not any("y" in p for p in pieces):
        assert extract_boxed(text, think_open, anywhere=True) == extract_boxed(text, think_open)


# --- the last box of the whole response -----------------------------------------------------------------------------

CUT = "<think>It is \\boxed{Paris}, since"


@pytest.mark.parametrize(("box", "right"), [("after-thoughts", False), ("anywhere", True)])
def test_the_last_box_of_the_whole_response_is_a_setting(box: str, right: bool, tmp_path: Path) -> None:
    """By rule, by a reward function, by the judge's short cut; what the judge reads does not change."""
    settings = make_settings(grading={"answer_from": box})
    ruled = answered(CUT, ask(grading="rule"))
    opened = answered(CUT.removeprefix("<think>"), ask(grading="rule"), think_open=True)
    for score in (settings, make_settings(grading={"answer_from": box, "reward": f"{tmp_path / 'reward.py'}:score"})):
        (tmp_path / "reward.py").write_text("def score(completion, question):\n    return 'Paris' in completion\n", encoding="utf-8")
        with rule_grading(score) as rule:
            for given in (ruled, opened):
                (verdict,) = grade(Scorer(rule, form=score.answer_form), [given])
                assert verdict.answer == ("Paris" if right else None)
                assert verdict.correct == (right or score.grading.reward is not None)
    with rule_grading(settings) as rule:
        judge, model = make_judge(WRONG)
        scorer = Scorer(rule, judge, settings.answer_form)
        first, second = grade(scorer, [answered(CUT), answered(CUT.replace("Paris", "the city"))])
        assert (first.correct, first.reason) == ((True, "equal") if right else (False, "judge wrong"))
        assert second.answer == ("the city" if right else None) and len(model.requests) == (1 if right else 2)
        assert "It is \\boxed{the city}, since" in model.requests[-1].messages[0].content


def test_a_grader_that_is_copied_reads_boxes_as_before() -> None:
    for place in (AFTER_THOUGHTS, ANYWHERE):
        copy = pickle.loads(pickle.dumps(Grader(form=AnswerForm(place))))
        assert copy.grade(CUT, "Paris").correct == (place == ANYWHERE)
