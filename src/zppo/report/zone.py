"""What became of the questions in the prompt replay buffer, from buffer.jsonl (Figs. 4, 5b, 20, 21, 23, 24)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def bin_count(group_size: int, threshold: float) -> int:
    """How many entry bins there are: accuracies k / group_size below the threshold."""
    return sum(k / group_size < threshold for k in range(group_size))


def bin_of(accuracy: float, group_size: int, bins: int) -> int:
    """The entry bin of an accuracy. Groups with ungraded rollouts have other denominators: they go to the bin below [zppo]."""
    return min(bins - 1, max(0, math.floor(accuracy * group_size + 1e-6)))


def bin_name(index: int, group_size: int) -> str:
    """1 of 8 -> "12.5%"."""
    return f"{index / group_size:.1%}".replace(".0%", "%")


@dataclass(frozen=True, slots=True)
class ZoneStory:
    """The buffer's story by entry bin.

    Attributes:
        names: of the bins, by accuracy at admission.
        steps: (T,) the steps 1 .. T.
        admitted, graduated, evicted: (bins, T) how many in each step.
        visits: visits -> (graduated, evicted) among those that left.
        waits: per bin, the steps from admission to graduation of each graduate.
    """

    names: tuple[str, ...]
    steps: Any
    admitted: Any
    graduated: Any
    evicted: Any
    visits: dict[int, tuple[int, int]] = field(default_factory=dict)
    waits: tuple[tuple[int, ...], ...] = ()

    @property
    def occupancy(self) -> Any:
        """(bins, T) entries in the buffer after each step."""
        return np.cumsum(self.admitted - self.graduated - self.evicted, axis=1)

    @property
    def graduated_share(self) -> Any:
        """(bins, T) graduated so far / admitted so far; NaN before the first admission."""
        admitted = np.cumsum(self.admitted, axis=1)
        with np.errstate(invalid="ignore"):
            return np.where(admitted > 0, np.cumsum(self.graduated, axis=1) / np.maximum(admitted, 1), np.nan)

    def totals(self) -> list[tuple[str, int, int, int]]:
        """(bin, admitted, graduated, evicted) over the whole run, and the row "all"."""
        sums = [part.sum(axis=1) for part in (self.admitted, self.graduated, self.evicted)]
        rows = [(name, *(int(s[i]) for s in sums)) for i, name in enumerate(self.names)]
        return [*rows, ("all", *(int(s.sum()) for s in sums))]  # type: ignore[list-item]


def zone_story(events: Iterable[Mapping[str, Any]], group_size: int, threshold: float, last_step: int) -> ZoneStory:
    """The story that the lines of buffer.jsonl tell up to `last_step`; later lines (of a step that is being written) wait."""
    bins = bin_count(group_size, threshold)
    counts = {name: np.zeros((bins, last_step), dtype=np.int64) for name in ("admitted", "graduated", "evicted")}
    visits: dict[int, tuple[int, int]] = {}
    waits: list[list[int]] = [[] for _ in range(bins)]
    for event in events:
        if event["step"] > last_step:
            continue
        index = bin_of(event["entry_accuracy"], group_size, bins)
        counts[event["event"]][index, event["step"] - 1] += 1
        if event["event"] != "admitted":
            graduated, evicted = visits.get(event["visits"], (0, 0))
            out = event["event"] == "graduated"
            visits[event["visits"]] = (graduated + out, evicted + (not out))
        if event["event"] == "graduated":
            waits[index].append(event["step"] - event["entry_step"])
    return ZoneStory(
        names=tuple(bin_name(i, group_size) for i in range(bins)),
        steps=np.arange(1, last_step + 1),
        **counts,
        visits=dict(sorted(visits.items())),
        waits=tuple(map(tuple, waits)),
    )


def median(values: Iterable[float]) -> float:
    """The median, NaN of nothing."""
    data = list(values)
    return float(np.median(data)) if data else math.nan
