"""The page in a real browser: loads alone and without errors, shows the right numbers, filters, and leaves model text as text."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import Browser
from report_runs import change_rows, files_of, invented_run, rows_of
from zppo.report.compare import compare_command
from zppo.report.page import make_server, report_command, report_page, script_json
from zppo.report.summary import Reader

pytestmark = pytest.mark.slow

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!-- <b>bold</b> \u2028 &lt;"
PICTURED = "invented.jsonl:3"
COMPARED = "invented.jsonl:4"
ATTACKED = "invented.jsonl:2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which one question's texts attack the page and another one has an image; its report is written."""
    from PIL import Image

    base = tmp_path_factory.mktemp("page")
    run = invented_run(base / "run")
    Image.new("RGB", (40, 30), (0, 114, 178)).save(base / "image.png")
    Image.new("RGB", (700, 300), (213, 94, 0)).save(base / "wide.png")

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["question_id"] == PICTURED:
            return {**row, "images": [str(base / "image.png")]}
        if row["question_id"] == COMPARED:
            names = [str(base / name) for name in ("image.png", "wide.png", "gone.png")]
            return {**row, "images": names, "question": "Is <image> in <image>, or in <image>?"}
        if row["question_id"] != ATTACKED:
            return row
        attacked = dict.fromkeys(("question", "level", "completion", "prompt", "gold", "reason"), HOSTILE)
        return {**row, **attacked, "answer": HOSTILE}

    for path in files_of(run):
        change_rows(path, change)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"medium"', json.dumps(HOSTILE)))
    report_command(run, out=None, suffixes=())
    return run


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """A window of a desktop's size; whatever a test does, nothing may fail in it."""
    shared_browser.call("Page.navigate", url="about:blank")  # the page of the test before may still ask its server, which is gone
    shared_browser.until("location.href === 'about:blank'")
    shared_browser.errors.clear()
    shared_browser.requests.clear()
    shared_browser.size(1280, 900)
    yield shared_browser
    assert shared_browser.errors == []


@pytest.fixture
def page(browser: Browser, folder: Path) -> Browser:
    browser.open((folder / "report.html").as_uri())
    return browser


def shown_ids(page: Browser) -> list[str]:
    found: list[str] = page.eval("browser.shown.map((q) => q.id)")
    return found


