"""Who writes a run's checkpoints: at once, or in a thread from a copy while the next step goes on (`train.checkpoint_in_background`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zppo.config.settings import TrainSettings
from zppo.distributed.parallel import ReplicatedWeights
from zppo.models.student_model import Student
from zppo.runs import checkpoint
from zppo.runs.checkpoint import HoldsState
from zppo.runs.files import writing
from zppo.train.mid_step import MidStep


class Checkpointer:
    """Writes checkpoints of the current weights.

    In the background the file operations are those of the foreground, from a copy in the processor's memory of weights and optimizer; so
    a kill at any moment leaves whole checkpoints alone, with the same bytes. One is written at a time. Copies are made of plain
    tensors in one process: adapters, sharded weights, 8-bit optimizers and several processes are written in the foreground.

    Attributes:
        good: the last step after which the weights were good (`CollapseWatch.good`): where accuracy has fallen since, its checkpoint, or
            the newest one before it, is kept besides the newest ones.
    """

    def __init__(
        self,
        settings: TrainSettings,
        run: Path,
        student: Student,
        optimizer: HoldsState,
        origin: Mapping[str, Any],
        weights: ReplicatedWeights,
    ) -> None:
        self._run, self._student, self._optimizer, self._origin = run, student, optimizer, origin
        self._weights, self._keep = weights, settings.keep_checkpoints
        self._copies = (
            settings.checkpoint_in_background and weights.processes.size == 1 and not student.adapters and settings.optimizer == "adamw"
        )
        self.good = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __call__(
        self, step: int, state: Mapping[str, Any], mid_step: MidStep | None, *, together: bool = True, later: bool = False
    ) -> Path | None:
        """After `step` whole steps, and the updates of `mid_step` in the next one where it is given.

        Args:
            together: all processes of the run call it now; otherwise the first one saves what it has, None where it has not all.
            later: it may be written in the background; `wait` or the next call says how that went.

        Raises:
            StorageError: the disk refuses, now or since the last call.
        """
        self.wait()
        processes = self._weights.processes
        if not together and (self._weights.sharded or not processes.main):
            return None
        updates = mid_step.partial.done if mid_step else None
        state = {**state, "origin": self._origin}
        good = self.good if self.good < step - 1 else None
        if later and self._copies:
            model, optimizer = CopiedModel(self._student.model), CopiedState(self._optimizer)
            self._begin(partial(checkpoint.save, self._run, step, model, optimizer, state, keep=self._keep, good=good))
            return checkpoint.place(self._run, step)
        saving = partial(checkpoint.saving, self._run, step, state, keep=self._keep, updates=updates, good=good)
        with saving() if processes.main else nullcontext() as own:
            folder = processes.gather(own)[0] if together else own
            assert folder is not None
            with writing(checkpoint.place(self._run, step, updates)):
                if together:
                    self._weights.write(folder, self._student, self._optimizer)
                else:
                    checkpoint.write_whole_state(folder, self._student.saved, self._optimizer)
            if mid_step and processes.main:
                mid_step.write(folder)
        if together:
            processes.wait()  # until it counts
        return checkpoint.place(self._run, step, updates)

    def back_to_good(self) -> Path | None:
        """Set aside the checkpoints after `good`, so that a resume goes on from the one before them; None where there is none.

        All processes call it.

        Raises:
            StorageError: the disk refuses.
        """
        self.wait()
        kept = checkpoint.up_to(self._run, self.good)
        if self._weights.processes.main:
            for path in checkpoint.existing(self._run):
                if path not in kept:
                    checkpoint.set_aside(path, checkpoint.COLLAPSED)
        return kept[-1] if kept else None

    def check(self) -> None:
        """Raises what writing in the background has raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until what is being written is on the disk; raises what that has raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _begin(self, write: Callable[[], object]) -> None:
        def work() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")  # no daemon: the process ends when it is written
        self._thread.start()


class CopiedModel:
    """A model as it was: it can be trained on while this is written."""

    def __init__(self, model: Any) -> None:
        self._model, held = model, dict[int, torch.Tensor]()
        for tensor in model.state_dict().values():
            if tensor.data_ptr() not in held:  # tied weights stay one tensor
                held[tensor.data_ptr()] = tensor.detach().to("cpu", copy=True)
        self._state = {name: held[tensor.data_ptr()] for name, tensor in model.state_dict().items()}

    def save_pretrained(self, folder: Path, /) -> None:
        self._model.save_pretrained(folder, state_dict=self._state)


class CopiedState:
    """An optimizer's state as it was."""

    def __init__(self, optimizer: HoldsState) -> None:
        self._state = _copied(optimizer.state_dict())

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._state
        return state


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value
