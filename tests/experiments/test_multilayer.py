import math

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from oracles import assert_close

import jaxbp as bp
from experiments import multilayer
from experiments.common import figures, files

pytestmark = pytest.mark.thorough


def network(hidden, seed=0):
    net = bp.chain(bp.dense(hidden), bp.sigmoid(), bp.dense(1))
    params, _ = net.init(jax.random.key(seed), (2,))
    return net, params


def trained(data, hidden, steps=1000):
    """The accuracy and the errors with the defaults of the experiment."""
    inputs, targets = data(0, 120)
    net, params = network(hidden)
    optimizer = optax.sgd(1.0, momentum=0.9)
    params, errors = multilayer.train(net, params, inputs, targets, optimizer, steps)
    return multilayer.accuracy(net, params, inputs, targets), errors


@pytest.mark.parametrize("data", [multilayer.moons, multilayer.xor])
def test_the_factors_multiply_to_the_gradient_of_each_example(data):
    inputs, targets = data(3, 20)
    net, params = network(3, seed=3)
    _, grads = bp.backprop(net, multilayer.LOSS, read=bp.per_example)(params, inputs, targets)
    products = [
        math.prod(multilayer.factors(params, x, y).values())
        for x, y in zip(inputs, targets, strict=True)
    ]
    np.testing.assert_allclose(products, grads[0]["weight"][:, 0, 0], atol=1e-12)
    assert np.abs(products).min() > 1e-6


def test_the_printed_factors_multiply_to_the_printed_gradients(capsys):
    multilayer.print_chain_rule(*network(4), *multilayer.moons(0, 30))
    rows = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[3:-1]]
    numbers = {name.strip(): float(number) for name, number in rows}
    answers = [numbers.pop(name) for name in ("their product", "bp.per_example", "jax.grad")]
    assert numbers.pop("difference") <= 1e-12
    assert len(numbers) == 5
    assert answers == pytest.approx([math.prod(numbers.values())] * 3, abs=1e-14)


def test_a_product_that_is_not_the_gradient_is_refused(monkeypatch):
    monkeypatch.setattr(multilayer, "factors", lambda *_: {"dE/dw1_11": 7.0})
    with pytest.raises(ArithmeticError, match="the gradients of w1_11 differ by"):
        multilayer.print_chain_rule(*network(4), *multilayer.moons(0, 30))


@pytest.mark.parametrize("data", [multilayer.moons, multilayer.xor])
def test_the_defaults_solve_both_data_sets(data):
    accuracy, errors = trained(data, hidden=4)
    assert accuracy >= 0.99
    assert len(errors) == 1001
    assert errors[-1] < 0.05 < errors[0]


def test_one_hidden_unit_has_one_line_and_cannot_solve_xor():
    accuracy, _ = trained(multilayer.xor, hidden=1)
    assert accuracy < 0.8


def test_xor_is_blue_where_one_coordinate_is_positive():
    inputs, targets = multilayer.xor(0, 80)
    positive = jnp.sum(inputs > 0, axis=1, keepdims=True)
    assert jnp.mean((positive == 1) == (targets == 1)) > 0.95
    assert targets.sum() == 40


def test_the_graph_has_a_line_for_each_weight_in_its_sign_s_colour_and_its_width():
    _, params = network(3)
    axes = Figure().subplots()
    multilayer.draw_graph(axes, params, largest=2.0)
    weights = np.concatenate(
        [np.vstack([layer["weight"], layer["bias"]]).ravel() for layer in (params[0], params[2])]
    )
    lines = axes.get_lines()
    colours = [figures.BLUE if weight > 0 else figures.RED for weight in weights]
    assert [mpl.colors.to_hex(line.get_color()).upper() for line in lines] == colours
    widths = np.array([line.get_linewidth() for line in lines])
    np.testing.assert_allclose(widths / widths.max(), abs(weights) / abs(weights).max())


@pytest.mark.parametrize("data", ["moons", "xor"])
def test_main_tells_the_story_and_saves_its_figures_alone(data, tmp_path, capsys):
    multilayer.main(data=data, points=20, hidden=3, steps=30, out=tmp_path / "new")
    printed = capsys.readouterr().out
    assert "dh_1/dz1_1" in printed
    assert "All 20 points, 30 steps" in printed
    saved = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in saved] == [
        "multilayer.npz",
        "multilayer_path.png",
        "multilayer_regions.png",
        "multilayer_weights.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in saved[1:])
    params = files.load_params(saved[0], network(3)[1])
    net, (inputs, targets) = network(3)[0], getattr(multilayer, data)(0, 20)
    with np.load(saved[0]) as stored:
        assert_close(jnp.asarray(stored["predictions"]), multilayer.predict(net, params, inputs))
        assert_close(jnp.asarray(stored["targets"]), targets)


def test_main_takes_the_smallest_settings(tmp_path):
    multilayer.main(points=4, hidden=1, steps=1, out=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"points": 3}, "points is 3; it takes at least 4"),
        ({"hidden": 0}, "hidden is 0; it takes 1 to 9"),
        ({"hidden": 10}, "hidden is 10; it takes 1 to 9"),
        ({"learning_rate": -1.0}, "learning-rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning-rate is nan"),
        ({"steps": 0}, "steps is 0; it takes at least 1"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match=message):
        multilayer.main(**flags, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("below", [".", "further/down"])
def test_a_file_in_the_place_of_the_directory_is_refused(below, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit, match="out takes a directory"):
        multilayer.main(out=tmp_path / "out" / below)
    assert (tmp_path / "out").read_text() == "mine"
    assert capsys.readouterr().out == ""
