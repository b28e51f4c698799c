"""Pages that follow live runs, and those of comparisons, in a real browser."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import Browser, click, drag, draw_all, field_value, set_field, shown_ids
from report_runs import change_rows, files_of, invented_run, rows_of
from zppo.report.compare import compare_command
from zppo.report.summary import Reader
from zppo.report.watch import WatchedComparison, WatchedRun, make_server

pytestmark = pytest.mark.slow

OPENED = "invented.jsonl:2"


# Watching


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A run of three steps that is being watched."""
    run = invented_run(tmp_path / "run", steps=3)
    with make_server(WatchedRun(Reader(run)), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", run
        server.shutdown()
        thread.join()


def test_watching_shows_every_question_and_every_new_step(browser: Browser, address: tuple[str, Path]) -> None:
    url, run = address
    browser.open(url)
    assert {request for request in browser.requests if not request.startswith(("data:", url))} == set()
    known = set(shown_ids(browser))
    assert known == {row["question_id"] for row in rows_of(run)}
    browser.until("document.querySelector('#story .rollout')")  # read from the parquet files
    draw_all(browser)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    step = {**json.loads(next(line for line in lines if '"step": 3' in line and '"loss"' in line)), "step": 4}
    new = run / "new.parquet"
    new.write_bytes(files_of(run)[0].read_bytes())
    change_rows(new, lambda row: {**row, "step": 4, "question_id": f"new {row['question_id']}"})
    new.rename(run / "rollouts" / "step-000004.parquet")  # whole, as a run writes it
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step) + "\n")
    browser.until("report.plots.get('loss').node.data[0].x.length === 4")
    assert known < set(shown_ids(browser))
    browser.eval(f"openStory({json.dumps('new ' + OPENED)})")
    browser.until(f"document.querySelector('#story h3').firstChild.textContent === {json.dumps('new ' + OPENED)}")
    assert browser.eval("document.querySelectorAll('#story .rollout').length") >= 8


