"""`zppo lab scorecard`: the paper's claims and ours, each as contrasts of study rows, with an interval and a verdict [zppo].

Every claim is written down as contrasts that it says are above zero, before any row is there. A contrast is taken for every seed, averaged
over seeds within a student and then over students. Intervals hold all at once with 95%: each is Student's t at a level of 5% by the number
of all contrasts of the table (Bonferroni), so that many looks do not make a finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from zppo.config.bundled import recipes_folder
from zppo.errors import SettingsError
from zppo.lab.study import MATCHED, Row, graduated_share, grid, print_tables, read_rows, run_study
from zppo.report.bootstrap import student_t
from zppo.sweep import parse_seeds

RECIPE = "lab-elsewhere"
STUDENTS = ("lab:elsewhere/student", "lab:elsewhere-2/student")
SEEDS = "10-17"
"""No method was run with them while the world was made."""
EVERY = 25
"""Steps between evaluations, by which runs are compared at equal cost."""
ENOUGH = 8
"""Seeds of each student from which on there is a verdict."""
SMALL = 0.03
"""A difference in accuracy below which nobody would change a method for it."""

TRAINED, COMPOSED, CARRIED = ("easy", "medium", "hard"), ("unseen", "longer"), ("reworded",)
OTHERS = ("dialect", "other", "three", "sort", "count", "copy")


def _over(levels: Sequence[str], accuracies: Mapping[str, float]) -> float:
    return fmean(accuracies[level] for level in levels)


def _mean(levels: Sequence[str]) -> Callable[[Row], float | None]:
    return lambda row: _over(levels, row["after"])


_JUDGED = (
    f"holds: the whole interval is above zero; refuted: the whole of it is at or below zero, or {SMALL} where one method is compared with "
    "another by accuracy; undecided: all else. mean: of both students; where a claim is about their difference, the difference."
)


class Measure(NamedTuple):
    """What a row says; None where it says nothing of it."""

    says: str
    of: Callable[[Row], float | None]


MEASURES: Mapping[str, Measure] = {
    "trained": Measure("plain accuracy on held-out questions of the trained family, the mean of its three levels", _mean(TRAINED)),
    "hard": Measure("the same of the hardest level", _mean(TRAINED[-1:])),
    "composed": Measure("of left-out operations and longer chains", _mean(COMPOSED)),
    "carried": Measure("of harder questions in the other wording", _mean(CARRIED)),
    "kept": Measure(
        "accuracy on the other skills after training minus before", lambda row: _over(OTHERS, row["after"]) - _over(OTHERS, row["before"])
    ),
    "along": Measure(
        "the mean of that over the evaluations of a run",
        lambda row: fmean(_over(OTHERS, point["by_level"]) - _over(OTHERS, row["before"]) for point in row["curve"] if point["step"]),
    ),
    "drift": Measure(
        "KL per token from the pretrained student on these skills, nats", lambda row: fmean(row["drift"].values()) if row["drift"] else None
    ),
    "graduated": Measure("share of the entries admitted at 0% that graduated", graduated_share),
    "bcq": Measure("accuracy of BCQ rollouts at the end", lambda row: row.get("bcq_accuracy")),
    "followed": Measure("share of the wrong ones with the wrong candidate's answer", lambda row: row.get("bcq_followed")),
    "asked": Measure("thousands of teacher tokens", lambda row: row["teacher_tokens"] / 1000),
}


@dataclass(frozen=True)
class Contrast:
    """What a claim says is above zero: a sum of one measure over methods, plus a constant.

    Attributes:
        says: in words.
        measure: of `MEASURES`.
        weights: by method or variant.
        constant: added.
        small: up to here an effect is as good as none, and the claim refuted.
        between: the second (weaker) student's value minus the first one's, not their mean.
        equal: a cost of the rows; accuracy is read where every run had spent what the cheapest of them spends in all.
    """

    says: str
    measure: str
    weights: Mapping[str, float]
    constant: float = 0.0
    small: float = 0.0
    between: bool = False
    equal: str = ""

    def value(self, rows: Mapping[str, Row]) -> float | None:
        """Of the rows of one student and seed, which has all of its methods; None where a row has nothing of the measure."""
        if self.equal:
            spent = min(rows[method][self.equal] for method in self.weights)
            found: list[float | None] = [_trained_at(rows[method], self.equal, spent) for method in self.weights]
        else:
            found = [MEASURES[self.measure].of(rows[method]) for method in self.weights]
        if any(number is None for number in found):
            return None
        return self.constant + sum(w * number for w, number in zip(self.weights.values(), found, strict=True) if number is not None)


@dataclass(frozen=True)
class Claim:
    """One line of the card.

    Attributes:
        text: what is claimed.
        contrasts: each is above zero if it holds.
        ours: a question of this project's, where the paper claims nothing: worth it or not.
    """

    text: str
    contrasts: tuple[Contrast, ...] = field(default=())
    ours: bool = False


def _above(more: str, less: str, measure: str = "trained", small: float = SMALL, **how: Any) -> Contrast:
    return Contrast(f"{more} > {less}, {measure}", measure, {more: 1, less: -1}, small=small, **how)


def _below(less: str, more: str, measure: str) -> Contrast:
    return Contrast(f"{less} < {more}, {measure}", measure, {less: -1, more: 1})


AT_FOUR = ":minibatches-4"
"""As in the paper; the lab's recipes take eight, with which hardly anything is left of the other skills."""
TEACHING = ("teacher-response", "off-distill", "on-distill")
RIVALS = ("dapo", "luffy", "guide-grpo", "scaf-grpo", "lte", "pope", "sdpo", "opsd")

