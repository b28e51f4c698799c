"""What the student does with candidates: the candidate-match audit (Tabs. 16 and 17), position bias, answer leaks.

Everything is counted into one `Counter`, so that the counts of several files are simply added.

What became of the questions in the prompt replay buffer, from buffer.jsonl (Figs. 4, 5b, 20, 21, 23, 24).
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from zppo.core.select import is_hard
from zppo.core.types import BCQ, NCQ
from zppo.grading import normalise

Counts = Counter[tuple[str, ...]]

MATCHES = ("positive", "negative", "other", "none")
"""Whose answer a rollout boxes: the right candidate's, a wrong one's, another, or none at all."""

_CANDIDATE = re.compile(r"<candidate>(.*?)</candidate>", re.DOTALL)
_BOX_OR_BRACE = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)

normal = lru_cache(maxsize=65_536)(normalise)


def boxes(text: str) -> list[str]:
    """The normalised contents of all balanced `\\boxed{}` of a text. Linear time."""
    opened: list[int | None] = []
    found = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened and (start := opened.pop()) is not None:
            found.append(normal(text[start : token.start()]))
    return found


def match(answer: str | None, positive: str | None, negatives: Sequence[str]) -> str:
    """Which of `MATCHES` an answer is, after method.md section 9's normalisation."""
    if answer is None:
        return "none"
    if positive is not None and normal(answer) == normal(positive):
        return "positive"
    return "negative" if any(normal(answer) == normal(n) for n in negatives) else "other"


def audit_class(kind: str, correct: bool, found: str) -> str:
    """The class of one BCQ or NCQ rollout, by which stories can be filtered: "bcq:right:positive"."""
    return f"{kind}:{'right' if correct else 'wrong'}:{found}"


def count_group(
    kind: str, audit: Mapping[str, Any], unseen: str | None, rollouts: Sequence[tuple[str | None, bool]]
) -> tuple[Counts, list[str]]:
    """Counts of one BCQ or NCQ group, and the class of each rollout.

    Args:
        kind: bcq or ncq; other kinds have no candidates to audit.
        audit: the facts of the log: correct_at, positive_answer, negative_answer; or wrong_answers.
        unseen: for NCQ the positive answer of the same question's BCQ in this step ([zppo] the paper does not say which of the teacher's
            answers it compares with), None where there was none.
        rollouts: (answer, correct) of the graded ones.
    """
    counts: Counts = Counter()
    if kind == BCQ and "correct_at" in audit:
        positive, negatives = audit["positive_answer"], [a for a in [audit["negative_answer"]] if a is not None]
    elif kind == NCQ and "wrong_answers" in audit:
        positive, negatives = unseen, list(audit["wrong_answers"])
        counts["ncq", "unseen known" if unseen is not None else "unseen unknown"] += len(rollouts)
    else:
        return counts, ["" for _ in rollouts]
    found = [match(answer, positive, negatives) for answer, _ in rollouts]
    for (_, correct), which in zip(rollouts, found, strict=True):
        counts["match", kind, "right" if correct else "wrong", which] += 1
    # Where a candidate has no answer, nobody can be seen to follow it.
    if kind == BCQ and positive is not None and negatives and normal(positive) not in map(normal, negatives):
        _count_position(counts, int(audit["correct_at"]), found)
    return counts, [audit_class(kind, correct, which) for (_, correct), which in zip(rollouts, found, strict=True)]


def _count_position(counts: Counts, correct_at: int, found: Sequence[str]) -> None:
    """Sums for `position_bias`: per prompt, f rollouts follow the first candidate and t follow one of the two."""
    followed = [correct_at if which == "positive" else 1 - correct_at for which in found if which in ("positive", "negative")]
    first, total = followed.count(0), len(followed)
    counts["position", "right first"] += correct_at == 0
    counts["position", "prompts"] += 1
    if total:
        counts["position", "n"] += 1
        for name, value in (("f", first), ("t", total), ("ff", first * first), ("ft", first * total), ("tt", total * total)):
            counts["position", name] += value


