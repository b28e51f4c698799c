"""What a verdict is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one completion was graded.

    Attributes:
        correct: decides hardness, pools and the buffer.
        answer: what was extracted, None where there is none.
        reason: a short word for the log: "equal", "different", "no answer", "timeout", ...
        reward: feeds advantages; 1.0/0.0 from `correct` unless a reward function says otherwise.
        graded: False where no verdict could be had (an unreachable judge).
    """

    correct: bool
    answer: str | None
    reason: str
    reward: float
    graded: bool = True
