"""From a completion to a verdict (method.md section 7)."""

from zppo.grading.golds import has_gold_words
from zppo.grading.grader import Grader, Verdict, equal
from zppo.grading.reward_function import RewardFunction, load_reward
from zppo.grading.text import extract_boxed, normalise

__all__ = ["Grader", "RewardFunction", "Verdict", "equal", "extract_boxed", "load_reward", "normalise", "has_gold_words"]
