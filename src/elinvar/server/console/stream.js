// One answer while it is written: what the stream's chunks come to.

import { ask, events } from "./api.js";
import { streamed } from "./request.js";

export class Answer {
  content = "";
  reasoning = "";
  toolCalls = [];
  tokens = [];
  usage = null;
  seed = null;
  finish = null;
  id = null;
  began = performance.now();
  first = null;
  last = null;

  /** One chunk of /v1/chat/completions. */
  push(chunk) {
    this.id ??= chunk.id;
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { delta } = choice;
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    for (const call of delta.tool_calls ?? []) this.#pushCall(call);
    if (choice.logprobs?.content) this.tokens.push(...choice.logprobs.content);
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (choice.finish_reason)
      [this.finish, this.seed] = [choice.finish_reason, choice.seed ?? null];
  }

  #pushCall(part) {
    const call = (this.toolCalls[part.index] ??= {
      id: "",
      type: "function",
      function: { name: "", arguments: "" },
    });
    call.id ||= part.id ?? "";
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }

  /** Milliseconds to the first token, and tokens a second from there. */
  get speed() {
    const count = (this.usage?.completion_tokens ?? this.tokens.length) - 1;
    const seconds = (this.last - this.first) / 1000;
    return {
      ttft: this.first === null ? null : this.first - this.began,
      rate: count > 0 && seconds > 0 ? count / seconds : null,
    };
  }

  /** As a message that is kept. */
  message() {
    const { ttft, rate } = this.speed;
    return {
      role: "assistant",
      content: this.content,
      ...(this.reasoning && { reasoning: this.reasoning }),
      ...(this.toolCalls.length && { tool_calls: this.toolCalls.filter(Boolean) }),
      meta: { finish: this.finish, seed: this.seed, usage: this.usage, ttft, rate },
    };
  }
}

/** Fills `answer` and calls `progress` as it goes on. Raises what `ask` raises, AbortError too. */
export async function run(body, answer, signal, progress) {
  const response = await ask("/v1/chat/completions", { body: streamed(body), signal });
  for await (const chunk of events(response)) {
    answer.push(chunk);
    progress();
  }
}
