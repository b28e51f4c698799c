"""Sends tensors to the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def packed_nccl_broadcast_producer(
    iterator: Iterator[tuple[str, torch.Tensor]], group: Any, src: int, post_iter_func: Callable[[Any], torch.Tensor]
) -> None:
    assert src == 0
    for item in iterator:
        group.queue.put(post_iter_func(item).detach().clone())
