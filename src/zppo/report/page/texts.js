"use strict";
/* What a model wrote, as a person reads it: thoughts folded, markdown and formulas drawn, the answer marked. Nodes are made one by one from
   tokens of known kinds; no text is ever read as markup, and KaTeX gives MathML without links, images or sizes beyond reason. */

const marked = (() => {
  if (typeof markdownit === "undefined") return null;
  const md = markdownit({ html: false, linkify: false, breaks: true });
  md.disable(["code", "lheading", "reference", "html_block", "html_inline", "link", "image", "autolink", "entity", "escape", "strikethrough"], true);
  /* 2*3*4 is a product: an asterisk inside a word opens nothing, as an underscore does not */
  const scan = md.inline.State.prototype.scanDelims;
  md.inline.State.prototype.scanDelims = function (start) { return scan.call(this, start, false); };
  md.inline.ruler.before("escape", "math", inlineMath);
  md.block.ruler.before("fence", "math", blockMath, { alt: ["paragraph", "blockquote", "list"] });
  return md;
})();

/* The end of a group in braces that begins at `from`, -1 where it never closes. */
function closing(text, from) {
  let depth = 0;
  for (let at = from; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "{") depth += 1;
    else if (text[at] === "}" && --depth === 0) return at + 1;
  }
  return -1;
}

