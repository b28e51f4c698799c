"""A run folder as it lies on the disk, finished or still growing.

One pass over the rollout files, file by file and without the completions: sums per step, audits, and one line per group.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zppo.config.methods import METHODS
from zppo.config.recipe import load_recipe, parse_yaml
from zppo.core.types import BCQ, PLAIN
from zppo.errors import CheckpointError, ZPPOError, one_line
from zppo.names import POINTER, check_file, check_run_folder, is_pointer_file
from zppo.report.audits import Counts, PlainVisit, count_group, count_leaks
from zppo.report.tells import Pair, pair_of
from zppo.runs.files import WORDS
from zppo.runs.log import BUFFER, HELD_OUT, METRICS, ROLLOUTS, read_lines

RECIPE, FINAL = "recipe.yaml", "final"


@dataclass(frozen=True, slots=True)
class Run:
    """What a run has written so far, the rollouts left on the disk.

    Attributes:
        folder: the run folder.
        recipe: every setting by section, as recipe.yaml holds it.
        steps: the lines of metrics.jsonl with `event: step`, in order.
        evaluations: those with `event: eval` or `final`, in order.
        buffer: the lines of buffer.jsonl, in order.
    """

    folder: Path
    recipe: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    buffer: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        """The last step with metrics, 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def finished(self) -> bool:
        """Whether every planned step is done; a run by epochs is finished when its student lies in final/."""
        planned = self.setting("train.steps")
        return self.complete or (planned is not None and self.last_step >= planned)

    @property
    def complete(self) -> bool:
        """Whether the trained student lies in final/, which is the last thing that happens."""
        return (self.folder / FINAL / "README.md").exists()

    @property
    def rollout_files(self) -> list[Path]:
        """rollouts/*.parquet by step."""
        return sorted((self.folder / ROLLOUTS).glob("step-*.parquet"))

    @property
    def held_out_files(self) -> list[Path]:
        """held_out/*.parquet by step, that of final/ last; none in runs of older versions."""
        names = sorted((self.folder / HELD_OUT).glob("eval-*.parquet")), sorted((self.folder / HELD_OUT).glob("final-*.parquet"))
        return [*names[0], *names[1]]

    @property
    def group_size(self) -> int:
        return int(self.setting("rollout.group_size", 8))

    @property
    def threshold(self) -> float:
        return float(self.setting("zone.threshold", 0.5))

    @property
    def replays(self) -> bool:
        """Whether the method has a prompt replay buffer."""
        override = self.setting("method.replay")
        row = METHODS.get(str(self.setting("method.name", "")))
        return bool(override) if override is not None else row is None or row.replay

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the recipe by its dotted key; the default where it is not set."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value


NOT_ARMS = (
    *("seed", "output", "push", "eval.every", "rollout.max_rows", "grading.workers", "data.images.folder", "data.images.cache_gib"),
    *(f"train.{name}" for name in (
        "checkpoint_every", "checkpoint_in_background", "keep_checkpoints", "stop_on_collapse", "trackers", "tracker_completions",
        "tracker_project", "threads", "collective_timeout", "check_engine_every", "engine_tolerance", "tokens_per_microbatch",
        "share_prompts", "gradient_checkpointing", "sharding",
    )),
    *(f"{model}.{name}" for model in ("teacher", "judge") for name in (
        "base_urls", "key_env", "concurrency", "deadline", "retry_for", "device",
    )),
    *(f"rollout.vllm.{name}" for name in (
        "mode", "base_url", "group_port", "weights_folder", "gpu_memory_utilization", "enable_sleep_mode",
    )),
    "teacher.ask",
)  # fmt: skip
"""Settings that change nothing of what is learned, but for rounding: how often something is looked at or saved, where something runs, how
much of it at once. And the seed, over which arms are means."""


