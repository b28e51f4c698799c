"""Experiment trackers: the numbers of metrics.jsonl and a few completions a step, sent on by way of `accelerate`.

No recipe leaves, and no completion where a recipe wants none. A tracker that fails while a run goes on costs a warning, never the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from zppo.core.draws import keyed_random
from zppo.errors import SettingsError
from zppo.names import check_file
from zppo.runs.files import write_whole
from zppo.runs.tracker_kinds import KINDS, TABLE, Opening

TRACKERS = "trackers.json"  # in the run folder: the names under which trackers find the run again
COLUMNS = ("step", "kind", "question_id", "prompt", "completion", "answer", "gold", "correct", "reward", "advantage")
MOST_CHARACTERS = 8_000  # of a prompt or completion in a table
FINISH_SECONDS = 60.0
_MOST_FAILURES = 3
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


class Trackers:
    """The trackers of one run.

    Args:
        names: of `KINDS`.
        project: what they file the run under.
        run: the run folder; its name is the run's, TensorBoard's files are in its `tensorboard/`, DVCLive's in its `dvclive/`.
        say: called with a message about a tracker that fails.
        completions: how many of each kind of prompt they get of a step.
    """

    def __init__(self, names: Sequence[str], project: str, run: Path, say: Callable[[str], None], completions: int = 0) -> None:
        self.names, self.project, self.run, self.say = tuple(dict.fromkeys(names)), project, run, say
        self.completions = completions
        self._live: dict[str, Any] = {}
        self._tables: dict[str, Any] = {}
        self._failures: dict[tuple[str, str], int] = {}

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
        kept = self._kept() if resumed else {}
        identity = kept.get("id") or uuid.uuid4().hex[:12]
        keys = {"id": identity}
        # Last those that write into the run folder, where nothing may stand before everything is found in order.
        for name in sorted(self.names, key=lambda name: KINDS[name].local):
            kind = KINDS[name]
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](**kind.arguments(Opening(self.project, self.run, identity, kept.get(name), step)))
                tracker.start()
                self._live[name] = tracker
                if kind.key is not None:
                    keys[name] = kind.key(tracker)
            except (Exception, SystemExit) as error:
                text = f"tracker {name} cannot start: {_describe(error)}"
                if not resumed:
                    self.finish()
                    raise SettingsError(f"{text}. Mend that (for wandb: `wandb login`), or leave it out") from None
                self.say(f"{text}. The run goes on without it")
        self._tables = {name: tracker for name, tracker in self._live.items() if KINDS[name].table is not None}
        if any(not KINDS[name].local for name in self._live):
            self.run.mkdir(parents=True, exist_ok=True)
            write_whole(self.run / TRACKERS, json.dumps(kept | keys))

    def log(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: its numbers under flattened names, those of evaluations behind `eval/` and `final/`."""
        flat = dict(flatten(values, "" if event == "step" else f"{event}/"))
        self._each(self._live, step, "", lambda _, tracker: tracker.log(flat, step=step))

    def log_completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """A table of a step: `completions` of each kind of prompt, drawn from rows of rollouts/*.parquet."""
        if not (self._tables and self.completions):
            return
        chosen = sample_rows(step, rows, self.completions)

        def table(name: str, tracker: Any) -> None:
            if name in self._live and (send := KINDS[name].table) is not None:
                send(tracker, step, COLUMNS, chosen)

        self._each(self._tables, step, f"'s table of {TABLE}", table)

    def _each(self, live: dict[str, Any], step: int, what: str, send: Callable[[str, Any], None]) -> None:
        """Sends to each of `live`; who fails three times in a row is taken out of it."""
        for name, tracker in list(live.items()):
            try:
                send(name, tracker)
                self._failures[name, what] = 0
            except (Exception, SystemExit) as error:
                self._failures[name, what] = count = self._failures.get((name, what), 0) + 1
                if count == 1 or count == _MOST_FAILURES:
                    left = "is left out from now on" if count == _MOST_FAILURES else "is tried again"
                    self.say(f"step {step}: tracker {name}{what} failed and {left}: {_describe(error)}")
                if count == _MOST_FAILURES:
                    del live[name]

    def finish(self) -> None:
        """Closes them; an upload that does not end is not waited for longer than FINISH_SECONDS, where a tracker can be left."""
        for name, tracker in self._live.items():
            errors: list[BaseException] = []
            if KINDS[name].elsewhere:
                thread = threading.Thread(target=_finish, args=(tracker, errors), daemon=True)
                thread.start()
                thread.join(FINISH_SECONDS)
                if thread.is_alive():
                    self.say(f"tracker {name} is still busy after {FINISH_SECONDS:g} s and is not waited for")
            else:
                _finish(tracker, errors)
            for error in errors:
                self.say(f"tracker {name} could not be closed: {_describe(error)}")
        self._live = {}

    def _kept(self) -> dict[str, str]:
        """The names that the run started under; empty where none are kept (the trackers came with the resume)."""
        check_file(self.run / TRACKERS, SettingsError)
        try:
            kept = json.loads((self.run / TRACKERS).read_text(encoding="utf-8"))
            return {str(name): str(value) for name, value in kept.items() if value}
        except (OSError, ValueError, AttributeError):
            return {}


def sample_rows(step: int, rows: Iterable[Mapping[str, Any]], count: int) -> list[list[Any]]:
    """`count` rows of each kind, drawn by step and kind, as cells of `COLUMNS`; long texts keep their beginning and their end."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(str(row["kind"]), []).append(row)
    chosen = []
    for kind, own in by_kind.items():
        chosen += keyed_random("tracker", step, kind).sample(own, min(count, len(own)))
    return [[_short(row[name]) for name in COLUMNS] for row in chosen]


def _short(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= MOST_CHARACTERS:
        return value
    half = MOST_CHARACTERS // 2
    return f"{value[:half]}\n[... {len(value) - 2 * half:,} characters ...]\n{value[-half:]}"


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
