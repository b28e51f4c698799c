"""Every random draw is keyed by what it is for, never by order of arrival, rank or batch shape (method.md section 3)."""

from __future__ import annotations

import hashlib
import random

Part = str | int


def draw_key(*parts: Part) -> int:
    """A 63-bit key from the parts, e.g. (seed, step, question id, kind, index); equal parts give equal keys on every machine."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def keyed_random(*parts: Part) -> random.Random:
    """A generator of its own for one draw."""
    return random.Random(draw_key(*parts))
