"""All rows, or those that are named, each in a process of its own; then the tables of docs/performance.md and docs/grading.md.

    python -m benchmarks [--quick] [--threads N] [NAME ...]

A row is a module of this folder with `measure(options)`, what was found as JSON, and `table(result)`, the same as Markdown.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks import tables
from benchmarks.common import ROOT

ROWS = (
    "same_gradients",
    "step_vs_trl",
    "real_shape",
    "training_part",
    "scaling",
    "update_savings",
    "shared_prompt",
    "decode_step",
    "packed_weights",
    "teacher_tokens",
    "teacher_ahead",
    "bookkeeping",
    "grading",
    "images",
    "profile_step",
)
ON_REQUEST = ("gpu_training",)
"""Rows that run where they are named: they need a GPU."""


def main(argv: list[str]) -> int:
    """Exit code 1 where a row failed, 2 where a name is none."""
    names = [a for a in argv if a.replace("-", "_") in (*ROWS, *ON_REQUEST)]
    options = [a for a in argv if a not in names]
    if unknown := [
        a for i, a in enumerate(options) if not a.startswith("-") and options[i - 1] not in ("--threads", "--repetitions", "--results")
    ]:
        print(f"no row of the benchmarks is called {', '.join(unknown)}; there are {', '.join((*ROWS, *ON_REQUEST))}", file=sys.stderr)
        return 2
    failed = []
    for name in names or ROWS:
        began = time.perf_counter()
        row = name.replace("-", "_")
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{row}", *options], cwd=ROOT).returncode
        print(f"{row}: {'failed' if code else 'done'} in {time.perf_counter() - began:.0f} s", flush=True)
        failed += [row] * bool(code)
    if "--quick" not in options:
        tables.main()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
