"""`zppo lab study`: a grid of runs (methods x seeds x students), resumable, and its tables [zppo].

A row says what `metrics.jsonl` of a finished run said; rows are appended to one file, and a cell that has its row is not run again. The
tables show means over seeds with 95% intervals, and paired differences to the controls.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from zppo import __version__
from zppo.config.methods import METHODS
from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.core.types import BCQ
from zppo.errors import DataError, SettingsError
from zppo.lab.drift import drift_of
from zppo.lab.picture_world import is_picture_world
from zppo.lab.questions import SCHEME
from zppo.report.audits import run_rows
from zppo.report.bootstrap import mean_interval, paired_difference
from zppo.report.read_run import open_run, scan_file
from zppo.runs.display import show_table
from zppo.runs.log import BUFFER, METRICS, read_lines
from zppo.sweep import SweepRun, run_all

MATCHED = "-matched"
"""Ending of a method's name that asks for as many student rollouts as ZPPO takes, by more steps (a matched-cost control)."""
VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "zppo:minibatches-1": ("train.minibatches=1",),
        "zppo:minibatches-4": ("train.minibatches=4",),
        "zppo:minibatches-16": ("train.minibatches=16",),
        "grpo:minibatches-4": ("train.minibatches=4",),
        "teacher-response:minibatches-4": ("train.minibatches=4",),
        "zppo:scope-all": ("advantage.scope=all",),
        "zppo:scope-none": ("advantage.scope=none",),
        "zppo:ask-all": ("teacher.ask=all",),
        "zppo:ties-batch": ("zone.ties=batch",),
        "zppo:dynamic": ("zone.dynamic_sampling=after-reformulation",),
        "zppo:two-teachers": ("more_teachers=[{model: lab:elsewhere-2/teacher, rollout: {max_new_tokens: 32}}]",),
    }
)
"""A method with other settings than its recipe's, by METHOD:NAME."""


Row = dict[str, Any]
"""What `metrics.jsonl` and the rollouts of one finished run said."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study."""

    recipe: Path
    method: str
    seed: int
    student: str = ""  # a model instead of the recipe's; "" for the recipe's own

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What makes rows of equal cells equal."""
        return self.recipe.stem, self.method, self.seed, self.student

    @property
    def name(self) -> str:
        parts = (self.recipe.stem, self.student.removeprefix(SCHEME), self.method, f"s{self.seed}")
        return re.sub("[/:]", "-", "-".join(part for part in parts if part))


def grid(recipes: Sequence[Path], methods: Sequence[str], seeds: Sequence[int], students: Sequence[str]) -> Iterator[Cell]:
    """All cells, seeds outermost, so that a study that is stopped early has every method.

    Raises:
        SettingsError: a method that is none.
    """
    for method in methods:
        if method not in VARIANTS and method.removesuffix(MATCHED) not in METHODS:
            raise SettingsError(f"{method!r} is no method; known: {', '.join((*METHODS, *VARIANTS))}, each method also with {MATCHED}")
    for seed in seeds:
        for student in students or ("",):
            for recipe in recipes:
                for method in methods:
                    yield Cell(recipe, method, seed, student)


def overrides_of(cell: Cell, settings: Settings) -> list[str]:
    """What the command line of a cell's run adds to its recipe."""
    extra = [
        *_questions_of(cell, settings),
        f"--method={cell.method.removesuffix(MATCHED).partition(':')[0]}",
        *(f"--{setting}" for setting in VARIANTS.get(cell.method, ())),
        f"--seed={cell.seed}",
        "--train.checkpoint_every=0",
        "--eval.every=0",
        "--train.stop_on_collapse=false",  # a run that dies is a result
    ]
    if cell.student:
        extra.append(f"--student.model={cell.student}")
    if cell.method.endswith(MATCHED):
        if settings.train.steps is None:
            raise SettingsError(f"{cell.recipe} sets no train.steps, so {cell.method!r} has no number of steps to match")
        more = 1 + settings.zone.rho_replay + settings.zone.rho_aug
        extra.append(f"--train.steps={math.ceil(settings.train.steps * more)}")
    return extra