CLAIMS: Mapping[str, Claim] = {
    "1": Claim("ZPPO > GRPO† > GRPO on held-out plain questions", (_above("zppo", "grpo-replay"), _above("grpo-replay", "grpo"))),
    "2": Claim(
        "replay alone helps little",
        (Contrast("replay alone is less than half of what ZPPO gains, trained", "trained", {"grpo-replay": -1, "grpo": 0.5, "zppo": 0.5}),),
    ),
    "3": Claim(
        "replay and reformulation together are more than their sum",
        (
            Contrast(
                "(zppo - grpo-both) > (grpo-replay - grpo), trained",
                "trained",
                {"zppo": 1, "grpo-both": -1, "grpo-replay": -1, "grpo": 1},
                small=SMALL,
            ),
        ),
    ),
    "4": Claim(
        "BCQ carries weak students, NCQ stronger ones",
        (
            _above("grpo-replay-bcq", "grpo-replay-ncq"),
            Contrast(
                "BCQ - NCQ, the second (weaker) student's minus the first one's, trained",
                "trained",
                {"grpo-replay-bcq": 1, "grpo-replay-ncq": -1},
                small=SMALL,
                between=True,
            ),
        ),
    ),
    "5": Claim(
        "of the entries admitted at 0% several times as many graduate as with GRPO†",
        (Contrast("zppo > 2 x grpo-replay, graduated", "graduated", {"zppo": 1, "grpo-replay": -2}),),
    ),
    "6": Claim(
        "BCQ accuracy stays far below 100%, and wrong rollouts follow the wrong candidate",
        (
            Contrast("BCQ accuracy < 0.9", "bcq", {"zppo": -1}, constant=0.9),
            Contrast("more than half of the wrong ones follow it", "followed", {"zppo": 1}, constant=-0.5),
        ),
    ),
    "7": Claim(
        "with the teacher in the gradient students lose outside of training, with ZPPO not",
        (
            Contrast("zppo loses less than 0.05, kept", "kept", {"zppo": 1}, constant=0.05),
            *(_above("zppo", method, what) for what in ("kept", "along", "carried") for method in TEACHING),
            *(_above("zppo" + AT_FOUR, "teacher-response" + AT_FOUR, what) for what in ("kept", "along", "carried")),
            _above("zppo" + AT_FOUR, "grpo" + AT_FOUR, "kept"),
        ),
    ),
    "8": Claim("Hint and Prefix stay below BCQ", (_above("grpo-replay-bcq", "hint"), _above("grpo-replay-bcq", "prefix"))),
    "9": Claim(
        "four minibatches are best of 1, 4, 8, 16",
        tuple(_above("zppo:minibatches-4", other) for other in ("zppo:minibatches-1", "zppo", "zppo:minibatches-16")),
    ),
    "10": Claim(
        "normalising without zero groups beats normalising with them, and not normalising",
        (_above("zppo", "zppo:scope-all"), _above("zppo", "zppo:scope-none")),
    ),
    "11": Claim("it is the content of the candidates", (_above("zppo", "zppo-placebo"), _above("zppo", "zppo-scrambled")), ours=True),
    "12": Claim(
        "it is worth its cost",
        (
            Contrast("zppo > grpo-replay with as many rollouts", "trained", {"zppo": 1, "grpo-replay" + MATCHED: -1}, small=SMALL),
            *(_above("zppo", method, small=SMALL, equal=cost) for method in TEACHING[:2] for cost in ("teacher_tokens", "student_tokens")),
        ),
        ours=True,
    ),
    "13": Claim(
        "extensions help",
        (
            Contrast("asking lazily saves teacher tokens (thousands)", "asked", {"zppo:ask-all": 1, "zppo": -1}),
            _above("zppo", "zppo:ties-batch"),
            _above("zppo:dynamic", "zppo"),
            _above("zppo:two-teachers", "zppo"),
        ),
        ours=True,
    ),
    "14": Claim(
        "ZPPO moves a student less on its other skills",
        (
            *(_below("zppo", method, "drift") for method in ("grpo", *TEACHING)),
            *(_below("zppo" + AT_FOUR, method + AT_FOUR, "drift") for method in ("grpo", "teacher-response")),
        ),
        ours=True,
    ),
    "15": Claim("ZPPO ends above its rivals", tuple(_above("zppo", method) for method in RIVALS), ours=True),
}


