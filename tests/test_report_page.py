"""The page in a real browser: loads alone and without errors, shows the right numbers, filters, and leaves model text as text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chromium import Browser, draw_all, set_field, shown_ids
from report_runs import change_rows, evaluated, files_of, invented_run, rows_of
from zppo.grading.text import final_part
from zppo.report.page import report_command, report_page, script_json
from zppo.report.read_run import open_run
from zppo.report.summary import Reader
from zppo.report.watch import search_completions

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


def open_all(page: Browser) -> None:
    """Open every answer; what is drawn is drawn then."""
    page.eval("document.querySelectorAll('#story details:not(.thoughts)').forEach((d) => { d.open = true; })")
    page.until("[...document.querySelectorAll('#story .completion')].every((n) => n.childNodes.length)")


@pytest.fixture
def page(browser: Browser, folder: Path) -> Browser:
    browser.open((folder / "report.html").as_uri())
    return browser


def test_the_page_loads_alone_and_without_errors(page: Browser, folder: Path) -> None:
    address = (folder / "report.html").as_uri()
    assert {url for url in page.requests if not url.startswith(("data:", "blob:"))} == {address}
    assert page.eval("document.title") == "run"
    assert page.eval("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == [
        "Dynamics", "The zone", "Audits", "Questions", "Recipe",
    ]  # fmt: skip
    assert "zppo" in page.eval("document.getElementById('head').textContent")


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


@pytest.mark.parametrize("name", ["eligibility", "entropy", "left", "graduate-shares", "visits", "match-bcq", "match-ncq"])
def test_a_chart_draws_the_numbers_that_were_worked_out(page: Browser, folder: Path, name: str) -> None:
    draw_all(page)
    chart = next(chart for chart in Reader(folder).read().charts if chart.id == name)
    drawn = page.eval(f"report.plots.get({json.dumps(name)}).node.data.map((t) => [t.name, t.orientation === 'h' ? t.x : t.y])")
    assert [line[0] for line in drawn] == [series.name for series in chart.series]
    for (_, values), series in zip(drawn, chart.series, strict=True):
        expected = [None if value is None else pytest.approx(value, abs=1e-5) for value in series.y]
        assert values == expected and any(value is not None for value in values)


def test_every_chart_is_drawn_and_has_a_hover(page: Browser) -> None:
    draw_all(page)
    assert page.eval("report.plots.size") >= 20
    assert page.eval("[...report.plots.values()].every((p) => p.node.data.some((t) => t.hovertemplate))")


def test_model_text_stays_text(page: Browser) -> None:
    page.eval(f"openStory({json.dumps(ATTACKED)})")
    page.until("document.querySelector('#story h3')")
    for selectors in (("#story .rollout .read", "#story .question"), ("#story .rollout pre", "#story .prompt pre", "#story .question")):
        open_all(page)
        for selector in (*selectors, "#story .answer"):
            assert HOSTILE in page.eval(f"document.querySelector({json.dumps(selector)}).textContent"), selector
        assert page.eval("document.querySelectorAll('#story script, #story img, #story b').length") == 0
        page.eval("toggleWritten()")
    draw_all(page)  # a level's name stands in a legend
    assert page.eval("report.plots.get('held-out').node.querySelector('.legend').textContent").count("<script>") == 1
    assert page.eval("typeof window.hacked") == "undefined"


ATTACKS = [
    "[click](javascript:window.hacked=1) <javascript:window.hacked=1> ![x](https://example.org/x.png) [x]: https://example.org",
    "$\\href{javascript:window.hacked=1}{x}$ $\\url{javascript:window.hacked=1}$ $\\includegraphics{https://example.org/x.png}$",
    "$\\htmlStyle{position:fixed}{x} \\htmlClass{a}{x} \\htmlData{onclick=1}{x} \\htmlId{title}{x}$",
    "$\\text{</span><img src=x onerror=window.hacked=1><script>window.hacked=1</script>}$",
    "```js\n<img src=x onerror=window.hacked=1>\n```\n`<b>x</b>` \n\n| a |\n|---|\n| <img src=x onerror=window.hacked=1> |",
    "$$\\def\\a{\\a\\a}\\a$$ $\\rule{99999em}{99999em}$ $" + "{" * 3000 + "}" * 3000 + "$",
    "<think><img src=x onerror=window.hacked=1></think><svg onload=window.hacked=1>",
    "\\boxed{</math><img src=x onerror=window.hacked=1>}", "> " * 3000 + "deep", "- " * 3000 + "deep",
    "*" * 5000 + "a", "[" * 5000, "$" * 5001,
    "\\begin{a}" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_drawn_model_text_never_becomes_markup(page: Browser, attack: str) -> None:
    """Markdown and formulas: no element beyond those of prose, tables, code and MathML, no address, no handler, no style but KaTeX's."""
    page.eval(f"document.getElementById('story').replaceChildren(...completionNodes({json.dumps(attack)}, 'right', false))")
    page.eval("document.querySelectorAll('#story details').forEach((d) => { d.open = true; })")
    page.eval("new Promise((done) => setTimeout(done, 100))")
    tags = set(page.eval("[...document.querySelectorAll('#story *')].map((n) => n.tagName.toLowerCase())"))
    prose = "div span p br ul ol li blockquote em strong code pre table thead tbody tr th td hr details summary".split()
    mathml = "math semantics annotation mrow mi mo mn mtext mspace mstyle mpadded mfrac msup msub msqrt menclose mtable mtr mtd".split()
    assert tags <= {*prose, *mathml}
    names = "[...document.querySelectorAll('#story *')].flatMap((n) => [...n.attributes].map((a) => a.name))"
    assert not {name for name in page.eval(names) if name.startswith("on") or name in ("href", "src", "id", "action", "xlink:href")}
    assert page.eval("typeof window.hacked") == "undefined"
    assert {url for url in page.requests if not url.startswith(("data:", "blob:", "file:"))} == set()


