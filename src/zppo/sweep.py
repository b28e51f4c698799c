"""`zppo sweep`: a recipe with some settings varied, every combination under several seeds; resumable, ends in one comparison [zppo].

A sweep is a folder: NAME.yaml (the complete recipe of one run), NAME/ (its run folder) and NAME.txt (what it printed), compare.html and
compare.csv. The same command runs what is not finished. `zppo lab study` is a use of `run_all`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from zppo.config.recipe import dump_recipe, load_recipe
from zppo.config.settings import Settings
from zppo.errors import Interrupted, SettingsError, ZPPOError
from zppo.report.bootstrap import mean_interval, paired_difference
from zppo.report.compare import compare_command, results_of
from zppo.report.read_run import Run, differing, flat_recipe, open_run
from zppo.report.summary import duration
from zppo.runs.files import write_whole
from zppo.runs.log import METRICS
from zppo.runs.signals import Stop, catch_signals

PAGE, NUMBERS = "compare.html", "compare.csv"
_TAIL = 1 << 16  # bytes; a line of metrics.jsonl is shorter
_MOST_SEEDS = 10_000  # a number too long is a slip, and a list of it would fill the memory
_OWN = ("output", "seed")  # settings that a sweep gives its runs itself


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its folder and files; unique in the sweep.
        settings: all of them, but for `output`.
        values: what is varied, by its dotted key, as it was typed.
    """

    name: str
    settings: Settings
    values: Mapping[str, str] = field(default_factory=dict)


