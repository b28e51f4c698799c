"""Writing so that nothing is lost: whole files or none, on the disk before they count, and clear words where the disk refuses.

What a checkpoint consists of: size and SHA-256 of every file, written with it and verified before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from zppo.errors import CheckpointError, SettingsError, StorageError, used_up
from zppo.names import check_file

Given = TypeVar("Given")
Result = TypeVar("Result")

PARTIAL = ".partial"
"""Suffix of what is being written; a killed run may leave it, and it is never read."""

_MENDS = {
    errno.ENOSPC: "Make space on that disk",
    errno.EDQUOT: "Make space in your quota on that disk",
    errno.EFBIG: "Raise the limit of file sizes (`ulimit -f`)",
    errno.EROFS: "Make that disk writable",
    errno.EACCES: "Make the folder writable",
    errno.EPERM: "Make the folder writable",
}
# Libraries that write from Rust or C++ hide the system's error in a text.
_OS_ERROR = re.compile(r"os error (\d+)")
_NO_SPACE = re.compile(r"no space left on device", re.IGNORECASE)
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|iostream error|file write failed")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a StorageError of what the disk refuses while `path` is written; other errors pass.

    Raises:
        StorageError: it names the path, the cause and the mend.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        found = _refused(error)
        if found is None:
            raise
        code, cause = found
        raise StorageError(f"{path} cannot be written: {cause}. {_MENDS.get(code, 'Look at that folder and its disk')}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, and onto the disk. StorageError where that fails; the old file stays then."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        except OSError:
            with suppress(OSError):
                partial.unlink()  # where the disk is full, the space is needed
            raise


def sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a rename never outlives what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(error: BaseException | None) -> tuple[int, str] | None:
    """The system's error number (0: unknown) and its words, where one is behind this error."""
    seen: set[int] = set()
    hidden = None
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        if isinstance(error, OSError) and error.errno:
            return error.errno, os.strerror(error.errno)
        if match := _OS_ERROR.search(text):
            return int(match[1]), os.strerror(int(match[1]))
        if _NO_SPACE.search(text):
            return errno.ENOSPC, os.strerror(errno.ENOSPC)
        if isinstance(error, OSError) or (isinstance(error, RuntimeError) and _TORCH_WRITER.search(text)):
            hidden = hidden or (0, text.splitlines()[0] if text else type(error).__name__)
        error = error.__cause__ or error.__context__
    return hidden


RECIPE = "recipe.yaml"
FINAL = "final"
"""The resolved recipe, in the run folder."""
WORDS = "words"
"""The user's own templates, in the run folder."""
LOCK = "lock.json"
"""Which process trains into the run folder."""


def check_output(run: Path) -> None:
    """Whether a run may be written to this folder.

    Raises:
        SettingsError: it holds a run already, or something else; it is a file, or below one; it cannot be written.
    """
    check_unclaimed(run)
    above = next((path for path in (run, *run.absolute().parents) if path.exists()), run)
    if not above.is_dir():
        raise SettingsError(f"{run} cannot be a run folder: {above} is a file; choose another one with --output=...")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SettingsError(f"{run} cannot be written: {above} is read-only for you; choose another one with --output=...")
    left = (f"{RECIPE}{PARTIAL}", WORDS, LOCK)  # by a run that was killed before it had a recipe
    if run.exists() and (not run.is_dir() or any(path.name not in left for path in run.iterdir())):
        raise SettingsError(f"{run} is not empty: choose a folder of its own for the run with --output=...")


def check_unclaimed(run: Path) -> None:
    """SettingsError where the folder holds a run already."""
    if (run / RECIPE).exists():
        raise SettingsError(f"{run} holds a run already: continue it with `zppo resume {run}`, or choose another folder with --output=...")


MANIFEST = "manifest.json"
THREADS = 4  # hashing lets go of the interpreter lock, so several large files are read side by side


class FileFacts(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """manifest.json: every other file of the checkpoint, by its path in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    files: dict[str, FileFacts]


def make_manifest(folder: Path) -> str:
    """The manifest of all files in a folder, as JSON."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    facts = dict(zip((p.relative_to(folder).as_posix() for p in paths), _side_by_side(_facts, paths), strict=True))
    return Manifest(files=facts).model_dump_json(indent=1)


def fault(folder: Path, needed: Iterable[str]) -> str | None:
    """What is wrong with a checkpoint's files, the first such thing, with the file's name; None for a whole one.

    Args:
        folder: the checkpoint. Everything in it may have been damaged, or come from elsewhere.
        needed: files that it must have.

    Raises:
        CheckpointError: a pointer of git-lfs lies in place of one: nothing is damaged, and `git lfs pull` brings it.
    """
    check_file(folder / MANIFEST, CheckpointError)
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except ValidationError as error:
        return f"{MANIFEST} is damaged ({error.errors()[0]['msg']})"
    for name in needed:
        if name not in manifest.files:
            return f"{MANIFEST} does not name {name}"
    found = _side_by_side(lambda item: _file_fault(folder, *item), manifest.files.items())
    return next((f for f in found if f is not None), None)


def _side_by_side(work: Callable[[Given], Result], items: Iterable[Given]) -> list[Result]:
    """In threads; one after the other where none can be started: a run that ends for want of them is saved all the same."""
    waiting = list(items)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(work, waiting))
    except RuntimeError as error:
        if not used_up(error):
            raise
    return [work(item) for item in waiting]


def _facts(path: Path) -> FileFacts:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileFacts(size=file.tell(), sha256=digest.hexdigest())


def _file_fault(folder: Path, name: str, wanted: FileFacts) -> str | None:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        return f"{MANIFEST} names a file outside of the checkpoint ({name!r})"
    try:
        size = (folder / inside).stat().st_size
        if size != wanted.size:
            check_file(folder / inside, CheckpointError)
            return f"{name} has {size:,} bytes, and {wanted.size:,} were written"
        if _facts(folder / inside).sha256 != wanted.sha256:
            return f"{name} holds something else than was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None