DRAWN = r"""<think>
First $x^2$.
</think>
## Result
Costs of $5 and $7, a product 2*3*4, **bold**, `code $x$`.

$$
\int_0^1 x^2 \, dx
= \frac{1}{3}
$$

1. over \(\mathbb{R}\)
2. and \[ y = 2 \]

| n | value |
|---|---|
| 1 | $\sqrt{2}$ |

A broken one: $\frac{1}{$. First \boxed{4}, then \boxed{\frac{1}{3}}."""


def test_formulas_and_markdown_are_drawn_thoughts_folded_and_the_answer_is_marked(page: Browser) -> None:
    draw = f"document.getElementById('story').replaceChildren(...completionNodes({json.dumps(DRAWN)}, 'wrong', %s))"
    page.eval(draw % "false")
    assert page.eval("document.querySelector('#story .thoughts').open") is False
    shown = page.eval("document.querySelector('#story > .read').innerText")
    assert "$5 and $7, a product 2*3*4, bold, code $x$" in shown and "A broken one: $\\frac{1}{$." in shown and "ℝ" in shown
    assert page.eval("document.querySelectorAll('#story > .read math').length") == 6
    assert page.eval("document.querySelectorAll('#story > .read math[display=block]').length") == 2
    assert page.eval("document.querySelectorAll('#story .read ol > li').length") == 2
    assert page.eval("document.querySelector('#story .read td math') !== null && document.querySelector('#story .read strong') !== null")
    marked = page.eval(
        "[...document.querySelectorAll('#story .final')].map((n) => n.className + n.querySelector('annotation').textContent)"
    )
    assert marked == ["math boxed final wrong\\boxed{\\frac{1}{3}}"]
    page.eval("document.querySelector('#story .thoughts').open = true")
    page.until("document.querySelector('#story .thoughts math')")
    page.eval("document.getElementById('story').replaceChildren(writtenNode('a \\\\boxed{1} b \\\\boxed{{2}} c', 'right', false))")
    assert page.eval("document.querySelector('#story mark.right').textContent") == "\\boxed{{2}}"


