"""What the student does with candidates: the candidate-match audit (Tabs. 16 and 17), position bias, answer leaks.

Everything is counted into one `Counter`, so that the counts of several files are simply added.

What became of the questions in the prompt replay buffer, from buffer.jsonl (Figs. 4, 5b, 20, 21, 23, 24).
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from zppo.core.select import is_hard
from zppo.core.types import BCQ, NCQ
from zppo.grading import normalise
from zppo.grading.answer_form import last_line

Counts = Counter[tuple[str, ...]]

MATCHES = ("positive", "negative", "other", "none")
"""Whose answer a rollout boxes: the right candidate's, a wrong one's, another, or none at all."""

_CANDIDATE = re.compile(r"<candidate>(.*?)</candidate>", re.DOTALL)
_BOX_OR_BRACE = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)

normal = lru_cache(maxsize=65_536)(normalise)


def boxes(text: str) -> list[str]:
    """The normalised contents of all balanced `\\boxed{}` of a text; where it has none, that of its last line `Answer:`. Linear time."""
    opened: list[int | None] = []
    found = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0].endswith("{") and len(token[0]) > 2:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened and (start := opened.pop()) is not None:
            found.append(normal(text[start : token.start()]))
    if not found and (answer := last_line(text)) is not None:
        found = [normal(answer)]
    return found


def candidates_of(prompt: str) -> list[str]:
    """The candidates that a BCQ or NCQ prompt shows, by their `<candidate>` tags."""
    return _CANDIDATE.findall(prompt)


def match(answer: str | None, positives: Sequence[str], negatives: Sequence[str]) -> str:
    """Which of `MATCHES` an answer is, after method.md section 9's normalisation."""
    if answer is None:
        return "none"
    if any(normal(answer) == normal(p) for p in positives):
        return "positive"
    return "negative" if any(normal(answer) == normal(n) for n in negatives) else "other"


def compared(kind: str, audit: Mapping[str, Any], unseen: str | None) -> tuple[list[str], list[str]] | None:
    """(right, wrong) answers with which those of a group are compared; None where its kind has none.

    For NCQ the right ones are those of all correct responses of the teacher to the question in this step (Tab. 17).

    Args:
        audit: the facts of the log: correct_at, positive_answer, negative_answer; or wrong_answers and teacher_answers.
        unseen: the positive answer of the same question's BCQ in this step: all that logs of older versions know of the teacher for NCQ.
    """
    if kind == BCQ and "correct_at" in audit:
        positive, negative = ([a for a in (audit[name],) if a is not None] for name in ("positive_answer", "negative_answer"))
        return positive, negative
    if kind == NCQ and "wrong_answers" in audit:
        older = [] if unseen is None else [unseen]
        return list(audit.get("teacher_answers", older)), list(audit["wrong_answers"])
    return None


def audit_class(kind: str, correct: bool, found: str) -> str:
    """The class of one BCQ or NCQ rollout, by which stories can be filtered: "bcq:right:positive"."""
    return f"{kind}:{'right' if correct else 'wrong'}:{found}"


def count_group(
    kind: str, audit: Mapping[str, Any], unseen: str | None, rollouts: Sequence[tuple[str | None, bool]]
) -> tuple[Counts, list[str]]:
    """Counts of one BCQ or NCQ group, and the class of each rollout.

    Args:
        kind: bcq or ncq; other kinds have no candidates to audit.
        audit, unseen: see `compared`.
        rollouts: (answer, correct) of the graded ones.
    """
    counts: Counts = Counter()
    answers = compared(kind, audit, unseen)
    if answers is None:
        return counts, ["" for _ in rollouts]
    positives, negatives = answers
    if kind == NCQ:
        counts["ncq", "unseen known" if positives else "unseen unknown"] += len(rollouts)
        counts["ncq", "one answer alone"] += len(rollouts) if "teacher_answers" not in audit else 0
    found = [match(answer, positives, negatives) for answer, _ in rollouts]
    for (_, correct), which in zip(rollouts, found, strict=True):
        counts["match", kind, "right" if correct else "wrong", which] += 1
    # Where a candidate has no answer, nobody can be seen to follow it.
    if kind == BCQ and positives and negatives and set(map(normal, positives)).isdisjoint(map(normal, negatives)):
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
    blocks = candidates_of(prompt)
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
        source: which steps of this run, or the scale of the paper's student.
        kind: bcq or ncq.
        subset: right, wrong or all.
        rollouts: how many.
        positive, negative, other: shares; `other` holds rollouts without an answer too.
        accuracy: share of right rollouts among all of the kind.
        none: share without an answer; None where the source does not say.
    """

    source: str
    kind: str
    subset: str
    rollouts: int
    positive: float | None
    negative: float | None
    other: float | None
    accuracy: float | None
    none: float | None = None


_BOTH = ("right", "wrong")
LAST_STEPS = 3
"""The audit's window: as many steps as the paper's tables cover dumps, counted from the end."""


def match_rows(counts: Counts, source: str) -> list[MatchRow]:
    """Rows of some steps of this run: BCQ and NCQ, each right, wrong and all; kinds without a rollout are left out."""
    rows = []
    for kind in (BCQ, NCQ):
        right, total = (sum(counts["match", kind, part, which] for part in parts for which in MATCHES) for parts in (("right",), _BOTH))
        if not total:
            continue
        for subset, parts in (("right", ("right",)), ("wrong", ("wrong",)), ("all", _BOTH)):
            found = [sum(counts["match", kind, part, which] for part in parts) for which in MATCHES]
            positive, negative, other, none = (n / sum(found) if sum(found) else None for n in found)
            both = None if other is None or none is None else other + none
            rows.append(MatchRow(source, kind, subset, sum(found), positive, negative, both, right / total, none))
    return rows


def run_rows(steps: Sequence[Counts]) -> list[MatchRow]:
    """The rows of a run: of the last three steps with rollouts of a kind, as in the paper's tables, and of the whole run beside them.

    Args:
        steps: the counts of every step, in order.
    """
    rows = []
    for kind in (BCQ, NCQ):
        own = [counts for counts in steps if any(key[:2] == ("match", kind) for key in counts)]
        for source, part in ((f"last {min(LAST_STEPS, len(own))} steps", own[-LAST_STEPS:]), ("whole run", own)):
            total: Counts = Counter()
            for counts in part:
                total.update(counts)
            rows += [row for row in match_rows(total, source) if row.kind == kind]
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
            *(float(row[name]) for name in ("match_positive", "match_negative", "other", "accuracy")),
        )
        for row in csv.DictReader(text.splitlines())
    ]


def paper_buffer() -> dict[str, dict[str, float]]:
    """The paper's numbers of the replay buffer (Figs. 4, 5b, 21, 23, 24): quantity -> value, by "paper <scale>, <method>"; small first."""
    text = (files("zppo.report") / "data" / "paper_buffer.csv").read_text(encoding="utf-8")
    known: dict[str, dict[str, float]] = {}
    for row in sorted(csv.DictReader(text.splitlines()), key=lambda row: float(row["scale"].removesuffix("B"))):
        known.setdefault(f"paper {row['scale']}, {row['method']}", {})[row["quantity"]] = float(row["value"])
    return known


