"""Files of a run that are cut or damaged cost themselves alone, and that is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from report_runs import change_rows, evaluated, files_of, invented_run
from zppo import cli
from zppo.errors import CheckpointError
from zppo.report.page import report_page
from zppo.report.read_run import open_run, question_ids, scan_file
from zppo.report.summary import Reader
from zppo.report.watch import search_completions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An invented run; read only."""
    return invented_run(tmp_path_factory.mktemp("runs") / "small")


def test_damaged_rollout_files_are_said(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-000001.parquet"
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="zppo resume"):
        scan_file(path)
    pq.write_table(pq.read_table(files_of(folder)[0]).drop_columns(["gold"]), path)
    with pytest.raises(CheckpointError, match="gold"):
        scan_file(path)


def damage(path: Path, harm: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": data[:-6] + b"\xff\xff" + data[-4:], "gone": b"x"}[harm])
    if harm == "gone":
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_rollout_file_is_left_out_and_said(folder: Path, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    whole = Reader(run).read()
    asked = next(line for line in whole.lines.values() if len({visit.step for visit in line.visits}) > 1)
    path = run / "rollouts" / f"step-{asked.visits[0].step:06d}.parquet"
    damage(path, harm)
    summary = Reader(run).read()
    missing = 0 if harm == "gone" else 1
    assert list(summary.left_out) == [path] * missing
    assert len(summary.lines[asked.id].visits) == sum(visit.step != asked.visits[0].step for visit in asked.visits)
    assert cli.main(["report", str(run), "--figures", "none"]) == 0
    assert cli.main(["inspect", str(run), asked.id]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"left out: {path} cannot be read") == 2 * missing
    assert asked.id in question_ids(open_run(run)) and (run / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_file_of_held_out_completions_is_left_out_and_said(
    folder: Path, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(Path(shutil.copytree(folder, tmp_path / "run")))
    path = run / "held_out" / "eval-000000.parquet"
    later = Path(shutil.copy(path, path.with_name("eval-000001.parquet")))
    change_rows(later, lambda row: {**row, "step": 1})
    [asked, *_] = (line for line in Reader(run).read().lines.values() if line.held_out)
    damage(path, harm)
    missing = 0 if harm == "gone" else 1
    summary = Reader(run).read()
    assert list(summary.left_out) == [path] * missing and summary.lines[asked.key].steps == [1]
    assert cli.main(["report", str(run), "--figures", "none"]) == 0
    assert cli.main(["inspect", str(run), asked.id]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"left out: {path} cannot be read") == 2 * missing
    assert "evaluation at step 1" in said and "evaluation at step 0" not in said
    assert asked.key in search_completions(open_run(run), [], (-1e9, 1e9), (0, 1e9))["fits"]
    damage(later, "cut")
    assert asked.id in question_ids(open_run(run)) and not any(line.held_out for line in Reader(run).read().lines.values())


def test_a_file_whose_completions_alone_are_damaged_is_said(folder: Path, tmp_path: Path) -> None:
    """They are most of its bytes. What is counted does not need them; the stories lack them, and search does."""
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    path = files_of(run)[0]
    with pq.ParquetFile(path) as file:
        columns = file.metadata.row_group(0)
        [column] = [c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "completion"]
    data = bytearray(path.read_bytes())
    start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    summary = Reader(run).read()
    assert not summary.left_out and any(1 in line.steps for line in summary.lines.values())
    assert report_page(summary).count('id="story-') and list(summary.left_out) == [path]
    asked = next(line for line in summary.lines.values() if line.steps == [1])
    assert asked.key not in search_completions(summary.run, ["the"], (-1e9, 1e9), (0, 1e9))["found"]
