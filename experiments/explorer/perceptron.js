// The first part: points and a line that can be dragged, computed by `arithmetic.js`.

function startPerceptron(run) {
  const names = ["w₁", "w₂", "b"];
  const first = [...run.weights.at(0).data];
  const points = Array.from(run.targets.data, (y, n) => ({ x: [...run.inputs.at(n).data], y }));
  const state = { w: first, trail: [first], picked: 0, timer: null, untouched: true };
  const bound = Math.max(...run.inputs.data.map(Math.abs)) * 1.12;
  const plane = new Plane(partOf("perceptron", "plane"), [-bound, -bound], [bound, bound],
    "Points of two classes, and the line between the two predictions");
  const worst = points.map((p, n) => [p.y ? errorOf(first, p.x, p.y) : 0, n]);
  state.picked = worst.sort((a, b) => b[0] - a[0])[0][1];

  // The plane: what moves is made once, so that it keeps the focus and the pointer.
  const line = svg("g"), before = svg("g"), arrow = svg("g");
  const marks = points.map((p, n) => {
    const shape = p.y ? svg("circle", { r: 8 }) : svg("path", { d: "M-9 7L9 7L0 -10Z" });
    const mark = svg("g", { class: "point", tabindex: 0, role: "button" }, shape);
    draggable(mark, () => pick(n), (event) => movePoint(n, plane.from(event)),
      (by) => movePoint(n, p.x.map((v, i) => v + by[i] * bound / 40)));
    return mark;
  });
  const handles = ["Move the line", "Turn the line"].map((label, turn) => {
    const handle = svg("circle", { class: "handle", r: turn ? 8 : 10, tabindex: 0, role: "button",
      "aria-label": label });
    draggable(handle, () => {}, (event) => (turn ? turnTo : moveTo)(plane.from(event)), (by) => {
      const amount = by[0] + by[1];
      if (turn) turnBy(amount * 0.08);
      else moveTo(anchor().map((v, i) => v + amount * 0.1 * state.w[i] / norm(state.w)));
    });
    return handle;
  });
  plane.svg.append(before, line, arrow, ...marks, ...handles);

  const norm = (w) => Math.hypot(w[0], w[1]);
  // Where the line is nearest to the middle: the place of the handle that moves it.
  function anchor() {
    const square = norm(state.w) ** 2;
    const near = [0, 1].map((i) => -state.w[2] * state.w[i] / square);
    return near.map((v) => Math.max(-0.85 * bound, Math.min(0.85 * bound, v)));
  }
  function touched() {
    state.untouched = false;
    state.trail = [state.w];
    draw();
  }
  function movePoint(n, x) {
    points[n].x = x.map((v) => Math.max(-0.97 * bound, Math.min(0.97 * bound, v)));
    touched();
  }
  function moveTo(p) {
    state.w = [state.w[0], state.w[1], -(state.w[0] * p[0] + state.w[1] * p[1])];
    touched();
  }
  function turnTo(q) {
    const p = anchor(), size = norm(state.w), along = [q[0] - p[0], q[1] - p[1]];
    const length = Math.hypot(...along);
    if (length < 1e-6) return;
    const normal = [-along[1] / length, along[0] / length];
    const sign = normal[0] * state.w[0] + normal[1] * state.w[1] < 0 ? -1 : 1;
    const w = normal.map((v) => sign * size * v);
    state.w = [...w, -(w[0] * p[0] + w[1] * p[1])];
    touched();
  }
  function turnBy(angle) {
    const p = anchor(), [c, s] = [Math.cos(angle), Math.sin(angle)], w = state.w;
    const turned = [c * w[0] - s * w[1], s * w[0] + c * w[1]];
    state.w = [...turned, -(turned[0] * p[0] + turned[1] * p[1])];
    touched();
  }
  function pick(n) {
    state.picked = n;
    draw();
  }
  function step(all) {
    const p = points[state.picked];
    const gradient = all ? meanGradient(state.w, points) : gradientOf(state.w, p.x, p.y);
    if (!all) state.untouched = false;
    state.w = stepped(state.w, gradient, run.learningRate);
    state.trail.push(state.w);
    draw();
  }
  function rewind() {
    pause();
    points.forEach((p, n) => { p.x = [...run.inputs.at(n).data]; });
    Object.assign(state, { w: first, trail: [first], untouched: true });
    draw();
  }
  function pause() {
    clearInterval(state.timer);
    state.timer = null;
    running.textContent = "Run";
    running.setAttribute("aria-pressed", "false");
  }
  function toggle() {
    if (state.timer !== null) return pause();
    running.textContent = "Pause";
    running.setAttribute("aria-pressed", "true");
    let left = run.errors.length - 1;
    state.timer = setInterval(() => (left-- > 0 ? step(true) : pause()), 60);
  }
  const running = html("button", { "data-do": "run", onclick: toggle, "aria-pressed": "false" }, "Run");
  partOf("perceptron", "buttons").append(
    html("button", { "data-do": "step-one", onclick: () => step(false) }, "Step on this point"),
    html("button", { "data-do": "step-all", onclick: () => step(true) }, "Step on all points"),
    running, html("button", { "data-do": "rewind", onclick: rewind }, "Rewind"));

  function draw() {
    const w = state.w, side = 40;
    paint(plane.canvas, side, side, (k) => regionColour(predict(w, [
      -bound + 2 * bound * (k % side + 0.5) / side, bound - 2 * bound * (Math.floor(k / side) + 0.5) / side])));
    line.replaceChildren(plane.line(w, { class: "boundary" }));
    const last = state.trail.at(-2);
    before.replaceChildren(...(last ? [plane.line(last, { class: "ghost" })] : []));
    marks.forEach((mark, n) => {
      const { x, y } = points[n], [u, v] = plane.px(x);
      mark.setAttribute("transform", `translate(${u},${v})`);
      mark.setAttribute("fill", css(y ? palette.blue : palette.orange));
      mark.setAttribute("class", n === state.picked ? "point picked" : "point");
      mark.setAttribute("aria-label", `${y ? "Blue" : "Orange"} point at ${shown(x[0], 2)}, ${shown(x[1], 2)}`);
    });
    const p = anchor(), size = norm(w), inward = p[0] * -w[1] + p[1] * w[0] > 0 ? -1 : 1;
    const q = [p[0] - inward * w[1] / size * bound * 0.4, p[1] + inward * w[0] / size * bound * 0.4];
    [p, q].forEach((place, i) => {
      const [u, v] = plane.px(place);
      handles[i].setAttribute("cx", u);
      handles[i].setAttribute("cy", v);
    });
    plane.svg.dataset.state = JSON.stringify({ w, points, picked: state.picked });
    drawStatus();
    drawGradient();
    drawSurface();
  }

  function drawStatus() {
    const wrong = points.filter((p) => (predict(state.w, p.x) > 0.5) !== (p.y === 1)).length;
    partOf("perceptron", "status").textContent =
      `Steps so far: ${state.trail.length - 1}. E of all ${points.length} points: ` +
      `${shown(meanError(state.w, points), 4)}; ${wrong} misclassified.`;
  }

  function drawGradient() {
    const p = points[state.picked], w = state.w, prediction = predict(w, p.x);
    const slope = prediction - p.y, gradient = gradientOf(w, p.x, p.y), terms = [p.x[0], p.x[1], 1];
    const rows = names.map((name, i) => html("tr", { "data-weight": i },
      html("td", {}, name), html("td", {}, shown(w[i])), html("td", {}, shown(slope)),
      html("td", {}, i < 2 ? shown(terms[i]) : "1"),
      html("td", { "data-gradient": gradient[i] }, shown(gradient[i])), way(-gradient[i])));
    const mean = meanGradient(w, points), k = state.trail.length - 1;
    const all = names.map((name, i) => html("tr", {},
      html("td", {}, name), html("td", { "data-mean": mean[i] }, shown(mean[i], 6)),
      ...(onPath() ? [html("td", { "data-library": run.gradients.at(k, i) }, shown(run.gradients.at(k, i), 6))] : []),
      way(-mean[i])));
    const header = (...titles) => html("tr", {}, ...titles.map((t) => html("th", {}, t)));
    partOf("perceptron", "gradient").replaceChildren(
      html("h3", {}, `The picked point: ${p.y ? "blue" : "orange"}, y = ${p.y}`),
      html("p", {}, `Prediction ŷ = ${shown(prediction)}: ` +
        `${(prediction > 0.5) === (p.y === 1) ? "on its side of the line" : "misclassified"}. ` +
        `Its term of the error is E = −log ${p.y ? "ŷ" : "(1 − ŷ)"} = ${shown(errorOf(w, p.x, p.y))}. ` +
        "Its gradient is (ŷ − y) times (x₁, x₂, 1):"),
      html("div", { class: "table" }, html("table", {},
        header("", "weight", "ŷ − y", "times", "gradient", "must go"), ...rows)),
      html("h3", {}, "All points: the mean gradient"),
      html("div", { class: "table" }, html("table", {},
        header("", "here", ...(onPath() ? ["jaxbp"] : []), "must go"), ...all)),
      html("p", { class: "note" }, onPath()
        ? `The column “jaxbp” is bp.value_and_grad after ${k} steps of its own run.`
        : "Rewind to compare with the run of jaxbp."));
  }
  const onPath = () => state.untouched && state.trail.length <= run.errors.length;
  const way = (change) => html("td", { class: change > 0 ? "up words" : "down words" },
    change > 0 ? "▲ higher" : "▼ lower");

  // The surface over w1 and w2, around the library's path.
  const span = [0, 1].map((i) => run.weights.data.filter((_, k) => k % 3 === i));
  const middle = span.map((s) => (Math.min(...s) + Math.max(...s)) / 2);
  const half = 0.75 * Math.max(...span.map((s) => Math.max(...s) - Math.min(...s)), 2);
  const surface = new Plane(partOf("perceptron", "surface"), middle.map((m) => m - half),
    middle.map((m) => m + half), "The error over the two weights, with the path of the steps");
  function drawSurface() {
    const side = 56, heights = [];
    for (let k = 0; k < side * side; k++) {
      const at = [(k % side + 0.5) / side, 1 - (Math.floor(k / side) + 0.5) / side];
      heights.push(Math.log(meanError([0, 1].map((i) => middle[i] + half * (2 * at[i] - 1)).concat(state.w[2]), points)));
    }
    const low = Math.min(...heights), high = Math.max(...heights);
    paint(surface.canvas, side, side, (k) => {
      const band = Math.floor(14 * (heights[k] - low) / (high - low + 1e-9)) / 14;
      return mixed(palette.blue, palette.paper, 0.25 + 0.75 * band);
    });
    const p = points[state.picked], gradient = gradientOf(state.w, p.x, p.y);
    const mean = meanGradient(state.w, points), path = state.trail.map((w) => surface.px(w));
    const target = (g) => stepped(state.w, g, run.learningRate);
    surface.svg.replaceChildren(
      svg("path", { d: `M${path.map((q) => q.join(" ")).join("L")}`, fill: "none",
        stroke: css(palette.orange), "stroke-width": 2.5 }),
      surface.arrow(state.w, target(gradient), { stroke: css(palette.ink), "stroke-width": 1.6, "stroke-dasharray": "4 3" }),
      surface.arrow(state.w, target(mean), { stroke: css(palette.ink), "stroke-width": 2.4 }),
      svg("circle", { cx: path.at(-1)[0], cy: path.at(-1)[1], r: 6, fill: css(palette.orange),
        stroke: css(palette.paper), "stroke-width": 1.5 }),
      svg("text", { x: 8, y: SIDE - 10 }, `w₁: ${shown(surface.low[0], 1)} to ${shown(surface.high[0], 1)}, ` +
        `w₂: ${shown(surface.low[1], 1)} to ${shown(surface.high[1], 1)}`),
      svg("text", { x: 8, y: 20 }, "solid arrow: step on all points; dashed: on this point"));
  }
  whenShown(draw);
}

// Pointer and keyboard on an element: pick it, move it with the pointer, move it by the arrow keys.
function draggable(element, pick, move, key) {
  element.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    element.setPointerCapture(event.pointerId);
    element.focus({ preventScroll: true });
    pick();
  });
  // Without this a finger scrolls the page, and the drag is cancelled.
  element.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  element.addEventListener("pointermove", (event) => {
    if (element.hasPointerCapture(event.pointerId)) move(event);
  });
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") pick();
    else if (arrows[event.key]) key(arrows[event.key]);
    else return;
    event.preventDefault();
  });
}
