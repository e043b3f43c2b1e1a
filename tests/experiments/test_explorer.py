"""The page of the explorer: its numbers are those of the sweep, and it is a file without links."""

import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

import jaxbp as bp
from experiments import perceptron as unit
from experiments.explorer import __main__ as command
from experiments.explorer import carriers, networks, own, page, perceptron

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def recorded():
    """A small problem with two hidden layers, at its stages."""
    with jax.enable_x64(True):
        x, targets = networks.multilayer.moons(0, networks.POINTS)
        two = "orange", "blue"
        problem = networks.Problem("moons", x, networks.as_labels(targets), two, (3, 2), 40)
        return problem, networks.record(problem, 0)


def factors_of(recorded, s, n, layer, i, o):
    """The three factors of a weight, from the arrays of the page as `network.js` takes them."""
    x, slopes = recorded["values"][2 * layer][s][n], recorded["slopes"]
    if layer == len(recorded["weights"]) - 1:
        return [x[i], recorded["deltas"][2 * layer + 1][s][n][o]]
    ahead = recorded["weights"][layer + 1][s][o], recorded["deltas"][2 * layer + 3][s][n]
    return [x[i], slopes[layer][s][n][o], np.sum(ahead[0] * ahead[1])]


def test_the_factors_of_every_wire_multiply_to_the_gradient_of_autodiff(recorded):
    _, run = recorded
    for layer, gradients in enumerate(run["weightGradients"]):
        for s, n, i, o in np.ndindex(gradients.shape):
            if n < 3:
                product = np.prod(factors_of(run, s, n, layer, i, o))
                assert product == pytest.approx(gradients[s, n, i, o], rel=1e-12, abs=1e-14)
    for layer, gradients in enumerate(run["biasGradients"]):
        np.testing.assert_allclose(run["deltas"][2 * layer + 1], gradients, rtol=1e-12, atol=1e-14)


def test_what_the_page_shows_of_a_network_is_what_explain_returns(recorded):
    problem, run = recorded
    params = [()] * 5
    for k, i in enumerate((0, 2, 4)):
        params[i] = {"weight": run["weights"][k][-1], "bias": run["biases"][k][-1]}
    net = bp.chain(*problem.parts())
    x, targets = (a[: networks.EXAMPLES] for a in (problem.inputs, problem.targets))
    shown = bp.explain(
        net, tuple(params), x, targets, loss=problem.loss, weight=("0.weight", 1, 2), example=5
    )
    for place, values, deltas in zip(shown.values, run["values"], run["deltas"], strict=True):
        np.testing.assert_array_equal(values[-1], shown.values[place])
        np.testing.assert_array_equal(deltas[-1], shown.deltas[place])
    np.testing.assert_array_equal(run["norms"][-1], shown.example_norms)
    product = np.prod(factors_of(run, -1, 5, 0, 1, 2))
    assert product == pytest.approx(shown.chain_rule.gradient, rel=1e-12)
    blue = jax.nn.sigmoid(shown.values["4"][:, 0])
    np.testing.assert_allclose(run["probabilities"][-1][:, 1], blue, rtol=1e-12)
    np.testing.assert_allclose(run["probabilities"][-1].sum(axis=1), 1, rtol=1e-12)
    assert run["steps"][0] == 0
    assert run["steps"][-1] == problem.steps
    assert run["error"][-1] < run["error"][0]


def test_regions_are_pictures_of_the_network(recorded):
    _, run = recorded
    points = np.asarray(networks.plane(run["low"], run["high"]))
    assert points[0, 0] < points[-1, 0]
    assert points[0, 1] > points[-1, 1]  # the first row is the top
    first = points @ run["weights"][0][-1] + run["biases"][0][-1]
    pictures = run["hiddenRegions"][0][-1].reshape(3, -1).T / 255
    np.testing.assert_allclose(pictures, (np.tanh(first) + 1) / 2, atol=0.5 / 255 + 1e-9)
    assert run["region"].dtype == np.uint8
    assert run["region"][-1].min() < 128 < run["region"][-1].max()


def test_gradients_that_differ_are_refused():
    with pytest.raises(ArithmeticError, match=r"explain and jax\.grad differ by"):
        networks.require_equal({"w": np.array([1.0])}, {"w": np.array([1.0 + 1e-9])})


def test_the_problems_are_there():
    problems = networks.problems(0)
    assert list(problems) == ["moons", "xor", "circles", "spiral", "digits"]
    for problem in problems.values():
        assert problem.inputs.shape == (len(problem.labels), 2)
        assert set(np.unique(problem.labels)) == set(range(len(problem.class_names)))
        assert max(problem.hidden) <= 8
        assert problem.parts()[-1].name == f"dense({problem.outputs})"


