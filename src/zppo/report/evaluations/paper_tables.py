"""Methods x benchmarks in the form of the paper's main tables (Tabs. 1-4), over any number of results of `zppo eval`.

A row is a method on a student of one size; results of one recipe under several seeds are one row, their mean. Family by family: the
benchmarks, their mean, and what a method (ZPPO, where there is one) is above the best other; then its mean differences to every other one
with intervals of the cluster bootstrap (App. F.6).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from zppo.config.methods import METHODS
from zppo.errors import ModelError, SettingsError
from zppo.evals.registry import BENCHMARKS
from zppo.planning.model_shapes import nominal_size, size_of
from zppo.report.bootstrap import RESAMPLES, Interval, bootstrap_pairs, read_table
from zppo.report.evaluations.paper_data import paper_averages
from zppo.report.read_run import RECIPE, arm_names, flat_recipe, read_recipe
from zppo.report.tables import SECTION, EvaluationResults, Heading, Strong, Table, read_evaluation

FAMILIES = {
    "vlm": "Vision-language benchmarks",
    "llm": "Language benchmarks",
    "video": "Video benchmarks",
    "own": "Benchmarks of one's own",
}
OURS = METHODS["zppo"].paper.partition(",")[0]
BEST = "best other"
_PAPER = "the paper's figures, arXiv 2606.18216"


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A method on a student of one size.

    Attributes:
        size: of the student, such as 2B; "" where it is not known.
        method: its name in the paper, where it has one there.
        name: the same with what tells it from other rows of that method.
        runs: benchmark -> accuracy in percent, of each seed.
        families: of the benchmarks.
        paper: whether these are the paper's figures.
    """

    size: str
    method: str
    name: str
    runs: tuple[Mapping[str, float], ...]
    families: Mapping[str, str]
    paper: bool = False

    def values(self, benchmark: str) -> list[float]:
        """Of each seed that has it."""
        return [run[benchmark] for run in self.runs if benchmark in run]

    def accuracies(self, benchmarks: Sequence[str]) -> dict[str, float]:
        """The means over seeds, of those benchmarks that it has."""
        return {name: statistics.fmean(values) for name in benchmarks if (values := self.values(name))}

    def means(self, benchmarks: Sequence[str]) -> list[float]:
        """The mean over the benchmarks, of each seed that has all of them."""
        return [statistics.fmean(run[name] for name in benchmarks) for run in self.runs if all(name in run for name in benchmarks)]

    @property
    def title(self) -> str:
        return f"{self.name} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.name


# From files to rows


@dataclass(frozen=True, slots=True)
class _Given:
    """One result with what the command line and the recipe of its run say about it."""

    evaluation: EvaluationResults
    size: str | None
    method: str | None
    recipe: Mapping[str, Any] | None
    run: Path


def rows_of(names: Sequence[str]) -> tuple[list[MethodRow], list[EvaluationResults]]:
    """Rows of results, smaller students first, else in the order in which they are given; and the results.

    Args:
        names: run folders or files of `zppo eval`, or `NAME=PATH`, `SIZE:NAME=PATH`. Without a name it is the method of the run's recipe;
            a model that runs started from is Base.

    Raises:
        DataError: a file is no result of `zppo eval`.
        SettingsError: none, or one of them twice.
    """
    given = [_given(name) for name in names]
    places = [each.evaluation.path.resolve() for each in given]
    if len(set(places)) < max(1, len(places)):
        raise SettingsError(f"zppo eval table needs different results of zppo eval, and was given {', '.join(names) or 'none'}")
    started = {_setting(each.recipe, "student", "model") for each in given if each.recipe is not None}
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[_Given]] = {}
    for each in given:
        size, method = _size(each), each.method or _method(each, started)
        recipe = () if each.method or each.recipe is None else tuple(sorted(flat_recipe(each.recipe, each.run).items()))
        groups.setdefault((size, method, recipe), []).append(each)
    rows = []
    for (size, method, recipe), members in groups.items():
        alike = [dict(other[2]) for other in groups if other[:2] == (size, method)]
        name = " ".join([method, *arm_names(alike)[alike.index(dict(recipe))].split(" ")[1:]]) if len(alike) > 1 and recipe else method
        seeds = [each.recipe.get("seed", 0) if each.recipe is not None else None for each in members]
        if all(each.method for each in members) or (None not in seeds and len(set(seeds)) == len(seeds)) or len(members) == 1:
            rows.append(method_row(size, method, name, [each.evaluation for each in members]))
        else:  # one recipe and one seed, or one model: not seeds of one row
            rows += [method_row(size, method, f"{name} ({_place(each)})", [each.evaluation]) for each in members]
    order = {row.size: _number(row.size) for row in rows}
    return sorted(rows, key=lambda row: order[row.size]), [each.evaluation for each in given]


