// Elements in short. Text is always a text node: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Of `props`: `class`, `on…` are listeners, what the element has as a property is set as
 * one, the rest are attributes; null and false leave one out. Children: nodes, texts, lists, null. */
export function h(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !name.includes("-") && name !== "list" && name !== "role")
      node[name] = value;
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(
    ...children
      .flat(Infinity)
      .filter((child) => child !== null && child !== undefined && child !== false),
  );
  return node;
}

const PATHS = {
  send: "M12 19V5M5.5 11.5L12 5l6.5 6.5",
  stop: "M7.5 7.5h9v9h-9z",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM5 15V4h10",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  trash: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
  list: "M4 7h16M4 12h16M4 17h10",
  sliders: "M4 8h9M19 8h1M4 16h2M12 16h8M16 5.5v5M9 13.5v5",
  sun: "M12 8a4 4 0 1 0 0 8a4 4 0 0 0 0-8M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  key: "M8.5 11a4 4 0 1 0 0 8a4 4 0 0 0 0-8M11.5 12.5L20 4M16 8l3 3",
  help: "M9 9.2a3 3 0 1 1 4.4 2.6c-1 .6-1.4 1.1-1.4 2.2M12 17.6v.1",
  tokens: "M4 6h6v5H4zM13 6h7v5h-7zM4 14h9v5H4zM16 14h4v5h-4z",
  equal: "M5 9h14M5 15h14",
  code: "M9 7l-5 5l5 5M15 7l5 5l-5 5",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon, and its `label` when there is room or a pointer rests on it. */
export function iconButton(name, label, onclick, props = {}) {
  return h(
    "button",
    { type: "button", class: "icon-button", title: label, "aria-label": label, onclick, ...props },
    icon(name),
  );
}

/** Tells those who cannot see it. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** A dialog that closes with Escape or a click beside it. Returns it, opened. */
export function dialog(title, ...children) {
  const close = () => box.close();
  const box = h(
    "dialog",
    {
      class: "dialog",
      "aria-label": title,
      onclose: () => box.remove(),
      onclick: (event) => {
        if (event.target === box) close();
      },
    },
    h(
      "div",
      { class: "dialog-in" },
      h("div", { class: "dialog-head" }, h("h2", null, title), iconButton("close", "Close", close)),
      ...children,
    ),
  );
  document.body.append(box);
  box.showModal();
  return box;
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // without https there is no clipboard but the old one
    const area = h("textarea", { value: text, class: "hidden" });
    (document.querySelector("dialog[open]") ?? document.body).append(area); // what is beside a dialog gets no focus
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say("Copied.");
}

/** Runs at most once a frame, with the last arguments. */
export function eachFrame(task) {
  let wanted = null;
  return (...given) => {
    if (wanted === null)
      requestAnimationFrame(() => {
        const last = wanted;
        wanted = null;
        task(...last);
      });
    wanted = given;
  };
}

export function number(value, digits = 0) {
  return value === null || value === undefined || !Number.isFinite(value)
    ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return share === null || share === undefined
    ? "–"
    : `${number(share * 100, share > 0 && share < 0.1 ? 1 : 0)} %`;
}
