// The playground: a conversation, its composer, and what can be done with each message.

import { getJson, getKey } from "./api.js";
import { copy, dialog, eachFrame, h, icon, iconButton, say } from "./dom.js";
import { messageNode } from "./message.js";
import { asCurl, asPython, chatBody, checkSettings, streamed } from "./request.js";
import { settingsPanel } from "./settings.js";
import * as store from "./store.js";
import { Answer, run } from "./stream.js";
import { compare } from "./tokens.js";

const wide = matchMedia("(min-width: 70rem)");

let conversation = null;
let models = [];
let running = null; // {answer, abort, at}: the one that is written, and where its message is
let problem = ""; // of the last answer
const kept = new WeakMap(); // message -> {tokens, body}: too much for localStorage
const views = new WeakMap(); // message -> what of it is unfolded
let parts = {};

export async function showChat(main) {
  conversation ??= store.current();
  parts = {
    log: h("div", { class: "log", id: "log", role: "log", "aria-live": "off", "aria-label": "Conversation", tabIndex: -1 }),
    list: h("aside", { class: "conversations", id: "conversations", "aria-label": "Conversations" }),
    box: composerBox(),
    go: h("button", { type: "submit", class: "go" }),
    note: h("p", { class: "composer-note", role: "alert" }),
  };
  const composer = h("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); if (running) stop(); else send(); } },
    parts.note, h("div", { class: "composer-in" }, parts.box, parts.go),
    h("p", { class: "keys" }, h("kbd", null, "Enter"), " sends  ", h("kbd", null, "Shift Enter"), " breaks the line  ", h("kbd", null, "Esc"), " stops  ", h("kbd", null, "?"), " all keys"));
  const head = h("div", { class: "chat-head" },
    iconButton("list", "Conversations", () => toggle("conversations"), opener("conversations")),
    h("h1", { class: "title" }),
    iconButton("plus", "New conversation", startNew),
    iconButton("code", "Copy as a program", showPrograms),
    iconButton("sliders", "Settings", () => toggle("settings"), opener("settings")));
  parts.frame = h("div", { class: "chat" }, parts.list, h("section", { class: "talk", "aria-label": "Chat" }, head, parts.log, composer));
  parts.title = head.querySelector(".title");
  main.replaceChildren(parts.frame);
  drawAll();
  parts.box.focus({ preventScroll: true });
  await loadModels();
}

const opener = (name) => ({ id: `show-${name}`, "aria-controls": name, "aria-expanded": String(wide.matches) });

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
  else if (models.length && !models.includes(conversation.settings.model)) conversation.settings.model = models[0];
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
  const panel = settingsPanel(conversation.settings, models, () => { if (conversation.messages.length) store.save(conversation); drawComposer(); }, () => toggle("settings"));
  if (old) old.replaceWith(panel); else parts.frame.append(panel);
}

function drawList() {
  const item = (one) => h("li", { class: one === conversation ? "now" : null },
    h("button", { type: "button", class: "open", "aria-current": one === conversation ? "true" : null, onclick: () => switchTo(store.choose(one.id)) }, one.title || "New conversation"),
    iconButton("trash", `Delete “${one.title || "New conversation"}”`, () => forget(one)));
  parts.list.replaceChildren(
    h("div", { class: "panel-head" }, h("h2", null, "Conversations"), iconButton("close", "Close the list", () => toggle("conversations"), { class: "icon-button narrow-only" })),
    h("button", { type: "button", class: "wide", onclick: startNew }, icon("plus"), "New conversation"),
    h("ul", null, store.conversations().map(item)));
  parts.title.textContent = conversation.title || "New conversation";
}

function drawMessages() {
  const nodes = conversation.messages.map((message, at) => messageNode(message, message === running?.message ? { writing: true } : actions(message, at)));
  if (!nodes.length) nodes.push(welcome());
  if (problem) nodes.push(h("p", { class: "problem", role: "alert" }, problem));
  parts.log.replaceChildren(...nodes);
  parts.log.scrollTop = parts.log.scrollHeight;
}

/** Whether the end of the conversation is seen. */
const atEnd = () => parts.log.scrollHeight - parts.log.scrollTop - parts.log.clientHeight < 60;

function welcome() {
  const tries = ["Why is the sky blue?", "Write a haiku about a clock spring.", "List three uses of nickel steel, as a table."];
  return h("div", { class: "welcome" },
    h("h2", null, "Elastic in scale, invariant in result."),
    h("p", null, "The same prompt, parameters and seed give the same tokens, to the bit, whatever else the server does. Ask something, then press ", h("em", null, "Same again"), "."),
    h("ul", null, tries.map((text) => h("li", null, h("button", { type: "button", class: "try", onclick: () => { parts.box.value = text; grow(); parts.box.focus(); } }, text)))));
}

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
  return h("textarea", { rows: 1, name: "message", "aria-label": "Message", placeholder: "Say something", autocomplete: "off",
    oninput: grow, onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running) send(); }
    } });
}