def test_the_path_of_the_perceptron_is_the_librarys():
    run = perceptron.collect(0)
    inputs, targets = unit.make_points(jax.random.key(0), perceptron.POINTS)
    w = run["weights"]
    np.testing.assert_allclose(w[1], w[0] - perceptron.LEARNING_RATE * run["gradients"][0], 1e-12)
    slopes = jax.nn.sigmoid(inputs @ w[0][:2] + w[0][2]) - targets[:, 0]
    terms = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    np.testing.assert_allclose(run["exampleGradients"], slopes[:, None] * terms, rtol=1e-12)
    assert len(w) == len(run["errors"]) == len(run["gradients"]) == perceptron.STEPS + 1


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_arithmetic_of_the_page_is_the_librarys_without_a_browser():
    run = perceptron.collect(0)
    script = """
      const points = run.x.map((x, n) => ({ x, y: run.y[n] }));
      let w = run.w;
      const path = [];
      for (let k = 0; k < 20; k++) {
        const gradient = meanGradient(w, points);
        path.push([...w, meanError(w, points), ...gradient]);
        w = stepped(w, gradient, run.rate);
      }
      const one = points.map((p) => [errorOf(run.w, p.x, p.y), ...gradientOf(run.w, p.x, p.y)]);
      console.log(JSON.stringify({ path, one }));
    """
    given = {
        "x": run["inputs"].tolist(),
        "y": run["targets"].tolist(),
        "w": run["weights"][0].tolist(),
        "rate": run["learningRate"],
    }
    program = f"{page.read('arithmetic.js')}\nconst run = {json.dumps(given)};\n{script}"
    answer = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    answer = json.loads(answer.stdout)
    wanted = [run["weights"][:20], run["errors"][:20, None], run["gradients"][:20]]
    np.testing.assert_allclose(answer["path"], np.concatenate(wanted, axis=1), 1e-12, 1e-14)
    wanted = [run["exampleErrors"][:, None], run["exampleGradients"]]
    np.testing.assert_allclose(answer["one"], np.concatenate(wanted, axis=1), 1e-12, 1e-14)


@pytest.mark.thorough
def test_rules_have_their_angles(monkeypatch):
    monkeypatch.setattr(carriers, "STEPS", 10)
    monkeypatch.setattr(carriers, "STAGES", 2)
    run = carriers.collect(0)
    names = ["backpropagation", "feedback alignment", "direct feedback", "sign-symmetry"]
    assert [rule["name"] for rule in run["rules"]] == names
    exact, *others = run["rules"]
    np.testing.assert_allclose(exact["angles"], 0, atol=1e-5)
    for rule in others:
        assert rule["angles"].shape == (3, 3)
        assert np.all(np.asarray(rule["angles"][:, :2]) > 1)
        np.testing.assert_allclose(rule["angles"][:, 2], 0, atol=1e-5)
        assert rule["error"][0] == exact["error"][0]  # all start from the same weights
        assert rule["regions"].shape == (2, networks.GRID, networks.GRID)


def test_a_network_of_ones_own_is_explained(monkeypatch):
    monkeypatch.setattr(own, "EXAMPLES", 2)
    network = own.lifted(0)
    run = own.collect(network)
    norms = np.asarray(run["norms"])
    assert np.all(np.diff(norms) <= 0)
    assert [place["name"] for place in run["places"]] == ["inputs", "outputs"]
    assert len(run["rules"]) == own.EXAMPLES
    for rule in (rule for rules in run["rules"] for rule in rules):
        matrices = [factor["matrix"] for factor in rule["factors"]]
        product = np.linalg.multi_dot(matrices).item()
        assert product == pytest.approx(rule["gradient"], rel=1e-12)
        assert rule["autodiff"] == pytest.approx(rule["gradient"], rel=1e-12)
    assert "params" in run["code"]


RUN = """
import jax, jax.numpy as jnp, jaxbp as bp
net = bp.dense(3)
params, _ = net.init(jax.random.key(0), (2,))
inputs, targets = jnp.array([[0.0, 1.0], [2.0, 3.0], [4.0, 4.0]]), jnp.array([0, 1, 2])
"""


def test_a_file_makes_a_network(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RUN)
    run = own.collect(own.from_file(path))
    assert run["title"] == "mine.py"
    assert [p["path"] for p in run["parameters"]] == ["bias", "weight"]
    assert sorted(run["examples"]) == [0, 1, 2]
    rule = run["rules"][1][0]
    assert rule["autodiff"] == pytest.approx(rule["gradient"], rel=1e-6)


def test_a_file_whose_net_is_none_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{RUN}net = 3")
    with pytest.raises(ValueError, match=r"mine.py: explain: net is 3; it takes a Layer"):
        own.collect(own.from_file(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("1 / 0", "raised ZeroDivisionError: division by zero"),
     ("net = params = 1", "leaves no inputs, no targets")],
)  # fmt: skip
def test_a_file_that_makes_none_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        own.from_file(path)


def test_a_network_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="outputs has 5000 values for one example; the page"):
        own.flat("outputs", np.ones((1, 5000)))


def test_wrong_flags_are_refused(tmp_path):
    config = command.Config(digits=True, run=tmp_path / "a.py", seed=-1, out=tmp_path)
    with pytest.raises(ValueError, match=r"seed is -1.*; digits and run are both given"):
        command.main(config)


def test_arrays_keep_every_digit():
    array = np.array([[0.1, -1e-300], [np.pi, 2**53 + 1.0]])
    packed = page.packed({"a": [array, np.array([0, 255], np.uint8)], "b": "text"})
    assert packed["a"][0]["type"] == "f64"
    script = f"""{page.read("arrays.js")}
      const tree = unpacked({json.dumps(packed)});
      console.log(JSON.stringify([tree.a[0].at(0, 1), tree.a[0].at(1).at(0), [...tree.a[1].data],
        tree.b]));"""
    if shutil.which("node") is None:
        pytest.skip("no node")
    answer = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == [-1e-300, np.pi, [0, 255], "text"]


def test_the_page_is_one_file_without_links():
    text = page.page({"perceptron": {"title": "</script><b>"}})
    assert text.count("</script>") == 2
    assert not re.search(r"/\*\{\w+\}\*/", text)
    links = set(re.findall(r"""(?:https?:|src=|href=)["'/]*[^\s"')]*""", text))
    assert links <= {
        "http://www.w3.org/2000/svg", "href=\"data:,", "href=\"#perceptron", "href=\"#network",
        "href=\"#carriers", "href=\"#own",
    }  # fmt: skip
    for name in page.SCRIPTS:
        assert "import " not in page.read(name)
        assert "fetch(" not in page.read(name)


def test_a_page_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="the limit is 5 MB"):
        page.page({"a": np.zeros(500_000)})
