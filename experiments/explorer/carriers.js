// The third part: four rules side by side, with the angle of each layer over time.

function startCarriers(run) {
  const at = (name) => partOf("carriers", name);
  const strokes = ["", "6 4", "2 3"];
  const names = ["blue", "orange", "ink"];
  const blue = (n) => run.labels.at(n) === 1;
  let stage = run.stages.length - 1;
  const cards = run.rules.map((rule) => {
    const parts = Object.fromEntries(["plane", "chart", "dials"].map((name) => [name, html("div", { class: name })]));
    parts.status = html("p", { class: "status" });
    at("cards").append(html("article", {}, html("h3", {}, rule.name), html("p", { class: "note" }, rule.how),
      parts.plane, parts.status, parts.dials, parts.chart));
    return parts;
  });
  const training = stages(at("training"), "Training of all four", run.stages.length, (s) => {
    stage = s;
    draw();
  });
  training.input.value = stage;

  function draw() {
    const k = run.stages[stage];
    training.output.textContent = `after ${run.steps[k]} steps, each on all ${run.labels.length} points`;
    run.rules.forEach((rule, r) => {
      const { plane, status, dials, chart } = cards[r];
      const drawn = new Plane(plane, run.low, run.high, `The regions under ${rule.name}`);
      const region = rule.regions.at(stage).data;
      paint(drawn.canvas, run.grid, run.grid, (i) => regionColour(region[i] / 255));
      drawn.svg.append(...Array.from({ length: run.labels.length }, (_, n) =>
        drawn.mark([...run.inputs.at(n).data], blue(n), { opacity: 0.75 }, 5)));
      status.textContent = `accuracy ${(100 * rule.accuracy.at(k)).toFixed(0)} %, E = ${shown(rule.error.at(k))}`;
      dials.replaceChildren(...run.layers.map((name, l) => dial(name, rule.angles.at(k, l), l)));
      chart.replaceChildren(curves(rule, k));
    });
  }

  function dial(name, angle, l) {
    const turn = angle * Math.PI / 180, tip = [50 + 34 * Math.sin(turn), 48 - 34 * Math.cos(turn)];
    return svg("svg", { viewBox: "0 0 100 112", role: "img", "aria-label": `${name}: ${angle.toFixed(0)} degrees` },
      svg("circle", { cx: 50, cy: 48, r: 40, fill: "none", stroke: "var(--line)", "stroke-width": 2 }),
      svg("line", { x1: 50, y1: 48, x2: 50, y2: 12, stroke: "var(--grey)", "stroke-width": 2, "stroke-dasharray": "4 3" }),
      svg("line", { x1: 12, y1: 48, x2: 88, y2: 48, stroke: "var(--line)" }),
      svg("line", { x1: 50, y1: 48, x2: tip[0], y2: tip[1], stroke: `var(--${names[l]})`, "stroke-width": 5, "stroke-linecap": "round" }),
      svg("text", { x: 50, y: 107, "text-anchor": "middle", style: "font-size:15px", "data-angle": angle }, `${name}: ${angle.toFixed(0)}°`));
  }

  function curves(rule, k) {
    const [width, height, left, bottom] = [270, 150, 30, 22], last = run.steps.at(-1);
    const x = (i) => left + (width - left - 6) * run.steps[i] / last, y = (angle) => 8 + (height - 8 - bottom) * (1 - angle / 180);
    const grid = [0, 45, 90, 135, 180].flatMap((angle) => [
      svg("line", { x1: left, y1: y(angle), x2: width - 6, y2: y(angle), stroke: "var(--line)",
        "stroke-width": angle === 90 ? 2 : 1, "stroke-dasharray": angle === 90 ? "5 4" : null }),
      svg("text", { x: left - 4, y: y(angle) + 4, "text-anchor": "end", class: "axis" }, `${angle}°`)]);
    const lines = run.layers.map((_, l) => svg("path", { fill: "none", stroke: `var(--${names[l]})`, "stroke-width": 2,
      "stroke-dasharray": strokes[l], d: `M${run.steps.map((_, i) => `${x(i)} ${y(rule.angles.at(i, l))}`).join("L")}` }));
    const keys = run.layers.map((name, l) => svg("g", {},
      svg("line", { x1: 40 + 76 * l, y1: height + 10, x2: 60 + 76 * l, y2: height + 10, stroke: `var(--${names[l]})`,
        "stroke-width": 3, "stroke-dasharray": strokes[l] }),
      svg("text", { x: 64 + 76 * l, y: height + 14, class: "axis" }, name)));
    return svg("svg", { viewBox: `0 0 ${width} ${height + 22}`, class: "chart", role: "img",
      "aria-label": `${rule.name}: the angle of each layer over training` }, ...grid, ...lines, ...keys,
      svg("line", { x1: x(k), y1: 8, x2: x(k), y2: height - bottom, stroke: "var(--grey)" }),
      svg("text", { x: left, y: height - 6, class: "axis" }, "0"),
      svg("text", { x: width - 6, y: height - 6, "text-anchor": "end", class: "axis" }, `step ${last}`));
  }
  whenShown(draw);
}
