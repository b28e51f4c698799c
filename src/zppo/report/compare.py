"""`zppo compare`: tables of several runs, paired over seeds where there are seeds, and a page with curves on shared axes.

Runs whose recipes differ in nothing that changes what is learned, but for the seed, are one *arm*.
"""

from __future__ import annotations

import csv as csv_module
import io
import json as json_module
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich.console import Console
from rich.text import Text

from zppo.errors import SettingsError
from zppo.report.audits import FATES, MOST_VISITS, PlainVisit, ZoneStory, zone_story
from zppo.report.bootstrap import Mean, mean_interval
from zppo.report.charts import ChartSpec, Series, graduate_shares, kind_name, line_style, numbers
from zppo.report.evaluations.paper_tables import method_row, tables_of_rows
from zppo.report.evaluations.table_views import print_fitting, print_wide
from zppo.report.page import FIGURES, FOOTER, page, sections, write_page
from zppo.report.read_run import Run, arm_names, differing, flat_recipe, held_out_accuracies, open_run, visits_of
from zppo.report.summary import duration
from zppo.report.tables import (
    EVAL,
    SECTION,
    ZONE_CAPTION,
    ZONE_COLUMNS,
    EvaluationResults,
    Heading,
    Table,
    paper_zone_rows,
    percent,
    read_evaluation,
    unlike,
    unlike_questions,
    zone_rows,
)

RESULTS = "Results"


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs of one recipe under several seeds.

    Attributes:
        name: what tells it from the other arms.
        runs: by seed.
    """

    name: str
    runs: Mapping[int, Run]

    def settings(self) -> dict[str, str]:
        """Those that all of its runs share, dotted."""
        run = next(iter(self.runs.values()))
        return flat_recipe(run.recipe, run.folder)


Results = Mapping[str, Mapping[int, Mapping[str, float | None]]]
"""By arm, by seed, by quantity; None is not known."""


Asked = Mapping[str, Mapping[int, Mapping[tuple[str, int], float | None]]]
"""By arm, by seed, by held-out question: the share of right completions at the last evaluation."""

Questions = tuple[str, str, Mean, int, int]
"""Minuend, subtrahend, mean difference over held-out questions, how many of them are better, and worse."""


@dataclass(frozen=True, slots=True)
class RunComparison:
    """What a comparison shows: its arms, what their runs came to, arms paired over held-out questions, the outcome, tables, and why
    what it puts beside each other may not be alike."""

    arms: tuple[Arm, ...]
    results: Results
    questions: tuple[Questions, ...]
    outcome: str
    tables: list[Table]
    warnings: tuple[str, ...] = ()


def compare_command(
    folders: Sequence[Path],
    *,
    html: bool,
    out: Path | None,
    suffixes: Sequence[str],
    csv: Path | None = None,
    json: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the tables of a comparison of runs, and write its page where `html`, its numbers where `csv` and `json` say.

    Args:
        out: where the page goes; None is ./compare.html.
        suffixes: of png and svg, the wanted formats of the figures next to the page.
        csv: a line per run and quantity; "-" is stdout, and the tables are not printed then.
        json: the same with the settings that differ and the pairs; "-" as for csv.

    Raises:
        ZPPOError: a folder holds no run, fewer than two were named, or a file cannot be written.
    """
    console = console or Console()
    comparison = compare_runs(folders)
    for path, text in ((csv, comparison_csv), (json, comparison_json)):
        if path is not None:
            _write(path, text(comparison), console)
    if Path("-") not in (csv, json):
        _print_tables(comparison, console)
    if html:
        target, charts = out or Path("compare.html"), comparison_charts(comparison.arms)
        write_page(console, comparison_page(comparison, charts), target, charts, target.parent / f"{target.stem}-{FIGURES}", suffixes)


def _write(path: Path, text: str, console: Console) -> None:
    if str(path) == "-":
        console.file.write(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path} cannot be written ({error.strerror}): name another file") from error
    console.print(Text(f"written to {path.absolute()}"), soft_wrap=True)


_LONG = 20  # characters of an arm's name that fit beside others


def _lettered(comparison: RunComparison) -> tuple[list[Table], dict[str, str]]:
    """The tables with letters in the place of arms' names where one is long, and what they stand for."""
    if len(comparison.arms) > len(ascii_uppercase) or all(len(arm.name) <= _LONG for arm in comparison.arms):
        return comparison.tables, {}
    letters = dict(zip((arm.name for arm in comparison.arms), ascii_uppercase, strict=False))
    arms = [replace(arm, name=letters[arm.name]) for arm in comparison.arms]
    results = {letters[arm]: of_runs for arm, of_runs in comparison.results.items()}
    questions = [(letters[one], letters[other], mean, up, down) for one, other, mean, up, down in comparison.questions]
    return _tables(arms, results, questions), letters


