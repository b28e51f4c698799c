"""`make gpu-check` runs: its parts in tiny on a CPU, and its minutes, failures and results."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_parts import PARTS, Check, Part


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """In the place of a part's process; $6 is what it is to write to."""
    program = folder / "python"
    program.write_text(f"#!/bin/bash\n{does}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(program))


LINE = json.dumps({"part": "kernels", "what": "a", "value": 1.5, "bound": "-", "passed": True})


@pytest.mark.parametrize(
    ("does", "limit", "said"),
    [
        ("echo no room >&2; exit 3", 60.0, "exit code 3: ...no room"),
        ("kill -9 $$", 60.0, "exit code -9: ..."),
        ("sleep 60", 4.0, "stopped after 4 s: ..."),
    ],
)
def test_a_part_that_fails_or_hangs_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, limit: float, said: str
) -> None:
    stand_in(tmp_path, monkeypatch, f"echo '{LINE}' > \"$6\"; {does}")
    first, failed, seconds = gpu_check.part_in_child("kernels", limit, cpu=True)
    assert first == Check("kernels", "a", 1.5, "-", True)
    assert failed.value == said and not failed.passed and seconds.passed


def test_what_is_found_is_kept_as_it_comes(tmp_path: Path) -> None:
    def breaks(folder: Path, cpu: bool) -> Iterator[Check]:
        yield Check("x", "first", 1, "-", cpu)
        raise RuntimeError("then")

    with pytest.raises(RuntimeError, match="then"):
        gpu_check.do(Part(breaks, 1), tmp_path, tmp_path / "found", cpu=True)
    assert json.loads((tmp_path / "found").read_text())["what"] == "first"


def test_what_does_not_fit_into_the_minutes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    stand_in(tmp_path, monkeypatch, f"echo '{LINE}' > \"$6\"")
    assert gpu_check.main(["--minutes=0.49", f"--results={tmp_path}"]) == 0
    (path,) = tmp_path.glob("gpu-check-????-??-??.json")
    found = json.loads(path.read_text())
    assert found["device"] == "H200" and {check["part"] for check in found["checks"]} == {"kernels"}
    assert [line.partition(":")[0] for line in found["left_out"]] == list(PARTS)[1:]
    assert "left out: training: " in capsys.readouterr().out
    stand_in(tmp_path, monkeypatch, "exit 1")
    assert gpu_check.main(["--minutes=0.5", f"--results={tmp_path}", "--parts=kernels"]) == 1


def test_the_parts_fit_into_the_minutes() -> None:
    assert sum(part.least for part in PARTS.values()) < gpu_check.MINUTES * 60


@pytest.mark.parametrize("part", ["kernels", "logprobs"])
def test_a_part_runs_in_tiny(part: str, tmp_path: Path) -> None:
    found = list(PARTS[part].run(tmp_path, True))
    assert found and all(check.passed for check in found)


@pytest.mark.slow
@pytest.mark.long
def test_all_of_it_runs_in_tiny(tmp_path: Path) -> None:
    assert gpu_check.main(["--cpu", "--minutes=4", f"--results={tmp_path}"]) == 0
    (path,) = tmp_path.glob("gpu-check-*.json")
    found = {(check["part"], check["what"]): check["value"] for check in json.loads(path.read_text())["checks"]}
    assert found["step", "BCQ and NCQ prompts"] > 0 and found["step", "sampled tokens/s (information)"] > 0
    assert found["small fp32", "share of weights that moved"] > 0.9


def test_the_plan_beside_the_peak_is_the_dry_run_s(tmp_path: Path) -> None:
    recipe = gpu_parts.invented(tmp_path, True)
    assert 0.5 * gpu_parts.GIB < gpu_parts.planned(recipe, ()) < 3 * gpu_parts.GIB
