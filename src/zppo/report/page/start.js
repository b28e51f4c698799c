"use strict";
/* Puts the page together; while a run goes on, asks its server for news. */

const live = { at: 0, age: null, problem: "" };

async function start() {
  const data = report.data, main = document.getElementById("main");
  let opened = null;
  drawHead(data);
  if (data.recipe) main.append(el("section", { id: "recipe" }, el("h2", {}, "Recipe"), el("details", {}, el("summary", {}, "every setting of this run"), el("pre", {}, data.recipe))));
  drawSections(data);
  if (data.index) {
    buildBrowser();
    if (data.recipe) main.append(document.getElementById("recipe"));
    addEventListener("hashchange", openNamed);
    if (!openNamed() && data.index.length && !matchMedia("(max-width: 800px)").matches) opened = openStory(browser.shown[0].key, false);
  }
  main.append(el("footer", {}, data.footer));
  drawNav();
  if (document.body.dataset.mode === "watch") {
    heard(data.age);
    setInterval(drawLive, 1000);
    setTimeout(poll, 2000);
  }
  await opened;
  document.body.dataset.ready = "yes";
}

function heard(age) {
  Object.assign(live, { at: performance.now(), age, problem: "" });
  drawLive();
}

function clock(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

/* What the run is at: the numbers are the server's, the seconds since then this page's. */
function drawLive() {
  const { finished, progress, at } = report.data, node = document.getElementById("live");
  const parts = [finished ? "finished" : "live"];
  if (at && !finished) parts.push(at);
  if (progress && !finished) {
    const { step, steps, seconds, left } = progress;
    parts.push(`step ${count(step)}${steps ? ` of ${count(steps)}` : ""}`);
    if (seconds) parts.push(seconds < 10 ? `${seconds.toFixed(1)} s a step` : `${clock(seconds)} a step`);
    if (left) parts.push(`about ${clock(left)} left`);
  }
  const since = live.age === null ? null : live.age + (performance.now() - live.at) / 1000;
  if (since !== null && !finished) parts.push(`last news ${clock(since)} ago`);
  if (live.problem) parts.push(live.problem);
  node.textContent = parts.join(" · ");
}

async function poll() {
  try {
    const news = await (await fetch("stamp", { cache: "no-store" })).json();
    if (news.stamp !== report.data.stamp) await update();
    else heard(news.age);
  } catch (error) {
    live.problem = `no news: ${error.message}`;
    drawLive();
  }
  setTimeout(poll, 3000);
}

/* What a person did stays as it is: zoom, legends, filters, the open story and what is open in it. */
async function update() {
  const answer = await fetch("data", { cache: "no-store" });
  if (!answer.ok) throw new Error(await answer.text());
  report.data = await answer.json();
  document.getElementById("made").textContent = report.data.made;
  drawHead(report.data);
  drawSections(report.data);
  drawNav();
  heard(report.data.age);
  if (report.data.index) await updateBrowser();
}

start();
