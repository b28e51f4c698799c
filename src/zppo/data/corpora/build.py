"""Builds a corpus out of public sets: one pass over their files, a keyed draw under each cap, pictures by their digest.

The corpus is a function of the mapping and the sources alone. In each sub-set the rows of the lowest ranks are kept, and a rank is a keyed
draw over question and pictures, so the order in which rows come does not matter, nor where a build was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zppo.core.types import ImageRef, Message, Question
from zppo.data.corpora.build_manifest import MANIFEST, CorpusManifest, SourceFacts, card, manifest_of
from zppo.data.corpora.draw_state import ROW, STATE, DrawState
from zppo.data.corpora.fitting import (
    BROKEN_IMAGE,
    DUPLICATE,
    LONG_PROMPT,
    NO_TEXT,
    OTHER_SOURCE,
    UNLISTED,
    UNSHOWABLE,
    Cell,
    CorpusRow,
    MisfitError,
    fit_row,
    subset_name,
)
from zppo.data.corpora.mapping import CorpusMapping, CorpusSource
from zppo.data.corpora.shards import HubShelf, LocalShelf, Shard, Shelf, batches, forget, list_shards, roots
from zppo.errors import DataError, StorageError
from zppo.images.store import decode, keep

ROWS_FILE = "train.parquet"
PICTURES = "images"
_SCRATCH = "download.partial"
_PARTIAL = ".partial"
_COMMIT_ROWS = 500
_WRITE_ROWS = 4096
_OTHER = "another mapping or tokenizer"


@dataclass(frozen=True, slots=True)
class PromptLength:
    """Counts the tokens of a plain prompt, pictures and closing instruction included, as one model reads it.

    Attributes:
        model: its name, which the manifest repeats.
        tokens: of a question. DataError for one that the model cannot be shown.
    """

    model: str
    tokens: Callable[[Question], int]


@dataclass(frozen=True, slots=True)
class BuildDisplay:
    """Who is told how a build goes.

    Attributes:
        say: a line.
        step: rows looked at and rows in all.
    """

    say: Callable[[str], None] = lambda text: None
    step: Callable[[int, int], None] = lambda done, total: None


def build_corpus(
    mapping: CorpusMapping, out: Path, local: Mapping[str, Path], length: PromptLength | None = None, display: BuildDisplay | None = None
) -> CorpusManifest:
    """Builds the corpus in `out`, or goes on with a build that was stopped there.

    Args:
        out: gets train.parquet, images/, manifest.json and README.md; `data.train` may name it.
        local: source -> the folder of a copy; the others are taken from the hub, file by file.
        length: drops long prompts; None leaves that to the runs.

    Raises:
        DataError: a source cannot be read; the folder holds something else; another process builds there.
        StorageError: the folder cannot be written.
    """
    display = display or BuildDisplay()
    if unknown := [name for name in local if name not in mapping.sources]:
        raise DataError(f"{unknown[0]!r} is no source of the mapping; it has {', '.join(mapping.sources)}")
    asked = _asked(mapping, length)
    if (done := _finished(out, asked)) is not None:
        return done
    revisions: dict[str, str] = {}
    if (out / STATE).exists():  # one that goes on keeps to the commits that it was begun with
        with closing(DrawState(out)) as state:
            _check_same(state, "asked", asked, out, _OTHER)
            revisions = state.fact("revisions") or {}
    # All sources are opened, and the columns of all files looked at, before anything is written.
    opened = {name: _open_source(mapping, name, local, revisions, out / _SCRATCH, display) for name in mapping.sources}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror}): name another folder with --out") from error
    with closing(DrawState(out)) as state:
        _check_same(state, "asked", asked, out, _OTHER)
        _check_same(state, "revisions", {name: shelf.revision for name, (shelf, _) in opened.items()}, out, "other copies of the sources")
        for name, (_, shards) in opened.items():
            _check_same(state, f"files {name}", [[shard.path, shard.rows] for shard in shards], out, f"other files of {name}")
        build = _Build(mapping, out, state, length, display, opened)
        for name in mapping.sources:
            build.read(name)
        manifest = build.finish(asked)
    DrawState.remove(out)
    return manifest


def _open_source(
    mapping: CorpusMapping, name: str, local: Mapping[str, Path], revisions: Mapping[str, str], scratch: Path, display: BuildDisplay
) -> tuple[Shelf, list[Shard]]:
    source = mapping.sources[name]
    shelf: Shelf = (
        LocalShelf(local[name]) if name in local else HubShelf(source.repository, revisions.get(name) or source.revision, scratch)
    )
    return shelf, list_shards(shelf, source, display.say)


def _asked(mapping: CorpusMapping, length: PromptLength | None) -> dict[str, Any]:
    """What makes a corpus, besides its sources; their revisions may be names that move."""
    asked = mapping.model_dump(mode="json", exclude={"paper"})
    return {"mapping": asked, "tokenizer": length.model if length else None}


def _check_same(state: DrawState, name: str, now: Any, out: Path, what: str) -> None:
    before = state.fact(name)
    if before is None:
        state.keep_fact(name, now)
    elif before != json.loads(json.dumps(now)):
        raise DataError(f"{out}: a build was begun there with {what}; go on with those, or name another folder")


def _finished(out: Path, asked: dict[str, Any]) -> CorpusManifest | None:
    """The manifest of a corpus that is done; None where there is none yet."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise DataError(f"{out}: is a file; name a folder for the corpus with --out")
    if not (out / MANIFEST).exists():
        if any(out.iterdir()) and not (out / STATE).exists():
            raise DataError(f"{out}: is not empty; name a folder of its own for the corpus with --out")
        return None
    manifest = CorpusManifest.read(out / MANIFEST)
    if manifest.asked != json.loads(json.dumps(asked)):
        raise DataError(f"{out}: holds a corpus that was built with another mapping or tokenizer; name another folder with --out")
    if not (out / ROWS_FILE).is_file():
        raise DataError(f"{out}: has a {MANIFEST} and no {ROWS_FILE}; remove the folder and build again")
    DrawState.remove(out)  # of a build that was killed at its very end
    return manifest


