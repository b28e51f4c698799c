"use strict";
/* Draws the page: head, tables, charts. Every text is set as text, never as markup. */

const report = { data: JSON.parse(document.getElementById("data").textContent), plots: new Map() };

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const anchor = (name) => name.toLowerCase().replace(/[^a-z0-9]+/g, "-");
const PAPER = { "--ink": "#1b2230", "--grid": "#e6e9ee", "--paper": "#ffffff", "--line": "#dde1e7" };
const colour = (name) => (report.printing ? PAPER[name] : getComputedStyle(document.documentElement).getPropertyValue(name).trim());
/* plotly reads names and hover texts as a kind of markup */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const touch = matchMedia("(pointer: coarse)").matches;
const dark = matchMedia("(prefers-color-scheme: dark)");

function lineTraces(chart, s) {
  const base = { name: plain(s.name), x: s.x, legendgroup: s.name, customdata: s.hover.map(plain) };
  const tail = s.hover.length ? "  <span style='opacity:.7'>%{customdata}</span>" : "";
  const hovertemplate = `%{y:${chart.percent ? ".1%" : ",.4~g"}}${tail}`;
  const color = s.colour === "#333333" ? colour("--ink") : s.colour;
  const traces = [];
  /* the same trace has the same uid after an update: what a person hid stays hidden */
  const band = { ...base, mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip", customdata: undefined };
  if (s.low.length) {
    traces.push({ ...band, uid: `${s.name} low`, y: s.low });
    traces.push({ ...band, uid: `${s.name} high`, y: s.high, fill: "tonexty", fillcolor: color + "26" });
  }
  const smooth = s.mean.length > 0, marker = { size: s.x.length < 12 ? 6 : 5, symbol: s.marker };
  traces.push({ ...base, uid: `${s.name} values`, y: s.y, hovertemplate, mode: s.x.length < 30 ? "lines+markers" : "lines", opacity: smooth ? 0.35 : 1,
    line: { color, width: smooth ? 1 : 2, dash: smooth ? "solid" : s.dash }, marker, showlegend: !smooth });
  if (smooth) traces.push({ ...base, uid: `${s.name} mean`, y: s.mean, mode: "lines", line: { color, width: 2.2, dash: s.dash }, hoverinfo: "skip", customdata: undefined });
  return traces;
}

function traces(chart) {
  const format = chart.percent ? ".1%" : ",.4~g";
  return chart.series.flatMap((s) => {
    const tail = s.hover.length ? "  <span style='opacity:.7'>%{customdata}</span>" : "";
    const customdata = s.hover.map(plain), name = plain(s.name), x = s.x.map((v) => (typeof v === "string" ? plain(v) : v));
    if (chart.kind === "area") return [{ uid: s.name, name, x, y: s.y, customdata, stackgroup: "all", mode: "lines", line: { width: 0.6, color: s.colour },
      fillcolor: s.colour + "CC", hovertemplate: `%{y:${format}}${tail}` }];
    if (chart.kind === "bar") return [{ uid: s.name, name, type: "bar", x, y: s.y, customdata, marker: { color: s.colour },
      hovertemplate: `%{y:${format}}${tail}` }];
    if (chart.kind === "hbar") return [{ uid: s.name, name, type: "bar", orientation: "h", x: s.y, y: x, customdata, marker: { color: s.colour },
      hovertemplate: `%{x:${format}}${tail}` }];
    return lineTraces(chart, s);
  });
}

function layout(chart) {
  const ink = colour("--ink"), grid = colour("--grid"), flat = chart.kind === "hbar";
  const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, fixedrange: touch, tickfont: { size: 11 } };
  const value = { ...axis, title: { text: plain(chart.y_title), font: { size: 12 } }, tickformat: chart.percent ? ".0%" : ",~g", rangemode: "tozero" };
  if (chart.percent && !chart.unit_range) value.tickformat = ".3~%";
  if (chart.unit_range) value.range = chart.kind === "line" ? [-0.02, 1.02] : [0, 1.0001];
  if (["loss", "grad-norm", "entropy"].includes(chart.id)) value.rangemode = "normal";
  const along = { ...axis, title: { text: plain(chart.x_title), font: { size: 12 } } };
  if (chart.kind === "bar" || flat) along.type = "category";
  if (flat) along.autorange = "reversed";
  return {
    uirevision: chart.id, /* an update keeps zoom and legend choices */
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", color: ink, size: 12 },
    margin: { l: 8, r: flat ? 28 : 12, t: 8, b: 8 }, barmode: "stack", bargap: 0.25, hovermode: flat ? "y unified" : "x unified", dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: ink, size: 12 } },
    showlegend: chart.series.length > 1, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11.5 }, traceorder: "normal" },
    xaxis: flat ? value : along, yaxis: flat ? along : value,
  };
}

const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };
const height = (chart) => (chart.kind === "hbar" ? 110 + 26 * chart.series[0].x.length : 290);

