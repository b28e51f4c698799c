"""What a run takes of its machine: memory of its processes, memory and load of its GPU."""

from __future__ import annotations

import contextlib

import psutil
import torch

_GIB = float(1 << 30)


def usage() -> dict[str, float]:
    """Numbers by name, for one line of metrics.jsonl; what cannot be known here is left out.

    `memory_gib` is what the process and its workers hold, `memory_free_gib` what the machine has left. Where torch computes on a GPU:
    `gpu_memory_gib` is what all processes hold of it, `gpu_memory_free_gib` the rest, `gpu_torch_peak_gib` the most that torch held at
    once in this process, `gpu_utilisation` the share of about the last second in which the GPU computed.
    """
    values = {"memory_gib": _resident() / _GIB, "memory_free_gib": psutil.virtual_memory().available / _GIB, **_gpu()}
    return {name: round(value, 3) for name, value in values.items()}


def _resident() -> int:
    """Bytes of the process and of its workers (grading, a colocated vLLM)."""
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            total += child.memory_info().rss
    return int(total)


def _gpu() -> dict[str, float]:
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    try:
        free, total = torch.cuda.mem_get_info()
        values = {
            "gpu_memory_gib": (total - free) / _GIB,
            "gpu_memory_free_gib": free / _GIB,
            "gpu_torch_peak_gib": torch.cuda.max_memory_allocated() / _GIB,
        }
    except RuntimeError:  # a driver that does not tell
        return {}
    with contextlib.suppress(RuntimeError, ModuleNotFoundError, OSError):  # without nvidia-ml-py nobody can tell
        values["gpu_utilisation"] = torch.cuda.utilization() / 100
    return values
