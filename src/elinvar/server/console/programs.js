// A conversation's request as programs that send the same.

import { getKey } from "./api.js";
import { copy, dialog, h, icon } from "./dom.js";
import { asCurl, asPython, chatBody, streamed } from "./request.js";

export function showPrograms({ settings, messages }) {
  const asked = messages.at(-1)?.role === "assistant" ? messages.slice(0, -1) : messages;
  const body = chatBody(settings, asked),
    key = Boolean(getKey());
  const program = (title, text) =>
    h(
      "section",
      null,
      h(
        "div",
        { class: "panel-head" },
        h("h3", null, title),
        h(
          "button",
          { type: "button", class: "plain", onclick: () => copy(text) },
          icon("copy"),
          "Copy",
        ),
      ),
      h("pre", { tabIndex: 0 }, text),
    );
  dialog(
    "The same request as a program",
    program("curl", asCurl(streamed(body), location.origin, key)),
    program("Python", asPython(body, location.origin, key)),
  );
}
