// Markdown as models write it, shown with elements and text nodes: no text becomes markup, and links stay text.

const FENCE = /^\s*(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8; // lists and quotes in one another; what is deeper is a paragraph

const make = (name, properties = {}) => Object.assign(document.createElement(name), properties);

/** Shows a text that grows. Blocks that have not changed stay as they are, with what is selected in them. */
export class Markdown {
  constructor(element) {
    this.element = element;
    this.sources = [];
  }

  show(text) {
    const found = blocks(text.trimStart().split("\n"), 0);
    found.forEach(({ source, build }, index) => {
      if (this.sources[index] === source) return;
      const old = this.element.children[index];
      if (old) old.replaceWith(build());
      else this.element.append(build());
    });
    while (this.element.children.length > found.length) this.element.lastChild.remove();
    this.sources = found.map(({ source }) => source);
  }
}

/** The blocks of some lines, each with its kind and source, and a function that makes its element. */
function blocks(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) { at++; continue; }
    const [length, build] = block(lines, at, depth);
    found.push({ source: lines.slice(at, at + length).join("\n"), build });
    at += length;
  }
  return found;
}

/** How many lines the block that begins ``at`` takes, and what makes its element. */
function block(lines, at, depth) {
  const line = lines[at];
  let match = FENCE.exec(line);
  if (match) return fenced(lines, at, match);
  match = HEADING.exec(line);
  if (match) return [1, () => inline(make(`h${Math.min(6, match[1].length + 2)}`), match[2])];
  if (RULE.test(line)) return [1, () => make("hr")];
  if (startsTable(lines, at)) return table(lines, at);
  if (depth < DEEPEST && QUOTE.test(line)) {
    const length = count(lines, at, (each) => QUOTE.test(each));
    const inside = lines.slice(at, at + length).map((each) => each.replace(QUOTE, ""));
    return [length, () => fill(make("blockquote"), inside, depth)];
  }
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  const length = 1 + count(lines, at + 1, (each, index) => each.trim() && !interrupts(lines, index));
  return [length, () => inline(make("p"), lines.slice(at, at + length).join("\n"))];
}

function interrupts(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE].some((pattern) => pattern.test(line)) || (ITEM.test(line) && line.trim().length > 2) || startsTable(lines, at);
}

function count(lines, at, holds) {
  let index = at;
  while (index < lines.length && holds(lines[index], index)) index++;
  return index - at;
}

function fill(element, lines, depth) {
  element.append(...blocks(lines, depth + 1).map(({ build }) => build()));
  return element;
}

function fenced(lines, at, [, fence, language]) {
  const closes = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  const length = count(lines, at + 1, (line) => !closes(line));
  const indent = lines[at].search(/\S/);
  const code = lines.slice(at + 1, at + 1 + length).map((line) => line.slice(Math.min(indent, Math.max(0, line.search(/\S/))))).join("\n");
  // The closing fence is not there yet while the answer comes.
  return [Math.min(lines.length - at, length + 2), () => codeBlock(code, language.trim())];
}

function codeBlock(code, language) {
  const box = make("div", { className: "code" });
  const head = box.appendChild(make("div"));
  head.append(make("span", { textContent: language || "code" }));
  if (navigator.clipboard) { // not on pages that came over plain HTTP from another machine
    const copy = head.appendChild(make("button", { type: "button", textContent: "Copy" }));
    copy.addEventListener("click", async () => {
      const copied = await navigator.clipboard.writeText(code).then(() => "Copied", () => "Not allowed");
      copy.textContent = copied;
    });
  }
  const pre = box.appendChild(make("pre", { tabIndex: 0 }));
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  pre.append(make("code", { textContent: code }));
  return box;
}

