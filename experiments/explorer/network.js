// The second part: a network on points in the plane, at stages of its training.

const LETTERS = ["x", "h", "k", "m"];
const lowered = (number) => [...String(number)].map((digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]).join("");

function startNetwork(problems) {
  const state = { problem: 0, stage: 0, example: 0, phase: 0, wire: null };
  const at = (name) => partOf("network", name);
  const now = () => problems[state.problem];
  const layers = () => now().sizes.length - 1;
  const isOutput = (column) => column === layers();
  const two = () => now().classNames.length === 2;

  function unit(column, i) {
    if (!isOutput(column)) return `${LETTERS[column]}${lowered(i + 1)}`;
    return two() ? "ŷ" : `ŷ of ${now().classNames[i]}`;
  }
  // The value that a box shows, and the delta of the unit's sum.
  function value(column, i) {
    const { stage: s, example: n } = state;
    if (!isOutput(column)) return now().values[2 * column].at(s, n, i);
    return now().probabilities.at(s, n, two() ? 1 : i);
  }
  const delta = (column, i) => now().deltas[2 * column - 1].at(state.stage, state.example, i);
  const weight = (l, i, o) =>
    i < 0 ? now().biases[l].at(state.stage, o) : now().weights[l].at(state.stage, i, o);
  function autodiff({ l, i, o }) {
    const { stage: s, example: n } = state;
    return i < 0 ? now().biasGradients[l].at(s, n, o) : now().weightGradients[l].at(s, n, i, o);
  }

  problems.forEach((problem, p) => at("problems").append(html("button",
    { "data-problem": problem.name, onclick: () => choose(p) }, problem.title)));
  const training = stages(at("training"), "Training", problems[0].steps.length, (s) => {
    state.stage = s;
    draw();
  });
  const buttons = [
    ["◀ Back", "back", () => go(state.phase - 1)], ["Forward ▶", "forward", () => go(state.phase + 1)],
    ["Start over", "start", () => go(0)], ["All", "all", () => go(2 * layers())],
  ].map(([text, name, act]) => html("button", { "data-do": name, onclick: act }, text));
  at("buttons").append(...buttons);

  function choose(p) {
    state.problem = p;
    Object.assign(state, { stage: now().steps.length - 4, phase: 2 * layers(), wire: { l: 0, i: 0, o: 0 } });
    state.example = order()[0];
    training.input.max = now().steps.length - 1;
    training.input.value = state.stage;
    draw();
  }
  function go(phase) {
    state.phase = Math.max(0, Math.min(2 * layers(), phase));
    drawGraph();
  }
  function order() {
    const norms = [...now().norms.at(state.stage).data];
    return norms.map((_, n) => n).sort((a, b) => norms[b] - norms[a]);
  }

  function draw() {
    [...at("problems").children].forEach((button, p) =>
      button.setAttribute("aria-pressed", String(p === state.problem)));
    training.output.textContent = `after ${now().steps[state.stage]} steps: ` +
      `accuracy ${(100 * now().accuracy.at(state.stage)).toFixed(0)} %, E = ${shown(now().error.at(state.stage))}`;
    drawPlane();
    drawGraph();
    drawExamples();
    drawUnits();
  }

  function drawPlane() {
    const focused = focusedIn(at("plane"));
    const plane = new Plane(at("plane"), now().low, now().high,
      "The points, the regions that the network predicts, and the lines of the first hidden units");
    const region = now().region.at(state.stage).data, s = state.stage;
    paint(plane.canvas, now().grid, now().grid, (k) =>
      two() ? regionColour(region[k] / 255) : mixed(palette.paper, CLASSES[region[k]], 0.45));
    for (let j = 0; j < now().sizes[1]; j++) {
      plane.svg.append(plane.line([0, 1].map((i) => weight(0, i, j)).concat(weight(0, -1, j)), { class: "ghost" }));
    }
    const many = Math.min(now().inputs.length, 160);
    const named = (n) => now().classNames[now().labels.at(n)];
    const marks = Array.from({ length: many }, (_, n) => {
      const x = [...now().inputs.at(n).data], inside = n < now().examples;
      const attributes = inside ? { class: n === state.example ? "point picked" : "point", tabindex: 0,
        "data-key": n, role: "button", "aria-label": `Example ${n + 1}, of class ${named(n)}`, onclick: () => look(n),
        onkeydown: (event) => { if (event.key === "Enter") look(n); } } : { opacity: 0.4 };
      if (two()) return plane.mark(x, now().labels.at(n) === 1, attributes, inside ? 6.5 : 4);
      const [u, v] = plane.px(x), size = n === state.example ? 26 : inside ? 17 : 11;
      return svg("text", { x: u, y: v + size / 3, "text-anchor": "middle", ...attributes,
        style: `font-size:${size}px;font-weight:${inside ? 700 : 400}` }, named(n));
    });
    marks.push(marks.splice(state.example, 1)[0]); // the chosen one lies on top
    plane.svg.append(...marks);
    focusAgain(at("plane"), focused);
    const n = state.example, label = now().labels.at(n);
    at("status").textContent = `Chosen: example ${n + 1}, of class ${named(n)}; the network gives this class ` +
      `the probability ${shown(now().probabilities.at(s, n, label))}. E = ${shown(now().losses.at(s, n))}, ` +
      `norm of its gradient ${shown(now().norms.at(s, n))}.`;
  }
  function look(n) {
    state.example = n;
    draw();
  }

  function described() {
    const L = layers(), c = state.phase;
    if (c === 0) return "Forward: the example enters at the inputs.";
    if (c < L) return `Forward: hidden layer ${c} computes tanh of its sums.`;
    if (c === L) return "Forward: the output is there. It is compared with the target.";
    const column = 2 * L - c;
    if (c === L + 1) return "Backward: the error at the output, δ = ŷ − y.";
    return `Backward: δ of hidden layer ${column + 1} = f′(z) times the sum of w δ over the wires ahead.`;
  }
  const litForward = (column) => column <= state.phase;
  const litBackward = (column) => column >= 1 && state.phase >= 2 * layers() - column + 1;

  function drawGraph() {
    const holder = at("graph"), width = Math.max(300, holder.clientWidth), L = layers(), sizes = now().sizes;
    const box = [Math.min(54, width / (L + 1) * 0.6), 34], gap = 49, height = Math.max(...sizes) * gap + 26;
    const x = (c) => 3 + c * (width - box[0] - 6) / L;
    const y = (c, i) => 22 + (height - 26) / 2 + (i - (sizes[c] - 1) / 2) * gap;
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group",
      "aria-label": "The network: boxes are units, lines are weights" });
    const largest = now().weights.map((w) => Math.max(...w.at(state.stage).data.map(Math.abs)));
    const steepest = Math.max(...sizes.flatMap((size, c) =>
      (c ? Array.from({ length: size }, (_, i) => Math.abs(delta(c, i))) : [])));
    const wires = [], touch = [];
    for (let l = 0; l < L; l++) for (let i = 0; i < sizes[l]; i++) for (let o = 0; o < sizes[l + 1]; o++) {
      const ends = { x1: x(l) + box[0], y1: y(l, i), x2: x(l + 1), y2: y(l + 1, o) };
      const w = weight(l, i, o), lit = litForward(l + 1), back = litBackward(l + 1);
      const chosen = state.wire && state.wire.l === l && state.wire.i === i && state.wire.o === o;
      if (chosen) wires.unshift(svg("line", { ...ends, stroke: "var(--focus)", "stroke-width": 11, "stroke-opacity": 0.5 }));
      const passing = back && state.phase === 2 * L - l && l > 0;
      const carried = passing ? w * delta(l + 1, o) : w;
      wires.push(svg("line", { ...ends, stroke: css(carried > 0 ? palette.blue : palette.orange),
        "stroke-width": 0.6 + 4.5 * Math.abs(w) / largest[l], "stroke-opacity": lit ? 0.85 : 0.16,
        "stroke-dasharray": passing ? "7 4" : null }));
      touch.push(svg("line", { ...ends, class: "touch", "data-wire": `${l},${i},${o}`, onclick: () => wire(l, i, o) }));
    }
    drawing.append(...wires, ...touch);
    for (let c = 0; c <= L; c++) for (let i = 0; i < sizes[c]; i++) {
      const [left, top] = [x(c), y(c, i) - box[1] / 2];
      const cell = (row, number, lit, most, tone = number) => [
        svg("rect", { x: left, y: top + row * box[1] / 2, width: box[0], height: box[1] / 2,
          fill: lit ? css(signed(tone, most, 0.6)) : "var(--paper)" }),
        ...(lit ? [svg("text", { x: left + box[0] / 2, y: top + row * box[1] / 2 + 13, "text-anchor": "middle",
          "data-cell": row ? "delta" : "value" },
          row ? `δ ${brief(number)}` : short(number))] : [])];
      // The probability of blue is orange below 1/2.
      const tone = isOutput(c) && two() ? 2 * value(c, i) - 1 : value(c, i);
      drawing.append(...cell(0, value(c, i), litForward(c), c ? 1 : 2, tone), ...cell(1, c ? delta(c, i) : 0, c > 0 && litBackward(c), steepest),
        svg("rect", { x: left, y: top, width: box[0], height: box[1], class: "frame", rx: 3 }),
        svg("text", { x: left + 1, y: top - 2, class: "axis" }, isOutput(c) && !two() ? `ŷ ${now().classNames[i]}` : unit(c, i)));
    }
    holder.replaceChildren(drawing);
    at("phase").textContent = described();
    buttons[0].disabled = state.phase === 0;
    buttons[1].disabled = state.phase === 2 * L;
    drawWire();
  }
  function wire(l, i, o) {
    state.wire = { l, i, o };
    drawGraph();
  }

  function drawWire() {
    const { l, i, o } = state.wire, sizes = now().sizes, output = isOutput(l + 1), s = state.stage, n = state.example;
    const select = html("select", { "aria-label": "Weight", "data-key": "weight", onchange: (event) =>
      wire(...event.target.value.split(",").map(Number)) });
    for (let layer = 0; layer < layers(); layer++) {
      const group = html("optgroup", { label: `layer ${layer + 1}` });
      for (let from = -1; from < sizes[layer]; from++) for (let to = 0; to < sizes[layer + 1]; to++) {
        group.append(html("option", { value: [layer, from, to].join(), selected: layer === l && from === i && to === o },
          from < 0 ? `bias of ${unit(layer + 1, to)}` : `weight from ${unit(layer, from)} to ${unit(layer + 1, to)}`));
      }
      select.append(group);
    }
    const input = i < 0 ? 1 : now().values[2 * l].at(s, n, i);
    const factors = [[i < 0 ? "a bias multiplies 1" : `value of ${unit(l, i)}`, input, []]];
    if (output) {
      factors.push([`δ of ${unit(l + 1, o)} = ŷ − y`, delta(l + 1, o), []]);
    } else {
      const terms = Array.from({ length: sizes[l + 2] }, (_, k) =>
        [unit(l + 2, k), weight(l + 1, o, k), delta(l + 2, k)]);
      factors.push([`f′ of ${unit(l + 1, o)}: 1 − ${unit(l + 1, o)}²`, now().slopes[l].at(s, n, o), []]);
      factors.push([`error that comes back to ${unit(l + 1, o)}: sum of w δ`,
        terms.reduce((total, [, w, d]) => total + w * d, 0), terms]);
    }
    const product = factors.reduce((total, [, number]) => total * number, 1), witness = autodiff(state.wire);
    const blocks = factors.flatMap(([name, number, terms], k) => [
      ...(k ? [html("span", { class: "times" }, "×")] : []),
      html("div", { class: "factor" }, html("b", {}, name), html("span", { class: "numbers", "data-factor": number }, shown(number, 6)),
        ...(terms.length ? [html("div", { class: "table" }, html("table", {},
          html("tr", {}, ...["to", "w", "δ", "w δ"].map((t) => html("th", {}, t))),
          ...terms.map(([name, w, d]) => html("tr", {}, ...[name, shown(w), shown(d), shown(w * d)].map((t) => html("td", {}, t))))))] : []))]);
    refill(at("wire"),
      html("div", { class: "buttons" }, select, html("span", {}, `w = ${shown(weight(l, i, o), 6)}`)),
      html("div", { class: "factors" }, ...blocks, html("span", { class: "times" }, "="),
        html("div", { class: "table" }, html("table", { class: "result numbers" },
          html("tr", {}, html("td", {}, "their product"), html("td", { "data-product": product }, precise(product))),
          html("tr", {}, html("td", {}, "jax.grad"), html("td", { "data-autodiff": witness }, precise(witness))),
          html("tr", {}, html("td", {}, "difference"), html("td", {}, (product - witness).toExponential(0).replaceAll("-", "−")))))),
      html("p", {}, product === 0 ? "The derivative is zero: this example leaves the weight alone."
        : `A step against the gradient makes this weight ${product > 0 ? "lower" : "higher"}.`));
  }

  function drawExamples() {
    refill(at("examples"), ...order().map((n) => {
      const label = now().labels.at(n), mark = two() ? (label ? "● " : "▲ ") : "";
      return html("button", { "aria-pressed": String(n === state.example), "data-example": n, "data-key": n, onclick: () => look(n) },
        `${mark}${now().classNames[label]}`, html("br"), `ŷ ${short(now().probabilities.at(state.stage, n, label))}`,
        html("br"), `|g| ${brief(now().norms.at(state.stage, n))}`);
    }));
  }

  function drawUnits() {
    const s = state.stage;
    at("units").replaceChildren(...now().hiddenRegions.flatMap((pictures, c) =>
      Array.from({ length: now().sizes[c + 1] }, (_, j) => {
        const holder = html("div", { class: "plane" });
        const plane = new Plane(holder, now().low, now().high, `Where ${unit(c + 1, j)} is positive`);
        const picture = pictures.at(s, j).data;
        paint(plane.canvas, now().grid, now().grid, (k) => regionColour(picture[k] / 255));
        if (c === 0) {
          plane.svg.append(plane.line([0, 1].map((i) => weight(0, i, j)).concat(weight(0, -1, j)), { class: "boundary", style: "stroke-width:6px" }));
        }
        return html("figure", {}, holder, html("figcaption", {}, `${unit(c + 1, j)}, layer ${c + 1}`));
      })));
  }

  choose(0);
  redrawn.push(draw);
}
