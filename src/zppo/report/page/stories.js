"use strict";
/* The browser of questions: filters, list, and one question's story. */

const browser = { shown: [], limit: 100, open: null };
const CLASS_WORDS = {
  "bcq:right:positive": "BCQ right, with the right candidate's answer", "bcq:right:negative": "BCQ right, with the wrong candidate's answer",
  "bcq:right:other": "BCQ right, with another spelling", "bcq:right:none": "BCQ right, without an answer",
  "bcq:wrong:positive": "BCQ wrong, though the answer is the right candidate's", "bcq:wrong:negative": "BCQ wrong, follows the wrong candidate",
  "bcq:wrong:other": "BCQ wrong, an answer of its own", "bcq:wrong:none": "BCQ wrong, without an answer",
  "ncq:right:positive": "NCQ right, with the teacher's answer", "ncq:right:negative": "NCQ right, though the answer was listed as wrong",
  "ncq:right:other": "NCQ right, no teacher's answer to compare", "ncq:right:none": "NCQ right, without an answer",
  "ncq:wrong:positive": "NCQ wrong, though the answer is the teacher's", "ncq:wrong:negative": "NCQ repeats a listed wrong answer",
  "ncq:wrong:other": "NCQ wrong, a new answer", "ncq:wrong:none": "NCQ wrong, without an answer",
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

function buildBrowser() {
  const data = report.data;
  const search = el("input", { id: "search", type: "search", placeholder: "question, id, right answer", oninput: filter, onkeydown: searchKey, autocomplete: "off" });
  const step = (id, label) => el("label", { class: "step" }, label, el("input", { id, type: "number", min: 1, inputmode: "numeric", oninput: filter }));
  const levels = values((q) => [q.level]);
  const filters = el("div", { class: "filters" },
    el("label", { class: "search" }, "search", search), select("kind", "asked as", values((q) => q.kinds), kindName),
    select("fate", "fate", values((q) => [q.fate])), select("bin", "admitted at", values((q) => [q.bin])),
    levels.length > 1 ? select("level", "level", levels) : null, select("class", "audit", values((q) => q.classes), (c) => CLASS_WORDS[c] ?? c),
    step("from", "from step"), step("to", "to step"),
    el("label", { class: "check" }, el("input", { id: "stuck", type: "checkbox", onchange: filter }), "never improved"),
    el("button", { type: "button", onclick: resetFilters }, "reset"));
  const keys = el("p", { class: "keys" }, el("kbd", {}, "/"), " search  ", el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " next, previous question  ",
    el("kbd", {}, "e"), " open or close all answers  ", el("kbd", {}, "Esc"), " leave the search");
  const section = el("section", { id: "questions" }, el("h2", {}, "Questions"), el("p", { class: "caption", id: "stories-note" }, data.note), filters,
    el("p", { class: "facts", id: "shown", role: "status" }),
    el("div", { class: "browser" }, el("div", { class: "list", id: "list" }), el("article", { class: "story", id: "story", tabindex: "-1" })), keys);
  document.getElementById("main").append(section);
  filter();
}

const field = (id) => document.getElementById(id)?.value ?? "";

function filter() {
  const words = field("search").toLowerCase().split(/\s+/).filter(Boolean);
  const [kind, fate, bin, level, cls] = ["kind", "fate", "bin", "level", "class"].map((name) => field(`filter-${name}`));
  const from = Number(field("from")) || 0, to = Number(field("to")) || Infinity, stuck = document.getElementById("stuck").checked;
  browser.shown = report.data.index.filter((q) => (!kind || q.kinds.includes(kind)) && (!fate || q.fate === fate) && (!bin || q.bin === bin)
    && (!level || q.level === level) && (!cls || q.classes.includes(cls)) && (!stuck || q.stuck)
    && q.steps.some((step) => step >= from && step <= to)
    && words.every((word) => `${q.id} ${q.text} ${q.gold} ${q.level}`.toLowerCase().includes(word)));
  browser.limit = 100;
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
  list.replaceChildren(...shown.slice(0, limit).map((q) => el("button", { class: "item", type: "button", "data-id": q.id, "aria-current": browser.open === q.id ? "true" : "false", onclick: () => openStory(q.id) },
    el("span", { class: "id" }, el("span", {}, q.id), bars(q)), el("span", { class: "text" }, q.text),
    el("span", { class: "bar" }, el("span", { class: `tag ${q.fate}` }, q.fate), q.bin === null ? null : el("span", { class: "tag" }, `admitted at ${q.bin}`), q.level ? el("span", { class: "tag" }, q.level) : null))));
  if (shown.length > limit) list.append(el("button", { class: "more", type: "button", onclick: () => { browser.limit += 200; drawList(); } }, `show more (${count(shown.length - limit)} left)`));
}

async function loadStory(id) {
  if (document.body.dataset.mode === "file") return JSON.parse(document.getElementById(`story-${report.data.index.findIndex((q) => q.id === id)}`).textContent);
  const answer = await fetch(`story?id=${encodeURIComponent(id)}`);
  if (!answer.ok) throw new Error(`the story cannot be read: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

async function openStory(id, scroll = true) {
  browser.open = id;
  for (const item of document.querySelectorAll(".item")) item.setAttribute("aria-current", item.dataset.id === id ? "true" : "false");
  if (scroll) document.querySelector('.item[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
  const node = document.getElementById("story");
  try {
    const story = await loadStory(id);
    if (browser.open !== id) return;
    node.replaceChildren(...storyNodes(story));
  } catch (error) {
    node.replaceChildren(el("p", {}, String(error)));
  }
  if (scroll && matchMedia("(max-width: 800px)").matches) node.scrollIntoView({ block: "start" });
}

function eventText(event) {
  if (event.event === "admitted") return `step ${event.step}: admitted at ${percent(event.entry_accuracy)}`;
  return `step ${event.step}: ${event.event} after ${event.visits} ${event.visits === 1 ? "visit" : "visits"}`;
}

function storyNodes(story) {
  const steps = [...new Set(story.groups.map((g) => g.step))];
  const note = story.cut ? el("p", { class: "facts" }, `Long texts are cut on this page. zppo inspect shows them whole.`) : null;
  return [
    el("div", { class: "bar" }, el("button", { type: "button", class: "back", onclick: () => document.getElementById("questions").scrollIntoView() }, "back to the list"),
      el("button", { type: "button", onclick: () => move(-1) }, "previous"), el("button", { type: "button", onclick: () => move(1) }, "next"), el("button", { type: "button", onclick: toggleAll }, "open or close all answers")),
    el("h3", {}, story.id), questionNode(story),
    el("p", { class: "facts" }, "right answer ", el("span", { class: "answer" }, story.gold), story.level ? ` · level ${story.level}` : ""),
    story.events.length ? el("p", { class: "facts" }, "buffer: ", story.events.map(eventText).join(" · ")) : el("p", { class: "facts" }, "never in the buffer"),
    note, ...steps.map((step) => visitNode(story, step)),
  ].filter(Boolean);
}

/* The question with its images: at their <image> marks where there are as many, else before the text. */
function questionNode(story) {
  const images = story.images.map((image, i) => (image.data ? el("img", { src: image.data, alt: `image ${i + 1}: ${image.path}`, title: image.path })
    : el("span", { class: "missing" }, `image ${image.path} ${image.missing}`)));
  const texts = story.question.split("<image>");
  if (!images.length) return el("div", { class: "question" }, story.question);
  if (texts.length !== images.length + 1) return el("div", { class: "question" }, el("div", { class: "images" }, ...images), story.question);
  return el("div", { class: "question" }, texts[0], ...images.flatMap((image, i) => [image, texts[i + 1]]));
}

function visitNode(story, step) {
  const groups = story.groups.filter((g) => g.step === step);
  return el("section", { class: "visit" }, el("h4", {}, `step ${step}${groups[0].replayed ? ", replayed" : ""}`), groups.map((group) => groupNode(story, group)));
}

function groupNode(story, group) {
  const graded = group.rollouts.filter((r) => r.graded), right = graded.filter((r) => r.correct).length, audit = group.audit;
  const facts = "correct_at" in audit ? `candidate ${audit.correct_at + 1} is right (${audit.positive_answer}), candidate ${2 - audit.correct_at} is wrong (${audit.negative_answer})`
    : "wrong_answers" in audit ? `listed as wrong: ${audit.wrong_answers.join(", ") || "none"}` : "";
  return el("div", { class: "group" }, el("p", {}, el("span", { class: "kind" }, kindName(group.kind)), ` ${right} of ${graded.length} right `, el("span", { class: "dim" }, facts)),
    el("details", { class: "prompt" }, el("summary", {}, `prompt as the student saw it (${count(group.prompt_tokens)} tokens)`), promptNode(story.prompts[group.prompt], audit)),
    group.rollouts.map((rollout, i) => rolloutNode(rollout, i, group)));
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

function rolloutNode(r, i, group) {
  const verdict = r.graded ? (r.correct ? "right" : "wrong") : "none";
  const which = (r.class ?? "").split(":")[2];
  const facts = [r.reason, MATCH_WORDS[group.kind]?.[which], `reward ${r.reward}`, `advantage ${r.advantage}`, `${count(r.completion_tokens)} tokens${r.truncated ? ", cut by the limit" : ""}`, r.entropy === null ? null : `entropy ${r.entropy}`];
  return el("details", { class: "rollout" }, el("summary", {}, el("span", { class: "dim" }, String(i + 1)),
    el("span", { class: `verdict ${verdict}` }, verdict === "none" ? "– not graded" : verdict === "right" ? "✓ right" : "✗ wrong"),
    el("span", { class: "answer" }, r.answer ?? "no answer"), el("span", { class: "dim" }, facts.filter(Boolean).join(" · "))),
  el("pre", {}, r.completion ?? "left out of this page to keep it small; zppo inspect shows it"));
}

function move(by) {
  const at = browser.shown.findIndex((q) => q.id === browser.open), next = browser.shown[Math.max(0, at < 0 ? 0 : at + by)];
  if (!next) return;
  if (browser.shown.indexOf(next) >= browser.limit) { browser.limit += 200; drawList(); }
  openStory(next.id);
}

function toggleAll() {
  const nodes = [...document.querySelectorAll("#story details")], open = nodes.some((node) => !node.open);
  for (const node of nodes) node.open = open;
}

function searchKey(event) {
  if (event.key === "Escape") { event.target.value = ""; event.target.blur(); filter(); }
  if (event.key === "Enter" && browser.shown.length) openStory(browser.shown[0].id);
}

document.addEventListener("keydown", (event) => {
  const inList = event.target.closest?.("#list");
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea") || !document.getElementById("questions")) return;
  if (event.key === "/") { event.preventDefault(); document.getElementById("search").focus(); document.getElementById("questions").scrollIntoView(); }
  else if (event.key === "j" || (inList && event.key === "ArrowDown")) { event.preventDefault(); move(1); }
  else if (event.key === "k" || (inList && event.key === "ArrowUp")) { event.preventDefault(); move(-1); }
  else if (event.key === "e") toggleAll();
});
