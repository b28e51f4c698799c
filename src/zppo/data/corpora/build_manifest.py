"""What a corpus was built of and what became of every row: manifest.json, the table of it, and the data card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zppo.core.types import JUDGE
from zppo.data.corpora.draw_state import ROW, DrawState
from zppo.data.corpora.fitting import CAP, OTHER_SOURCE, REASONS, UNLISTED
from zppo.data.corpora.mapping import CorpusMapping, PaperCounts
from zppo.errors import DataError, one_line

MANIFEST = "manifest.json"

_LISTED_NAMES = 40
_SHOWN_NAMES = 6


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceFacts(_Record):
    """A source as it was read."""

    where: str
    revision: str
    files: int
    rows: int


class FilterCount(_Record):
    """Rows before and after one filter; `reason` is a key of `fitting.REASONS`."""

    reason: str
    what: str
    before: int
    after: int


class SubsetCounts(_Record):
    """What became of the rows of one sub-set."""

    subset: str
    source: str
    tier: int
    cap: int
    rows: int
    filters: list[FilterCount]
    kept: int

    def dropped(self) -> int:
        """By filters, duplicates among them; those over the cap not counted."""
        return self.rows - self.kept - self.over_cap()

    def over_cap(self) -> int:
        """Rows that fit and that the cap left out."""
        return sum(f.before - f.after for f in self.filters if f.reason == CAP)


class UnusedName(_Record):
    """A name of a sub-set that a source has and the corpus does not take from it."""

    source: str
    name: str
    why: str
    rows: int


class CorpusManifest(_Record):
    """manifest.json."""

    format: Literal[1] = 1
    asked: dict[str, Any]
    sources: dict[str, SourceFacts]
    subsets: list[SubsetCounts]
    unused: list[UnusedName]
    dropped: dict[str, dict[str, int]]
    rows: int
    judged: int
    ceiling: int
    paper: PaperCounts | None
    rows_sha256: str = ""

    @classmethod
    def read(cls, path: Path) -> CorpusManifest:
        """The manifest in a file. DataError where it is none."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(f"{path} is damaged ({one_line(error, 120)}); remove {path.parent} and build again") from error

    def empty(self) -> list[str]:
        """Sub-sets of the mapping of which no source has a row."""
        return [facts.subset for facts in self.subsets if not facts.rows]

    def why_empty(self) -> str:
        """For a message: what became of the rows."""
        reasons = [f"{n:,} rows of {source}: {REASONS[reason]}" for source, of in self.dropped.items() for reason, n in of.items()]
        names = ", ".join(repr(entry.name) for entry in self.unused if entry.why == REASONS[UNLISTED])
        mend = f"; unlisted are {names[:200]}" if names else ""
        return "; ".join(reasons or ["they have none"]) + f"{mend}. Mend the mapping (--mapping)"


def manifest_of(mapping: CorpusMapping, state: DrawState, asked: dict[str, Any], sources: dict[str, SourceFacts]) -> CorpusManifest:
    """The manifest of what a draw has come to, without the digest of the file of rows."""
    counts, kept = state.counted(), state.drawn("subset")
    subsets = []
    for subset, source in mapping.owners.items():
        own = {reason: n for (of, name, reason), n in counts.items() if of == source and name == subset}
        subsets.append(_subset(mapping, subset, source, own, kept.get(subset, 0)))
    dropped: dict[str, dict[str, int]] = {}
    for source in mapping.sources:
        totals = {r: sum(n for (of, _, why), n in counts.items() if of == source and why == r) for r in REASONS}
        totals[CAP] = sum(facts.over_cap() for facts in subsets if facts.source == source)
        dropped[source] = {reason: n for reason, n in totals.items() if n}
    unused = []
    for source, name, subset, n in state.named():
        if mapping.owners.get(subset) != source:
            why = f"{subset} is taken from {mapping.owners[subset]}" if subset else REASONS[UNLISTED]
            unused.append(UnusedName(source=source, name=name, why=why, rows=n))
    return CorpusManifest(
        asked=asked,
        sources=sources,
        subsets=subsets,
        unused=unused[: 2 * _LISTED_NAMES],
        dropped=dropped,
        rows=sum(kept.values()),
        judged=state.drawn("grading").get(JUDGE, 0),
        ceiling=sum(facts.cap for facts in subsets),
        paper=mapping.paper,
    )


def _subset(mapping: CorpusMapping, subset: str, source: str, own: dict[str, int], kept: int) -> SubsetCounts:
    rows = left = own.get(ROW, 0)
    filters = []
    for reason, what in REASONS.items():
        if reason in (UNLISTED, OTHER_SOURCE):
            continue  # of whole sub-sets
        n = left - kept if reason == CAP else own.get(reason, 0)
        filters.append(FilterCount(reason=reason, what=what, before=left, after=left - n))
        left -= n
    return SubsetCounts(
        subset=subset, source=source, tier=mapping.tier(subset), cap=mapping.cap(subset), rows=rows, filters=filters, kept=kept
    )