def count_leaks(kind: str, audit: Mapping[str, Any], gold: str, prompt: str, others: Sequence[str] = ()) -> Counts:
    """What the words of one BCQ or NCQ prompt give away [zppo].

    Candidates are read from the `<candidate>` blocks of the prompt; a prompt in which they cannot be found (a template of one's own with
    other tags) counts as "unchecked". `others` are right like the gold, where any one of several is.

    - ncq "gold boxed": a candidate or the list boxes the gold, though all of it is said to be wrong.
    - bcq "gold in wrong": the wrong candidate boxes the gold.
    - bcq "answer changed": a candidate has boxes, and the answer of the completion behind it is in none of them.
    - bcq "one box": only one of the two candidates has a box.
    - bcq "right longer", "wrong longer": which candidate has more characters; equal ones are left out.
    """
    counts: Counts = Counter()
    blocks = _CANDIDATE.findall(prompt)
    right_answers = set(map(normal, (gold, *others)))
    if kind == NCQ and "wrong_answers" in audit:
        if not blocks:
            counts["leak", NCQ, "unchecked"] += 1
            return counts
        shown = {normal(a) for a in audit["wrong_answers"]}.union(*map(boxes, blocks))
        counts["leak", NCQ, "checked"] += 1
        counts["leak", NCQ, "gold boxed"] += not right_answers.isdisjoint(shown)
    elif kind == BCQ and "correct_at" in audit:
        if len(blocks) != 2:
            counts["leak", BCQ, "unchecked"] += 1
            return counts
        right, wrong = blocks[audit["correct_at"]].strip(), blocks[1 - audit["correct_at"]].strip()
        right_boxes, wrong_boxes = boxes(right), boxes(wrong)
        changed = any(
            b and a is not None and normal(a) not in b
            for a, b in ((audit["positive_answer"], right_boxes), (audit["negative_answer"], wrong_boxes))
        )
        counts["leak", BCQ, "checked"] += 1
        counts["leak", BCQ, "gold in wrong"] += not right_answers.isdisjoint(wrong_boxes)
        counts["leak", BCQ, "answer changed"] += changed
        counts["leak", BCQ, "one box"] += bool(right_boxes) != bool(wrong_boxes)
        counts["leak", BCQ, "right longer"] += len(right) > len(wrong)
        counts["leak", BCQ, "wrong longer"] += len(wrong) > len(right)
    return counts


@dataclass(frozen=True, slots=True)
class MatchRow:
    """One row of the candidate-match audit.

    Attributes:
        source: "this run", or the scale of the paper's student.
        kind: bcq or ncq.
        subset: right, wrong or all.
        rollouts: how many.
        positive, negative, other: shares; `other` holds rollouts without an answer too.
        none: share without an answer; None where the source does not say.
    """

    source: str
    kind: str
    subset: str
    rollouts: int
    positive: float | None
    negative: float | None
    other: float | None
    none: float | None = None


def match_rows(counts: Counts) -> list[MatchRow]:
    """This run's rows: BCQ and NCQ, each right, wrong and all; kinds without a rollout are left out."""
    rows = []
    for kind in (BCQ, NCQ):
        for subset, parts in (("right", ("right",)), ("wrong", ("wrong",)), ("all", ("right", "wrong"))):
            found = [sum(counts["match", kind, part, which] for part in parts) for which in MATCHES]
            total = sum(found)
            if total or any(counts["match", kind, part, w] for part in ("right", "wrong") for w in MATCHES):
                positive, negative, other, none = (n / total if total else None for n in found)
                both = None if other is None or none is None else other + none
                rows.append(MatchRow("this run", kind, subset, total, positive, negative, both, none))
    return rows


def paper_rows() -> list[MatchRow]:
    """The paper's rows (arXiv 2606.18216, Tabs. 16 and 17)."""
    text = (files("zppo.report") / "data" / "paper_audit.csv").read_text(encoding="utf-8")
    return [
        MatchRow(
            f"paper {row['scale']}",
            row["reformulation"].lower(),
            "right" if row["subset"] == "correct" else row["subset"],
            int(row["rollouts"]),
            *(float(row[name]) for name in ("match_positive", "match_negative", "other")),
        )
        for row in csv.DictReader(text.splitlines())
    ]


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share with its 95% interval.

    Attributes:
        share: NaN where n is 0.
        low, high: the Wilson interval.
        n: what the share is of.
    """

    share: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share; (0, 1) where n is 0. `n` may be an effective number."""
    if n <= 0:
        return 0.0, 1.0
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def position_bias(counts: Counts) -> Proportion:
    """How often a BCQ rollout that follows one of the two candidates follows the first one; 0.5 is no bias.

    The rollouts of one prompt are alike, so the interval is Wilson's at the effective number p(1-p)/var(p), var(p) being the
    variance of a ratio over prompts, never more than the number of rollouts; the number of prompts where they do not vary [zppo].
    """
    f, t, n = (counts["position", name] for name in ("f", "t", "n"))
    if not t:
        return Proportion(math.nan, 0.0, 1.0, 0)
    p = f / t
    spread = counts["position", "ff"] - 2 * p * counts["position", "ft"] + p * p * counts["position", "tt"]
    variance = spread / (t * t) * (n / (n - 1) if n > 1 else math.inf)
    effective = min(t, p * (1 - p) / variance) if variance > 0 and math.isfinite(variance) else n
    return Proportion(p, *wilson(p * effective, effective), t)