function list(lines, at, depth) {
  const numbered = (marker) => /\d/.test(marker);
  const [, indent, first] = ITEM.exec(lines[at]);
  const items = [];
  let index = at;
  while (index < lines.length) {
    const match = ITEM.exec(lines[index]);
    if (!match || match[1].length > indent.length + 1 || numbered(match[2]) !== numbered(first)) break;
    if (match[1].length < indent.length || RULE.test(lines[index])) break;
    // What belongs to the item is indented by two at least, or goes on with its paragraph; blank lines are between.
    const inner = match[1].length + Math.min(match[2].length + Math.max(1, match[3].length), 6);
    const belongs = (line, place) => {
      if (line.trim()) return line.search(/\S/) > match[1].length + 1 || (lines[place - 1].trim() && !interrupts(lines, place));
      const next = lines.slice(place).find((each) => each.trim());
      return next !== undefined && next.search(/\S/) > match[1].length + 1;
    };
    const length = count(lines, index + 1, belongs);
    const more = lines.slice(index + 1, index + 1 + length).map((line) => line.slice(Math.min(inner, Math.max(0, line.search(/\S/)))));
    items.push([lines[index].slice(match[0].length), ...more]);
    index += 1 + length;
    const blank = count(lines, index, (line) => !line.trim());
    if (blank && ITEM.test(lines[index + blank] ?? "")) index += blank;
  }
  return [index - at, () => {
    const element = make(numbered(first) ? "ol" : "ul");
    if (numbered(first)) element.start = parseInt(first, 10);
    element.append(...items.map((item) => fill(make("li"), item, depth)));
    return element;
  }];
}

const startsTable = (lines, at) => lines[at].includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")
  && cells(lines[at]).length === cells(lines[at + 1]).length;
const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());

function table(lines, at) {
  const length = 2 + count(lines, at + 2, (line) => line.includes("|"));
  return [length, () => {
    const wide = make("div", { className: "wide", tabIndex: 0 });
    wide.setAttribute("role", "region");
    wide.setAttribute("aria-label", "Table");
    const element = wide.appendChild(make("table"));
    const row = (parent, name, line) => parent.appendChild(make("tr")).append(...cells(line).map((cell) => inline(make(name), cell)));
    row(element.createTHead(), "th", lines[at]);
    for (const line of lines.slice(at + 2, at + length)) row(element.tBodies[0] ?? element.createTBody(), "td", line);
    return wide;
  }];
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** Append ``text`` with its code, emphasis and escapes to ``element``. */
function inline(element, text) {
  let plain = "";
  const unclosed = new Set(); // marks that nothing further on closes: looking again each time would take for ever
  const add = (child) => { element.append(plain, child); plain = ""; };
  for (let at = 0; at < text.length;) {
    const character = text[at];
    if (character === "\\" && "*_`#".includes(text[at + 1] || " ")) { plain += text[at + 1]; at += 2; continue; }
    if (character === "`") {
      const ticks = /^`+/.exec(text.slice(at))[0];
      const end = closing(text, ticks, at + ticks.length);
      if (end > 0) add(make("code", { textContent: text.slice(at + ticks.length, end).trim() }));
      else plain += ticks;
      at = end > 0 ? end + ticks.length : at + ticks.length;
      continue;
    }
    const [mark, name] = MARKS.find(([each]) => text.startsWith(each, at)) ?? [];
    const opens = mark && !unclosed.has(mark) && opensEmphasis(text, mark, at);
    const end = opens ? emphasisEnd(text, mark, at + mark.length) : -1;
    if (opens && end < 0) unclosed.add(mark);
    if (end > 0) add(inline(make(name), text.slice(at + mark.length, end)));
    else plain += mark ?? character;
    at = end > 0 ? end + mark.length : at + (mark ?? character).length;
  }
  element.append(plain);
  return element;
}

/** Where a run of exactly these ticks is, from ``at`` on; -1 if nowhere. */
function closing(text, ticks, at) {
  let end = text.indexOf(ticks, at);
  while (end >= 0 && (text[end + ticks.length] === "`" || text[end - 1] === "`")) {
    while (text[end] === "`") end++;
    end = text.indexOf(ticks, end);
  }
  return end;
}

// 2 * 3 * 4 and snake_case_names have no emphasis.
const inWord = (text, mark, index) => mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[index] ?? " ");
const opensEmphasis = (text, mark, at) => /\S/.test(text[at + mark.length] ?? " ") && !inWord(text, mark, at - 1);

/** Where the emphasis that begins at ``start`` ends; -1 if it does not. */
function emphasisEnd(text, mark, start) {
  for (let end = text.indexOf(mark, start + 1); end > 0; end = text.indexOf(mark, end + 1)) {
    const longer = mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark);
    if (!longer && /\S/.test(text[end - 1]) && !inWord(text, mark, end + mark.length)) return end;
  }
  return -1;
}
