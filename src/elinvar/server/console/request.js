// From a conversation to the body of POST /v1/chat/completions, and to programs that send the same.

/** The numbers that one may set: key, label, range, step, and what it means. */
export const PARAMS = [
  {
    key: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    hint: "0: always the likeliest token",
    slider: true,
  },
  {
    key: "top_p",
    label: "Top p",
    min: 0,
    max: 1,
    step: 0.01,
    hint: "likeliest tokens that make up this share",
  },
  {
    key: "top_k",
    label: "Top k",
    min: 0,
    max: 100000,
    step: 1,
    hint: "this many likeliest tokens; 0: all",
    whole: true,
  },
  {
    key: "min_p",
    label: "Min p",
    min: 0,
    max: 1,
    step: 0.01,
    hint: "at least this share of the likeliest one",
  },
  {
    key: "max_tokens",
    label: "Max tokens",
    min: 1,
    max: 10000000,
    step: 1,
    hint: "of the answer",
    whole: true,
  },
  {
    key: "seed",
    label: "Seed",
    min: 0,
    max: 2 ** 53 - 1,
    step: 1,
    hint: "the same seed gives the same answer",
    whole: true,
  },
  {
    key: "frequency_penalty",
    label: "Frequency penalty",
    min: -2,
    max: 2,
    step: 0.1,
    hint: "by how often a token was said",
  },
  {
    key: "presence_penalty",
    label: "Presence penalty",
    min: -2,
    max: 2,
    step: 0.1,
    hint: "for having been said",
  },
  {
    key: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.1,
    max: 10,
    step: 0.05,
    hint: "factor; 1: none",
  },
];
const EXTRA = ["top_k", "min_p", "repetition_penalty"];

export const TOOLS_EXAMPLE = `[
  {
    "type": "function",
    "function": {
      "name": "get_weather",
      "description": "The weather of now in a city",
      "parameters": {
        "type": "object",
        "properties": { "city": { "type": "string" } },
        "required": ["city"]
      }
    }
  }
]`;
export const SCHEMA_EXAMPLE = `{
  "type": "object",
  "properties": {
    "title": { "type": "string" },
    "year": { "type": "integer" }
  },
  "required": ["title", "year"],
  "additionalProperties": false
}`;

/** What is wrong with a number; "" for nothing. */
export function checkNumber(spec, text) {
  if (text === "") return "";
  const value = Number(text);
  if (!Number.isFinite(value)) return "Give a number.";
  if (spec.whole && !Number.isInteger(value)) return "Give a whole number.";
  if (value < spec.min || value > spec.max) return `From ${spec.min} to ${spec.max}.`;
  return "";
}

/** {value} or {error} of JSON text; {} where there is none. */
function parsed(text) {
  if (!text.trim()) return {};
  try {
    return { value: JSON.parse(text) };
  } catch (error) {
    const at = /position (\d+)/.exec(error.message);
    const line = at ? ` (line ${text.slice(0, Number(at[1])).split("\n").length})` : "";
    return { error: `Not JSON: ${error.message.replace(/ in JSON.*| \(line.*/, "")}${line}.` };
  }
}

/** {value: tools} or {error}. Functions without their wrapper are wrapped. */
export function readTools(text) {
  const { value, error } = parsed(text);
  if (error || value === undefined) return { error };
  if (!Array.isArray(value)) return { error: "Tools are a list: [ … ]." };
  const tools = value.map((one) =>
    one?.type === undefined && one?.name ? { type: "function", function: one } : one,
  );
  for (const [i, tool] of tools.entries()) {
    const name = tool?.function?.name,
      parameters = tool?.function?.parameters;
    if (tool?.type !== "function") return { error: `Tool ${i + 1}: its type must be "function".` };
    if (typeof name !== "string" || !/^[\w-]{1,64}$/.test(name))
      return { error: `Tool ${i + 1}: function.name must be 1 to 64 letters, digits, _ or -.` };
    if (tools.findIndex((other) => other?.function?.name === name) !== i)
      return { error: `Two tools are called ${name}.` };
    if (parameters !== undefined) {
      const wrong = checkSchema(parameters, `${name}.parameters`);
      if (wrong) return { error: wrong };
    }
  }
  return { value: tools };
}

/** {value: schema} or {error}. */
export function readSchema(text) {
  const { value, error } = parsed(text);
  if (error) return { error };
  if (value === undefined) return { error: "Give a schema, or choose another format." };
  const wrong = checkSchema(value, "schema");
  return wrong ? { error: wrong } : { value };
}

const TYPES = ["object", "array", "string", "number", "integer", "boolean", "null"];
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

