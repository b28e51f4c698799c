"""Checkpoints of sharded weights, in parts: every process writes its own and reads its own (`torch.distributed.checkpoint`) [zppo].

Safetensors alone: DCP's usual format has a pickle in it, and a checkpoint may come from anybody.

`model/` has whole tensors, each in the file of one process, with an index: `transformers` loads it as any other model. `optimizer/` has the
shards of both moments, with their places, and `steps.json`; any number of processes puts them together again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from zppo.distributed.processes import Processes
from zppo.engines.vllm.vllm_engine import gathered
from zppo.errors import CheckpointError
from zppo.runs.checkpoint import PARTS, foreign, unusable

_STEPS = "steps.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def write_weights(folder: Path, model: PreTrainedModel, processes: Processes) -> None:
    """A model's weights, gathered one by one; each process keeps and writes about the same share of them. Every process must call it.

    Raises:
        Exception: what the disk refused, in all processes.
    """
    if processes.main:
        model.save_pretrained(folder, state_dict={})  # the configurations
    sizes, own = [0] * processes.size, dict[str, torch.Tensor]()
    for name, value in untied(model).items():
        whole = gathered(value)
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
            reader = HuggingFaceStorageReader(str(folder))
            _check_sizes(folder, moments, reader.read_metadata().state_dict_metadata)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that it reads for one process
                _told(lambda: load(moments, storage_reader=reader, no_dist=True))
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
