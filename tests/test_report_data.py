"""What the report works out of a run folder: audits, the zone, charts, stories. Each figure is counted a second, plain way."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pictures import noise
from report_runs import change_rows, files_of, invented_run, rows_of
from zppo.core.types import Draft, Group, Message, Prompt, Question, Rollout
from zppo.errors import CheckpointError
from zppo.grading import normalise
from zppo.images.store import reference
from zppo.prompts.book import PromptBook
from zppo.report import summary as summary_module
from zppo.report.audits import (
    FATES,
    MATCHES,
    bin_count,
    bin_name,
    bin_of,
    boxes,
    count_group,
    count_leaks,
    fraction,
    match,
    paper_rows,
    position_bias,
    run_rows,
    wilson,
    zone_story,
)
from zppo.report.charts import ChartSpec, Series, ramp
from zppo.report.read_run import open_run, question_ids, scan_file, visits_of
from zppo.report.stories import (
    SIDES,
    QuestionLine,
    Visit,
    bytes_of,
    cut,
    load_stories,
    nearest,
    question_lines,
    stratified,
    trimmed,
    with_images,
)
from zppo.report.summary import Reader, duration
from zppo.runs.log import RunLog


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An invented run; read only."""
    return invented_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return rows_of(folder)


@pytest.fixture(scope="module")
def summary(folder: Path) -> summary_module.Summary:
    return Reader(folder).read()


def chart_of(summary: summary_module.Summary, name: str) -> ChartSpec:
    return next(chart for chart in summary.charts if chart.id == name)


# Intervals


def test_wilson_of_known_values() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0) and math.isnan(fraction(0, 0).share)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_in_bounds(pair: tuple[int, int]) -> None:
    k, n = pair
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1


def bcq_counts(groups: list[tuple[int, list[str]]]) -> Counter[tuple[str, ...]]:
    """Counts of BCQ groups given as (where the right candidate stands, answers)."""
    total: Counter[tuple[str, ...]] = Counter()
    for correct_at, answers in groups:
        audit = {"correct_at": correct_at, "positive_answer": "1", "negative_answer": "2"}
        total.update(count_group("bcq", audit, None, [(a, a == "1") for a in answers])[0])
    return total


def test_position_bias_counts_who_follows_the_first_candidate() -> None:
    counts = bcq_counts([(0, ["1", "1", "2", "7"]), (1, ["1", "2", "2", "2"])])
    share = position_bias(counts)
    assert (share.n, share.share) == (7, 5 / 7)  # first candidate: "1" twice, then "2" three times


def test_position_bias_interval_knows_that_the_rollouts_of_a_prompt_are_alike() -> None:
    rng = random.Random(0)
    firsts = [rng.random() < 0.6 for _ in range(400)]
    alone = position_bias(bcq_counts([(0, ["1" if f else "2"]) for f in firsts]))
    alike = position_bias(bcq_counts([(0, ["1" if f else "2"] * 8) for f in firsts]))
    assert alone.share == alike.share and alike.n == 8 * alone.n
    assert (alike.low, alike.high) == pytest.approx((alone.low, alone.high), abs=1e-3)
    assert (alone.low, alone.high) == pytest.approx(wilson(sum(firsts), 400), abs=1e-3)
    assert position_bias(bcq_counts([(0, ["1"] * 8)] * 5)).low == pytest.approx(wilson(5, 5)[0])


# The candidate-match audit


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A  b", "positive"), (r"\text{a B}", "positive"), ("x", "negative"), ("Y ", "negative"), ("z", "other"), (None, "none")],
)
def test_match_compares_after_normalisation(answer: str | None, expected: str) -> None:
    assert match(answer, ["7", "a b"], ["x", "y"]) == expected


def test_match_without_a_teacher_s_answer() -> None:
    assert match("a", [], []) == "other"


