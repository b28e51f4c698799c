"use strict";
/* The browser of questions: filters, list, and one question's story. */

const browser = { shown: [], limit: 100, open: null, story: null, written: false, asked: 0, texts: new Map() };
const CLASS_WORDS = {
  "bcq:right:positive": "BCQ right, with the right candidate's answer", "bcq:right:negative": "BCQ right, with the wrong candidate's answer",
  "bcq:right:other": "BCQ right, with another spelling", "bcq:right:none": "BCQ right, without an answer",
  "bcq:wrong:positive": "BCQ wrong, though the answer is the right candidate's", "bcq:wrong:negative": "BCQ wrong, follows the wrong candidate",
  "bcq:wrong:other": "BCQ wrong, an answer of its own", "bcq:wrong:none": "BCQ wrong, without an answer",
  "ncq:right:positive": "NCQ right, with the teacher's answer", "ncq:right:negative": "NCQ right, though the answer was listed as wrong",
  "ncq:right:other": "NCQ right, with none of the teacher's answers", "ncq:right:none": "NCQ right, without an answer",
  "ncq:wrong:positive": "NCQ wrong, though the answer is the teacher's", "ncq:wrong:negative": "NCQ repeats a listed wrong answer",
  "ncq:wrong:other": "NCQ wrong, a new answer", "ncq:wrong:none": "NCQ wrong, without an answer",
  "held-out:right": "held-out, right at the last evaluation", "held-out:wrong": "held-out, wrong at the last evaluation",
  "held-out:none": "held-out, no answer at the last evaluation",
};
const last = (q) => q.acc[q.acc.length - 1];
/* Order of the list: [value of a question, in what direction]; what has no value comes last. */
const ORDERS = {
  "accuracy, lowest first": [last, 1], "accuracy, highest first": [last, -1], "reward, lowest first": [(q) => q.reward, 1],
  "reward, highest first": [(q) => q.reward, -1], "longest answers first": [(q) => q.tokens, -1], "shortest answers first": [(q) => q.tokens, 1],
  "asked most often first": [(q) => q.steps.length, -1], "asked last first": [(q) => q.steps[q.steps.length - 1], -1],
};
const MATCH_WORDS = {
  bcq: { positive: "the right candidate's answer", negative: "the wrong candidate's answer", other: "neither candidate's answer", none: "" },
  ncq: { positive: "the teacher's unseen answer", negative: "a listed wrong answer", other: "an answer that was not listed", none: "" },
};
const kindName = (kind) => (kind === "bcq" || kind === "ncq" ? kind.toUpperCase() : kind);
const percent = (share) => `${+(100 * share).toFixed(1)}%`;
const count = (n) => n.toLocaleString("en");

function options(values, words = (v) => v) {
  return [el("option", { value: "" }, "any"), ...values.map((value) => el("option", { value }, words(value)))];
}

function values(pick) {
  return [...new Set(report.data.index.flatMap(pick))].filter((v) => v !== null && v !== "").sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
}

function select(name, label, list, words) {
  return el("label", {}, label, el("select", { id: `filter-${name}`, onchange: filter }, options(list, words)));
}

/* [name, values, their words, label] of the filters that choose a value. */
function choices() {
  return [
    ["kind", values((q) => q.kinds), kindName, "asked as"], ["fate", values((q) => [q.fate]), undefined, "fate"], ["bin", values((q) => [q.bin]), undefined, "admitted at"],
    ["level", values((q) => [q.level]), undefined, "level"], ["class", values((q) => q.classes), (c) => CLASS_WORDS[c] ?? c, "audit"],
  ];
}

