"""A whole evaluation, all 31 benchmarks at once, of rows as `datasets` gives them from the hub: Arrow columns, pictures as features."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval_server import scripted
from evaluate_data import ROWS
from test_evaluate_run import data as data  # a fixture
from test_evaluate_run import fair, results, right
from zppo import cli
from zppo.evals.registry import BENCHMARKS

_PICTURES = (".png", ".jpg")


def as_hub(folder: Path) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """(set, configuration, split) -> rows: benchmarks of one set share them, rows without a part of their own are in the first."""
    parts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for benchmark in BENCHMARKS:
        source = benchmark.source
        for line in (ROWS / f"{benchmark.name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            config, split = row.pop("_config", "") or source.configs[0], row.pop("_split", "") or source.splits[0]
            row = {name: pictured(value, folder) for name, value in row.items()}
            rows = parts.setdefault((source.id, config, split), [])
            rows += [row] * (row not in rows)
    return parts


def pictured(value: Any, folder: Path) -> Any:
    """The file of a picture as `datasets` keeps it: its bytes."""
    if isinstance(value, list):
        return [pictured(each, folder) for each in value]
    if isinstance(value, str) and value.endswith(_PICTURES) and (folder / value).is_file():
        return {"bytes": (folder / value).read_bytes(), "path": None}
    return value


def is_picture(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def arrow(rows: list[dict[str, Any]]) -> Any:
    """The rows as a `Dataset`: every row has every column, pictures are features that decode themselves."""
    import datasets

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for values in columns.values():
        if any(is_picture(value) for value in values):  # "" stands for none
            values[:] = [value if is_picture(value) else None for value in values]
        elif len({type(value) for value in values if value not in (None, [])}) > 1:  # Arrow has one type for a column: text
            values[:] = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    dataset = datasets.Dataset.from_dict(columns)
    for name, values in columns.items():
        if any(is_picture(value) for value in values):
            dataset = dataset.cast_column(name, datasets.Image())
    return dataset


@pytest.mark.slow
@pytest.mark.long
def test_all_benchmarks_as_the_hub_gives_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    parts, asked = as_hub(data), set()

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.add(name)
        known = next(rows for (other, *_), rows in parts.items() if other == name)
        rows = parts.get((name, config or "", split))
        return arrow(rows) if rows else arrow(known).select([])  # a part without a made-up row

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline")))
    out = tmp_path / "out"
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        more = ["--clips", str(data), "--output", str(out), "--concurrency", "4", "--frames", "3", "--video", "frames"]
        assert cli.main(["eval", model.url, "--suite", "paper", "--judge", judge.url, *more]) == 0, capsys.readouterr()
    state = results(out)
    assert asked == {benchmark.source.id for benchmark in BENCHMARKS}
    assert [each["name"] for each in state["benchmarks"]] == [benchmark.name for benchmark in BENCHMARKS] and not state["skipped"]
    counts = {each["name"]: (each["open"], each["unreadable"], each["rows"] > 0) for each in state["benchmarks"]}
    assert counts == dict.fromkeys(counts, (0, 0, True))
    assert {each["origin"] for each in state["benchmarks"]} == asked
    # What it came to is a column of the paper's tables, next to itself.
    assert cli.main(["eval", "table", f"2B:ZPPO={out}", "--paper", "--resamples", "50"]) == 0
    shown = capsys.readouterr().out
    assert all(benchmark.name in shown for benchmark in BENCHMARKS) and "the paper's figures" in shown
    pictures = [part for body in model.requests for part in parts_of(body) if part["type"] == "image_url"]
    assert len(pictures) > 40 and all(Image.open(io.BytesIO(decoded(part))).size for part in pictures)


def parts_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for turn in body["messages"] if isinstance(turn["content"], list) for part in turn["content"]]


def decoded(part: dict[str, Any]) -> bytes:
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])
