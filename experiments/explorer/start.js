// Reads the run and starts the parts.

const run = unpacked(JSON.parse(document.getElementById("run").textContent));
startPerceptron(run.perceptron);
startNetwork(run.networks);
startCarriers(run.carriers);
startOwn(run.own);
document.documentElement.dataset.ready = "true";
