import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import perceptron


@pytest.fixture
def data():
    return perceptron.make_points(jax.random.key(1), 40)


def test_the_printed_gradient_is_the_closed_form(data, capsys):
    params = perceptron.poor_start()
    x, y = perceptron.worst_blue_point(params, *data)
    perceptron.print_step(params, params, x, y, learning_rate=0.1)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {
        row[0]: float(row[3]) for row in rows if len(row) == 6 and row[0] in ("w1", "w2", "b")
    }

    (x1, x2), (w1, w2), b = np.asarray(x)[0], np.asarray(params["weight"])[:, 0], params["bias"][0]
    slope = 1 / (1 + np.exp(-(w1 * x1 + w2 * x2 + b))) - 1
    assert printed == pytest.approx({"w1": slope * x1, "w2": slope * x2, "b": slope}, abs=1e-14)


def test_a_gradient_that_is_not_the_witness_s_is_refused(data, monkeypatch):
    params = perceptron.poor_start()
    x, y = perceptron.worst_blue_point(params, *data)
    wrong = jax.tree.map(jnp.ones_like, params)
    monkeypatch.setattr(perceptron.bp, "value_and_grad", lambda net, loss: lambda *_: (0.0, wrong))
    with pytest.raises(ArithmeticError, match="the gradients differ by"):
        perceptron.print_step(params, params, x, y, learning_rate=0.1)


def test_the_chosen_point_is_blue_and_predicted_worst(data):
    inputs, targets = data
    params = perceptron.poor_start()
    x, y = perceptron.worst_blue_point(params, inputs, targets)
    blue = perceptron.predict(params, inputs)[targets == 1]
    assert y.item() == 1
    assert perceptron.predict(params, x).item() == blue.min() < 0.5


def test_one_step_brings_the_line_closer(data):
    before = perceptron.poor_start()
    x, y = perceptron.worst_blue_point(before, *data)
    path = perceptron.descend(before, x, y, optax.sgd(0.1), steps=1)
    after = perceptron.at(path, -1)
    assert path["bias"].shape == (2, 1)
    assert perceptron.distance(after, x) < perceptron.distance(before, x)
    assert perceptron.predict(before, x) < perceptron.predict(after, x)


def test_the_nearest_point_lies_on_the_line_and_at_a_right_angle(data):
    params = perceptron.poor_start()
    x = data[0][:1]
    nearest = perceptron.nearest_on_line(params, x)
    along = jnp.array([-params["weight"][1, 0], params["weight"][0, 0]])
    assert perceptron.predict(params, nearest).item() == pytest.approx(0.5, abs=1e-12)
    assert jnp.vdot(x - nearest, along).item() == pytest.approx(0, abs=1e-12)


def test_training_lowers_the_error_and_sorts_the_points(data):
    path = perceptron.descend(perceptron.poor_start(), *data, optax.sgd(0.1), steps=300)
    errors = jax.vmap(lambda params: perceptron.error(params, *data))(path)
    wrong = [perceptron.misclassified(perceptron.at(path, k), *data) for k in (0, -1)]
    assert len(errors) == 301
    assert (jnp.diff(errors) < 0).all()
    assert wrong[1] <= 4 < wrong[0]


def test_the_path_on_the_mountain_keeps_b_and_goes_down(data):
    optimizer = optax.sgd(0.1)
    path = perceptron.descend(perceptron.poor_start(), *data, optimizer, steps=50)
    held = perceptron.hold_bias(path, *data, optimizer)
    errors = jax.vmap(lambda params: perceptron.error(params, *data))(held)
    assert (held["bias"] == path["bias"][-1]).all()
    assert (held["weight"][0] == path["weight"][0]).all()
    assert (jnp.diff(errors) < 0).all()


def test_main_tells_the_story_and_saves_its_figures_alone(tmp_path, capsys):
    perceptron.main(points=20, steps=30, out=tmp_path / "new")
    printed = capsys.readouterr().out
    assert "All 20 points, 30 steps" in printed
    assert "distance to the line" in printed
    figures = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in figures] == [
        "perceptron.npz",
        "perceptron_step.png",
        "perceptron_training.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures[1:])


@pytest.mark.parametrize("points", [2, 3])
def test_main_takes_the_smallest_settings(points, tmp_path):
    perceptron.main(points=points, steps=1, out=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"points": 1}, "points is 1; it takes at least 2"),
        ({"learning_rate": 0.0}, "learning-rate is 0.0"),
        ({"learning_rate": -0.1}, "learning-rate is -0.1"),
        ({"learning_rate": float("nan")}, "learning-rate is nan"),
        ({"learning_rate": float("inf")}, "learning-rate is inf"),
        ({"steps": 0}, "steps is 0; it takes at least 1"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match=message):
        perceptron.main(**flags, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("below", [".", "further/down"])
def test_a_file_in_the_place_of_the_directory_is_refused(below, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit, match="out takes a directory"):
        perceptron.main(out=tmp_path / "out" / below)
    assert (tmp_path / "out").read_text() == "mine"
    assert capsys.readouterr().out == ""