function grow() {
  parts.box.style.height = "auto";
  parts.box.style.height = `${Math.min(parts.box.scrollHeight, innerHeight / 3)}px`;
}

/** A panel beside the chat: there or not where there is room, over it where there is none. */
export function toggle(name) {
  const open = !(wide.matches ? !parts.frame.classList.contains(`no-${name}`) : parts.frame.classList.contains(`with-${name}`));
  if (wide.matches) parts.frame.classList.toggle(`no-${name}`, !open);
  else {
    parts.frame.classList.remove("with-settings", "with-conversations");
    parts.frame.classList.toggle(`with-${name}`, open);
  }
  const panel = document.getElementById(name), opener = document.getElementById(`show-${name}`);
  opener.setAttribute("aria-expanded", String(open));
  if (open) panel.querySelector("select, button, input, textarea")?.focus();
  else opener.focus();
}

/** Whether a panel was over the chat, and is no more. */
export function closePanel() {
  for (const name of ["settings", "conversations"])
    if (parts.frame?.classList.contains(`with-${name}`)) { toggle(name); return true; }
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
  const asked = conversation, body = chatBody(asked.settings, asked.messages), answer = new Answer();
  const message = { role: "assistant", content: "", model: body.model, meta: {} };
  asked.messages.push(message);
  const mine = (running = { answer, abort: new AbortController(), message });
  drawAll();
  let node = parts.log.lastElementChild;
  const draw = eachFrame(() => {
    if (running !== mine || !node.isConnected) return;
    const low = atEnd();
    const fresh = messageNode(Object.assign(message, { content: answer.content, reasoning: answer.reasoning, tool_calls: answer.toolCalls.filter(Boolean) }), { writing: true });
    node.replaceWith(fresh);
    node = fresh;
    if (low) parts.log.scrollTop = parts.log.scrollHeight;
  });
  try {
    await run(body, answer, mine.abort.signal, draw);
  } catch (error) {
    answer.finish = error.name === "AbortError" ? "stopped" : error.code === "request_cancelled" ? "cancelled" : "error";
    if (answer.finish === "error") problem = error.message;
  }
  running = null;
  delete message.reasoning;
  delete message.tool_calls;
  Object.assign(message, answer.message());
  kept.set(message, { tokens: answer.tokens, body });
  if (answer.finish === "error" && !answer.content && !answer.reasoning && !answer.toolCalls.length) asked.messages.pop();
  if (store.conversations().includes(asked)) store.save(asked); // it may have been deleted meanwhile
  drawAll();
  say(problem || `The answer ended: ${message.meta.finish}.`);
}

/** What can be done with a message: handed to the node that shows it. */
function actions(message, at) {
  const view = views.get(message) ?? {};
  const show = (change) => { views.set(message, { ...view, ...change }); drawKept(at); };
  return {
    view, ...kept.get(message), copy: () => copy(message.content),
    edit: () => show({ editing: true }),
    cancelEdit: () => show({ editing: false }),
    keep: (text) => { message.content = text; views.delete(message); store.save(conversation); drawMessages(); },
    resend: (text) => { if (running) return; message.content = text; views.delete(message); conversation.messages.length = at + 1; generate(); },
    regenerate: () => { if (running) return; conversation.messages.length = at; generate(); },
    toggleTokens: () => show({ tokens: !view.tokens }),
    sameAgain: () => sameAgain(message, show),
    answerCalls: (results) => {
      if (running) return;
      conversation.messages.length = at + 1;
      conversation.messages.push(...results);
      generate();
    },
  };
}

function drawKept(at) {
  const message = conversation.messages[at], old = parts.log.children[at];
  const label = old?.contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
  const node = messageNode(message, actions(message, at)), low = atEnd();
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

/** Asks once more with the seed of the answer and compares all of it. */
async function sameAgain(message, show) {
  const { tokens: first, body } = kept.get(message), second = new Answer();
  show({ same: "Asking again …" });
  let told;
  try {
    await run({ ...body, seed: message.meta.seed }, second, undefined, () => {});
    const { equal, count, at } = compare(first, second.tokens);
    const text = second.content === message.content;
    if (equal && text) told = count ? `The same: all ${count} tokens and their log-probs are equal, to the last digit.` : "The same text.";
    else told = at < 0 ? "The text differs." : `It differs from token ${at + 1} on.`;
  } catch (error) {
    told = error.message;
  }
  show({ same: told });
  say(told);
}

function showPrograms() {
  const body = chatBody(conversation.settings, conversation.messages.at(-1)?.role === "assistant" ? conversation.messages.slice(0, -1) : conversation.messages);
  const program = (title, text) => h("section", null, h("div", { class: "panel-head" }, h("h3", null, title), h("button", { type: "button", class: "plain", onclick: () => copy(text) }, icon("copy"), "Copy")), h("pre", { tabIndex: 0 }, text));
  const key = Boolean(getKey());
  dialog("The same request as a program", program("curl", asCurl(streamed(body), location.origin, key)), program("Python", asPython(body, location.origin, key)));
}
