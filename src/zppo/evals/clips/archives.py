"""Unpacking archives of clips. An archive is hostile input: nothing of it is written outside the folder, nor more than it may hold."""

from __future__ import annotations

import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from zppo.errors import DataError, StorageError, one_line
from zppo.evals.adapters.row import PICTURES
from zppo.evals.clips.places import CLIPS
from zppo.names import check_file

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
WANTED = CLIPS | PICTURES | {".srt"}
"""Endings of what is written; the rest of an archive is left in it."""
_CHUNK = 1 << 20


class ArchiveLimits(NamedTuple):
    """The most that an archive may unpack to: clips are compressed already, and an archive of them is hardly larger unpacked.

    Attributes:
        files: entries, of whatever kind.
        ratio: bytes for each byte of the archive.
        floor: bytes that any archive may have, subtitles being text.
    """

    files: int = 1_000_000
    ratio: float = 20.0
    floor: int = 1 << 26


class PackedFile(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


def is_archive(name: str) -> bool:
    """Whether a file is one by its name."""
    return name.lower().endswith(ARCHIVES)


def unpack(archive: Path, folder: Path, limits: ArchiveLimits | None = None) -> int:
    """Writes the clips, pictures and subtitles of an archive into a folder, each under its path there.

    A file that is there with the same size stays: an interrupted call goes on. Links, devices and everything with another ending are
    left out.

    Returns:
        How many files it holds.

    Raises:
        DataError: it cannot be read, an entry leads out of the folder, or it unpacks to more than an archive of clips can.
        StorageError: the folder cannot be written, or has no room.
    """
    check_file(archive, DataError)
    bounds = limits or ArchiveLimits()
    most = max(bounds.floor, int(archive.stat().st_size * bounds.ratio))
    written = count = 0
    try:
        for number, entry in enumerate(_entries(archive), 1):
            if number > bounds.files:
                raise DataError(f"{archive} has more than {bounds.files:,} entries; it is no archive of clips: look at it, and remove it")
            path = _inside(archive, folder, entry.name)
            if path is None:
                continue
            count += 1
            if path.is_file() and path.stat().st_size == entry.size:
                written += entry.size
            else:
                written += _write(archive, entry, path, most - written)
            if written > most:
                raise _too_large(archive, most)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _broken(archive, error) from error
    return count


def _entries(archive: Path) -> Iterator[PackedFile]:
    """The files of an archive in its order; no folders, links or devices."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                mode = info.external_attr >> 16
                if not info.is_dir() and mode & 0o170000 in (0, 0o100000):  # 0: made where there are no modes
                    yield PackedFile(info.filename, info.file_size, lambda info=info: packed.open(info))  # type: ignore[misc]
        return
    with tarfile.open(archive, "r|*") as stream:
        for member in stream:
            if member.isreg():
                yield PackedFile(member.name, member.size, lambda member=member: stream.extractfile(member))  # type: ignore[misc]


def _inside(archive: Path, folder: Path, name: str) -> Path | None:
    """Where an entry is written; None for one that is not wanted. DataError where it would lead out of the folder."""
    relative = PurePosixPath(name.replace("\\", "/"))
    if "\0" in name or relative.is_absolute() or ".." in relative.parts or ":" in name.partition("/")[0]:
        raise DataError(
            f"{archive} holds {name[:80]!r}, which leads out of the folder; it is no archive of clips: look at it, and remove it"
        )
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in relative.parts)
    if hidden or relative.suffix.lower() not in WANTED:
        return None
    path = folder.joinpath(*relative.parts)
    if not path.parent.resolve().is_relative_to(folder.resolve()):  # through a link that lies in the folder
        raise DataError(f"{archive} holds {name[:80]!r}, which leads out of {folder} through a link there; remove the link")
    return path


def _write(archive: Path, entry: PackedFile, path: Path, room: int) -> int:
    """Writes a file, no matter what its header says of its size; it has its name only when it is whole."""
    half = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < entry.size:
            raise StorageError(f"{path} cannot be written: it has {entry.size:,} bytes, and the disk has less room; name another folder")
        source = entry.open()
        if source is None:
            return 0
        with source, open(half, "wb") as out:
            try:
                written = _copied(archive, source, out, room)
            except BaseException:
                half.unlink()
                raise
        half.replace(path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} cannot be written ({error.strerror or error}); name another folder") from error
    return written


def _copied(archive: Path, source: IO[bytes], out: IO[bytes], room: int) -> int:
    written = 0
    while chunk := _read(archive, source):
        written += len(chunk)
        if written > room:
            raise _too_large(archive, room)
        out.write(chunk)
    return written


def _read(archive: Path, source: IO[bytes]) -> bytes:
    try:
        return source.read(_CHUNK)
    except OSError as error:  # of the archive, not of the disk that is written
        raise _broken(archive, error) from error


def _broken(archive: Path, error: Exception) -> DataError:
    return DataError(f"{archive} cannot be unpacked ({one_line(error)}); remove it, and fetch it again")


def _too_large(archive: Path, most: int) -> DataError:
    return DataError(f"{archive} unpacks to more than {most:,} bytes, which no archive of clips does: look at it, and remove it")
