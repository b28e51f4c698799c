"""`zppo cost`: the FLOPs that `planning.flops` counts, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zppo.config.recipe import load_recipe
from zppo.config.settings import Settings
from zppo.errors import ModelError, SettingsError
from zppo.planning.flops import MOST, SCALES, UPDATES, Assumptions, Cost, as_run, counted, nearest_scale, paper_costs, planned
from zppo.planning.machine import find_machine
from zppo.planning.model_shapes import Size, size_of
from zppo.planning.prompt_lengths import prompt_tokens
from zppo.prompts.book import PromptBook
from zppo.rollout.data import count_judged, load_questions_of
from zppo.rollout.examples import example_turns
from zppo.runs.display import Whole
from zppo.runs.log import METRICS, read_lines

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

_WHO = {"teacher": "teacher", "compression": "teacher", "scoring": "teacher", "judge": "judge"}
"""Whose parameters a part's FLOPs are of, where not the student's."""


def cost_command(
    target: Path,
    overrides: Sequence[str] = (),
    assumed: Assumptions = MOST,
    given: Mapping[str, float] | None = None,
    questions: int | None = None,
    console: Console | None = None,
) -> None:
    """Print the cost of a recipe or of a run folder.

    Args:
        overrides: `--key=value`, for a recipe.
        assumed: for a recipe.
        given: parameters of "student", "teacher" and "judge" that need not be found.
        questions: training questions, instead of reading the data.

    Raises:
        ZPPOError: the target is neither, its recipe, data or log cannot be read, or the size of the student is not known.
    """
    console = console or Console()
    if target.is_dir():
        if not (target / RECIPE).is_file():
            raise SettingsError(
                f"{target} holds no run: there is no {RECIPE} in it; name a recipe, or the folder that `zppo train` printed"
            )
        if overrides or assumed != MOST or questions is not None:
            raise SettingsError(
                f"{target} is a run, of which everything was measured: assumptions, --set and --questions are for a recipe; leave them out"
            )
        settings = load_recipe(target / RECIPE)
        cost = as_run(settings, read_lines(target / METRICS), target / METRICS)
        what, how = f"cost of {target}, {cost.steps:,} steps as run", "as run"
    else:
        settings, cost = _of_recipe(target, overrides, assumed, questions)
        what, how = f"planned cost of {target}, {cost.steps:,} steps", "as planned"
    sizes, unknown = _sizes(settings, given or {}, target, judged=cost.saved.judge > 0)
    console.print(Whole(_table(what, cost, sizes, how)))
    console.print(
        "\nLiteral: Algorithm 1 to the letter, every prompt read for every rollout, log-probs and gradients of every row, the teacher "
        "asked about every hard question. Attention, padding and held-out evaluation are not counted.",
        soft_wrap=True,
        style="dim",
    )
    for note in (_models(settings, sizes), *unknown, *cost.notes, *_papers_figure(settings, sizes["student"])):
        console.print(Text(note), soft_wrap=True)


def paper_command(console: Console | None = None) -> None:
    """Print Tab. 9 next to the count from the paper's own sizes."""
    table = Table(title="Tab. 9 and a count from its sizes", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
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
    console.print(Whole(table))
    console.print(
        "\nCounted with every prompt and rollout at its limit of tokens, 2N forward, 6N forward and backward, ratio = paper / count. "
        f"'update x{UPDATES}' counts forward and backward once per optimizer step over the whole batch, which the method does not do. "
        "docs/cost.md says what follows.",
        soft_wrap=True,
        style="dim",
    )


def _of_recipe(path: Path, overrides: Sequence[str], assumed: Assumptions, questions: int | None) -> tuple[Settings, Cost]:
    settings, judged = load_recipe(path, overrides), 0.0
    if questions is None:
        loaded = load_questions_of(settings)
        train = loaded.mixture.questions
        questions, judged = len(train), count_judged(settings, train) / len(train)
        if assumed.prompt is None:
            book = PromptBook(settings.prompts, form=settings.answer_form)
            lengths = prompt_tokens(settings, train, example_turns(settings, loaded.examples, book, lambda text: text))
            mean = min(lengths.mean, settings.data.max_prompt_tokens)
            assumed = replace(assumed, prompt=mean, prompt_from=f" ({lengths.told(settings.data.max_prompt_tokens)})")
    machine = find_machine(settings.train.device)
    if questions < 1:
        raise SettingsError(f"--questions is {questions}; give at least 1, or leave it out to count those of data.train")
    return settings, planned(settings, questions, assumed, judged=judged, gpu=machine is not None and machine.gpu)


def _sizes(settings: Settings, given: Mapping[str, float], target: Path, *, judged: bool) -> tuple[dict[str, Size], list[str]]:
    """N of the student and, where they work, of teacher and judge; and of which of these two it is not known, in words.

    A run whose student's folder is gone has its size in final/. The name of a teacher at an API seldom says how large it is: the
    student's part is counted all the same.
    """
    name = settings.student.model
    trained = target / FINAL
    if "student" not in given and Path(name).is_absolute() and not Path(name).is_dir() and trained.is_dir():
        name = str(trained)
    sizes = {"student": size_of(name, given.get("student"), "--student-params")}
    others: list[tuple[str, str, str]] = []
    if settings.teacher is not None and settings.method.resolve().needs_teacher:
        others.append(("teacher", settings.teacher.model, "teacher"))
    if judged and settings.judging is not None:
        others.append(("judge", settings.judging[0].model, "judge" if settings.judge else "teacher"))
    unknown = []
    for part, model, option in others:
        try:
            sizes[part] = size_of(model, given.get(option))
        except ModelError:
            unknown.append(
                f"The number of parameters of the {part} {model!r} is not known: its FLOPs are in no sum; give it with --{option}-params."
            )
    return sizes, unknown


def _table(title: str, cost: Cost, sizes: Mapping[str, Size], saved_name: str) -> Table:
    parameters = [sizes[name].parameters if name in sizes else 0.0 for name in ("student", "teacher", "judge")]
    literal, saved = cost.literal.flops(*parameters), cost.saved.flops(*parameters)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), show_footer=True)
    columns = [
        ("part", "total"),
        ("tokens, literal", ""),
        (f"tokens, {saved_name}", ""),
        ("FLOPs, literal", _short(sum(literal.values()))),
        (f"FLOPs, {saved_name}", _short(sum(saved.values()))),
        ("saved", _less(sum(literal.values()), sum(saved.values()))),
    ]
    for index, (name, footer) in enumerate(columns):
        table.add_column(name, footer=footer, justify="right" if index else "left")
    for part, name in PART_NAMES.items():
        tokens = (_short(getattr(work, part)) for work in (cost.literal, cost.saved))
        if _WHO.get(part, "student") not in sizes and getattr(cost.literal, part):
            table.add_row(name, *tokens, "?", "?", "?")
        else:
            table.add_row(name, *tokens, _short(literal[part]), _short(saved[part]), _less(literal[part], saved[part]))
    return table


def _models(settings: Settings, sizes: Mapping[str, Size]) -> str:
    models = {"student": settings.student.model, "teacher": settings.teacher.model if settings.teacher else ""}
    if settings.judging and (settings.judge or "teacher" not in sizes):  # a teacher that also judges is named once
        models["judge"] = settings.judging[0].model
    parts = [
        f"{name} {model}: {sizes[name].parameters:,.0f}{' parameters' if name == 'student' else ''} ({sizes[name].source})"
        for name, model in models.items()
        if name in sizes
    ]
    return f"Models: {'; '.join(parts)}."


def _papers_figure(settings: Settings, student: Size) -> Sequence[str]:
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
