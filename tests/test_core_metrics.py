"""What a step reports about its groups."""

from __future__ import annotations

import math

import pytest
import torch

from zppo.core.metrics import accuracy_by_kind, composition, eligibility, groups_with_gradient, mean, rollout_metrics
from zppo.core.types import BCQ, NCQ, PLAIN, Group, Message, Prompt, Question, Rollout


def rollout(
    correct: bool | None, length: int = 2, entropy: float = math.nan, truncated: bool = False, answer: str | None = "1", reason: str = ""
) -> Rollout:
    """None is ungraded."""
    ids, logprobs, right = torch.zeros(length, dtype=torch.int64), torch.zeros(length), correct is True
    return Rollout(ids, logprobs, "", answer, right, float(right), truncated, correct is not None, reason, entropy)


def group(kind: str, *verdicts: bool | None) -> Group:
    question = Question("q", (Message("user", "?"),), "1")
    return Group(Prompt(kind, question, question.messages, (1,)), tuple(rollout(v) for v in verdicts))


GROUPS = [
    group(PLAIN, True, True, False, None),
    group(PLAIN, True, False),
    group(PLAIN, False, False, False, True),
    group(PLAIN, None, None, False),
    group(BCQ, True, None),
    group(NCQ, None, None),
]


def test_mean_leaves_nan_out() -> None:
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert mean([math.nan]) is None
    assert mean([]) is None


def test_accuracy_is_over_graded_rollouts_and_kinds_without_one_are_absent() -> None:
    assert accuracy_by_kind(GROUPS) == {PLAIN: 4 / 10, BCQ: 1.0}
    assert accuracy_by_kind([]) == {}


def test_composition() -> None:
    """Exactly at the threshold is easy; too few verdicts are neither easy nor hard."""
    assert composition(GROUPS, 0.5) == {"easy": 2 / 6, "hard": 1 / 6, "ungraded": 1 / 6, BCQ: 1 / 6, NCQ: 1 / 6}
    assert composition([], 0.5) == {}


def test_eligibility_is_of_plain_groups_alone_and_asks_what_the_teacher_said() -> None:
    plain = [group for group in GROUPS if group.kind == PLAIN]
    hard = [group for group in plain if group.counts and group.accuracy < 0.5]
    name = hard[0].question.id
    for responses, part in (({name: ("a response",)}, "bcq"), ({name: ()}, "ncq"), ({}, "unasked")):
        assert eligibility(plain, responses, 0.5) == {"easy": 2 / 4, part: 1 / 4, "ungraded": 1 / 4}
    assert eligibility([], {}, 0.5) == {}


def test_a_group_counts_where_an_advantage_is_not_zero() -> None:
    groups = [group(PLAIN, True, True), group(PLAIN, True, False, False), group(BCQ, False)]
    assert groups_with_gradient(groups, torch.tensor([0.0, 0.0, 0.6, -0.3, -0.3, 0.0])) == 1
    assert groups_with_gradient(groups, torch.zeros(6)) == groups_with_gradient([], torch.zeros(0)) == 0


def test_rollout_metrics() -> None:
    rollouts = [
        rollout(True, 2, 1.0),
        rollout(False, 6, 2.0, truncated=True),
        rollout(False, 4, answer=None),
        rollout(None, 4, reason="timeout"),
    ]
    assert rollout_metrics(rollouts, torch.tensor([0.5, -1.0, 0.0, 0.0])) == {
        "positive_advantage_share": 1 / 3,  # of those with a verdict
        "nonzero_advantage_share": 2 / 3,
        "entropy": 1.5,
        "completion_tokens_mean": 4.0,
        "completion_tokens_max": 6.0,
        "truncated_share": 0.25,
        "no_answer_share": 0.25,
        "grading_timeout_share": 0.25,
        "ungraded": 1.0,
    }


def test_a_step_without_rollouts_has_no_means() -> None:
    metrics = rollout_metrics([], torch.zeros(0))
    assert metrics["entropy"] is None and metrics["completion_tokens_mean"] is None
    assert metrics["completion_tokens_max"] == pytest.approx(0.0)
