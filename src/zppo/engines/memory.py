"""When a device has no room: how that is recognised, and how what a failed attempt held is let go."""

from __future__ import annotations

import gc

import torch

from zppo.errors import ZPPOError

# What torch and the libraries below it say; only some of it comes as `torch.OutOfMemoryError`.
_SAID = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, so that the same work in smaller parts may succeed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and not isinstance(error, ZPPOError) and any(s in str(error) for s in _SAID)


def release() -> None:
    """Lets go of what a failed attempt held; to be called outside of the `except` block, which holds its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
