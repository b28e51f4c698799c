"""The parquet files of a source: of the hub, one at a time on the disk, or of a local copy of its folder."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from zppo.data.corpora.mapping import CorpusColumns, CorpusSource, Names
from zppo.errors import DataError, StorageError, one_line
from zppo.names import check_file

BATCH = 32
"""Rows that are held at once; with pictures in them they are large."""

_BUFFER = 1 << 20  # of a column that is read; without one pyarrow holds the whole column of a row group
_FOOTERS_AT_ONCE = 8
_ENDING = ".parquet"
_SHOWN = 12
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)  # other errors of a download are the network's


class Shard(NamedTuple):
    """One parquet file of a source.

    Attributes:
        path: in the source's folder or repository.
        rows: how many it has.
        columns: its top-level columns.
        names: how many rows each sub-set name has, where the file's statistics tell; None where rows must be read for it.
    """

    path: str
    rows: int
    columns: tuple[str, ...]
    names: dict[str, int] | None


class Shelf(Protocol):
    """Where the files of a source lie."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def revision(self) -> str:
        """The commit on the hub; "" for a folder."""

    def paths(self) -> list[str]:
        """All parquet files, sorted."""

    def footer(self, path: str) -> Any:
        """What the end of a file says of it (`pyarrow.parquet.FileMetaData`)."""

    def fetched(self, path: str) -> Any:
        """A context in which the file lies on this machine."""


class LocalShelf:
    """A copy of the set in a folder, laid out in any way, or in one file."""

    revision = ""

    def __init__(self, folder: Path) -> None:
        self.where, self._folder, self._paths = str(folder), folder, []
        if folder.is_file():
            self._folder, self._paths = folder.parent, [folder.name]
        elif not folder.is_dir():
            raise DataError(f"{folder}: is no folder; name the folder that a copy of the set lies in")

    def paths(self) -> list[str]:
        if self._paths:
            return self._paths
        found = (p for p in self._folder.rglob(f"*{_ENDING}") if p.is_file() and not p.name.startswith("."))
        return sorted(p.relative_to(self._folder).as_posix() for p in found)

    def footer(self, path: str) -> Any:
        import pyarrow.parquet as pq

        check_file(self._folder / path, DataError)
        return pq.read_metadata(self._folder / path)

    @contextmanager
    def fetched(self, path: str) -> Iterator[Path]:
        yield self._folder / path


class HubShelf:
    """A data set of the Hugging Face hub, of one commit. A file lies in `scratch` while it is read, unless the user's cache has it.

    Raises:
        DataError: no such set or revision, one that needs a log-in, or no network.
    """

    def __init__(self, repository: str, revision: str, scratch: Path) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        from zppo.http_client import hub_trouble

        self.where, self._repository, self._scratch = f"hub:{repository}", repository, scratch
        unreached = hub_trouble()
        try:
            info = HfApi().dataset_info(repository, revision=revision)
        except Exception as error:  # many kinds, by what is missing
            page = f"https://huggingface.co/datasets/{repository}"
            why = unreached if isinstance(error, OfflineModeIsEnabled) else f"{type(error).__name__}: {one_line(error)}"
            raise DataError(
                f"hub:{repository}, revision {revision!r}: cannot be had ({why}); look at {page}, run "
                "`hf auth login` where it wants one, or name a local copy"
            ) from error
        self.revision = str(info.sha or revision)
        self._paths = sorted(s.rfilename for s in info.siblings or () if s.rfilename.endswith(_ENDING))

    def paths(self) -> list[str]:
        return self._paths

    def footer(self, path: str) -> Any:
        import pyarrow.parquet as pq
        from huggingface_hub import HfFileSystem

        with HfFileSystem().open(f"datasets/{self._repository}@{self.revision}/{path}", "rb", block_size=_BUFFER) as file:
            return pq.read_metadata(file)

    @contextmanager
    def fetched(self, path: str) -> Iterator[Path]:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(self._repository, path, revision=self.revision, repo_type="dataset")
        if isinstance(cached, str):
            yield Path(cached)
            return
        try:
            got = hf_hub_download(self._repository, path, revision=self.revision, repo_type="dataset", local_dir=self._scratch)
        except Exception as error:  # as many kinds as a network has
            if isinstance(error, OSError) and error.errno in _DISK:
                raise StorageError(f"{self._scratch / path} cannot be written ({error.strerror}): make space, then go on") from error
            raise DataError(
                f"{self.where}, {path}: cannot be downloaded ({type(error).__name__}: {one_line(error)}); the same command goes on"
            ) from error
        try:
            yield Path(got)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)


