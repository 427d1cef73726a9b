// How one message looks, and the buttons below it.

import { h, icon, iconButton, number } from "./dom.js";
import { markdown } from "./markdown.js";
import { perplexity, tokenView } from "./tokens.js";

const NAMES = { user: "You", assistant: "Model", system: "System", tool: "Tool" };
const ENDS = {
  length: "cut at max tokens",
  stopped: "stopped by you",
  cancelled: "cancelled",
  error: "failed",
  tool_calls: "calls tools",
};

/** `does`: what can be done with it (see chat.js). */
export function messageNode(message, does) {
  const { role } = message,
    view = does.view ?? {};
  return h(
    "article",
    { class: `message ${role}${does.writing ? " writing" : ""}`, "aria-label": NAMES[role] },
    h("h2", { class: "who" }, message.model || NAMES[role]),
    message.reasoning ? thoughts(message, does) : null,
    view.editing ? editor(message, does) : body(message, does, view),
    message.tool_calls?.length ? calls(message, does) : null,
    view.same ? h("p", { class: "same", role: "status" }, icon("equal"), view.same) : null,
    does.writing || view.editing ? null : foot(message, does),
  );
}

function body(message, does, view) {
  if (view.tokens && does.tokens?.length) return tokenView(does.tokens);
  if (message.role === "assistant")
    return h(
      "div",
      { class: "text" },
      markdown(message.content),
      does.writing && !message.content && !message.reasoning
        ? h("p", { class: "waiting" }, "…")
        : null,
    );
  return h(
    "div",
    { class: message.role === "tool" ? "text mono" : "text plain-text" },
    message.content,
  );
}

function thoughts(message, does) {
  return h(
    "details",
    { class: "thoughts", open: does.writing && !message.content },
    h("summary", null, does.writing && !message.content ? "Thinking …" : "Thoughts"),
    h("div", { class: "text plain-text" }, message.reasoning),
  );
}

function calls(message, does) {
  const boxes = message.tool_calls.map((call) =>
    h("textarea", {
      class: "mono",
      rows: 2,
      "aria-label": `Result of ${call.function.name}`,
      placeholder: "its result",
    }),
  );
  const results = () =>
    message.tool_calls.map((call, i) => ({
      role: "tool",
      tool_call_id: call.id,
      content: boxes[i].value,
    }));
  return h(
    "div",
    { class: "calls" },
    message.tool_calls.map((call, i) =>
      h(
        "div",
        { class: "call" },
        h("p", null, icon("code"), h("b", null, call.function.name)),
        h("pre", { tabIndex: 0 }, pretty(call.function.arguments)),
        does.writing ? null : boxes[i],
      ),
    ),
    does.writing
      ? null
      : h(
          "button",
          { type: "button", class: "plain", onclick: () => does.answerCalls(results()) },
          icon("send"),
          "Go on with these results",
        ),
  );
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function editor(message, does) {
  const box = h("textarea", {
    value: message.content,
    rows: Math.min(16, message.content.split("\n").length + 1),
    "aria-label": "The message",
    onkeydown: (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        does.cancelEdit();
      }
    },
  });
  return h(
    "div",
    { class: "editor" },
    box,
    h(
      "div",
      { class: "row" },
      message.role === "user"
        ? h(
            "button",
            { type: "button", class: "main", onclick: () => does.resend(box.value) },
            "Send again",
          )
        : null,
      h("button", { type: "button", onclick: () => does.keep(box.value) }, "Keep"),
      h("button", { type: "button", onclick: does.cancelEdit }, "Cancel"),
    ),
  );
}

function foot(message, does) {
  const { role, meta } = message,
    isAnswer = role === "assistant";
  return h(
    "footer",
    null,
    isAnswer && meta
      ? h(
          "p",
          { class: "meta" },
          facts(meta, does.tokens).map((fact) => h("span", null, fact)),
        )
      : null,
    h(
      "div",
      { class: "row" },
      iconButton("copy", "Copy", does.copy),
      iconButton("edit", "Edit", does.edit),
      isAnswer ? iconButton("again", "Regenerate", does.regenerate) : null,
      isAnswer && does.tokens?.length
        ? iconButton("tokens", "Tokens", does.toggleTokens, {
            "aria-pressed": String(Boolean(does.view?.tokens)),
          })
        : null,
      isAnswer && Number.isFinite(meta?.seed) && does.body
        ? h(
            "button",
            {
              type: "button",
              class: "plain",
              onclick: does.sameAgain,
              "aria-label": "Same again",
              title: "Ask again with this seed, and compare",
            },
            icon("equal"),
            "Same again",
          )
        : null,
    ),
  );
}

function facts({ finish, seed, usage, ttft, rate }, tokens) {
  return [
    usage && `${number(usage.completion_tokens)} tokens`,
    rate && `${number(rate, 1)} tokens/s`,
    ttft && `first after ${number(ttft)} ms`,
    usage?.prompt_tokens_details?.cached_tokens
      ? `${number(usage.prompt_tokens_details.cached_tokens)} of ${number(usage.prompt_tokens)} prompt tokens cached`
      : null,
    tokens?.length ? `perplexity ${number(perplexity(tokens), 2)}` : null,
    seed !== null && seed !== undefined && `seed ${seed}`,
    ENDS[finish],
  ].filter(Boolean);
}