/* On paper a chart is as wide as its column there: nothing scrolls, and what is wider is cut off. */
const PRINTED = { narrow: 330, wide: 680 };

function draw(chart, node) {
  const paper = report.printing, width = paper ? PRINTED[chart.kind === "hbar" ? "wide" : "narrow"] : undefined;
  const tall = paper && chart.kind !== "hbar" ? 225 : height(chart);
  node.style.minHeight = `${tall}px`;
  const show = () => Plotly.react(node, traces(chart), { ...layout(chart), height: tall, width, autosize: !paper }, config);
  try {
    show();
  } catch { /* plotly was still at its last drawing of this chart: it begins anew, and the rest of the page goes on */
    Plotly.purge(node);
    show();
  }
  report.plots.set(chart.id, { chart, node, drawn: true });
}

/* Charts are drawn when they come near the window: a long page opens at once. */
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    watcher.unobserve(entry.target);
    const plot = report.plots.get(entry.target.dataset.chart);
    if (plot && !plot.drawn) draw(plot.chart, plot.node);
  }
}, { rootMargin: "400px" });

function chartCard(chart) {
  const node = el("div", { class: "plot", "data-chart": chart.id, style: `min-height:${height(chart)}px`, role: "img", "aria-label": `${chart.title}. ${chart.caption}` });
  report.plots.set(chart.id, { chart, node, drawn: false });
  watcher.observe(node);
  return el("section", { class: chart.kind === "hbar" ? "card wide" : "card", id: `chart-${chart.id}` },
    el("h3", {}, chart.title), el("p", { class: "caption" }, chart.caption), node);
}

function tableCard(table) {
  const head = el("tr", {}, table.columns.map((name) => el("th", { scope: "col" }, name)));
  const mixed = table.rows.some((row) => row[0].includes("· paper"));
  const rows = table.rows.map((row, r) => el("tr", { class: mixed && !row[0].includes("· paper") ? "ours" : null }, row.map((cell, i) => el("td", { class: table.strong[r].includes(i) ? "best" : null }, cell))));
  const wide = table.rows.length > 10 || table.columns.length > 6 || table.rows.some((row) => row.join("").length > 75);
  return el("section", { class: wide ? "card wide" : "card", id: table.id }, el("h3", {}, table.title), el("p", { class: "caption" }, table.caption),
    el("div", { class: "table", tabindex: "0", role: "group", "aria-label": table.title }, el("table", {}, el("thead", {}, head), el("tbody", {}, rows))));
}

function drawHead(data) {
  document.getElementById("title").textContent = data.title;
  document.getElementById("outcome").textContent = data.outcome;
  document.getElementById("warnings").replaceChildren(...(data.warnings ?? []).map((text) => el("li", {}, text)));
  document.getElementById("head").replaceChildren(...data.head.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

/* A chart that is there already gets its new numbers, where it is; a new one is put at its place. */
function drawSections(data) {
  const main = document.getElementById("main");
  for (const section of data.sections) {
    const id = anchor(section.name);
    let node = document.getElementById(id);
    if (!node) {
      node = el("section", { id }, el("h2", {}, section.name), el("div", { class: "charts" }), el("div", { class: "tables" }));
      main.insertBefore(node, document.getElementById("questions") ?? document.getElementById("recipe"));
    }
    const [, charts, tables] = node.children;
    tables.replaceChildren(...section.tables.map(tableCard));
    tables.hidden = !section.tables.length;
    const cards = section.charts.map((chart) => {
      const plot = report.plots.get(chart.id);
      if (!plot) return chartCard(chart);
      plot.chart = chart;
      if (plot.drawn) draw(chart, plot.node);
      return document.getElementById(`chart-${chart.id}`);
    });
    for (const card of [...charts.children]) if (!cards.includes(card)) { report.plots.delete(card.id.slice(6)); card.remove(); }
    cards.forEach((card, i) => { if (charts.children[i] !== card) charts.insertBefore(card, charts.children[i] ?? null); });
  }
}

function drawNav() {
  const names = [...document.querySelectorAll("main > section")].map((node) => [node.id, node.querySelector("h2").textContent]);
  document.getElementById("nav").replaceChildren(...names.map(([id, name]) => el("a", { href: `#${id}` }, name)));
}

function recolour() {
  for (const plot of report.plots.values()) if (plot.drawn) draw(plot.chart, plot.node);
}
dark.addEventListener("change", recolour);
/* Paper has no scrolling: everything is drawn before a page is printed, in its widths and on white. */
function forPaper(printing) {
  report.printing = printing;
  for (const plot of report.plots.values()) {
    if (!printing && !plot.drawn) continue;
    draw(plot.chart, plot.node);
    if (!printing) setTimeout(() => draw(plot.chart, plot.node), 50); /* the legend's rows are counted in the width before: once more */
  }
}
addEventListener("beforeprint", () => forPaper(true));
addEventListener("afterprint", () => forPaper(false));
