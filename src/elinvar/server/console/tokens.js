// The token view: each token in the colour of its probability, its alternatives on hover and focus.

import { h, number } from "./dom.js";

/** Steel takes these colours as it is tempered: straw, bronze, purple, blue. */
const LEVELS = [
  [0.9, "sure"],
  [0.6, "straw"],
  [0.3, "bronze"],
  [0.1, "purple"],
  [0, "blue"],
];
const level = (p) => LEVELS.find(([least]) => p >= least)[1];

/** e to the mean surprise; null without tokens. */
export function perplexity(tokens) {
  if (!tokens?.length) return null;
  return Math.exp(-tokens.reduce((sum, one) => sum + one.logprob, 0) / tokens.length);
}

/** tokens: entries of the API's logprobs.content. */
export function tokenView(tokens) {
  const card = h("div", { class: "token-card", hidden: true, role: "tooltip", id: "token-card" });
  const nodes = tokens.map((one, i) => tokenNode(one, i));
  let chosen = 0;
  const box = h(
    "div",
    {
      class: "token-text",
      role: "group",
      "aria-label": `${tokens.length} tokens; the arrow keys go from one to the next`,
      onmouseover: (event) => show(event.target.closest(".token")),
      onmouseleave: () => {
        card.hidden = true;
      },
      onfocusin: (event) => show(event.target.closest(".token")),
      onfocusout: () => {
        card.hidden = true;
      },
      onkeydown: (event) => {
        const to = {
          ArrowRight: chosen + 1,
          ArrowLeft: chosen - 1,
          Home: 0,
          End: nodes.length - 1,
        }[event.key];
        if (to === undefined || !nodes[to]) return;
        event.preventDefault();
        nodes[chosen].tabIndex = -1;
        chosen = to;
        nodes[to].tabIndex = 0;
        nodes[to].focus();
      },
    },
    nodes,
  );
  if (nodes[0]) nodes[0].tabIndex = 0;
  const whole = h("div", { class: "token-view" }, legend(tokens), box, card);

  function show(node) {
    if (!node) return;
    const one = tokens[node.dataset.i];
    card.replaceChildren(...cardParts(one));
    card.hidden = false;
    node.setAttribute("aria-describedby", "token-card");
    const room = whole.getBoundingClientRect(),
      at = node.getBoundingClientRect();
    card.style.left = `${Math.max(0, Math.min(at.left - room.left, room.width - card.offsetWidth))}px`;
    card.style.top = `${at.bottom - room.top + 6}px`;
  }
  return whole;
}

function tokenNode(one, i) {
  const p = Math.exp(one.logprob);
  const shown = one.token.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t") || "∅";
  return h(
    "span",
    {
      class: `token ${level(p)}`,
      "data-i": String(i),
      tabIndex: -1,
      role: "img",
      "aria-label": `${JSON.stringify(one.token)}, ${share(p)}`,
    },
    shown,
  );
}

function cardParts(one) {
  const all = one.top_logprobs.some((other) => same(other, one))
    ? one.top_logprobs
    : [...one.top_logprobs, one];
  const rest = 1 - all.reduce((sum, other) => sum + Math.exp(other.logprob), 0);
  const row = (name, p, mine) =>
    h(
      "li",
      { class: mine ? "mine" : null },
      h("code", null, name),
      h("span", { class: "track" }, widthOf(h("i"), p)),
      h("b", null, share(p)),
    );
  return [
    h(
      "p",
      null,
      "log-prob ",
      h("b", null, number(one.logprob, 4)),
      one.bytes?.length
        ? ` · ${one.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}`
        : "",
    ),
    h(
      "ul",
      null,
      all.map((other) =>
        row(
          JSON.stringify(other.token).slice(1, -1).replaceAll(" ", "␣") || "∅",
          Math.exp(other.logprob),
          same(other, one),
        ),
      ),
      rest > 0.0005 ? row("all others", rest, false) : null,
    ),
  ];
}

const same = (a, b) => a.token === b.token && a.logprob === b.logprob;
const share = (p) => (p >= 0.9995 ? "100 %" : p >= 0.001 ? `${number(p * 100, 1)} %` : "< 0.1 %");

function widthOf(node, p) {
  node.style.width = `${Math.max(1, p * 100)}%`;
  return node;
}

function legend(tokens) {
  const names = ["90 %", "60 %", "30 %", "10 %", "less"];
  return h(
    "p",
    { class: "token-legend" },
    h("span", null, "Perplexity ", h("b", null, number(perplexity(tokens), 2))),
    h(
      "span",
      { class: "scale", "aria-hidden": "true" },
      LEVELS.map(([, name], i) =>
        h("i", { class: `token ${name}` }, i === 4 ? names[4] : `≥ ${names[i]}`),
      ),
    ),
  );
}

/** Where two answers differ first: {equal, count, at}. Log-probs must be the same numbers. */
export function compare(a, b) {
  const count = Math.max(a.length, b.length);
  for (let i = 0; i < count; i++)
    if (!a[i] || !b[i] || !same(a[i], b[i])) return { equal: false, count, at: i };
  return { equal: true, count, at: -1 };
}
