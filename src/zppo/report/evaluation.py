"""Results of `zppo eval` (eval.json): as a part of a run's report, and two of them compared by the cluster bootstrap (App. F.6)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as View
from rich.text import Text

from zppo.errors import DataError, SettingsError
from zppo.report.bootstrap import RESAMPLES, Comparison, bootstrap_table
from zppo.report.bootstrap import Table as Accuracies
from zppo.report.tables import Table, percent

EVAL = "eval.json"
SECTION = "Benchmarks"
_NO_SCALE = "-"
_MOST_PARTS = 12  # figures of one benchmark that are shown beside its own


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark's figure.

    Attributes:
        value, error: shares from 0 to 1; the error is NaN where it is not known.
        rows, open: decided rows, and those that nobody has decided yet.
        beside: other figures of the benchmark, of its parts or of another kind, by name; NaN where there is none.
        left_out: rows that could not be put to the model.
        settings: what must be alike for a comparison: questions and samples.
    """

    family: str
    value: float
    error: float
    rows: int
    open: int
    left_out: int
    beside: Mapping[str, float]
    settings: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What eval.json holds, checked.

    Attributes:
        path: the file.
        label: the model.
        results: by benchmark, those with a figure.
        skipped: benchmarks whose data could not be had.
        protocol: decoding, judge and all else that the rows have in common.
    """

    path: Path
    label: str
    results: Mapping[str, Result]
    skipped: tuple[str, ...]
    protocol: Mapping[str, Any]


def read_evaluation(path: Path) -> Evaluation:
    """The results in a file of `zppo eval`, or in the folder that holds it.

    Raises:
        DataError: it cannot be read, or is none.
    """
    path = path / EVAL if path.is_dir() else path
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        results = {str(each["name"]): _result(each) for each in state["benchmarks"] if each["value"] is not None}
        skipped = tuple(str(each["name"]) for each in state["skipped"])
        return Evaluation(
            path,
            str(state["label"]),
            results,
            skipped,
            {k: v for k, v in state["settings"].items() if k not in ("model", "weights")},
        )
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); name the eval.json of `zppo eval`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: is no result of `zppo eval` ({type(error).__name__}: {error}); name its eval.json"
        ) from error


def _result(each: Mapping[str, Any]) -> Result:
    value, error = float(each["value"]), math.nan if each["error"] is None else float(each["error"])
    if not 0 <= value <= 1:
        raise ValueError(f"the score of {each['name']} is {value}")
    left_out = int(each.get("left_out", 0))
    beside = {str(name): math.nan if part is None else float(part) for name, part in each["beside"].items()}
    settings = (each["expected"], left_out, each["limit"], each["samples"])
    return Result(str(each["family"]), value, error, int(each["rows"]), int(each["open"]), left_out, beside, settings)


def evaluation_table(evaluation: Evaluation) -> Table:
    """The section of a run's report: figures by benchmark, then the means of families."""
    rows = []
    for name, each in evaluation.results.items():
        rows.append((name, each.family, percent(each.value), percent(each.error), f"{each.rows:,}", f"{each.open:,}"))
        if len(each.beside) <= _MOST_PARTS:
            rows += [(f"{name}: {part}", "", percent(value), "", "", "") for part, value in each.beside.items()]
    for family in dict.fromkeys(each.family for each in evaluation.results.values()):
        inside = [each for each in evaluation.results.values() if each.family == family]
        mean = math.fsum(each.value for each in inside) / len(inside)
        error = math.sqrt(math.fsum(each.error**2 for each in inside)) / len(inside)
        rows.append((f"mean of {len(inside)}", family, percent(mean), percent(error), "", ""))
    skipped = (
        f" Skipped, since their data could not be had: {', '.join(evaluation.skipped)}." if evaluation.skipped else ""
    )
    left_out = ", ".join(f"{name} {each.left_out:,}" for name, each in evaluation.results.items() if each.left_out)
    if left_out:
        skipped += f" Rows left out, since they have pictures and the model takes none: {left_out}."
    caption = (
        f"By zppo eval, judged by {evaluation.protocol.get('judge')}; ± is a standard error, samples of one question counted as one. Not "
        f"leaderboard figures.{skipped}"
    )
    columns = ("benchmark", "family", "score", "±", "rows", "open")
    return Table("benchmarks-table", SECTION, "Benchmarks after training", columns, tuple(rows), caption)