/** The first thing that is no JSON Schema; "" where all is well. The server knows the rest. */
function checkSchema(schema, path) {
  if (typeof schema === "boolean") return "";
  if (!isObject(schema)) return `${path} must be an object.`;
  for (const type of [schema.type ?? []].flat())
    if (!TYPES.includes(type)) return `${path}.type: there is no type ${JSON.stringify(type)}.`;
  if (
    schema.required !== undefined &&
    !(Array.isArray(schema.required) && schema.required.every((one) => typeof one === "string"))
  )
    return `${path}.required must be a list of names.`;
  if (schema.enum !== undefined && !Array.isArray(schema.enum))
    return `${path}.enum must be a list.`;
  for (const key of ["properties", "$defs", "patternProperties"]) {
    if (schema[key] === undefined) continue;
    if (!isObject(schema[key])) return `${path}.${key} must be an object.`;
    for (const [name, inner] of Object.entries(schema[key])) {
      const wrong = checkSchema(inner, `${path}.${name}`);
      if (wrong) return wrong;
    }
  }
  for (const key of ["anyOf", "oneOf", "allOf"]) {
    if (schema[key] === undefined) continue;
    if (!Array.isArray(schema[key])) return `${path}.${key} must be a list.`;
    for (const inner of schema[key]) {
      const wrong = checkSchema(inner, `${path}.${key}`);
      if (wrong) return wrong;
    }
  }
  return schema.items === undefined ? "" : checkSchema(schema.items, `${path}.items`);
}

/** The first thing in the settings that cannot be sent; "" where all is well. */
export function checkSettings(settings) {
  for (const spec of PARAMS) {
    const wrong = checkNumber(spec, String(settings.params[spec.key] ?? ""));
    if (wrong) return `${spec.label}: ${wrong}`;
  }
  const tools = readTools(settings.tools);
  if (tools.error) return tools.error;
  return settings.format === "json_schema" ? (readSchema(settings.schema).error ?? "") : "";
}

/** The body that asks for the answer to `messages`; settings are checked. */
export function chatBody(settings, messages, seed = null) {
  const body = {
    model: settings.model,
    messages: [
      ...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []),
      ...messages.map(sent),
    ],
  };
  for (const { key } of PARAMS) {
    const text = String(settings.params[key] ?? "");
    if (text !== "") body[key] = Number(text);
  }
  if (seed !== null) body.seed = seed;
  const stops = (settings.params.stop ?? "")
    .split("\n")
    .filter(Boolean)
    .map((one) => one.replaceAll("\\n", "\n"));
  if (stops.length) body.stop = stops;
  if (settings.params.reasoning_effort) body.reasoning_effort = settings.params.reasoning_effort;
  const tools = readTools(settings.tools).value;
  if (tools?.length) Object.assign(body, { tools, tool_choice: settings.toolChoice });
  if (settings.format === "json_object") body.response_format = { type: "json_object" };
  if (settings.format === "json_schema")
    body.response_format = {
      type: "json_schema",
      json_schema: { name: "answer", strict: true, schema: readSchema(settings.schema).value },
    };
  if (settings.record) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
}

/** What the API knows of a message of ours. */
function sent(message) {
  const { role, content, tool_calls, tool_call_id } = message;
  if (role === "tool") return { role, content, tool_call_id };
  return tool_calls?.length ? { role, content, tool_calls } : { role, content };
}

export const streamed = (body) => ({
  ...body,
  stream: true,
  stream_options: { include_usage: true },
});

export function asCurl(body, origin, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${origin}/v1/chat/completions \\\n  -H "Content-Type: application/json"${key} \\\n  -d '${data}'\n`;
}

export function asPython(body, origin, withKey) {
  const key = withKey ? 'os.environ["API_KEY"]' : '"none"';
  const own = Object.fromEntries(
    EXTRA.filter((name) => name in body).map((name) => [name, body[name]]),
  );
  const known = Object.entries(body).filter(([name]) => !EXTRA.includes(name));
  const lines = known.map(([name, value]) => `    ${name}=${literal(value, 4)},`);
  if (Object.keys(own).length) lines.push(`    extra_body=${literal(own, 4)},`);
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${key})
answer = client.chat.completions.create(
${lines.join("\n")}
)
print(answer.choices[0].message.content)
`;
}

/** A JSON value as Python writes it. */
function literal(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = " ".repeat(indent + 4),
    end = " ".repeat(indent);
  const parts = Array.isArray(value)
    ? value.map((one) => literal(one, indent + 4))
    : Object.entries(value).map(
        ([name, one]) => `${JSON.stringify(name)}: ${literal(one, indent + 4)}`,
      );
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const short = open + parts.join(", ") + close;
  if (short.length < 60 && !short.includes("\n")) return short;
  return `${open}\n${parts.map((part) => inner + part + ",\n").join("")}${end}${close}`;
}
