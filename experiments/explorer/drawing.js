// Elements, colours, numbers and planes, for all parts.

function made(namespace, name, attributes, children) {
  const element = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
const html = (name, attributes = {}, ...children) => made(null, name, attributes, children);
const svg = (name, attributes = {}, ...children) =>
  made("http://www.w3.org/2000/svg", name, attributes, children);

// The element of a part of the page, by its `data-part`.
const partOf = (section, name) => document.querySelector(`#${section} [data-part="${name}"]`);

// Replaces what an element holds. What has the focus keeps it, by its `data-key`.
function refill(holder, ...children) {
  const key = focusedIn(holder);
  holder.replaceChildren(...children);
  focusAgain(holder, key);
}
const focusedIn = (holder) =>
  (holder.contains(document.activeElement) ? document.activeElement.dataset.key : undefined);
function focusAgain(holder, key) {
  if (key) holder.querySelector(`[data-key="${key}"]`)?.focus({ preventScroll: true });
}

// Numbers: a true minus sign, and no "-0.00".
function shown(number, digits = 3) {
  if (number !== 0 && Math.abs(number) < 0.5 * 10 ** -digits) {
    return number.toExponential(1).replaceAll("-", "−");
  }
  return number.toFixed(digits).replace("-", "−");
}
const precise = (number) => (number === 0 ? "0" : number.toPrecision(12)).replaceAll("-", "−");
const short = (number) => number.toFixed(2).replace(/^(-?)0\./, "$1.").replace("-.00", ".00").replace("-", "−");
// For a box: two decimals, three of a small number, or its order of magnitude.
function brief(number) {
  const size = Math.abs(number);
  if (size >= 0.095 || number === 0) return short(number);
  if (size < 0.0015) return number.toExponential(0).replaceAll("-", "−");
  return number.toFixed(3).replace("0.", ".").replace("-", "−");
}

// Colours. A signed number is blue if it is positive and orange if it is negative.
function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => {
    const hex = style.getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  return { paper: read("paper"), blue: read("blue"), orange: read("orange"), ink: read("ink") };
}
let palette = colours();
const mixed = (from, to, t) => from.map((c, i) => Math.round(c + (to[i] - c) * t));
const css = (colour) => `rgb(${colour.join(",")})`;
function signed(number, largest, most = 0.85) {
  const t = largest > 0 ? Math.min(1, Math.abs(number) / largest) : 0;
  return mixed(palette.paper, number > 0 ? palette.blue : palette.orange, most * Math.sqrt(t));
}
// The colours of ten classes, from Okabe and Ito's set and two greys. Each is also named in words.
const CLASSES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a94a3",
  "#332288", "#882255"].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

// What is drawn on a canvas is drawn again when the colour scheme or the width changes.
const redrawn = [];
function whenShown(draw) {
  redrawn.push(draw);
  draw();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  palette = colours();
  redrawn.forEach((draw) => draw());
});
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === lastWidth) return;
  lastWidth = innerWidth;
  redrawn.forEach((draw) => draw());
});

function paint(canvas, width, height, colourAt) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let k = 0; k < width * height; k++) {
    image.data.set(colourAt(k), 4 * k);
    image.data[4 * k + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

// The square part of the plane from `low` to `high`, with a picture below and drawings above.
const SIDE = 400;
class Plane {
  constructor(holder, low, high, label) {
    this.low = low;
    this.high = high;
    this.canvas = html("canvas", { "aria-hidden": "true" });
    this.svg = svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, role: "group", "aria-label": label });
    holder.replaceChildren(this.canvas, this.svg);
  }

  // From the plane to the drawing, and back from the place of a pointer.
  px(x) { return [0, 1].map((i) => this.along(x, i)); }
  along(x, i) {
    const t = (x[i] - this.low[i]) / (this.high[i] - this.low[i]);
    return SIDE * (i ? 1 - t : t);
  }
  from(event) {
    const box = this.svg.getBoundingClientRect();
    const t = [(event.clientX - box.left) / box.width, 1 - (event.clientY - box.top) / box.height];
    return t.map((s, i) => this.low[i] + s * (this.high[i] - this.low[i]));
  }

  // The ends of the line w . x + b = 0, far outside.
  line(w, attributes) {
    const square = w[0] * w[0] + w[1] * w[1];
    if (!(square > 0)) return svg("g");
    const near = [-w[2] * w[0] / square, -w[2] * w[1] / square], far = 1e3 / Math.sqrt(square);
    const [a, b] = [1, -1].map((s) => this.px([near[0] - s * far * w[1], near[1] + s * far * w[0]]));
    return svg("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], ...attributes });
  }

  // A point's mark: a circle for blue, a triangle for orange.
  mark(x, blue, attributes, size = 7) {
    const [u, v] = this.px(x), fill = css(blue ? palette.blue : palette.orange);
    if (blue) return svg("circle", { cx: u, cy: v, r: size, fill, ...attributes });
    const [s, t] = [1.1 * size, 0.9 * size];
    return svg("path", { d: `M${u - s} ${v + t}L${u + s} ${v + t}L${u} ${v - 1.2 * size}Z`, fill, ...attributes });
  }

  arrow(from, to, attributes) {
    const [a, b] = [this.px(from), this.px(to)];
    const angle = Math.atan2(b[1] - a[1], b[0] - a[0]);
    const wing = (turn) => `${b[0] - 10 * Math.cos(angle + turn)} ${b[1] - 10 * Math.sin(angle + turn)}`;
    const d = `M${a.join(" ")}L${b.join(" ")}M${wing(0.45)}L${b.join(" ")}L${wing(-0.45)}`;
    return svg("path", { d, fill: "none", ...attributes });
  }
}

const regionColour = (t) =>
  mixed(palette.paper, t > 0.5 ? palette.blue : palette.orange, 0.12 + 0.5 * Math.abs(2 * t - 1));

// A slider with buttons, over the stages of training.
function stages(holder, label, count, change) {
  const input = html("input", { type: "range", min: 0, max: count - 1, value: 0, "aria-label": label });
  const output = html("output");
  const move = (by) => {
    input.value = Number(input.value) + by;
    change(Number(input.value));
  };
  input.addEventListener("input", () => move(0));
  holder.replaceChildren(
    html("button", { onclick: () => move(-1), "aria-label": `${label}: back` }, "◀"), input,
    html("button", { onclick: () => move(1), "aria-label": `${label}: forward` }, "▶"), output);
  return { input, output, move };
}
