"""Checkpoints: model, optimizer, buffer, counters, and a step that a signal stopped. No pickled code is ever loaded."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

from zppo.errors import CheckpointError
from zppo.runs.files import MANIFEST, PARTIAL, fault, make_manifest, sync, writing

CHECKPOINTS = "checkpoints"
_MODEL, _OPTIMIZER, PARTS, STATE = "model", "optimizer.pt", "optimizer", "state.json"
DAMAGED, COLLAPSED = ".damaged", ".collapsed"
_NAME = re.compile(r"step-(\d+)(?:\+(\d+))?")


class Savable(Protocol):
    """A model, or what of it is trained."""

    def save_pretrained(self, folder: Path, /) -> None:
        """Write it into a folder."""
        ...


class HoldsState(Protocol):
    """An optimizer, as far as it is saved."""

    def state_dict(self) -> dict[str, Any]:
        """Its whole state, whatever way it lies over several processes."""
        ...


class TakesState(Protocol):
    """An optimizer, as far as it is loaded."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """By parameter."""
        ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters, under `params`."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Undoes `HoldsState.state_dict`."""
        ...


@contextmanager
def saving(
    run: Path, step: int, state: Mapping[str, Any], *, keep: int, updates: int | None = None, good: int | None = None
) -> Iterator[Path]:
    """The folder to write model and optimizer into: a checkpoint where nothing fails inside, and nothing at all otherwise.

    `model/` in it loads with `transformers` (or with `peft`, where adapters are trained); weights are stored in fp32, as they are
    trained. It is named step-NNNNNN after the last
    whole step, or step-NNNNNN+K where `updates` = K optimizer steps of the next one are in the weights too. Afterwards all but the newest
    `keep` are removed, and the newest one of no later than step `good`.

    Args:
        state: JSON-ready; `load_state` gives it back.

    Raises:
        StorageError: the disk refuses; older checkpoints are as they were.
    """
    target = place(run, step, updates)
    partial = target.with_name(target.name + PARTIAL)
    with writing(target):
        try:
            _remove_partial(run)
            partial.mkdir(parents=True)
            yield partial
            (partial / STATE).write_text(json.dumps({"step": step, "updates": updates, **state}), encoding="utf-8")
            (partial / MANIFEST).write_text(make_manifest(partial), encoding="utf-8")
            for path in (*partial.rglob("*"), partial):
                sync(path)
            if target.exists():
                target.rename(target.with_name(f"{target.name}.old{PARTIAL}"))
            partial.rename(target)
            sync(target.parent)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # where the disk is full, the space is needed
            raise
        kept = [] if good is None else up_to(run, good)[-1:]
        for old in [path for path in existing(run)[:-keep] if path not in kept]:
            old.rename(old.with_name(old.name + PARTIAL))  # a kill amid the removal leaves nothing that looks whole
        _remove_partial(run)


def save(
    run: Path,
    step: int,
    model: Savable,
    optimizer: HoldsState,
    state: Mapping[str, Any],
    *,
    keep: int,
    updates: int | None = None,
    good: int | None = None,
) -> Path:
    """Write a checkpoint of a model and an optimizer that are whole in this process; see `saving`."""
    with saving(run, step, state, keep=keep, updates=updates, good=good) as folder:
        write_whole_state(folder, model, optimizer)
    return place(run, step, updates)


def write_whole_state(folder: Path, model: Savable, optimizer: HoldsState) -> None:
    """A model, and an optimizer's state in one file."""
    model.save_pretrained(folder / _MODEL)
    with open(folder / _OPTIMIZER, "wb") as file:
        torch.save(optimizer.state_dict(), file)


def in_parts(checkpoint: Path) -> bool:
    """Whether the optimizer's state was written in parts, by the processes that held them."""
    return (checkpoint / PARTS).is_dir()


def place(run: Path, step: int, updates: int | None = None) -> Path:
    """Where the checkpoint after a whole step, and so many updates of the next one, is."""
    return run / CHECKPOINTS / _name(step, updates)


def existing(run: Path) -> list[Path]:
    """Checkpoints of a run that were written to their end, oldest first."""
    found = ((_NAME.fullmatch(p.name), p) for p in (run / CHECKPOINTS).glob("step-*") if p.is_dir())
    return [path for *_, path in sorted(_place(match, path) for match, path in found if match)]


def up_to(run: Path, step: int) -> list[Path]:
    """Those of them with no update after that step, oldest first."""
    names = ((_NAME.fullmatch(path.name), path) for path in existing(run))
    return [path for match, path in names if match and int(match[1]) + (match[2] is not None) <= step]


