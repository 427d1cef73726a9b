// The panel beside a conversation: model, system prompt, parameters, tools, format.

import { h, icon, iconButton } from "./dom.js";
import {
  PARAMS,
  SCHEMA_EXAMPLE,
  TOOLS_EXAMPLE,
  checkNumber,
  readSchema,
  readTools,
} from "./request.js";

let serial = 0;

/** models: their names. changed: called after each change of `settings`, which is changed in place. */
export function settingsPanel(settings, models, changed, close) {
  const set = (key) => (value) => {
    settings[key] = value;
    changed();
  };
  const panel = h(
    "aside",
    { class: "settings", id: "settings", "aria-label": "Settings" },
    h(
      "div",
      { class: "panel-head" },
      h("h2", null, "Settings"),
      iconButton("close", "Close settings", close, { class: "icon-button narrow-only" }),
    ),
    choice(
      "Model",
      models.map((name) => [name, name]),
      settings.model,
      set("model"),
      { name: "model" },
    ),
    area("System prompt", settings.system, set("system"), {
      rows: 3,
      placeholder: "You are a helpful assistant.",
      name: "system",
    }),
    h(
      "fieldset",
      null,
      h("legend", null, "Sampling"),
      PARAMS.map((spec) => numberField(spec, settings.params, changed)),
    ),
    area(
      "Stop texts",
      settings.params.stop ?? "",
      (value) => {
        settings.params.stop = value;
        changed();
      },
      { rows: 2, hint: "one a line; \\n is a line break", name: "stop" },
    ),
    choice(
      "Reasoning effort",
      [
        ["", "the model's own"],
        ...["none", "minimal", "low", "medium", "high"].map((one) => [one, one]),
      ],
      settings.params.reasoning_effort ?? "",
      (value) => {
        settings.params.reasoning_effort = value;
        changed();
      },
      { name: "reasoning_effort" },
    ),
    h(
      "label",
      { class: "check" },
      h("input", {
        type: "checkbox",
        name: "record",
        checked: settings.record,
        onchange: (event) => set("record")(event.target.checked),
      }),
      h("span", null, "Record token probabilities"),
    ),
    toolsEditor(settings, changed),
    formatEditor(settings, changed),
  );
  return panel;
}

function labelled(text, control, hint) {
  const id = `f${++serial}`;
  control.id = id;
  const told = hint ? h("small", { id: `${id}h` }, hint) : null;
  if (told) control.setAttribute("aria-describedby", told.id);
  return h("div", { class: "field" }, h("label", { for: id }, text), control, told);
}

function choice(text, options, value, onpick, { name }) {
  const select = h(
    "select",
    { name, onchange: () => onpick(select.value) },
    options.map(([key, shown]) => h("option", { value: key }, shown)),
  );
  select.value = value;
  return labelled(text, select);
}

function area(text, value, oninput, { hint, ...props }) {
  const box = h("textarea", { ...props, value, oninput: () => oninput(box.value) });
  return labelled(text, box, hint);
}

function numberField(spec, params, changed) {
  const id = `f${++serial}`,
    told = h("small", { id: `${id}h` }, spec.hint);
  const box = h("input", {
    id,
    name: spec.key,
    inputMode: "decimal",
    autocomplete: "off",
    placeholder: "default",
    value: params[spec.key] ?? "",
    "aria-describedby": told.id,
    oninput: () => put(box.value.trim()),
  });
  const slider =
    spec.slider &&
    h("input", {
      type: "range",
      class: "temper",
      "aria-label": `${spec.label}, slider`,
      min: spec.min,
      max: spec.max,
      step: spec.step,
      value: params[spec.key] || 1,
      oninput: () => {
        box.value = slider.value;
        put(slider.value);
      },
    });
  function put(text) {
    const wrong = checkNumber(spec, text);
    told.textContent = wrong || spec.hint;
    told.classList.toggle("wrong", Boolean(wrong));
    box.setAttribute("aria-invalid", String(Boolean(wrong)));
    if (slider && text && !wrong) slider.value = text;
    if (text === "") delete params[spec.key];
    else params[spec.key] = text;
    changed();
  }
  if (params[spec.key]) put(String(params[spec.key]));
  return h(
    "div",
    { class: "field number" },
    h("label", { for: id }, spec.label),
    box,
    slider,
    told,
  );
}

/** A text area for JSON with what is wrong below it, said as one types. */
function jsonEditor(label, name, text, example, check, put) {
  const id = `f${++serial}`,
    told = h("small", { id: `${id}h`, role: "status" });
  const box = h("textarea", {
    id,
    name,
    class: "mono",
    rows: 9,
    wrap: "off",
    spellcheck: false,
    value: text,
    "aria-describedby": told.id,
    oninput: () => {
      put(box.value);
      show();
    },
  });
  function show() {
    const { error, value } = check(box.value);
    told.textContent =
      error ??
      (value === undefined
        ? ""
        : Array.isArray(value)
          ? `${value.length} ${value.length === 1 ? "tool" : "tools"}.`
          : "A valid schema.");
    told.className = error ? "wrong" : "right";
    box.setAttribute("aria-invalid", String(Boolean(error)));
  }
  show();
  const insert = h(
    "button",
    {
      type: "button",
      class: "plain",
      onclick: () => {
        box.value = example;
        put(example);
        show();
      },
    },
    icon("plus"),
    "Insert an example",
  );
  return h("div", { class: "field" }, h("label", { for: id }, label), box, told, insert);
}

function toolsEditor(settings, changed) {
  const put = (key) => (value) => {
    settings[key] = value;
    changed();
  };
  return h(
    "details",
    { class: "fold", open: Boolean(settings.tools) },
    h("summary", null, "Tools"),
    jsonEditor(
      "Functions, as JSON",
      "tools",
      settings.tools,
      TOOLS_EXAMPLE,
      readTools,
      put("tools"),
    ),
    choice(
      "Tool choice",
      ["auto", "none", "required"].map((one) => [one, one]),
      settings.toolChoice,
      put("toolChoice"),
      { name: "tool_choice" },
    ),
  );
}

function formatEditor(settings, changed) {
  const schema = jsonEditor(
    "JSON schema",
    "schema",
    settings.schema,
    SCHEMA_EXAMPLE,
    readSchema,
    (value) => {
      settings.schema = value;
      changed();
    },
  );
  const show = () => {
    schema.hidden = settings.format !== "json_schema";
  };
  show();
  return h(
    "details",
    { class: "fold", open: settings.format !== "text" },
    h("summary", null, "Answer format"),
    choice(
      "Format",
      [
        ["text", "text"],
        ["json_object", "any JSON object"],
        ["json_schema", "JSON by a schema"],
      ],
      settings.format,
      (value) => {
        settings.format = value;
        show();
        changed();
      },
      { name: "format" },
    ),
    schema,
  );
}