def _trained_at(row: Row, cost: str, spent: float) -> float:
    """Accuracy on the trained family when a run had spent so much, between its evaluations in a straight line."""
    points = [*row["curve"], {cost: row[cost], "by_level": row["after"]}]
    accuracies = [_over(TRAINED, point["by_level"]) for point in points]
    return float(np.interp(spent, [float(point[cost]) for point in points], accuracies))


@dataclass(frozen=True, slots=True)
class ContrastEstimate:
    """What the rows say of a contrast.

    Attributes:
        students: mean over seeds, by student.
        value, low, high: mean over students and its interval; NaN where there is too little.
        seeds: fewest of a student, for which every method has a row. A seed whose runs left nothing to measure counts, without a value.
    """

    students: tuple[float, ...]
    value: float
    low: float
    high: float
    seeds: int

    def verdict(self, contrast: Contrast) -> str:
        """holds, refuted or undecided; how many seeds there are where they are not enough."""
        if self.seeds < ENOUGH:
            return f"{self.seeds} of {ENOUGH} seeds"
        return "holds" if self.low > 0 else "refuted" if self.high <= contrast.small else "undecided"


def score(contrast: Contrast, rows: Sequence[Row], looks: int) -> ContrastEstimate:
    """The contrast over all seeds that have what it needs.

    Args:
        looks: contrasts that are looked at in all; intervals hold for all of them at once with 95%.
    """
    complete = [[row for row in _by_seed(rows, student) if contrast.weights.keys() <= row.keys()] for student in STUDENTS]
    values = [[v for row in seeds if (v := contrast.value(row)) is not None] for seeds in complete]
    means = tuple(fmean(v) if v else math.nan for v in values)
    signs = (-1.0, 1.0) if contrast.between else (1 / len(STUDENTS),) * len(STUDENTS)
    value, fewest = sum(s * m for s, m in zip(signs, means, strict=True)), min(map(len, complete))
    if min(map(len, values)) < 2:
        return ContrastEstimate(means, value, math.nan, math.nan, fewest)
    error = math.sqrt(sum(s * s * variance(v) / len(v) for s, v in zip(signs, values, strict=True)))
    half = student_t(1 - 0.05 / looks / 2, sum(map(len, values)) - len(values)) * error
    return ContrastEstimate(means, value, value - half, value + half, fewest)