def recount(rows: list[dict[str, Any]]) -> Counter[tuple[str, str, str]]:
    """(kind, right or wrong, whose answer) of BCQ and NCQ rollouts, one by one."""
    found: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        if row["kind"] == "plain":
            continue
        audit = json.loads(row["audit"])
        bcq = row["kind"] == "bcq"
        right = [audit["positive_answer"]] if bcq else audit["teacher_answers"]
        wrong = [audit["negative_answer"]] if bcq else audit["wrong_answers"]
        answer = row["answer"] and normalise(row["answer"])
        which = (
            "none" if row["answer"] is None
            else "positive" if answer in map(normalise, right)
            else "negative" if answer in map(normalise, wrong)
            else "other"
        )  # fmt: skip
        found[row["kind"], "right" if row["correct"] else "wrong", which] += 1
    return found


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher gives its answer in several forms, and whose last step has no NCQ; as its trainer would have written it."""
    run = invented_run(tmp_path_factory.mktemp("runs") / "answered", steps=6)

    def change(row: dict[str, Any]) -> dict[str, Any]:
        audit = json.loads(row["audit"])
        if audit.get("teacher_answers"):
            audit["teacher_answers"] = [f"\\text{{{row['gold']}}}", f"{row['gold']}.0"]
            answer = f"{row['gold']}.0" if row["rollout"] == 0 else row["answer"]
            return {**row, "audit": json.dumps(audit), "answer": answer}
        return row

    for path in files_of(run):
        change_rows(path, change)
    last = files_of(run)[-1]
    table = pq.read_table(last)
    pq.write_table(table.filter(pc.field("kind") != "ncq"), last)
    return run


def test_match_rows_equal_a_plain_recount(answered: Path) -> None:
    """Tabs. 16 and 17: the last three steps that have rollouts of a kind, and the whole run; NCQ beside every correct teacher answer."""
    rows = rows_of(answered)
    found = run_rows([scan_file(path).counts for path in files_of(answered)])
    assert {which for _, _, which in recount(rows)} == set(MATCHES) and any("teacher_answers" in row["audit"] for row in rows)
    for kind in ("bcq", "ncq"):
        steps = sorted({row["step"] for row in rows if row["kind"] == kind})
        for source, window in (("last 3 steps", steps[-3:]), ("whole run", steps)):
            counted = recount([row for row in rows if row["step"] in window and row["kind"] == kind])
            for subset, parts in (("right", ["right"]), ("wrong", ["wrong"]), ("all", ["right", "wrong"])):
                [row] = [r for r in found if (r.source, r.kind, r.subset) == (source, kind, subset)]
                total = sum(counted[kind, part, which] for part in parts for which in MATCHES)
                assert row.rollouts == total > 0
                assert row.positive == pytest.approx(sum(counted[kind, p, "positive"] for p in parts) / total)
                assert row.negative == pytest.approx(sum(counted[kind, p, "negative"] for p in parts) / total)
                assert row.other == pytest.approx(sum(counted[kind, p, w] for p in parts for w in ("other", "none")) / total)
                right = sum(counted[kind, "right", w] for w in MATCHES)
                assert row.accuracy == pytest.approx(right / sum(counted[kind, p, w] for p in ("right", "wrong") for w in MATCHES))
    assert sorted({row["step"] for row in rows if row["kind"] == "ncq"})[-1] == 5  # so the two windows are not the same steps
    table = next(t for t in Reader(answered).read().tables if t.id == "match-table")
    [ours] = [r for r in table.rows if r[0] == "NCQ all · last 3 steps"]
    [papers] = [r for r in table.rows if r[0] == "NCQ all · paper 0.8B"]
    assert ours[-1] == f"{next(r.accuracy for r in found if (r.kind, r.source) == ('ncq', 'last 3 steps')):.1%}" and papers[-1] == "1.2%"


def test_a_log_without_the_teacher_s_answers_is_compared_with_the_bcq_s(answered: Path, tmp_path: Path) -> None:
    """Runs of older versions, and those of which the teacher was not asked about a question."""
    path = tmp_path / files_of(answered)[0].name
    path.write_bytes(files_of(answered)[0].read_bytes())

    def older(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "audit": json.dumps({k: v for k, v in json.loads(row["audit"]).items() if k != "teacher_answers"})}

    change_rows(path, older)
    rows = pq.read_table(path).to_pylist()
    positives = {r["question_id"]: json.loads(r["audit"])["positive_answer"] for r in rows if r["kind"] == "bcq"}
    ncq = [r for r in rows if r["kind"] == "ncq"]
    expected = sum(r["answer"] is not None and normalise(r["answer"]) == positives.get(r["question_id"]) for r in ncq)
    counts = scan_file(path).counts
    assert sum(n for k, n in counts.items() if k[:2] == ("match", "ncq") and k[3] == "positive") == expected > 0
    assert counts["ncq", "one answer alone"] == len(ncq) and counts["ncq", "unseen known"] == sum(
        r["question_id"] in positives for r in ncq
    )


def test_the_paper_s_rows_are_all_there() -> None:
    papers = paper_rows()
    assert len(papers) == 12 and sum(row.rollouts for row in papers) == 450 + 206 + 271 + 177 + 97 + 151 + 64 + 112 + 7720
    row = next(r for r in papers if (r.source, r.kind) == ("paper 0.8B", "ncq"))
    assert (row.negative, row.subset, row.none) == (0.827, "all", None)


def test_ungraded_rollouts_stay_out_of_audits_and_accuracies(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / files_of(folder)[0].name
    path.write_bytes(files_of(folder)[0].read_bytes())
    before = scan_file(path)
    change_rows(path, lambda row: {**row, "graded": row["rollout"] != 0})
    after = scan_file(path)
    for kind, sums in after.kinds.items():
        assert sums.graded == 7 * sums.groups and sums.rollouts == before.kinds[kind].rollouts == 8 * sums.groups
    assert sum(n for k, n in after.counts.items() if k[:2] == ("match", "bcq")) == 7 * after.kinds["bcq"].groups


# Answer leaks

QUESTION = Question("q", (Message("user", "What is 2 plus 2?"),), "4")


def prompt_of(kind: str, **slots: Any) -> str:
    return PromptBook().render(Draft(kind, QUESTION, slots))[-1].content


def leaks(kind: str, prompt: str, **audit: Any) -> dict[str, int]:
    return {key[2]: n for key, n in count_leaks(kind, audit, "4", prompt).items() if n}


def test_leaks_of_ncq() -> None:
    clean = prompt_of("ncq", answers=["3"], candidates=[r"so \boxed{3}", "no idea"])
    assert leaks("ncq", clean, wrong_answers=["3"]) == {"checked": 1}
    dirty = prompt_of("ncq", answers=["3"], candidates=[r"first \boxed{\text{ 4 }}, then \boxed{3}"])
    assert leaks("ncq", dirty, wrong_answers=["3"]) == {"checked": 1, "gold boxed": 1}
    assert leaks("ncq", clean, wrong_answers=["3", " 4"]) == {"checked": 1, "gold boxed": 1}
    assert leaks("ncq", "a template of one's own", wrong_answers=["3"]) == {"unchecked": 1}
    assert count_leaks("ncq", {"wrong_answers": ["3"]}, "4", clean, ["3.0", " 3"])["leak", "ncq", "gold boxed"] == 1  # any one is right


def test_leaks_of_bcq() -> None:
    audit = {"positive_answer": "4", "negative_answer": "5"}

    def found(right: str, wrong: str, at: int) -> dict[str, int]:
        prompt = prompt_of("bcq", candidates=[right, wrong] if at == 0 else [wrong, right])
        return leaks("bcq", prompt, correct_at=at, **audit)

    for at in (0, 1):
        assert found(r"it is \boxed{4}", r"it is \boxed{5}", at) == {"checked": 1}
        assert found(r"\boxed{4}", r"maybe \boxed{4} or \boxed{5}", at) == {"checked": 1, "gold in wrong": 1, "wrong longer": 1}
        assert found(r"\boxed{4}", r"\boxed{6}", at) == {"checked": 1, "answer changed": 1}
        assert found(r"so \boxed{4}", "cut", at) == {"checked": 1, "one box": 1, "right longer": 1}
    assert leaks("bcq", "no blocks", correct_at=0, **audit) == {"unchecked": 1}


@given(st.text(alphabet="\\boxed{} 4", max_size=60))
def test_boxes_never_fail(text: str) -> None:
    assert all(isinstance(box, str) for box in boxes(text))


def test_boxes_sees_nested_and_skips_open_ones() -> None:
    assert boxes(r"\boxed{a \boxed{b}} {x} \boxed{c") == ["b", r"a \boxed{b}"]


# The zone


def test_zone_equals_the_buffer_of_every_step(summary: summary_module.Summary) -> None:
    run = summary.run
    zone = zone_story(run.buffer, run.group_size, run.threshold, run.last_step)
    for line, column in zip(run.steps, zone.occupancy.T, strict=True):
        expected = {name.replace(".0%", "%"): n for name, n in line["buffer_by_entry"].items()}
        assert {name: n for name, n in zip(zone.names, column.tolist(), strict=True) if n} == expected
    events = Counter((e["event"], e["entry_accuracy"]) for e in run.buffer)
    assert all(events[name, 0.0] for name in ("admitted", "graduated", "evicted"))  # the run has all of it
    for k, (_, admitted, graduated, evicted) in enumerate(zone.totals()[:-1]):
        counted = tuple(events[name, k / 8] for name in ("admitted", "graduated", "evicted"))
        assert (admitted, graduated, evicted) == counted
    assert zone.totals()[-1][1:] == tuple(sum(cast(int, row[i]) for row in zone.totals()[:-1]) for i in (1, 2, 3))


def test_waits_equal_a_plain_recount(summary: summary_module.Summary) -> None:
    run = summary.run
    zone = zone_story(run.buffer, run.group_size, run.threshold, run.last_step)
    waits: dict[float, list[int]] = defaultdict(list)
    for event in run.buffer:
        if event["event"] == "graduated":
            waits[event["entry_accuracy"]].append(event["step"] - event["entry_step"])
    assert [list(w) for w in zone.waits] == [waits[k / 8] for k in range(4)]


def lives(run: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every entry of the buffer, followed step by step through the rollouts: entry accuracy, accuracies since, how it left."""
    plain: dict[int, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == "plain":
            plain[row["step"]][row["question_id"]].append(row["correct"])
    inside: dict[str, dict[str, Any]] = {}
    found = []
    for step in range(1, run.last_step + 1):
        for question, verdicts in plain[step].items():
            if question in inside:
                inside[question]["since"].append(sum(verdicts) / len(verdicts))
        for event in run.buffer:
            if event["step"] == step and event["event"] == "admitted":
                inside[event["id"]] = {"entry": event["entry_accuracy"], "since": [], "left": None}
                found.append(inside[event["id"]])
            elif event["step"] == step:
                life = inside.pop(event["id"])
                life["left"] = event["event"]
                assert len(life["since"]) == event["visits"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "most"), [({"steps": 40, "capacity": 14, "gain": 9.0}, 6), ({"steps": 24, "capacity": 40}, 3)])