class _Build:
    def __init__(
        self,
        mapping: CorpusMapping,
        out: Path,
        state: DrawState,
        length: PromptLength | None,
        display: BuildDisplay,
        opened: Mapping[str, tuple[Shelf, list[Shard]]],
    ) -> None:
        self._mapping, self._out, self._state, self._length, self._display = mapping, out, state, length, display
        self._opened = opened
        self._done, self._total = 0, sum(shard.rows for _, shards in opened.values() for shard in shards)

    def read(self, name: str) -> None:
        """Goes over a source from where it was left."""
        shelf, shards = self._opened[name]
        source = self._mapping.sources[name]
        for shard in shards:
            start = self._state.row_of(name, shard.path)
            self._step(start)
            if start < shard.rows and not self._skip(name, source, shard):
                with shelf.fetched(shard.path) as path:
                    self._read_shard(name, source, shard, path, start)

    def _step(self, rows: int) -> None:
        self._done += rows
        self._display.step(self._done, self._total)

    def _skip(self, name: str, source: CorpusSource, shard: Shard) -> bool:
        """A file none of whose rows can be wanted, by its statistics, is counted unread."""
        if shard.names is None or any(self._mapping.owners.get(source.canonical(said) or "") == name for said in shard.names):
            return False
        for said, rows in shard.names.items():
            self._outside(name, source, said, rows)
        self._commit(name, shard.path, shard.rows)
        self._step(shard.rows)
        return True

    def _outside(self, name: str, source: CorpusSource, said: str, rows: int = 1) -> str | None:
        """Counts rows of a sub-set name. The canonical sub-set, None where their rows are not taken from this source."""
        subset = source.canonical(said)
        self._state.names[name, said, subset or ""] += rows
        self._state.counts[name, subset or "", ROW] += rows
        if subset is not None and self._mapping.owners[subset] == name:
            return subset
        self._state.counts[name, subset or "", UNLISTED if subset is None else OTHER_SOURCE] += rows
        return None

    def _read_shard(self, name: str, source: CorpusSource, shard: Shard, path: Path, start: int) -> None:
        columns = roots(source.columns, shard.columns)
        committed = row = start
        for first, batch in batches(path, columns, start):
            held = {column: batch.column(column) for column in columns}
            for i in range(batch.num_rows):
                self._row(name, source, _cells(held, i), fallback=PurePosixPath(shard.path).parent.name)
            self._step(first + batch.num_rows - row)
            row = first + batch.num_rows
            if row - committed >= _COMMIT_ROWS:
                self._commit(name, shard.path, row)
                committed = row
        self._commit(name, shard.path, shard.rows)

    def _row(self, name: str, source: CorpusSource, cell: Cell, fallback: str) -> None:
        """Looks at one row; where it does not say its sub-set, the folder does, which is the configuration on the hub."""
        try:
            said = subset_name(cell, source) or fallback
        except UnicodeDecodeError:
            said = fallback
        if (subset := self._outside(name, source, said)) is None:
            return
        try:
            self._take(fit_row(cell, name, source, subset, self._mapping.filters, self._mapping.seed))
        except UnicodeDecodeError:
            self._state.counts[name, subset, NO_TEXT] += 1
        except MisfitError as misfit:
            self._state.counts[name, subset, misfit.reason] += 1

    def _take(self, row: CorpusRow) -> None:
        """Puts a row into the draw. What takes long is looked at only where the draw takes it. MisfitError where it does not fit."""
        if not self._state.is_new(row.subset, row.key):
            raise MisfitError(DUPLICATE)
        cap = self._mapping.cap(row.subset)
        if not self._state.takes(row, cap):
            return
        try:
            for picture in row.pictures:
                decode(picture, "of the row")
        except DataError:
            raise MisfitError(BROKEN_IMAGE) from None
        with _making_space(self._out / PICTURES):
            refs = [keep(picture, self._out / PICTURES) for picture in row.pictures]
        if self._length is not None:
            self._check_length(self._length, row, tuple(refs))
        top = self._out.absolute()
        self._state.add(row, tuple(Path(ref.uri).relative_to(top).as_posix() for ref in refs), cap)

    def _check_length(self, length: PromptLength, row: CorpusRow, refs: tuple[ImageRef, ...]) -> None:
        try:
            tokens = length.tokens(Question(id=row.key, messages=(Message("user", row.prompt),), gold=row.answer, images=refs))
        except DataError:
            raise MisfitError(UNSHOWABLE) from None  # a text that holds the model's own token for pictures
        if tokens > self._mapping.filters.max_prompt_tokens:
            raise MisfitError(LONG_PROMPT)

    def _commit(self, name: str, path: str, row: int) -> None:
        for gone in self._state.commit(name, path, row):
            (self._out / gone).unlink(missing_ok=True)

    def finish(self, asked: dict[str, Any]) -> CorpusManifest:
        """Writes what the draw has come to; whole or not at all, the manifest last."""
        sources = {name: self._facts(name) for name in self._opened}
        manifest = manifest_of(self._mapping, self._state, asked, sources)
        if not manifest.rows:
            raise DataError(f"{self._out}: no row of the sources fits; {manifest.why_empty()}")
        self._clean()
        manifest = manifest.model_copy(update={"rows_sha256": _write_rows(self._state, self._out / ROWS_FILE)})
        write_text(self._out / "README.md", card(manifest, ROWS_FILE))
        write_text(self._out / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        return manifest

    def _facts(self, name: str) -> SourceFacts:
        shelf, shards = self._opened[name]
        where = self._mapping.sources[name].repository if shelf.revision else "local copy"
        return SourceFacts(where=where, revision=shelf.revision, files=len(shards), rows=sum(shard.rows for shard in shards))

    def _clean(self) -> None:
        """Removes pictures that no row has, which kills and the draw may leave. DataError where one is missing that a row has."""
        forget(self._out / _SCRATCH)
        for folder, _, files in os.walk(self._out / PICTURES, topdown=False):
            for file in files:
                path = Path(folder, file)
                if not self._state.refers_to(path.relative_to(self._out).as_posix()):
                    path.unlink(missing_ok=True)
            if not os.listdir(folder):
                os.rmdir(folder)
        if lost := next((path for path in self._state.pictures() if not (self._out / path).is_file()), None):
            raise DataError(f"{self._out / lost} is gone, and a row of the corpus has it; remove {self._out} and build again")


def _cells(held: Mapping[str, Any], row: int) -> Cell:
    """The values of a row of a record batch, each made only when it is asked for."""
    return lambda column: held[column][row].as_py() if column in held else None


def _row_id(subset: str, key: str) -> str:
    return f"{subset}-{key}"


def _write_rows(state: DrawState, path: Path) -> str:
    """Writes the corpus as parquet. The SHA-256 of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        [("id", text), ("prompt", text), ("answer", text), ("answer_list", text), ("images", pa.list_(text)), ("level", text)]
        + [("grading", text), ("source", text), ("source_id", text), ("pass_rate", pa.float64())]
    )
    partial = path.with_name(path.name + _PARTIAL)
    with _making_space(path):
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for rows in _chunks(state):
                writer.write_table(pa.Table.from_pylist(rows, schema))
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        partial.replace(path)
    return digest


def _chunks(state: DrawState) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for row in state.rows():
        values = row._asdict() | {"id": _row_id(row.subset, row.key), "level": row.subset, "images": list(row.images)}
        rows.append({name: value for name, value in values.items() if name not in ("subset", "key", "rank")})
        if len(rows) == _WRITE_ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all. StorageError where the disk refuses."""
    partial = path.with_name(path.name + _PARTIAL)
    with _making_space(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


@contextmanager
def _making_space(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise StorageError(
            f"{path} cannot be written ({cause.strerror or cause}): make space or the folder writable; the same command goes on"
        ) from error