function buildBrowser() {
  const data = report.data;
  const search = el("input", { id: "search", type: "search", placeholder: "question, id, answer, completion", oninput: filter, onkeydown: searchKey, autocomplete: "off" });
  const from = (id, label, attributes) => el("label", { class: "step" }, label, el("input", { id, type: "number", oninput: filter, ...attributes }));
  const pair = (id, label, attributes) => el("span", { class: "pair", role: "group", "aria-label": label }, from(`${id}from`, `${label} from`, attributes), from(`${id}to`, "to", attributes));
  const whole = { min: 1, inputmode: "numeric" };
  const chooser = Object.fromEntries(choices().map(([name, list, words, label]) => [name, select(name, label, list, words)]));
  const filters = el("div", { class: "filters" },
    el("label", { class: "search" }, "search", search), chooser.kind, chooser.fate, chooser.bin, values((q) => [q.level]).length > 1 ? chooser.level : null, chooser.class,
    pair("", "step", whole), pair("reward-", "reward", { step: "any" }), pair("tokens-", "tokens", whole),
    el("label", {}, "order", el("select", { id: "order", onchange: filter }, el("option", { value: "" }, "as first asked"), Object.keys(ORDERS).map((value) => el("option", { value }, value)))),
    el("label", { class: "check" }, el("input", { id: "stuck", type: "checkbox", onchange: filter }), "never improved"),
    el("button", { type: "button", onclick: resetFilters }, "reset"));
  const keys = el("p", { class: "keys" }, el("kbd", {}, "/"), " search  ", el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " next, previous question  ",
    el("kbd", {}, "e"), " open or close all answers  ", el("kbd", {}, "w"), " as written  ", el("kbd", {}, "Esc"), " leave the search");
  const section = el("section", { id: "questions" }, el("h2", {}, "Questions"), el("p", { class: "caption", id: "stories-note" }, data.note), filters,
    el("p", { class: "facts", id: "shown", role: "status" }),
    el("div", { class: "browser" }, el("div", { class: "list", id: "list" }), el("article", { class: "story", id: "story", tabindex: "-1" })), keys);
  document.getElementById("main").append(section);
  filter();
}

const field = (id) => document.getElementById(id)?.value ?? "";

/* What a search asks of completions: words, and ranges of reward and length that the same completion must lie in. */
function asked() {
  const words = field("search").toLowerCase().split(/\s+/).filter(Boolean);
  const ends = ["reward-from", "reward-to", "tokens-from", "tokens-to"].map((id) => [id, field(id)]).filter(([, value]) => value !== "");
  return { words, ends, any: words.length > 0 || ends.length > 0 };
}

