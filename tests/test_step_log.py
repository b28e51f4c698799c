"""The log that goes through a step: what it adds up, what it remembers, and how those of several processes become one."""

from __future__ import annotations

from typing import Any

import pytest

from zppo.distributed.processes import Processes
from zppo.step_log import StepLog


def test_counts_add_up_and_a_new_log_begins_at_nothing() -> None:
    log = StepLog(3)
    log.add(teacher_rollouts=2, too_long=0)
    log.add(teacher_rollouts=True)
    log.add_own(graded_answers=4)
    assert log.counts == {"teacher_rollouts": 3.0, "too_long": 0.0} and log.own == {"graded_answers": 4.0}
    assert StepLog(4).counts == {} and StepLog(4).known("summaries") == {}


def test_times_are_added_by_part_also_where_the_work_fails() -> None:
    log = StepLog(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"), log.time("sampling"):
            raise ValueError("broken")
    before = log.elapsed()
    assert before.keys() == {"sampling", "step"} and 0 <= before["sampling"] <= before["step"]
    log.resume_clock({"step": 100.0, "sampling": 60.0, "teacher": 20.0})
    after = log.elapsed()
    assert after["step"] >= 100.0 and (after["sampling"], after["teacher"]) == (60.0, 20.0)


def test_what_was_worked_out_in_a_step_is_known_in_it() -> None:
    log = StepLog(1)
    log.known("verdicts")["a"] = "correct"
    assert log.known("verdicts") == {"a": "correct"} and log.known("summaries") == {}


def test_the_last_reason_is_kept_and_a_success_takes_none_away() -> None:
    log = StepLog(1)
    for reason in ("refused", "timed out", ""):
        log.note_error("teacher", reason)
    assert log.errors == {"teacher": "timed out"}


def test_the_shares_of_processes_are_added_and_their_warnings_are_everybody_s() -> None:
    class Two(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, ({"judge_asked": 2.0, "remote_requests": 1.0}, {"judge": "1 of 2 calls got no reply", "same": "slow"})]

    log = StepLog(1, {"teacher_rollouts": 8.0}, {"judge_asked": 3.0})
    log.warnings["same"] = "slow"
    Two(0, 2).gather_log(log)
    assert log.counts == {"teacher_rollouts": 8.0, "judge_asked": 5.0, "remote_requests": 1.0} and log.own == {}
    assert sorted(log.warnings.values()) == ["1 of 2 calls got no reply", "slow"]
