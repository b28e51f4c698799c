"""Items of a benchmark, from its rows on the Hugging Face hub or in a folder."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

from zppo.core.draws import draw_key
from zppo.data.local_files import READERS
from zppo.errors import DataError, UnavailableError, one_line
from zppo.evals.adapters.row import PICTURES, DatasetRow
from zppo.evals.benchmark import Benchmark, HubDataset
from zppo.evals.clips.places import find_file, look_again
from zppo.evals.item import Item, Media
from zppo.names import check_file


def source_rows(benchmark: Benchmark, source: HubDataset, clips: Path) -> Iterator[DatasetRow]:
    """The rows of one set of the hub. UnavailableError where a part of it cannot be had: nothing of it is mixed with a copy."""
    parts = [(config, split, _part(benchmark, source, config, split)) for config in source.configs for split in source.splits]
    records = ((config, split, record) for config, split, part in parts for record in part)
    return (
        DatasetRow(benchmark.name, number, record, config, split, clips, trusted=True)
        for number, (config, split, record) in enumerate(records, 1)
    )


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
    others = [f"{copy.id} (split {copy.splits[0]})" if copy.id == source.id else copy.id for copy in benchmark.also if copy != source]
    copies = f", nor can {' or '.join(others)}" if others else ""
    return f"{what}{copies}; see {page}, check the network, or bring the rows in a folder"


def _commit(source: HubDataset) -> str:
    """The commit that the hub has under the revision; "" where it cannot be asked."""
    import huggingface_hub

    from zppo.http_client import hub_trouble

    hub_trouble()  # where it does not answer, a copy of the set is loaded at once
    try:
        return str(huggingface_hub.HfApi().dataset_info(source.id, revision=source.revision).sha or "")
    except Exception:  # offline with a copy of the set: it loads all the same
        return source.revision or ""


_ENDINGS = (".jsonl", ".parquet", ".json")
_CONFIG, _SPLIT = "_config", "_split"
_GROUPS = ("seed", "problem")
# What of an item's facts says its task, the first that it has.
_TASKS = (
    "axis", "part", "task", "task_type", "version", "type", "category", "subject", "domain", "discipline", "relation", "capability",
    "answer_type",
)  # fmt: skip
_SUBTITLES = "VMMES"
_CUT = "segment"  # how folders end whose clips are parts
_UNREADABLE = 0.01  # of the rows: so many may be left out since they cannot be read, rounded up
_MISSING = 0.1  # of the questions: so many since their clips or pictures are not there, rounded up; MVBench's NTU clips are 0.05


@dataclass(frozen=True, slots=True)
class LoadedBenchmark:
    """The items of a benchmark and where they come from.

    Attributes:
        items: in the order of the data set, ids unique.
        origin: a file, or owner/name of a set on the hub.
        revision: the commit of that set; "" for a file, or where the hub did not say.
        unreadable: what is wrong with each record that cannot be read; these are left out.
        missing: the same for questions whose clip or picture is not there, or is one of several of its name.
    """

    items: tuple[Item, ...]
    origin: str
    revision: str
    unreadable: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def load_items(
    benchmark: Benchmark, data: Path | None = None, *, clips: Path | None = None, store: Path | None = None, limit: int | None = None
) -> LoadedBenchmark:
    """All items of a benchmark, or `limit` of them, spread over its configurations and tasks by `draw_items`.

    Args:
        benchmark: a row of the registry.
        data: a folder with `<name>.jsonl`, `.parquet` or `.json`, in the data set's own schema, instead of the hub. Paths of pictures and
            clips in it are relative to the folder. A row may say its configuration and split in `_config` and `_split`.
        clips: where the clips of video benchmarks are, unpacked; the hub has them as archives. With `data` that folder by default.
            Subtitles are in `subtitle/<videoID>.srt` below it.
        store: a folder for pictures that come as bytes; items then hold their paths, and the pictures no memory.
        limit: at most so many; of DynaMath and We-Math whole groups of questions, since they are scored together, and one at least.

    Raises:
        UnavailableError: the data cannot be had: said and skipped, never scored 0. So are more than one question in ten, rounded up, whose
            clip or picture is missing.
        DataError: more than one row in a hundred, rounded up, cannot be read; the message names benchmark, row and field of the first.
    """
    if benchmark.reader is not None:
        reader = benchmark.reader
        return _loaded(benchmark, lambda: (reader(), benchmark.source.id), "", store, limit)
    if data is not None:
        return _loaded(benchmark, lambda: _file_rows(benchmark, data, clips or data), "", store, limit)
    if benchmark.family == "video" and clips is None:
        raise UnavailableError(
            f"{benchmark.name}: its clips are archives at https://huggingface.co/datasets/{benchmark.source.id}; bring and unpack them "
            f"with zppo eval fetch {benchmark.name}, and name their folder with --clips"
        )
    errors: list[DataError] = []
    for source in (benchmark.source, *benchmark.also):  # a copy where the set cannot be had, or its rows cannot be read
        try:
            return _loaded(benchmark, partial(_source, benchmark, source, clips or Path()), _commit(source), store, limit)
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _source(benchmark: Benchmark, source: HubDataset, clips: Path) -> tuple[Iterator[DatasetRow], str]:
    return source_rows(benchmark, source, clips), source.id


def _loaded(
    benchmark: Benchmark, read: Callable[[], tuple[Iterator[DatasetRow], str]], revision: str, store: Path | None, limit: int | None
) -> LoadedBenchmark:
    """All items of what `read` gives, which is rows and their origin, or `limit` of them: then it is read twice."""
    look_again()
    wanted = None if limit is None else _drawn(read()[0], benchmark, limit)
    rows, origin = read()
    found: list[Item] = []
    seen = asked = 0
    unreadable: list[str] = []
    missing: list[str] = []
    counts: Counter[str] = Counter()
    for row in rows:
        seen += 1
        try:
            items = [unique(item, counts) for item in _adapted(benchmark, row)]
            for item in items:
                if wanted is not None and item.id not in wanted:
                    continue
                asked += 1
                try:
                    found.append(_placed(item, row.folder, store))
                except UnavailableError as error:
                    missing.append(str(error))
        except UnavailableError:
            raise
        except DataError as error:
            unreadable.append(str(error))
    if len(unreadable) > math.ceil(seen * _UNREADABLE) or (unreadable and not found and not missing):
        raise DataError(f"{unreadable[0]} ({len(unreadable):,} of {seen:,} rows cannot be read)")
    if len(missing) > math.ceil(asked * _MISSING) or (missing and not found):
        raise UnavailableError(f"{missing[0]} ({len(missing):,} of {asked:,} questions lack their clip or picture)")
    if not found:
        raise UnavailableError(f"{benchmark.name}: {origin} holds no question of the benchmark; check that it is the right data")
    return LoadedBenchmark(tuple(found), origin, revision, tuple(unreadable), tuple(missing))


def unique(item: Item, counts: Counter[str]) -> Item:
    """The item with `~2`, `~3`, ... behind an id that was there before, as `counts` has it."""
    counts[item.id] += 1
    return item if counts[item.id] == 1 else replace(item, id=f"{item.id}~{counts[item.id]}")


class Outline(NamedTuple):
    """What is known of an item when a part of the benchmark is drawn.

    Attributes:
        group: items of one group are scored together.
        part: configuration and task, over which a draw is spread.
    """

    id: str
    group: str
    part: str


def _drawn(rows: Iterable[DatasetRow], benchmark: Benchmark, limit: int) -> frozenset[str]:
    """Ids of `draw_items`. Pictures are not kept: the rows are read again for the drawn ones."""
    counts: Counter[str] = Counter()
    outlines = []
    for row in rows:
        try:
            items = [unique(item, counts) for item in _adapted(benchmark, row)]
        except UnavailableError:
            raise
        except DataError:  # it is said when the rows are read again
            continue
        for item in items:
            group = next((f"{name} {item.facts[name]}" for name in _GROUPS if name in item.facts), item.id)
            task = next((str(item.facts[name]) for name in _TASKS if item.facts.get(name)), "")
            outlines.append(Outline(item.id, group, f"{row.config}/{task}"))
    return draw_items(outlines, limit, benchmark.name)


def draw_items(outlines: Sequence[Outline], limit: int, key: str) -> frozenset[str]:
    """Ids of at most `limit` items, spread over the parts as evenly as it goes; whole groups, one at least.

    Parts and the groups in each come in an order that is drawn, keyed by their names; parts take turns. So a draw does not hang on the
    order of the rows, and holds every smaller one.

    Args:
        key: of the draw, the benchmark's name.
    """
    groups: dict[str, list[Outline]] = {}
    for outline in outlines:
        groups.setdefault(outline.group, []).append(outline)
    parts: dict[str, list[str]] = {}
    for name in sorted(groups, key=lambda group: draw_key("limit", key, "group", group)):
        parts.setdefault(groups[name][0].part, []).append(name)
    order = sorted(parts, key=lambda part: draw_key("limit", key, "part", part))
    taken: list[str] = []
    for name in (name for turn in zip_longest(*(parts[part] for part in order)) for name in turn if name is not None):
        if taken and len(taken) + len(groups[name]) > limit:
            break
        taken += [outline.id for outline in groups[name]]
    return frozenset(taken)


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
    check_file(path, DataError)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@lru_cache(maxsize=4)
def _has_subtitles(folder: Path) -> bool:
    return any((folder / "subtitle").glob("*.srt"))


def _file_rows(benchmark: Benchmark, data: Path, clips: Path) -> tuple[Iterator[DatasetRow], str]:
    path = next((file for ending in _ENDINGS if (file := data / f"{benchmark.name}{ending}").is_file()), None)
    if path is None:
        names = ", ".join(f"{benchmark.name}{ending}" for ending in _ENDINGS)
        raise UnavailableError(f"{benchmark.name}: {data} has none of {names}; put the rows there, or leave the benchmark out")
    check_file(path, DataError)
    folder = clips if benchmark.family == "video" else data

    def rows() -> Iterator[DatasetRow]:
        for number, value in READERS[path.suffix](path):
            if not isinstance(value, Mapping):
                raise DataError(f"{benchmark.name}, row {number}: is no object with fields ({path})")
            config, split = (str(value.get(name) or "") for name in (_CONFIG, _SPLIT))
            yield DatasetRow(benchmark.name, number, value, config, split, folder)

    return rows(), str(path)


def _placed(item: Item, folder: Path, store: Path | None) -> Item:
    """The item with media that are there: bytes in files, clips where they are, a folder of frames as frames."""
    keep: Callable[[Media], Media] = partial(_kept, item=item, folder=folder, store=store)
    images, frames = tuple(map(keep, item.images)), tuple(map(keep, item.frames))
    if item.video is None:
        return replace(item, images=images, frames=frames)
    video = _found(item.video, item, folder)
    if video.is_dir():
        frames = tuple(sorted(path for path in video.iterdir() if path.suffix.lower() in PICTURES))
        if not frames:
            raise UnavailableError(f"{item.benchmark}: {video} holds no pictures; unpack the clips again")
        return replace(item, images=images, frames=_part_of(item, frames), video=None)
    # The parts of MVBench's branch `video` are cut already.
    clip = None if video.parent.name.endswith(_CUT) else item.clip
    return replace(item, images=images, frames=frames, video=video, clip=clip)


def _found(path: Path, item: Item, folder: Path) -> Path:
    clip = path == item.video
    try:
        return find_file(path, folder, item.places if clip else ())
    except UnavailableError as error:
        how = f" (zppo eval fetch {item.benchmark})" if clip else ""
        raise UnavailableError(f"{item.benchmark}: {error}; unpack the pictures and clips of the set there{how}") from None


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


def _kept(media: Media, *, item: Item, folder: Path, store: Path | None) -> Media:
    if isinstance(media, Path):
        return _found(media, item, folder)
    if store is None:
        return media
    path = store / f"{hashlib.sha256(media).hexdigest()}.img"
    if not path.exists():
        store.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        half.write_bytes(media)
        half.replace(path)
    return path
