"""The rows of an evaluation: what came of one sample of one question, and what all rows of a benchmark come to. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from zppo.evaluate.aggregate import Scored, figure
from zppo.evaluate.benchmark import Benchmark

By = Literal["rule", "judge", "open", "left out"]
TRUNCATED = "max_tokens"
TOO_LONG = "model_length"
"""What inspect-ai calls it where the server refuses a conversation that is too long for the model's context."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of one question.

    Attributes:
        id, epoch: which one; epochs count from 1.
        by: who decided; open: nobody yet, because model or judge failed. A repeated call asks again;
            left out: it has pictures, and the model takes none.
        value: 0 to 1; None while open, or where it is left out.
        text: what the model wrote, thoughts included.
        answer: what was extracted.
        reason: what the rules said, in a word or two.
        reply: the judge's, "" where it was not asked.
        error: why the row is open or left out.
        finish: why the model stopped.
        tokens_in, tokens_out: of the model, as its server counts.
        judge_tokens: of the judge, in and out.
        gold: what is right.
        facts: of the question.
    """

    id: str
    epoch: int
    by: By
    value: float | None = None
    text: str = ""
    answer: str | None = None
    reason: str = ""
    reply: str = ""
    error: str = ""
    finish: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    judge_tokens: tuple[int, int] = (0, 0)
    gold: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def scored(rows: Iterable[Row]) -> list[Scored]:
    """Decided rows by question: samples of one question are no new questions, their mean is one value (so errors are clustered)."""
    by_id: dict[str, list[Row]] = {}
    for row in rows:
        if row.value is not None:
            by_id.setdefault(row.id, []).append(row)
    return [Scored(fmean(r.value or 0.0 for r in group), group[0].facts) for group in by_id.values()]


def summary(benchmark: Benchmark, rows: Sequence[Row], expected: int) -> dict[str, Any]:
    """The benchmark's part of eval.json: figure, error, counts. Shares are from 0 to 1; null where there is no number.

    Args:
        expected: rows that there should be, samples counted; those that are missing are open.
    """
    result = figure(benchmark, scored(rows))
    decided = [row for row in rows if row.by not in ("open", "left out")]
    left_out = [row for row in rows if row.by == "left out"]
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "family": benchmark.family,
        "aggregate": benchmark.aggregate,
        "value": _number(result.value),
        "error": _number(result.error),
        "units": result.n,
        "beside": {name: _number(value) for name, value in result.beside.items()},
        "expected": expected,
        "rows": len(decided),
        "by_rule": sum(row.by == "rule" for row in decided),
        "by_judge": sum(row.by == "judge" for row in decided),
        "no_answer": sum(
            row.answer is None and row.reason == "no answer" and row.finish != TOO_LONG for row in decided
        ),
        "truncated": sum(row.finish == TRUNCATED for row in decided),
        "too_long": sum(row.finish == TOO_LONG for row in decided),
        "left_out": len(left_out),
        "why_left_out": left_out[0].error if left_out else "",
        "open": expected - len(decided) - len(left_out),
        "judge_errors": sum(row.by == "open" and bool(row.finish) for row in rows),
        "tokens_in": sum(row.tokens_in for row in rows),
        "tokens_out": sum(row.tokens_out for row in rows),
        "judge_tokens_in": sum(row.judge_tokens[0] for row in rows),
        "judge_tokens_out": sum(row.judge_tokens[1] for row in rows),
    }


def families(benchmarks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The mean of each family over its benchmarks that have a figure, with its standard error (benchmarks are independent)."""
    result: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(str(each["family"]) for each in benchmarks):
        have = [each for each in benchmarks if each["family"] == name and each["value"] is not None]
        if not have:
            continue
        errors = [math.nan if each["error"] is None else float(each["error"]) for each in have]
        result[name] = {
            "value": fmean(float(each["value"]) for each in have),
            "error": _number(math.sqrt(math.fsum(e * e for e in errors)) / len(errors)),
            "benchmarks": [each["name"] for each in have],
        }
    return result


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
