"""What a checkpoint consists of: size and SHA-256 of every file, written with it and verified before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

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
    with ThreadPoolExecutor(THREADS) as pool:
        facts = dict(zip((p.relative_to(folder).as_posix() for p in paths), pool.map(_facts, paths), strict=True))
    return Manifest(files=facts).model_dump_json(indent=1)


def fault(folder: Path, needed: Iterable[str]) -> str | None:
    """What is wrong with a checkpoint's files, the first such thing, with the file's name; None for a whole one.

    Args:
        folder: the checkpoint. Everything in it may have been damaged, or made by somebody else.
        needed: files that it must have.
    """
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
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: _file_fault(folder, *item), manifest.files.items())
        return next((f for f in found if f is not None), None)


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
            return f"{name} has {size:,} bytes, and {wanted.size:,} were written"
        if _facts(folder / inside).sha256 != wanted.sha256:
            return f"{name} holds something else than was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None
