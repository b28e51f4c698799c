"""What the project says about versions, and the check for machines with a GPU where there is none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {r.name: str(r.specifier) for line in lines if line[:1].isalpha() for r in [Requirement(line)]}


def project() -> dict[str, dict[str, Requirement]]:
    """Requirements by extra, "" for those of everybody."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": data["dependencies"], **data["optional-dependencies"]}
    return {extra: {r.name: r for r in map(Requirement, lines)} for extra, lines in groups.items()}


def test_what_is_tested_as_lowest_is_the_lowest_that_is_admitted() -> None:
    lowest = {name: Version(pin.removeprefix("==")) for name, pin in pins("constraints-lowest.txt").items()}
    floors = {
        name: Version(re.search(r">=([\d.]+)", str(r.specifier))[1])  # type: ignore[index]
        for name, r in project()[""].items()
    }
    assert lowest.keys() == floors.keys()
    assert {n: v for n, v in lowest.items() if v != floors[n]}.keys() == {"torch"}  # no older build for a CPU at hand
    assert lowest["torch"] == Version(pins("constraints.txt")["torch"].removeprefix("=="))


def test_the_constraints_for_vllm_admit_what_the_project_admits() -> None:
    given, wanted = pins("constraints-vllm.txt"), project()
    assert given["vllm"] == "<0.32" and "<0.32" in str(wanted["vllm"]["vllm"].specifier)
    assert given["transformers"] == "<5.18" and wanted[""]["transformers"].specifier.contains("5.17.0")
    assert given["trl"] == pins("constraints.txt")["trl"]
    assert wanted["vllm"]["trl"].specifier == wanted["dev"]["trl"].specifier


@pytest.mark.slow
def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES empty: none, wherever this runs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--results", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2 and "no GPU" in done.stderr and "nvidia-smi" in done.stderr
    assert not (tmp_path / "results").exists()
