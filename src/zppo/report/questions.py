"""One line per question: what happened to it, by which a reader finds it; and which questions a page shows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zppo.core.draws import draw_key
from zppo.core.types import PLAIN
from zppo.report.load import Run
from zppo.report.scan import StepScan
from zppo.report.zone import bin_count, bin_name, bin_of

EXCERPT = 160
"""Characters of a question's text in its line."""

GRADUATED, EVICTED, WAITING, NEVER_HARD = "graduated", "evicted", "waiting", "never hard"
"""Fates: what the last of a question's buffer events was. `NEVER_HARD` stands for no event at all."""


class Visit(NamedTuple):
    """One group of a question."""

    step: int
    kind: str
    correct: int
    graded: int


@dataclass(slots=True)
class QuestionLine:
    """What happened to one question.

    Attributes:
        text: the beginning of its text.
        visits: its groups of all kinds, in order.
        fate: see above.
        entry_bin: index of the bin at its last admission, None where it never was in the buffer.
        classes: audit classes among its BCQ and NCQ rollouts.
    """

    id: str
    text: str
    level: str
    gold: str
    visits: list[Visit] = field(default_factory=list)
    fate: str = NEVER_HARD
    entry_bin: int | None = None
    classes: set[str] = field(default_factory=set)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of prompts that it was asked with, in order of first appearance."""
        return tuple(dict.fromkeys(visit.kind for visit in self.visits))

    @property
    def steps(self) -> list[int]:
        """Steps in which it was asked, ascending."""
        return sorted({visit.step for visit in self.visits})

    @property
    def accuracies(self) -> list[float]:
        """Plain accuracy visit by visit; groups without a verdict are left out."""
        return [v.correct / v.graded for v in self.visits if v.kind == PLAIN and v.graded]

    def never_improved(self, threshold: float) -> bool:
        """Hard at first, asked plainly again, and never above its first accuracy [zppo]."""
        values = self.accuracies
        return len(values) > 1 and values[0] < threshold and max(values[1:]) <= values[0]


def question_lines(run: Run, scans: Iterable[StepScan]) -> dict[str, QuestionLine]:
    """All questions that were asked, by id, in order of first appearance."""
    lines: dict[str, QuestionLine] = {}
    for scan in scans:
        for group in scan.groups:
            line = lines.get(group.question_id)
            if line is None:
                text = " ".join(group.question[: 4 * EXCERPT].split())[:EXCERPT]
                line = lines[group.question_id] = QuestionLine(group.question_id, text, group.level, group.gold)
            line.visits.append(Visit(group.step, group.kind, group.correct, group.graded))
            line.classes |= group.classes
    bins = bin_count(run.group_size, run.threshold)
    for event in run.buffer:
        line = lines.get(event["id"])
        if line is not None:
            line.fate = WAITING if event["event"] == "admitted" else event["event"]
            line.entry_bin = bin_of(event["entry_accuracy"], run.group_size, bins)
    return lines


def stratified(lines: Iterable[QuestionLine], most: int) -> list[QuestionLine]:
    """Up to `most` questions, spread evenly over kinds asked, entry bins and audit classes [zppo].

    Every stratum in turn gives one question until there are enough; a question with rollouts of several audit classes lies in several
    strata. Inside a stratum the order is keyed by question id: the same run always gives the same questions, in an order in which a
    shorter list is spread as evenly.
    """
    strata: dict[tuple[str, str, str], list[QuestionLine]] = {}
    for line in lines:
        kinds = "+".join(sorted(line.kinds))
        for name in line.classes or {""}:
            strata.setdefault((kinds, str(line.entry_bin), name), []).append(line)
    queues = [iter(sorted(strata[key], key=lambda q: (draw_key("story", q.id), q.id))) for key in sorted(strata)]
    chosen: dict[str, QuestionLine] = {}
    while queues and len(chosen) < most:
        alive = []
        for queue in queues:
            found = next((q for q in queue if q.id not in chosen), None)
            if found is not None and len(chosen) < most:
                chosen[found.id] = found
                alive.append(queue)
        queues = alive
    return list(chosen.values())


def to_index(line: QuestionLine, run: Run) -> dict[str, Any]:
    """A question's line as the page reads it; short keys, because a long run has many."""
    return {
        "id": line.id,
        "text": line.text,
        "level": line.level,
        "gold": line.gold[:EXCERPT],
        "kinds": line.kinds,
        "steps": line.steps,
        "acc": [round(a, 4) for a in line.accuracies],
        "fate": line.fate,
        "bin": None if line.entry_bin is None else bin_name(line.entry_bin, run.group_size),
        "stuck": line.never_improved(run.threshold),
        "classes": sorted(line.classes),
    }


def nearest(wanted: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Known ids that resemble a wanted one: those that contain it, else those that look alike."""
    names = list(known)
    containing = [name for name in names if wanted in name]
    return (containing or difflib.get_close_matches(wanted, names[:50_000], n=most, cutoff=0.5))[:most]