def flat_recipe(recipe: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Every setting that makes an arm, dotted; with today's defaults where the recipe is of an older version, as far as it can be read.

    Texts that lie in the run's folder under one name in every run (templates) are told apart by their digests.
    """
    with suppress(ZPPOError):
        recipe = _filled(recipe, load_recipe(recipe).model_dump(mode="json"))

    def walk(value: Any, prefix: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            return [item for key, inner in value.items() for item in walk(inner, f"{prefix}.{key}" if prefix else str(key))]
        return [(prefix, str(value))]

    return {key: value for key, value in walk(_with_words(recipe, folder), "") if key not in NOT_ARMS}


def _with_words(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_words(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_words(inner, folder) for inner in value]
    kept = isinstance(value, str) and value.startswith(f"{WORDS}/") and (folder / value).is_file()
    return f"sha256:{hashlib.sha256((folder / value).read_bytes()).hexdigest()[:8]}" if kept else value


def _filled(recipe: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands in a recipe, as it is written there; what it lacks as `whole` has it."""

    def value(name: str) -> Any:
        own = recipe.get(name, whole[name])
        return _filled(own, whole[name]) if isinstance(own, Mapping) and isinstance(whole[name], Mapping) else own

    return {name: value(name) for name in whole}


def differing(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys of flat recipes whose values are not the same in all of them."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if len({recipe.get(key) for recipe in recipes}) > 1]


def arm_names(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """Of flat recipes: the method, and what differs between arms of one method, under its full name."""
    names = []
    for recipe in recipes:
        method = recipe.get("method.name", "?")
        alike = [other for other in recipes if other.get("method.name") == recipe.get("method.name")]
        keys = differing(alike)
        shown = [f"{key}={recipe.get(key, '-')[-40:]}" for key in keys[:3]] + ["..."] * (len(keys) > 3)
        names.append(" ".join([method, *shown]))
    return names


def read_recipe(folder: Path) -> Mapping[str, Any]:
    """The settings of the run in a folder.

    Raises:
        CheckpointError: the folder holds no run, or its recipe cannot be read.
    """
    path = folder / RECIPE
    if not path.is_file():
        what = "is no folder" if not folder.is_dir() else f"holds no run: there is no {RECIPE} in it"
        raise CheckpointError(f"{folder} {what}. Name the folder that `zppo train` printed")
    check_file(path, CheckpointError)
    try:
        recipe = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Restore it from the recipe that the run was started with") from error
    if not isinstance(recipe, Mapping):
        raise CheckpointError(f"{path} holds no settings. Restore it from the recipe that the run was started with")
    return recipe


def open_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        CheckpointError: the folder holds no run, or its recipe cannot be read.
    """
    check_run_folder(folder)
    recipe = read_recipe(folder)
    lines = read_lines(folder / METRICS)
    return Run(
        folder=folder,
        recipe=recipe,
        steps=tuple(line for line in lines if line["event"] == "step"),
        evaluations=tuple(line for line in lines if line["event"] != "step"),
        buffer=tuple(read_lines(folder / BUFFER)),
    )


_PER_ROLLOUT = (
    "rollout", "answer", "correct", "graded", "reward", "advantage", "completion_tokens", "truncated", "entropy",
)  # fmt: skip
_PER_GROUP = ("step", "kind", "question_id", "question", "level", "gold", "replayed", "entry_accuracy", "audit", "prompt")
_LATER = ("golds", "answer_list")  # older files lack these columns
# The same text stands in all rows of a group: read as a dictionary, it is decoded once.
_DICTIONARIES = ["kind", "question_id", "question", "level", "gold", "audit", "prompt"]


@dataclass(slots=True)
class KindSums:
    """Sums over the rollouts of one kind of prompt in one step; `entropies` is how many rollouts have an entropy."""

    groups: int = 0
    rollouts: int = 0
    graded: int = 0
    correct: int = 0
    tokens: int = 0
    truncated: int = 0
    no_answer: int = 0
    positive: int = 0
    entropy: float = 0.0
    entropies: int = 0


class GroupLine(NamedTuple):
    """One group of rollouts, without its texts.

    Attributes:
        correct, graded, size: how many rollouts are correct, have a verdict, are there.
        entry_accuracy: plain accuracy at admission, None where the question is not in the buffer.
        reward, tokens: sums over its rollouts.
        answers: how many of them have an answer.
        classes: audit classes among its rollouts.
    """

    step: int
    kind: str
    question_id: str
    question: str
    level: str
    gold: str
    replayed: bool
    entry_accuracy: float | None
    correct: int
    graded: int
    size: int
    reward: float
    tokens: int
    answers: int
    classes: frozenset[str]

    @property
    def counts_for_buffer(self) -> bool:
        """Whether it is a plain group of which at least half of the rollouts have a verdict."""
        return self.kind == PLAIN and 2 * self.graded >= self.size > 0


@dataclass(frozen=True, slots=True)
class StepScan:
    """What one rollout file holds.

    Attributes:
        step: its step.
        kinds: sums by kind.
        counts: of the audits.
        groups: one line each, in order.
        pairs: the candidates of its BCQ prompts.
    """

    step: int
    kinds: dict[str, KindSums] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counter)
    groups: list[GroupLine] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def visits(self) -> list[PlainVisit]:
        """Its plain groups that count for the buffer."""
        return [PlainVisit(self.step, g.question_id, g.correct / g.graded) for g in self.groups if g.counts_for_buffer]


def step_of(path: Path) -> int:
    """The step of a file of rollouts, by its name."""
    return int(path.stem.rpartition("-")[2])


DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError)
"""What reading a cut or damaged file of rollouts raises; memory that has run out (pa.ArrowMemoryError) is among them and is no damage."""


class RolloutFileError(CheckpointError):
    """A file of rollouts or of held-out completions is cut or damaged: what is read of a run leaves it out and says so."""

    def __init__(self, path: Path, error: Exception) -> None:
        if is_pointer_file(path):
            super().__init__(f"{path} {POINTER}")
            return
        super().__init__(f"{path} cannot be read ({one_line(error, 200)}). `zppo resume` writes the steps after the last checkpoint anew")


def scan_file(path: Path) -> StepScan:
    """Read one file of rollouts/ or of held_out/.

    Raises:
        RolloutFileError: it is damaged.
        CheckpointError: another version wrote it.
    """
    try:
        later = [name for name in _LATER if name in pq.read_schema(path).names]
        table = pq.read_table(path, columns=[*_PER_GROUP, *later, *_PER_ROLLOUT], read_dictionary=_DICTIONARIES, partitioning=None)
        missing = {*_PER_GROUP, *_PER_ROLLOUT} - set(table.column_names)
        if missing:
            raise CheckpointError(f"{path} has no column {', '.join(sorted(missing))}: it was written by another version of zppo")
        return _scan(table, step_of(path))
    except pa.ArrowMemoryError:
        raise
    except DAMAGE as error:
        raise RolloutFileError(path, error) from error


def visits_of(run: Run) -> list[PlainVisit]:
    """Every plain group of a run that counts for the buffer, by step, without reading a text; damaged files are left out."""
    found: list[PlainVisit] = []
    for path in run.rollout_files:
        with suppress(*DAMAGE):
            status = path.stat()
            found += _visits_in(path, status.st_mtime_ns, status.st_size)
    return found


@lru_cache(maxsize=20_000)
def _visits_in(path: Path, mtime: int, size: int) -> tuple[PlainVisit, ...]:
    """Of one file as it was at this time: whoever watches a run looks again and again."""
    table = pq.read_table(path, columns=["question_id", "kind", "rollout", "correct", "graded"], partitioning=None)
    rollout, correct, graded = (_numbers(table[name]) for name in ("rollout", "correct", "graded"))
    starts = np.flatnonzero(rollout == 0)
    if not len(starts):
        return ()
    firsts = table.select(["question_id", "kind"]).take(pa.array(starts)).to_pylist()
    sizes = np.diff([*starts, table.num_rows])
    verdicts, right = (np.add.reduceat(values.astype(np.int64), starts) for values in (graded, correct & graded))
    return tuple(
        PlainVisit(step_of(path), first["question_id"], int(right[i]) / int(verdicts[i]))
        for i, first in enumerate(firsts)
        if first["kind"] == PLAIN and 2 * verdicts[i] >= sizes[i]
    )


def held_out_accuracies(run: Run, *, before: bool = False) -> dict[tuple[str, int], float | None]:
    """By question the share of right completions at the last evaluation that can be read, or at the one before training; empty for none,
    None where no completion has a verdict.

    A question is known by what it asks, text, right answer and images, as a digest, and by its number among those that ask the same: its
    id may stand for another question in another file.
    """
    files = run.held_out_files
    for path in [path for path in files if path.stem == "eval-000000"] if before else reversed(files):
        with suppress(*DAMAGE):
            asks = [name for name in ("question", "gold", "image_sha256") if name in pq.read_schema(path).names]  # older files lack one
            columns = ["question_id", "correct", "graded", *asks]
            rows = pq.read_table(path, columns=columns, partitioning=None).to_pylist()
            keys: dict[str, tuple[str, int]] = {}
            alike: Counter[str] = Counter()
            verdicts: dict[tuple[str, int], list[bool]] = {}
            for row in rows:
                if row["question_id"] not in keys:
                    content = json.dumps([row[name] for name in asks])
                    digest = hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()
                    keys[row["question_id"]] = digest, alike[digest]
                    alike[digest] += 1
                verdicts.setdefault(keys[row["question_id"]], []).extend([row["correct"]] * bool(row["graded"]))
            return {key: sum(own) / len(own) if own else None for key, own in verdicts.items()}
    return {}


def question_ids(run: Run) -> list[str]:
    """The ids of all questions that a run asked, in training or evaluations, in order of first appearance; damaged files are left out."""
    found: dict[str, None] = {}
    for path in (*run.rollout_files, *run.held_out_files):
        with suppress(*DAMAGE):
            column = pq.read_table(path, columns=["question_id"], partitioning=None)["question_id"]
            found.update(dict.fromkeys(column.unique().to_pylist()))
    return list(found)


def _scan(table: pa.Table, step: int) -> StepScan:
    numbers = {name: _numbers(table[name]) for name in _PER_ROLLOUT if name != "answer"}
    starts = np.flatnonzero(numbers["rollout"] == 0)
    result = StepScan(step)
    if not len(starts):
        return result
    answers = table["answer"].to_pylist()
    per_group = [name for name in (*_PER_GROUP, *_LATER) if name in table.column_names]
    firsts = table.select(per_group).take(pa.array(starts)).to_pylist()
    ends = [*starts[1:], table.num_rows]
    numbers["no_answer"] = np.asarray(table["answer"].is_null())
    _sum_kinds(result, numbers, np.array([first["kind"] for first in firsts]), starts)
    # Teacher answers that NCQ rollouts never saw: those of the same question's BCQ.
    audits = [json.loads(first["audit"]) if first["kind"] != PLAIN else {} for first in firsts]
    unseen = {f["question_id"]: a.get("positive_answer") for f, a in zip(firsts, audits, strict=True) if f["kind"] == BCQ}
    correct = np.add.reduceat((numbers["correct"] & numbers["graded"]).astype(np.int64), starts)
    graded = np.add.reduceat(numbers["graded"].astype(np.int64), starts)
    reward = np.add.reduceat(np.nan_to_num(numbers["reward"].astype(np.float64)), starts)
    tokens = np.add.reduceat(numbers["completion_tokens"].astype(np.int64), starts)
    answered = np.add.reduceat((~numbers["no_answer"]).astype(np.int64), starts)
    for i, (first, audit) in enumerate(zip(firsts, audits, strict=True)):
        rows = range(starts[i], ends[i])
        classes: list[str] = []
        if first["kind"] != PLAIN:
            rollouts = [(answers[r], bool(numbers["correct"][r])) for r in rows if numbers["graded"][r]]
            counts, classes = count_group(first["kind"], audit, unseen.get(first["question_id"]), rollouts)
            result.counts.update(counts)
            gold, *others = _right_answers(first)
            result.counts.update(count_leaks(first["kind"], audit, gold, first["prompt"], others))
            if (pair := pair_of(first["kind"], first["question_id"], audit, first["prompt"])) is not None:
                result.pairs.append(pair)
        shown = {name: first[name] for name in GroupLine._fields if name in first}
        line = GroupLine(
            **shown,
            correct=int(correct[i]),
            graded=int(graded[i]),
            size=len(rows),
            answers=int(answered[i]),
            reward=float(reward[i]),
            tokens=int(tokens[i]),
            classes=frozenset(classes) - {""},
        )
        result.groups.append(line)
    return result


def _right_answers(row: Mapping[str, Any]) -> list[str]:
    """The answers any one of which is right; where all of several are wanted, they stand in one box."""
    golds = row.get("golds") or [row["gold"]]  # older files have one
    return golds if row.get("answer_list") in (None, "any") else [", ".join(golds)]


def _numbers(column: pa.ChunkedArray) -> Any:
    """A column of numbers or booleans as an array; null is NaN."""
    return column.combine_chunks().to_numpy(zero_copy_only=False)


def _sum_kinds(result: StepScan, numbers: dict[str, Any], kinds: Any, starts: Any) -> None:
    """Sums per kind of prompt, over the graded rollouts for accuracies and over all for the rest."""
    total = len(numbers["rollout"])
    of_row = np.repeat(kinds, np.diff([*starts, total]))
    has_entropy = ~np.isnan(numbers["entropy"].astype(float))
    for kind in dict.fromkeys(kinds.tolist()):
        rows = of_row == kind
        result.kinds[kind] = KindSums(
            groups=int((kinds == kind).sum()),
            rollouts=int(rows.sum()),
            graded=int(numbers["graded"][rows].sum()),
            correct=int((numbers["correct"] & numbers["graded"])[rows].sum()),
            tokens=int(numbers["completion_tokens"][rows].sum()),
            truncated=int(numbers["truncated"][rows].sum()),
            no_answer=int(numbers["no_answer"][rows].sum()),
            positive=int((numbers["advantage"][rows] > 0).sum()),
            entropy=float(np.nansum(numbers["entropy"][rows], dtype=np.float64)),
            entropies=int(has_entropy[rows].sum()),
        )
