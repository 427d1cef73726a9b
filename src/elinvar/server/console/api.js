// Asking the server: the key, errors as sentences, server-sent events.

const KEY = "elinvar.key";
const listeners = new Set();

export const getKey = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** Told when the server asks for a key. */
export const onKeyWanted = (task) => listeners.add(task);

export class ServerError extends Error {
  constructor(message, status, code = null, param = null) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export async function ask(path, { body, method, signal } = {}) {
  const headers = {};
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const getJson = async (path, options) => (await ask(path, options)).json();

async function refusal(response) {
  if (response.status === 401) for (const task of listeners) task();
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    /* not from our server */
  }
  return told?.message
    ? new ServerError(told.message, response.status, told.code, told.param)
    : new ServerError(`The server answered with status ${response.status}.`, response.status);
}

/** The data of each event, decoded; ends with [DONE] or with the stream. An error event is thrown. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart())
          .join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message, 200, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
