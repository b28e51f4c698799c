"""How a run goes on after an end that came too early: the checkpoint to start from, the state to save, the words to leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from zppo.config.settings import Settings
from zppo.core.replay import PromptReplayBuffer
from zppo.errors import CheckpointError, DataError, EngineError, Interrupted, StorageError
from zppo.images.store import read_bytes
from zppo.runs import checkpoint
from zppo.runs.display import warn
from zppo.runs.files import RECIPE
from zppo.train.assemble import Assembled
from zppo.train.halfway import Halfway, as_placed
from zppo.train.origin import changes_since, check_student
from zppo.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Start:
    """A checkpoint to continue from."""

    folder: Path
    state: dict[str, Any]

    @classmethod
    def find(cls, settings: Settings, run: Path, console: Console) -> Start | None:
        """The newest checkpoint that is whole, None where none was written yet; damaged newer ones are named and set aside.

        Raises:
            CheckpointError: all are damaged, or the newest whole one is of another student. Nothing was changed then.
            StorageError: a damaged one cannot be renamed.
        """
        folder, damaged = checkpoint.newest_good(run)
        if folder is None:
            return None
        state = checkpoint.load_state(folder)
        check_student(state, settings.student, folder)
        for path, problem in damaged.items():
            aside = checkpoint.set_aside(path)
            warn(
                console,
                f"{path} is damaged: {problem}. It is called {aside.name} from now on, and {folder.name} is used",
            )
        return cls(folder, state)

    def load(self, parts: Assembled, console: Console) -> None:
        """Give the trainer its state, after a look at what has changed since; images are those of the questions as they were read now.

        Raises:
            CheckpointError: it belongs to another recipe, holds something else than a state, or an image of its questions is gone or
                has changed.
        """
        places = {image.sha256: image.uri for q in parts.trainer.questions for image in q.images}
        halfway = Halfway.read(self.folder, places)
        try:
            notes = changes_since(self.state["origin"], parts.origin, self.folder, halfway=halfway is not None)
            for question, *_ in self.state["buffer"]["entries"]:
                question["images"] = as_placed(question["images"], places)
            parts.trainer.load(self.folder, self.state, halfway)
            self._check_images(parts.trainer.buffer, halfway)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(checkpoint.unusable(self.folder / "state.json", error)) from error
        if notes:
            warn(console, f"since the checkpoint: {'; '.join(notes)}. The rest of the run goes by what is there now")

    def _check_images(self, buffer: PromptReplayBuffer, halfway: Halfway | None) -> None:
        """A checkpoint holds references: the files behind them are looked at now and not when a question is replayed."""
        groups = [*halfway.collected.plain, *halfway.collected.again] if halfway else []
        questions = [*buffer.questions(), *(group.question for group in groups)]
        for image in {image.sha256: image for question in questions for image in question.images}.values():
            try:
                read_bytes(image)
            except DataError as error:
                raise CheckpointError(f"{self.folder} holds questions with images: {error}") from error


def rescue(run: Path, trainer: Trainer, error: BaseException, console: Console) -> None:
    """Save what was trained before the run ends by `error`; where that fails it is said, and the error stays what it is.

    Raises:
        StorageError: somebody wanted to stop the run, and it cannot be saved.
    """
    if isinstance(error, StorageError):
        return  # the same disk would refuse again
    say = partial(warn, console)
    try:
        together = trainer.team.size == 1 or isinstance(error, Interrupted | EngineError)  # the guard stops all of them
        trainer.rescue(together=together)
    except Exception as failed:
        if isinstance(error, KeyboardInterrupt) and isinstance(failed, StorageError):
            raise failed from error
        say(f"the run after step {trainer.done} could not be saved: {failed}")
    if not isinstance(error, KeyboardInterrupt):
        say(way_on(run))


def way_on(run: Path) -> str:
    """What is saved and how it goes on: the last words of a run that ends before its time."""
    if not (run / RECIPE).exists():
        return "the run ended before anything was written"
    if saved := checkpoint.existing(run):
        return f"the run is saved in {saved[-1]}; continue with `zppo resume {run}`"
    return f"no step was saved yet; `zppo resume {run}` starts over"
