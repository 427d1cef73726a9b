// The playground: a conversation, its composer, and what can be done with each message.

import { askAgain, isEmpty, kept, write } from "./answers.js";
import { getJson } from "./api.js";
import { UNTITLED, conversationList, welcome } from "./conversations.js";
import { copy, eachFrame, h, icon, iconButton, say } from "./dom.js";
import { messageNode } from "./message.js";
import { showPrograms } from "./programs.js";
import { chatBody, checkSettings } from "./request.js";
import { settingsPanel } from "./settings.js";
import * as store from "./store.js";

const wide = matchMedia("(min-width: 70rem)");

let conversation = null;
let models = [];
let running = null; // {message, abort}: the answer that is written
let problem = ""; // of the last answer
const views = new WeakMap(); // message -> what of it is unfolded
let parts = {};

export async function showChat(main) {
  conversation ??= store.current();
  parts = {
    log: h("div", {
      class: "log",
      id: "log",
      role: "log",
      "aria-live": "off",
      "aria-label": "Conversation",
      tabIndex: -1,
    }),
    list: h("aside", {
      class: "conversations",
      id: "conversations",
      "aria-label": "Conversations",
    }),
    box: composerBox(),
    go: h("button", { type: "submit", class: "go" }),
    note: h("p", { class: "composer-note", role: "alert" }),
  };
  const composer = h(
    "form",
    {
      class: "composer",
      onsubmit: (event) => {
        event.preventDefault();
        if (running) stop();
        else send();
      },
    },
    parts.note,
    h("div", { class: "composer-in" }, parts.box, parts.go),
    h(
      "p",
      { class: "keys" },
      h("kbd", null, "Enter"),
      " sends  ",
      h("kbd", null, "Shift Enter"),
      " breaks the line  ",
      h("kbd", null, "Esc"),
      " stops  ",
      h("kbd", null, "?"),
      " all keys",
    ),
  );
  const head = h(
    "div",
    { class: "chat-head" },
    iconButton("list", "Conversations", () => toggle("conversations"), opener("conversations")),
    h("h1", { class: "title" }),
    iconButton("plus", "New conversation", startNew),
    iconButton("code", "Copy as a program", () => showPrograms(conversation)),
    iconButton("sliders", "Settings", () => toggle("settings"), opener("settings")),
  );
  parts.frame = h(
    "div",
    { class: "chat" },
    parts.list,
    h("section", { class: "talk", "aria-label": "Chat" }, head, parts.log, composer),
  );
  parts.title = head.querySelector(".title");
  main.replaceChildren(parts.frame);
  drawAll();
  parts.box.focus({ preventScroll: true });
  await loadModels();
}

const opener = (name) => ({
  id: `show-${name}`,
  "aria-controls": name,
  "aria-expanded": String(wide.matches),
});

async function loadModels() {
  try {
    models = (await getJson("/v1/models")).data.map((one) => one.id);
    problem = "";
  } catch (error) {
    problem = error.message;
  }
  settleModel();
  drawAll();
}

/** The model that was asked for on the models page, or one that is there. */
function settleModel() {
  const wanted = sessionStorage.getItem("elinvar.model");
  sessionStorage.removeItem("elinvar.model");
  if (models.includes(wanted)) conversation.settings.model = wanted;
  else if (models.length && !models.includes(conversation.settings.model))
    conversation.settings.model = models[0];
}

/** Once a key was given. */
export const reload = () => loadModels();

// ---- drawing

function drawAll() {
  if (!parts.frame?.isConnected) return;
  drawList();
  drawMessages();
  drawSettings();
  drawComposer();
}

function drawSettings() {
  const old = parts.frame.querySelector(".settings");
  const panel = settingsPanel(
    conversation.settings,
    models,
    () => {
      if (conversation.messages.length) store.save(conversation);
      drawComposer();
    },
    () => toggle("settings"),
  );
  if (old) old.replaceWith(panel);
  else parts.frame.append(panel);
}

function drawList() {
  parts.list.replaceChildren(
    ...conversationList(conversation, {
      choose: (one) => switchTo(store.choose(one.id)),
      forget,
      startNew,
      close: () => toggle("conversations"),
    }),
  );
  parts.title.textContent = conversation.title || UNTITLED;
}

function drawMessages() {
  const nodes = conversation.messages.map((message, at) =>
    messageNode(message, message === running?.message ? { writing: true } : actions(message, at)),
  );
  if (!nodes.length)
    nodes.push(
      welcome((text) => {
        parts.box.value = text;
        grow();
        parts.box.focus();
      }),
    );
  if (problem) nodes.push(h("p", { class: "problem", role: "alert" }, problem));
  parts.log.replaceChildren(...nodes);
  parts.log.scrollTop = parts.log.scrollHeight;
}

/** Whether the end of the conversation is seen. */
const atEnd = () => parts.log.scrollHeight - parts.log.scrollTop - parts.log.clientHeight < 60;

function drawComposer() {
  const wrong = checkSettings(conversation.settings);
  parts.note.textContent = wrong ? `Settings: ${wrong}` : "";
  parts.go.disabled = !running && Boolean(wrong);
  parts.go.className = running ? "go stopping" : "go";
  parts.go.setAttribute("aria-label", running ? "Stop" : "Send");
  parts.go.title = running ? "Stop (Esc)" : "Send (Enter)";
  parts.go.replaceChildren(icon(running ? "stop" : "send"));
}

