"""Figures of the paper that are means over families of benchmarks: Tab. 4 and Fig. 7 (arXiv 2606.18216)."""

from __future__ import annotations

import csv
from importlib.resources import files


def paper_averages() -> dict[tuple[str, str], dict[str, float]]:
    """Tab. 4, Hint and Prefix beside other methods: (size of the student, method) -> family -> mean accuracy in percent."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in _rows("paper_hint_prefix.csv"):
        found.setdefault((row["scale"], row["method"]), {})[row["family"]] = float(row["accuracy"])
    return found


def paper_teacher_gains() -> dict[str, dict[str, float]]:
    """Fig. 7: size of the student -> size of the teacher -> points that ZPPO gains over the untrained student, mean of the families."""
    found: dict[str, dict[str, float]] = {}
    for row in _rows("paper_teacher_size.csv"):
        found.setdefault(row["scale"], {})[row["teacher"]] = float(row["gain"])
    return found


def _rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((files("zppo.report") / "data" / name).read_text(encoding="utf-8").splitlines()))
