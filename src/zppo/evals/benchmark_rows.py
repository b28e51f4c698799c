"""Items of a benchmark, from its rows on the Hugging Face hub or in a folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

from zppo.data.local_files import READERS
from zppo.errors import DataError, UnavailableError, one_line
from zppo.evals.adapters.row import PICTURES, DatasetRow
from zppo.evals.benchmark import Benchmark, HubDataset
from zppo.evals.item import Item, Media


def dataset_rows(benchmark: Benchmark, clips: Path | None) -> tuple[Iterator[DatasetRow], str, str]:
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
            records = ((config, split, record) for config, split, part in parts for record in part)
            rows = (DatasetRow(benchmark.name, number, record, config, split, clips or Path(), trusted=True)
                    for number, (config, split, record) in enumerate(records, 1))  # fmt: skip
            return rows, source.id, _commit(source)
    raise errors[0]


def _part(benchmark: Benchmark, source: HubDataset, config: str, split: str) -> Iterable[Mapping[str, Any]]:
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


def _why(benchmark: Benchmark, source: HubDataset, config: str, split: str, error: BaseException) -> str:
    page = f"https://huggingface.co/datasets/{source.id}"
    what = f"{source.id}, {f'configuration {config}, ' if config else ''}split {split}, cannot be loaded ({one_line(error)})"
    if benchmark.gated:
        return f"{what}; it is gated: accept its terms at {page}, then run `hf auth login`"
    copies = f", nor can {' or '.join(copy.id for copy in benchmark.also)}" if benchmark.also else ""
    return f"{what}{copies}; see {page}, check the network, or bring the rows in a folder"


def _commit(source: HubDataset) -> str:
    """The commit that the hub has under the revision; "" where it cannot be asked."""
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.id, revision=source.revision).sha or "")
    except Exception:  # offline with a copy of the set: it loads all the same
        return source.revision or ""


_ENDINGS = (".jsonl", ".parquet", ".json")
_CONFIG, _SPLIT = "_config", "_split"
_GROUPS = ("seed", "problem")
_SUBTITLES = "VMMES"
_CUT = "segment"  # how folders end whose clips are parts
_UNREADABLE = 0.01  # of the rows: so many may be left out since they cannot be read, rounded up


@dataclass(frozen=True, slots=True)
class LoadedBenchmark:
    """The items of a benchmark and where they come from.

    Attributes:
        items: in the order of the data set, ids unique.
        origin: a file, or owner/name of a set on the hub.
        revision: the commit of that set; "" for a file, or where the hub did not say.
        unreadable: what is wrong with each record that cannot be read; these are left out.
    """

    items: tuple[Item, ...]
    origin: str
    revision: str
    unreadable: tuple[str, ...] = ()


def load_items(
    benchmark: Benchmark, data: Path | None = None, *, clips: Path | None = None, store: Path | None = None, limit: int | None = None
) -> LoadedBenchmark:
    """All items of a benchmark, or the first `limit`.

    Args:
        benchmark: a row of the registry.
        data: a folder with `<name>.jsonl`, `.parquet` or `.json`, in the data set's own schema, instead of the hub. Paths of pictures and
            clips in it are relative to the folder. A row may say its configuration and split in `_config` and `_split`.
        clips: where the clips of video benchmarks are, unpacked; the hub has them as archives. With `data` that folder by default.
            Subtitles are in `subtitle/<videoID>.srt` below it.
        store: a folder for pictures that come as bytes; items then hold their paths, and the pictures no memory.
        limit: at most so many; of DynaMath and We-Math whole groups of questions, since they are scored together.

    Raises:
        UnavailableError: the data cannot be had: said and skipped, never scored 0.
        DataError: more than one row in a hundred, rounded up, cannot be read; the message names benchmark, row and field of the first.
    """
    if benchmark.reader is not None:
        rows, origin, revision = benchmark.reader(), benchmark.source.id, ""
    elif data is None:
        rows, origin, revision = dataset_rows(benchmark, clips)
    else:
        rows, origin, revision = *_file_rows(benchmark, data, clips or data), ""
    adapt = partial(_adapted, benchmark)
    found: list[Item] = []
    seen = 0
    unreadable: list[str] = []
    # Questions that are scored together can only be cut to `limit` when all of them are known.
    whole = limit is None or benchmark.aggregate in ("worst case", "wemath")
    for row in rows:
        seen += 1
        try:
            items = tuple(_placed(item, benchmark, row.folder, store) for item in adapt(row))
        except UnavailableError:
            raise
        except DataError as error:
            unreadable.append(str(error))
            continue
        found += items
        if not whole and len(found) >= (limit or 0):
            break
    if len(unreadable) > math.ceil(seen * _UNREADABLE) or (unreadable and not found):
        raise DataError(f"{unreadable[0]} ({len(unreadable):,} of {seen:,} rows cannot be read)")
    items = limited(unique(found), limit)
    if not items:
        raise UnavailableError(f"{benchmark.name}: {origin} holds no question of the benchmark; check that it is the right data")
    return LoadedBenchmark(items, origin, revision, tuple(unreadable))


def unique(items: Iterable[Item]) -> tuple[Item, ...]:
    """The items with `~2`, `~3`, ... behind an id that was there before."""
    seen: dict[str, int] = {}
    result = []
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
        result.append(item if seen[item.id] == 1 else replace(item, id=f"{item.id}~{seen[item.id]}"))
    return tuple(result)


def limited(items: tuple[Item, ...], limit: int | None) -> tuple[Item, ...]:
    """The first items, at most `limit`; items that are scored together come whole, one group at least."""
    if limit is None or len(items) <= limit:
        return items
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(next((str(item.facts[name]) for name in _GROUPS if name in item.facts), item.id), []).append(item)
    taken: list[Item] = []
    for group in groups.values():
        if taken and len(taken) + len(group) > limit:
            break
        taken += group
    return tuple(taken)


def _adapted(benchmark: Benchmark, row: DatasetRow) -> tuple[Item, ...]:
    if benchmark.name == _SUBTITLES and not row.has("subtitles") and row.has("videoID"):
        row = replace(row, data={**row.data, "subtitles": _subtitles(row)})
    return benchmark.adapter(row)


def _subtitles(row: DatasetRow) -> str:
    """The row's file of subtitles, "" for a clip without; UnavailableError where there are none at all."""
    if not _has_subtitles(row.folder):
        raise UnavailableError(
            f"{row.benchmark}: there is no file {row.folder / 'subtitle'}/<videoID>.srt; unpack the subtitles of the set there, or "
            "leave the benchmark out"
        )
    path = row.path("videoID", f"subtitle/{row.text('videoID')}.srt")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@lru_cache(maxsize=4)
