"""How much memory this machine has for a run, and how much of it is free now: that of its GPU, else its RAM. No torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits")
_PATIENCE = 20.0  # seconds; the first call on an idle machine starts the driver


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run would train.

    Attributes:
        name: of the GPU, or "RAM", with what bounds it where that is not the machine.
        gpu: whether it is one.
        total: bytes.
        free: bytes that are not in use now; None where that is not known.
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
    if device == "cpu":
        return _ram()
    if gpu := _gpu():
        return gpu
    ram = _ram()
    return ram and replace(ram, name=f"{ram.name}, as no GPU was found")


def gpu_of(gigabytes: float) -> Machine:
    """A GPU that is not here, with so much memory (1 GB is 10^9 bytes), all of it free."""
    return Machine(f"a GPU of {gigabytes:g} GB", True, int(gigabytes * 10**9))


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


def _ram(root: Path = Path("/")) -> Machine | None:
    """What is there and what is available now, under the limits of the process's control groups.

    Args:
        root: where `proc` and `sys` are looked for.
    """
    try:
        memory = psutil.virtual_memory()
    except (OSError, NotImplementedError, RuntimeError):  # a system that does not tell
        return None
    total, free, name = int(memory.total), int(memory.available), "RAM"
    for limit, used in _control_groups(root):
        if limit < total:
            total, name = limit, "RAM, as much as the control group may have"
        free = min(free, max(0, limit - used))
    return Machine(name, False, total, free)


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is used of it) of the groups that the process is in, of both versions; file pages that can be dropped are not used."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            second = not kinds
            if not second and "memory" not in kinds.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("" if second else "memory")
            names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            inside = top / path.strip("/")
            for folder in (inside, *(above for above in inside.parents if above.is_relative_to(top))):
                with suppress(OSError, ValueError):  # not there in a container that sees its own group as the top; or "max"
                    limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
                    yield limit, used - _droppable(folder)


def _droppable(folder: Path) -> int:
    """Bytes of file pages that were not used lately."""
    with suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        facts = dict(line.split(" ", 1) for line in lines if " " in line)
        return int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))
    return 0
