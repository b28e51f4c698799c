"""Invented run folders for the tests of `zppo.report`, and ways to change what stands in them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zppo.runs.log import ROLLOUT_SCHEMA


def _maker() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "make_run.py"
    spec = importlib.util.spec_from_file_location("make_run", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_run"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


def invented_run(folder: Path, **shape: Any) -> Path:
    """A small run with everything in it: evictions, graduations, BCQ, NCQ, answers of all classes."""
    return MAKER.make_run(folder, MAKER.Shape(**{"steps": 8, "batch": 16, "capacity": 24, "characters": 200, "gain": 4.0, **shape}))


def files_of(run: Path) -> list[Path]:
    return sorted((run / "rollouts").glob("step-*.parquet"))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """All rows of all rollout files, read the plain way."""
    return [row for path in files_of(run) for row in pq.read_table(path).to_pylist()]


def evaluated(run: Path) -> Path:
    """An evaluation's completions beside a run: the plain ones of its first step, under the same ids."""
    (run / "held_out").mkdir()
    target = run / "held_out" / "eval-000000.parquet"
    rows = [row for row in pq.read_table(files_of(run)[0]).to_pylist() if row["kind"] == "plain"]
    pq.write_table(pa.Table.from_pylist([{**row, "step": 0, "advantage": None} for row in rows], schema=ROLLOUT_SCHEMA), target)
    return run


def change_rows(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **options: Any) -> None:
    """Write a rollout file anew with every row changed."""
    rows = [change(row) for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA), path, **options)
