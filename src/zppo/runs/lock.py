"""One process trains into a run folder at a time.

Who does stands in `lock.json`, and the system's own lock on that file says whether it lives. A record lock of POSIX goes with its process,
however that ends, and a forked helper does not inherit it. File systems of several machines may not pass it on; so the holder also touches
the file again and again, and what another machine has written is watched before it counts as left.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zppo.errors import CheckpointError
from zppo.runs.files import LOCK, writing

TOUCH_SECONDS = 10.0
WATCH_SECONDS = 60.0
"""So long a lock of another machine is watched; longer than a process that lives needs to touch it."""

_held: set[Path] = set()  # by this process, which its own record locks do not keep out


@contextmanager
def locked(run: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of an existing run folder.

    Args:
        say: called where a lock is taken over from a process that is gone, and where one is watched.

    Raises:
        CheckpointError: another process trains into the folder; the message says which.
        StorageError: the lock cannot be written.
    """
    path = (run / LOCK).resolve()
    if path in _held:
        raise CheckpointError(_words(run, {"host": socket.gethostname(), "pid": os.getpid()}))
    with writing(path):
        handle = _take(run, path, say)
    _held.add(path)
    done = threading.Event()
    threading.Thread(target=_touch, args=(handle, done), name="lock", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        _held.discard(path)
        with suppress(OSError):
            path.unlink()  # before it is let go: who waits for it sees that it is gone
        os.close(handle)


def _take(run: Path, path: Path, say: Callable[[str], None]) -> int:
    """The lock file, open and locked, with this process's name in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            alone = _lock(handle)
            holder = _read(handle)
            if not alone:
                raise CheckpointError(_words(run, holder))
            if os.fstat(handle).st_nlink == 0:  # its holder has ended meanwhile
                os.close(handle)
                continue
            if holder:
                if holder.get("host") != socket.gethostname():
                    _watch(run, handle, holder, say)
                say(f"{_name(holder)} trained into {run} and is gone: its lock is taken over")
            me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
            return handle
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise


def _lock(handle: int) -> bool:
    """Whether nobody else holds it; True too on a file system that has no locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _watch(run: Path, handle: int, holder: dict[str, Any], say: Callable[[str], None]) -> None:
    """Whether a process of another machine is still there. CheckpointError where it is."""
    before = os.fstat(handle).st_mtime_ns
    say(f"{run} was last trained by {_name(holder)}: for {WATCH_SECONDS:g} s it is watched whether that goes on")
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_SECONDS))
        if os.fstat(handle).st_mtime_ns != before or os.fstat(handle).st_nlink == 0:
            raise CheckpointError(_words(run, holder))


def _touch(handle: int, done: threading.Event) -> None:
    while not done.wait(TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(handle)


def _read(handle: int) -> dict[str, Any]:
    """Who has written it; empty where nobody has, or it was torn."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    since = holder.get("since")
    minutes = f", since {(time.time() - since) / 60:,.0f} min" if isinstance(since, int | float) else ""
    return f"process {holder.get('pid', '(unknown)')} on {holder.get('host', 'this machine')}{minutes}"


def _words(run: Path, holder: dict[str, Any]) -> str:
    return f"{run} is trained by {_name(holder)}, and two would spoil it: wait for its end, or stop it there (SIGTERM saves it)"
