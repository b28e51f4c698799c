"""What a build has come to, in one SQLite file: a build that is killed goes on from its last commit."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from zppo.data.corpora.fitting import CorpusRow
from zppo.errors import DataError, StorageError

STATE = "build.sqlite"
"""Its name in the corpus's folder; it is gone when the corpus is done."""

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (source TEXT, path TEXT, row INTEGER NOT NULL, PRIMARY KEY (source, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (source TEXT, subset TEXT, reason TEXT, n INTEGER NOT NULL, PRIMARY KEY (source, subset, reason))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS names (source TEXT, name TEXT, subset TEXT, n INTEGER NOT NULL, PRIMARY KEY (source, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (subset TEXT, key TEXT, PRIMARY KEY (subset, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drawn (
  subset TEXT, rank INTEGER, key TEXT, prompt TEXT, answer TEXT, answer_list TEXT, grading TEXT, source TEXT, source_id TEXT,
  pass_rate REAL, images TEXT, PRIMARY KEY (subset, rank, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_rank ON drawn (rank, subset, key);
CREATE TABLE IF NOT EXISTS pictures (path TEXT, subset TEXT, key TEXT, PRIMARY KEY (path, subset, key)) WITHOUT ROWID;
"""

ROW = "ROW"  # what counts are of: rows looked at; the others are reasons


class DrawnRow(NamedTuple):
    """A row of the corpus; `images` are paths in its folder."""

    subset: str
    rank: int
    key: str
    prompt: str
    answer: str
    answer_list: str | None
    grading: str
    source: str
    source_id: str
    pass_rate: float | None
    images: tuple[str, ...]


class DrawState:
    """The rows drawn so far and what was counted; changes count from `commit` on.

    Raises:
        DataError: another process builds into the folder.
        StorageError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        self._gone: set[str] = set()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.names: Counter[tuple[str, str, str]] = Counter()
        with _storing(self.path):
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=0)
            try:
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(_TABLES)
                self._db.execute("BEGIN IMMEDIATE")
            except BaseException:
                self._db.close()
                raise
        self._drawn: Counter[str] = Counter(dict(self._db.execute("SELECT subset, count(*) FROM drawn GROUP BY subset")))

    def close(self) -> None:
        """Leaves what was not committed behind."""
        self._db.close()

    @staticmethod
    def remove(folder: Path) -> None:
        """Removes the state of a build that is done; a kill may leave SQLite's journal beside it."""
        for name in (STATE, f"{STATE}-journal"):
            (folder / name).unlink(missing_ok=True)

    def fact(self, name: str) -> Any:
        """A value that `keep_fact` kept; None where there is none."""
        found = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def keep_fact(self, name: str, value: Any) -> None:
        """Keeps a value of JSON, at once; before rows are looked at."""
        with _storing(self.path):
            self._db.execute("REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))
            self._db.execute("COMMIT")
            self._db.execute("BEGIN IMMEDIATE")

    def row_of(self, source: str, path: str) -> int:
        """So many rows of a file have been looked at."""
        found = self._db.execute("SELECT row FROM shards WHERE source = ? AND path = ?", (source, path)).fetchone()
        return 0 if found is None else int(found[0])

    def commit(self, source: str, path: str, row: int) -> list[str]:
        """All that has happened up to a row of a file; pictures that nothing refers to any more are returned, to be removed."""
        with _storing(self.path):
            for (of, subset, reason), n in self.counts.items():
                self._db.execute(
                    "INSERT INTO counts VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n", (of, subset, reason, n)
                )
            for (of, name, subset), n in self.names.items():
                self._db.execute(
                    "INSERT INTO names VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n", (of, name, subset, n)
                )
            self._db.execute("REPLACE INTO shards VALUES (?, ?, ?)", (source, path, row))
            self._db.execute("COMMIT")
            self._db.execute("BEGIN IMMEDIATE")
        self.counts.clear()
        self.names.clear()
        gone = [path for path in sorted(self._gone) if not self.refers_to(path)]
        self._gone.clear()
        return gone

    def is_new(self, subset: str, key: str) -> bool:
        """Whether a question with its pictures has not been seen in the sub-set; from now on it has."""
        with _storing(self.path):
            return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (subset, key)).rowcount == 1

    def takes(self, row: CorpusRow, cap: int) -> bool:
        """Whether the draw takes a row, as far as rows have been seen."""
        if self._drawn[row.subset] < cap:
            return True
        last = self._db.execute("SELECT max(rank) FROM drawn WHERE subset = ?", (row.subset,)).fetchone()
        return bool(row.rank < last[0])

    def add(self, row: CorpusRow, images: tuple[str, ...], cap: int) -> None:
        """Takes a row into the draw; where the sub-set is full, the row of the highest rank leaves it."""
        values = row.subset, row.rank, row.key, row.prompt, row.answer, row.answer_list, row.grading, row.source, row.source_id
        with _storing(self.path):
            self._db.execute(f"INSERT INTO drawn VALUES ({','.join('?' * 11)})", (*values, row.pass_rate, json.dumps(images)))
            self._db.executemany("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?)", [(path, row.subset, row.key) for path in images])
            self._drawn[row.subset] += 1
            if self._drawn[row.subset] > cap:
                subset, rank, key, given = self._db.execute(
                    "SELECT subset, rank, key, images FROM drawn WHERE subset = ? ORDER BY rank DESC, key DESC LIMIT 1", (row.subset,)
                ).fetchone()
                self._db.execute("DELETE FROM drawn WHERE subset = ? AND rank = ? AND key = ?", (subset, rank, key))
                left = json.loads(given)
                self._db.executemany("DELETE FROM pictures WHERE path = ? AND subset = ? AND key = ?", [(p, subset, key) for p in left])
                self._drawn[row.subset] -= 1
                self._gone.update(left)

    def refers_to(self, path: str) -> bool:
        """Whether a row of the draw has the picture."""
        return self._db.execute("SELECT 1 FROM pictures WHERE path = ?", (path,)).fetchone() is not None

    def rows(self) -> Iterator[DrawnRow]:
        """The rows of the corpus by rank: the first of them are a draw over all sub-sets."""
        for values in self._db.execute("SELECT * FROM drawn ORDER BY rank, subset, key"):
            yield DrawnRow._make((*values[:-1], tuple(json.loads(values[-1]))))

    def pictures(self) -> Iterator[str]:
        """The pictures of the corpus."""
        return (path for (path,) in self._db.execute("SELECT DISTINCT path FROM pictures"))

    def counted(self) -> dict[tuple[str, str, str], int]:
        """(source, sub-set, `ROW` or reason) -> rows."""
        return {(source, subset, reason): n for source, subset, reason, n in self._db.execute("SELECT * FROM counts")}

    def named(self) -> list[tuple[str, str, str, int]]:
        """(source, its name of a sub-set, the canonical one or "", rows), most rows first."""
        return list(self._db.execute("SELECT source, name, subset, n FROM names ORDER BY n DESC, source, name"))

    def drawn(self, column: str) -> dict[str, int]:
        """How many rows of the corpus have each value of `subset` or `grading`."""
        return dict(self._db.execute(f"SELECT {column}, count(*) FROM drawn GROUP BY {column}"))


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        said = str(error)
        if "locked" in said:
            raise DataError(f"{path.parent}: another process builds a corpus there; wait for it, or name another folder") from error
        if "malformed" in said or "not a database" in said:
            raise DataError(f"{path} is damaged ({said}); remove {path.parent} and build again") from error
        raise StorageError(f"{path} cannot be written ({said}): make space or the folder writable; the same command goes on") from error