def _print_tables(comparison: RunComparison, console: Console) -> None:
    for text in comparison.warnings:
        console.print(Text(f"warning: {text}\n", style="yellow"))
    tables, letters = _lettered(comparison)
    for name, letter in letters.items():
        console.print(Text.assemble((letter, "bold"), f"  {name}"))
    if letters:
        console.print()
    for table in tables:
        if table.section == SECTION:  # as many columns as there are benchmarks
            print_wide(console, table)
            console.print()
            continue
        above, rows = "", list[tuple[str, ...]]()
        for row in table.rows:
            whose, parted, quantity = row[0].partition(": ") if table.id == "paired" else ("", "", "")
            if table.id == "fates":
                quantity, parted, whose = row[0].partition(" · ")
            if parted and whose != above:
                rows.append((Heading(whose), *[""] * (len(row) - 1)))  # said once for all of its quantities
                above = whose
            rows.append((f"  {quantity}" if parted else row[0], *row[1:]))
        print_fitting(console, replace(table, rows=tuple(rows)))
        console.print()


def comparison_csv(comparison: RunComparison) -> str:
    """A line per run and quantity, shares from 0 to 1; a quantity that is not known has none."""
    out = io.StringIO()
    writer = csv_module.writer(out, lineterminator="\n")
    writer.writerow(("run", "arm", "seed", "steps", "quantity", "value"))
    for arm in comparison.arms:
        for seed, run in arm.runs.items():
            for quantity, value in comparison.results[arm.name][seed].items():
                if value is not None:
                    writer.writerow((run.name, arm.name, seed, run.last_step, quantity, value))
    return out.getvalue()


def comparison_json(comparison: RunComparison) -> str:
    """Arms with their settings that differ and their runs' results, and the pairs; null is not known."""
    flats = {arm.name: arm.settings() for arm in comparison.arms}
    keys = differing(list(flats.values()))
    arms = [
        {
            "name": arm.name,
            "settings": {key: flats[arm.name].get(key) for key in keys},
            "runs": [
                {"run": str(run.folder), "seed": seed, "steps": run.last_step, "results": comparison.results[arm.name][seed]}
                for seed, run in arm.runs.items()
            ],
        }
        for arm in comparison.arms
    ]
    pairs = [
        {"minuend": one, "subtrahend": other, "quantity": quantity, "difference": mean.value, "low": mean.low, "high": mean.high,
         "wins": wins, "seeds": mean.n}
        for one, other, quantity, mean, wins in _pairs(comparison.arms, comparison.results)
    ]  # fmt: skip
    questions = [
        {"minuend": one, "subtrahend": other, "difference": mean.value, "low": mean.low, "high": mean.high, "better": better,
         "worse": worse, "questions": mean.n}
        for one, other, mean, better, worse in comparison.questions
    ]  # fmt: skip
    whole = {"outcome": comparison.outcome, "warnings": comparison.warnings, "arms": arms, "pairs": pairs, "questions": questions}
    return json_module.dumps(_without_nan(whole), ensure_ascii=False, indent=1) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list) else value


def compare_runs(folders: Sequence[Path]) -> RunComparison:
    """Compare runs.

    Raises:
        CheckpointError: a folder holds no run.
        SettingsError: fewer than two folders, or one folder twice.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        named = ", ".join(map(str, folders)) or "none"
        raise SettingsError(f"zppo compare needs at least two different run folders, and was given {named}")
    arms = arms_of([open_run(folder) for folder in folders])
    results = {arm.name: {seed: results_of(run) for seed, run in arm.runs.items()} for arm in arms}
    asked = {arm.name: {seed: held_out_accuracies(run) for seed, run in arm.runs.items()} for arm in arms}
    questions = tuple(_over_questions(arms, asked))
    outcome, tables = _outcome(arms, results, questions), _tables(arms, results, questions)
    known = [(run.name, asked[arm.name][seed]) for arm in arms for seed, run in arm.runs.items()]
    return RunComparison(tuple(arms), results, questions, outcome, tables, unlike_questions(known, [arm.settings() for arm in arms]))


def _tables(arms: Sequence[Arm], results: Results, questions: Sequence[Questions]) -> list[Table]:
    tables = [
        *(_summary(arms, results), _questions(questions), _paired(arms, results), _fates(arms), _runs(arms, results)),
        *(*_evaluations(arms), _differences(arms)),
    ]
    return [table for table in tables if table.rows]


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Runs by recipe, in order of first appearance. Equal recipes with equal seeds cannot be one arm: each is one by its folder's name."""
    recipes: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        recipes.setdefault(tuple(sorted(flat_recipe(run.recipe, run.folder).items())), []).append(run)
    groups: list[tuple[str, list[Run]]] = []
    names = arm_names([dict(key) for key in recipes])
    for name, members in zip(names, recipes.values(), strict=True):
        seeds = [_seed(run) for run in members]
        if len(set(seeds)) == len(seeds):
            groups.append((name, members))
        else:
            groups += [(f"{name} ({run.name})", [run]) for run in members]
    taken = Counter(name for name, _ in groups)
    return [
        Arm(name if taken[name] == 1 else f"{name} ({members[0].folder})", {_seed(run): run for run in sorted(members, key=_seed)})
        for name, members in groups
    ]