def one_more_step(run: Path, step: int, **changes: Any) -> None:
    """The run goes on: the rows of step 1 again, as a later step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["event"] == "step")
    new = run / "new.parquet"
    new.write_bytes(files_of(run)[0].read_bytes())
    change_rows(new, lambda row: {**row, "step": step})
    new.rename(run / "rollouts" / f"step-{step:06d}.parquet")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**first, "step": step, **changes}) + "\n")


def test_an_update_keeps_zoom_legend_choices_filters_and_the_open_story(browser: Browser, address: tuple[str, Path]) -> None:
    url, run = address
    browser.open(url)
    draw_all(browser)
    browser.eval(f"openStory({json.dumps(OPENED)})")
    browser.until(f"document.querySelector('#story h3')?.firstChild.textContent === {json.dumps(OPENED)}")
    browser.eval("document.querySelector('#story .rollout').open = true")
    browser.until("document.querySelector('#story .completion').childNodes.length")
    set_field(browser, "filter-level", "easy")
    shown = shown_ids(browser)
    drag(browser, "#chart-loss .nsewdrag")
    zoomed = browser.eval(ranges := "['xaxis', 'yaxis'].map((a) => report.plots.get('loss').node.layout[a].range)")
    assert 1 < zoomed[0][0] < zoomed[0][1] < 3
    click(browser, "#chart-accuracy .legend .traces:nth-child(2) .legendtoggle")
    browser.until("report.plots.get('accuracy').node.calcdata.filter((d) => d[0].trace.visible === 'legendonly').length === 1")
    visits = browser.eval("document.querySelectorAll('#story .visit').length")

    unreachable = {"teacher_unreachable": 3.0}  # a chart that was not there before
    one_more_step(run, 4, **unreachable)
    browser.until("report.plots.get('loss').node.data[0].x.length === 4")
    browser.until(f"document.querySelectorAll('#story .visit').length === {visits + 1}")
    assert browser.eval(ranges) == zoomed
    visible = "report.plots.get('accuracy').node.data.map((t) => [t.name, t.visible ?? true])"
    assert browser.eval(visible) == [["plain", True], ["BCQ", "legendonly"], ["NCQ", True]]
    assert browser.eval(
        "document.querySelector('#story .rollout').open && document.querySelector('#story .completion').childNodes.length > 0"
    )
    assert browser.eval("browser.open") == OPENED and field_value(browser, "filter-level") == "easy"
    assert set(shown) <= set(shown_ids(browser))
    assert browser.eval("report.plots.has('teacher-missing') && [...document.querySelectorAll('.plot')].every((n) => n.isConnected)")


def test_watching_says_how_far_the_run_is_and_searches_completions(browser: Browser, address: tuple[str, Path]) -> None:
    url, run = address
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("steps: 3", "steps: 30"))
    browser.open(url)
    wanted = r"^live · step 3 of 30 · 6 min a step · about 2 h 38 min left · last news \d+ s ago$"
    browser.until(f"/{wanted}/.test(document.getElementById('live').textContent)")
    made = browser.eval("document.getElementById('made').textContent")
    one_more_step(run, 4)
    browser.until("document.getElementById('live').textContent.startsWith('live · step 4 of 30')")
    assert browser.eval("document.getElementById('made').textContent") > made
    row = next(row for row in rows_of(run) if row["kind"] == "ncq" and row["answer"])
    word = row["completion"].split()[-1]
    set_field(browser, "search", word)
    browser.until("!document.getElementById('shown').textContent.includes('looking')")
    assert set(shown_ids(browser)) == {r["question_id"] for r in rows_of(run) if word.lower() in r["completion"].lower()}


def get(url: str, host: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_answers_its_own_pages_only(address: tuple[str, Path]) -> None:
    url, run = address
    assert get(url + "stamp")[0] == 200 and get(url + "data")[0] == 200
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io:8765", "x@evil.example", "[::1]evil"):
        assert get(url, host=host)[0] in (400, 403), host
    for host in ("localhost:9999", "127.0.0.1:1", "localhost", "[::1]:8765"):  # the other end of a tunnel
        assert get(url + "stamp", host=host)[0] == 200, host
    assert get(url + "recipe.yaml")[0] == 404 and get(url + "story?key=../recipe.yaml")[0] == 404
    assert get(url + "story?key=invented.jsonl:1")[0] == 200
    (run / "rollouts" / "step-000009.parquet").write_bytes(b"torn")
    status, text = get(url + "data")
    assert status == 200 and '["left out, damaged","step-000009.parquet"]' in text


# Comparing


def test_several_live_runs_on_one_page(browser: Browser, tmp_path: Path) -> None:
    runs = [invented_run(tmp_path / name, method=name, steps=3) for name in ("zppo", "grpo")]
    just_begun = tmp_path / "just-begun"
    just_begun.mkdir()
    (just_begun / "recipe.yaml").write_text((runs[0] / "recipe.yaml").read_text().replace("seed: 0", "seed: 5"))
    with make_server(WatchedComparison([*runs, just_begun]), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            browser.open(f"http://127.0.0.1:{server.server_port}/")
            draw_all(browser)
            names = browser.eval("report.plots.get('accuracy-plain').chart.series.map((s) => [s.name, s.x.length])")
            assert names == [["zppo", 3], ["grpo", 3]]
            assert "just-begun" in browser.eval("document.body.textContent")
            one_more_step(runs[1], 4)
            browser.until("report.plots.get('accuracy-plain').node.data.some((t) => t.x.length === 4)")
            at = browser.eval("document.getElementById('live').textContent")
            assert "grpo step 4 of 3" in at and "just-begun step 0 of 3" in at
        finally:
            server.shutdown()
            thread.join()


def test_the_page_of_a_comparison(browser: Browser, tmp_path: Path) -> None:
    runs = [
        invented_run(tmp_path / f"{method}-{seed}", seed=seed, steps=4, method=method) for method in ("zppo", "grpo") for seed in (0, 1)
    ]
    compare_command(runs, html=True, out=tmp_path / "compare.html", suffixes=())
    browser.open((tmp_path / "compare.html").as_uri())
    draw_all(browser)
    drawn = browser.eval("report.plots.get('accuracy-plain').chart.series")
    assert [series["name"] for series in drawn] == ["zppo", "grpo"]
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    values = [[m["accuracy"]["plain"] for m in lines if m["event"] == "step"] for lines in metrics]
    assert drawn[0]["y"] == pytest.approx([(a + b) / 2 for a, b in zip(values[0], values[1], strict=True)], rel=1e-5)
    assert drawn[0]["low"] == pytest.approx([min(p) for p in zip(values[0], values[1], strict=True)], rel=1e-5)
    assert [s["name"] for s in browser.eval("report.plots.get('accuracy-bcq').chart.series")] == ["zppo"]
    assert browser.eval("document.getElementById('questions')") is None
