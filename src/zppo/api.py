"""What `import zppo` gives to a script or a notebook: the commands `train` and `resume` as functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from zppo.config.settings import Settings


@dataclass(frozen=True)
class TrainedRun:
    """A run folder and what its files say.

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
    def accuracies(self) -> dict[int, float]:
        """Held-out accuracy by step, plain prompts; the last one is of `final/`. Empty without held-out questions."""
        return {line["step"]: line["accuracy"] for line in self.metrics if line["event"] in ("eval", "final")}


def train(recipe: Settings | str | Path, *, console: Console | None = None, **overrides: Any) -> TrainedRun:
    """Train by a recipe, as `zppo train` does; returns when the run is finished.

    Args:
        recipe: settings, or the path of a recipe.
        console: where progress is shown; None for the terminal or notebook.
        overrides: settings of a recipe that is a path, dots written as two underscores: `train__steps=100`.

    Raises:
        ZPPOError: something is wrong with recipe, data, models or templates, or the folder holds a run already.
        Interrupted: SIGTERM or Ctrl-C in the main thread; what was trained is saved.
    """
    from zppo.config.recipe import dump_yaml, load_recipe
    from zppo.errors import SettingsError
    from zppo.planning.dry_run import check_files
    from zppo.runs.signals import Stop, catch_signals
    from zppo.train import run

    if isinstance(recipe, str | Path):
        given = [f"--{name.replace('__', '.')}={_written(value, dump_yaml)}" for name, value in overrides.items()]
        settings, name = load_recipe(recipe, given), Path(recipe).stem
    elif overrides:
        raise SettingsError(
            f"{next(iter(overrides))} is given beside settings, which are whole: pass the path of a recipe, or settings that have it"
        )
    else:
        settings, name = recipe, "run"
    check_files(settings)
    stop = Stop()
    with catch_signals(stop):
        return TrainedRun(run.train(settings, name, console, stop))


def resume(folder: str | Path, *, console: Console | None = None) -> TrainedRun:
    """Continue a run after its newest checkpoint, as `zppo resume` does.

    Raises:
        CheckpointError: the folder holds no run, or no checkpoint of it can be used.
        Interrupted: as in `train`.
    """
    from zppo.runs.signals import Stop, catch_signals
    from zppo.train import run

    stop = Stop()
    with catch_signals(stop):
        return TrainedRun(run.resume(Path(folder), console, stop))


def _written(value: Any, dump: Any) -> str:
    """A value as it is written behind `--key=`."""
    plain = str(value) if isinstance(value, Path) else value
    if isinstance(plain, Mapping | list | tuple):
        return json.dumps(plain if isinstance(plain, Mapping) else list(plain))  # JSON is YAML, in one line
    return str(dump(plain)).removesuffix("...\n").strip()
