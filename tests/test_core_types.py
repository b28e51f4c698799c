"""The nouns: what a group knows about its rollouts, and questions that survive JSON."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zppo.core.types import PLAIN, Golds, Group, ImageRef, Message, Prompt, Question, Rollout

texts = st.text(max_size=12)
questions = st.builds(
    Question,
    id=texts,
    messages=st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts), max_size=3).map(tuple),
    gold=texts | st.builds(Golds, st.sampled_from(["any", "set", "ordered"]), st.lists(texts, min_size=2, max_size=3).map(tuple)),
    images=st.lists(st.builds(ImageRef, texts, texts), max_size=2).map(tuple),
    level=texts,
)
NOTHING = torch.zeros(0)


def group(*verdicts: bool | None) -> Group:
    """A plain group with one rollout per verdict; None is ungraded."""
    question = Question("q", (Message("user", "?"),), "1")
    rollouts = (Rollout(NOTHING, NOTHING, "", None, v is True, float(v is True), graded=v is not None) for v in verdicts)
    return Group(Prompt(PLAIN, question, question.messages, (1,)), tuple(rollouts))


@given(questions)
def test_a_question_survives_json(question: Question) -> None:
    again = Question.from_dict(json.loads(json.dumps(question.to_dict())))
    assert again == question
    assert all(isinstance(m, Message) for m in again.messages) and all(isinstance(i, ImageRef) for i in again.images)


@given(st.lists(st.sampled_from([True, False, None]), max_size=12))
def test_a_group_counts_graded_rollouts_alone(verdicts: list[bool | None]) -> None:
    made = group(*verdicts)
    right, wrong = verdicts.count(True), verdicts.count(False)
    assert len(made.graded) == right + wrong
    assert made.wrong == tuple(r for r, v in zip(made.rollouts, verdicts, strict=True) if v is False)
    assert made.counts == (bool(verdicts) and right + wrong >= len(verdicts) / 2)
    if right + wrong:
        assert made.accuracy == right / (right + wrong)
    else:
        assert math.isnan(made.accuracy)


def test_half_of_the_rollouts_graded_is_enough_to_touch_the_buffer() -> None:
    assert group(False, None).counts
    assert not group(False, None, None).counts
    assert not group().counts


def test_the_nouns_are_frozen() -> None:
    made = group(True)
    for thing, name in ((made, "prompt"), (made.prompt, "ids"), (made.question, "id"), (made.rollouts[0], "reward")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, name, None)
