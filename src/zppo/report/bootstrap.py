"""Means with intervals over few runs, paired where seeds pair them.

How sure a mean difference over benchmarks is: the cluster bootstrap of App. F.6.

A benchmark is the cluster: benchmarks, not their questions, are drawn with replacement, so that the interval says what
another choice of benchmarks of this family would have given.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from rich.console import Console
from rich.table import Table as View

from zppo.errors import DataError, SettingsError
from zppo.names import check_file, readable


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
        return f"{self.value:+.2f}" if math.isnan(self.low) else f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    def unsigned(self) -> str:
        """The same for what cannot be negative."""
        return str(self).replace("+", "")


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean and 95% interval; NaN for no values."""
    n = len(values)
    if n < 2:
        return Mean(values[0] if values else math.nan, math.nan, math.nan, n)
    half = student_t(0.975, n - 1) * stdev(values) / math.sqrt(n)
    return Mean(fmean(values), fmean(values) - half, fmean(values) + half, n)


@cache
def student_t(level: float, freedom: int) -> float:
    """The quantile of Student's t at a level above one half, from its density, to four digits."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    angles = np.linspace(0, math.pi / 2, 200_001)  # t = sqrt(freedom) tan(angle): a finite range for any tail
    steps = constant * math.sqrt(freedom) * np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((steps[1:] + steps[:-1]) / 2) * (angles[1] - angles[0])])
    return float(math.sqrt(freedom) * np.tan(np.interp(level - 0.5, below, angles)))


def paired_difference(minuend: dict[str, float], subtrahend: dict[str, float]) -> Mean:
    """Mean difference over the keys (seeds) that both have."""
    return mean_interval([minuend[key] - subtrahend[key] for key in minuend if key in subtrahend])


COLUMNS = ("scale", "method", "family", "benchmark", "accuracy")
OUT_COLUMNS = ("scale", "family", "minuend", "subtrahend", "delta", "ci_low", "ci_high", "wins", "benchmarks")
RESAMPLES = 10_000
_PERCENTILES = (2.5, 97.5)

Accuracies = Mapping[str, float]
Table = dict[tuple[str, str], dict[str, dict[str, float]]]
"""(scale, family) -> method -> benchmark -> accuracy, each in order of first appearance."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and its 95% percentile interval, in the unit of the accuracies.

    Attributes:
        delta: mean over the benchmarks of minuend minus subtrahend.
        low, high: 2.5% and 97.5% percentile of that mean over the resamples.
        wins: benchmarks on which the minuend is strictly higher.
        n: benchmarks.
    """

    delta: float
    low: float
    high: float
    wins: int
    n: int


@dataclass(frozen=True, slots=True)
class MethodDifference:
    """Two methods at one scale on one family of benchmarks."""

    scale: str
    family: str
    minuend: str
    subtrahend: str
    interval: Interval


def cluster_bootstrap(minuend: Accuracies, subtrahend: Accuracies, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The interval of one pair of methods over the same benchmarks (App. F.6).

    Args:
        minuend, subtrahend: benchmark -> accuracy; their order does not matter.
        resamples: draws of n benchmarks out of n with replacement.
        seed: of the draws; one seed gives every pair over as many benchmarks the same resample.

    Raises:
        DataError: no benchmarks, a benchmark that only one side has, or an accuracy that is no finite number.
        SettingsError: `resamples` below 1.
    """
    return bootstrap_pairs({"minuend": minuend, "subtrahend": subtrahend}, [("minuend", "subtrahend")], resamples, seed)[0]


