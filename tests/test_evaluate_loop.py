"""`zppo eval` from end to end: who decides what, whose words are used, how much is asked, and of how many servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval_server import Reply, command, fair, results, right, rows, said, scripted, write_clip
from evaluate_data import write_data
from zppo import cli


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all benchmarks, and clips that can be decoded."""
    folder = write_data(tmp_path_factory.mktemp("rows"))
    for path in folder.rglob("*.mp4"):
        write_clip(path)
    return folder


def only(out: Path) -> dict[str, Any]:
    """The results of a folder that holds one benchmark."""
    (part,) = results(out)["benchmarks"]
    return dict(part)


# --- replies without a box ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replies_without_a_box_go_to_the_judge_with_their_thoughts_and_both_figures_are_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C-Eval's answers are C and A: one reply has no box, the other never ends its thoughts; the judge finds the second right."""
    replies = ["The third one, C.", "<think>so it must be A, which <response> is right"]

    def sees(body: dict[str, Any]) -> Reply:
        return '{"verdict": "correct"}' if "so it must be A" in said(body) else '{"verdict": "wrong"}'

    out = tmp_path / "out"
    with scripted(lambda body: replies[len(model.requests) - 1], "m") as model, scripted(sees, "j") as judge:
        arguments = command(model.url, judge, data, out, "CEval", "--concurrency", "1")
        assert cli.main(arguments) == 0
        shown = [said(body) for body in judge.requests]
        assert "The third one, C." in shown[0] and "[think]so it must be A, which [response] is right" in shown[1]
    part = only(out)
    assert (part["value"], part["by_box"], part["by_judge"], part["no_answer"], part["open"]) == (0.5, 0.0, 2, 2, 0)
    assert results(out)["families"]["llm"]["by_box"] == 0.0
    assert [(row["by"], row["value"], row["boxless"]) for row in rows(out, "CEval")] == [("judge", 0.0, True), ("judge", 1.0, True)]
    printed = " ".join(capsys.readouterr().out.split())
    assert "score ± by box" in printed and "CEval 50.0 50.0 0.0 2 0 2 2 0 0" in printed


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["AIME25", "InfoVQA", "OCREN"])
def test_benchmarks_with_rules_for_everything_ask_no_judge(suite: str, data: Path, tmp_path: Path) -> None:
    replies = ["hm", "<think>70", r"\boxed{about 70}"]
    with scripted(lambda body: replies[len(model.requests) % 3], "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, tmp_path, suite)) == 0
        assert model.requests and not judge.requests
    part = only(tmp_path)
    assert part["by_rule"] == part["rows"] == part["expected"] and part["open"] == 0


# --- what cannot be read ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_malformed_verdict_counts_0_is_named_and_closes_the_benchmark(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a reminder; `--strict` opens these rows again and asks the judge alone."""

    def moody(body: dict[str, Any]) -> Reply:
        return "I would say so." if "x^2=4" in str(body["messages"]) else '{"verdict": "correct"}'

    with scripted(lambda body: r"\boxed{A}", "m") as model, scripted(moody, "j") as judge:
        arguments = command(model.url, judge, data, tmp_path, "IMO-AB")
        assert cli.main(arguments) == 0
        assert len(judge.requests) == 3  # one of them a reminder
        part = only(tmp_path)
        assert (part["value"], part["rows"], part["open"]) == (0.5, 2, 0)
        assert (part["malformed"], part["malformed_rows"]) == (1, ["imo-bench-algebra-001"])
        row = next(row for row in rows(tmp_path, "IMO-AB") if row["error"])
        assert (row["by"], row["value"], row["reply"]) == ("judge", 0.0, "I would say so.")
        assert "IMO-AB: 1 of 2 rows are 0 since the judge's verdict was malformed" in capsys.readouterr().out
        assert cli.main(arguments) == 0 and len(judge.requests) == 3
        assert cli.main([*arguments, "--strict"]) == 2
        assert len(judge.requests) == 5 and (only(tmp_path)["open"], only(tmp_path)["judge_errors"]) == (1, 1)
        judge.reply = fair
        assert cli.main([*arguments, "--strict"]) == 0
        assert (only(tmp_path)["value"], only(tmp_path)["malformed"]) == (1.0, 0)
        assert len(model.requests) == 2


@pytest.mark.slow
def test_a_clip_that_cannot_be_decoded_counts_0_is_named_and_closes_the_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The made-up clips are no clips; a clip that is gone is brought back, and stays open."""
    (tmp_path / "data").mkdir()
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        arguments = command(model.url, judge, folder, out, "VMME", "--video", "frames")
        assert cli.main(arguments) == 0
        part = only(out)
        broken = [row["id"] for row in rows(out, "VMME") if row["finish"] == "broken_media"]
        assert part["broken_rows"] == sorted(broken) and part["broken"] == len(broken) > 0 == part["open"]
        assert part["no_answer"] == 0 and "cannot be decoded" in part["why_broken"]
        printed = capsys.readouterr().out
        assert f"rows are 0 since a clip or picture cannot be decoded: {broken[0]}" in printed
        assert cli.main([*arguments, "--strict"]) == 2
        assert only(out)["open"] == len(broken)
        for path in folder.rglob("*.mp4"):
            write_clip(path)
        assert cli.main(arguments) == 0
        assert (only(out)["broken"], only(out)["open"]) == (0, 0)