def test_the_three_fates_equal_a_plain_recount(tmp_path: Path, shape: dict[str, Any], most: int) -> None:
    """Fig. 24: by number of visits, 1 to 6 or more; entries that are still in the buffer count."""
    summary = Reader(invented_run(tmp_path / "run", characters=60, **shape)).read()
    rows = rows_of(summary.run.folder)
    fates: Counter[tuple[int, str]] = Counter()
    for life in lives(summary.run, rows):
        improved = any(accuracy > life["entry"] for accuracy in life["since"])
        fate = "graduated" if life["left"] == "graduated" else "improved, not graduated" if improved else "never improved"
        fates[min(6, len(life["since"])), fate] += 1
    visited = sorted({n for n, _ in fates if n})
    chart = chart_of(summary, "visits")
    assert [s.name for s in chart.series] == list(FATES) and visited == list(range(1, most + 1))
    for series in chart.series:
        totals = [sum(fates[n, name] for name in FATES) for n in visited]
        assert list(series.x) == [f"{n if n < 6 else '6+'} ({total})" for n, total in zip(visited, totals, strict=True)]
        assert list(series.y) == pytest.approx([fates[n, series.name] / t for n, t in zip(visited, totals, strict=True)])
        assert list(series.hover) == [f"{fates[n, series.name]} of {t}" for n, t in zip(visited, totals, strict=True)]
    waiting = [life for life in lives(summary.run, rows) if life["left"] is None and life["since"]]
    assert bool(waiting) == (most == 3)  # in one of the two runs the buffer is empty at the end
    assert f"{sum(n for (k, _), n in fates.items() if not k)} were not asked again" in chart.caption
    run = summary.run
    again = zone_story(run.buffer, run.group_size, run.threshold, run.last_step, visits_of(run))  # as zppo compare reads them
    assert {k: tuple(v) for k, v in again.fates.items()} == {n: tuple(fates[n, name] for name in FATES) for n in visited}


