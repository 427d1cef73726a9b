// The dashboard: what the server does at this moment, and what may be stopped.

import { ask, events } from "./api.js";
import { h, iconButton, number, percent, say } from "./dom.js";
import { lineChart, smooth } from "./charts.js";

const KEPT = 300; // seconds
const RATE = 5; // over which the server takes rates
const STATES = [["held", "blue"], ["leased", "purple"], ["cached", "straw"], ["free", "line"]];
const MEANINGS = { held: "in use", leased: "kept for sessions", cached: "may be found again", free: "empty" };

let stop = null;
let chosen = null;

export function showLive(main) {
  const page = dashboard();
  main.replaceChildren(page.node);
  stop = new AbortController();
  watch(page, stop.signal);
  return () => stop.abort();
}

/** Follows the stream, and tries again when it ends. */
async function watch(page, signal) {
  let wait = 1;
  while (!signal.aborted) {
    try {
      const response = await ask("/live?stream=1&history=1", { signal });
      page.connected("");
      for await (const live of events(response)) { wait = 1; page.update(live); }
      page.connected("The server ended the connection; asking again.");
    } catch (error) {
      if (error.name === "AbortError") return;
      page.connected(`${error.message} Asking again in ${wait} s.`);
    }
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
    wait = Math.min(wait * 2, 15);
  }
}

function dashboard() {
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const pick = h("select", { "aria-label": "Model", hidden: true, onchange: () => { chosen = pick.value; if (last) draw(); } });
  const tiles = Object.fromEntries([
    ["output", "Output", "tokens/s"], ["prompt", "Prompt", "tokens/s"], ["running", "Running", "requests"], ["waiting", "Waiting", "requests"],
    ["hits", "Prefix hits", "of prompt tokens"], ["memory", "Memory", "resident"],
  ].map(([key, name, unit]) => [key, tile(name, unit)]));
  const throughput = lineChart("Throughput", [{ name: "output", color: "blue" }, { name: "prompt", color: "straw" }], { unit: " tok/s", least: 10 });
  const queue = lineChart("Requests", [{ name: "running", color: "purple" }, { name: "waiting", color: "bronze" }], { whole: true, least: 2 });
  const blocks = blockBar(), times = latencies(), table = requestTable();
  const state = h("p", { class: "sub" });
  const node = h("div", { class: "page live" },
    h("div", { class: "page-head" }, h("div", null, h("h1", null, "Live"), state), pick), problem,
    h("section", { class: "tiles", "aria-label": "Now" }, Object.values(tiles).map((one) => one.node)),
    h("div", { class: "cards two" }, h("section", { class: "card" }, throughput.node), h("section", { class: "card" }, queue.node)),
    h("div", { class: "cards two" }, blocks.node, times.node), table.node);
  const histories = {};
  let last = null;

  function update(live) {
    last = live;
    for (const model of live.models) remember(model);
    pickModel(live);
    draw();
  }

  function draw() {
    const live = last, model = live.models.find((one) => one.name === chosen), history = histories[chosen];
    if (!model) return;
    throughput.update([history.output, history.prompt]);
    queue.update([history.running, history.waiting]);
    tiles.output.set(rate(model.tokens_per_s.output));
    tiles.prompt.set(rate(model.tokens_per_s.prompt));
    tiles.running.set(number(model.rows.running), `of ${number(model.rows.max)} rows`);
    tiles.waiting.set(number(model.rows.waiting));
    tiles.hits.set(percent(model.prefix_hit_rate));
    tiles.memory.set(bytes(live.memory.rss), `KV cache up to ${bytes(live.memory.kv)}`);
    state.textContent = `Elinvar ${live.version} · up ${duration(live.uptime_s)} · ${model.name} is ${model.state}`;
    blocks.update(model.kv);
    times.update(model);
    table.update(model.requests, model.rows.running + model.rows.waiting);
  }

  function pickModel(live) {
    const names = live.models.map((one) => one.name);
    if (!names.includes(chosen)) chosen = names[0];
    if (names.join("\n") !== [...pick.options].map((one) => one.value).join("\n")) pick.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    pick.value = chosen;
    pick.hidden = names.length < 2;
  }

  /** The first event brings what was before; each one adds a second. */
  function remember(model) {
    const past = model.history;
    const before = past ? { output: smooth(past.output, RATE), prompt: smooth(past.prompt, RATE), running: past.running, waiting: past.waiting } : histories[model.name];
    const now = { output: model.tokens_per_s.output, prompt: model.tokens_per_s.prompt, running: model.rows.running, waiting: model.rows.waiting };
    histories[model.name] = Object.fromEntries(Object.entries(now).map(([key, value]) => [key, [...(before?.[key] ?? []), value].slice(-KEPT)]));
  }

  return { node, update, connected: (text) => { problem.hidden = !text; problem.textContent = text; } };
}

