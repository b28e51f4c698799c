"""What preprocessing made of the pictures of a step, so that it is done once for all who look at them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Pixels = Mapping[str, "torch.Tensor"]
"""What a model takes for one picture: pixel values, and whatever its architecture wants beside them."""

Key = tuple[str, str]
"""Digest of a picture, and what was done to it (processor and limits)."""


class PixelCache:
    """Preprocessed pictures by digest and processor, within a bound of memory; the least recently used ones leave first.

    Threads take turns.

    Args:
        most_bytes: what the tensors may take together; the last one is kept however large it is.
    """

    def __init__(self, most_bytes: int = 4 << 30) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._held: OrderedDict[Key, Pixels] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()
        self._turn = threading.Lock()

    def get(self, key: Key, make: Callable[[], Pixels]) -> Pixels:
        """What is held under a key, made where it is not."""
        with self._turn:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            made = self._held[key] = make()
            self.held_bytes += _size(made)
            while self.held_bytes > self.most_bytes and len(self._held) > 1:
                self._drop(next(iter(self._held)))
            return made

    def pin(self, digests: Collection[str]) -> None:
        """Names the pictures that `clear` leaves: those that every step looks at."""
        self._pinned = frozenset(digests)

    def clear(self) -> None:
        """Forgets everything that is not pinned: a new step begins."""
        with self._turn:
            for key in [key for key in self._held if key[0] not in self._pinned]:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        self.held_bytes -= _size(self._held.pop(key))


def _size(pixels: Pixels) -> int:
    return sum(t.numel() * t.element_size() for t in pixels.values())
