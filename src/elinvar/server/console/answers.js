// Having an answer written, and asking for it once more.

import { Answer, run } from "./stream.js";
import { compare } from "./tokens.js";

/** message -> {tokens, body} of the answers since the page was loaded: too much for localStorage. */
export const kept = new WeakMap();

export const isEmpty = ({ content, reasoning, tool_calls }) =>
  !content && !reasoning && !tool_calls?.length;

/** Fills `message` with what `body` asks for, and calls `progress` as it goes on. Returns a sentence of
 * how it ended; message.meta.finish is "stopped" where `signal` did it, and "error" where it failed. */
export async function write(body, message, signal, progress) {
  const answer = new Answer();
  let problem = "";
  try {
    await run(body, answer, signal, () => {
      Object.assign(message, answer.message());
      progress();
    });
  } catch (error) {
    answer.finish =
      error.name === "AbortError"
        ? "stopped"
        : error.code === "request_cancelled"
          ? "cancelled"
          : "error";
    problem = error.message;
  }
  Object.assign(message, answer.message());
  kept.set(message, { tokens: answer.tokens, body });
  return answer.finish === "error" ? problem : `The answer ended: ${answer.finish}.`;
}

/** Asks once more with the seed of an answer, and tells whether all of it is equal. */
export async function askAgain(message) {
  const { tokens, body } = kept.get(message),
    second = new Answer();
  try {
    await run({ ...body, seed: message.meta.seed }, second, undefined, () => {});
  } catch (error) {
    return error.message;
  }
  const { equal, count, at } = compare(tokens, second.tokens);
  if (!equal) return `It differs from token ${at + 1} on.`;
  if (second.content !== message.content) return "The text differs.";
  if (!count) return "The same text.";
  return `The same: all ${count} tokens and their log-probs are equal, to the last digit.`;
}
