"""The pictures of docs/real-model.md out of the rows of `benchmarks.real_model`: `python -m benchmarks.real_pictures [ROWS] [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import RESULTS, ROOT
from benchmarks.real_model import read_with_base, wilson_bounds
from benchmarks.stories import FAMILIES

COLOURS = {"before": "#7F7F7F", "grpo-replay": "#0072B2", "zppo-placebo": "#E69F00", "zppo": "#D55E00"}
KINDS = {"plain": "#0072B2", "bcq": "#D55E00", "ncq": "#009E73"}
WINDOW = 5  # steps of a running mean


def accuracy_picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out accuracy by family, seeds together, with Wilson's 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    base = [[row for row in rows if row["what"] == "base"][-1]]
    bars = {"before": base} | {m: [r for r in rows if r["what"] == "run" and r["method"] == m] for m in list(COLOURS)[1:]}
    bars = {name: found for name, found in bars.items() if found}
    for place, (name, found) in enumerate(bars.items()):
        for i, family in enumerate(FAMILIES):
            right, every = (sum(row["held_out"][family][k] for row in found) for k in (0, 1))
            low, high = wilson_bounds(right, every)
            x, share = i + (place - (len(bars) - 1) / 2) * 0.2, right / every
            label = f"{name} ({len(found)} seed{'s' * (len(found) > 1)})" if name != "before" else name
            axes.bar(x, share, 0.18, color=COLOURS[name], label=None if i else label)
            axes.errorbar(x, share, [[max(0, share - low)], [max(0, high - share)]], color="#333333", capsize=2, linewidth=1)
    axes.set_xticks(range(len(FAMILIES)), FAMILIES)
    axes.set_ylim(0, 1)
    axes.set_ylabel("held-out accuracy, greedy")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


def prompts_picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy of each kind of prompt over the steps, mean over seeds, for each method."""
    from matplotlib.figure import Figure

    methods = [m for m in COLOURS if any(r["what"] == "run" and r["method"] == m for r in rows)]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    for axes, method in zip(figure.subplots(1, len(methods), sharey=True, squeeze=False)[0], methods, strict=True):
        mine = [row["curves"] for row in rows if row["what"] == "run" and row["method"] == method]
        for kind, colour in KINDS.items():
            curve = [[c[kind][step] for c in mine if c[kind][step] is not None] for step in range(len(mine[0][kind]))]
            smooth = [[v for step in curve[max(0, i - WINDOW + 1) : i + 1] for v in step] for i in range(len(curve))]
            if any(smooth):
                axes.plot([fmean(values) if values else float("nan") for values in smooth], color=colour, label=kind)
        axes.set_title(method, fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylim(0, 1)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("right rollouts")
    figure.savefig(path)


def main(argv: Sequence[str]) -> int:
    """Draws both."""
    rows = read_with_base(Path(argv[0]) if argv else RESULTS / "real-model.jsonl")
    folder = Path(argv[1]) if len(argv) > 1 else ROOT / "docs" / "real-model"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row.get("teacher", "program") == "program"]
    accuracy_picture(rows, folder / "accuracy.svg")
    prompts_picture(rows, folder / "prompts.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
