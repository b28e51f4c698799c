"use strict";
/* Puts the page together; while a run goes on, asks its server for news. */

function start() {
  const data = report.data, main = document.getElementById("main");
  drawHead(data);
  if (data.recipe) main.append(el("section", { id: "recipe" }, el("h2", {}, "Recipe"), el("details", {}, el("summary", {}, "every setting of this run"), el("pre", {}, data.recipe))));
  drawSections(data);
  if (data.index) {
    buildBrowser();
    if (data.recipe) main.append(document.getElementById("recipe"));
    if (data.index.length && !matchMedia("(max-width: 800px)").matches) openStory(browser.shown[0].id, false);
  }
  main.append(el("footer", {}, data.footer));
  drawNav();
  if (document.body.dataset.mode === "watch") setTimeout(poll, 2000);
  document.body.dataset.ready = "yes";
}

async function poll() {
  const live = document.getElementById("live");
  try {
    const stamp = await (await fetch("stamp", { cache: "no-store" })).text();
    if (stamp !== report.data.stamp) {
      const answer = await fetch("data", { cache: "no-store" });
      if (!answer.ok) throw new Error(await answer.text());
      report.data = await answer.json();
      drawHead(report.data);
      drawSections(report.data);
      drawNav();
      const limit = browser.limit;
      filter();
      browser.limit = limit;
      drawList();
    }
    live.textContent = report.data.finished ? "finished" : "live";
  } catch (error) {
    live.textContent = `no news: ${error.message}`;
  }
  setTimeout(poll, 3000);
}

start();
