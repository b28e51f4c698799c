"""The report's tables: held-out accuracy, the zone and the audits in numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from zppo.core.types import BCQ, NCQ
from zppo.report.audit import Counts, Share, match_rows, paper_rows, position_bias, share_of
from zppo.report.figures import AUDITS, DYNAMICS, ZONE, kind_name
from zppo.report.load import Run
from zppo.report.zone import ZoneStory, median


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        id, section: its anchor and where on the page it stands.
        title, caption: what it shows; how to read it.
        columns, rows: texts; the first column is words, the others are numbers.
    """

    id: str
    section: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def percent(value: float | None) -> str:
    """0.1234 -> "12.3%"; a dash where there is no number."""
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def tables_of(run: Run, counts: Counts, zone: ZoneStory | None) -> list[Table]:
    """Every table that has something to show, in the order of the page."""
    tables = [_held_out(run), _zone(zone), _match(counts), _position(counts), _leaks(counts), _compression(run.steps)]
    return [table for table in tables if table.rows]


def _held_out(run: Run) -> Table:
    first = next((e for e in run.evaluations if e["step"] == 0), None)
    last = run.evaluations[-1] if run.evaluations else None
    rows: list[tuple[str, ...]] = []
    if first and last and last is not first:
        rows = [
            (level, percent(first["by_level"].get(level)), percent(value)) for level, value in last["by_level"].items()
        ]
        rows.append(("all", percent(first["accuracy"]), percent(last["accuracy"])))
    caption = f"{last['count']:,} completions, plain prompts." if last else ""
    after = f"after step {last['step']:,}" if last else ""
    return Table("held-out-table", DYNAMICS, "Held-out accuracy", ("level", "before", after), tuple(rows), caption)


def _zone(zone: ZoneStory | None) -> Table:
    rows: list[tuple[str, ...]] = []
    if zone is not None and zone.admitted.any():
        everything = tuple(w for waits in zone.waits for w in waits)
        for (name, admitted, graduated, evicted), waits in zip(zone.totals(), (*zone.waits, everything), strict=True):
            share = percent(graduated / admitted if admitted else None)
            wait = f"{median(waits):g}" if waits else "–"
            rows.append((f"{name} · this run", f"{admitted:,}", f"{graduated:,}", f"{evicted:,}", share, wait))
        rows += _paper_buffer()
    columns = (
        "accuracy at admission",
        "admitted",
        "graduated",
        "evicted",
        "graduated / admitted",
        "median steps to it",
    )
    caption = (
        "Entries of the prompt replay buffer by plain accuracy at admission; a question that comes back after it left is a new entry. "
        "Rows of the paper: arXiv 2606.18216, Figs. 4 and 5b."
    )
    return Table("zone-table", ZONE, "Entries by plain accuracy at admission", columns, tuple(rows), caption)


def _paper_buffer() -> list[tuple[str, ...]]:
    """The paper's rows as far as it gives numbers: two methods on the 2B student."""
    text = (files("zppo.report") / "data" / "paper_buffer.csv").read_text(encoding="utf-8")
    known: dict[tuple[str, str], dict[str, float]] = {}
    for row in csv.DictReader(text.splitlines()):
        known.setdefault((row["method"], row["scale"]), {})[row["quantity"]] = float(row["value"])
    rows: list[tuple[str, ...]] = []
    for (method, scale), values in known.items():
        for name in ("0%", "12.5%"):
            admitted, graduated = values.get(f"admitted at {name}"), values.get(f"graduated from {name}")
            share = values.get(
                f"graduated share of {name} bin", graduated / admitted if admitted and graduated else None
            )
            if graduated is not None and share is not None:
                into = f"{admitted:,.0f}" if admitted else "–"
                rows.append((f"{name} · paper {scale}, {method}", into, f"{graduated:,.0f}", "–", percent(share), "–"))
    return rows