function tile(name, unit) {
  const value = h("b", null, "–"), sub = h("small", null, unit);
  return { node: h("div", { class: "tile" }, h("span", null, name), value, sub), set: (text, more) => { value.textContent = text; if (more) sub.textContent = more; } };
}

function blockBar() {
  const bar = h("div", { class: "blocks", role: "img" }), legend = h("ul", { class: "legend" });
  const sub = h("span", { class: "when" });
  const segments = Object.fromEntries(STATES.map(([state, color]) => [state, h("i", { class: color })]));
  bar.append(...Object.values(segments));
  const node = h("section", { class: "card" }, h("div", { class: "card-head" }, h("h2", null, "KV cache"), sub), bar, legend);
  return { node, update: ({ blocks, tokens }) => {
    sub.textContent = `${number(blocks.total)} blocks, room for ${number(tokens)} tokens`;
    for (const [state] of STATES) segments[state].style.flexGrow = String(blocks[state] ?? 0);
    const shown = STATES.filter(([state]) => state in blocks);
    legend.replaceChildren(...shown.map(([state, color]) => h("li", null, h("i", { class: `dot ${color}` }), h("b", null, number(blocks[state])), ` ${state}`, h("small", null, MEANINGS[state]))));
    bar.setAttribute("aria-label", shown.map(([state]) => `${blocks[state]} ${state}`).join(", "));
  } };
}

function latencies() {
  const rows = [["ttft_ms", "To the first token"], ["itl_ms", "Between tokens"], ["step_ms", "One step"]];
  const names = ["p50", "p95", "p99"];
  const cells = Object.fromEntries(rows.map(([key]) => [key, names.map(() => h("td", null, "–"))]));
  const node = h("section", { class: "card" }, h("div", { class: "card-head" }, h("h2", null, "Latency"), h("span", { class: "when" }, "ms, last five minutes")),
    h("table", { class: "numbers" }, h("thead", null, h("tr", null, h("td"), names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, rows.map(([key, name]) => h("tr", null, h("th", { scope: "row" }, name), cells[key])))));
  return { node, update: (model) => {
    for (const [key] of rows) names.forEach((name, i) => { const value = model[key]?.[name]; cells[key][i].textContent = number(value, value < 100 ? 1 : 0); });
  } };
}

function requestTable() {
  const body = h("tbody"), count = h("span", { class: "when" });
  const head = ["Request", "State", "Age", "Prompt", "Cached", "Output", "Tenant", "Session", ""];
  const node = h("section", { class: "card" }, h("div", { class: "card-head" }, h("h2", null, "Requests"), count),
    h("div", { class: "table" }, h("table", { class: "requests" }, h("thead", null, h("tr", null, head.map((name) => h("th", { scope: "col" }, name || h("span", { class: "hidden" }, "Cancel"))))), body)));
  const rows = new Map();
  return { node, update: (requests, total) => {
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
    for (const [key, row] of rows) if (!there.has(key)) { row.node.remove(); rows.delete(key); }
    const empty = body.querySelector(".empty");
    if (!requests.length && !empty) body.append(h("tr", { class: "empty" }, h("td", { colSpan: head.length }, "Nothing runs.")));
    if (requests.length) empty?.remove();
  } };
}

function requestRow(one) {
  const cells = Array.from({ length: 7 }, () => h("td"));
  const button = iconButton("close", `Cancel ${one.id}`, async () => {
    button.disabled = true;
    try {
      await ask(`/v1/requests/${encodeURIComponent(one.id)}/cancel`, { method: "POST" });
      say(`${one.id} was cancelled.`);
    } catch (error) {
      button.disabled = false;
      button.title = error.message;
      say(error.message);
    }
  }, { class: "icon-button cancel" });
  const names = ["State", "Age", "Prompt", "Cached", "Output", "Tenant", "Session"];
  cells.forEach((cell, i) => cell.setAttribute("data-name", names[i]));
  const node = h("tr", null, h("th", { scope: "row", title: one.id }, h("code", null, one.id.length > 22 ? `${one.id.slice(0, 16)}…` : one.id)), cells, h("td", null, button));
  return { node, set: (now) => {
    const texts = [now.state, `${number(now.age_s, 1)} s`, number(now.prompt_tokens), number(now.cached_tokens), number(now.output_tokens), now.tenant || "–", now.session ?? "–"];
    texts.forEach((text, i) => { cells[i].textContent = text; });
    cells[0].className = `state ${now.state}`;
  } };
}

const rate = (value) => number(value, value && value < 10 ? 1 : 0);

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"], power = Math.min(4, Math.floor(Math.log2(Math.max(1, count)) / 10));
  return `${number(count / 2 ** (10 * power), power > 2 ? 1 : 0)} ${units[power]}`;
}

function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}
