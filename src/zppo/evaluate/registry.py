"""The registry: one row per benchmark of the paper, and how rows are looked up."""

from __future__ import annotations

from collections.abc import Iterable

from zppo.errors import SettingsError
from zppo.evaluate.benchmark import Benchmark, Family
from zppo.evaluate.table_language import LANGUAGE
from zppo.evaluate.table_video import VIDEO
from zppo.evaluate.table_vision import VISION

FAMILIES: tuple[Family, ...] = ("vlm", "llm", "video")
PAPER = "paper"

BENCHMARKS: tuple[Benchmark, ...] = (*VISION, *LANGUAGE, *VIDEO)
"""All 31, family by family, in the paper's order."""


def find(name: str) -> Benchmark:
    """The benchmark of this name, in any case. SettingsError with all names if there is none."""
    known = {benchmark.name.lower(): benchmark for benchmark in BENCHMARKS}
    if name.lower() not in known:
        raise SettingsError(
            f"there is no benchmark {name!r}; known: {', '.join(b.name for b in known.values())}, "
            f"and the suites {', '.join((PAPER, *FAMILIES))}"
        )
    return known[name.lower()]


def suite(names: str | Iterable[str]) -> tuple[Benchmark, ...]:
    """The benchmarks of a suite, each once, in the registry's order.

    Args:
        names: names of benchmarks, a family (`vlm`, `llm`, `video`) or `paper` for all; a text may join several with commas.

    Raises:
        SettingsError: a name that is none of these, or no name at all.
    """
    parts = names.split(",") if isinstance(names, str) else list(names)
    chosen: set[str] = set()
    for part in (part.strip() for part in parts):
        if part.lower() == PAPER:
            chosen |= {benchmark.name for benchmark in BENCHMARKS}
        elif part.lower() in FAMILIES:
            chosen |= {benchmark.name for benchmark in BENCHMARKS if benchmark.family == part.lower()}
        elif part:
            chosen.add(find(part).name)
    if not chosen:
        raise SettingsError(f"no benchmark is named; give names, {', '.join(FAMILIES)} or {PAPER}")
    return tuple(benchmark for benchmark in BENCHMARKS if benchmark.name in chosen)