def _given(name: str) -> _Given:
    label, equals, path = name.partition("=")
    if not equals or Path(name).exists():
        label, path = "", name
    size, colon, method = label.rpartition(":")
    evaluation = read_evaluation(Path(path).expanduser())
    folders = (evaluation.path.parent, Path(evaluation.label).parent)
    run = next((folder for folder in folders if (folder / RECIPE).is_file()), None)
    return _Given(evaluation, size if colon else None, method or None, read_recipe(run) if run else None, run or folders[0])


def _setting(recipe: Mapping[str, Any], section: str, key: str) -> str:
    """A text of a recipe; a section may be written as its first key's value (`method: grpo`)."""
    found = recipe.get(section, "?")
    return str(found.get(key, "?") if isinstance(found, Mapping) else found)


def _method(each: _Given, started: set[str]) -> str:
    """As the paper calls it, where it has it."""
    if each.recipe is not None:
        name = _setting(each.recipe, "method", "name")
        paper = METHODS[name].paper.partition(",")[0] if name in METHODS else ""
        return paper if paper and not paper.startswith(("[", "project")) else name
    label = each.evaluation.label
    if label in started or any(Path(label).name == Path(model).name for model in started):
        return "Base"
    return "/".join(Path(label).parts[-2:]) if label.startswith("/") else label


def _size(each: _Given) -> str:
    """Of the student: as given, by its name, or counted; "" where nothing is known."""
    if each.size is not None:
        return each.size
    model = each.evaluation.label if each.recipe is None else _setting(each.recipe, "student", "model")
    try:
        number = nominal_size(model) or size_of(model).parameters
    except ModelError:
        return ""
    above, letter, unit = next(u for u in ((5e8, "B", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e3), (0.0, "", 1.0)) if number >= u[0])
    return f"{number / unit:.3g}{letter}"


def _number(size: str) -> float:
    units = {"k": 1e3, "M": 1e6, "B": 1e9}
    try:
        return float(size.rstrip("kMB")) * units.get(size[-1:], 1.0)
    except ValueError:
        return float("inf")


def _place(each: _Given) -> str:
    return each.evaluation.path.resolve().parent.name


def method_row(size: str, method: str, name: str, evaluations: Sequence[EvaluationResults]) -> MethodRow:
    """The row of several seeds' results."""
    runs = tuple({benchmark: 100 * result.value for benchmark, result in each.results.items()} for each in evaluations)
    families = {benchmark: result.family for each in evaluations for benchmark, result in each.results.items()}
    return MethodRow(size, method, name, runs, families)


def paper_rows_of(rows: Sequence[MethodRow]) -> tuple[list[MethodRow], list[str]]:
    """The paper's rows for the sizes of students and the benchmarks of ours; and what it has no figures for."""
    table = read_table(Path(str(files("zppo.report") / "data" / "paper_accuracy.csv")))
    sizes = dict.fromkeys(row.size for row in rows)
    wanted = {name for row in rows for name in row.families}
    found: dict[tuple[str, str], dict[str, float]] = {}
    families: dict[str, str] = {}
    for (size, family), methods in table.items():
        for method, accuracies in methods.items():
            figures = {name: value for name, value in accuracies.items() if name in wanted}
            if size in sizes and figures:
                found.setdefault((size, method), {}).update(figures)
                families |= dict.fromkeys(figures, family)
    known = dict.fromkeys(size for size, _ in table)
    notes = [f"the paper has no student of size {size or 'unknown'}: it has {', '.join(known)}" for size in sizes if size not in known]
    averages = paper_averages()
    for key in dict.fromkeys((row.size, row.method) for row in rows):
        if key in averages and key not in found:
            means = ", ".join(f"{FAMILIES[family].lower()} {value:.1f}" for family, value in averages[key].items())
            notes.append(f"of {key[1]} at {key[0]} the paper has means alone (Tab. 4): {means}")
    if missing := sorted(wanted - {name for methods in table.values() for accuracies in methods.values() for name in accuracies}):
        notes.append(f"the paper has no figures of {', '.join(missing)}")
    return [MethodRow(size, method, method, (figures,), families, paper=True) for (size, method), figures in found.items()], notes