def _match(counts: Counts) -> Table:
    ours = [row for row in match_rows(counts) if row.rollouts]
    kinds = {row.kind for row in ours}
    rows = tuple(
        (
            f"{kind_name(row.kind)} {row.subset} · {row.source}",
            f"{row.rollouts:,}",
            *(percent(v) for v in (row.positive, row.negative, row.other, row.none)),
        )
        for kind in (BCQ, NCQ)
        for row in (*ours, *paper_rows())
        if row.kind == kind and kind in kinds
    )
    columns = (
        "rollouts",
        "how many",
        "the right candidate's",
        "a wrong one's",
        "another or none",
        "of these without answer",
    )
    known, total = counts["ncq", "unseen known"], counts["ncq", "unseen known"] + counts["ncq", "unseen unknown"]
    caption = (
        "Candidate-match audit: whose answer a rollout boxes, both sides in lower case, with spaces collapsed and \\text{} stripped. "
        "For NCQ the right candidate is the one of the same question's BCQ in the same step, which the NCQ rollout never saw "
        f"(there was one for {known:,} of {total:,} NCQ rollouts), and the wrong ones are those listed. Rows of the paper: "
        "arXiv 2606.18216, Tabs. 16 and 17."
    )
    return Table("match-table", AUDITS, "Whose answer a rollout gives", columns, rows, caption)


def _shares(rows: Sequence[tuple[str, Share]]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (words, percent(s.share), f"{percent(s.low)} to {percent(s.high)}", f"{s.n:,}") for words, s in rows if s.n
    )


def _position(counts: Counts) -> Table:
    longer = counts["leak", BCQ, "right longer"]
    rows = (
        ("BCQ rollouts that follow a candidate and follow the first one", position_bias(counts)),
        ("BCQ prompts in which the right candidate stands first",
         share_of(counts["position", "right first"], counts["position", "prompts"])),
        ("BCQ prompts in which the right candidate is the longer one", share_of(longer, longer + counts["leak", BCQ, "wrong longer"])),
    )  # fmt: skip
    caption = (
        "50% is no bias. 95% intervals by Wilson's score; for rollouts at the effective number, because those of one prompt are alike. "
        "Candidates of equal length are left out of the last row."
    )
    return Table(
        "position-table", AUDITS, "Position and length", ("", "share", "95% interval", "of"), _shares(rows), caption
    )


def _leaks(counts: Counts) -> Table:
    rows = (
        (NCQ, "gold boxed", "NCQ prompts in which something that is said to be wrong boxes the right answer"),
        (BCQ, "gold in wrong", "BCQ prompts whose wrong candidate boxes the right answer"),
        (BCQ, "answer changed", "BCQ prompts with a candidate that boxes another answer than the completion behind it"),
        (BCQ, "one box", "BCQ prompts in which only one of the two candidates has a box"),
    )
    shares = [
        (words, share_of(counts["leak", kind, name], counts["leak", kind, "checked"])) for kind, name, words in rows
    ]
    unchecked = counts["leak", BCQ, "unchecked"] + counts["leak", NCQ, "unchecked"]
    caption = "Read from the prompts as the student saw them, answers compared after normalisation."
    if unchecked:
        caption += (
            f" {unchecked:,} prompts have no <candidate> blocks to read (a template of one's own) and are left out."
        )
    return Table("leaks-table", AUDITS, "Answer leaks", ("", "share", "95% interval", "of"), _shares(shares), caption)


def _compression(steps: Sequence[Mapping[str, Any]]) -> Table:
    def total(name: str) -> float:
        return math.fsum(line.get(name) or 0 for line in steps)

    asked = total("compression_asked")
    rows: list[tuple[str, ...]] = []
    if asked:
        rows = [
            ("completions sent to be compressed", f"{asked:,.0f}", ""),
            ("summaries refused: the answer did not survive, or the form is wrong", f"{total('compression_failed'):,.0f}",
             percent(total("compression_failed") / asked)),
            ("requests that got no reply", f"{total('compression_unreachable'):,.0f}", percent(total("compression_unreachable") / asked)),
            ("NCQ candidates shown uncompressed", f"{total('ncq_raw_candidates'):,.0f}", ""),
        ]  # fmt: skip
        if bcq := total("bcq_prompts"):
            raw = total("bcq_raw_pairs")
            rows.append(
                ("BCQ prompts with both candidates uncompressed", f"{raw:,.0f}", f"{percent(raw / bcq)} of {bcq:,.0f}")
            )
    return Table("compression-table", AUDITS, "Compression", ("", "how many", "share"), tuple(rows))