def test_groups_without_verdicts_are_no_visits(folder: Path, tmp_path: Path) -> None:
    """As for the buffer itself: fewer than half of the rollouts graded."""
    path = tmp_path / files_of(folder)[0].name
    path.write_bytes(files_of(folder)[0].read_bytes())
    plain = list(dict.fromkeys(row["question_id"] for row in pq.read_table(path).to_pylist() if row["kind"] == "plain"))
    change_rows(path, lambda row: {**row, "graded": row["rollout"] < (3 if row["question_id"] == plain[0] else 4)})
    scanned = scan_file(path).visits
    assert [visit.question_id for visit in scanned] == plain[1:]
    assert visits_of(SimpleNamespace(rollout_files=[path])) == scanned  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:-100])
    assert visits_of(SimpleNamespace(rollout_files=[path])) == []  # type: ignore[arg-type]


def test_graduated_against_evicted_over_steps_and_as_a_number(summary: summary_module.Summary) -> None:
    """Figs. 5b and 23, the paper's beside them."""
    chart = chart_of(summary, "left")
    out: Counter[str] = Counter()
    for step in range(1, summary.run.last_step + 1):
        out.update(e["event"] for e in summary.run.buffer if e["step"] == step and e["event"] != "admitted")
        for series in chart.series[:2]:
            assert series.y[step - 1] == (pytest.approx(out[series.name] / sum(out.values())) if out else None)
    assert out["graduated"] and out["evicted"]
    assert {s.name: s.y[-1] for s in chart.series[2:]} == {
        "paper 2B, ZPPO": pytest.approx(2627 / 9878), "paper 2B, GRPO†": pytest.approx(1440 / 10087),
    }  # fmt: skip
    table = next(t for t in summary.tables if t.id == "zone-table")
    [ours] = [row for row in table.rows if row[0] == "all · this run"]
    assert ours[5] == f"{out['graduated'] / sum(out.values()):.1%}"
    assert [row[5] for row in table.rows if row[0].startswith("all · paper")] == ["26.6%", "14.3%"]


