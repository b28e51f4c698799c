"""What the machine that this runs on has for a run: the memory of its GPU, else its RAM. No torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import Literal

GIB = 1024**3
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits")
_PATIENCE = 20.0  # seconds; the first call on an idle machine starts the driver


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run would train.

    Attributes:
        name: of the GPU, or "RAM".
        gpu: whether it is one.
        total: bytes.
        free: bytes that nobody holds now; None where that is not known.
    """

    name: str
    gpu: bool
    total: int
    free: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that a run which starts now can have."""
        return self.total if self.free is None else self.free


def find_machine(device: Literal["auto", "cpu"]) -> Machine | None:
    """The first GPU that a run would see; the RAM where there is none, or the recipe leaves it alone; None where nothing is known."""
    return (None if device == "cpu" else _gpu()) or _ram()


def _gpu() -> Machine | None:
    """By `nvidia-smi`; None without it, without a GPU, or where CUDA_VISIBLE_DEVICES hides them all."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and chosen.split(",")[0].strip() in ("", "-1"):
        return None
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return _pick(answer.stdout, (chosen or "").split(",")[0].strip())


def _pick(table: str, chosen: str) -> Machine | None:
    """The GPU of this index or UUID (or its beginning) in the answer of `nvidia-smi`; the first one where none is chosen.

    Lines that do not hold all numbers are passed over: a GPU cut into MIG slices says "[N/A]".
    """
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 5 or not all(field.isdigit() for field in (fields[0], *fields[3:])):
            continue
        index, uuid, name, total, free = fields
        if not chosen or chosen == index or (not chosen.isdigit() and uuid.startswith(chosen)):
            return Machine(name, True, int(total) * 1024**2, int(free) * 1024**2)
    return None


def _ram() -> Machine | None:
    try:
        return Machine("RAM", False, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):  # no such names on this system
        return None