function composerBox() {
  return h("textarea", {
    rows: 1,
    name: "message",
    "aria-label": "Message",
    placeholder: "Say something",
    autocomplete: "off",
    oninput: grow,
    onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!running) send();
      }
    },
  });
}

function grow() {
  parts.box.style.height = "auto";
  parts.box.style.height = `${Math.min(parts.box.scrollHeight, innerHeight / 3)}px`;
}

/** A panel beside the chat: there or not where there is room, over it where there is none. */
export function toggle(name) {
  const open = !(wide.matches
    ? !parts.frame.classList.contains(`no-${name}`)
    : parts.frame.classList.contains(`with-${name}`));
  if (wide.matches) parts.frame.classList.toggle(`no-${name}`, !open);
  else {
    parts.frame.classList.remove("with-settings", "with-conversations");
    parts.frame.classList.toggle(`with-${name}`, open);
  }
  const panel = document.getElementById(name),
    opener = document.getElementById(`show-${name}`);
  opener.setAttribute("aria-expanded", String(open));
  if (open) panel.querySelector("select, button, input, textarea")?.focus();
  else opener.focus();
}

/** Whether a panel was over the chat, and is no more. */
export function closePanel() {
  for (const name of ["settings", "conversations"])
    if (parts.frame?.classList.contains(`with-${name}`)) {
      toggle(name);
      return true;
    }
  return false;
}

// ---- conversations

export function startNew() {
  switchTo(store.create(conversation));
  parts.box.focus();
}

function switchTo(other) {
  stop();
  conversation = other;
  problem = "";
  settleModel();
  parts.frame.classList.remove("with-conversations");
  drawAll();
}

function forget(one) {
  store.remove(one.id);
  if (one === conversation) switchTo(store.current());
  else drawList();
}

// ---- answers

export const isRunning = () => running !== null;
export const stop = () => running?.abort.abort();
export const focusComposer = () => parts.box?.focus();

function send() {
  const text = parts.box.value;
  if (!text.trim() || running || checkSettings(conversation.settings)) return;
  conversation.messages.push({ role: "user", content: text });
  store.save(conversation);
  parts.box.value = "";
  grow();
  generate();
}

/** Writes the answer to what is there now. */
async function generate() {
  problem = "";
  const asked = conversation,
    body = chatBody(asked.settings, asked.messages);
  const message = { role: "assistant", content: "", model: body.model, meta: {} };
  asked.messages.push(message);
  running = { message, abort: new AbortController() };
  drawAll();
  const told = await write(body, message, running.abort.signal, eachFrame(drawWriting));
  running = null;
  if (message.meta.finish === "error") {
    problem = told;
    if (isEmpty(message)) asked.messages.pop();
  }
  if (store.conversations().includes(asked)) store.save(asked); // it may have been deleted meanwhile
  drawAll();
  say(told);
}

function drawWriting() {
  const node = parts.log.querySelector(".message.writing");
  if (!running || !node) return;
  const low = atEnd();
  node.replaceWith(messageNode(running.message, { writing: true }));
  if (low) parts.log.scrollTop = parts.log.scrollHeight;
}

/** What can be done with a message: handed to the node that shows it. */
function actions(message, at) {
  const view = views.get(message) ?? {};
  const show = (change) => {
    views.set(message, { ...views.get(message), ...change });
    drawKept(at);
  };
  return {
    view,
    ...kept.get(message),
    copy: () => copy(message.content),
    edit: () => show({ editing: true }),
    cancelEdit: () => show({ editing: false }),
    keep: (text) => {
      message.content = text;
      views.delete(message);
      store.save(conversation);
      drawMessages();
    },
    resend: (text) => {
      if (running) return;
      message.content = text;
      views.delete(message);
      conversation.messages.length = at + 1;
      generate();
    },
    regenerate: () => {
      if (running) return;
      conversation.messages.length = at;
      generate();
    },
    toggleTokens: () => show({ tokens: !view.tokens }),
    sameAgain: async () => {
      show({ same: "Asking again …" });
      const told = await askAgain(message);
      show({ same: told });
      say(told);
    },
    answerCalls: (results) => {
      if (running) return;
      conversation.messages.length = at + 1;
      conversation.messages.push(...results);
      generate();
    },
  };
}

function drawKept(at) {
  const message = conversation.messages[at],
    old = parts.log.children[at];
  const label =
    old?.contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
  const node = messageNode(message, actions(message, at)),
    low = atEnd();
  old?.replaceWith(node);
  if (low) parts.log.scrollTop = parts.log.scrollHeight;
  const same = label && node.querySelector(`button[aria-label="${CSS.escape(label)}"]`);
  (node.querySelector(".editor textarea") ?? same)?.focus({ preventScroll: true });
  return node;
}

/** The token view of the last answer. */
export function toggleLastTokens() {
  const at = conversation.messages.findLastIndex((one) => kept.get(one)?.tokens.length);
  if (at < 0) return;
  actions(conversation.messages[at], at).toggleTokens();
  parts.log.children[at].querySelector(".token-text .token")?.focus();
}