def test_what_graduates_were_as_shares(summary: summary_module.Summary) -> None:
    """Figs. 21 and 24."""
    chart = chart_of(summary, "graduate-shares")
    bars: dict[Any, dict[str, Any]] = {
        name: {s.name: s.y[i] for s in chart.series if s.y[i] is not None} for i, name in enumerate(chart.series[0].x)
    }
    events = Counter(e["entry_accuracy"] for e in summary.run.buffer if e["event"] == "graduated")
    assert bars["this run"] == {bin_name(k, 8): pytest.approx(events[k / 8] / sum(events.values())) for k in range(4)}
    assert all(sum(parts.values()) == pytest.approx(1) for parts in bars.values())
    assert bars["paper 2B, ZPPO"]["0%"] == pytest.approx(432 / 2627) and bars["paper 4B, ZPPO"]["0%"] == 0.21
    assert bars["paper 2B, GRPO†"]["12.5%"] == pytest.approx(169 / 1440)


def test_what_could_be_asked_again_before_the_caps(folder: Path, tmp_path: Path) -> None:
    """Fig. 5a, and a word where an older version logged nothing of it."""
    run = invented_run(tmp_path / "run", steps=3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    rows = rows_of(run)
    for line in steps:
        groups: dict[str, list[bool]] = defaultdict(list)
        for row in rows:
            if row["step"] == line["step"] and row["kind"] == "plain":
                groups[row["question_id"]].append(row["correct"])
        easy = sum(sum(verdicts) >= 4 for verdicts in groups.values())
        assert line["eligibility"]["easy"] == pytest.approx(easy / len(groups))
        assert sum(line["eligibility"].values()) == pytest.approx(1)
    del steps[0]["eligibility"]
    steps[1]["eligibility"]["unasked"] = steps[1]["eligibility"].pop("ncq")

    def read() -> tuple[ChartSpec | None, dict[str, tuple[str, ...]], str]:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = Reader(run).read()
        table = next(t for t in summary.tables if t.id == "eligibility-table")
        chart = next((c for c in summary.charts if c.id == "eligibility"), None)
        return chart, {row[0]: row[1:] for row in table.rows}, table.caption

    chart, table, caption = read()
    assert chart is not None and [s.y[0] for s in chart.series] == [None] * len(chart.series)
    assert {s.name: s.y[2] for s in chart.series}["BCQ and NCQ"] == steps[2]["eligibility"]["bcq"]
    assert "1 steps are empty" in chart.caption and "teacher.ask: all" in chart.caption and "1 steps of an older version" in caption
    known = [line["eligibility"] for line in steps[1:]]
    assert table["hard, and NCQ can be made"][0] == f"{sum(1 - k['easy'] for k in known) / 2:.1%}"
    assert table["hard, and BCQ can be made"][1] == f"{sum(line['composition']['bcq'] for line in steps) / 3:.1%}"
    assert table["of these the teacher was not asked"][0] == f"{steps[1]['eligibility']['unasked'] / 2:.1%}"
    for line in steps:
        line.pop("eligibility", None)
    chart, table, _ = read()
    assert chart is None and table["easy"][0] == "not logged"


def test_events_of_a_step_that_is_being_written_wait() -> None:
    event = {"step": 3, "event": "admitted", "entry_accuracy": 0.0, "entry_step": 3, "visits": 0}
    assert zone_story([event], 8, 0.5, 2).totals()[-1] == ("all", 0, 0, 0)


@given(st.integers(2, 32), st.floats(0.05, 1))
def test_bins_follow_the_group_size(size: int, threshold: float) -> None:
    bins = bin_count(size, threshold)
    below = [k for k in range(size) if k / size < threshold]
    assert [bin_of(np.float32(k / size).item(), size, bins) for k in below] == below == list(range(bins))


def test_bin_names_and_odd_denominators() -> None:
    assert [bin_name(k, 8) for k in range(4)] == ["0%", "12.5%", "25%", "37.5%"]
    assert bin_of(1 / 7, 8, 4) == 1 and bin_of(3 / 7, 8, 4) == 3  # one rollout of the eight was not graded


# Charts


def test_chart_numbers_equal_the_parquet_files(summary: summary_module.Summary, rows: list[dict[str, Any]]) -> None:
    def by_step(kind: str, value: Any) -> list[float]:
        steps: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            if kind in ("all", row["kind"]):
                steps[row["step"]].append(float(value(row)))
        return [sum(v) / len(v) for _, v in sorted(steps.items())]

    for name, value in {
        "accuracy": lambda r: r["correct"],
        "positive": lambda r: r["advantage"] > 0,
        "entropy": lambda r: r["entropy"],
        "lengths": lambda r: r["completion_tokens"],
        "truncated": lambda r: r["truncated"],
        "no-answer": lambda r: r["answer"] is None,
    }.items():
        chart = chart_of(summary, name)
        kinds = ["plain", "BCQ", "NCQ", *(["all"] if name in ("positive", "entropy") else [])]
        assert [s.name for s in chart.series] == kinds
        for series, kind in zip(chart.series, map(str.lower, kinds), strict=True):
            assert list(series.x) == list(range(1, 9))
            assert list(series.y) == pytest.approx(by_step(kind, value))


def test_charts_are_there_and_are_json(summary: summary_module.Summary) -> None:
    names = [chart.id for chart in summary.charts]
    assert len(set(names)) == len(names)
    assert {"held-out", "loss", "clip", "composition", "teacher", "eligibility", "occupancy", "graduation", "left", "graduates",
            "graduate-shares", "fate", "visits", "waiting", "match-bcq", "match-ncq"} <= set(names)  # fmt: skip
    for chart in summary.charts:
        text = json.dumps(chart.to_dict(), allow_nan=False)
        assert all(len(s["x"]) == len(s["y"]) for s in json.loads(text)["series"])


def test_graduation_is_graduated_by_admitted(summary: summary_module.Summary) -> None:
    series = chart_of(summary, "graduation").series[0]
    admitted = sum(e["event"] == "admitted" and e["entry_accuracy"] == 0 for e in summary.run.buffer)
    graduated = sum(e["event"] == "graduated" and e["entry_accuracy"] == 0 for e in summary.run.buffer)
    assert series.name == "0%" and series.y[-1] == pytest.approx(graduated / admitted)
    assert series.hover[-1] == f"{graduated} of {admitted}"
    assert f"{graduated} of {admitted} entries admitted at 0% graduated" in summary.outcome


def test_smoothing_only_of_long_lines_and_never_over_gaps() -> None:
    values = [1.0] * 20 + [None] + [3.0] * 39
    long = ChartSpec("a", "", "", (Series("a", range(60), values, "#000"),))
    mean = long.smoothed(long.series[0])
    assert mean is not None and mean[0] == 1 and mean[20] is None and mean[-1] == 3 and 1 < cast(float, mean[19]) <= 3
    short = Series("a", range(5), values[:5], "#000")
    assert long.smoothed(short) is None


def test_ramp_goes_from_dark_to_light() -> None:
    light = [sum(int(c[i : i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.59), (5, 0.11))) for c in ramp(8)]
    assert light == sorted(light) and len(set(light)) == 8 and len(ramp(1)) == 1
    assert light[0] > 75  # the line of what was admitted at 0% can be seen on the dark page


def test_duration_reads_well() -> None:
    assert [duration(s) for s in (5, 119, 600, 4000, 36000)] == ["5 s", "119 s", "10 min", "67 min", "10 h 00 min"]


# Questions and stories


def test_question_lines_tell_what_happened(summary: summary_module.Summary, rows: list[dict[str, Any]]) -> None:
    asked = {(r["question_id"], r["step"], r["kind"]) for r in rows}
    assert asked == {(line.id, v.step, v.kind) for line in summary.lines.values() for v in line.visits}
    last = {e["id"]: e["event"] for e in summary.run.buffer}
    for line in summary.lines.values():
        assert line.fate == {"admitted": "waiting"}.get(cast(Any, last.get(line.id)), last.get(line.id, "never hard"))
        correct = [sum(r["correct"] for r in rows if (r["question_id"], r["step"], r["kind"]) == (line.id, v.step, "plain"))
                   for v in line.visits if v.kind == "plain"]  # fmt: skip
        assert line.accuracies == [c / 8 for c in correct]
        assert bool(line.classes) == any(v.kind != "plain" for v in line.visits)
    assert list(summary.lines) == question_ids(summary.run)


@pytest.mark.parametrize(("plain", "stuck"), [([0, 0], True), ([2, 1, 2], True), ([0, 1, 0], False), ([0], False), ([5, 5], False)])
def test_never_improved(plain: list[int], stuck: bool) -> None:
    line = QuestionLine("q", "", "", "", [Visit(i, "plain", c, 8, 8, float(c), 80) for i, c in enumerate(plain)])
    assert line.never_improved(0.5) == stuck


def stratum(line: QuestionLine) -> set[tuple[Any, ...]]:
    return {(frozenset(line.kinds), line.entry_bin, name) for name in line.classes or {""}}


def test_stories_are_spread_over_all_strata(summary: summary_module.Summary) -> None:
    lines = list(summary.lines.values())
    strata = set().union(*map(stratum, lines))
    some = stratified(lines, len(strata))
    assert set().union(*map(stratum, some)) == strata
    assert len({line.id for line in some}) == len(some) <= len(strata)
    assert stratified(lines[::-1], 5) == some[:5]  # whatever the order, and shorter lists are beginnings of longer ones
    assert len(stratified(lines, 10_000)) == len(lines) and stratified(lines, 0) == []


def test_a_story_is_whole(summary: summary_module.Summary, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    line = max(summary.lines.values(), key=lambda q: len(q.visits))
    story = load_stories(summary.run, {line.id: line.steps})[line.id]
    own = [r for r in rows if r["question_id"] == line.id]
    assert [r["completion"] for g in story["groups"] for r in g["rollouts"]] == [r["completion"] for r in own]
    assert [story["prompts"][g["prompt"]] for g in story["groups"]] == [r["prompt"] for r in own if r["rollout"] == 0]
    assert {g["kind"] for g in story["groups"]} == {"plain", "bcq", "ncq"}
    assert story["question"] == own[0]["question"] and story["gold"] == own[0]["gold"]
    assert [e["event"] for e in story["events"]] == [e["event"] for e in summary.run.buffer if e["id"] == line.id]
    classes = {r["class"] for g in story["groups"] for r in g["rollouts"] if "class" in r}
    assert classes == line.classes


def test_a_group_may_lie_across_row_groups(folder: Path, tmp_path: Path) -> None:
    run = invented_run(tmp_path / "run", steps=2)
    wanted = {name: [1, 2] for name in question_ids(open_run(run))}
    whole = load_stories(open_run(run), wanted)
    for path in files_of(run):
        change_rows(path, lambda row: row, row_group_size=3)
    assert load_stories(open_run(run), wanted) == whole


@given(st.integers(400, 100_000))
def test_a_trimmed_story_keeps_its_outcomes(most: int) -> None:
    rollouts = [{"completion": "x" * 5000, "correct": i % 2 == 0} for i in range(4)]
    story = {"prompts": ["p" * 9000], "groups": [{"step": s, "rollouts": rollouts} for s in range(9)]}
    short = trimmed(story, most)
    assert [[r["correct"] for r in g["rollouts"]] for g in short["groups"]] == [[r["correct"] for r in rollouts]] * 9
    bare = {**short, "groups": [{**g, "rollouts": [{**r, "completion": None} for r in g["rollouts"]]} for g in short["groups"]]}
    assert bytes_of(short) <= max(most, bytes_of(bare))
    texts = [g["rollouts"][0]["completion"] is not None for g in short["groups"]]
    assert texts == sorted(texts[:5], reverse=True) + texts[5:] and texts[0] >= texts[4]


def test_cut_says_what_is_missing() -> None:
    assert cut("abcdefghij", 10) == "abcdefghij"
    assert cut("abcdefghij", 4) == "ab\n[... 6 characters left out ...]\nij"


def test_images_become_small_data_and_missing_ones_are_named(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (2000, 1000), (255, 0, 0, 128)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    names = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    good, broken, missing = with_images({"images": names})["images"]
    assert good["data"].startswith("data:image/png;base64,") and len(good["data"]) < 20_000
    assert broken["missing"].startswith("is no image") and "data" not in missing
    assert missing["missing"].startswith("cannot be read (No such file")


def test_an_image_that_has_changed_is_not_shown_as_what_the_model_saw(tmp_path: Path) -> None:
    """The log has paths and digests; files from before there were digests are read all the same."""
    (tmp_path / "a.png").write_bytes(noise((20, 10), 1))
    seen = reference(tmp_path / "a.png")[0]
    question = Question("q", (Message("user", "?"),), "1", (seen,))
    rollout = Rollout(torch.tensor([1]), torch.zeros(1), "x", "1", True, 1.0)
    log = RunLog(tmp_path / "run")
    log.open()
    log.rollouts(
        1,
        [Group(Prompt("plain", question, question.messages, (1, 2)), (rollout,))],
        [0.0],
        replayed=frozenset(),
        entry_accuracy={},
        show=str,
    )

    def shown() -> Any:
        run: Any = SimpleNamespace(folder=tmp_path / "run", buffer=[])
        [image] = with_images(load_stories(run, {"q": [1]})["q"])["images"]
        return image

    assert shown()["data"].startswith("data:image/png")
    (tmp_path / "a.png").write_bytes(noise((20, 10), 2))
    assert "data" not in shown()
    assert shown()["missing"] == f"is not the one that the questions were read with (SHA-256 {seen.sha256[:12]}... then)"
    [file] = files_of(tmp_path / "run")
    pq.write_table(pq.read_table(file).drop_columns(["image_sha256"]), file)
    assert shown()["data"].startswith("data:image/png")


@pytest.mark.slow
def test_many_images_are_shown_smaller_so_that_a_story_fits(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    names = []
    for seed in range(4):
        (tmp_path / f"{seed}.png").write_bytes(noise((800, 400), seed))
        names.append(str(tmp_path / f"{seed}.png"))

    def side(most: int | None) -> int:
        data = with_images({"images": names}, most)["images"][0]["data"]
        return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).width

    assert (side(None), side(300_000), side(1)) == SIDES


def test_nearest_ids() -> None:
    assert nearest("q:1", ["q:1", "q:10", "r:1", "q:2"]) == ["q:1", "q:10"]
    assert nearest("zzz", ["q:1"]) == []


# Reading


def test_the_reader_reads_a_file_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = invented_run(tmp_path / "run", steps=3)
    read: list[str] = []
    monkeypatch.setattr(summary_module, "scan_file", lambda path: (read.append(path.name), scan_file(path))[1])
    reader = Reader(run)
    stamp = reader.stamp()
    first = reader.read()
    assert len(read) == 3 and reader.stamp() == stamp
    (run / "rollouts" / "step-000004.parquet").write_bytes(files_of(run)[0].read_bytes())
    assert reader.stamp() != stamp
    assert reader.read().lines.keys() == first.lines.keys()
    assert read[3:] == ["step-000004.parquet"]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = invented_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").write_text("")
    (run / "buffer.jsonl").unlink()
    for path in files_of(run):
        path.unlink()
    summary = Reader(run).read()
    assert summary.outcome == "No step is finished yet." and summary.charts == [] and summary.lines == {}


@pytest.mark.parametrize("what", ["no folder", "no recipe", "broken recipe", "no mapping"])
def test_no_run_is_said(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    if what != "no folder":
        folder.mkdir()
    if what in ("broken recipe", "no mapping"):
        (folder / "recipe.yaml").write_text("a: [" if what == "broken recipe" else "- 1")
    with pytest.raises(CheckpointError, match=str(folder)):
        open_run(folder)


def test_question_lines_of_a_run_without_a_buffer(tmp_path: Path) -> None:
    run = open_run(invented_run(tmp_path / "run", steps=2, method="grpo"))
    lines = question_lines(run, map(scan_file, files_of(run.folder)))
    assert {line.fate for line in lines.values()} == {"never hard"} and not run.replays
    charts = {chart.id for chart in Reader(run.folder).read().charts}
    assert "occupancy" not in charts and "match-bcq" not in charts and "accuracy" in charts


def test_a_part_has_one_colour_on_every_chart_and_no_other_part_has_it(tmp_path: Path) -> None:
    """Two kinds of one's own beside the known ones; parts of a step that no version knew."""
    run = invented_run(tmp_path / "run", steps=3)
    names = {"bcq": "mine", "ncq": "package.module:Yours"}
    for path in files_of(run):
        change_rows(path, lambda row: {**row, "kind": names.get(row["kind"], row["kind"]), "audit": "{}"})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "step":
            line["composition"] = {names.get(name, name): share for name, share in line["composition"].items()}
            line["seconds"] |= {"engine": 1.0, "grading": 2.0, "polishing": 3.0, "waxing": 4.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    charts = {chart.id: chart for chart in Reader(run).read().charts}
    of_kind = {s.name: s.colour for s in charts["accuracy"].series}
    parts = {s.name: s.colour for s in charts["composition"].series}
    assert set(of_kind) == {"plain", "mine", "package.module:Yours"} and "mine" in parts
    for chart in charts.values():
        if chart.kind != "hbar":
            assert len({s.colour for s in chart.series}) == len(chart.series), chart.id
        assert all(s.colour == of_kind[s.name] for s in chart.series if s.name in of_kind), chart.id
    seconds = {s.name for s in charts["seconds"].series}
    assert {"polishing", "waxing", "engine"} <= seconds and "grading" not in seconds  # it lies in sampling already


def test_a_candidate_without_an_answer_is_followed_by_nobody() -> None:
    """Its BCQ counts among the matches, and not in the position bias, where only one of the two could be followed."""
    audit = {"correct_at": 0, "positive_answer": "4", "negative_answer": None}
    counts, classes = count_group("bcq", audit, None, [("4", True), ("5", False), (None, False)])
    assert classes == ["bcq:right:positive", "bcq:wrong:other", "bcq:wrong:none"]
    assert not any(name[0] == "position" for name in counts)
    whole, _ = count_group("bcq", audit | {"negative_answer": "5"}, None, [("4", True), ("5", False)])
    assert whole["position", "prompts"] == 1 and whole["position", "n"] == 1