/* A story that this page holds: gzip in base64. */
async function storyAt(place) {
  const bytes = Uint8Array.from(atob(document.getElementById(`story-${place}`).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

/* The completions of a question that this page holds. */
async function textsOf(q) {
  if (!browser.texts.has(q.key)) {
    const story = await storyAt(report.data.index.indexOf(q));
    browser.texts.set(q.key, story.groups.flatMap((g) => g.rollouts.map((r) => ({ text: (r.completion ?? "").toLowerCase(), reward: r.reward, tokens: r.completion_tokens }))));
  }
  return browser.texts.get(q.key);
}

async function searchHere({ words, ends }) {
  const limit = Object.fromEntries(ends.map(([id, value]) => [id, Number(value)]));
  const inside = (value, name) => value >= (limit[`${name}-from`] ?? -Infinity) && value <= (limit[`${name}-to`] ?? Infinity);
  const fits = new Set(), found = new Set();
  for (const q of report.data.index) {
    const fitting = (await textsOf(q)).filter((r) => inside(r.reward, "reward") && inside(r.tokens, "tokens"));
    if (fitting.length) fits.add(q.key);
    if (words.length && fitting.some((r) => words.every((word) => r.text.includes(word)))) found.add(q.key);
  }
  return { fits, found };
}

async function searchThere({ words, ends }) {
  const query = new URLSearchParams([...words.map((word) => ["word", word]), ...ends]);
  const answer = await fetch(`search?${query}`);
  if (!answer.ok) throw new Error(await answer.text());
  const { fits, found } = await answer.json();
  return { fits: new Set(fits), found: new Set(found) };
}

/* The list follows at once, and again when completions, here or with the server, have been looked into. */
function filter() {
  const wanted = asked(), number = ++browser.asked, here = document.body.dataset.mode === "file";
  browser.limit = 100;
  choose(wanted, null);
  if (!wanted.any) return Promise.resolve();
  const note = (text) => { document.getElementById("shown").textContent += text; };
  note(" · looking into completions");
  return new Promise((done) => setTimeout(done, here ? 0 : 250)).then(async () => {
    if (number !== browser.asked) return;
    try {
      const completions = await (here ? searchHere : searchThere)(wanted);
      if (number === browser.asked) choose(wanted, completions);
    } catch (error) {
      if (number === browser.asked) { choose(wanted, null); note(` · completions could not be searched: ${error.message}`); }
    }
  });
}

function choose({ words, ends }, completions) {
  const [kind, fate, bin, level, cls] = ["kind", "fate", "bin", "level", "class"].map((name) => field(`filter-${name}`));
  const from = Number(field("from")) || 0, to = Number(field("to")) || Infinity, stuck = document.getElementById("stuck").checked;
  browser.shown = report.data.index.filter((q) => (!kind || q.kinds.includes(kind)) && (!fate || q.fate === fate) && (!bin || q.bin === bin)
    && (!level || q.level === level) && (!cls || q.classes.includes(cls)) && (!stuck || q.stuck)
    && q.steps.some((step) => step >= from && step <= to)
    && (!ends.length || !completions || completions.fits.has(q.key))
    && (!words.length || completions?.found.has(q.key) || words.every((word) => `${q.id} ${q.text} ${q.gold} ${q.level}`.toLowerCase().includes(word))));
  const order = ORDERS[field("order")];
  if (order) {
    const value = (q) => order[0](q) ?? null;
    browser.shown.sort((a, b) => (value(a) === null) - (value(b) === null) || order[1] * (value(a) - value(b)));
  }
  drawList();
}

function resetFilters() {
  for (const node of document.querySelectorAll(".filters input, .filters select")) {
    if (node.type === "checkbox") node.checked = false;
    else node.value = "";
  }
  filter();
}

function bars(q) {
  const steps = q.acc.length > 12 ? [...q.acc.slice(0, 6), ...q.acc.slice(-6)] : q.acc;
  return el("span", { class: "bars", title: `plain accuracy by visit: ${q.acc.map(percent).join(", ")}` },
    steps.map((a) => el("i", { style: `height:${Math.round(2 + 15 * a)}px` })));
}

function drawList() {
  const list = document.getElementById("list"), { shown, limit } = browser;
  const total = report.data.index.length, everything = report.data.questions;
  document.getElementById("shown").textContent = `${count(shown.length)} of ${count(total)} questions` + (everything > total ? `, out of ${count(everything)} in the run` : "");
  list.replaceChildren(...shown.slice(0, limit).map((q) => el("button", { class: "item", type: "button", "data-key": q.key, "aria-current": browser.open === q.key ? "true" : "false", onclick: () => openStory(q.key) },
    el("span", { class: "id" }, el("span", {}, q.id), bars(q)), el("span", { class: "text" }, q.text),
    el("span", { class: "bar" }, el("span", { class: `tag ${q.fate}` }, q.fate), q.bin === null ? null : el("span", { class: "tag" }, `admitted at ${q.bin}`), q.level ? el("span", { class: "tag" }, q.level) : null))));
  if (shown.length > limit) list.append(el("button", { class: "more", type: "button", onclick: () => { browser.limit += 200; drawList(); } }, `show more (${count(shown.length - limit)} left)`));
}

async function loadStory(key) {
  if (document.body.dataset.mode === "file") {
    const place = report.data.index.findIndex((q) => q.key === key);
    if (place < 0) throw new Error(`this page does not hold the question ${key.replace(/^held-out=/, "")}; zppo inspect shows it, and zppo report --watch`);
    return storyAt(place);
  }
  const answer = await fetch(`story?key=${encodeURIComponent(key)}`);
  if (!answer.ok) throw new Error(`the story cannot be read: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

/* Every question has an address: #q=<key>. */
const address = (key) => `#q=${encodeURIComponent(key)}`;

function openNamed() {
  const named = /^#q=(.+)$/.exec(location.hash);
  if (!named) return false;
  let key;
  try { key = decodeURIComponent(named[1]); } catch { return false; }
  if (key !== browser.open) openStory(key, false).then(() => document.getElementById("story").scrollIntoView({ block: "start" }));
  return true;
}

async function openStory(key, scroll = true) {
  browser.open = key;
  for (const item of document.querySelectorAll(".item")) item.setAttribute("aria-current", item.dataset.key === key ? "true" : "false");
  if (scroll) history.replaceState(null, "", address(key));
  if (scroll) document.querySelector('.item[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
  const node = document.getElementById("story");
  try {
    const story = await loadStory(key);
    if (browser.open !== key) return;
    browser.story = story;
    node.replaceChildren(...storyNodes(story));
  } catch (error) {
    if (browser.open !== key) return;
    browser.story = null;
    node.replaceChildren(el("p", {}, error.message));
  }
  if (scroll && matchMedia("(max-width: 800px)").matches) node.scrollIntoView({ block: "start" });
}

/* After an update: the list as it was filtered, and new visits of the open story behind those that are there. */
async function updateBrowser() {
  const list = document.getElementById("list"), { limit } = browser, top = list.scrollTop;
  document.getElementById("stories-note").textContent = report.data.note;
  for (const [name, list, words] of choices()) {
    const node = document.getElementById(`filter-${name}`);
    if (!node || node.options.length === list.length + 1) continue;
    const value = node.value;
    node.replaceChildren(...options(list, words));
    node.value = value;
  }
  const done = filter();
  browser.limit = limit;
  drawList();
  list.scrollTop = top;
  await done;
  const { open, story } = browser, line = report.data.index.find((q) => q.key === open);
  if (!line || !story) return;
  if (line.visits === story.groups.length) return;
  const known = new Set(story.groups.map(visitOf)), news = await loadStory(open);
  if (browser.open !== open) return;
  browser.story = news;
  document.querySelector("#story .events")?.replaceWith(eventsNode(news));
  const fresh = [...new Set(news.groups.map(visitOf))].filter((visit) => !known.has(visit));
  document.getElementById("story").append(...fresh.map((visit) => visitNode(news, visit)));
}

const visitOf = (group) => `${group.event} ${group.step}`;

function eventsNode(story) {
  const text = story.held_out ? ["held out: asked in evaluations, never trained on"] : story.events.length ? ["buffer: ", story.events.map(eventText).join(" · ")] : ["never in the buffer"];
  return el("p", { class: "facts events" }, text);
}

function eventText(event) {
  if (event.event === "admitted") return `step ${event.step}: admitted at ${percent(event.entry_accuracy)}`;
  return `step ${event.step}: ${event.event} after ${event.visits} ${event.visits === 1 ? "visit" : "visits"}`;
}

function storyNodes(story) {
  const visits = [...new Set(story.groups.map(visitOf))];
  const note = story.cut ? el("p", { class: "facts" }, `Long texts are cut on this page. zppo inspect shows them whole.`) : null;
  return [
    el("div", { class: "bar" }, el("button", { type: "button", class: "back", onclick: () => document.getElementById("questions").scrollIntoView() }, "back to the list"),
      el("button", { type: "button", onclick: () => move(-1) }, "previous"), el("button", { type: "button", onclick: () => move(1) }, "next"), el("button", { type: "button", onclick: toggleAll }, "open or close all answers"),
      el("button", { type: "button", id: "written", "aria-pressed": String(browser.written), title: "as written, without formulas and markdown", onclick: toggleWritten }, "as written")),
    el("h3", {}, story.id, " ", el("a", { class: "link", href: address(browser.open), title: "link to this question" }, "link")), questionNode(story),
    el("p", { class: "facts" }, "right answer ", el("span", { class: "answer" }, story.gold), story.level ? ` · level ${story.level}` : ""),
    eventsNode(story), note, ...visits.map((visit) => visitNode(story, visit)),
  ].filter(Boolean);
}

/* The question with its images: at their <image> marks where there are as many, else before the text. */
function questionNode(story) {
  const images = story.images.map((image, i) => (image.data ? el("img", { src: image.data, alt: `image ${i + 1}: ${image.path}`, title: image.path })
    : el("span", { class: "missing" }, `image ${image.path} ${image.missing}`)));
  const texts = story.question.split("<image>");
  const text = (part, inline) => (browser.written ? part : drawn(part, inline)), node = el("div", { class: browser.written ? "question" : "question read" });
  if (!images.length) node.append(text(story.question));
  else if (texts.length !== images.length + 1) node.append(el("div", { class: "images" }, ...images), text(story.question));
  else node.append(text(texts[0], true), ...images.flatMap((image, i) => [image, text(texts[i + 1], true)]));
  return node;
}

function visitNode(story, visit) {
  const groups = story.groups.filter((g) => visitOf(g) === visit), { event, step, replayed } = groups[0];
  const when = event === "final" ? "evaluation of final/" : event === "eval" ? `evaluation at step ${step}` : `step ${step}`;
  return el("section", { class: "visit" }, el("h4", {}, `${when}${replayed ? ", replayed" : ""}`), groups.map((group) => groupNode(story, group)));
}

function groupNode(story, group) {
  const graded = group.rollouts.filter((r) => r.graded), right = graded.filter((r) => r.correct).length, audit = group.audit;
  const facts = "correct_at" in audit ? `candidate ${audit.correct_at + 1} is right (${audit.positive_answer ?? "no answer"}), candidate ${2 - audit.correct_at} is wrong (${audit.negative_answer ?? "no answer"})`
    : "wrong_answers" in audit ? `listed as wrong: ${audit.wrong_answers.join(", ") || "none"}`
      + (audit.teacher_answers?.length ? `; the teacher's answers, not shown: ${audit.teacher_answers.join(", ")}` : "") : "";
  return el("div", { class: "group" }, el("p", {}, el("span", { class: "kind" }, kindName(group.kind)), ` ${right} of ${graded.length} right `, el("span", { class: "dim" }, facts)),
    el("details", { class: "prompt" }, el("summary", {}, `prompt as the student saw it (${count(group.prompt_tokens)} tokens)`), promptNode(story.prompts[group.prompt], audit)),
    group.rollouts.map((rollout, i) => rolloutNode(rollout, i, group, story.prompts[group.prompt])));
}

/* The prompt with its candidates marked; which one is right is known from the log alone. */
function promptNode(text, audit) {
  const pre = el("pre", {});
  let at = 0, index = 0;
  for (const found of text.matchAll(/<candidate>[^]*?<\/candidate>/g)) {
    const side = "correct_at" in audit ? (index === audit.correct_at ? "right" : "wrong") : "";
    pre.append(text.slice(at, found.index), el("mark", { class: side }, found[0]));
    at = found.index + found[0].length;
    index += 1;
  }
  pre.append(text.slice(at));
  return pre;
}

function rolloutNode(r, i, group, prompt) {
  const verdict = r.graded ? (r.correct ? "right" : "wrong") : "none";
  const which = (r.class ?? "").split(":")[2];
  const facts = [r.reason === "reward" ? null : r.reason, MATCH_WORDS[group.kind]?.[which], `reward ${r.reward}${r.rewards ? ` (${r.rewards})` : ""}`, r.notes, r.advantage === null ? null : `advantage ${r.advantage}`, `${count(r.completion_tokens)} tokens${r.truncated ? ", cut by the limit" : ""}`, r.entropy === null ? null : `entropy ${r.entropy}`];
  const body = el("div", { class: "completion" }), thinkOpen = prompt.lastIndexOf("<think>") > prompt.lastIndexOf("</think>");
  const fill = () => {
    if (r.completion === null) body.replaceChildren(el("p", { class: "facts" }, "left out of this page to keep it small; zppo inspect shows it"));
    else if (browser.written) body.replaceChildren(writtenNode(r.completion, verdict, thinkOpen));
    else body.replaceChildren(...completionNodes(r.completion, verdict, thinkOpen));
  };
  const node = el("details", { class: "rollout" }, el("summary", {}, el("span", { class: "dim" }, String(i + 1)),
    el("span", { class: `verdict ${verdict}` }, verdict === "none" ? "– not graded" : verdict === "right" ? "✓ right" : "✗ wrong"),
    el("span", { class: "answer" }, r.answer ?? "no answer"), el("span", { class: "dim" }, facts.filter(Boolean).join(" · "))),
  body);
  /* drawn when it is opened: a story may have hundreds */
  node.addEventListener("toggle", () => { if (node.open && !body.childNodes.length) fill(); });
  node.redraw = () => (node.open ? fill() : body.replaceChildren());
  return node;
}

function toggleWritten() {
  browser.written = !browser.written;
  document.getElementById("written").setAttribute("aria-pressed", String(browser.written));
  document.querySelector("#story .question")?.replaceWith(questionNode(browser.story));
  for (const node of document.querySelectorAll("#story .rollout")) node.redraw();
}

function move(by) {
  const at = browser.shown.findIndex((q) => q.key === browser.open), next = browser.shown[Math.max(0, at < 0 ? 0 : at + by)];
  if (!next) return;
  if (browser.shown.indexOf(next) >= browser.limit) { browser.limit += 200; drawList(); }
  openStory(next.key);
}

function toggleAll() {
  const nodes = [...document.querySelectorAll("#story details:not(.thoughts)")], open = nodes.some((node) => !node.open);
  for (const node of nodes) node.open = open;
}

function searchKey(event) {
  if (event.key === "Escape") { event.target.value = ""; event.target.blur(); filter(); }
  if (event.key === "Enter" && browser.shown.length) openStory(browser.shown[0].key);
}

document.addEventListener("keydown", (event) => {
  const inList = event.target.closest?.("#list");
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea") || !document.getElementById("questions")) return;
  if (event.key === "/") { event.preventDefault(); document.getElementById("search").focus(); document.getElementById("questions").scrollIntoView(); }
  else if (event.key === "j" || (inList && event.key === "ArrowDown")) { event.preventDefault(); move(1); }
  else if (event.key === "k" || (inList && event.key === "ArrowUp")) { event.preventDefault(); move(-1); }
  else if (event.key === "e") toggleAll();
  else if (event.key === "w" && browser.story) toggleWritten();
});
