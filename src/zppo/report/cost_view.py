"""`zppo cost`: the tables of `cost` and `paper_flops` for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zppo.errors import SettingsError
from zppo.report.cost import Cost, as_run
from zppo.report.cost_plan import MOST, Assumptions, planned
from zppo.report.paper_flops import SCALES, UPDATES, counted, nearest_scale, paper_costs
from zppo.report.parameters import Size, size_of
from zppo.train.plan import load_data
from zppo.train.recipe import load_recipe
from zppo.train.runlog import METRICS, read_lines
from zppo.train.settings import Settings

RECIPE, FINAL = "recipe.yaml", "final"
PART_NAMES = {
    "sampling": "student sampling",
    "logprob": "log-prob pass",
    "update": "forward and backward",
    "teacher": "teacher rollouts",
    "compression": "compression and hints",
    "scoring": "teacher scoring",
    "judge": "judge",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What `zppo cost` was asked.

    Attributes:
        overrides: `--key=value`, for a recipe.
        assumed: for a recipe.
        student, teacher: parameters that are given instead of found.
        questions: training questions, instead of reading the data.
        resolve: names of models -> folders.
    """

    overrides: tuple[str, ...] = ()
    assumed: Assumptions = MOST
    student: float | None = None
    teacher: float | None = None
    questions: int | None = None
    resolve: Callable[[str], str] = str


def cost_command(target: Path, request: Request, console: Console | None = None) -> None:
    """Print the cost of a recipe or of a run folder.

    Raises:
        ZPPOError: the target is neither, its recipe, data or log cannot be read, or the size of a model is not known.
    """
    console = console or Console()
    if target.is_dir():
        settings, cost = _of_run(target, request)
        what = f"cost of {target}, {cost.steps:,} steps as run"
    else:
        settings, cost = _of_recipe(target, request)
        what = f"planned cost of {target}, {cost.steps:,} steps"
    student, teacher = _sizes(settings, request, target)
    console.print(_table(what, cost, student, teacher, "as run" if target.is_dir() else "as planned"))
    console.print(
        "\nLiteral: Algorithm 1 to the letter, every prompt read for every rollout, log-probs and gradients of every row, the teacher "
        "asked about every hard question. Attention, padding and held-out evaluation are not counted.",
        soft_wrap=True,
        style="dim",
    )
    for note in (_models(settings, student, teacher), *cost.notes, *_beside_paper(settings, student)):
        console.print(Text(note), soft_wrap=True)


def paper_command(console: Console | None = None) -> None:
    """Print Tab. 9 beside the count from the paper's own sizes."""
    table = Table(
        title="Tab. 9 and a count from its sizes",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("method")
    table.add_column("scale")
    for name in ("hours", "FLOPs, paper", "each token once", "ratio", f"update x{UPDATES}", "ratio"):
        table.add_column(name, justify="right")
    for row in paper_costs():
        once = counted(row.method, SCALES[row.scale])
        often = counted(row.method, SCALES[row.scale], updates=UPDATES)
        shown = (_short(row.flops), _short(once), f"{row.flops / once:.2f}", _short(often), f"{row.flops / often:.2f}")
        table.add_row(row.method, row.scale, f"{row.hours:.0f}", *shown)
    console = console or Console()
    console.print(table)
    console.print(
        "\nCounted with every prompt and rollout at its limit of tokens, 2N forward, 6N forward and backward, ratio = paper / count. "
        f"'update x{UPDATES}' counts forward and backward once per optimizer step over the whole batch, which the method does not do. "
        "docs/cost.md says what follows.",
        soft_wrap=True,
        style="dim",
    )


def _of_run(folder: Path, request: Request) -> tuple[Settings, Cost]:
    if not (folder / RECIPE).is_file():
        raise SettingsError(
            f"{folder} holds no run: there is no {RECIPE} in it; name a recipe, or the folder that `zppo train` printed"
        )
    if request.overrides or request.assumed != MOST or request.questions is not None:
        raise SettingsError(
            f"{folder} is a run, of which everything was measured: assumptions, --set and --questions are for a recipe; leave them out"
        )
    settings = load_recipe(folder / RECIPE)
    return settings, as_run(settings, read_lines(folder / METRICS), folder / METRICS)


def _of_recipe(path: Path, request: Request) -> tuple[Settings, Cost]:
    settings = load_recipe(path, request.overrides)
    questions = len(load_data(settings)[0]) if request.questions is None else request.questions
    if questions < 1:
        raise SettingsError(
            f"--questions is {questions}; give at least 1, or leave it out to count those of data.train"
        )
    return settings, planned(settings, questions, request.assumed)


def _sizes(settings: Settings, request: Request, target: Path) -> tuple[Size, Size | None]:
    """N of the student and, where there is one, of the teacher. A run whose student's folder is gone has its size in final/."""
    name = settings.student.model
    trained = target / FINAL
    if request.student is None and Path(name).is_absolute() and not Path(name).is_dir() and trained.is_dir():
        name = str(trained)
    student = size_of(name, request.student, request.resolve)
    if settings.teacher is None or not settings.method.resolve().needs_teacher:
        return student, None
    return student, size_of(settings.teacher.model, request.teacher, request.resolve)


def _table(title: str, cost: Cost, student: Size, teacher: Size | None, saved_name: str) -> Table:
    n_teacher = teacher.parameters if teacher else 0.0
    literal = cost.literal.flops(student.parameters, n_teacher)
    saved = cost.saved.flops(student.parameters, n_teacher)
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), show_footer=True
    )
    columns = [
        ("part", "total"),
        ("tokens, literal", ""),
        (f"tokens, {saved_name}", ""),
        ("FLOPs, literal", _short(sum(literal.values()))),
        (f"FLOPs, {saved_name}", _short(sum(saved.values()))),
        ("saved", _less(sum(literal.values()), sum(saved.values()))),
    ]
    for index, (name, footer) in enumerate(columns):
        table.add_column(name, footer=footer, justify="right" if index else "left", no_wrap=not index)
    for part, name in PART_NAMES.items():
        tokens = (_short(getattr(work, part)) for work in (cost.literal, cost.saved))
        table.add_row(name, *tokens, _short(literal[part]), _short(saved[part]), _less(literal[part], saved[part]))
    return table


def _models(settings: Settings, student: Size, teacher: Size | None) -> str:
    parts = [f"student {settings.student.model}: {student.parameters:,.0f} parameters ({student.source})"]
    if teacher and settings.teacher:
        parts.append(f"teacher {settings.teacher.model}: {teacher.parameters:,.0f} ({teacher.source})")
    return f"Models: {'; '.join(parts)}."


def _beside_paper(settings: Settings, student: Size) -> Sequence[str]:
    """The paper's figure for this method at this scale; empty where it has none."""
    method = settings.method.resolve().paper.split(",")[0]
    scale = nearest_scale(student.parameters)
    return [
        f"The paper's figure for {method} at {row.scale}: {_short(row.flops)} FLOPs and {row.hours:.0f} hours, for 200 steps of 384 "
        "questions with rollouts of up to 12,288 tokens; `zppo cost --paper` shows what that figure counts."
        for row in paper_costs()
        if (row.method, row.scale) == (method, scale)
    ]


def _short(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e") if value else "0"


def _less(literal: float, saved: float) -> str:
    return f"{1 - saved / literal:.0%}" if literal else "-"
