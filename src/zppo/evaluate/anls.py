"""Average Normalised Levenshtein Similarity: how near a text read from a document is to an accepted one.

Biten et al., "Scene Text Visual Question Answering" (2019), as InfographicVQA uses it: threshold 0.5, the best over all golds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

THRESHOLD = 0.5


def similarity(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """1 - edit distance / length of the longer one; 1 for two empty ones."""
    # Of the extra `eval`, without which a dry run must work, and what is missing must be said.
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(first, second))


def anls(golds: Iterable[str], answer: str, threshold: float = THRESHOLD) -> float:
    """The best similarity to one of the golds, without regard to case and white space; 0 where it is not above the threshold."""
    best = max((similarity(_plain(gold), _plain(answer)) for gold in golds), default=0.0)
    return best if best > threshold else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
