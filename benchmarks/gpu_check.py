"""One command for a machine with a GPU: does everything do there what it does on a CPU, and how fast?

    make gpu-check                             in an environment with vLLM and the kernels, which it makes
    python -m benchmarks.gpu_check             in an environment that is there already; vLLM where it can be imported
    python -m benchmarks.gpu_check --cpu       the same in tiny on a CPU: shows that this program works, no more

Its parts (`benchmarks/gpu_parts.py`) are processes of their own, so that one that fails, hangs or runs out of memory costs no other. What
does not fit into the minutes that are left is left out and named. A table, a dated JSON file in benchmarks/results/, exit code 0 where
everything held, 1 where something did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import ROOT, machine, version
from benchmarks.gpu_parts import PARTS, Check, Part

MINUTES = 12.0
PATIENCE = 3  # times what a part takes on a card of today: one that hangs costs no other its minutes
PACKAGES = ("zppo", "torch", "transformers", "accelerate", "vllm", "flash-linear-attention", "causal-conv1d", "liger-kernel")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON file goes")
    parser.add_argument("--cpu", action="store_true", help="tiny, on a CPU: shows that this program works, no more")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts together (default: {MINUTES:g})")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which, with commas (default: all, {','.join(PARTS)})")
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)  # a child: one part, in this process
    given = parser.parse_args(argv)
    names = given.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available() and not given.cpu:
        print(
            "no GPU: torch.cuda.is_available() is False, so there is nothing to check. On a machine with one, install a torch build for "
            "it (https://pytorch.org/get-started/locally/) and look at `nvidia-smi`",
            file=sys.stderr,
        )
        return 2
    if given.to is not None:
        with tempfile.TemporaryDirectory() as folder:
            do(PARTS[names[0]], Path(folder), given.to, cpu=given.cpu)
        return 0
    began = time.perf_counter()
    checks, left_out = [], []
    for name in names:
        left = given.minutes * 60 - (time.perf_counter() - began)
        if left < PARTS[name].least and not given.cpu:
            left_out.append(f"{name}: {left:.0f} s of {given.minutes:g} min were left, it takes {PARTS[name].least} s at least")
            continue
        checks += list(part_in_child(name, left if given.cpu else min(left, PATIENCE * PARTS[name].least), cpu=given.cpu))
    device = f"CPU, {machine()}" if given.cpu else torch.cuda.get_device_name()
    show(device, checks, left_out)
    save(given.results, device, checks, left_out, time.perf_counter() - began)
    return 0 if all(check.passed for check in checks) else 1


def do(part: Part, folder: Path, to: Path, *, cpu: bool) -> None:
    """One part; every check is on the disk as soon as it is made, so that what comes after it cannot lose it."""
    with open(to, "a", encoding="utf-8") as file:
        for check in part.run(folder, cpu):
            file.write(json.dumps(asdict(check)) + "\n")
            file.flush()


def part_in_child(name: str, seconds: float, *, cpu: bool) -> Iterator[Check]:
    """What a part finds, in a process of its own that has so many seconds."""
    began = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--parts", name, "--to", str(found), *["--cpu"] * cpu]
        # A missing kernel is a line of the table, and no reason to measure nothing.
        env = {**os.environ, "ZPPO_SLOW_KERNELS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with open(Path(folder) / "said", "w+b") as said:
            child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                how = f"exit code {child.wait(seconds)}"
            except subprocess.TimeoutExpired:
                how = f"stopped after {seconds:.0f} s"
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it has left behind
            child.wait()
            said.seek(0)
            words = " ".join(said.read().decode("utf-8", "replace").split())[-400:]
        for line in found.read_text(encoding="utf-8").splitlines() if found.exists() else ():
            yield Check(**json.loads(line))
    if how != "exit code 0":
        yield Check(name, "finished", f"{how}: ...{words}", "exit code 0", False)
    yield Check(name, "seconds of this part (information)", round(time.perf_counter() - began, 1), "-", True)


def show(device: str, checks: Sequence[Check], left_out: Sequence[str]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"gpu-check on {device}")
    for name in ("part", "what", "value", "bound", ""):
        table.add_column(name, overflow="fold")
    for check in checks:
        value = f"{check.value:.3g}" if isinstance(check.value, float) else str(check.value)
        table.add_row(check.part, check.what, value, check.bound, "ok" if check.passed else "FAILED")
    console = Console(width=140)
    console.print(table)
    for words in left_out:
        console.print(f"left out: {words}", highlight=False)


def save(folder: Path, device: str, checks: Sequence[Check], left_out: Sequence[str], seconds: float) -> None:
    """The dated result."""
    day = time.strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "date": day,
        "device": device,
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": round(seconds, 1),
        "left_out": list(left_out),
        "checks": [asdict(check) for check in checks],
    }
    path = folder / f"gpu-check-{day}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
