// Small charts on a canvas: lines over the last minutes.

import { h, number } from "./dom.js";

/** A chart of `series`: [{name, color (a CSS variable), values}]; update(values of each) draws. Under the
 * pointer, or the arrow keys, it tells the values of a second. */
export function lineChart(title, series, { unit = "", whole = false, least = 1 } = {}) {
  const canvas = h("canvas", { class: "plot", tabIndex: 0, role: "img" });
  const now = series.map(() => h("b", null, "–"));
  const when = h("span", { class: "when" });
  const node = h(
    "figure",
    { class: "chart" },
    h(
      "figcaption",
      null,
      h("h2", null, title),
      when,
      h(
        "span",
        { class: "keys-of" },
        series.map(({ name, color }, i) => h("span", { class: `key ${color}` }, name, " ", now[i])),
      ),
    ),
    canvas,
  );
  let rows = series.map(() => []),
    at = null;

  function draw() {
    const { width, height } = canvas.getBoundingClientRect();
    if (!width) return;
    const scale = devicePixelRatio || 1,
      context = canvas.getContext("2d"),
      style = getComputedStyle(canvas);
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    context.scale(scale, scale);
    const left = 44,
      bottom = 20,
      top = 8,
      right = width - 6,
      count = Math.max(...rows.map((row) => row.length), 2);
    const most = nice(Math.max(least, ...rows.flat()));
    const x = (i) => left + ((right - left) * i) / (count - 1),
      y = (value) => height - bottom - ((height - bottom - top) * value) / most;
    context.font = `11px ${style.fontFamily}`;
    context.fillStyle = style.getPropertyValue("--muted");
    context.strokeStyle = style.getPropertyValue("--line");
    context.textBaseline = "middle";
    for (const share of [0, 0.5, 1]) {
      const line = Math.round(y(most * share)) + 0.5;
      context.beginPath();
      context.moveTo(left, line);
      context.lineTo(right, line);
      context.stroke();
      if (whole && (most * share) % 1) continue;
      context.textAlign = "right";
      context.fillText(short(most * share), left - 8, line);
    }
    const places = [
      [0, "left"],
      [0.5, "center"],
      [1, "right"],
    ];
    for (const [share, align] of places) {
      context.textAlign = align;
      context.fillText(
        ago(Math.round((count - 1) * (1 - share))),
        left + (right - left) * share,
        height - 7,
      );
    }
    rows.forEach((row, k) => {
      const color = style.getPropertyValue(`--${series[k].color}`);
      context.beginPath();
      row.forEach((value, i) =>
        i ? context.lineTo(x(i), y(value)) : context.moveTo(x(i), y(value)),
      );
      context.strokeStyle = color;
      context.lineWidth = 1.6;
      context.lineJoin = "round";
      context.stroke();
      context.lineTo(x(row.length - 1), y(0));
      context.lineTo(x(0), y(0));
      context.closePath();
      context.globalAlpha = 0.1;
      context.fillStyle = color;
      context.fill();
      context.globalAlpha = 1;
    });
    if (at !== null && at < count) {
      context.lineWidth = 1;
      context.strokeStyle = style.getPropertyValue("--muted");
      context.beginPath();
      context.moveTo(x(at), top);
      context.lineTo(x(at), height - bottom);
      context.stroke();
    }
    tell(count);
  }

  function tell(count) {
    const i = at ?? count - 1;
    when.textContent = at === null ? "" : ago(count - 1 - at);
    rows.forEach((row, k) => {
      now[k].textContent = row.length
        ? `${number(row[i], row[i] < 10 && row[i] % 1 ? 1 : 0)}${unit}`
        : "–";
    });
    const told = series.map(
      ({ name }, k) =>
        `${name} ${number(rows[k].at(-1), 1)}${unit}, at most ${number(Math.max(0, ...rows[k]), 1)}${unit}`,
    );
    canvas.setAttribute("aria-label", `${title} over the last minutes: ${told.join("; ")}`);
  }

  const move = (to) => {
    at = to;
    draw();
  };
  canvas.addEventListener("pointermove", ({ offsetX }) => {
    const count = rows[0].length;
    move(
      Math.max(
        0,
        Math.min(count - 1, Math.round(((offsetX - 44) / (canvas.clientWidth - 50)) * (count - 1))),
      ),
    );
  });
  canvas.addEventListener("pointerleave", () => move(null));
  canvas.addEventListener("blur", () => move(null));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(Math.max(0, Math.min(rows[0].length - 1, (at ?? rows[0].length - 1) + step)));
  });
  new ResizeObserver(draw).observe(canvas);
  return {
    node,
    update: (values) => {
      rows = values;
      draw();
    },
  };
}

/** The next of 1, 2, 5 times a power of ten. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((one) => one * power).find((one) => one >= value * 0.999);
}

const short = (value) =>
  value >= 10000
    ? `${number(value / 1000)}k`
    : number(value, value && value < 5 && value % 1 ? 1 : 0);
const minutes = (seconds) => String(Math.round(seconds / 6) / 10);
const ago = (seconds) =>
  seconds === 0 ? "now" : seconds < 60 ? `${seconds} s ago` : `${minutes(seconds)} min ago`;

/** Means over the last `size` values, for each. */
export function smooth(values, size) {
  let sum = 0;
  return values.map((value, i) => {
    sum += value - (i >= size ? values[i - size] : 0);
    return sum / Math.min(size, i + 1);
  });
}
