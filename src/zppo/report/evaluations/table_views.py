"""`zppo eval table`: the tables of `zppo.report.evaluations.paper_tables` in a terminal, as Markdown, as CSV, and as a page."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as View
from rich.text import Text

from zppo import __version__
from zppo.errors import SettingsError
from zppo.report.bootstrap import RESAMPLES
from zppo.report.evaluations.paper_tables import BEST, MethodRow, paper_rows_of, rows_of, tables_of_rows
from zppo.report.tables import EvaluationResults, Heading, Strong, Table, unlike

_GAP = 2  # columns between the columns of a table in a terminal
_WORD = 20  # columns of a word that is not broken


def _printable(text: str) -> str:
    """The text without control characters: names come from files."""
    return type(text)("".join(c if c.isprintable() else " " for c in text))


def print_wide(console: Console, table: Table) -> None:
    """A table in as many pieces as the console's width takes, the first column before each of them."""
    lines = tuple(tuple(map(_printable, row)) for row in (table.columns, *table.rows))
    table = replace(table, columns=lines[0], rows=_aligned(lines)[1:])
    widths = [max(cell_len(text) for text in (name, *(row[i] for row in table.rows))) for i, name in enumerate(table.columns)]
    first = min(max((cell_len(row[0]) for row in table.rows if not isinstance(row[0], Heading)), default=0), max(console.width // 2, 10))
    console.print(Text(table.title, style="bold"), soft_wrap=True)
    start = 1
    while start < len(widths):
        end, left = start + 1, console.width - first - _GAP - widths[start]
        while end < len(widths) and left >= widths[end] + _GAP:
            left -= widths[end] + _GAP
            end += 1
        if start > 1:
            console.print()
        _print_piece(console, table, first, start, end)
        start = end
    console.print(Text(table.caption, style="dim"))


def print_fitting(console: Console, table: Table) -> None:
    """A table as wide as the console at most: its widest columns are wrapped between words, and where that is not enough it is cut into
    pieces. Headings stand across it."""
    lines = (table.columns, *(row for row in table.rows if not isinstance(row[0], Heading)))
    widths = [max(cell_len(row[i]) for row in lines) for i in range(len(table.columns))]
    least = [min(_WORD, max(cell_len(word) for row in lines for word in (row[i].split() or [""]))) for i in range(len(table.columns))]
    room = console.width - _GAP * (len(widths) - 1)
    while sum(widths) > room and any(map(int.__gt__, widths, least)):
        widths[max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)] -= 1
    if sum(widths) > room:
        print_wide(console, table)
        return
    console.print(Text(table.title, style="bold"), soft_wrap=True)
    for heading, rows in groupby((table.columns, *table.rows), key=lambda row: isinstance(row[0], Heading)):
        if heading:
            for row in rows:
                console.print(Text(row[0]))
            continue
        view = View(box=None, padding=(0, _GAP, 0, 0), show_header=False, pad_edge=False)
        for i, width in enumerate(widths):
            view.add_column(width=width, overflow="fold", justify="right" if i else "left")
        for row in rows:
            view.add_row(*map(Text, row), style="bold" if row is table.columns else "")
        console.print(view)
    if table.caption:
        console.print(Text(table.caption, style="dim"))


def _aligned(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Texts of which figures stand below figures, whether a spread stands behind them or not."""
    width = {i: max(len(row[i].partition(" ±")[2]) for row in rows) for i in range(1, len(rows[0]))} if rows else {}

    def padded(text: str, i: int) -> str:
        missing = width[i] - len(text.partition(" ±")[2]) + (2 if width[i] and " ±" not in text else 0)
        return type(text)(text + " " * missing) if width[i] and text else text

    return tuple((row[0], *(padded(text, i) for i, text in enumerate(row[1:], 1))) for row in rows)


def _print_piece(console: Console, table: Table, first: int, start: int, end: int) -> None:
    view: View | None = None
    widths = [max(cell_len(row[i]) for row in (table.columns, *table.rows)) for i in range(len(table.columns))]
    for row in (("", *table.columns[1:]), *table.rows):
        if isinstance(row[0], Heading):  # wider than its column
            if view is not None:
                console.print(view)
            console.print(Text(row[0], style="underline"), soft_wrap=True)
            view = None
            continue
        if view is None:
            view = View(box=None, padding=(0, _GAP, 0, 0), show_header=False, pad_edge=False)
            view.add_column(width=first, overflow="fold")
            for i in range(start, end):
                view.add_column(no_wrap=True, width=widths[i])
        texts = [" " * (widths[i] - cell_len(row[i])) + row[i] for i in range(start, end)]  # rich would take the spaces behind a text away
        shown = [Text(text, style="bold" if isinstance(row[i], Strong) else "") for i, text in enumerate(texts, start)]
        view.add_row(Text(row[0]), *shown, style="dim" if row[0] == "" else "")
    if view is not None:
        console.print(view)


def as_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables as GitHub and others show them."""

    def cell(text: str) -> str:
        shown = "".join(f"\\{c}" if c in "\\|*_<>`[]" else c for c in text)
        return f"**{shown}**" if isinstance(text, Strong | Heading) else shown

    parts = []
    for table in tables:
        lines = [f"### {table.title}", "", f"| {' | '.join(map(cell, table.columns))} |", f"|---|{'---:|' * (len(table.columns) - 1)}"]
        lines += [f"| {' | '.join(map(cell, row))} |" for row in table.rows]
        parts.append("\n".join([*lines, "", table.caption]))
    return "\n\n".join([*parts, *(f"- {cell(note)}" for note in notes)]) + "\n"


def as_csv(rows: Sequence[MethodRow]) -> str:
    """A line for each method and benchmark, as `zppo bootstrap` reads it; with the standard deviation over seeds and their number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("scale", "method", "family", "benchmark", "accuracy", "spread", "seeds"))
    for row in rows:
        name = f"{row.name} (paper)" if row.paper else row.name
        for benchmark, value in row.accuracies(list(row.families)).items():
            values = row.values(benchmark)
            spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
            writer.writerow((row.size or "-", name, row.families[benchmark], benchmark, f"{value:.2f}", spread, len(values)))
    return out.getvalue()


def as_html(tables: Sequence[Table], notes: Sequence[str], results: Sequence[EvaluationResults]) -> str:
    """One page that loads nothing and runs nothing."""
    folder = files("zppo.report") / "page"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["parts"] = lambda text: text.partition(" ±")
    environment.tests |= {"strong": lambda text: isinstance(text, Strong), "heading": lambda text: isinstance(text, Heading)}
    return environment.from_string((folder / "table.html").read_text(encoding="utf-8")).render(
        version=__version__,
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        tables=[(table, any("±" in cell for row in table.rows for cell in row)) for table in tables],
        best=BEST,
        notes=notes,
        results=[(each.label, str(each.path)) for each in results],
    )


def table_command(
    names: Sequence[str],
    *,
    form: str = "text",
    paper: bool = False,
    minuend: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> list[Table]:
    """`zppo eval table`: print the tables, or write them.

    Args:
        form: text, markdown, csv or html. HTML goes to a file, the others too where `out` names one.
        paper: whether the paper's figures stand below ours of the same size.
        minuend, resamples, seed: of `tables_of_rows`.

    Raises:
        SettingsError, DataError: as `rows_of` and `tables_of_rows`; the file cannot be written.
    """
    console = console or Console()
    rows, results = rows_of(names)
    notes = unlike(results, list(dict.fromkeys(name for each in results for name in each.results)))
    if paper:
        theirs, missing = paper_rows_of(rows)
        rows, notes = [*rows, *theirs], notes + missing
    tables, more = tables_of_rows(rows, minuend=minuend, resamples=resamples, seed=seed)
    notes = more + notes
    if form == "text" and out is None:
        for table in tables:
            print_wide(console, table)
            console.print()
        for note in notes:
            console.print(Text(_printable(note), style="yellow"))
        return tables
    text = {"markdown": lambda: as_markdown(tables, notes), "csv": lambda: as_csv(rows), "html": lambda: as_html(tables, notes, results)}
    made = text[form if form != "text" else "markdown"]()
    place = out or (Path("eval-table.html") if form == "html" else None)
    if place is None:
        console.file.write(made)
        return tables
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(made, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{place} cannot be written ({error.strerror or error}): name another file with --output") from error
    console.print(Text(f"written to {place.absolute()}"), soft_wrap=True)
    return tables