def as_accuracies(evaluations: Sequence[Evaluation]) -> tuple[Accuracies, list[str]]:
    """The table that the bootstrap takes, in percent, and what was left out of it.

    Only benchmarks that all of the evaluations have count. Methods are named by label, and by file where labels are alike.

    Raises:
        SettingsError: they have no benchmark in common.
    """
    labels = [evaluation.label for evaluation in evaluations]
    names = labels if len(set(labels)) == len(labels) else [str(evaluation.path) for evaluation in evaluations]
    every = dict.fromkeys(name for evaluation in evaluations for name in evaluation.results)
    shared = [name for name in every if all(name in evaluation.results for evaluation in evaluations)]
    if not shared:
        raise SettingsError(
            f"{' and '.join(str(e.path) for e in evaluations)} have no benchmark in common; evaluate both on the same suite"
        )
    notes = (
        [f"left out, since not all have it: {', '.join(name for name in every if name not in shared)}"]
        if len(every) > len(shared)
        else []
    )
    table: Accuracies = {}
    for name in shared:
        results = [evaluation.results[name] for evaluation in evaluations]
        if len({each.settings for each in results}) > 1:
            notes.append(f"{name}: not the same questions or samples on both sides")
        if any(each.open for each in results):
            notes.append(f"{name}: rows are open, and its figure is that of the others")
        for method, each in zip(names, results, strict=True):
            table.setdefault((_NO_SCALE, each.family), {}).setdefault(method, {})[name] = 100 * each.value
    for key in sorted({key for evaluation in evaluations for key in evaluation.protocol}):
        if len({json.dumps(e.protocol.get(key), sort_keys=True) for e in evaluations}) > 1 and key not in (
            "data",
            "clips",
        ):
            notes.append(
                f"the evaluations differ in {key}: {' and '.join(str(e.protocol.get(key)) for e in evaluations)}"
            )
    return table, notes


def compare_evaluations(
    files: Sequence[Path], *, resamples: int = RESAMPLES, seed: int = 0, console: Console | None = None
) -> list[Comparison]:
    """`zppo eval compare A.json B.json`: benchmark by benchmark, and A minus B with its interval in each family.

    Raises:
        SettingsError: not two files, or nothing in common.
        DataError: a file cannot be read.
    """
    if len(files) != 2:
        raise SettingsError(f"zppo eval compare takes two eval.json files, not {len(files)}")
    console = console or Console()
    evaluations = [read_evaluation(path) for path in files]
    table, notes = as_accuracies(evaluations)
    first = next(iter(next(iter(table.values()))))
    comparisons = bootstrap_table(table, minuend=first, resamples=resamples, seed=seed)
    view = View(box=None, padding=(0, 2, 0, 0))
    for name in ("benchmark", "family", "A", "B", "A - B"):
        view.add_column(name, justify="left" if name in ("benchmark", "family") else "right")
    for (_, family), methods in table.items():
        one, other = methods.values()
        for name in one:
            view.add_row(name, family, f"{one[name]:.1f}", f"{other[name]:.1f}", f"{one[name] - other[name]:+.1f}")
    for letter, evaluation in zip("AB", evaluations, strict=True):
        console.print(Text(f"{letter}: {evaluation.label} ({evaluation.path})"), soft_wrap=True)
    console.print(view)
    for each in comparisons:
        i = each.interval
        line = f"{each.family}: A - B = {i.delta:+.2f} points, 95% interval {i.low:+.2f} to {i.high:+.2f}, A higher on {i.wins} of {i.n}"
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"{resamples:,} resamples of the benchmarks with seed {seed}", style="dim"), soft_wrap=True)
    for note in notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    return comparisons