# From rows to tables


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one size, ours or the paper's, that can be compared, in one family.

    Attributes:
        shared: the benchmarks that all of them have; means and intervals are over these.
    """

    size: str
    paper: bool
    rows: tuple[MethodRow, ...]
    shared: tuple[str, ...]

    def split(self, minuend: str) -> tuple[list[MethodRow], list[MethodRow]]:
        """(rows of the method, other rows)."""
        ours = [row for row in self.rows if row.method.lower() == minuend.lower()]
        return ours, [row for row in self.rows if row not in ours]

    @property
    def heading(self) -> str:
        return " · ".join(part for part in (self.size, _PAPER if self.paper else "") if part)


def blocks_of(rows: Sequence[MethodRow], family: str, benchmarks: Sequence[str]) -> list[Block]:
    """The blocks of a family, sizes in order, the paper's behind ours of the same size. Rows without any of its benchmarks are left out."""
    blocks: list[Block] = []
    for size in dict.fromkeys(row.size for row in rows):
        shared: tuple[str, ...] | None = None
        for paper in (False, True):
            members = tuple(row for row in rows if (row.size, row.paper) == (size, paper) and row.accuracies(benchmarks))
            if members:
                among = benchmarks if shared is None else shared
                shared = tuple(name for name in among if all(row.values(name) for row in members))
                blocks.append(Block(size, paper, members, shared))
    return blocks


def tables_of_rows(
    rows: Sequence[MethodRow], *, minuend: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[Table], list[str]]:
    """A table of each family, then one of differences with intervals; and notes.

    Args:
        minuend: whose differences are shown; None for ZPPO, where there is one.
        resamples, seed: of the cluster bootstrap.

    Raises:
        SettingsError: no row is of that method.
    """
    minuend = _minuend(rows, minuend)
    tables, differences, notes = list[Table](), list[_Difference](), list[str]()
    means: dict[str, list[Block]] = {}
    order = {benchmark.name: i for i, benchmark in enumerate(BENCHMARKS)}
    for family in [f for f in FAMILIES if any(f in row.families.values() for row in rows)]:
        named = {name for row in rows for name in row.families if row.families[name] == family}
        benchmarks = tuple(sorted(named, key=lambda name: (order.get(name, len(order)), name)))
        means[family] = blocks = blocks_of(rows, family, benchmarks)
        tables.append(_family_table(family, benchmarks, blocks, minuend))
        for block in blocks:
            if missing := [name for name in benchmarks if name not in block.shared and not block.paper]:
                where = f"{block.size} {family}".strip()
                notes.append(f"{where}: the mean is over {len(block.shared)} of {len(benchmarks)}, not all have {', '.join(missing)}")
            differences += _differences(block, family, minuend, resamples, seed)
    if len(means) > 1:
        tables.insert(0, _means_table(means, minuend))
    if differences:
        tables.append(_interval_table(differences, minuend, resamples, seed))
    elif len({row.name for row in rows if not row.paper}) > 1 and not any(row.method.lower() == minuend.lower() for row in rows):
        notes.append(f"no row is {minuend}: name the method whose differences are wanted with --minuend")
    return tables, notes


def _minuend(rows: Sequence[MethodRow], minuend: str | None) -> str:
    known = dict.fromkeys(row.method for row in rows)
    if minuend is None:
        return OURS
    if minuend.lower() not in (name.lower() for name in known):
        raise SettingsError(f"--minuend: no row is {minuend!r}; there are {', '.join(known)}")
    return minuend


def _family_table(family: str, benchmarks: Sequence[str], blocks: Sequence[Block], minuend: str) -> Table:
    lines: list[tuple[str, ...]] = []
    headed = len(blocks) > 1 or any(block.heading for block in blocks)
    for block in blocks:
        if headed:
            lines.append((Heading(block.heading or "size not known"), *[""] * (len(benchmarks) + 1)))
        figures = [[*(row.values(name) for name in benchmarks), row.means(block.shared) if block.shared else []] for row in block.rows]
        tops = [max((statistics.fmean(v) for line in figures if (v := line[i])), default=0.0) for i in range(len(benchmarks) + 1)]
        for row, cells in zip(block.rows, figures, strict=True):
            lines.append((row.title, *(_cell(values, top, len(block.rows)) for values, top in zip(cells, tops, strict=True))))
        ours, others = block.split(minuend)
        if others:
            lines += [_above(row, others, benchmarks, block, several=len(ours) > 1) for row in ours]
    columns = ("", *benchmarks, "mean")
    caption = "Accuracy in percent; ± is the standard deviation over seeds; the best of a size stands out."
    if any(all(block.split(minuend)) for block in blocks):
        caption += " The differences are to whichever other method is best in that column, in the mean to the best mean."
    return Table(f"benchmarks-{family}", SECTION, FAMILIES[family], columns, tuple(lines), caption)


