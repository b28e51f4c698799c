"""Rows of a benchmark from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from zppo.errors import UnavailableError, one_line
from zppo.evaluate.adapters.row import Row
from zppo.evaluate.benchmark import Benchmark, Source


def hub_rows(benchmark: Benchmark, clips: Path | None) -> tuple[Iterator[Row], str, str]:
    """The rows of the benchmark's set, or of the first copy of it that can be loaded, with owner/name and commit.

    Raises:
        UnavailableError: none can be had; it says why the first one cannot.
    """
    if benchmark.family == "video" and clips is None:
        raise UnavailableError(
            f"{benchmark.name}: its clips are archives at https://huggingface.co/datasets/{benchmark.source.id}; unpack them and name "
            "their folder"
        )
    errors: list[UnavailableError] = []
    for source in (benchmark.source, *benchmark.also):
        try:
            parts = [(config, split, _part(benchmark, source, config, split))
                     for config in source.configs for split in source.splits]  # fmt: skip
        except UnavailableError as error:
            errors.append(error)
        else:
            return _rows_of(benchmark, parts, clips or Path()), source.id, _commit(source)
    raise errors[0]


def _rows_of(
    benchmark: Benchmark, parts: Iterable[tuple[str, str, Iterable[Mapping[str, Any]]]], folder: Path
) -> Iterator[Row]:
    number = 0
    for config, split, records in parts:
        for value in records:
            number += 1
            yield Row(benchmark.name, number, value, config, split, folder, trusted=True)


def _part(benchmark: Benchmark, source: Source, config: str, split: str) -> Iterable[Mapping[str, Any]]:
    """A part of a set, pictures as bytes; in a file, not in memory. UnavailableError where it cannot be had."""
    # Heavy, and not needed with a folder.
    import datasets

    if Path(source.id).exists():
        raise UnavailableError(
            f"{benchmark.name}: {Path(source.id).absolute()} exists, and would be read instead of the hub's set; start in another folder"
        )
    try:
        part = datasets.load_dataset(source.id, config or None, split=split, revision=source.revision)
        for name, feature in part.features.items():
            if isinstance(feature, datasets.Image | datasets.Video):
                part = part.cast_column(name, type(feature)(decode=False))
    except Exception as error:  # whatever is missing: a network, a log-in, the set, a part of it
        raise UnavailableError(f"{benchmark.name}: {_why(benchmark, source, config, split, error)}") from error
    return cast(Iterable[Mapping[str, Any]], part)


def _why(benchmark: Benchmark, source: Source, config: str, split: str, error: BaseException) -> str:
    page = f"https://huggingface.co/datasets/{source.id}"
    what = f"{source.id}, {f'configuration {config}, ' if config else ''}split {split}, cannot be loaded ({one_line(error)})"
    if benchmark.gated:
        return f"{what}; it is gated: accept its terms at {page}, then run `hf auth login`"
    copies = f", nor can {' or '.join(copy.id for copy in benchmark.also)}" if benchmark.also else ""
    return f"{what}{copies}; see {page}, check the network, or bring the rows in a folder"


def _commit(source: Source) -> str:
    """The commit that the hub has under the revision; "" where it cannot be asked."""
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.id, revision=source.revision).sha or "")
    except Exception:  # offline with a copy of the set: it loads all the same
        return source.revision or ""