@pytest.mark.parametrize(("text", "think_open", "parts"), [
    ("answer", False, [None, "answer", ""]), ("a</think>b", True, ["a", "b", ""]), ("<think>a</think>b", False, ["a", "b", ""]),
    ("on and on", True, ["on and on", None, ""]), ("x <think>on", False, ["on", None, "x "]),
])  # fmt: skip
def test_thoughts_are_told_from_the_rest_as_grading_does(page: Browser, text: str, think_open: bool, parts: list[str | None]) -> None:
    assert page.eval(f"parted({json.dumps(text)}, {json.dumps(think_open)})") == parts
    assert final_part(text, think_open) == parts[1]


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
    page.until(f"document.querySelector('#story h3').firstChild.textContent === {json.dumps(rows[0]['question_id'])}")
    page.eval("toggleWritten()")
    open_all(page)
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


def test_search_reaches_completions_and_filters_by_reward_and_length(page: Browser, folder: Path) -> None:
    rows = rows_of(folder)

    def expect(fields: dict[str, str], wanted: Callable[[dict[str, Any]], bool]) -> None:
        for field, value in fields.items():
            set_field(page, field, value)
        ids = {row["question_id"] for row in rows if wanted(row)}
        assert ids and set(shown_ids(page)) == ids and len(ids) < len({row["question_id"] for row in rows})
        found = search_completions(
            open_run(folder),
            fields.get("search", "").lower().split(),
            (float(fields.get("reward-from", "-inf")), float(fields.get("reward-to", "inf"))),
            (float(fields.get("tokens-from", "-inf")), float(fields.get("tokens-to", "inf"))),
        )
        assert set(found["found" if "search" in fields else "fits"]) == ids  # what --watch asks its server gives the same
        page.eval("resetFilters()")

    word = next(row for row in rows if row["answer"] and not row["correct"] and row["question_id"] != ATTACKED)["completion"].split()[-1]
    expect({"search": word.upper()}, lambda row: word.lower() in row["completion"].lower())
    lengths = sorted(row["completion_tokens"] for row in rows)
    longest = lengths[-3]
    expect({"tokens-from": str(longest)}, lambda row: row["completion_tokens"] >= longest)
    expect(
        {"reward-to": "0", "tokens-from": str(lengths[-40])}, lambda row: row["reward"] <= 0 and row["completion_tokens"] >= lengths[-40]
    )


def test_the_list_can_be_sorted(page: Browser) -> None:
    for order, value in (("accuracy, lowest first", "q.acc[q.acc.length - 1] ?? 2"), ("reward, lowest first", "q.reward")):
        set_field(page, "order", order)
        values = page.eval(f"browser.shown.map((q) => {value})")
        assert values == sorted(values) and len(set(values)) > 1
    set_field(page, "order", "longest answers first")
    values = page.eval("browser.shown.map((q) => q.tokens)")
    assert values == sorted(values, reverse=True)
    page.eval("resetFilters()")
    assert shown_ids(page) == page.eval("report.data.index.map((q) => q.id)")


