"""What was asked and answered, a line each, written when it happens: a repeated evaluation asks nothing twice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from zppo.errors import StorageError
from zppo.names import check_file


class Journal:
    """Replies by key, in a file that only grows. A last line that a crash has cut is dropped. Threads may share it.

    Only where a reply stands is kept in memory: replies of a benchmark may be gigabytes.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._places: dict[str, int] = {}
        check_file(path, StorageError)  # it would be cut to nothing as a torn one
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 - open for as long as the journal
            self._read()
        except OSError as error:
            raise self._failed(error) from error

    def _read(self) -> None:
        self._file.seek(0)
        place = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut")
                self._places[json.loads(line)["key"]] = place
            except (ValueError, KeyError, TypeError):
                if not line.endswith(b"\n"):
                    self._file.truncate(place)
                    break
            place += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply under a key, None where there is none."""
        with self._lock:
            if key not in self._places:
                return None
            self._file.seek(self._places[key])
            value: dict[str, Any] = json.loads(self._file.readline())["value"]
            return value

    def add(self, key: str, value: dict[str, Any]) -> None:
        """Keeps a reply; it is in the file when this returns."""
        line = json.dumps({"key": key, "value": value}).encode("ascii") + b"\n"
        try:
            with self._lock:
                self._places[key] = self._file.seek(0, 2)
                self._file.write(line)
                self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self._path} cannot be written ({error.strerror or error}): make space, or name another folder with --output")