PAPER_BINS = ("0%", "12.5%", "25%", "37.5%")
"""The paper's entry bins: eight rollouts a question, and a threshold of a half."""


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
        waits: per bin, the steps from admission to graduation of each graduate.
        fates: by how often an entry was asked plainly since admission (`MOST_VISITS`: so often or more), how many had each of `FATES`;
            those that are still in the buffer count (Fig. 24).
        unvisited: entries that were not asked again yet, or left before they were.
    """

    names: tuple[str, ...]
    steps: Any
    admitted: Any
    graduated: Any
    evicted: Any
    waits: tuple[tuple[int, ...], ...] = ()
    fates: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    unvisited: int = 0

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

    @property
    def left(self) -> Any:
        """(2, T) entries that graduated, and that were evicted, up to each step."""
        return np.cumsum([self.graduated.sum(axis=0), self.evicted.sum(axis=0)], axis=1)

    def totals(self) -> list[tuple[str, int, int, int]]:
        """(bin, admitted, graduated, evicted) over the whole run, and the row "all"."""
        sums = [part.sum(axis=1) for part in (self.admitted, self.graduated, self.evicted)]
        rows = [(name, *(int(s[i]) for s in sums)) for i, name in enumerate(self.names)]
        return [*rows, ("all", *(int(s.sum()) for s in sums))]  # type: ignore[list-item]


FATES = ("never improved", "improved, not graduated", "graduated")
MOST_VISITS = 6


class PlainVisit(NamedTuple):
    """A plain group that counts for the buffer."""

    step: int
    question_id: str
    accuracy: float


def zone_story(
    events: Iterable[Mapping[str, Any]], group_size: int, threshold: float, last_step: int, visits: Iterable[PlainVisit] = ()
) -> ZoneStory:
    """The story that the lines of buffer.jsonl tell up to `last_step`; later lines (of a step that is being written) wait.

    Args:
        visits: every plain group of the run that counts for the buffer, by step; only `fates` needs them.
    """
    bins = bin_count(group_size, threshold)
    counts = {name: np.zeros((bins, last_step), dtype=np.int64) for name in ("admitted", "graduated", "evicted")}
    waits: list[list[int]] = [[] for _ in range(bins)]
    told = [event for event in events if event["step"] <= last_step]
    for event in told:
        index = bin_of(event["entry_accuracy"], group_size, bins)
        counts[event["event"]][index, event["step"] - 1] += 1
        if event["event"] == "graduated":
            waits[index].append(event["step"] - event["entry_step"])
    fates = Counter(_fates(told, visits))
    asked = sorted({count for count, _ in fates if count})
    return ZoneStory(
        names=tuple(bin_name(i, group_size) for i in range(bins)),
        steps=np.arange(1, last_step + 1),
        **counts,
        waits=tuple(map(tuple, waits)),
        fates={count: tuple(fates[count, fate] for fate in FATES) for count in asked},
        unvisited=sum(n for (count, _), n in fates.items() if not count),
    )


def _fates(events: Sequence[Mapping[str, Any]], visits: Iterable[PlainVisit]) -> Iterator[tuple[int, str]]:
    """(visits up to `MOST_VISITS`, fate) of every entry. An entry has improved where one of its plain accuracies is above the first."""
    asked: dict[str, list[PlainVisit]] = {}
    for visit in visits:
        asked.setdefault(visit.question_id, []).append(visit)
    if not asked:
        return
    last = {event["id"]: event for event in events}
    for event in events:
        question = event["id"]
        if event["event"] == "admitted" and last[question] is not event:
            continue  # told by the event by which it left
        waiting = event["event"] == "admitted"
        end = math.inf if waiting else event["step"]
        own = [v.accuracy for v in asked.get(question, ()) if event["entry_step"] < v.step <= end]
        improved = any(accuracy > event["entry_accuracy"] for accuracy in own)
        fate = FATES[2] if event["event"] == "graduated" else FATES[1] if improved else FATES[0]
        yield min(MOST_VISITS, len(own) if waiting else event["visits"]), fate


def median(values: Iterable[float]) -> float:
    """The median, NaN of nothing."""
    data = list(values)
    return float(np.median(data)) if data else math.nan
