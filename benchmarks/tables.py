"""Writes the tables of docs/performance.md and docs/grading.md anew from benchmarks/results/*.json: `python -m benchmarks.tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is there is replaced by what `table` of the module
`benchmarks.NAME` makes of its result. Everything else in the files is left alone.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT

PAGES = tuple(ROOT / "docs" / name for name in ("performance.md", "grading.md"))
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(page: str, results: Path) -> str:
    """The page with its tables made anew; a table without a result stays as it is."""

    def block(found: re.Match[str]) -> str:
        path = results / f"{found[2].replace('_', '-')}.json"
        if not path.exists():
            return found[0]
        result = json.loads(path.read_text(encoding="utf-8"))
        table: str = importlib.import_module(f"benchmarks.{found[2]}").table(result)
        return f"{found[1]}{table.strip()}\n\n{origin(result)}\n{found[3]}"

    return BLOCK.sub(block, page)


def origin(result: Mapping[str, Any]) -> str:
    """Where and when a result was measured, in one line."""
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    return (
        f"*{result['date']}, {result['machine']}, {result['threads']} threads, commit {result['commit']}, {versions}; "
        f"`{result['command']}`, {result['took_seconds']:.0f} s.*"
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; floats with three figures."""
    lines = [header, ["---"] * len(header), *[[shown(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    """A cell."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def span(ratio: Mapping[str, float]) -> str:
    """A ratio with its extremes."""
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})"


def main() -> int:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