def newest_good(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files are as they were written, None where there is none at all; and what newer ones lack.

    Nothing is changed.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(existing(run)):
        problem = fault(checkpoint, (STATE,) if in_parts(checkpoint) else (_OPTIMIZER, STATE))
        if problem is None:
            return checkpoint, damaged
        damaged[checkpoint] = problem
    if damaged:
        listing = "\n".join(f"  - {path}: {problem}" for path, problem in damaged.items())
        raise CheckpointError(
            f"no checkpoint of {run} is whole, and nothing was removed:\n{listing}\n"
            f"Put a whole one back from a copy; or move {run / CHECKPOINTS} away, and the run starts over"
        )
    return None, {}


def set_aside(checkpoint: Path, ending: str = DAMAGED) -> Path:
    """Rename a checkpoint that is not to be gone on from, so that it is not counted any more; returns its new place."""
    target, number = checkpoint.with_name(checkpoint.name + ending), 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}{ending}-{number}")
    with writing(target):
        checkpoint.rename(target)
    return target


def weights_folder(checkpoint: Path) -> Path:
    """Where the checkpoint's weights are."""
    return checkpoint / _MODEL


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, with `step` and `updates`."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it holds no step")
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(unusable(path, error)) from error


def load_optimizer(checkpoint: Path, optimizer: TakesState, trained: Sequence[torch.nn.Parameter] = (), *, mapped: bool = False) -> None:
    """Give the optimizer its moments back. Learning rates and all else of its groups stay the recipe's, which may have been edited.

    Args:
        trained: the trained parameters in the order of the model, as a checkpoint with one group for all of them has them; empty: as
            the optimizer has them.
        mapped: read no more of the file than the optimizer takes.

    Raises:
        CheckpointError: the file is no state of an optimizer, or of one over other weights.
    """
    path = checkpoint / _OPTIMIZER
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(unusable(path, error)) from error
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(_in_groups(state, optimizer, trained))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(foreign(path, str(error))) from error
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments and moments[name].shape != parameter.shape:
                    raise CheckpointError(
                        foreign(path, f"a moment of shape {tuple(moments[name].shape)} for weights of {tuple(parameter.shape)}")
                    )


def _in_groups(state: dict[str, Any], optimizer: TakesState, trained: Sequence[torch.nn.Parameter]) -> dict[str, Any]:
    """A state whose parameters stand in one group, as they stand in the optimizer's groups."""
    groups = optimizer.param_groups
    if len(state["param_groups"]) != 1 or len(groups) == 1:
        return state
    (saved,) = state["param_groups"]
    parameters = [p for group in groups for p in group["params"]]
    place = {id(p): saved["params"][i] for i, p in enumerate(trained or parameters)}
    if len(saved["params"]) != len(parameters):
        raise ValueError(f"it is over {len(saved['params'])} weights, and {len(parameters)} are trained")
    moments = {i: state["state"][place[id(p)]] for i, p in enumerate(parameters) if place[id(p)] in state["state"]}
    ends = list(accumulate(len(group["params"]) for group in groups))
    numbered = [list(range(end - len(group["params"]), end)) for group, end in zip(groups, ends, strict=True)]
    return {"state": moments, "param_groups": [{**saved, "params": numbers} for numbers in numbered]}


def unusable(path: Path, error: Exception) -> str:
    """The words for a file of a checkpoint that is as it was written, and yet cannot be used."""
    return (
        f"{path} cannot be used: {error}. It is as it was written, so another version or another program wrote it. "
        f"Move the folder {path.parent} away, and the checkpoint before it is used"
    )


def foreign(path: Path, reason: str) -> str:
    """The words for a file of a checkpoint that belongs to another recipe."""
    return (
        f"{path} does not fit the student of this run: {reason}. The checkpoint comes from another recipe; move the folder {path.parent} "
        "away, and the checkpoint before it is used"
    )


def _name(step: int, updates: int | None) -> str:
    return f"step-{step:06d}" + ("" if updates is None else f"+{updates}")


def _place(match: re.Match[str], path: Path) -> tuple[int, int, Path]:
    """Sorts checkpoints by age: a whole step comes before the updates of the next one."""
    return int(match[1]), -1 if match[2] is None else int(match[2]), path


def _remove_partial(run: Path) -> None:
    """Remove what was not written to its end, or is on its way out."""
    for path in (run / CHECKPOINTS).glob(f"step-*{PARTIAL}"):
        shutil.rmtree(path)
