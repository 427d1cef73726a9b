// The models that are there, their adapters, and the sessions of whoever looks.

import { ask, getJson } from "./api.js";
import { h, iconButton, number, percent, say } from "./dom.js";

export async function showModels(main) {
  const models = h("div", { class: "cards" }),
    sessions = h("div"),
    problem = h("p", { class: "problem", role: "alert", hidden: true });
  main.replaceChildren(
    h(
      "div",
      { class: "page" },
      h("div", { class: "page-head" }, h("h1", null, "Models")),
      problem,
      models,
      h(
        "section",
        { class: "card", "aria-label": "Sessions" },
        h(
          "div",
          { class: "card-head" },
          h("h2", null, "Sessions"),
          h("span", { class: "when" }, "conversations whose cache is kept for their next turn"),
        ),
        sessions,
      ),
    ),
  );
  try {
    const [listed, live] = await Promise.all([
      getJson("/v1/models"),
      getJson("/live").catch(() => ({ models: [] })),
    ]);
    models.replaceChildren(...cards(listed.data, live.models));
  } catch (error) {
    problem.hidden = false;
    problem.textContent = error.message;
  }
  await drawSessions(sessions);
}

/** What answers under a name of its own is a card; adapters and aliases are on that of their model. */
function cards(listed, live) {
  return listed
    .filter((one) => !one.parent)
    .map((one) =>
      card(
        one,
        live.find((other) => other.name === one.id),
        listed.filter((other) => other.parent === one.id),
      ),
    );
}

function card(model, now, others) {
  const state = now?.state ?? model.status ?? "unloaded";
  const fact = (name, value) => h("div", null, h("dt", null, name), h("dd", null, value));
  return h(
    "section",
    { class: "card model", "aria-label": model.id },
    h(
      "div",
      { class: "card-head" },
      h("h2", null, model.id),
      h("span", { class: `badge ${state}` }, state),
    ),
    h(
      "dl",
      null,
      fact("Context", model.max_context ? `${number(model.max_context)} tokens` : "–"),
      now ? fact("Rows", `${number(now.rows.running)} of ${number(now.rows.max)} run`) : null,
      now
        ? fact(
            "KV cache",
            `${number(now.kv.tokens)} tokens, ${percent(1 - now.kv.blocks.free / now.kv.blocks.total)} filled`,
          )
        : null,
      fact(
        "Loaded",
        now && model.created
          ? new Date(model.created * 1000).toLocaleString("en", {
              dateStyle: "medium",
              timeStyle: "short",
            })
          : "–",
      ),
    ),
    others.length
      ? h(
          "div",
          null,
          h("h3", null, "Adapters and aliases"),
          h(
            "ul",
            { class: "chips" },
            others.map((one) => h("li", null, h("code", null, one.id))),
          ),
        )
      : null,
    h(
      "a",
      {
        class: "action",
        href: "#chat",
        onclick: () => sessionStorage.setItem("elinvar.model", model.id),
      },
      "Chat with it",
    ),
  );
}

async function drawSessions(node) {
  let found;
  try {
    found = (await getJson("/v1/sessions?limit=50")).data;
  } catch (error) {
    node.replaceChildren(
      h(
        "p",
        { class: "muted" },
        error.status === 404 ? "This server keeps no sessions." : error.message,
      ),
    );
    return;
  }
  if (!found.length) {
    node.replaceChildren(
      h("p", { class: "muted" }, "There are none. A request with a session_id begins one."),
    );
    return;
  }
  const forget = async (id) => {
    try {
      await ask(`/v1/sessions/${encodeURIComponent(id)}`, { method: "DELETE" });
      say(`${id} is forgotten.`);
    } catch (error) {
      say(error.message);
    }
    await drawSessions(node);
  };
  const time = (seconds) =>
    new Date(seconds * 1000).toLocaleTimeString("en", { timeStyle: "short" });
  node.replaceChildren(
    h(
      "div",
      { class: "table" },
      h(
        "table",
        { class: "sessions" },
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            ["Session", "Turns", "Tokens", "Kept", "Last used", ""].map((name) =>
              h("th", { scope: "col" }, name || h("span", { class: "hidden" }, "Forget")),
            ),
          ),
        ),
        h(
          "tbody",
          null,
          found.map((one) =>
            h(
              "tr",
              null,
              h("th", { scope: "row" }, h("code", null, one.id)),
              h("td", null, number(one.turns)),
              h("td", null, number(one.tokens.total)),
              h("td", null, number(one.tokens.leased)),
              h("td", null, time(one.last_used_at)),
              h(
                "td",
                null,
                iconButton("trash", `Forget ${one.id}`, () => forget(one.id)),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}