def bootstrap_pairs(
    accuracies: Mapping[str, Accuracies], pairs: Sequence[tuple[str, str]], resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Intervals of many (minuend, subtrahend) pairs over one shared resample of the benchmarks (App. F.6).

    Args:
        accuracies: method -> benchmark -> accuracy.
        pairs: names of methods.
        resamples, seed: as in `cluster_bootstrap`.

    Raises:
        DataError, SettingsError: as in `cluster_bootstrap`; every method of a pair must have the same benchmarks.
    """
    if resamples < 1:
        raise SettingsError(f"resamples is {resamples}; at least 1 is needed, and the paper takes {RESAMPLES:,}")
    if not pairs:
        return []
    names = _shared_benchmarks({name: accuracies[name] for pair in pairs for name in pair})
    rows = [[accuracies[a][name] - accuracies[b][name] for name in names] for a, b in pairs]
    differences = np.array(rows, dtype=np.float64)  # (P, n)
    n = len(names)
    # Only how often each benchmark was drawn matters to a mean: (R, n).
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = counts @ differences.T / n  # (R, P)
    low, high = np.percentile(means, _PERCENTILES, axis=0)  # (P,) each
    return [Interval(float(row.mean()), float(low[i]), float(high[i]), int((row > 0).sum()), n) for i, row in enumerate(differences)]


def _shared_benchmarks(methods: Mapping[str, Accuracies]) -> list[str]:
    """The benchmarks that all methods have, sorted: the interval must not depend on the order of a table."""
    every = sorted({name for accuracies in methods.values() for name in accuracies})
    if not every:
        raise DataError(f"{' and '.join(methods)} have no benchmarks; give accuracies of at least one benchmark")
    for method, accuracies in methods.items():
        if missing := [name for name in every if name not in accuracies]:
            raise DataError(
                f"{method} has no accuracy on {', '.join(missing)}, which the other side has; a difference needs both: "
                "add the missing accuracies, or leave these benchmarks out on both sides"
            )
        for name, value in accuracies.items():
            if not math.isfinite(value):
                raise DataError(f"{method}: the accuracy on {name} is {value}; give a finite number")
    return every


def read_table(path: str | Path) -> Table:
    """A CSV table with the columns scale, method, family, benchmark, accuracy (percent).

    Raises:
        DataError: names file, row and column of what is wrong. Row 1 is the header.
    """
    table: Table = {}
    check_file(Path(path), DataError)
    try:
        with open(readable(Path(path)), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval=None, strict=True)
            _check_header(path, reader.fieldnames)
            for record in reader:
                _add(table, record, f"{path}, row {reader.line_num}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); name a CSV file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start + 1}); save the table as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV ({error}); save the table as comma-separated values") from error
    if not table:
        raise DataError(f"{path}: has no rows below its header; give one row per scale, method and benchmark")
    return table


def _check_header(path: str | Path, header: Sequence[str] | None) -> None:
    names = list(header or ())
    if missing := [name for name in COLUMNS if name not in names]:
        raise DataError(
            f"{path}, row 1: there is no column {', '.join(missing)} (found: {', '.join(names) or 'nothing'}); "
            f"the first row must name {', '.join(COLUMNS)}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}, row 1: the column {', '.join(twice)} stands twice; keep one of them")


def _add(table: Table, record: Mapping[str, str | list[str] | None], where: str) -> None:
    if record.get(""):
        raise DataError(f"{where}: has more cells than the header; quote a text that contains a comma")
    cells = {name: (cell if isinstance(cell := record[name], str) else "").strip() for name in COLUMNS}
    for name, cell in cells.items():
        if not cell:
            raise DataError(f"{where}, column {name}: is empty; fill it in or remove the row")
    try:
        accuracy = float(cells["accuracy"])
    except ValueError:
        accuracy = math.nan
    if not 0 <= accuracy <= 100:  # also refuses NaN
        raise DataError(f"{where}, column accuracy: {cells['accuracy']!r} is no percentage; write a number from 0 to 100")
    methods = table.setdefault((cells["scale"], cells["family"]), {})
    if cells["benchmark"] in methods.setdefault(cells["method"], {}):
        raise DataError(
            f"{where}, column benchmark: {cells['method']} at {cells['scale']} has an accuracy on {cells['benchmark']} "
            f"({cells['family']}) already; keep one of the two rows"
        )
    methods[cells["method"]][cells["benchmark"]] = accuracy


def bootstrap_table(table: Table, *, minuend: str | None = None, resamples: int = RESAMPLES, seed: int = 0) -> list[MethodDifference]:
    """Every pair of methods of each scale and family, one shared resample per scale and family (App. F.6).

    Args:
        table: of `read_table`.
        minuend: only this method minus each other one; None: each pair once, the later-listed method minus the earlier.
        resamples, seed: as in `cluster_bootstrap`.

    Raises:
        SettingsError: no method has this name, `resamples` below 1, or there is no pair in the table.
        DataError: methods of one scale and family have different benchmarks; names them.
    """
    known = list(dict.fromkeys(method for methods in table.values() for method in methods))
    if minuend is not None and minuend not in known:
        raise SettingsError(f"the table has no method {minuend!r}; it has {', '.join(known)}")
    scales, families = (list(dict.fromkeys(key[i] for key in table)) for i in (0, 1))
    result = []
    for scale, family in sorted(table, key=lambda key: (scales.index(key[0]), families.index(key[1]))):
        methods = table[scale, family]
        pairs = [(b, a) for a, b in combinations(methods, 2)]
        if minuend is not None:
            pairs = [(minuend, other) for other in methods if other != minuend] if minuend in methods else []
        try:
            intervals = bootstrap_pairs(methods, pairs, resamples, seed)
        except DataError as error:
            raise DataError(f"scale {scale}, family {family}: {error}") from error
        result += [MethodDifference(scale, family, a, b, i) for (a, b), i in zip(pairs, intervals, strict=True)]
    if not result:
        raise SettingsError("the table has no two methods at the same scale and family; there is nothing to compare")
    return result


def write_comparisons(comparisons: Sequence[MethodDifference], path: str | Path) -> None:
    """A CSV file with the columns of the paper's table (`data/paper_bootstrap.csv`), rounded to 0.01; of one benchmark without interval."""
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(OUT_COLUMNS)
            for c in comparisons:
                i = c.interval
                numbers = (f"{i.delta:.2f}", *((f"{i.low:.2f}", f"{i.high:.2f}") if i.n > 1 else ("", "")))
                writer.writerow((c.scale, c.family, c.minuend, c.subtrahend, *numbers, i.wins, i.n))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); name a file in a folder that exists") from error