def parse_seeds(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]. Raises SettingsError."""
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError:
        ends = []
    if sum(max(0, part[-1] - part[0] + 1) for part in ends) > _MOST_SEEDS:
        raise SettingsError(f"--seeds is {text!r}, more than {_MOST_SEEDS:,} seeds: write the range that is meant")
    seeds = [number for part in ends for number in range(part[0], part[-1] + 1)]
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"--seeds is {text!r}: write numbers and ranges, each seed once, e.g. 0-7 or 0,3,5")
    return seeds


def parse_vary(text: str) -> tuple[str, list[str]]:
    """ "train.minibatches=1,4" -> ("train.minibatches", ["1", "4"]); a comma within brackets or quotes is part of a value.

    Raises:
        SettingsError: there is no key or no value, or a value stands twice.
    """
    key, _, listed = text.removeprefix("--").partition("=")
    # A value is a run of brackets with what is in them, quotes with what is in them, and anything but a comma.
    values = [match.strip() for match in re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", listed)]
    if not key or not values or "" in values or len(set(values)) < len(values):
        raise SettingsError(f"--vary is {text!r}: write a setting and its values, each once, e.g. --vary train.minibatches=1,4,8,16")
    if key in _OWN:
        raise SettingsError(f"--vary {key}: " + ("write --seeds 0-2" if key == "seed" else "a sweep names its folders itself, below --out"))
    return key, values


def plan_sweep(recipe: Path, vary: Sequence[str], seeds: Sequence[int] | None, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """All runs of a sweep, seeds outermost, so that one that is stopped early has every combination.

    Args:
        vary: `key=value,value,...` each; the runs are all combinations.
        seeds: None for the recipe's own.
        overrides: of all runs, as `load_recipe` takes them.

    Raises:
        SettingsError: a setting does not exist or a value cannot be, told of all runs before any has begun.
    """
    grid = dict(map(parse_vary, vary))
    if len(grid) < len(vary):
        raise SettingsError(f"--vary names a setting twice ({', '.join(vary)}): give it all of its values at once")
    base = load_recipe(recipe, overrides)
    if base.output is not None:
        raise SettingsError(f"output is {base.output}, one folder for all runs of the sweep: leave it out, and name the sweep's by --out")
    short = {key: key.rpartition(".")[2] for key in grid}
    if len(set(short.values())) < len(short):
        short = {key: key for key in grid}
    runs = []
    for seed in seeds or [base.seed]:
        for combination in product(*grid.values()):
            values = dict(zip(grid, combination, strict=True))
            given = [f"--{key}={value}" for key, value in values.items()]
            parts = [f"{short[key]}={value}" for key, value in values.items()] + [f"s{seed}"]
            name = "-".join(re.sub(r"[^\w.=+]+", "-", part).strip("-") for part in parts)
            runs.append(SweepRun(name, load_recipe(recipe, [*overrides, *given, f"--seed={seed}"]), values))
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"two runs of the sweep would be called {twice[0]!r}: vary values whose letters and digits differ")
    return runs


def state_of(run: SweepRun, folder: Path) -> str:
    """ "finished", "to resume" or "to run".

    Raises:
        SettingsError: what lies in the folder under the run's name has other settings.
    """
    _check_same(run, folder)
    place = folder / run.name
    if not (place / "recipe.yaml").exists():
        return "to run"
    if open_run(place).complete:
        return "finished"
    return "to resume" if any((place / "checkpoints").glob("*")) else "to run"


def _recipe_file(run: SweepRun, folder: Path) -> Path:
    return folder / f"{run.name}.yaml"


def _check_same(run: SweepRun, folder: Path) -> None:
    path = _recipe_file(run, folder)
    if path.exists() and path.read_text(encoding="utf-8") != dump_recipe(run.settings):
        before, now = (flat_recipe(settings.model_dump(mode="json"), folder) for settings in (load_recipe(path), run.settings))
        keys = differing([before, now])
        told = "; ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in keys[:3]) or "something that changes no result"
        raise SettingsError(f"{path} is of a sweep with other settings ({told}): name another folder with --out, or remove that run")


def run_all(
    runs: Sequence[SweepRun],
    folder: Path,
    finished: Callable[[SweepRun, Path], str],
    *,
    jobs: int = 1,
    launcher: Sequence[str] = (),
    threads: int | None = None,
    console: Console | None = None,
) -> int:
    """Run what is not finished, each run in a process of its own, `jobs` at a time.

    Args:
        folder: holds the runs and their files.
        finished: called with a run that has finished and its folder; what it returns is printed.
        launcher: what stands before `zppo train`, e.g. `torchrun --nproc_per_node 8 -m`; empty: this Python.
        threads: of a run (OMP_NUM_THREADS); None leaves it to the environment, and shares the cores where several run at a time.

    Returns:
        How many failed; what they printed is in `folder`.

    Raises:
        SettingsError: the folder holds runs of the same names with other settings.
        Interrupted: a signal; the runs have saved, and the same call goes on.
    """
    console = console or Console()
    left = [run for run in runs if state_of(run, folder) != "finished"]
    folder.mkdir(parents=True, exist_ok=True)
    threads = threads or (max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None)
    failed, pool = 0, _Processes(folder, jobs, launcher, threads, console)
    with pool.bars, catch_signals(Stop()), ThreadPoolExecutor(jobs) as workers:
        futures = {workers.submit(pool.run, run): run for run in left}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                run = futures[future]
                try:
                    future.result()
                    console.print(f"{number}/{len(left)} {run.name}: {finished(run, folder / run.name)}", highlight=False, markup=False)
                except ZPPOError as error:
                    failed += 1
                    console.print(f"{number}/{len(left)} {run.name}: {error}", style="red", markup=False)
        except Interrupted:
            workers.shutdown(wait=False, cancel_futures=True)
            pool.stop()
            console.print("the runs that are under way are saved; the same command goes on", style="dim")
            raise
    return failed


class _Processes:
    """The runs of a sweep that are under way."""

    def __init__(self, folder: Path, jobs: int, launcher: Sequence[str], threads: int | None, console: Console) -> None:
        self.folder, self.launcher, self.threads = folder, [*launcher] or [sys.executable, "-m"], threads
        cards = visible_cards() if jobs > 1 else []
        self.slots: SimpleQueue[str] = SimpleQueue()  # a slot is the card of its run, "" where it may see all
        for index in range(jobs):
            self.slots.put(cards[index % len(cards)] if len(cards) > 1 else "")
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
        )
        self.bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.children: set[subprocess.Popen[bytes]] = set()
        self.stopping, self.lock = False, threading.Lock()

    def run(self, run: SweepRun) -> None:
        """Train one run to its end, or resume it. Raises ZPPOError where it failed."""
        place, output, slot = self.folder / run.name, self.folder / f"{run.name}.txt", self.slots.get()
        bar = self.bars.add_task(run.name, total=run.settings.train.steps)
        try:
            again = state_of(run, self.folder) == "to resume"
            if not again:  # what a run left that had no checkpoint yet is nothing
                shutil.rmtree(place, ignore_errors=True)
                write_whole(_recipe_file(run, self.folder), dump_recipe(run.settings))
            asked = ["resume", str(place)] if again else ["train", str(_recipe_file(run, self.folder)), f"--output={place}"]
            command = [*self.launcher, "zppo", *asked]
            with open(output, "ab" if again else "wb") as file:
                status = self._wait(command, file.fileno(), slot, lambda: self.bars.update(bar, completed=_last_step(place)))
        finally:
            self.bars.remove_task(bar)
            self.slots.put(slot)
        if status:
            raise ZPPOError(f"`{shlex.join(command[1:])}` ended with {status}; what it printed is in {output}")

    def _wait(self, command: Sequence[str], output: int, slot: str, look: Callable[[], None]) -> int:
        env = dict(os.environ)
        if self.threads:
            env["OMP_NUM_THREADS"] = str(self.threads)
        if slot:
            env["CUDA_VISIBLE_DEVICES"] = slot
        with self.lock:
            if self.stopping:
                raise ZPPOError("stopped before it began")
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env)
            self.children.add(child)
        while True:
            try:
                status = child.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                look()
        with self.lock:
            self.children.remove(child)
        return status

    def stop(self) -> None:
        """Asks every run to save and end."""
        with self.lock:
            self.stopping = True
            for child in self.children:
                child.send_signal(signal.SIGTERM)


def visible_cards() -> list[str]:
    """The NVIDIA cards that a process of this environment sees, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [card.strip() for card in named.split(",") if card.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.split()


def _last_step(run: Path) -> int:
    """The last step in a run's metrics.jsonl, 0 before the first."""
    try:
        with open(run / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().split(b"\n")[-2::-1]
        return int(json.loads(lines[0])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def sweep_command(
    recipe: Path,
    vary: Sequence[str],
    *,
    seeds: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    jobs: int = 1,
    launcher: str = "",
    cell: int | None = None,
    show: str = "",
    console: Console | None = None,
) -> None:
    """Run a sweep and compare what has finished.

    Args:
        out: the sweep's folder; None is runs/sweep-RECIPE.
        cell: only this run, by its number from 0 (a task of a SLURM array).
        show: "plan" prints the runs and their states, "slurm" the lines of a SLURM array; both run nothing.

    Raises:
        ZPPOError: settings are wrong, or runs failed.
    """
    console, folder = console or Console(), out or Path("runs") / f"sweep-{recipe.stem}"
    runs = plan_sweep(recipe, vary, parse_seeds(seeds) if seeds else None, overrides)
    if show == "slurm":
        given = [str(recipe), *(f"--vary={text}" for text in vary), *([f"--seeds={seeds}"] if seeds else []), f"--out={folder}"]
        given += [*([f"--launcher={launcher}"] if launcher else []), *overrides]
        again = f"zppo sweep {shlex.join(given)}"
        lines = (
            f"#SBATCH --array=0-{len(runs) - 1}\n{again} --cell=$SLURM_ARRAY_TASK_ID\n# when all have ended, this compares them:\n# {again}"
        )
        console.print(lines, soft_wrap=True, highlight=False, markup=False)
        return
    if cell is not None and not 0 <= cell < len(runs):
        raise SettingsError(f"--cell is {cell}, and the sweep has {len(runs)} runs: 0 to {len(runs) - 1}")
    states = [state_of(run, folder) for run in runs]
    console.print(f"{len(runs)} runs in {folder}, {states.count('finished')} finished, {jobs} at a time", highlight=False)
    if show == "plan":
        for number, (run, state) in enumerate(zip(runs, states, strict=True)):
            console.print(f"{number:4d}  {state:9}  {run.name}", highlight=False, markup=False)
        return
    failed = run_all(
        runs if cell is None else [runs[cell]], folder, _outcome_of, jobs=jobs, launcher=shlex.split(launcher), console=console
    )
    done = {run.name: open_run(folder / run.name) for run in runs if state_of(run, folder) == "finished"}
    if done and cell is None:
        console.print(outcome_table(runs, done))
    if len(done) > 1 and cell is None:
        places = [folder / name for name in done]
        quiet = Console(quiet=True)
        compare_command(places, html=True, out=folder / PAGE, suffixes=(), csv=folder / NUMBERS, console=quiet)
        console.print(f"everything side by side: {folder / PAGE}, {folder / NUMBERS}", soft_wrap=True, highlight=False, markup=False)
    if failed:
        raise SettingsError(f"{failed} of {len(runs)} runs failed, see above; the same command runs them again")


def _outcome_of(run: SweepRun, place: Path) -> str:
    read = open_run(place)
    name, value = _main_result(read)
    return f"{name} {'-' if value is None else f'{value:.3f}'} ({duration(_seconds(read))})"


def _main_result(run: Run) -> tuple[str, float | None]:
    """Held-out accuracy where there is one, else that of the last plain rollouts."""
    results = results_of(run)
    name = "held-out accuracy" if "held-out accuracy" in results else "plain rollouts, last tenth"
    return name, results[name]


def _seconds(run: Run) -> float:
    return math.fsum(line["seconds"]["step"] for line in run.steps)


def outcome_table(runs: Sequence[SweepRun], done: Mapping[str, Run]) -> Table:
    """A row per combination: its main result and the difference to the first one, both with 95% intervals over seeds, and what it cost.

    Args:
        done: the runs that have finished, by name.
    """
    arms: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        if run.name in done:
            arms.setdefault(tuple(run.values.values()), {})[run.settings.seed] = done[run.name]
    results = {arm: {str(seed): _main_result(run) for seed, run in members.items()} for arm, members in arms.items()}
    known = {arm: {seed: value for seed, (_, value) in each.items() if value is not None} for arm, each in results.items()}
    first = next(iter(arms))
    quantity = next(iter(results[first].values()))[0]
    keys = list(next(run.values for run in runs))
    table = Table(
        box=None, padding=(0, 2, 0, 0), title=f"{quantity}, mean [95% interval over seeds]", title_justify="left", title_style="bold"
    )
    shown = [key.rpartition(".")[2] for key in keys]
    for name in (*shown, "seeds", "result", "minus the first", "student\ntokens", "teacher\ntokens", "time"):
        # What may wrap gives way on a narrow terminal: a column that may not, and has no place left, would go without a word.
        whole = name in ("seeds", "time") or "tokens" in name
        table.add_column(name, justify="left" if name in shown else "right", no_wrap=whole, overflow="fold")
    for arm, members in arms.items():
        difference = "" if arm == first else str(paired_difference(known[arm], known[first]))
        costs = [f"{fmean(math.fsum(line.get(key) or 0 for line in run.steps) for run in members.values()):,.0f}"
                 for key in ("student_tokens", "teacher_tokens")]  # fmt: skip
        time = duration(fmean(map(_seconds, members.values())))
        mean = mean_interval(list(known[arm].values())).unsigned()
        table.add_row(*arm, str(len(members)), mean, difference, *costs, time)
    return table
