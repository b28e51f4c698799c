"""From scores of rows to the figure of a benchmark, and to what is reported beside it. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from zppo.evaluate.benchmark import Aggregate, Benchmark


class Scored(NamedTuple):
    """The final score of a row.

    Attributes:
        value: 0 to 1; the mean, where a row was sampled several times.
        facts: of its item.
    """

    value: float
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """What a benchmark comes to, as shares from 0 to 1.

    Attributes:
        value: the figure that counts in the family's average.
        error: its standard error, NaN below two rows.
        n: how many units it is the mean of: rows, seed questions, tasks.
        beside: other figures of the benchmark, by name.
    """

    value: float
    error: float
    n: int
    beside: Mapping[str, float] = field(default_factory=dict)


def figure(benchmark: Benchmark, rows: Sequence[Scored]) -> Figure:
    """The benchmark's figure over its scored rows; NaN without any."""
    return _AGGREGATES[benchmark.aggregate](rows)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean, from the sample's standard deviation."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _groups(rows: Sequence[Scored], fact: str) -> dict[str, list[float]]:
    """Values by what a fact says, in the order in which it is first said; rows without it are left out."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.facts.get(fact) not in (None, ""):
            groups.setdefault(str(row.facts[fact]), []).append(row.value)
    return groups


_BREAKDOWNS = ("config", "part", "task", "type", "version", "answer_type", "track", "duration")


def _plain(rows: Sequence[Scored]) -> Figure:
    """The mean over rows, with that of the groups that a benchmark reports."""
    values = [row.value for row in rows]
    beside: dict[str, float] = {}
    for fact in _BREAKDOWNS:
        groups = _groups(rows, fact)
        if len(groups) > 1:
            beside |= {f"{fact} {name}": _mean(group) for name, group in groups.items()}
    return Figure(_mean(values), _error(values), len(values), beside)


def _worst_case(rows: Sequence[Scored]) -> Figure:
    """DynaMath: the share of seed questions right in every variant; beside it the average over all rows."""
    seeds = list(_groups(rows, "seed").values())
    worst = [min(values) for values in seeds]
    always = sum(min(values) == max(values) for values in seeds)
    beside = {
        "average": _mean(row.value for row in rows),
        "consistent": always / len(seeds) if seeds else math.nan,
    }
    return Figure(_mean(worst), _error(worst), len(worst), beside)


# OCRBench v2 averages kinds of ability, not rows: which tasks belong to each.
_ABILITIES: Mapping[str, str] = MappingProxyType(
    {
        task: ability
        for ability, tasks in {
            "text recognition": "text recognition en, fine-grained text recognition en, full-page OCR en, full-page OCR cn",
            "text referring": "text grounding en, VQA with position en",
            "text spotting": "text spotting en",
            "relation extraction": "key information extraction en, key information mapping en, key information extraction cn, "
            "handwritten answer extraction cn",
            "element parsing": "document parsing en, chart parsing en, table parsing en, formula recognition en, document parsing cn, "
            "table parsing cn, formula recognition cn",
            "mathematical calculation": "math QA en, text counting en",
            "visual text understanding": "document classification en, cognition VQA en, diagram QA en, cognition VQA cn",
            "knowledge reasoning": "reasoning VQA en, science QA en, APP agent en, ASCII art classification en, reasoning VQA cn, "
            "text translation cn",
        }.items()
        for task in tasks.split(", ")
    }
)  # fmt: skip


def _abilities(rows: Sequence[Scored]) -> Figure:
    """OCRBench v2: the mean over kinds of ability of the mean over their rows; the mean over rows beside it."""
    named = [Scored(row.value, {"ability": _ABILITIES.get(str(row.facts.get("task")), "other")}) for row in rows]
    groups = _groups(named, "ability")
    means = {name: _mean(values) for name, values in groups.items()}
    # Independent means: the error of their average.
    errors = [_error(values) for values in groups.values()]
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(errors) if errors else math.nan
    return Figure(_mean(means.values()), error, len(means), means | {"all rows": _mean(row.value for row in rows)})


def _axes(rows: Sequence[Scored]) -> Figure:
    """MultiChallenge: the mean of its four axes; the mean over conversations beside it."""
    groups = _groups(rows, "axis")
    means = {name: _mean(values) for name, values in groups.items()}
    errors = [_error(values) for values in groups.values()]
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(errors) if errors else math.nan
    return Figure(_mean(means.values()), error, len(means), means | {"all rows": _mean(row.value for row in rows)})


def _wemath(rows: Sequence[Scored]) -> Figure:
    """We-Math: accuracy over all rows; beside it the four-way score of `mastery`."""
    values = [row.value for row in rows]
    return Figure(_mean(values), _error(values), len(values), mastery(rows))


def mastery(rows: Sequence[Scored]) -> dict[str, float]:
    """We-Math's four-way score over its composite problems (Qiao et al. 2024, section 3.3).

    A composite problem, which has the key `<n>steps_multi`, is looked at together with its steps, `<n>steps_1` to n:

    - IK, insufficient knowledge: it is wrong, and so is a step.
    - IG, inadequate generalisation: it is wrong, and every step is right.
    - CM, complete mastery: it is right, and every step is (strict), or at least one is (loose).
    - RM, rote memorisation: it is right, and a step is wrong (strict), or every one is (loose).

    The score is CM + IG / 2, as a share of the composite problems; RM is also reported as a share of those that are right. Problems of
    which a row is missing are left out.

    Returns:
        IK, IG, and for strict and loose CM, RM, RM of right, score; empty without a whole problem.
    """
    problems: dict[tuple[str, str], dict[str, bool]] = {}
    for row in rows:
        steps, _, part = str(row.facts.get("key", "")).partition("steps_")
        if part:
            problems.setdefault((str(row.facts.get("problem")), steps), {})[part] = row.value >= 0.5
    whole = [
        ([parts[str(i)] for i in range(1, int(steps) + 1)], parts["multi"])
        for (_, steps), parts in problems.items()
        if steps.isdigit() and parts.keys() >= {"multi", *(str(i) for i in range(1, int(steps[:2]) + 1))}
    ]
    if not whole:
        return {}
    n = len(whole)
    right = [steps for steps, composite in whole if composite]
    wrong = [steps for steps, composite in whole if not composite]
    inadequate = sum(all(steps) for steps in wrong) / n
    result = {"IK": 1 - len(right) / n - inadequate, "IG": inadequate}
    for name, mastered in (("strict", all), ("loose", any)):
        complete = sum(mastered(steps) for steps in right) / n
        rote = len(right) / n - complete
        result |= {
            f"CM {name}": complete,
            f"RM {name}": rote,
            f"RM of right {name}": rote * n / len(right) if right else 0.0,
            f"score {name}": complete + inadequate / 2,
        }
    return result


_AGGREGATES: Mapping[Aggregate, Callable[[Sequence[Scored]], Figure]] = MappingProxyType(
    {
        "mean": _plain,
        "worst case": _worst_case,
        "wemath": _wemath,
        "abilities": _abilities,
        "axes": _axes,
    }
)
