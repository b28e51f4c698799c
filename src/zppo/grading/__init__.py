"""From a completion to a verdict (method.md section 7)."""

from zppo.grading.base import Verdict
from zppo.grading.boxed import extract_boxed
from zppo.grading.clean import normalise
from zppo.grading.grader import Grader, equal
from zppo.grading.reward import RewardFunction, load_reward

__all__ = ["Grader", "RewardFunction", "Verdict", "equal", "extract_boxed", "load_reward", "normalise"]