def _means_table(families: Mapping[str, Sequence[Block]], minuend: str) -> Table:
    """The means of all families side by side, student sizes below one another."""
    lines: list[tuple[str, ...]] = []
    keys = dict.fromkeys((block.size, block.paper) for blocks in families.values() for block in blocks)
    for size, paper in sorted(keys, key=lambda key: ([each[0] for each in keys].index(key[0]), key[1])):
        found = {f: next((b for b in blocks if (b.size, b.paper) == (size, paper)), None) for f, blocks in families.items()}
        blocks = {family: block for family, block in found.items() if block is not None}
        if len(keys) > 1 or size or paper:
            lines.append((Heading(next(iter(blocks.values())).heading or "size not known"), *[""] * len(families)))
        rows = list({row.name: row for block in blocks.values() for row in block.rows}.values())
        for row in rows:
            cells = []
            for family in families:
                block = blocks.get(family)
                inside = block is not None and bool(block.shared) and row in block.rows
                top = max(_mean(other, block) for other in block.rows) if block is not None else 0.0
                cells.append(_cell(row.means(block.shared), top, len(block.rows)) if inside and block is not None else "–")
            lines.append((row.title, *cells))
        ours = [row for row in rows if row.method.lower() == minuend.lower()]
        for row in ours if len(ours) < len(rows) else ():
            above = [_gain(row, block, minuend) for block in map(blocks.get, families)]
            lines.append((f"{row.name if len(ours) > 1 else row.method} − {BEST}", *above))
    columns = ("", *(f"{family}, {max(len(b.shared) for b in blocks)}" for family, blocks in families.items()))
    caption = "Mean accuracy in percent, and over how many benchmarks; ± is the standard deviation over seeds."
    return Table("benchmarks-means", SECTION, "Means of the families", columns, tuple(lines), caption)


def _gain(row: MethodRow, block: Block | None, minuend: str) -> str:
    """What a row's mean is above the best other one's."""
    others = block.split(minuend)[1] if block is not None else []
    if block is None or not others or not block.shared or row not in block.rows:
        return "–"
    return f"{_mean(row, block) - max(_mean(other, block) for other in others):+.1f}"


def _cell(values: Sequence[float], top: float, rows: int) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values)
    text = f"{mean:.1f}" + (f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else "")
    return Strong(text) if rows > 1 and f"{mean:.1f}" == f"{top:.1f}" else text


def _above(row: MethodRow, others: Sequence[MethodRow], benchmarks: Sequence[str], block: Block, several: bool) -> tuple[str, ...]:
    """What a row is above the best other one, benchmark by benchmark and in the mean."""
    cells = []
    for name in benchmarks:
        best = max((statistics.fmean(values) for other in others if (values := other.values(name))), default=None)
        own = row.values(name)
        cells.append(f"{statistics.fmean(own) - best:+.1f}" if own and best is not None else "–")
    return (f"{row.name if several else row.method} − {BEST}", *cells, _gain(row, block, row.method))


def _mean(row: MethodRow, block: Block) -> float:
    """Over the shared benchmarks, of the means over seeds."""
    return statistics.fmean(row.accuracies(block.shared).values()) if block.shared else 0.0


@dataclass(frozen=True, slots=True)
class _Difference:
    """A method's mean differences to the others of its block; `best` is the one with the highest mean."""

    name: str
    best: str
    intervals: Mapping[str, Interval]


def _differences(block: Block, family: str, minuend: str, resamples: int, seed: int) -> list[_Difference]:
    ours, others = block.split(minuend)
    if not others or not block.shared:
        return []
    best = max(others, key=lambda row: _mean(row, block)).name
    accuracies = {row.name: row.accuracies(block.shared) for row in block.rows}
    result = []
    for row in ours:
        found = bootstrap_pairs(accuracies, [(row.name, other.name) for other in others], resamples, seed)
        named = {other.name: interval for other, interval in zip(others, found, strict=True)}
        name = " ".join(part for part in (block.size, family, "· paper" if block.paper else "", row.name * (len(ours) > 1)) if part)
        result.append(_Difference(name, best, named))
    return result


def _interval_table(differences: Sequence[_Difference], minuend: str, resamples: int, seed: int) -> Table:
    others = list(dict.fromkeys(name for each in differences for name in each.intervals))
    rows = tuple(
        (each.name, f"{_interval(each.intervals[each.best])} {each.best}", *(_interval(each.intervals.get(name)) for name in others))
        for each in differences
    )
    caption = (
        f"Mean difference in points over the benchmarks that all rows of a size have, 95% interval, benchmarks won of all. {resamples:,} "
        f"resamples of the benchmarks with seed {seed}, one for all pairs of a size and family. The first column is the difference to the "
        "method with the highest mean among the others, which it names."
    )
    columns = ("", f"− {BEST}", *(f"− {name}" for name in others))
    return Table("benchmarks-intervals", SECTION, f"How sure: {minuend} minus the others", columns, rows, caption)


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    span = f" [{interval.low:+.2f}, {interval.high:+.2f}]" if interval.n > 1 else ""
    return f"{interval.delta:+.2f}{span} {interval.wins}/{interval.n}"