def print_manifest(manifest: CorpusManifest, console: Console) -> None:
    """The tables: what became of every sub-set, of every source's rows, and the paper's counts beside ours."""
    table = Table("sub-set", title="Rows by sub-set", title_justify="left")
    table.columns[0].no_wrap = True
    for heading in ("rows", "do not fit", "over the cap", "kept", "cap"):
        table.add_column(heading, justify="right")
    for source in manifest.sources:
        own = [facts for facts in manifest.subsets if facts.source == source]
        table.add_row(*_numbers(f"from {source}", own), style="bold")
        for facts in own:
            table.add_row(*_numbers(f"  {facts.subset}", [facts]), style="yellow" if not facts.rows else None)
        table.add_section()
    table.add_row(*_numbers("all", manifest.subsets), style="bold")
    console.print(table)

    reasons = Table("what becomes of a row", title="Rows by reason", title_justify="left")
    for source in manifest.sources:
        reasons.add_column(escape(source), justify="right")
    reasons.add_row("rows", *(f"{facts.rows:,}" for facts in manifest.sources.values()))
    for reason, what in REASONS.items():
        found = [of.get(reason, 0) for of in manifest.dropped.values()]
        if any(found):
            reasons.add_row(what, *(f"{-n:,}" if n else "" for n in found))
    reasons.add_section()
    kept = {source: sum(facts.kept for facts in manifest.subsets if facts.source == source) for source in manifest.sources}
    reasons.add_row("kept", *(f"{n:,}" for n in kept.values()))
    console.print(reasons)

    for line in _remarks(manifest):
        console.print(line, soft_wrap=True, highlight=False)
    if manifest.paper is not None:
        with_rows = sum(bool(facts.kept) for facts in manifest.subsets)
        paper = Table("", title="Beside the paper", title_justify="left")
        for heading in ("here", "paper"):
            paper.add_column(heading, justify="right")
        paper.add_row("sub-sets with rows", f"{with_rows:,}", f"{manifest.paper.subsets:,}")
        paper.add_row("ceiling (the caps together)", f"{manifest.ceiling:,}", f"{manifest.paper.ceiling:,}")
        paper.add_row("rows", f"{manifest.rows:,}", f"about {manifest.paper.rows:,}")
        console.print(paper)


def _numbers(name: str, subsets: list[SubsetCounts]) -> list[str]:
    """One row of the table over some sub-sets."""
    columns = (
        [facts.rows for facts in subsets],
        [facts.dropped() for facts in subsets],
        [facts.over_cap() for facts in subsets],
        [facts.kept for facts in subsets],
        [facts.cap for facts in subsets],
    )
    return [escape(name), *(f"{sum(column):,}" for column in columns)]


def _remarks(manifest: CorpusManifest) -> list[str]:
    said = []
    if empty := escape(", ".join(manifest.empty())):
        said.append(f"[yellow]no source has a row of {empty}: look for their names among those below, and mend the mapping[/]")
    if unlisted := [entry for entry in manifest.unused if entry.why == REASONS[UNLISTED]]:
        names = ", ".join(f"{entry.name or '(none)'} ({entry.rows:,})" for entry in unlisted[: _SHOWN_NAMES * 2])
        more = f" and more in {MANIFEST}" if len(unlisted) > _SHOWN_NAMES * 2 else ""
        said.append(f"names of sub-sets that the mapping does not list: {escape(names)}{more}")
    if manifest.judged:
        said.append(f"{manifest.judged:,} of the rows want a judge (grading: judge); a run on them needs judge.model or teacher.model")
    if manifest.asked.get("tokenizer") is None:
        said.append("the prompts' tokens were not counted (no --tokenizer): a run drops those over data.max_prompt_tokens when it starts")
    return said


def card(manifest: CorpusManifest, rows_file: str) -> str:
    """README.md of the corpus: which file its rows are in (as `datasets` reads it), where they come from, and how many there are."""
    sources = "\n".join(
        f"- {name}: {facts.where}{f', commit `{facts.revision}`' if facts.revision else ''}, {facts.rows:,} rows in {facts.files:,} files"
        for name, facts in manifest.sources.items()
    )
    rows = "\n".join(f"| {f.subset} | {f.source} | {f.rows:,} | {f.kept:,} |" for f in manifest.subsets)
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: {rows_file}
---
# {manifest.rows:,} questions with pictures

Built by `zppo data build`; `{MANIFEST}` counts what became of every row. Rights to questions and pictures are those of the sources.

{sources}

| sub-set | source | rows | kept |
|---|---|---:|---:|
{rows}
"""
