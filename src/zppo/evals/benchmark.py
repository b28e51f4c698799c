"""What the registry knows of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from zppo.evals.adapters.row import Adapter, DatasetRow

Family = Literal["vlm", "llm", "video", "own"]
"""The paper's three, and benchmarks of the user's own."""
Aggregate = Literal["mean", "worst case", "wemath", "abilities", "axes"]
"""How the scores of a benchmark's rows become its figure; see `zppo.evals.results`."""

Judge = Literal["judge", "eval_charxiv", "eval_hle", "eval_mmvet", "eval_mmvu", "eval_multichallenge"]
"""Whose words ask the judge: `judge` is the shared one, of training too; the others follow a benchmark's own protocol."""

MODES: Mapping[Judge, tuple[str, ...]] = MappingProxyType(
    {"eval_charxiv": ("eval_charxiv_reasoning", "eval_charxiv_descriptive"), "eval_mmvu": ("eval_mmvu_choice", "eval_mmvu_open")}
)
"""Templates of judges that ask in several modes; a judge that is not named has one, of its own name."""


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set of the Hugging Face hub.

    Attributes:
        id: owner/name.
        splits: all that belong to the benchmark.
        configs: all that belong to it; "" is the only one there is.
        revision: commit or branch that the fields were read at; None where none is fixed: what is loaded is then the newest, and its
            commit is written down with the results.
    """

    id: str
    splits: tuple[str, ...]
    configs: tuple[str, ...] = ("",)
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ClipFiles:
    """The clips of a benchmark in its set, which `zppo eval fetch` brings.

    Attributes:
        patterns: which files, archives or plain ones.
        without: patterns of files that may not be brought without asking their owner.
        size: how much it is, in words.
        terms: under which the set gives them, in words.
        by_hand: what must be fetched from elsewhere, where, and where to put it; "" for nothing.
    """

    patterns: tuple[str, ...]
    size: str
    terms: str
    without: tuple[str, ...] = ()
    by_hand: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: the paper's abbreviation, by which it is chosen and its results are named.
        title: its full name.
        family: whose average it counts in.
        source: where its rows are.
        adapter: rows to items.
        differs: how its official protocol differs from the shared one, a sentence.
        judge: whose words ask about rows that the rules leave open.
        judged: whether a judge is asked about them; without, they are 0 (method.md section 10: deterministic benchmarks need none).
        aggregate: from scores of rows to the benchmark's figure.
        rows: questions in all, None where they were not counted.
        licence: of the data, as its card names it; None: look there.
        gated: its terms must be accepted on the hub, and a log-in is needed.
        also: copies of the same data at other owners, which are loaded, in this order, where the source cannot be.
        unverified: what is not certain about this row; "" where nothing is known to be.
        clips: what `zppo eval fetch` brings; None where the rows hold all there is.
        reader: of a benchmark of the user's own (`zppo.evals.adapters.own`): its rows, where they are on this machine.
        definition: of such a benchmark: a digest of what it is made from, so that another one under its name is noticed.
        code: of such a benchmark: the user's Python that it runs, "" for none.
    """

    name: str
    title: str
    family: Family
    source: HubDataset
    adapter: Adapter
    differs: str
    judge: Judge = "judge"
    judged: bool = True
    aggregate: Aggregate = "mean"
    rows: int | None = None
    licence: str | None = None
    gated: bool = False
    also: tuple[HubDataset, ...] = ()
    unverified: str = ""
    clips: ClipFiles | None = None
    reader: Callable[[], Iterator[DatasetRow]] | None = None
    definition: str = ""
    code: str = ""
