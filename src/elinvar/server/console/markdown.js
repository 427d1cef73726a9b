// A small part of Markdown, as elements: what models write most. Whatever it does not know is shown as
// it was written. No HTML is read, and nothing is fetched: an image is a link.

import { h, copy } from "./dom.js";

const FENCE = /^(\s{0,3})(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** The elements of `text`. */
export function markdown(text) {
  return blocks(text.split("\n"), 0);
}

function blocks(lines, depth) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    if (!line.trim()) {
      i++;
      continue;
    }
    if (fence) {
      const end = closing(lines, i + 1, fence[2]);
      found.push(code(lines.slice(i + 1, end).join("\n"), fence[3]));
      i = end + 1;
    } else if (RULE.test(line)) {
      found.push(h("hr"));
      i++;
    } else if (HEADING.test(line)) {
      const [, marks, title] = HEADING.exec(line);
      found.push(h(`h${Math.min(6, marks.length + 2)}`, null, inline(title)));
      i++;
    } else if (/^\s{0,3}>/.test(line) && depth < 8) {
      const end = while_(lines, i, (one) => /^\s{0,3}>/.test(one));
      found.push(
        h(
          "blockquote",
          null,
          blocks(
            lines.slice(i, end).map((one) => one.replace(/^\s{0,3}> ?/, "")),
            depth + 1,
          ),
        ),
      );
      i = end;
    } else if (ITEM.test(line) && depth < 8) {
      const [node, end] = list(lines, i, depth);
      found.push(node);
      i = end;
    } else if (
      line.includes("|") &&
      TABLE_RULE.test(lines[i + 1] ?? "") &&
      lines[i + 1].includes("-")
    ) {
      const end = while_(lines, i + 2, (one) => one.includes("|"));
      found.push(table(line, lines.slice(i + 2, end)));
      i = end;
    } else {
      const end = while_(
        lines,
        i + 1,
        (one) =>
          one.trim() &&
          !FENCE.test(one) &&
          !HEADING.test(one) &&
          !ITEM.test(one) &&
          !/^\s{0,3}>/.test(one),
      );
      found.push(
        h(
          "p",
          null,
          lines
            .slice(i, end)
            .flatMap((one, at) => (at ? [h("br"), ...inline(one.trim())] : inline(one.trim()))),
        ),
      );
      i = end;
    }
  }
  return found;
}

function while_(lines, from, test) {
  let end = from;
  while (end < lines.length && test(lines[end])) end++;
  return end;
}

function closing(lines, from, mark) {
  return while_(
    lines,
    from,
    (one) => !(one.trim().startsWith(mark) && one.trim() === mark[0].repeat(one.trim().length)),
  );
}

function code(text, language) {
  return h(
    "figure",
    { class: "code" },
    h(
      "figcaption",
      null,
      h("span", null, language || "text"),
      h("button", { type: "button", class: "plain", onclick: () => copy(text) }, "Copy"),
    ),
    h("pre", { tabIndex: 0 }, h("code", null, text)),
  );
}

function list(lines, from, depth) {
  const [, indent, mark] = ITEM.exec(lines[from]);
  const ordered = /\d/.test(mark),
    items = [];
  let i = from;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (
      !item ||
      item[1].length > indent.length + 1 ||
      item[1].length < indent.length ||
      /\d/.test(item[2]) !== ordered
    )
      break;
    const width = item[1].length + 2;
    const end = while_(lines, i + 1, (one) => !one.trim() || one.search(/\S/) >= width);
    const kept = end < lines.length && ITEM.test(lines[end]) ? end : trimmed(lines, i + 1, end);
    items.push(
      h(
        "li",
        null,
        itemParts([item[3], ...lines.slice(i + 1, kept).map((one) => one.slice(width))], depth),
      ),
    );
    i = end;
  }
  return [
    h(ordered ? "ol" : "ul", ordered ? { start: Number.parseInt(mark, 10) } : null, items),
    i,
  ];
}

function trimmed(lines, from, to) {
  while (to > from && !lines[to - 1].trim()) to--;
  return to;
}

function itemParts(lines, depth) {
  const parts = blocks(lines, depth + 1);
  // An item of one paragraph is that paragraph's text.
  return parts.flatMap((part, i) =>
    i === 0 && part.tagName === "P" ? [...part.childNodes] : [part],
  );
}

function table(head, rows) {
  const cells = (line, tag) =>
    line
      .trim()
      .replace(/^\||\|$/g, "")
      .split("|")
      .map((cell) => h(tag, null, inline(cell.trim())));
  return h(
    "div",
    { class: "table" },
    h(
      "table",
      null,
      h("thead", null, h("tr", null, cells(head, "th"))),
      h(
        "tbody",
        null,
        rows.map((row) => h("tr", null, cells(row, "td"))),
      ),
    ),
  );
}

// Code first: nothing inside it means anything. Each kind is (pattern, what it becomes).
const INLINE = [
  [/(`+)(.+?)\1(?!`)/, (m) => h("code", null, m[2].trim() || m[2])],
  [
    /!?\[([^\]\n]{0,500})\]\(\s*<?([^\s()<>]{1,2000}(?:\([^\s()<>]*\)[^\s()<>]*)?)>?(?:\s+"[^"\n]*")?\s*\)/,
    (m) => link(m[2], m[1] || m[2], m[0]),
  ],
  [
    /\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\*)|__(?=\S)(.+?)(?<=\S)__(?!\w)/,
    (m) => h("strong", null, inline(m[1] ?? m[2])),
  ],
  [/~~(?=\S)(.+?)(?<=\S)~~/, (m) => h("s", null, inline(m[1]))],
  [
    /\*(?=[^\s*])(.+?)(?<=[^\s*])\*|(?<!\w)_(?=[^\s_])(.+?)(?<=[^\s_])_(?!\w)/,
    (m) => h("em", null, inline(m[1] ?? m[2])),
  ],
  [/https?:\/\/[^\s<>"'`)\]]{1,2000}[^\s<>"'`)\].,;:!?]/, (m) => link(m[0], m[0], m[0])],
];

const LONGEST = 10_000; // characters of a paragraph: searching is quadratic

function inline(text) {
  const found = [];
  while (text) {
    let first = null,
      made = null;
    for (const [pattern, make] of text.length > LONGEST ? [] : INLINE) {
      const match = pattern.exec(text);
      if (match && (first === null || match.index < first.index)) [first, made] = [match, make];
    }
    if (first === null) return [...found, text];
    if (first.index) found.push(text.slice(0, first.index));
    found.push(made(first));
    text = text.slice(first.index + first[0].length);
  }
  return found;
}

/** Only to the web: another scheme would be a program, or a file. */
function link(href, text, written) {
  if (!/^(https?:\/\/|mailto:)/i.test(href)) return written;
  return h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}