/* The formula that begins at `at`: [tex, end, display], or null. */
function formulaAt(text, at) {
  const upTo = (open, close, display) => {
    const end = text.indexOf(close, at + open.length);
    return end > at + open.length ? [text.slice(at + open.length, end), end + close.length, display] : null;
  };
  if (text.startsWith("\\(", at)) return upTo("\\(", "\\)", false);
  if (text.startsWith("\\[", at)) return upTo("\\[", "\\]", true);
  if (text.startsWith("$$", at)) return upTo("$$", "$$", true);
  const environment = /^\\begin\{([a-zA-Z]+\*?)\}/.exec(text.slice(at, at + 40));
  if (environment) {
    const close = `\\end{${environment[1]}}`, end = text.indexOf(close, at);
    return end < 0 ? null : [text.slice(at, end + close.length), end + close.length, true];
  }
  if (/^\\f?boxed\{/.test(text.slice(at, at + 8))) {
    const end = closing(text, text.indexOf("{", at));
    return end < 0 ? null : [text.slice(at, end), end, false];
  }
  /* one dollar: prices are no formulas */
  const dollar = /^\$(?![\s$])((?:\\.|[^$\\\n])*?[^\s\\$])\$(?!\d)/.exec(text.slice(at, at + 2000));
  return dollar && text[at - 1] !== "\\" ? [dollar[1], at + dollar[0].length, false] : null;
}

function inlineMath(state, silent) {
  const first = state.src[state.pos];
  if (first !== "$" && first !== "\\") return false;
  const found = formulaAt(state.src, state.pos);
  if (!found || found[1] > state.posMax) return false;
  if (!silent) Object.assign(state.push("math", "", 0), { content: found[0], meta: { display: found[2], source: state.src.slice(state.pos, found[1]) } });
  state.pos = found[1];
  return true;
}

function blockMath(state, startLine, endLine, silent) {
  const start = state.bMarks[startLine] + state.tShift[startLine], end = state.eMarks[endLine - 1];
  if (!/^(\$\$|\\\[|\\begin\{)/.test(state.src.slice(start, start + 7))) return false;
  const found = formulaAt(state.src, start);
  if (!found || found[1] > end) return false;
  let line = startLine;
  while (line < endLine && state.eMarks[line] < found[1]) line += 1;
  if (state.src.slice(found[1], state.eMarks[line]).trim()) return false; /* text follows: it is read as a paragraph */
  if (silent) return true;
  Object.assign(state.push("math", "", 0), { content: found[0], meta: { display: true, source: state.src.slice(start, found[1]) } });
  state.line = line + 1;
  return true;
}

/* Browsers draw MathML's variants no more: R -> ℝ by its own character; bold is the style sheet's. */
function doubleStruck(letter) {
  const known = { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" }[letter];
  if (known) return known;
  if (/[A-Z]/.test(letter)) return String.fromCodePoint(0x1d538 + letter.charCodeAt(0) - 65);
  return /[a-z]/.test(letter) ? String.fromCodePoint(0x1d552 + letter.charCodeAt(0) - 97) : letter;
}

function formula(token) {
  const node = el("span", { class: token.meta.display ? "math display" : "math" });
  try {
    katex.render(token.content, node, { output: "mathml", displayMode: token.meta.display, throwOnError: true, trust: false, strict: "ignore", maxSize: 10, maxExpand: 500 });
  } catch {
    node.replaceChildren(token.meta.source);
    node.className = "as-written";
  }
  for (const letter of node.querySelectorAll('[mathvariant="double-struck"]')) letter.textContent = [...letter.textContent].map(doubleStruck).join("");
  if (/\\f?boxed/.test(token.content)) node.classList.add("boxed");
  return node;
}

const TAGS = new Set(["p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "em", "strong", "table", "thead", "tbody", "tr", "th", "td"]);

function nodesOf(tokens) {
  const root = document.createDocumentFragment(), open = [root];
  const add = (node) => open[open.length - 1].append(node);
  for (const token of tokens) {
    if (token.type === "inline") add(nodesOf(token.children));
    else if (token.type === "text") add(token.content);
    else if (token.type === "softbreak" || token.type === "hardbreak") add(el("br"));
    else if (token.type === "math") add(formula(token));
    else if (token.type === "code_inline") add(el("code", {}, token.content));
    else if (token.type === "fence" || token.type === "code_block") add(el("pre", { class: "code" }, token.content));
    else if (token.type === "hr") add(el("hr"));
    else if (token.nesting === 1 && TAGS.has(token.tag)) {
      if (token.hidden) { open.push(open[open.length - 1]); continue; }
      const heading = /^h[1-6]$/.test(token.tag), node = el(heading ? "p" : token.tag, { class: heading ? "heading" : null });
      const first = token.tag === "ol" && Number(token.attrGet("start"));
      if (Number.isSafeInteger(first) && first > 1) node.setAttribute("start", first);
      add(node);
      open.push(node);
    } else if (token.nesting === -1 && TAGS.has(token.tag)) open.pop();
    else if (token.content) add(token.content);
  }
  return root;
}

/* A text of many kinds of characters is drawn as it stands where drawing fails. */
function drawn(text, inline = false) {
  if (!marked) return document.createTextNode(text);
  try {
    return nodesOf(inline ? marked.parseInline(text, {}) : marked.parse(text, {}));
  } catch {
    return document.createTextNode(text);
  }
}

/* [thoughts, the rest]: what stands before the last end of thinking; all of it where thinking never ends. Null: no thoughts. */
function parted(text, thinkOpen) {
  const close = text.lastIndexOf("</think>"), begun = text.lastIndexOf("<think>");
  if (begun > close) return [text.slice(begun + 7), null, text.slice(0, begun)];
  if (close < 0) return thinkOpen ? [text, null, ""] : [null, text, ""];
  return [text.slice(0, close).replace(/^\s*<think>/, ""), text.slice(close + 8), ""];
}

function completionNodes(text, verdict, thinkOpen) {
  const [thoughts, rest, before] = parted(text, thinkOpen), nodes = [];
  if (before) nodes.push(el("div", { class: "read" }, drawn(before)));
  if (thoughts !== null) {
    const body = el("div", { class: "read" }), words = count(thoughts.trim().split(/\s+/).filter(Boolean).length);
    const fold = el("details", { class: "thoughts" }, el("summary", {}, `thoughts (${words} words${rest === null ? ", without an end" : ""})`), body);
    fold.addEventListener("toggle", () => { if (fold.open && !body.childNodes.length) body.append(drawn(thoughts)); });
    nodes.push(fold);
  }
  if (rest !== null) {
    const body = el("div", { class: "read" }, drawn(rest)), boxes = body.querySelectorAll(".boxed");
    boxes[boxes.length - 1]?.classList.add("final", verdict);
    nodes.push(body);
  }
  return nodes;
}

/* The same as written, with the last box marked. */
function writtenNode(text, verdict, thinkOpen) {
  const rest = parted(text, thinkOpen)[1], pre = el("pre", {});
  const from = rest === null ? -1 : Math.max(text.lastIndexOf("\\boxed{"), text.lastIndexOf("\\fbox{")), end = from < 0 ? -1 : closing(text, text.indexOf("{", from));
  if (end < 0 || from < text.length - rest.length) pre.append(text);
  else pre.append(text.slice(0, from), el("mark", { class: verdict }, text.slice(from, end)), text.slice(end));
  return pre;
}
