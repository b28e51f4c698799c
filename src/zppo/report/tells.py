"""Tells: can the right candidate of a BCQ be told without the question? Its place, its length, its style.

A student that is rewarded for choosing right learns a tell before it learns to read. The paper shuffles candidates and has one teacher
write both summaries; whether that left nothing to go by is measured here [zppo].
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zppo.core.types import BCQ
from zppo.report.audits import Counts, Proportion, candidates_of, fraction, wilson

Words = Any  # (F,) int64, sorted: what a candidate has of words, pairs of words and marks, hashed


class Pair(NamedTuple):
    """The two candidates of one BCQ prompt, as their features."""

    question_id: str
    right: Words
    wrong: Words


FOLDS = 5
LEAST_QUESTIONS = 20
"""Questions below which nothing is learned of style."""

MOST_PAIRS = 1_000
"""Pairs from which style is learned; of more every n-th one."""

_MOST_FEATURES = 400
_SHOWN = 4_000  # characters of a candidate that are looked at
_ANSWER = re.compile(r"(\\boxed\s*\{)[^{}\n]*(?:\{[^{}\n]*\}[^{}\n]*)*|(\banswer\b[^\n]{0,20}?[:=]\s*)[^\n]*", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_TOKEN = re.compile(r"[^\W\d_]+|#|\n+|[^\w\s]")


def pair_of(kind: str, question_id: str, audit: Mapping[str, Any], prompt: str) -> Pair | None:
    """The candidates of a BCQ prompt; None for other kinds and where a template of one's own has no `<candidate>` blocks."""
    if kind != BCQ or "correct_at" not in audit or len(blocks := candidates_of(prompt)) != 2:
        return None
    at = audit["correct_at"]
    return Pair(question_id, features(blocks[at]), features(blocks[1 - at]))


def features(text: str) -> Words:
    """Words, pairs of neighbours and marks of a candidate, without what it says: numbers and its answer are masked."""
    text = text.strip()
    if len(text) > _SHOWN:
        text = text[: _SHOWN // 2] + "\n" + text[-_SHOWN // 2 :]
    masked = _NUMBER.sub("#", _ANSWER.sub(lambda m: f"{m[1] or m[2]}#", text))
    tokens = [token if token.strip() else "\n" * min(2, len(token)) for token in _TOKEN.findall(masked)]
    lowered = [token.lower() for token in tokens]
    lines = f"lines {min(8, masked.count(chr(10)))}"
    capital = "capital" if text[:1].isupper() else "small"
    found = {*lowered, *(f"{a} {b}" for a, b in zip(["^", *lowered], [*lowered, "$"], strict=True)), lines, capital}
    return np.unique(np.fromiter((zlib.crc32(name.encode("utf-8", "replace")) for name in found), dtype=np.int64))


def style_tell(pairs: Sequence[Pair]) -> Proportion:
    """How often a classifier of style tells the right candidate of a question that it has not seen; 0.5 is no tell.

    Logistic regression on the difference of the two candidates' features (a ridge of 10), in `FOLDS` parts by question. Pairs of one
    question are alike: its share counts once, and the interval is Wilson's over questions. `n` is 0 below `LEAST_QUESTIONS` questions.
    """
    pairs = pairs[:: -(-len(pairs) // MOST_PAIRS)] if len(pairs) > MOST_PAIRS else pairs
    questions = sorted({pair.question_id for pair in pairs}, key=lambda name: zlib.crc32(name.encode("utf-8", "replace")))
    if len(questions) < LEAST_QUESTIONS:
        return Proportion(float("nan"), 0.0, 1.0, 0)
    place = {name: i for i, name in enumerate(questions)}
    of = np.array([place[pair.question_id] for pair in pairs])
    shown = _differences(pairs)
    hits: dict[int, list[float]] = defaultdict(list)
    for fold in range(FOLDS):
        unseen = of % FOLDS == fold
        scores = shown[unseen] @ _logistic(shown[~unseen])
        for question, score in zip(of[unseen], scores, strict=True):
            hits[int(question)].append(0.5 if abs(score) < 1e-9 else float(score > 0))
    mean = float(np.mean([np.mean(own) for own in hits.values()]))
    return Proportion(mean, *wilson(mean * len(questions), len(questions)), len(questions))


def _differences(pairs: Sequence[Pair]) -> Any:
    """(P, F) the right candidate's features less the wrong one's: of the commonest that do not stand in both candidates always."""
    apart = [(np.setdiff1d(p.right, p.wrong, True), np.setdiff1d(p.wrong, p.right, True)) for p in pairs]
    common = Counter(int(name) for both in apart for side in both for name in side).most_common(_MOST_FEATURES)
    column = {name: i for i, (name, _) in enumerate(common)}
    table = np.zeros((len(pairs), len(column)))
    for row, sides in enumerate(apart):
        for side, sign in zip(sides, (1.0, -1.0), strict=True):
            table[row, [column[int(name)] for name in side if int(name) in column]] = sign
    return table


def _logistic(table: Any, ridge: float = 10.0, steps: int = 8) -> Any:
    """Weights w that minimise sum log(1 + exp(-x w)) + ridge/2 |w|^2 over rows x, by Newton steps in the space of rows.

    The rows are the differences right less wrong, so each is an example of "right", and there is no intercept: the order of the two means
    nothing.
    """
    weights = np.zeros(table.shape[1])
    gram = np.eye(table.shape[1]) * ridge
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-np.clip(table @ weights, -30, 30)))
        gradient = table.T @ (chance - 1) + ridge * weights
        curvature = (table * (chance * (1 - chance))[:, None]).T @ table + gram
        weights = weights - np.linalg.solve(curvature, gradient)
    return weights


MARGIN = 0.05
"""A tell is warned of where its whole interval lies further than this from a half."""


def tells(counts: Counts, pairs: Sequence[Pair]) -> dict[str, Proportion]:
    """Shares by what the right candidate could be told by: place (it stands first), length (it is longer), style."""
    longer = counts["leak", BCQ, "right longer"]
    found = {
        "place": fraction(counts["position", "right first"], counts["position", "prompts"]),
        "length": fraction(longer, longer + counts["leak", BCQ, "wrong longer"]),
        "style": style_tell(pairs),
    }
    return {name: share for name, share in found.items() if share.n}


_WORDS = {
    "place": "the right candidate of a BCQ stands first in {share:.0%} of {n:,} prompts",
    "length": "the right candidate of a BCQ is the longer one in {share:.0%} of {n:,} prompts",
    "style": "words and marks alone, numbers and answers masked, tell the right candidate of a BCQ in {share:.0%} of {n:,} questions",
}
_MENDS = {
    "place": "candidates are shuffled by key: a template that shows candidates in an order of its own would do this",
    "length": "a lower teacher.compression.max_new_tokens, or a prompts.compression of yours that asks for a length, evens both summaries",
    "style": "have both candidates rewritten by the teacher (teacher.compression.enabled; the report counts pairs that were shown "
    "uncompressed), or give prompts.compression a template that asks for one form",
}


def tell_warnings(shares: Mapping[str, Proportion]) -> list[str]:
    """A warning for each tell that is there for certain."""
    return [
        f"A tell: {_WORDS[name].format(share=share.share, n=share.n)} (95% interval {share.low:.0%} to {share.high:.0%}; 50% tells "
        f"nothing), so the student can be rewarded without reading; {_MENDS[name]}"
        for name, share in shares.items()
        if share.low > 0.5 + MARGIN or share.high < 0.5 - MARGIN and name != "style"
    ]
