"""What `import zppo` gives to a script or a notebook: the commands `train`, `resume` and `eval` as functions."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from zppo.config.settings import Settings

_OPTIONAL_PATHS = ("output", "data", "clips", "closing")  # of `evaluate`
ADDRESSES = ("teacher.base_urls", "judge.base_urls", "rollout.vllm.base_url")
"""What a resumed run may be told anew: on a cluster its servers have moved."""

_NARROWEST = 60  # columns; in a narrower table no word has room

Accuracies = dict[str, float | None]
"""By name; None where no completion has a verdict."""


@dataclass(frozen=True)
class TrainedRun:
    """A run folder and what its files say; it can be given wherever a path can.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    @property
    def final(self) -> Path:
        """The trained student; loads with `transformers`."""
        return self.folder / "final"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `event` is step, eval or final. A last line that a killed run tore is left out."""
        from zppo.runs.log import METRICS, read_lines

        return read_lines(self.folder / METRICS)

    @property
    def accuracies(self) -> dict[int, float | None]:
        """Held-out accuracy by step, plain prompts; the last one is of `final/`. Empty without held-out questions."""
        return {line["step"]: line["accuracy"] for line in self.metrics if line["event"] in ("eval", "final")}

    @property
    def before(self) -> Accuracies:
        """Held-out accuracy before training: of "all" questions and, where the data has levels, of each level."""
        return self._accuracies("eval", 0)

    @property
    def after(self) -> Accuracies:
        """The same of `final/`."""
        return self._accuracies("final", -1)

    def _accuracies(self, event: str, which: int) -> Accuracies:
        lines = [line for line in self.metrics if line["event"] == event]
        return {"all": lines[which]["accuracy"], **lines[which]["by_level"]} if lines else {}

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        steps = sum(line["event"] == "step" for line in self.metrics)
        changes = [f"{name} {_share(self.before.get(name))} -> {_share(value)}" for name, value in self.after.items()]
        accuracy = f", held-out accuracy: {', '.join(changes)}" if changes else ""
        return f"<TrainedRun {self.folder}: {steps:,} steps{accuracy}>"


@dataclass(frozen=True)
class Evaluated:
    """A folder of `zppo eval` and what it says.

    Attributes:
        folder: it holds eval.json and, below eval/, every row.
    """

    folder: Path

    @cached_property
    def results(self) -> dict[str, Any]:
        """What eval.json holds; empty after a dry run."""
        from zppo.evals.results import EvalFolder

        return EvalFolder(self.folder).read() or {}

    @property
    def accuracies(self) -> Accuracies:
        """The figure of each benchmark that the folder has, from 0 to 1."""
        return {each["name"]: each["value"] for each in self.results.get("benchmarks", ())}

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {_share(value)}" for name, value in self.accuracies.items())
        return f"<Evaluated {self.folder}: {figures or 'no results'}>"


def train(recipe: str | Path | Mapping[str, Any] | Settings, *, console: Console | None = None, **overrides: Any) -> TrainedRun:
    """Train by a recipe, as `zppo train` does; returns when the run is finished.

    Args:
        recipe: the path of a YAML file, the name of a recipe that comes with zppo (`zppo recipes`), a mapping as such a file
            holds it, or settings.
        console: where progress is shown; None for the terminal or notebook, `Console(quiet=True)` for nowhere.
        overrides: settings that win over the recipe's, dots written as two underscores: `train__steps=100`.

    Raises:
        ZPPOError: something is wrong with recipe, data, models or templates, or the folder holds a run already.
        Interrupted: SIGTERM or Ctrl-C in the main thread; what was trained is saved.
    """
    from zppo.config.bundled import find_recipe
    from zppo.config.recipe import load_recipe

    name = find_recipe(recipe).stem if isinstance(recipe, str | Path) else "run"
    return start(load_recipe(recipe, overrides), name, console)


def start(settings: Settings, name: str, console: Console | None = None) -> TrainedRun:
    """Train by settings; the run folder is named after `name` where `output` names none. Files are looked at before torch is loaded."""
    from zppo.planning.needed import check_files
    from zppo.runs.display import steady_output
    from zppo.runs.signals import Stop, catch_signals

    fit_output()
    check_files(settings)
    with steady_output():
        with _loading(console):
            from zppo.train.run import train as run

        stop = Stop()
        with catch_signals(stop):
            return TrainedRun(run(settings, name, console, stop))


def resume(
    folder: str | os.PathLike[str], *, console: Console | None = None, code: bool = True, addresses: Sequence[str] | Mapping[str, Any] = ()
) -> TrainedRun:
    """Continue a run after its newest checkpoint, as `zppo resume` does; a finished one stays as it is, unless its
    recipe asks for more steps.

    Args:
        console: as of `train`.
        code: whether the code that the folder's recipe names (a reward function, reformulations) may be imported; False: it is an error.
        addresses: overrides of `ADDRESSES` for this start, where servers have moved since.

    Raises:
        CheckpointError: the folder holds no run, or no checkpoint of it can be used.
        Interrupted: as in `train`.
    """
    from zppo.config.recipe import load_recipe, refuse_code
    from zppo.runs.display import steady_output
    from zppo.runs.files import RECIPE
    from zppo.runs.signals import Stop, catch_signals

    recipe = Path(folder) / RECIPE
    if not code and recipe.exists():
        refuse_code(load_recipe(recipe), recipe)
    fit_output()
    with steady_output():
        with _loading(console):
            from zppo.train.run import resume as run

        stop = Stop()
        with catch_signals(stop):
            return TrainedRun(run(Path(folder), console, stop, addresses))


@contextmanager
def _loading(console: Console | None) -> Iterator[None]:
    """Says that torch is being loaded, which takes seconds; the first of several processes says it."""
    from rich.console import Console as Terminal

    from zppo.distributed.launcher import rank_of
    from zppo.runs.display import busy

    with nullcontext() if "torch" in sys.modules or rank_of() else busy(console or Terminal(), "loading torch and transformers"):
        yield


def evaluate(
    model: str | os.PathLike[str],
    suite: str = "paper",
    *,
    judge: str | None = None,
    judge_prompts: Mapping[str, str | Path] | None = None,
    console: Console | None = None,
    **options: Any,
) -> Evaluated:
    """Evaluate a model on benchmarks, as `zppo eval` does; the same call goes on where it stopped. Needs the extra `eval`.

    Args:
        model: a checkpoint folder, a finished run, `lab:<world>/<student|teacher>`, or the URL of a server.
        suite: paper, vlm, llm, video, names of benchmarks, or the YAML file of one's own, with commas.
        judge: URL of a server for rows that rules cannot decide; needed where the suite has such.
        judge_prompts: a judge's own words, by its name or its benchmark's.
        console: as of `train`.
        options: the others of `zppo eval --help`, dashes written as underscores: limit, samples (a number, or numbers by
            benchmark), output, data, concurrency, ...

    Raises:
        SettingsError: an option is wrong, or the folder holds another evaluation.
        EvaluationError: a server or a package is missing, nothing could be evaluated, or rows are open at the end.
    """
    from zppo.evals.evaluate import evaluate_benchmarks as run
    from zppo.evals.options import EvalOptions
    from zppo.evals.registry import judge_prompts as read_prompts
    from zppo.evals.results import default_output

    fit_output()
    options |= {name: Path(options[name]) for name in _OPTIONAL_PATHS if options.get(name) is not None}
    prompts = read_prompts([f"{name}={path}" for name, path in (judge_prompts or {}).items()])
    asked = EvalOptions(os.fspath(model), suite, judge, judge_prompts=prompts, **options)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        run(asked, console)
    else:  # a notebook: the evaluation's own loops need a thread without one
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run, asked, console).result()
    return Evaluated(asked.output or default_output(asked))


def fit_output() -> None:
    """Makes printing safe: what the terminal's encoding does not have becomes an escape (`\\u2192`), and COLUMNS has a usable value."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for name, least in (("COLUMNS", _NARROWEST), ("LINES", 1)):
        given = os.environ.get(name, "").strip()
        if not (given.isascii() and given.isdecimal() and int(given)):  # 0 is what some programs set where there is no terminal
            os.environ.pop(name, None)
        elif int(given) < least:
            os.environ[name] = str(least)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
