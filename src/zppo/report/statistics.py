"""Means with intervals over few runs, paired where seeds pair them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal one is within 2%.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over runs with its 95% interval (Student's t).

    Attributes:
        value, low, high: in the unit of what was averaged; low and high are NaN for a single run.
        n: runs.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        return (
            f"{self.value:+.2f}" if math.isnan(self.low) else f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        )

    def unsigned(self) -> str:
        """The same for what cannot be negative."""
        return str(self).replace("+", "")


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean and 95% interval; NaN for no values."""
    n = len(values)
    if n < 2:
        return Mean(values[0] if values else math.nan, math.nan, math.nan, n)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = t * stdev(values) / math.sqrt(n)
    return Mean(fmean(values), fmean(values) - half, fmean(values) + half, n)


def paired_difference(minuend: dict[str, float], subtrahend: dict[str, float]) -> Mean:
    """Mean difference over the keys (seeds) that both have."""
    return mean_interval([minuend[key] - subtrahend[key] for key in minuend if key in subtrahend])