def set_field(page: Browser, field: str, value: str) -> None:
    """Choose or type a value, as a person would make the page hear of it."""
    page.eval(
        f"(() => {{ const node = document.getElementById({json.dumps(field)}); node.value = {json.dumps(value)};"
        "node.dispatchEvent(new Event('input', {bubbles: true})); node.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def test_the_page_loads_alone_and_without_errors(page: Browser, folder: Path) -> None:
    address = (folder / "report.html").as_uri()
    assert {url for url in page.requests if not url.startswith(("data:", "blob:"))} == {address}
    assert page.eval("document.title") == "run"
    assert page.eval("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == [
        "Dynamics", "The zone", "Audits", "Questions", "Recipe",
    ]  # fmt: skip
    assert "zppo" in page.eval("document.getElementById('head').textContent")


def draw_all(page: Browser) -> None:
    page.eval("dispatchEvent(new Event('beforeprint'))")
    page.until("[...report.plots.values()].every((p) => p.drawn && p.node.querySelector('.main-svg'))")


def test_a_figure_s_numbers_equal_those_of_the_parquet_files(page: Browser, folder: Path) -> None:
    draw_all(page)
    drawn = page.eval("report.plots.get('accuracy').node.data.map((t) => [t.name, t.x, t.y])")
    sums: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(folder):
        sums[row["kind"]][row["step"]].append(row["correct"])
    assert [name for name, _, _ in drawn] == ["plain", "BCQ", "NCQ"]
    for name, x, y in drawn:
        expected = {step: sum(v) / len(v) for step, v in sorted(sums[name.lower()].items())}
        assert x == list(expected) and y == pytest.approx(list(expected.values()), abs=1e-5)


def test_every_chart_is_drawn_and_has_a_hover(page: Browser) -> None:
    draw_all(page)
    assert page.eval("report.plots.size") >= 20
    assert page.eval("[...report.plots.values()].every((p) => p.node.data.some((t) => t.hovertemplate))")


def test_model_text_stays_text(page: Browser) -> None:
    page.eval(f"openStory({json.dumps(ATTACKED)})")
    page.until("document.querySelector('#story h3')")
    page.eval("toggleAll()")
    for selector in ("#story .question", "#story .rollout pre", "#story .prompt pre", "#story .answer"):
        assert HOSTILE in page.eval(f"document.querySelector({json.dumps(selector)}).textContent"), selector
    assert page.eval("document.querySelectorAll('#story script, #story img, #story b').length") == 0
    draw_all(page)  # a level's name stands in a legend
    assert page.eval("report.plots.get('held-out').node.querySelector('.legend').textContent").count("<script>") == 1
    assert page.eval("typeof window.hacked") == "undefined"


def test_nothing_runs_but_the_page_s_own_scripts(page: Browser) -> None:
    """The second wall: even markup that did get in would not run."""
    page.eval("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.hacked = 1\">')")
    page.eval("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))")
    page.eval("fetch('https://example.org/').catch(() => 1)")
    assert page.eval("new Promise((done) => setTimeout(() => done(typeof window.hacked), 200))") == "undefined"
    refused = [error for error in page.errors if "Content Security Policy" in error]
    assert len(refused) >= 3
    page.errors.clear()


def test_filters_show_what_the_files_say(page: Browser, folder: Path) -> None:
    lines = Reader(folder).read().lines
    assert set(shown_ids(page)) == set(lines)  # so few questions are all in the file

    def expect(field: str, value: str, ids: set[str]) -> None:
        set_field(page, field, value)
        assert ids and set(shown_ids(page)) == ids, field
        assert page.eval("document.getElementById('shown').textContent").startswith(f"{len(ids)} of {len(lines)} questions")
        assert page.eval("document.querySelectorAll('.item').length") == min(100, len(ids))
        page.eval("resetFilters()")
        assert set(shown_ids(page)) == set(lines)

    expect("filter-kind", "ncq", {q.id for q in lines.values() if "ncq" in q.kinds})
    expect("filter-fate", "graduated", {q.id for q in lines.values() if q.fate == "graduated"})
    expect("filter-bin", "12.5%", {q.id for q in lines.values() if q.entry_bin == 1})
    expect("filter-level", "hard", {q.id for q in lines.values() if q.level == "hard"})
    expect("filter-class", "ncq:wrong:negative", {q.id for q in lines.values() if "ncq:wrong:negative" in q.classes})
    expect("from", "8", {q.id for q in lines.values() if max(q.steps) == 8})
    expect("to", "1", {q.id for q in lines.values() if min(q.steps) == 1})
    expect("search", "PLUS 17?", {q.id for q in lines.values() if "17?" in q.text})
    page.eval("document.getElementById('stuck').click()")
    assert set(shown_ids(page)) == {q.id for q in lines.values() if q.never_improved(0.5)}


def test_a_story_shows_prompts_answers_and_verdicts(page: Browser, folder: Path) -> None:
    own: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows_of(folder):
        own[row["question_id"]].append(row)
    rows = next(r for r in own.values() if {"bcq", "ncq"} <= {row["kind"] for row in r})
    page.eval(f"openStory({json.dumps(rows[0]['question_id'])})")
    page.until(f"document.querySelector('#story h3').textContent === {json.dumps(rows[0]['question_id'])}")
    assert page.eval("[...document.querySelectorAll('#story .rollout pre')].map((p) => p.textContent)") == [
        row["completion"] for row in rows
    ]
    assert page.eval("[...document.querySelectorAll('#story .prompt pre')].map((p) => p.textContent)") == [
        row["prompt"] for row in rows if row["rollout"] == 0
    ]
    verdicts = page.eval("[...document.querySelectorAll('#story .verdict')].map((p) => p.classList[1])")
    assert verdicts == ["right" if row["correct"] else "wrong" for row in rows]
    text = page.eval("document.getElementById('story').textContent")
    bcq = next(json.loads(row["audit"]) for row in rows if row["kind"] == "bcq")
    assert f"candidate {bcq['correct_at'] + 1} is right ({bcq['positive_answer']})" in text
    marks = page.eval("[...document.querySelectorAll('#story mark.right')].map((m) => m.textContent)")
    assert all(f"\\boxed{{{bcq['positive_answer']}}}" in mark for mark in marks) and marks


def test_images_of_a_question_are_shown(page: Browser) -> None:
    page.eval(f"openStory({json.dumps(PICTURED)})")
    page.until("document.querySelector('#story img')?.naturalWidth === 40")


def test_several_images_stand_at_their_places(page: Browser) -> None:
    page.eval(f"openStory({json.dumps(COMPARED)})")
    page.until("document.querySelectorAll('#story img').length === 2 && document.querySelectorAll('#story img')[1].naturalWidth === 640")
    parts = "[...document.querySelector('#story .question').childNodes].map((n) => n.alt || n.textContent)"
    first, image, second, wide, third, gone, last = page.eval(parts)
    assert (first, second, third, last) == ("Is ", " in ", ", or in ", "?")
    assert image.startswith("image 1: ") and wide.endswith("wide.png") and "gone.png cannot be read" in gone
    page.size(390, 800, phone=True)
    assert page.eval("document.documentElement.scrollWidth <= innerWidth")
    page.size(1280, 900)


def test_the_keyboard_does_it_all(page: Browser) -> None:
    first, second = shown_ids(page)[:2]
    page.key("/")
    assert page.eval("document.activeElement.id") == "search"
    page.key("Enter")
    page.until(f"browser.open === {json.dumps(first)}")
    page.key("Escape")
    page.key("j")
    page.until(f"browser.open === {json.dumps(second)}")
    page.key("k")
    page.until(f"browser.open === {json.dumps(first)}")
    page.until(f"document.querySelector('#story h3').textContent === {json.dumps(first)}")
    page.key("e")
    assert page.eval("[...document.querySelectorAll('#story details')].every((d) => d.open)")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(browser: Browser, folder: Path, dark: bool) -> None:
    browser.size(360, 740, phone=True, dark=dark)
    browser.open((folder / "report.html").as_uri())
    draw_all(browser)
    browser.eval(f"openStory({json.dumps(ATTACKED)})")
    browser.until("document.querySelector('#story h3')")
    browser.eval("toggleAll()")
    assert browser.eval("document.documentElement.scrollWidth") <= 360
    background = browser.eval("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


def test_stories_stay_within_their_limits_and_that_is_said(folder: Path) -> None:
    summary = Reader(folder).read()
    few = report_page(summary, most_stories=5)
    assert few.count('id="story-') == 5 and f"holds 5 of the run's {len(summary.lines)} questions" in few
    base = len(report_page(summary, most_stories=0).encode())
    small = report_page(summary, most_bytes=base + 150_000)
    assert base < len(small.encode()) <= base + 150_000
    assert 0 < small.count('id="story-') < len(summary.lines)


def test_script_json_cannot_end_its_element() -> None:
    text = script_json({"a": "</script><!--", "b": "\ud800"})
    assert "<" not in text and json.loads(text) == {"a": "</script><!--", "b": "?"}


# Watching


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A run of three steps that is being watched."""
    run = invented_run(tmp_path / "run", steps=3)
    with make_server(Reader(run), 0) as server:
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
    browser.until("document.querySelector('#story .rollout pre')")  # read from the parquet files
    draw_all(browser)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    step = {**json.loads(next(line for line in lines if '"step": 3' in line and '"loss"' in line)), "step": 4}
    new = run / "new.parquet"
    new.write_bytes(files_of(run)[0].read_bytes())
    change_rows(new, lambda row: {**row, "step": 4, "question_id": f"new {row['question_id']}"})
    new.rename(run / "rollouts" / "step-000004.parquet")  # whole, as a run writes it
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step) + "\n")
    browser.until("report.plots.get('loss').node.data[0].x.length === 4", 30)
    assert known < set(shown_ids(browser))
    browser.eval(f"openStory({json.dumps('new ' + ATTACKED)})")
    browser.until(f"document.querySelector('#story h3').textContent === {json.dumps('new ' + ATTACKED)}")
    assert browser.eval("document.querySelectorAll('#story .rollout').length") >= 8


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
    assert get(url, host="evil.example")[0] == 403
    assert get(url + "recipe.yaml")[0] == 404 and get(url + "story?id=../recipe.yaml")[0] == 404
    assert get(url + "story?id=invented.jsonl:1")[0] == 200
    (run / "rollouts" / "step-000009.parquet").write_bytes(b"torn")
    status, text = get(url + "data")
    assert status == 200 and '["left out, damaged","step-000009.parquet"]' in text


# Comparing


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