def _by_seed(rows: Sequence[Row], student: str) -> Iterator[dict[str, Row]]:
    mine = [row for row in rows if row["student"] == student]
    for seed in sorted({row["seed"] for row in mine}):
        yield {row["method"]: row for row in mine if row["seed"] == seed}


def methods_of(numbers: Sequence[str]) -> list[str]:
    """The methods and variants that claims need, each once.

    Raises:
        SettingsError: a number that is no claim.
    """
    if unknown := [number for number in numbers if number not in CLAIMS]:
        raise SettingsError(f"--claims names {', '.join(unknown)}; the card has 1 to {len(CLAIMS)}")
    return list(dict.fromkeys(method for number in numbers for contrast in CLAIMS[number].contrasts for method in contrast.weights))


def run_scorecard(numbers: Sequence[str], seeds: str, rows: Path, *, jobs: int, console: Console) -> int:
    """Run what the claims need and has no row yet; how many runs failed. Raises SettingsError: no such claim or seeds."""
    console.print("A run takes 20 s to three minutes of a core. Ctrl-C ends the study, and the same command goes on.", highlight=False)
    cells = list(grid([recipes_folder() / f"{RECIPE}.yaml"], methods_of(numbers), parse_seeds(seeds), STUDENTS))
    return run_study(cells, rows, jobs=jobs, work=Path("runs/scorecard"), extra=[f"--eval.every={EVERY}"], console=console)


def scorecard_tables(rows: Sequence[Row], numbers: Sequence[str]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, lines): the claims, then what every method came to and cost, by student."""
    looks = sum(len(claim.contrasts) for claim in CLAIMS.values())
    lines = []
    for number in numbers:
        for at, contrast in enumerate(CLAIMS[number].contrasts):
            found = score(contrast, rows, looks)
            head = [f"{number}.{at + 1}", CLAIMS[number].text if at == 0 else ""]
            interval = "-" if math.isnan(found.value) else f"{found.value:+.3f}"
            interval += "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
            each = ["-" if math.isnan(mean) else f"{mean:+.3f}" for mean in found.students]
            at_cost = f", at equal {contrast.equal.replace('_', ' ')}" if contrast.equal else ""
            lines.append([*head, contrast.says + at_cost, *each, interval, found.verdict(contrast)])
    title = f"Claims; intervals hold for all {looks} contrasts at once with 95%"
    columns = [
        "",
        "claim",
        "what is above zero if it holds",
        *(s.removeprefix("lab:").partition("/")[0] for s in STUDENTS),
        "mean",
        "verdict",
    ]
    return [(title, columns, lines), *(_outcomes(rows, student) for student in STUDENTS)]


def _outcomes(rows: Sequence[Row], student: str) -> tuple[str, list[str], list[list[str]]]:
    mine = [row for row in rows if row["student"] == student]
    lines = []
    for method in dict.fromkeys(row["method"] for row in mine):
        found = [row for row in mine if row["method"] == method]
        shares = []
        for measure in MEASURES.values():
            values = [value for row in found if (value := measure.of(row)) is not None]
            shares.append(f"{fmean(values):.3f}" if values else "-")
        costs = [f"{fmean(row[cost] for row in found):,.0f}" for cost in ("student_tokens", "teacher_tokens")]
        costs.append(f"{median(row['seconds'] for row in found):,.0f}")  # a run that had to wait says nothing about what it takes
        lines.append([method, str(len(found)), *shares[:-1], *costs])
    columns = ["method", "seeds", *list(MEASURES)[:-1], "student tokens", "teacher tokens", "seconds"]
    return f"{student}: means over seeds; seconds: their median", columns, lines


def print_scorecard(path: Path, numbers: Sequence[str], console: Console, *, markdown: bool = False) -> None:
    """Print the card of a file of rows, for a terminal or as Markdown.

    Raises:
        DataError: the file is missing or empty.
    """
    print_tables(scorecard_tables(read_rows(path), numbers), console, markdown=markdown)
    if not markdown:
        console.print()
        for line in (_JUDGED, *(f"{name}: {measure.says}" for name, measure in list(MEASURES.items())[:-1])):  # the last is no column
            console.print(line, highlight=False, markup=False)