def _seed(run: Run) -> int:
    return int(run.setting("seed", 0))


def results_of(run: Run) -> dict[str, float | None]:
    """What a run came to, by name; None is not known. Accuracies and shares first: these are compared in pairs."""
    last = run.evaluations[-1] if run.evaluations else None
    tail = run.steps[-max(1, len(run.steps) // 10) :]
    plain = [line["accuracy"]["plain"] for line in tail if "plain" in line["accuracy"]]
    totals = story_of(run).totals() if run.replays and run.steps else []
    shares = {
        f"graduated / admitted, {'all' if name == 'all' else f'entry at {name}'}": graduated / admitted
        for name, admitted, graduated, _ in totals
        if admitted
    }
    if totals and (left := totals[-1][2] + totals[-1][3]):
        shares["graduated / left, all"] = totals[-1][2] / left
    return {
        **({"held-out accuracy": last["accuracy"]} if last else {}),
        **({f"held-out, {level}": value for level, value in last["by_level"].items()} if last else {}),
        "plain rollouts, last tenth": statistics.fmean(plain) if plain else None,
        **shares,
        **_benchmark_means(run),
    }


def _benchmark_means(run: Run) -> dict[str, float | None]:
    """The means of the families of benchmarks, where the run's folder holds an evaluation (`zppo eval`)."""
    if not (run.folder / EVAL).is_file():
        return {}
    families: dict[str, list[float]] = {}
    for result in read_evaluation(run.folder).results.values():
        families.setdefault(result.family, []).append(result.value)
    return {f"benchmarks, mean of {len(values)} {family}": statistics.fmean(values) for family, values in families.items()}


def _evaluations(arms: Sequence[Arm]) -> list[Table]:
    """The tables of `zppo eval table`, a row for each arm of which runs hold evaluations; differences are ZPPO's, else the first one's."""
    rows, found = [], list[EvaluationResults]()
    for arm in arms:
        evaluated = [read_evaluation(run.folder) for run in arm.runs.values() if (run.folder / EVAL).is_file()]
        if evaluated:
            rows.append(method_row("", arm.name, arm.name, evaluated))
            found += evaluated
    if not rows:
        return []
    minuend = next((row.name for row in rows if row.name.split(" ")[0] == "zppo"), rows[0].name)
    tables, notes = tables_of_rows(rows, minuend=minuend)
    notes += unlike(found, list(dict.fromkeys(name for each in found for name in each.results)))
    told = " ".join(f"{note[0].upper()}{note[1:]}." for note in notes)
    return [*tables[:-1], replace(tables[-1], caption=f"{tables[-1].caption} {told}".strip())]


def story_of(run: Run, visits: Sequence[PlainVisit] = ()) -> ZoneStory:
    """What became of a run's buffer entries; their fates by number of visits where its plain visits are given."""
    return zone_story(run.buffer, run.group_size, run.threshold, run.last_step, visits)


def _entries(arm: Arm) -> list[tuple[str, int, int, int]]:
    """(bin, admitted, graduated, evicted) over the runs of an arm, and the row "all"; empty where no run has a buffer."""
    sums: dict[str, tuple[int, int, int]] = {}
    for run in arm.runs.values():
        for name, *counts in story_of(run).totals() if run.replays and run.steps else ():
            before = sums.get(name, (0, 0, 0))
            sums[name] = (before[0] + counts[0], before[1] + counts[1], before[2] + counts[2])
    return [(name, *counts) for name, counts in sums.items()]


def _fates(arms: Sequence[Arm]) -> Table:
    """What became of the buffer's entries, bin by bin, with the paper's rows."""
    rows = [row for arm in arms for row in zone_rows(_entries(arm), arm.name)]
    rows += paper_zone_rows() if rows else []
    caption = f"{ZONE_CAPTION} Sums over the runs of an arm."
    return Table("fates", RESULTS, "Entries of the buffer by plain accuracy at admission", ZONE_COLUMNS, tuple(rows), caption)


def _quantities(results: Results) -> list[str]:
    return list(dict.fromkeys(name for arm in results.values() for run in arm.values() for name in run))


def _known(results: Results, arm: str, quantity: str) -> dict[int, float]:
    """Seed -> value, where it is known."""
    return {seed: value for seed, run in results[arm].items() if (value := run.get(quantity)) is not None}


def _mean(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values:
        return "–"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _summary(arms: Sequence[Arm], results: Results) -> Table:
    """A column per arm."""
    groups = [list(arm.runs.values()) for arm in arms]
    spans = [sorted({min(r.last_step for r in runs), max(r.last_step for r in runs)}) for runs in groups]
    seconds = [statistics.fmean(math.fsum(line["seconds"]["step"] for line in r.steps) for r in runs) for runs in groups]
    rows = [("runs", *(str(len(runs)) for runs in groups)), ("steps", *("–".join(f"{s:,}" for s in span) for span in spans))]
    for quantity in _quantities(results):
        rows.append((f"{quantity}, %", *(_mean(list(_known(results, arm.name, quantity).values())) for arm in arms)))
    for key in ("student_tokens", "teacher_tokens"):
        totals = [[math.fsum(line.get(key) or 0 for line in run.steps) for run in runs] for runs in groups]
        rows.append((key.replace("_", " "), *(f"{statistics.fmean(of_runs):,.0f}" for of_runs in totals)))
    rows.append(("time", *map(duration, seconds)))
    caption = "Means over runs, ± the standard deviation over seeds. Held-out accuracy is that of the last evaluation."
    return Table("summary", RESULTS, "What the runs came to", ("", *(arm.name for arm in arms)), tuple(rows), caption)


def _paired(arms: Sequence[Arm], results: Results) -> Table:
    """Differences between arms seed by seed."""
    rows = []
    for first, second, quantity, mean, wins in _pairs(arms, results):
        interval = "–" if math.isnan(mean.low) else f"{100 * mean.low:+.1f} to {100 * mean.high:+.1f}"
        rows.append((f"{first} minus {second}: {quantity}", f"{100 * mean.value:+.1f}", interval, f"{wins} of {mean.n}"))
    caption = "In points, over the seeds that both arms have; Student's t over seeds; wins are seeds with a difference above 0."
    return Table("paired", RESULTS, "Paired over seeds", ("", "difference", "95% interval", "wins"), tuple(rows), caption)


def _arm_pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """All pairs of a few arms; of many the first with each other one."""
    return list(combinations(arms, 2)) if len(arms) <= 4 else [(arms[0], other) for other in arms[1:]]


def _pairs(arms: Sequence[Arm], results: Results) -> Iterator[tuple[str, str, str, Mean, int]]:
    """(minuend, subtrahend, quantity, mean difference over the seeds that both have, seeds won), where there is such a seed."""
    for first, second in _arm_pairs(arms):
        for quantity in _quantities(results):
            one, other = _known(results, first.name, quantity), _known(results, second.name, quantity)
            differences = [one[seed] - other[seed] for seed in one if seed in other]
            if differences:
                yield first.name, second.name, quantity, mean_interval(differences), sum(d > 0 for d in differences)


def _over_questions(arms: Sequence[Arm], by_run: Asked) -> Iterator[Questions]:
    """Pairs of arms that were asked the same held-out questions.

    A question's accuracy is its mean over the runs of an arm: what another draw of questions would change, whatever the seeds do.
    """
    asked: dict[str, dict[tuple[str, int], float]] = {}
    for arm in arms:
        runs = [{key: value for key, value in own.items() if value is not None} for own in by_run[arm.name].values()]
        shared = set.intersection(*map(set, runs))
        asked[arm.name] = {question: statistics.fmean(own[question] for own in runs) for question in runs[0] if question in shared}
    for first, second in _arm_pairs(arms):
        one, other = asked[first.name], asked[second.name]
        differences = [value - other[question] for question, value in one.items() if question in other]
        if len(differences) > 1:
            better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
            yield first.name, second.name, mean_interval(differences), better, worse


def _questions(pairs: Sequence[Questions]) -> Table:
    """Whether the held-out questions are enough to tell arms apart."""
    rows = []
    for first, second, mean, better, worse in pairs:
        told = "first" if mean.low > 0 else "second" if mean.high < 0 else "not told apart"
        interval = f"{100 * mean.low:+.1f} to {100 * mean.high:+.1f}"
        counts = (f"{better:,}", f"{worse:,}", f"{mean.n:,}")
        rows.append((f"{first} minus {second}", f"{100 * mean.value:+.1f}", interval, *counts, told))
    caption = (
        "Held-out accuracy at the last evaluation, in points, question by question; Student's t over questions. It says what other "
        "questions would have changed; what other seeds would have is in the table of seeds."
    )
    columns = ("", "difference", "95% interval", "better", "worse", "questions", "which is better")
    return Table("questions", RESULTS, "Paired over held-out questions", columns, tuple(rows), caption)


def _runs(arms: Sequence[Arm], results: Results) -> Table:
    """Every run with its first quantity, which is held-out accuracy where there is one."""
    first = _quantities(results)[0]
    rows = tuple(
        (run.name, arm.name, str(seed), f"{run.last_step:,}", percent(results[arm.name][seed].get(first)))
        for arm in arms
        for seed, run in arm.runs.items()
    )
    return Table("runs", RESULTS, "Every run", ("run", "arm", "seed", "steps", first), rows)


def _differences(arms: Sequence[Arm]) -> Table:
    recipes = [arm.settings() for arm in arms]
    rows = tuple((key, *(recipe.get(key, "–") for recipe in recipes)) for key in differing(recipes))
    caption = "Seeds, and settings that change nothing of what is learned (checkpoints, memory, addresses, ...), are left out."
    return Table("recipes", RESULTS, "Settings that differ", ("setting", *(arm.name for arm in arms)), rows, caption)


def _outcome(arms: Sequence[Arm], results: Results, questions: Sequence[Questions]) -> str:
    quantity = _quantities(results)[0]
    parts = []
    for arm in arms:
        values = list(_known(results, arm.name, quantity).values())
        if values:
            seeds = f" (mean of {len(values)})" if len(values) > 1 else ""
            parts.append(f"{arm.name} {percent(statistics.fmean(values))}{seeds}")
    if not parts:
        return "No run has a result yet."
    text = f"{quantity[0].upper()}{quantity[1:]}: {', '.join(parts)}."
    for first, second, mean, *_ in questions:
        if mean.low <= 0 <= mean.high:
            text += f" These {mean.n:,} questions do not tell {first} and {second} apart."
    return text


CURVES = "Curves"

Curve = Callable[[Run], Mapping[int, float | None]]


def comparison_charts(arms: Sequence[Arm]) -> list[ChartSpec]:
    """Curves on shared axes: means over the seeds of an arm, with a band from the lowest to the highest."""
    runs = [run for arm in arms for run in arm.runs.values()]
    levels = list(dict.fromkeys(level for run in runs for e in run.evaluations for level in e["by_level"]))
    kinds = list(dict.fromkeys(kind for run in runs for line in run.steps for kind in line["accuracy"]))

    def evaluation(level: str | None) -> Curve:
        return lambda run: {e["step"]: e["accuracy"] if level is None else e["by_level"].get(level) for e in run.evaluations}

    def metric(key: str) -> Curve:
        return lambda run: {line["step"]: line.get(key) for line in run.steps}

    def accuracy(kind: str) -> Curve:
        return lambda run: {line["step"]: line["accuracy"].get(kind) for line in run.steps}

    shares: dict[str, Any] = {"percent": True, "unit_range": True}
    charts = [
        _chart("held-out", "Held-out accuracy", arms, evaluation(None), smooth=False, **shares),
        *(_chart(f"held-out-{i}", f"Held-out accuracy: {level}", arms, evaluation(level), smooth=False, **shares)
          for i, level in enumerate(levels)),
        *(_chart(f"accuracy-{kind}", f"Accuracy of {kind_name(kind)} rollouts", arms, accuracy(kind), **shares) for kind in kinds),
        *_zone_charts(arms),
        _chart("buffer", "Questions in the buffer", arms, metric("buffer"), smooth=False, y_title="questions"),
        _chart("positive", "Positive advantages", arms, metric("positive_advantage_share"), percent=True),
        _chart("entropy", "Entropy", arms, metric("entropy"), y_title="nats a token"),
        _chart("lengths", "Completion length", arms, metric("completion_tokens_mean"), y_title="tokens"),
        _chart("loss", "Loss", arms, metric("loss")),
        _chart("grad-norm", "Gradient norm", arms, metric("grad_norm")),
    ]  # fmt: skip
    return [chart for chart in charts if not chart.empty]


def _zone_charts(arms: Sequence[Arm]) -> list[ChartSpec]:
    """Graduations by accuracy at admission (Fig. 4), of those that left (Fig. 23), by number of visits (Fig. 24); what graduates were."""
    stories = {run.folder: story_of(run, visits_of(run)) for arm in arms for run in arm.runs.values() if run.replays and run.steps}
    bins = list(dict.fromkeys(name for story in stories.values() for name in story.names))

    def by_step(values: Callable[[ZoneStory], Any]) -> Curve:
        def curve(run: Run) -> Mapping[int, float | None]:
            story = stories.get(run.folder)
            return {} if story is None else dict(zip(story.steps.tolist(), values(story), strict=True))

        return curve

    def graduated(bin: str) -> Curve:
        return by_step(lambda story: story.graduated_share[story.names.index(bin)] if bin in story.names else [None] * len(story.steps))

    def left(story: ZoneStory) -> list[float | None]:
        return [out / (out + lost) if out + lost else None for out, lost in zip(*story.left.tolist(), strict=True)]

    def fate(index: int) -> Curve:
        return lambda run: {n: parts[index] / sum(parts) for n, parts in stories[run.folder].fates.items()} if run.folder in stories else {}

    shares: dict[str, Any] = {"smooth": False, "percent": True}
    note = "Share of the entries that were asked plainly so often since admission; those that are still in the buffer count."
    visits: dict[str, Any] = {
        **shares,
        "unit_range": True,
        "note": note,
        "x_title": f"plain visits since admission ({MOST_VISITS}: so many or more)",
    }
    return [
        *(_chart(f"graduation-{i}", f"Graduated of those admitted at {bin}", arms, graduated(bin), **shares) for i, bin in enumerate(bins)),
        _chart("left", "Graduated of those that left the buffer", arms, by_step(left), **shares),
        *(_chart(f"fate-{i}", f"Entries by number of visits: {name}", arms, fate(i), **visits) for i, name in enumerate(FATES)),
        graduate_shares({arm.name: {name: graduated for name, _, graduated, _ in _entries(arm)[:-1]} for arm in arms}, CURVES),
    ]


def _chart(id: str, title: str, arms: Sequence[Arm], curve: Curve, note: str = "", **options: Any) -> ChartSpec:
    series = []
    for index, arm in enumerate(arms):
        # A run that has only just begun, or has nothing of the kind, does not take the others' curve away.
        curves = [found for run in arm.runs.values() if (found := curve(run))]
        steps = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
        columns = [[v for c in curves if (v := c[step]) is not None and not math.isnan(v)] for step in steps]
        several = len(curves) > 1
        series.append(Series(
            arm.name, steps, numbers(statistics.fmean(c) if c else None for c in columns),
            hover=[f"{len(c)} runs" for c in columns] if several else (),
            low=numbers(min(c, default=None) for c in columns) if several else (),
            high=numbers(max(c, default=None) for c in columns) if several else (),
            **line_style(index),
        ))  # fmt: skip
    caption = " ".join(filter(None, (note, "Means over seeds; the band spans them." if any(len(arm.runs) > 1 for arm in arms) else "")))
    return ChartSpec(id, CURVES, title, tuple(s for s in series if any(v is not None for v in s.y)), caption=caption, **options)


def comparison_page(comparison: RunComparison, charts: Sequence[ChartSpec]) -> str:
    """The page of a comparison, self-contained."""
    return page(comparison_payload(comparison, charts), [])


def comparison_payload(comparison: RunComparison, charts: Sequence[ChartSpec] | None = None) -> dict[str, Any]:
    """What the page of a comparison shows."""
    charts = comparison_charts(comparison.arms) if charts is None else charts
    count = sum(len(arm.runs) for arm in comparison.arms)
    return {
        "title": f"{count} runs compared",
        "outcome": comparison.outcome,
        "head": [
            *(("not alike", text) for text in comparison.warnings),
            *((arm.name, ", ".join(run.name for run in arm.runs.values())) for arm in comparison.arms),
        ],
        "sections": sections(comparison.tables, charts),
        "index": None,
        "footer": FOOTER,
    }