def fraction(successes: int, n: int) -> Proportion:
    """A share of independent trials with Wilson's interval."""
    return Proportion(successes / n if n else math.nan, *wilson(successes, n), n)


def bin_count(group_size: int, threshold: float) -> int:
    """How many entry bins there are: accuracies k / group_size below the threshold."""
    return sum(is_hard(k / group_size, threshold) for k in range(group_size))


def bin_of(accuracy: float, group_size: int, bins: int) -> int:
    """The entry bin of an accuracy. Groups with ungraded rollouts have other denominators: they go to the bin below [zppo]."""
    return min(bins - 1, max(0, math.floor(accuracy * group_size + 1e-6)))


def bin_name(index: int, group_size: int) -> str:
    """1 of 8 -> "12.5%"."""
    return f"{index / group_size:.1%}".replace(".0%", "%")


@dataclass(frozen=True, slots=True)
class ZoneStory:
    """The buffer's story by entry bin.

    Attributes:
        names: of the bins, by accuracy at admission.
        steps: (T,) the steps 1 .. T.
        admitted, graduated, evicted: (bins, T) how many in each step.
        visits: visits -> (graduated, evicted) among those that left.
        waits: per bin, the steps from admission to graduation of each graduate.
    """

    names: tuple[str, ...]
    steps: Any
    admitted: Any
    graduated: Any
    evicted: Any
    visits: dict[int, tuple[int, int]] = field(default_factory=dict)
    waits: tuple[tuple[int, ...], ...] = ()

    @property
    def occupancy(self) -> Any:
        """(bins, T) entries in the buffer after each step."""
        return np.cumsum(self.admitted - self.graduated - self.evicted, axis=1)

    @property
    def graduated_share(self) -> Any:
        """(bins, T) graduated so far / admitted so far; NaN before the first admission."""
        admitted = np.cumsum(self.admitted, axis=1)
        with np.errstate(invalid="ignore"):
            return np.where(admitted > 0, np.cumsum(self.graduated, axis=1) / np.maximum(admitted, 1), np.nan)

    def totals(self) -> list[tuple[str, int, int, int]]:
        """(bin, admitted, graduated, evicted) over the whole run, and the row "all"."""
        sums = [part.sum(axis=1) for part in (self.admitted, self.graduated, self.evicted)]
        rows = [(name, *(int(s[i]) for s in sums)) for i, name in enumerate(self.names)]
        return [*rows, ("all", *(int(s.sum()) for s in sums))]  # type: ignore[list-item]


def zone_story(events: Iterable[Mapping[str, Any]], group_size: int, threshold: float, last_step: int) -> ZoneStory:
    """The story that the lines of buffer.jsonl tell up to `last_step`; later lines (of a step that is being written) wait."""
    bins = bin_count(group_size, threshold)
    counts = {name: np.zeros((bins, last_step), dtype=np.int64) for name in ("admitted", "graduated", "evicted")}
    visits: dict[int, tuple[int, int]] = {}
    waits: list[list[int]] = [[] for _ in range(bins)]
    for event in events:
        if event["step"] > last_step:
            continue
        index = bin_of(event["entry_accuracy"], group_size, bins)
        counts[event["event"]][index, event["step"] - 1] += 1
        if event["event"] != "admitted":
            graduated, evicted = visits.get(event["visits"], (0, 0))
            out = event["event"] == "graduated"
            visits[event["visits"]] = (graduated + out, evicted + (not out))
        if event["event"] == "graduated":
            waits[index].append(event["step"] - event["entry_step"])
    return ZoneStory(
        names=tuple(bin_name(i, group_size) for i in range(bins)),
        steps=np.arange(1, last_step + 1),
        **counts,
        visits=dict(sorted(visits.items())),
        waits=tuple(map(tuple, waits)),
    )


def median(values: Iterable[float]) -> float:
    """The median, NaN of nothing."""
    data = list(values)
    return float(np.median(data)) if data else math.nan
