// The list of conversations, and what one sees before there is anything in one.

import { h, icon, iconButton } from "./dom.js";
import * as store from "./store.js";

export const UNTITLED = "New conversation";
const TRIES = [
  "Why is the sky blue?",
  "Write a haiku about a clock spring.",
  "List three uses of nickel steel, as a table.",
];

/** `does`: choose, forget (of one), startNew, close. */
export function conversationList(current, does) {
  const item = (one) =>
    h(
      "li",
      { class: one === current ? "now" : null },
      h(
        "button",
        {
          type: "button",
          class: "open",
          "aria-current": one === current ? "true" : null,
          onclick: () => does.choose(one),
        },
        one.title || UNTITLED,
      ),
      iconButton("trash", `Delete “${one.title || UNTITLED}”`, () => does.forget(one)),
    );
  return [
    h(
      "div",
      { class: "panel-head" },
      h("h2", null, "Conversations"),
      iconButton("close", "Close the list", does.close, { class: "icon-button narrow-only" }),
    ),
    h("button", { type: "button", class: "wide", onclick: does.startNew }, icon("plus"), UNTITLED),
    h("ul", null, store.conversations().map(item)),
  ];
}

/** `use`: takes a text that one may begin with. */
export function welcome(use) {
  return h(
    "div",
    { class: "welcome" },
    h("h2", null, "Elastic in scale, invariant in result."),
    h(
      "p",
      null,
      "The same prompt, parameters and seed give the same tokens, to the bit, whatever else the server does. Ask something, then press ",
      h("em", null, "Same again"),
      ".",
    ),
    h(
      "ul",
      null,
      TRIES.map((text) =>
        h(
          "li",
          null,
          h("button", { type: "button", class: "try", onclick: () => use(text) }, text),
        ),
      ),
    ),
  );
}