def test_every_question_has_an_address(page: Browser, folder: Path) -> None:
    page.eval(f"openStory({json.dumps(PICTURED)})")
    page.until(f"document.querySelector('#story h3').firstChild.textContent === {json.dumps(PICTURED)}")
    link = page.eval("document.querySelector('#story .link').href")
    assert page.eval("location.href") == link
    page.call("Page.navigate", url="about:blank")
    page.until("location.href === 'about:blank'")
    page.open(link)
    page.until(f"document.querySelector('#story h3')?.firstChild.textContent === {json.dumps(PICTURED)}")
    page.eval("location.hash = '#q=' + encodeURIComponent('nobody </p> knows')")
    page.until("document.getElementById('story').textContent.includes('nobody </p> knows')")


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
    page.until(f"document.querySelector('#story h3').firstChild.textContent === {json.dumps(first)}")
    page.key("e")
    assert page.eval("[...document.querySelectorAll('#story details:not(.thoughts)')].every((d) => d.open)")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(browser: Browser, folder: Path, dark: bool) -> None:
    browser.size(360, 740, phone=True, dark=dark)
    browser.open((folder / "report.html").as_uri())
    draw_all(browser)
    browser.eval(f"openStory({json.dumps(ATTACKED)})")
    browser.until("document.querySelector('#story h3')")
    open_all(browser)
    assert browser.eval("document.documentElement.scrollWidth") <= 360
    links = browser.eval("[...document.querySelectorAll('#nav a')].map((a) => a.getBoundingClientRect()).map((r) => [r.left, r.right])")
    assert len(links) >= 5 and all(left >= 0 and right <= 360 for left, right in links)  # wrapped, none out of sight
    background = browser.eval("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.long)])
def test_no_chart_is_cut_on_paper(browser: Browser, folder: Path, dark: bool) -> None:
    """A4 with the page's margins is 703 CSS pixels wide; what prints is what the browser lays out for that width."""
    browser.size(1280, 900, dark=dark)
    browser.open((folder / "report.html").as_uri())
    browser.eval(
        "addEventListener('beforeprint', () => { window.sizes = [...report.plots.values()].map((p) => p.node._fullLayout.width); })"
    )
    size = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
    assert browser.call("Page.printToPDF", **size)["data"]
    widths = browser.eval("window.sizes")
    assert len(widths) == browser.eval("report.plots.size") and max(widths) <= 703 and sorted(set(widths))[0] <= 703 / 2
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    browser.size(703, 900)
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    browser.eval("dispatchEvent(new Event('beforeprint'))")
    cut = "[...document.querySelectorAll('.card')].filter((c) => [...c.querySelectorAll('.main-svg, table')].some((s) => "
    cut += "s.getBoundingClientRect().right > c.getBoundingClientRect().right + 1)).map((c) => c.id)"
    assert browser.eval(cut) == []
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.eval("report.plots.get('loss').node._fullLayout.font.color") == "#1b2230"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    browser.size(1280, 900)
    browser.eval("dispatchEvent(new Event('afterprint'))")
    over = "(() => { const n = report.plots.get('held-out').node, bottom = n.querySelector('.legend').getBoundingClientRect().bottom;"
    browser.until(f"{over} return bottom <= n.querySelector('.nsewdrag').getBoundingClientRect().top; }})()")  # as before printing


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


def test_held_out_completions_can_be_browsed(browser: Browser, tmp_path: Path) -> None:
    run = evaluated(invented_run(tmp_path / "run", steps=3))
    rows = pq.read_table(run / "held_out" / "eval-000000.parquet").to_pylist()
    report_command(run, out=None, suffixes=())
    browser.open((run / "report.html").as_uri())
    every = browser.eval("report.data.index.length")
    set_field(browser, "filter-kind", "held-out")
    assert set(shown_ids(browser)) == {row["question_id"] for row in rows} and len(shown_ids(browser)) < every
    set_field(browser, "filter-class", "held-out:wrong")
    wrong = {row["question_id"] for row in rows} - {row["question_id"] for row in rows if row["correct"]}
    answered = {row["question_id"] for row in rows if row["answer"] is not None}
    assert wrong & answered and set(shown_ids(browser)) == wrong & answered
    key = browser.eval("browser.shown[0].key")
    assert key == f"held-out={shown_ids(browser)[0]}"
    browser.eval(f"openStory({json.dumps(key)})")
    browser.until("document.querySelector('#story h4')?.textContent === 'evaluation at step 0'")
    assert "never trained on" in browser.eval("document.getElementById('story').textContent")
    browser.eval("toggleWritten()")
    open_all(browser)
    own = [row["completion"] for row in rows if f"held-out={row['question_id']}" == key]
    assert browser.eval("[...document.querySelectorAll('#story .rollout pre')].map((p) => p.textContent)") == own
    browser.eval(f"openStory({json.dumps(key.removeprefix('held-out='))})")  # the training question of the same id
    browser.until("document.querySelector('#story h4')?.textContent.startsWith('step ')")
