"""The tables of a study: means over seeds with 95% intervals, and paired differences to the controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zppo.errors import DataError
from zppo.report.bootstrap import mean_interval, paired_difference
from zppo.runs.log import read_lines

CONTROLS = ("grpo-replay", "zppo-placebo")


def study_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, lines) for every recipe and student: outcome per method, then differences to each control."""
    tables = []
    worlds = dict.fromkeys((r["recipe"], r["student"]) for r in rows)
    for recipe, student in worlds:
        mine = [r for r in rows if (r["recipe"], r["student"]) == (recipe, student)]
        title = f"{recipe}, student {student}" if student else recipe
        levels = list(dict.fromkeys(level for r in mine for level in r["after"]))
        methods = list(dict.fromkeys(r["method"] for r in mine))
        tables.append(_outcomes(title, mine, methods, levels))
        tables.extend(_differences(title, mine, methods, levels, control) for control in CONTROLS if control in methods)
    return tables


def _outcomes(
    title: str, rows: Sequence[dict[str, Any]], methods: list[str], levels: list[str]
) -> tuple[str, list[str], list[list[str]]]:
    columns = ["method", "seeds", *levels, "0% graduated", "entropy", "student tokens", "teacher tokens", "seconds"]
    before = [mean_interval([r["before"][level] for r in rows]).unsigned() for level in levels]
    lines = [["before", str(len(rows)), *before, "", "", "", "", ""]]
    for method in methods:
        mine = [r for r in rows if r["method"] == method]
        graduated = [share for r in mine if (share := graduated_share(r)) is not None]
        lines.append(
            [
                method,
                str(len(mine)),
                *(mean_interval([r["after"][level] for r in mine]).unsigned() for level in levels),
                mean_interval(graduated).unsigned(),
                f"{mean_interval([r['entropy'] for r in mine if r['entropy'] is not None]).value:.2f}",
                f"{mean_interval([r['student_tokens'] for r in mine]).value:,.0f}",
                f"{mean_interval([r['teacher_tokens'] for r in mine]).value:,.0f}",
                f"{mean_interval([r['seconds'] for r in mine]).value:.0f}",
            ]
        )
    return f"{title}: held-out plain accuracy after training, mean [95% interval] over seeds", columns, lines


def _differences(
    title: str, rows: Sequence[dict[str, Any]], methods: list[str], levels: list[str], control: str
) -> tuple[str, list[str], list[list[str]]]:
    def after(method: str, level: str) -> dict[str, float]:
        return {str(r["seed"]): r["after"][level] for r in rows if r["method"] == method}

    lines = []
    for method in methods:
        if method != control:
            differences = [paired_difference(after(method, level), after(control, level)) for level in levels]
            lines.append([method, str(differences[0].n), *map(str, differences)])
    return f"{title}: minus {control}, paired over seeds", ["method", "pairs", *levels], lines


def graduated_share(row: dict[str, Any]) -> float | None:
    """Entries admitted at 0% that graduated; None where none was admitted."""
    admitted = row["admitted"].get("0", 0)
    return row["graduated"].get("0", 0) / admitted if admitted else None


def print_study(path: Path, console: Console, *, markdown: bool = False) -> None:
    """Print the tables of a rows file, for a terminal or as Markdown.

    Raises:
        DataError: the file is missing or empty.
    """
    rows = read_lines(path)
    if not rows:
        raise DataError(f"{path} holds no rows: run `zppo lab study` first, or name the file that it wrote")
    for title, columns, lines in study_tables(rows):
        if markdown:
            text = [f"**{title}**", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            text += ["| " + " | ".join(line) + " |" for line in lines]
            console.print("\n".join([*text, ""]), highlight=False, markup=False, soft_wrap=True)
        else:
            table = Table(*columns, box=None, padding=(0, 2, 0, 0))
            for line in lines:
                table.add_row(*line)
            console.print(f"\n{title}", markup=False)
            console.print(table)