def _questions_of(cell: Cell, settings: Settings) -> list[str]:
    """On a lab world of text: train without its unseen operations, evaluate on all levels of a study; a bundled student brings its
    questions."""
    train = settings.data.train_name
    world = (cell.student if cell.student.startswith(SCHEME) else train).removeprefix(SCHEME).partition("/")[0]
    if not train.startswith(SCHEME) or is_picture_world(world):
        return []
    return [f"--data.train={SCHEME}{world}/seen", f"--data.eval={SCHEME}{world}/study"]


def row_of(cell: Cell, run: Path) -> dict[str, Any]:
    """The row of a finished run."""
    lines = read_lines(run / METRICS)
    steps = [line for line in lines if line["event"] == "step"]
    before = next(line for line in lines if line["event"] == "eval")
    after = next(line for line in lines if line["event"] == "final")
    late = [line["entropy"] for line in steps[-10:] if line["entropy"] is not None]
    counts: dict[str, dict[str, int]] = {"admitted": {}, "graduated": {}, "evicted": {}}
    for event in read_lines(run / BUFFER):
        name = f"{event['entry_accuracy']:g}"
        counts[event["event"]][name] = counts[event["event"]].get(name, 0) + 1
    return {
        "recipe": cell.recipe.stem,
        "method": cell.method,
        "seed": cell.seed,
        "student": cell.student,
        "steps": len(steps),
        "before": before["by_level"],
        "after": after["by_level"],
        "curve": _curve(lines),
        **counts,
        **_audit(run),
        "drift": drift_of(run),
        "entropy": sum(late) / len(late) if late else None,
        "rollouts": sum(line["rollouts"] for line in steps),
        "student_tokens": sum(line["student_tokens"] for line in steps),
        "teacher_tokens": sum(line["teacher_tokens"] for line in steps),
        "seconds": round(sum(line["seconds"]["step"] for line in steps), 1),
        "version": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _curve(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Held-out accuracy by level along a run, with what it had cost until then."""
    curve, student, teacher = [], 0, 0
    for line in lines:
        if line["event"] == "step":
            student, teacher = student + line["student_tokens"], teacher + line["teacher_tokens"]
        elif line["event"] == "eval":
            curve.append({"step": line["step"], "student_tokens": student, "teacher_tokens": teacher, "by_level": line["by_level"]})
    return curve


def _audit(run: Path) -> dict[str, Any]:
    """Of the audit's window (Tab. 16): the accuracy of BCQ rollouts, and the share of wrong ones with the wrong candidate's answer."""
    counts = [scan_file(path).counts for path in open_run(run).rollout_files]
    rows = {row.subset: row for row in run_rows(counts) if row.kind == BCQ and row.source.startswith("last")}
    return {"bcq_accuracy": rows["all"].accuracy, "bcq_followed": rows["wrong"].negative} if rows else {}


def run_study(
    cells: Sequence[Cell], rows: Path, *, jobs: int, work: Path, extra: Sequence[str] = (), console: Console | None = None
) -> int:
    """Run the cells that have no row yet, `jobs` at a time with one thread each, and append their rows to `rows`.

    Args:
        work: folder of the runs; one is removed when its row is written.
        extra: overrides that all cells get; rows do not tell them apart, so keep them the same within one file.

    Returns:
        How many cells failed; what they printed stays in `work`.
    """
    console = console or Console()
    done = {(r["recipe"], r["method"], r["seed"], r["student"]) for r in read_lines(rows)}
    left = {cell.name: cell for cell in cells if cell.key not in done}
    console.print(f"{len(cells)} cells, {len(cells) - len(left)} have their row, {len(left)} to run, {jobs} at a time")
    rows.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for cell in left.values():
        overrides = [*overrides_of(cell, load_recipe(cell.recipe)), *extra]
        runs.append(SweepRun(cell.name, load_recipe(cell.recipe, overrides)))
        _remove(work, cell.name)  # of a study that was stopped: these runs have no checkpoints

    def finished(run: SweepRun, place: Path) -> str:
        row = row_of(left[run.name], place)
        with open(rows, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        _remove(work, run.name)
        after = "  ".join(f"{level} {value:.2f}" for level, value in row["after"].items())
        return f"{after}  ({row['seconds']:.0f} s)"

    return run_all(runs, work, finished, jobs=jobs, threads=1, console=console)


def _remove(work: Path, name: str) -> None:
    shutil.rmtree(work / name, ignore_errors=True)
    for ending in ("yaml", "txt"):
        (work / f"{name}.{ending}").unlink(missing_ok=True)


CONTROLS = ("grpo-replay", "zppo-placebo")


def study_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, lines) for every recipe and student: outcome per method, then differences to each control."""
    tables = []
    worlds = dict.fromkeys((r["recipe"], r["student"]) for r in rows)
    for recipe, student in worlds:
        mine = [r for r in rows if (r["recipe"], r["student"]) == (recipe, student)]
        title = f"{recipe}, student {student}" if student else recipe
        levels = list(dict.fromkeys(level for r in mine for level in r["after"]))
        methods = list(dict.fromkeys(r["method"] for r in mine))
        tables.append(_outcomes(title, mine, methods, levels))
        tables.extend(_differences(title, mine, methods, levels, control) for control in CONTROLS if control in methods)
    return tables


def _outcomes(title: str, rows: Sequence[dict[str, Any]], methods: list[str], levels: list[str]) -> tuple[str, list[str], list[list[str]]]:
    columns = ["method", "seeds", *levels, "0% graduated", "entropy", "student tokens", "teacher tokens", "seconds"]
    before = [mean_interval([r["before"][level] for r in rows]).unsigned() for level in levels]
    lines = [["before", str(len(rows)), *before, "", "", "", "", ""]]
    for method in methods:
        mine = [r for r in rows if r["method"] == method]
        graduated = [share for r in mine if (share := graduated_share(r)) is not None]
        lines.append(
            [
                method,
                str(len(mine)),
                *(mean_interval([r["after"][level] for r in mine]).unsigned() for level in levels),
                mean_interval(graduated).unsigned(),
                f"{mean_interval([r['entropy'] for r in mine if r['entropy'] is not None]).value:.2f}",
                f"{mean_interval([r['student_tokens'] for r in mine]).value:,.0f}",
                f"{mean_interval([r['teacher_tokens'] for r in mine]).value:,.0f}",
                f"{mean_interval([r['seconds'] for r in mine]).value:.0f}",
            ]
        )
    return f"{title}: held-out plain accuracy after training, mean [95% interval] over seeds", columns, lines


def _differences(
    title: str, rows: Sequence[dict[str, Any]], methods: list[str], levels: list[str], control: str
) -> tuple[str, list[str], list[list[str]]]:
    def after(method: str, level: str) -> dict[str, float]:
        return {str(r["seed"]): r["after"][level] for r in rows if r["method"] == method}

    lines = []
    for method in methods:
        if method != control:
            differences = [paired_difference(after(method, level), after(control, level)) for level in levels]
            lines.append([method, str(differences[0].n), *map(str, differences)])
    return f"{title}: minus {control}, paired over seeds", ["method", "pairs", *levels], lines


def graduated_share(row: dict[str, Any]) -> float | None:
    """Entries admitted at 0% that graduated; None where none was admitted."""
    admitted = row["admitted"].get("0", 0)
    return row["graduated"].get("0", 0) / admitted if admitted else None


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        DataError: it is missing or empty.
    """
    rows = read_lines(path)
    if not rows:
        raise DataError(f"{path} holds no rows: run the study first, or name the file that it wrote with --rows")
    return rows


def print_study(path: Path, console: Console, *, markdown: bool = False) -> None:
    """Print the tables of a rows file, for a terminal or as Markdown. Raises DataError, as `read_rows`."""
    print_tables(study_tables(read_rows(path)), console, markdown=markdown)


def print_tables(tables: Sequence[tuple[str, list[str], list[list[str]]]], console: Console, *, markdown: bool = False) -> None:
    """Print (title, columns, lines), for a terminal or as Markdown."""
    for title, columns, lines in tables:
        console.print(f"**{title}**\n" if markdown else f"\n{title}", highlight=False, markup=False, soft_wrap=markdown)
        print_table(columns, lines, console, markdown=markdown)


def print_table(columns: Sequence[str], lines: Sequence[Sequence[str]], console: Console, *, markdown: bool = False) -> None:
    """Print one table, for a terminal or as Markdown."""
    if markdown:
        text = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *("| " + " | ".join(line) + " |" for line in lines), ""]
        console.print("\n".join(text), highlight=False, markup=False, soft_wrap=True)
    else:
        show_table(console, columns, lines)
