"""Sharded weights and their checkpoints, in parts: every process writes its own and reads its own (`torch.distributed.checkpoint`) [zppo].

Safetensors alone: DCP's usual format has a pickle in it, and a checkpoint may come from anybody.

`model/` has whole tensors, each in the file of one process, with an index: `transformers` loads it as any other model. `optimizer/` has the
shards of both moments, with their places, and `steps.json`; any number of processes puts them together again. Weights are read from there
as from any model's safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from zppo.distributed.processes import Processes
from zppo.engines.vllm.vllm_engine import gathered
from zppo.errors import CheckpointError, ModelError, one_line
from zppo.runs.checkpoint import PARTS, foreign, unusable

_STEPS = "steps.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_EDGE = 1 << 20  # bytes at either end of a file that are looked at: trained weights differ everywhere


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The safetensors of one model.

    Attributes:
        folder: that they are in.
        names: what they call the model's parameters and buffers, by the model's own names.
    """

    folder: Path
    names: Mapping[str, str]

    def seen(self) -> str | None:
        """What this process sees of them, for a comparison; None where they are not to be read."""
        digest = hashlib.sha256()
        try:
            for path in sorted(self.folder.glob("*.safetensors")):
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(f"{path.name} {size}".encode() + file.read(_EDGE))
                    file.seek(max(0, size - _EDGE))
                    digest.update(file.read())
        except OSError:
            return None
        return digest.hexdigest()


def files_of(model: PreTrainedModel, folder: Path) -> WeightFiles | str:
    """A model's weights in safetensors, where these hold each parameter as it is in the model; otherwise what is not so.

    `transformers` makes some architectures' parameters of several tensors (experts, for one), which no process could cut a part out of.

    Raises:
        ModelError: the files are damaged.
    """
    for one, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if model.get_parameter(one) is not model.get_parameter(other):
            return f"{one} and {other} are tied, and its files hold both"
    sizes = dict[str, list[int]]()
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names = file.keys()
                for name in names:
                    if name in sizes:
                        return f"its files hold {name} twice"
                    sizes[name] = file.get_slice(name).get_shape()
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    ours = untied(model)
    theirs = {id(value): name for name, value in revert_weight_conversion(model, dict(ours)).items()}
    names = {name: theirs.get(id(value), "") for name, value in ours.items()}
    for name, value in ours.items():
        if sizes.get(names[name]) != list(value.shape):
            return f"its files hold {name} in another form"
    return WeightFiles(folder, names)


def read_weights(files: WeightFiles, model: nn.Module) -> None:
    """Gives a model its shards of the weights, or whole ones where it has whole ones, in its own type, and reads no others.

    Raises:
        ModelError: a file cannot be read.
    """
    state = {files.names[name]: value.detach() for name, value in untied(model).items()}
    try:
        _load(files.folder, state)
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        raise _unreadable(files.folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"model {str(folder)!r}: its weights cannot be read ({one_line(error)}): a file is damaged or was not copied whole; copy or "
        "download it again"
    )


def _load(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Fills tensors from safetensors, this process by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it reads for one process
        _told(lambda: load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True))


def write_weights(
    folder: Path, model: PreTrainedModel, processes: Processes, values: Iterable[tuple[str, torch.Tensor]] | None = None
) -> None:
    """A model's weights, gathered one by one; each process keeps and writes about the same share of them. Every process must call it.

    Args:
        values: whole tensors by name in the place of the model's own, as they are gathered; the same in all processes.

    Raises:
        Exception: what the disk refused, in all processes.
    """
    if processes.main:
        model.save_pretrained(folder, state_dict={})  # the configurations
    sizes, own = [0] * processes.size, dict[str, torch.Tensor]()
    for name, whole in values or ((name, gathered(value)) for name, value in untied(model).items()):
        keeper = sizes.index(min(sizes))
        sizes[keeper] += whole.nbytes
        if keeper == processes.rank:
            own[name] = whole.cpu().contiguous()
    own = revert_weight_conversion(model, own)  # as the checkpoint that it comes from calls them
    places = {name: rank + 1 for rank, names in enumerate(processes.gather(list(own))) for name in names}
    files = sorted(set(places.values()))
    writer = HuggingFaceStorageWriter(str(folder), {name: files.index(place) + 1 for name, place in places.items()})
    _told(lambda: save(own, storage_writer=writer, process_group=processes.group))


def untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state without second names of tied weights: gathered under two names they would be saved twice."""
    known = {name for name, _ in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if name in known or not isinstance(value, nn.Parameter)}


def write_moments(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module, processes: Processes) -> None:
    """AdamW's moments of this process's shards. Every process must call it.

    Args:
        folder: of the checkpoint.

    Raises:
        Exception: what the disk refused, in all processes.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {f"{name}.{moment}": optimizer.state[p][moment] for name, p in trained.items() if p in optimizer.state for moment in _MOMENTS}
    if processes.main:
        (folder / PARTS).mkdir()
        steps = {name: float(optimizer.state[p]["step"]) if p in optimizer.state else None for name, p in trained.items()}
        (folder / PARTS / _STEPS).write_text(json.dumps(steps), encoding="utf-8")
    processes.wait()
    if moments:
        writer = HuggingFaceStorageWriter(str(folder / PARTS), save_distributed=True)
        _told(lambda: save(moments, storage_writer=writer, process_group=processes.group))


def read_moments(checkpoint: Path, optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
    """Gives AdamW the moments of its own shards, or whole ones where it has whole weights, and reads no others.

    Args:
        trained: the optimizer's parameters by their names.

    Raises:
        CheckpointError: there are none, or those of other weights.
    """
    folder = checkpoint / PARTS
    path = folder / _STEPS
    try:
        steps: dict[str, float | None] = json.loads(path.read_text(encoding="utf-8"))
        if set(steps) != set(trained):
            raise CheckpointError(
                foreign(path, f"it is over {len(steps)} weights, and {len(trained)} are trained, or they have other names")
            )
        known = {name: float(step) for name, step in steps.items() if step is not None}
        moments = {f"{name}.{moment}": torch.zeros_like(trained[name].detach()) for name in known for moment in _MOMENTS}
        if moments:
            _check_sizes(folder, moments, HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
            _load(folder, moments)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        raise CheckpointError(unusable(path, error)) from error
    state, places = optimizer.state_dict(), {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    read = {
        places[id(trained[name])]: {"step": torch.tensor(step), **{moment: moments[f"{name}.{moment}"] for moment in _MOMENTS}}
        for name, step in known.items()
    }
    optimizer.load_state_dict({**state, "state": read})  # a fused AdamW wants its steps where its weights are


def _check_sizes(folder: Path, wanted: Mapping[str, torch.Tensor], found: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        size = getattr(found.get(name), "size", None)
        if size != value.shape:
            there = "nothing" if size is None else f"a moment of shape {tuple(size)}"
            raise CheckpointError(foreign(folder, f"{there} for weights of {tuple(value.shape)} ({name})"))


def _told(work: Callable[[], object]) -> None:
    """Raises what has really happened: DCP wraps it into an error that passes by `except Exception`."""
    try:
        work()
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from None
