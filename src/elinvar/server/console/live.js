// The dashboard: what the server does at this moment, and what may be stopped.

import { ask, events } from "./api.js";
import { lineChart, smooth } from "./charts.js";
import { h, number, percent } from "./dom.js";
import { blockBar, bytes, duration, latencies, requestTable, tile } from "./panels.js";

const KEPT = 300; // seconds
const RATE = 5; // over which the server takes rates
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
      for await (const live of events(response)) {
        wait = 1;
        page.update(live);
      }
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
  const pick = h("select", {
    "aria-label": "Model",
    hidden: true,
    onchange: () => {
      chosen = pick.value;
      if (last) draw();
    },
  });
  const tiles = Object.fromEntries(
    [
      ["output", "Output", "tokens/s"],
      ["prompt", "Prompt", "tokens/s"],
      ["running", "Running", "requests"],
      ["waiting", "Waiting", "requests"],
      ["hits", "Prefix hits", "of prompt tokens"],
      ["memory", "Memory", "resident"],
    ].map(([key, name, unit]) => [key, tile(name, unit)]),
  );
  const throughput = lineChart(
    "Throughput",
    [
      { name: "output", color: "blue" },
      { name: "prompt", color: "straw" },
    ],
    { unit: " tok/s", least: 10 },
  );
  const queue = lineChart(
    "Requests",
    [
      { name: "running", color: "purple" },
      { name: "waiting", color: "bronze" },
    ],
    { whole: true, least: 2 },
  );
  const blocks = blockBar(),
    times = latencies(),
    table = requestTable();
  const state = h("p", { class: "sub" });
  const node = h(
    "div",
    { class: "page live" },
    h("div", { class: "page-head" }, h("div", null, h("h1", null, "Live"), state), pick),
    problem,
    h(
      "section",
      { class: "tiles", "aria-label": "Now" },
      Object.values(tiles).map((one) => one.node),
    ),
    h(
      "div",
      { class: "cards two" },
      h("section", { class: "card" }, throughput.node),
      h("section", { class: "card" }, queue.node),
    ),
    h("div", { class: "cards two" }, blocks.node, times.node),
    table.node,
  );
  const histories = {};
  let last = null;

  function update(live) {
    last = live;
    for (const model of live.models) remember(model);
    pickModel(live);
    draw();
  }

  function draw() {
    const live = last,
      model = live.models.find((one) => one.name === chosen),
      history = histories[chosen];
    if (!model) return;
    throughput.update([history.output, history.prompt]);
    queue.update([history.running, history.waiting]);
    tiles.output.set(rate(model.tokens_per_s.output));
    tiles.prompt.set(rate(model.tokens_per_s.prompt));
    tiles.running.set(number(model.rows.running), `of ${number(model.rows.max)} rows`);
    tiles.waiting.set(number(model.rows.waiting));
    tiles.hits.set(percent(model.prefix_hit_rate));
    tiles.memory.set(bytes(live.memory.rss), `KV up to ${bytes(live.memory.kv)}`);
    state.textContent = `Elinvar ${live.version} · up ${duration(live.uptime_s)} · ${model.name} is ${model.state}`;
    blocks.update(model.kv);
    times.update(model);
    table.update(model.requests, model.rows.running + model.rows.waiting);
  }

  function pickModel(live) {
    const names = live.models.map((one) => one.name);
    if (!names.includes(chosen)) chosen = names[0];
    if (names.join("\n") !== [...pick.options].map((one) => one.value).join("\n"))
      pick.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    pick.value = chosen;
    pick.hidden = names.length < 2;
  }

  /** The first event brings what was before; each one adds a second. */
  function remember(model) {
    const past = model.history;
    const before = past
      ? {
          output: smooth(past.output, RATE),
          prompt: smooth(past.prompt, RATE),
          running: past.running,
          waiting: past.waiting,
        }
      : histories[model.name];
    const now = {
      output: model.tokens_per_s.output,
      prompt: model.tokens_per_s.prompt,
      running: model.rows.running,
      waiting: model.rows.waiting,
    };
    histories[model.name] = Object.fromEntries(
      Object.entries(now).map(([key, value]) => [
        key,
        [...(before?.[key] ?? []), value].slice(-KEPT),
      ]),
    );
  }

  return {
    node,
    update,
    connected: (text) => {
      problem.hidden = !text;
      problem.textContent = text;
    },
  };
}

const rate = (value) => number(value, value && value < 10 ? 1 : 0);
