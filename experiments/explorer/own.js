// The fourth part: what `bp.explain` returns for any small network.

function startOwn(run) {
  const at = (name) => partOf("own", name);
  const first = run.parameters.map((p) => p.norms.at(0));
  const state = { example: 0, parameter: first.indexOf(Math.max(...first)) };
  const count = run.examples.length;

  // Numbers as cells: a picture [height, width], or rows of up to 64.
  function cells(numbers, image, label) {
    const wide = image ? image[1] : Math.min(numbers.length, 64), high = Math.ceil(numbers.length / wide);
    const largest = Math.max(...numbers.map(Math.abs)), canvas = html("canvas", { role: "img", "aria-label": label });
    paint(canvas, wide, high, (k) => (k < numbers.length ? signed(numbers[k], largest) : palette.paper));
    const side = image ? 10 : Math.max(5, Math.min(22, Math.floor(320 / wide)));
    canvas.style.width = `${wide * side}px`;
    canvas.style.aspectRatio = `${wide} / ${high}`;
    const text = numbers.length <= 4 ? [...numbers].map((v) => shown(v)).join(", ") : `largest ${shown(largest)}`;
    return html("div", { class: "cells" }, canvas, html("span", { class: "numbers" }, text));
  }
  const target = (n) => run.targets[n].map((t) => (Number.isInteger(t) ? String(t) : shown(t, 2))).slice(0, 3).join(", ") +
    (run.targets[n].length > 3 ? ", …" : "");

  function draw() {
    const n = state.example;
    at("about").replaceChildren(
      html("p", {}, `${run.title}, by bp.explain. Shown are the ${count} examples with the largest gradients of ${run.candidates}.`),
      ...(run.code ? [html("pre", { tabindex: 0, "aria-label": "Its program" }, run.code.trim())] : []));
    refill(at("examples"), ...run.examples.map((place, k) => {
      const picture = html("canvas", { "aria-hidden": "true" });
      if (run.image) {
        const pixels = run.places[0].values.at(k).data, most = Math.max(...pixels);
        paint(picture, run.image[1], run.image[0], (i) => mixed(palette.paper, palette.ink, pixels[i] / most));
      }
      return html("button", { "aria-pressed": String(k === n), "data-example": k, "data-key": k, onclick: () => {
        state.example = k;
        draw();
      } }, ...(run.image ? [picture] : []), `no. ${place}`, html("br"), `target ${target(k)}`, html("br"), `|g| ${brief(run.norms.at(k))}`);
    }));
    at("places").replaceChildren(
      html("p", {}, `Target ${target(n)}; E = ${shown(run.losses.at(n), 4)}. Blue is positive, orange negative.`),
      html("div", { class: "place titles" }, html("b", {}, "place"), html("b", {}, "values"), html("b", {}, "deltas: dE/d(value)")),
      ...run.places.map((place, k) => {
        const image = k === 0 ? run.image : null;
        const of = (numbers, what) => html("div", { "data-label": what }, numbers
          ? cells([...numbers.at(n).data], image, `${what} of ${place.name}`) : "none");
        return html("div", { class: "place" },
          html("span", {}, html("b", {}, place.name), ` ${place.layer} [${place.shape.join(", ")}]`),
          of(place.values, "values"), of(place.deltas, "deltas"));
      }));
    const norms = run.parameters.map((p) => p.norms.at(n)), largest = Math.max(...norms);
    at("norms").replaceChildren(
      html("p", {}, `The norm of the whole gradient is ${shown(run.norms.at(n), 4)}; of each parameter:`),
      html("div", { class: "bars" }, ...run.parameters.flatMap((p, k) => [
        html("span", {}, `${p.path} [${p.shape.join(", ")}]`),
        html("div", {}, html("div", { class: "bar", style: `width:${largest > 0 ? 100 * norms[k] / largest : 0}%` })),
        html("span", { class: "numbers" }, shown(norms[k], 4))])));
    drawRule();
  }

  function drawRule() {
    if (!run.parameters.length) return at("rule").replaceChildren(html("p", {}, "This network has no parameters."));
    const rule = run.rules[state.example][state.parameter];
    const select = html("select", { "aria-label": "Parameter", "data-key": "parameter", onchange: (event) => {
      state.parameter = Number(event.target.value);
      drawRule();
    } }, ...run.parameters.map((p, k) => html("option", { value: k, selected: k === state.parameter }, p.path)));
    const blocks = rule.factors.flatMap((factor, k) => {
      const [rows, columns] = factor.matrix.shape, numbers = [...factor.matrix.data];
      const small = rows * columns <= 12;
      const body = rows * columns === 1 ? html("span", { class: "numbers", "data-factor": numbers[0] }, shown(numbers[0], 6))
        : small ? html("div", { class: "table" }, html("table", { class: "numbers" }, ...Array.from({ length: rows }, (_, r) =>
          html("tr", {}, ...numbers.slice(r * columns, (r + 1) * columns).map((v) => html("td", {}, shown(v)))))))
        : cells(numbers, [rows, columns], `${factor.name}, ${rows} by ${columns}`);
      return [...(k ? [html("span", { class: "times" }, "×")] : []), html("div", { class: "factor" },
        html("b", {}, `${factor.name}${rows * columns > 1 ? `, ${rows} × ${columns}` : ""}`), body)];
    });
    refill(at("rule"),
      html("div", { class: "buttons" }, select, html("span", {}, `the weight at [${rule.at.join(", ")}], which has the largest derivative in ${rule.path}`)),
      html("div", { class: "factors" }, ...blocks, html("span", { class: "times" }, "="),
        html("div", { class: "table" }, html("table", { class: "result numbers" },
          html("tr", {}, html("td", {}, "their matrix product"), html("td", { "data-product": rule.gradient }, precise(rule.gradient))),
          html("tr", {}, html("td", {}, "jax.grad"), html("td", {}, precise(rule.autodiff))),
          html("tr", {}, html("td", {}, "difference"), html("td", {}, (rule.gradient - rule.autodiff).toExponential(0).replaceAll("-", "−")))))));
  }
  whenShown(draw);
}
