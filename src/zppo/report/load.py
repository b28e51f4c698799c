"""A run folder as it lies on the disk, finished or still growing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zppo.config.methods import METHODS
from zppo.config.recipe import parse_yaml
from zppo.errors import CheckpointError
from zppo.runs.log import BUFFER, METRICS, ROLLOUTS, read_lines

RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Run:
    """What a run has written so far, the rollouts left on the disk.

    Attributes:
        folder: the run folder.
        recipe: every setting by section, as recipe.yaml holds it.
        steps: the lines of metrics.jsonl with `event: step`, in order.
        evaluations: those with `event: eval` or `final`, in order.
        buffer: the lines of buffer.jsonl, in order.
    """

    folder: Path
    recipe: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    buffer: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        """The last step with metrics, 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def finished(self) -> bool:
        """Whether every planned step is done; a run by epochs is finished when its student lies in final/."""
        planned = self.setting("train.steps")
        return (self.folder / "final" / "README.md").exists() or (planned is not None and self.last_step >= planned)

    @property
    def rollout_files(self) -> list[Path]:
        """rollouts/*.parquet by step."""
        return sorted((self.folder / ROLLOUTS).glob("step-*.parquet"))

    @property
    def group_size(self) -> int:
        return int(self.setting("rollout.group_size", 8))

    @property
    def threshold(self) -> float:
        return float(self.setting("zone.threshold", 0.5))

    @property
    def replays(self) -> bool:
        """Whether the method has a prompt replay buffer."""
        override = self.setting("method.replay")
        row = METHODS.get(str(self.setting("method.name", "")))
        return bool(override) if override is not None else row is None or row.replay

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the recipe by its dotted key; the default where it is not set."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value


def open_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        CheckpointError: the folder holds no run, or its recipe cannot be read.
    """
    path = folder / RECIPE
    if not path.is_file():
        what = "is no folder" if not folder.is_dir() else f"holds no run: there is no {RECIPE} in it"
        raise CheckpointError(f"{folder} {what}. Name the folder that `zppo train` printed")
    try:
        recipe = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Restore it from the recipe that the run was started with"
        ) from error
    if not isinstance(recipe, Mapping):
        raise CheckpointError(f"{path} holds no settings. Restore it from the recipe that the run was started with")
    lines = read_lines(folder / METRICS)
    return Run(
        folder=folder,
        recipe=recipe,
        steps=tuple(line for line in lines if line["event"] == "step"),
        evaluations=tuple(line for line in lines if line["event"] != "step"),
        buffer=tuple(read_lines(folder / BUFFER)),
    )
