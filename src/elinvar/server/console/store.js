// Conversations, kept in this browser alone.

const KEY = "elinvar.conversations";
const CURRENT = "elinvar.current";
const MOST = 100;

export const NO_SETTINGS = {
  model: "",
  system: "",
  params: {},
  tools: "",
  toolChoice: "auto",
  format: "text",
  schema: "",
  record: true,
};

let all = read();
const listeners = new Set();

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found)
      ? found.filter((one) => one?.id && Array.isArray(one.messages))
      : [];
  } catch {
    return [];
  }
}

export const conversations = () => all;
export const onChange = (task) => listeners.add(task);

export function create(like = null) {
  const settings = { ...NO_SETTINGS, ...(like?.settings ?? {}) };
  const made = {
    id: crypto.randomUUID?.() ?? String(Math.random()).slice(2),
    title: "",
    updated: Date.now(),
    settings,
    messages: [],
  };
  all = [made, ...all.filter((one) => one.messages.length)].slice(0, MOST);
  localStorage.setItem(CURRENT, made.id);
  return made;
}

export function current() {
  const id = localStorage.getItem(CURRENT);
  return all.find((one) => one.id === id) ?? all[0] ?? create();
}

export function choose(id) {
  localStorage.setItem(CURRENT, id);
  return current();
}

export function remove(id) {
  all = all.filter((one) => one.id !== id);
  write();
}

/** Something of it changed. Where the browser has no more room, the oldest ones go. */
export function save(one) {
  one.updated = Date.now();
  const said = one.messages.find((message) => message.role === "user");
  one.title = said ? said.content.trim().split("\n")[0].slice(0, 60) : "";
  all = [one, ...all.filter((other) => other.id !== one.id)];
  write();
}

function write() {
  for (;;) {
    try {
      localStorage.setItem(KEY, JSON.stringify(all.filter((one) => one.messages.length)));
      break;
    } catch {
      if (all.length < 2) break;
      all = all.slice(0, -1);
    }
  }
  for (const task of listeners) task();
}