def list_shards(shelf: Shelf, source: CorpusSource, say: Callable[[str], None]) -> list[Shard]:
    """The files of a source, in the order of their names; every file's columns are looked at before a row is read.

    Raises:
        DataError: there are none, one cannot be read, or one lacks a column that the mapping needs.
    """
    paths = [path for path in shelf.paths() if not _left_out(path, source.leave_out)]
    if not paths:
        raise DataError(
            f"{shelf.where}: has no parquet files that are not left out ({', '.join(source.leave_out) or 'none is'}); name the folder that "
            "was downloaded, or write the rows as parquet"
        )
    say(f"{shelf.where}{'@' + shelf.revision[:12] if shelf.revision else ''}: {len(paths):,} files")
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return list(pool.map(lambda path: _shard(shelf, path, source), paths))


def _left_out(path: str, patterns: Names) -> bool:
    return any(fnmatchcase(part, pattern) for part in PurePosixPath(path).parts for pattern in patterns)


def _shard(shelf: Shelf, path: str, source: CorpusSource) -> Shard:
    try:
        footer = shelf.footer(path)
        schema = footer.schema.to_arrow_schema()
    except DataError:
        raise
    except Exception as error:  # broken files fail in many ways
        mend = "try again" if shelf.revision else "download it again"
        raise DataError(f"{shelf.where}, {path}: cannot be read as parquet ({type(error).__name__}: {one_line(error)}); {mend}") from error
    columns = source.columns
    for name, wanted in needed(columns).items():
        if not any(_has(schema, column) for column in wanted):
            have = ", ".join(schema.names[:_SHOWN])
            raise DataError(
                f"{shelf.where}, {path}: has no column {' or '.join(map(repr, wanted))} ({name}); it has {have}. Name the right one in "
                "columns of a mapping of your own (--mapping)"
            )
    return Shard(path, footer.num_rows, tuple(schema.names), _names_of(footer, columns.subset))


def needed(columns: CorpusColumns) -> dict[str, Names]:
    """The columns without which a file is of no use; those that the mapping names, but for ids and kinds of answers."""
    found = {"subset": columns.subset, "question": columns.question, "answer": columns.answer, "images": columns.images}
    return found | ({"pass_rate": columns.pass_rate} if columns.pass_rate else {})


def _has(schema: Any, column: str) -> bool:
    """Whether a column is there; what lies within an object that is JSON text shows only when it is read."""
    import pyarrow as pa

    root, _, rest = column.partition(".")
    if column in schema.names:
        return True
    if root not in schema.names:
        return False
    kind = schema.field(root).type
    while rest and pa.types.is_struct(kind):
        part, _, rest = rest.partition(".")
        if kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def _names_of(footer: Any, subset: Names) -> dict[str, int] | None:
    """Rows by the name of their sub-set, where each row group's statistics say that it holds one name alone."""
    counts: Counter[str] = Counter()
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        by_path = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        facts = next((by_path[name] for name in subset if name in by_path), None)
        stats = facts.statistics if facts is not None else None
        if stats is None or not stats.has_min_max or stats.null_count or stats.min != stats.max or not isinstance(stats.min, str):
            return None
        counts[stats.min] += group.num_rows
    return dict(counts)


def roots(columns: CorpusColumns, have: Sequence[str]) -> list[str]:
    """The top-level columns of a file that are read."""
    wanted = {*columns.subset, *columns.question, *columns.answer, *columns.images, *columns.id, *columns.kind, *columns.pass_rate}
    return [name for name in have if name in wanted or any(column.startswith(f"{name}.") for column in wanted)]


def batches(path: Path, columns: Sequence[str], start: int) -> Iterator[tuple[int, Any]]:
    """(number of its first row, a record batch of at most `BATCH` rows) from row `start` on; memory does not grow with row groups.

    Raises:
        DataError: the file is broken further in.
    """
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:
                    row += rows
                    continue
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=list(columns), use_threads=False):
                    skip = min(max(start - row, 0), batch.num_rows)
                    if skip < batch.num_rows:
                        yield row + skip, batch.slice(skip)
                    row += batch.num_rows
    except Exception as error:
        if isinstance(error, DataError | StorageError | MemoryError):
            raise
        import pyarrow as pa

        if not isinstance(error, pa.ArrowException | OSError):
            raise
        raise DataError(f"{path}, after row {row}: cannot be read as parquet ({one_line(error)}); download it again") from error


def forget(scratch: Path) -> None:
    """Removes what a download left."""
    with suppress(OSError):
        shutil.rmtree(scratch)
