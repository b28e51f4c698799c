"""The folder of an evaluation: what it holds, and whether a call may go on with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from zppo import __version__
from zppo.errors import DataError, EvaluationError, SettingsError, StorageError
from zppo.evaluate.protocol import RESULT, EvalOptions
from zppo.evaluate.rows import families

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "zppo eval 1"
WORK = "eval"


def opened(path: Path, mode: Literal["wb", "ab"]) -> IO[bytes]:
    """A file of an evaluation to write to, in a folder that is made where there is none. StorageError where that is refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}); name another folder with --output"
        ) from error


@dataclass(frozen=True, slots=True)
class EvalFolder:
    """Places in the folder: eval.json, and below eval/ the rows, the journals, the transcripts and the server's log."""

    path: Path

    @property
    def result(self) -> Path:
        return self.path / RESULT

    def rows(self, benchmark: str) -> Path:
        return self.path / WORK / "rows" / f"{benchmark}.jsonl"

    def journal(self, what: str, benchmark: str) -> Path:
        return self.path / WORK / what / f"{benchmark}.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / WORK / "logs"

    @property
    def store(self) -> Path:
        return self.path / WORK / "media"

    @property
    def server_log(self) -> Path:
        return self.path / WORK / "server.log"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else may evaluate into the folder within the block; the system ends that with the process, however it ends.

        Raises:
            EvaluationError: somebody does.
            StorageError: the folder cannot be written.
        """
        with opened(self.path / WORK / "lock", "ab") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EvaluationError(
                    f"another zppo eval is at work in {self.path}: wait for its end, or name another folder with --output"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    def read(self) -> dict[str, Any] | None:
        """What eval.json holds, None where there is none. DataError where it cannot be read."""
        if not self.result.exists():
            return None
        try:
            state = json.loads(self.result.read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise ValueError(f"its format is {state['format']!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.result} is no result of `zppo eval` ({error}); name another folder with --output"
            ) from error
        return dict(state)

    def write(self, state: Mapping[str, Any]) -> None:
        """Replaces eval.json in one go; StorageError where it cannot be written."""
        half = self.result.with_suffix(".part")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps(state, ensure_ascii=True, indent=1, allow_nan=False), encoding="utf-8")
            os.replace(half, self.result)
        except OSError as error:
            raise StorageError(
                f"{self.result} cannot be written ({error.strerror or error}); name another folder with --output"
            ) from error


def default_output(options: EvalOptions) -> Path:
    """The folder of a run itself, so that its report shows the results; else one below runs/ that is named after the model."""
    folder = Path(options.model)
    if (folder / "recipe.yaml").is_file():
        return folder
    name = options.name or options.model
    words = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.split("://")[-1]).strip("-.")
    return Path("runs") / f"eval-{words[-80:] or 'model'}"


def begin(folder: EvalFolder, label: str, source: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state to go on with, or a new one.

    Args:
        label: how results call the model.
        source: MODEL of the command.

    Raises:
        SettingsError: the folder holds an evaluation under other settings.
    """
    state = folder.read()
    if state is None:
        return {
            "format": FORMAT,
            "zppo": __version__,
            "label": label,
            "source": source,
            "settings": dict(settings),
            "benchmarks": [],
            "skipped": [],
            "families": {},
        }
    for name, value in settings.items():
        if state["settings"].get(name) != json.loads(json.dumps(value)):
            raise SettingsError(
                f"{folder.result} was made with {name} = {state['settings'].get(name)!r}, and now it is {value!r}: rows of both must not "
                "stand beside one another; name another folder with --output"
            )
    return state


def with_benchmark(state: Mapping[str, Any], part: Mapping[str, Any], order: list[str]) -> dict[str, Any]:
    """The state with the results of a benchmark, in the registry's order, family averages anew."""
    parts = [each for each in state["benchmarks"] if each["name"] != part["name"]] + [dict(part)]
    parts.sort(key=lambda each: order.index(each["name"]) if each["name"] in order else len(order))
    skipped = [each for each in state["skipped"] if each["name"] != part["name"]]
    return {**state, "benchmarks": parts, "skipped": skipped, "families": families(parts)}


def with_skipped(state: Mapping[str, Any], name: str, family: str, why: str) -> dict[str, Any]:
    """The state with a benchmark whose data cannot be had; what an earlier call made of it stays."""
    skipped = [each for each in state["skipped"] if each["name"] != name]
    return {**state, "skipped": [*skipped, {"name": name, "family": family, "why": why}]}


def finished(state: Mapping[str, Any], name: str, limit: int | None, samples: int) -> bool:
    """Whether an earlier call has decided every row that this one would."""
    for each in state["benchmarks"]:
        if each["name"] == name:
            return not each["open"] and each["limit"] == limit and each["samples"] == samples
    return False