def _has_subtitles(folder: Path) -> bool:
    return any((folder / "subtitle").glob("*.srt"))


def _file_rows(benchmark: Benchmark, data: Path, clips: Path) -> tuple[Iterator[DatasetRow], str]:
    path = next((file for ending in _ENDINGS if (file := data / f"{benchmark.name}{ending}").is_file()), None)
    if path is None:
        names = ", ".join(f"{benchmark.name}{ending}" for ending in _ENDINGS)
        raise UnavailableError(f"{benchmark.name}: {data} has none of {names}; put the rows there, or leave the benchmark out")
    folder = clips if benchmark.family == "video" else data

    def rows() -> Iterator[DatasetRow]:
        for number, value in READERS[path.suffix](path):
            if not isinstance(value, Mapping):
                raise DataError(f"{benchmark.name}, row {number}: is no object with fields ({path})")
            config, split = (str(value.get(name) or "") for name in (_CONFIG, _SPLIT))
            yield DatasetRow(benchmark.name, number, value, config, split, folder)

    return rows(), str(path)


def _placed(item: Item, benchmark: Benchmark, folder: Path, store: Path | None) -> Item:
    """The item with media that are there: bytes in files, clips where they are, a folder of frames as frames."""
    keep: Callable[[Media], Media] = partial(_kept, benchmark=benchmark, folder=folder, store=store)
    images, frames = tuple(map(keep, item.images)), tuple(map(keep, item.frames))
    if item.video is None:
        return replace(item, images=images, frames=frames)
    video = _found(item.video, benchmark, folder)
    if video.is_dir():
        frames = tuple(sorted(path for path in video.iterdir() if path.suffix.lower() in PICTURES))
        if not frames:
            raise UnavailableError(f"{benchmark.name}: {video} holds no pictures; unpack the clips again")
        return replace(item, images=images, frames=_part_of(item, frames), video=None)
    # The parts of MVBench's branch `video` are cut already.
    clip = None if video.parent.name.endswith(_CUT) else item.clip
    return replace(item, images=images, frames=frames, video=video, clip=clip)


def _part_of(item: Item, frames: tuple[Media, ...]) -> tuple[Media, ...]:
    """The pictures of the part that belongs to the question; the last one where the clip ends before it. DataError without a rate."""
    if item.clip is None:
        return frames
    if not item.rate:
        raise DataError(
            f"{item.benchmark}, question {item.id!r}: is about a part of a clip ({item.clip[0]} to {item.clip[1]} s) that is a folder of "
            "pictures; say how many a second in the field fps"
        )
    first, last = (round(second * item.rate) for second in item.clip)
    return frames[first : last + 1] or frames[-1:]


def _kept(media: Media, *, benchmark: Benchmark, folder: Path, store: Path | None) -> Media:
    if isinstance(media, Path):
        return _found(media, benchmark, folder)
    if store is None:
        return media
    path = store / f"{hashlib.sha256(media).hexdigest()}.img"
    if not path.exists():
        store.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        half.write_bytes(media)
        half.replace(path)
    return path


def _found(path: Path, benchmark: Benchmark, folder: Path) -> Path:
    """The path, or the only one of its name below the folder: archives differ in how they are unpacked."""
    if path.exists():
        return path
    same = _by_name(folder).get(path.name, []) if folder != Path() else []
    if len(same) != 1:
        why = f"{len(same)} files below {folder} have its name" if same else f"nor is there a file of its name below {folder}"
        raise UnavailableError(f"{benchmark.name}: {path} does not exist, {why}; unpack the pictures and clips of the set there")
    return same[0]


@lru_cache(maxsize=4)
def _by_name(folder: Path) -> Mapping[str, list[Path]]:
    """Everything below a folder by its name, looked through once: there may be thousands of clips."""
    names: dict[str, list[Path]] = {}
    for path in folder.rglob("*"):
        names.setdefault(path.name, []).append(path)
    return names