def bootstrap_command(
    paths: Sequence[Path], *, minuend: str | None, resamples: int, seed: int, out: Path | None, console: Console | None = None
) -> None:
    """`zppo bootstrap`: print every comparison of a table, or of several results of `zppo eval`, and write them to `out`.

    Raises:
        SettingsError: several files that are not all results of `zppo eval`, or one of these alone.
        ZPPOError: as `read_table` and `bootstrap_table`.
    """
    notes: list[str] = []
    if all(path.suffix == ".json" for path in paths):
        # It stands on this module.
        from zppo.report.tables import as_accuracies, read_evaluation

        if len(paths) < 2:
            raise SettingsError(f"{paths[0]} is one evaluation: name two or more, or a CSV table")
        table, notes = as_accuracies([read_evaluation(path) for path in paths])
    elif len(paths) == 1:
        table = read_table(paths[0])
    else:
        raise SettingsError("zppo bootstrap takes one CSV table, or two or more eval.json files")
    comparisons = bootstrap_table(table, minuend=minuend, resamples=resamples, seed=seed)
    view = View(box=None, padding=(0, 2, 0, 0))
    for column in ("scale", "family", "minuend", "subtrahend"):
        view.add_column(column)
    for column in ("delta", "95% interval", "wins"):
        view.add_column(column, justify="right", no_wrap=True)
    for c in comparisons:
        i = c.interval
        span = f"[{i.low:+.2f}, {i.high:+.2f}]".replace("[", r"\[") if i.n > 1 else "–"
        view.add_row(c.scale, c.family, c.minuend, c.subtrahend, f"{i.delta:+.2f}", span, f"{i.wins} of {i.n}")
    console = console or Console()
    console.print(view)
    console.print(
        f"{resamples:,} resamples of the benchmarks with seed {seed}, one for all pairs of a scale and family; points of accuracy",
        style="dim",
    )
    for note in notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    if out is not None:
        write_comparisons(comparisons, out)
        console.print(f"written to {Path(out).absolute()}", soft_wrap=True, highlight=False)
