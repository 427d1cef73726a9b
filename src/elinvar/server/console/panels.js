// The dashboard's parts: each is {node, and what brings it up to date}.

import { ask } from "./api.js";
import { h, iconButton, number, say } from "./dom.js";

const STATES = [
  ["held", "blue"],
  ["leased", "purple"],
  ["cached", "straw"],
  ["free", "line"],
];
const MEANINGS = {
  held: "in use",
  leased: "kept for sessions",
  cached: "may be found again",
  free: "empty",
};

export function tile(name, unit) {
  const value = h("b", null, "–"),
    sub = h("small", null, unit);
  return {
    node: h("div", { class: "tile" }, h("span", null, name), value, sub),
    set: (text, more) => {
      value.textContent = text;
      if (more) sub.textContent = more;
    },
  };
}

export function blockBar() {
  const bar = h("div", { class: "blocks", role: "img" }),
    legend = h("ul", { class: "legend" });
  const sub = h("span", { class: "when" });
  const segments = Object.fromEntries(
    STATES.map(([state, color]) => [state, h("i", { class: color })]),
  );
  bar.append(...Object.values(segments));
  const node = h(
    "section",
    { class: "card" },
    h("div", { class: "card-head" }, h("h2", null, "KV cache"), sub),
    bar,
    legend,
  );
  return {
    node,
    update: ({ blocks, tokens }) => {
      sub.textContent = `${number(blocks.total)} blocks, room for ${number(tokens)} tokens`;
      for (const [state] of STATES) segments[state].style.flexGrow = String(blocks[state] ?? 0);
      const shown = STATES.filter(([state]) => state in blocks);
      legend.replaceChildren(
        ...shown.map(([state, color]) =>
          h(
            "li",
            null,
            h("i", { class: `dot ${color}` }),
            h("b", null, number(blocks[state])),
            ` ${state}`,
            h("small", null, MEANINGS[state]),
          ),
        ),
      );
      bar.setAttribute(
        "aria-label",
        shown.map(([state]) => `${blocks[state]} ${state}`).join(", "),
      );
    },
  };
}

export function latencies() {
  const rows = [
    ["ttft_ms", "To the first token"],
    ["itl_ms", "Between tokens"],
    ["step_ms", "One step"],
  ];
  const names = ["p50", "p95", "p99"];
  const cells = Object.fromEntries(rows.map(([key]) => [key, names.map(() => h("td", null, "–"))]));
  const node = h(
    "section",
    { class: "card" },
    h(
      "div",
      { class: "card-head" },
      h("h2", null, "Latency"),
      h("span", { class: "when" }, "ms, last five minutes"),
    ),
    h(
      "table",
      { class: "numbers" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          h("td"),
          names.map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        null,
        rows.map(([key, name]) => h("tr", null, h("th", { scope: "row" }, name), cells[key])),
      ),
    ),
  );
  return {
    node,
    update: (model) => {
      for (const [key] of rows)
        names.forEach((name, i) => {
          const value = model[key]?.[name];
          cells[key][i].textContent = number(value, value < 100 ? 1 : 0);
        });
    },
  };
}

export function requestTable() {
  const body = h("tbody"),
    count = h("span", { class: "when" });
  const head = ["Request", "State", "Age", "Prompt", "Cached", "Output", "Tenant", "Session", ""];
  const node = h(
    "section",
    { class: "card" },
    h("div", { class: "card-head" }, h("h2", null, "Requests"), count),
    h(
      "div",
      { class: "table" },
      h(
        "table",
        { class: "requests" },
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            head.map((name) =>
              h("th", { scope: "col" }, name || h("span", { class: "hidden" }, "Cancel")),
            ),
          ),
        ),
        body,
      ),
    ),
  );
  const rows = new Map();
  return {
    node,
    update: (requests, total) => {
      count.textContent = total ? `${number(total)} running or waiting` : "";
      const there = new Set();
      requests.forEach((one, i) => {
        const key = `${one.id} ${requests.slice(0, i).filter((other) => other.id === one.id).length}`;
        there.add(key);
        const row = rows.get(key) ?? requestRow(one);
        rows.set(key, row);
        row.set(one);
        if (body.children[i] !== row.node) body.insertBefore(row.node, body.children[i] ?? null);
      });
      for (const [key, row] of rows)
        if (!there.has(key)) {
          row.node.remove();
          rows.delete(key);
        }
      const empty = body.querySelector(".empty");
      if (!requests.length && !empty)
        body.append(
          h("tr", { class: "empty" }, h("td", { colSpan: head.length }, "Nothing runs.")),
        );
      if (requests.length) empty?.remove();
    },
  };
}

function requestRow(one) {
  const cells = Array.from({ length: 7 }, () => h("td"));
  const button = iconButton(
    "close",
    `Cancel ${one.id}`,
    async () => {
      button.disabled = true;
      try {
        await ask(`/v1/requests/${encodeURIComponent(one.id)}/cancel`, { method: "POST" });
        say(`${one.id} was cancelled.`);
      } catch (error) {
        button.disabled = false;
        button.title = error.message;
        say(error.message);
      }
    },
    { class: "icon-button cancel" },
  );
  const names = ["State", "Age", "Prompt", "Cached", "Output", "Tenant", "Session"];
  cells.forEach((cell, i) => cell.setAttribute("data-name", names[i]));
  const node = h(
    "tr",
    null,
    h(
      "th",
      { scope: "row", title: one.id },
      h("code", null, one.id.length > 22 ? `${one.id.slice(0, 16)}…` : one.id),
    ),
    cells,
    h("td", null, button),
  );
  return {
    node,
    set: (now) => {
      const texts = [
        now.state,
        `${number(now.age_s, 1)} s`,
        number(now.prompt_tokens),
        number(now.cached_tokens),
        number(now.output_tokens),
        now.tenant || "–",
        now.session ?? "–",
      ];
      texts.forEach((text, i) => {
        cells[i].textContent = text;
      });
      cells[0].className = `state ${now.state}`;
    },
  };
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"],
    power = Math.min(4, Math.floor(Math.log2(Math.max(1, count)) / 10));
  return `${number(count / 2 ** (10 * power), power > 2 ? 1 : 0)} ${units[power]}`;
}

export function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(
    Math.floor,
  );
  return days
    ? `${days} d ${hours} h`
    : hours
      ? `${hours} h ${minutes} min`
      : minutes
        ? `${minutes} min`
        : `${Math.floor(seconds)} s`;
}
