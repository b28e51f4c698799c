"""The notebook in examples/: its cells run in their order, and it is stored with what they showed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "ten-minutes.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def shape(text: str) -> list[str]:
    """The lines by their first words."""
    return [
        line[:12] for line in text.splitlines() if "candidate>" not in line and "boxed" not in line and line[:1].isalpha() and ":" in line
    ]


@pytest.mark.slow
def test_the_cells_run(capsys: pytest.CaptureFixture[str]) -> None:
    """With two steps of training for sixty. What they print has the lines that are stored; numbers hang on the processor's rounding."""
    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in CELLS:
        code = "".join(cell["source"]).replace("train__steps=60, eval__every=20", "train__steps=2, eval__every=1")
        exec(compile(code, "ten-minutes.ipynb", "exec"), names)  # noqa: S102 - the notebook's own
        told = capsys.readouterr().out
        if "train__steps" not in code and "report_command" not in code:
            stored = "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout")
            assert shape(told) == shape(stored), code
    assert names["run"].metrics[-1]["event"] == "final" and (names["run"].folder / "report.html").is_file()
    assert {g.kind for g in names["groups"]} == {"plain", "bcq", "ncq"} and names["advantages"].abs().sum() > 0


def test_it_is_stored_with_its_pictures_and_without_traces_of_a_machine() -> None:
    kinds = {kind for cell in CELLS for output in cell["outputs"] for kind in output.get("data", {})}
    assert "image/png" in kinds and all(cell["outputs"] for cell in CELLS)
    assert not any("/home/" in text or "/tmp/tmp" in text for text in (json.dumps(cell["outputs"]) for cell in CELLS))
