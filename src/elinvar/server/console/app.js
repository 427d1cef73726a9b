// The frame: which view is shown, the theme, the API key, the keyboard.

import { getKey, onKeyWanted, setKey } from "./api.js";
import * as chat from "./chat.js";
import { dialog, h, iconButton } from "./dom.js";
import { showLive } from "./live.js";
import { showModels } from "./models.js";

const VIEWS = { chat: chat.showChat, live: showLive, models: showModels };
const THEMES = { auto: "as the system has it", light: "light", dark: "dark" };
const ICONS = { auto: "auto", light: "sun", dark: "moon" };
const THEME = "elinvar.theme";
const KEYS = [
  ["Enter", "send the message"],
  ["Shift Enter", "break the line"],
  ["Esc", "stop the answer, close what is open"],
  ["/", "to the message"],
  ["n", "new conversation"],
  ["t", "tokens of the last answer"],
  ["s", "settings"],
  ["h", "conversations"],
  ["1 2 3", "chat, live, models"],
  ["← →", "from token to token, along a chart"],
  ["d", "light or dark"],
  ["?", "this list"],
];

const main = document.getElementById("main");
let leave = null;

function route() {
  if (location.hash === "#main") {
    main.focus();
    return;
  }
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat";
  leave?.();
  leave = null;
  for (const link of document.querySelectorAll(".views a")) {
    const here = link.hash === `#${name}`;
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title =
    name === "chat" ? "Elinvar" : `${name[0].toUpperCase()}${name.slice(1)} · Elinvar`;
  document.body.dataset.view = name;
  const left = VIEWS[name](main);
  if (typeof left === "function") leave = left;
}

// ---- theme

const themeButton = iconButton("auto", "", nextTheme);

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  localStorage.setItem(THEME, name);
  const fresh = iconButton(ICONS[name], "", nextTheme);
  themeButton.replaceChildren(...fresh.children);
  themeButton.title = `Colours: ${THEMES[name]}`;
  themeButton.setAttribute("aria-label", themeButton.title);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(localStorage.getItem(THEME) ?? "auto") + 1) % names.length]);
}

// ---- the key

function askForKey() {
  if (document.querySelector("dialog[open]")) return;
  const box = h("input", {
    type: "password",
    autocomplete: "off",
    value: getKey(),
    name: "key",
    id: "key",
  });
  const form = h(
    "form",
    {
      method: "dialog",
      onsubmit: () => {
        setKey(box.value.trim());
        chat.reload();
        route();
      },
    },
    h(
      "p",
      null,
      "This server wants to know who asks. The key is kept until this tab is closed, and sent to this server alone.",
    ),
    h("div", { class: "field" }, h("label", { for: "key" }, "API key"), box),
    h(
      "div",
      { class: "row" },
      h("button", { class: "main", type: "submit" }, "Use it"),
      h(
        "button",
        {
          type: "submit",
          onclick: () => {
            box.value = "";
          },
        },
        "Forget it",
      ),
    ),
  );
  dialog("API key", form);
}

// ---- the keyboard

function showKeys() {
  dialog(
    "Keys",
    h(
      "dl",
      { class: "key-list" },
      KEYS.map(([keys, what]) =>
        h(
          "div",
          null,
          h(
            "dt",
            null,
            keys.split(" ").map((key) => h("kbd", null, key)),
          ),
          h("dd", null, what),
        ),
      ),
    ),
  );
}

const GO = { 1: "chat", 2: "live", 3: "models" };
const COMMANDS = {
  "?": showKeys,
  d: nextTheme,
  "/": () => onChat(chat.focusComposer),
  n: () => onChat(chat.startNew),
  t: () => onChat(chat.toggleLastTokens),
  s: () => onChat(() => chat.toggle("settings")),
  h: () => onChat(() => chat.toggle("conversations")),
};

function onChat(task) {
  if (document.body.dataset.view !== "chat") {
    location.hash = "#chat";
    setTimeout(task);
  } else task();
}

addEventListener("keydown", (event) => {
  const open = document.querySelector("dialog[open]");
  if (event.key === "Escape" && !open && document.body.dataset.view === "chat") {
    if (chat.isRunning()) chat.stop();
    else if (!chat.closePanel() && event.target instanceof HTMLElement) event.target.blur();
    return;
  }
  const typing = event.target instanceof Element && event.target.closest("input, textarea, select");
  if (typing || open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (GO[event.key]) location.hash = `#${GO[event.key]}`;
  else if (COMMANDS[event.key]) {
    event.preventDefault();
    COMMANDS[event.key]();
  }
});

document
  .getElementById("tools")
  .append(
    iconButton("key", "API key", askForKey),
    themeButton,
    iconButton("help", "Keys (?)", showKeys),
  );
setTheme(localStorage.getItem(THEME) ?? "auto");
onKeyWanted(askForKey);
addEventListener("hashchange", route);
route();
