"""Experiment trackers: the numbers of metrics.jsonl, sent on to TensorBoard, Weights & Biases or trackio by way of `accelerate`.

Only numbers leave: no prompt, completion or recipe. A tracker that fails while a run goes on costs a warning, never the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from zppo.errors import SettingsError
from zppo.names import check_file
from zppo.runs.files import write_whole

TRACKERS = "trackers.json"  # in the run folder: the name under which wandb and trackio find the run again
FINISH_SECONDS = 60.0
_MOST_FAILURES = 3
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


class Trackers:
    """The trackers of one run.

    Args:
        names: tensorboard, wandb, trackio.
        project: the project that wandb and trackio file the run under.
        run: the run folder; its name is the run's, TensorBoard's files are in its `tensorboard/`.
        say: called with a message about a tracker that fails.
    """

    def __init__(self, names: Sequence[str], project: str, run: Path, say: Callable[[str], None]) -> None:
        self.names, self.project, self.run, self.say = tuple(dict.fromkeys(names)), project, run, say
        self._live: dict[str, Any] = {}
        self._failures: dict[str, int] = {}

    def check(self) -> None:
        """Whether what they need is installed.

        Raises:
            SettingsError: it is not.
        """
        missing = [name for name in self.names if importlib.util.find_spec(name) is None]
        if missing:
            raise SettingsError(
                f"train.trackers names {', '.join(missing)}, not installed here: `pip install {' '.join(missing)}`, or leave it out"
            )

    def start(self, step: int | None = None) -> None:
        """Opens them: a new run, or with `step` one that goes on after that step.

        Raises:
            SettingsError: one of them cannot start and the run is new; for a run that goes on it is a message.
        """
        resumed = step is not None
        identity = self._identity() if resumed else uuid.uuid4().hex[:12]
        # TensorBoard last: it writes into the run folder, where nothing may stand before everything is found in order.
        for name in sorted(self.names, key="tensorboard".__eq__):
            try:
                tracker = self._make(name, identity, step)
                tracker.start()
                self._live[name] = tracker
            except (Exception, SystemExit) as error:
                text = f"tracker {name} cannot start: {_describe(error)}"
                if not resumed:
                    self.finish()
                    raise SettingsError(f"{text}. Mend that (for wandb: `wandb login`), or leave it out") from None
                self.say(f"{text}. The run goes on without it")
        if self._live.keys() - {"tensorboard"}:
            self.run.mkdir(parents=True, exist_ok=True)
            write_whole(self.run / TRACKERS, json.dumps({"id": identity}))

    def log(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: its numbers under flattened names, those of evaluations behind `eval/` and `final/`."""
        for name, tracker in list(self._live.items()):
            try:
                tracker.log(dict(flatten(values, "" if event == "step" else f"{event}/")), step=step)
                self._failures[name] = 0
            except (Exception, SystemExit) as error:
                self._failures[name] = count = self._failures.get(name, 0) + 1
                if count == 1 or count == _MOST_FAILURES:
                    left = "is left out from now on" if count == _MOST_FAILURES else "is tried again"
                    self.say(f"step {step}: tracker {name} failed and {left}: {_describe(error)}")
                if count == _MOST_FAILURES:
                    del self._live[name]

    def finish(self) -> None:
        """Closes them; an upload that does not end is not waited for longer than FINISH_SECONDS."""
        for name, tracker in self._live.items():
            errors: list[BaseException] = []
            thread = threading.Thread(target=_finish, args=(tracker, errors), daemon=True)
            thread.start()
            thread.join(FINISH_SECONDS)
            if thread.is_alive():
                self.say(f"tracker {name} is still busy after {FINISH_SECONDS:g} s and is not waited for")
            for error in errors:
                self.say(f"tracker {name} could not be closed: {_describe(error)}")
        self._live = {}

    def _make(self, name: str, identity: str, step: int | None) -> Any:
        made = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            # What a killed run wrote after the step is taken back, as in the run's own files.
            purge = {} if step is None else {"purge_step": step + 1}
            return made("tensorboard", logging_dir=self.run, **purge)
        if name == "wandb":
            return made(self.project, name=self.run.name, id=identity, resume="never" if step is None else "allow")
        resume = "never" if step is None else "allow"
        return made(self.project, name=f"{self.run.name}-{identity}", resume=resume)

    def _identity(self) -> str:
        """The name that the run started under; a new one where none is kept (the trackers came with the resume)."""
        check_file(self.run / TRACKERS, SettingsError)
        try:
            return str(json.loads((self.run / TRACKERS).read_text(encoding="utf-8"))["id"])
        except (OSError, ValueError, KeyError, TypeError):
            return uuid.uuid4().hex[:12]


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings: {"accuracy": {"plain": 0.5}} -> ("accuracy/plain", 0.5); what is no finite number is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def _finish(tracker: Any, errors: list[BaseException]) -> None:
    try:
        tracker.finish()
    except (Exception, SystemExit) as error:
        errors.append(error)


def _describe(error: BaseException) -> str:
    """An error in one line, without any secret that the environment holds."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in _SECRET):
            text = text.replace(value, f"<{name}>")
    return text[:500]


@contextlib.contextmanager
def tracking(trackers: Trackers) -> Iterator[None]:
    """Closes the trackers at the end, however it comes."""
    try:
        yield
    finally:
        trackers.finish()
