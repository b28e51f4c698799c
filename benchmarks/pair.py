"""Both sides over the same world: the workers that the rows of this folder let step in turn."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ours, theirs
from benchmarks.workers import Worker, workers
from benchmarks.world import Shape, make_model, questions


@contextlib.contextmanager
def sides(
    shape: Shape,
    threads: int,
    *,
    peer_rows: Sequence[int],
    methods: Sequence[str] = ("grpo",),
    make: Callable[[Path, Shape], Path] = make_model,
    **more: Any,
) -> Iterator[dict[str, Worker]]:
    """Workers by name: "grpo", "zppo" for ours, "trl 32" for the peer with 32 rows a micro-batch; over the model that `make` writes.

    `more` are fields of `Ours`.
    """
    from zppo.data.order import batch_ids

    with tempfile.TemporaryDirectory() as folder:
        model = make(Path(folder) / "model", shape)
        asked = questions(shape)
        order = [i for step in range(shape.steps) for i in batch_ids(len(asked), shape.questions, 0, step)]
        made: dict[str, Any] = {m: (ours.serve, ours.Ours(model, shape, asked, threads, method=m, **more)) for m in methods}
        for rows in peer_rows:
            theirs_own = theirs.Theirs(model, shape, [asked[i] for i in order], threads, rows)
            made[f"trl {rows}"] = (theirs.serve, theirs_own)
        with workers(**made) as started:
            yield started
