"""What every row needs: options, repetitions, and a dated result that says what it was measured with."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("zppo", "torch", "transformers", "trl", "accelerate")


@dataclass(frozen=True)
class Options:
    """How a row is run.

    Attributes:
        quick: tiny sizes and few repetitions: shows that the row works, its numbers mean nothing.
        threads: CPU threads of every process that is measured.
        repetitions: of what is compared.
        results: folder of the JSON files.
    """

    quick: bool
    threads: int
    repetitions: int
    results: Path


Row = Callable[[Options], Mapping[str, Any]]


def run(name: str, row: Row, argv: Sequence[str] | None = None) -> int:
    """The command line of one row: `python -m benchmarks.NAME [--quick] [--threads N] [--repetitions N] [--results FOLDER]`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the numbers mean nothing, and no result is kept")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of every process")
    parser.add_argument("--results", type=Path, help="folder of the result (default: benchmarks/results; with --quick nowhere)")
    parser.add_argument("--repetitions", type=int, default=7, help="of what is compared (default: 7)")
    given = parser.parse_args(argv)
    prepare_environment(given.threads)
    repetitions = 1 if given.quick else given.repetitions
    options = Options(given.quick, given.threads, repetitions, given.results or RESULTS)
    began = time.perf_counter()
    result = {**facts(options), **row(options), "took_seconds": round(time.perf_counter() - began, 1)}
    if given.results or not given.quick:
        write(options.results, name, result)
    else:
        print(json.dumps(result, indent=1))
    return 0


def prepare_environment(threads: int) -> None:
    """Before torch is imported, here and in processes that are started from here: the same threads for everybody, no network."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def facts(options: Options) -> dict[str, Any]:
    """When, where and with what."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": machine(),
        "threads": options.threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "quick": options.quick,
        "load_before": round(os.getloadavg()[0], 2),
    }


def machine() -> str:
    """Processor, cores and memory."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def version(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that was measured, with a plus where the tree had changes; None outside of a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no", "src"))
    except (OSError, subprocess.CalledProcessError):
        return None


def write(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Keeps a result as `NAME.json`; the newest one replaces the one before, git has the others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('_', '-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return path


def interleaved(repetitions: int, work: Mapping[str, Callable[[], Mapping[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Each of `work` once per repetition, in turn and every second time backwards, so that a drift of the machine meets all alike."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in work}
    for i in range(repetitions):
        for name in list(work)[:: -1 if i % 2 else 1]:
            found[name].append(dict(work[name]()))
    return found


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Per key over the repetitions."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def ratio(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], key: str) -> dict[str, float]:
    """Median of the ratios of neighbours in time, with the smallest and the largest."""
    found = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def best_of(times: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
