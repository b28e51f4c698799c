"""The run folder's growing files: metrics.jsonl, buffer.jsonl, rollouts/*.parquet, held_out/*.parquet."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from zppo.core.replay import Changes, Entry
from zppo.core.types import Group, Question
from zppo.errors import CheckpointError
from zppo.names import check_file
from zppo.runs.files import PARTIAL, sync, write_whole, writing

METRICS = "metrics.jsonl"
BUFFER = "buffer.jsonl"
ROLLOUTS = "rollouts"
HELD_OUT = "held_out"
_STEP = re.compile(r"(step|eval|final)-(\d+)\.(parquet|partial)")

ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("kind", pa.string()),
        ("question_id", pa.string()),
        ("question", pa.string()),  # the user's last turn, without what reformulations and templates add
        ("images", pa.list_(pa.string())),  # where the question's images are
        ("image_sha256", pa.list_(pa.string())),  # of each; older files lack the column
        ("level", pa.string()),
        ("replayed", pa.bool_()),
        ("entry_accuracy", pa.float32()),  # plain accuracy when the question entered the buffer; null: it is not in it
        ("rollout", pa.int16()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("gold", pa.string()),  # of several right answers one text that names them
        ("golds", pa.list_(pa.string())),  # each right answer by itself; older files lack the column, and the next
        ("answer_list", pa.string()),  # any, set or ordered; null: there is one
        ("grading", pa.string()),  # rule or judge
        ("answer", pa.string()),
        ("correct", pa.bool_()),
        ("graded", pa.bool_()),
        ("reason", pa.string()),
        ("reward", pa.float32()),
        ("rewards", pa.string()),  # JSON: what each reward function gave, by name; null: there are none; older files lack it, and the next
        ("reward_notes", pa.string()),  # JSON: what they reported about the completion
        ("advantage", pa.float32()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("entropy", pa.float32()),
        ("audit", pa.string()),  # JSON: facts about the candidates that the student never sees
    ]
)


ROWS_PER_GROUP = 1024
"""Rows that a reader of rollouts/*.parquet has to hold at once: completions are long."""


class RunLog:
    """Appends to the files of one run folder.

    Every line carries its step, so that `rewind` can take back what a killed run wrote after its last checkpoint.

    Attributes:
        listener: given every line of metrics.jsonl after it is written (trackers).
        reader: given the rows of each step's rollouts after they are written (trackers).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener: Callable[[int, str, Mapping[str, Any]], None] | None = None
        self.reader: Callable[[int, Sequence[Mapping[str, Any]]], None] | None = None
        self._unsynced: set[Path] = set()

    def open(self) -> None:
        """Make the run folder; until then nothing is written."""
        with writing(self.folder):
            (self.folder / ROLLOUTS).mkdir(parents=True, exist_ok=True)

    def metrics(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; `event` is "step", "eval" or "final"; NaN and infinity become null."""
        self._append(METRICS, [{"step": step, "event": event, **values}])
        if self.listener is not None:
            self.listener(step, event, values)

    def buffer(self, step: int, changes: Changes) -> None:
        """One line of buffer.jsonl per question that was admitted, graduated or evicted."""
        named: tuple[tuple[str, Sequence[Entry]], ...] = (
            ("admitted", changes.admitted),
            ("graduated", changes.graduated),
            ("evicted", changes.evicted),
        )
        lines = [
            {"step": step, "event": event, "id": e.question.id, "entry_accuracy": e.accuracy, "entry_step": e.step, "visits": e.visits}
            for event, entries in named
            for e in entries
        ]
        self._append(BUFFER, lines)

    def rollouts(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[float],
        *,
        replayed: frozenset[str],
        entry_accuracy: Mapping[str, float],
        show: Callable[[tuple[int, ...]], str],
    ) -> None:
        """rollouts/step-NNNNNN.parquet with one row per rollout of every kind; `show` turns prompt ids into text."""
        values = iter(advantages)
        rows = _rows(step, groups, show, replayed, entry_accuracy)
        for row in rows:
            row["advantage"] = next(values)
        self._write_rows(self.folder / ROLLOUTS / f"step-{step:06d}.parquet", rows)
        if self.reader is not None:
            self.reader(step, rows)

    def held_out(self, step: int, event: str, groups: Sequence[Group], *, show: Callable[[tuple[int, ...]], str]) -> None:
        """held_out/<event>-NNNNNN.parquet, laid out as `rollouts`, with every completion of an evaluation; it has no advantages."""
        with writing(self.folder / HELD_OUT):
            (self.folder / HELD_OUT).mkdir(exist_ok=True)
        self._write_rows(self.folder / HELD_OUT / f"{event}-{step:06d}.parquet", _rows(step, groups, show, frozenset(), {}))

    def _write_rows(self, target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """A parquet file, whole or not at all."""
        partial = target.with_suffix(PARTIAL)
        table = pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA)
        with writing(target):
            try:
                pq.write_table(table, partial, compression="zstd", row_group_size=ROWS_PER_GROUP)
                partial.rename(target)
            except OSError:
                partial.unlink(missing_ok=True)  # where the disk is full, the space is needed
                raise
        self._unsynced |= {target, target.parent}

    def rewind(self, step: int, evaluated: int) -> None:
        """Take back steps after `step`, evaluations after `evaluated` and that of final/, torn last lines and unfinished files.

        Files of other names stay.

        A kill in the middle does no harm: it is done again.
        """
        last = {"eval": evaluated, "final": -1}
        for name in (METRICS, BUFFER):
            path = self.folder / name
            if path.exists():
                kept = [line for line, record in _lines(path) if record["step"] <= last.get(record["event"], step)]
                write_whole(path, "".join(kept))
        self.open()
        for folder in (self.folder / ROLLOUTS, self.folder / HELD_OUT):
            with writing(folder):
                for path in folder.iterdir() if folder.exists() else ():
                    match = _STEP.fullmatch(path.name)
                    if match and (int(match[2]) > last.get(match[1], step) or match[3] == "partial"):
                        path.unlink()

    def sync(self) -> None:
        """Force what was written onto the disk: a checkpoint counts on it."""
        with writing(self.folder):
            for path in sorted(self._unsynced):
                sync(path)
        self._unsynced.clear()

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        path = self.folder / name
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(_finite(record), ensure_ascii=False) + "\n" for record in records))
        self._unsynced |= {path, path.parent}


class SilentLog(RunLog):
    """The log of a process that does not write: the first one of a run does (`zppo.distributed.processes`)."""

    def open(self) -> None:
        pass

    def rewind(self, step: int, evaluated: int) -> None:
        pass

    def rollouts(self, *args: Any, **kwargs: Any) -> None:
        pass

    def held_out(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        pass


def question_columns(question: Question) -> dict[str, Any]:
    """What a row of ROLLOUT_SCHEMA says of the question that was asked."""
    return {
        "question_id": question.id,
        "question": question.messages[-1].content,
        "images": [image.uri for image in question.images],
        "image_sha256": [image.sha256 for image in question.images],
        "level": question.level,
        "gold": str(question.gold),
        "golds": list(question.golds),
        "answer_list": None if isinstance(question.gold, str) else question.gold.how,
        "grading": question.grading,
    }


def _rows(
    step: int,
    groups: Sequence[Group],
    show: Callable[[tuple[int, ...]], str],
    replayed: frozenset[str],
    entry_accuracy: Mapping[str, float],
) -> list[dict[str, Any]]:
    """A row of ROLLOUT_SCHEMA per rollout, its advantage left open."""
    return [
        {
            "step": step,
            "kind": group.kind,
            **question_columns(group.question),
            "replayed": group.question.id in replayed,
            "entry_accuracy": entry_accuracy.get(group.question.id),
            "rollout": index,
            "prompt": text,
            "completion": rollout.text,
            "answer": rollout.answer,
            "correct": rollout.correct,
            "graded": rollout.graded,
            "reason": rollout.reason,
            "reward": rollout.reward,
            "rewards": _json(rollout.rewards),
            "reward_notes": _json(rollout.notes),
            "prompt_tokens": len(group.prompt.ids) + len(group.prompt.forced_ids),
            "completion_tokens": len(rollout.ids),
            "truncated": rollout.truncated,
            "entropy": rollout.entropy,
            "audit": audit,
        }
        for group in groups
        for text, audit in [(show(group.prompt.ids + group.prompt.forced_ids), json.dumps(dict(group.prompt.audit)))]
        for index, rollout in enumerate(group.rollouts)
    ]


def _json(values: Mapping[str, Any]) -> str | None:
    return json.dumps(dict(values), ensure_ascii=False) if values else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or buffer.jsonl; empty where the file does not exist. CheckpointError: a pointer of git-lfs."""
    return [record for _, record in _lines(path)] if path.is_file() else []


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines and what they hold; a line that a killed run tore ends the file."""
    check_file(path, CheckpointError)  # it would be taken for an empty one
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                yield line, json.loads(line)
            except json.JSONDecodeError:
                return


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return value


_GIB = float(1 << 30)


def usage() -> dict[str, float]:
    """Numbers by name, for one line of metrics.jsonl; what cannot be known here is left out.

    `memory_gib` is what the process and its workers hold, `memory_free_gib` what the machine has left. Where torch computes on a GPU:
    `gpu_memory_gib` is what all processes hold of it, `gpu_memory_free_gib` the rest, `gpu_torch_peak_gib` the most that torch held at
    once in this process, `gpu_utilisation` the share of about the last second in which the GPU computed.
    """
    values = {"memory_gib": _resident() / _GIB, "memory_free_gib": psutil.virtual_memory().available / _GIB, **_gpu()}
    return {name: round(value, 3) for name, value in values.items()}


def _resident() -> int:
    """Bytes of the process and of its workers (grading, a colocated vLLM)."""
    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            total += child.memory_info().rss
    return int(total)


def _gpu() -> dict[str, float]:
    torch = sys.modules.get("torch")  # who reads a log does without
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    try:
        free, total = torch.cuda.mem_get_info()
        values = {
            "gpu_memory_gib": (total - free) / _GIB,
            "gpu_memory_free_gib": free / _GIB,
            "gpu_torch_peak_gib": torch.cuda.max_memory_allocated() / _GIB,
        }
    except RuntimeError:  # a driver that does not tell
        return {}
    with contextlib.suppress(RuntimeError, ModuleNotFoundError, OSError):  # without nvidia-ml-py nobody can tell
        values["gpu_utilisation"] = torch.cuda.utilization() / 100
    return values
