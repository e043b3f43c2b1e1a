"""KFAC, Adam and SGD, in small: the loss falls, the best rates are chosen, the table is right."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbp as bp
from experiments import curvature
from experiments.common import data

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
SMALL = {"task": "classifier", "rates": 2, "runs": 2, "steps": 30, "target": 0.1}
NAMES = ["SGD", "Adam", "KFAC"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One run for all tests that look at its results: config and results."""
    config = curvature.Config(**SMALL, out=tmp_path_factory.mktemp("small") / "out")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        return config, curvature.main(config)


def step_by_step(name, rate, keys, config):
    """The losses of training from each key, one step of the library at a time."""
    problem = curvature.make_problem(config)
    net, loss, inputs, targets = problem.net, problem.loss, problem.inputs, problem.targets
    optimizer = curvature.make_optimizer(name, rate, config)
    extra_args = {"factors": bp.kfac_factors(net, loss)} if name == "KFAC" else None
    step = bp.make_step(net, loss, optimizer, extra_args=extra_args)
    curves = []
    for key in keys:
        state, losses = bp.init_state(net, optimizer, key, inputs.shape[1:]), []
        for _ in range(config.steps):
            state, record = step(state, inputs, targets)
            losses.append(float(record["loss"]) - problem.floor)
        curves.append(losses)
    return curves


def count(losses, target):
    return next((n for n, loss in enumerate(losses) if loss <= target), math.inf)


def test_all_three_descend_and_kfac_in_the_fewest_steps(small):
    config, results = small
    assert list(results) == NAMES
    for result in results.values():
        assert result.losses.shape == (config.runs, config.steps)
        assert np.all(result.losses[:, -1] < result.losses[:, 0] / 5)
        assert np.all(result.seconds > 0)
    kfac, others = results["KFAC"], [results["SGD"], results["Adam"]]
    most = max(count(losses, config.target) for losses in kfac.losses)
    assert all(most < count(losses, config.target) for other in others for losses in other.losses)


@pytest.mark.parametrize(
    ("task", "heading"),
    [
        ("gpt", "GPT with 2 blocks of 32 features; each step uses all 64 sequences of 32"),
        ("flax", "classifier 64-64-32-10 in Flax, lifted, with tanh; each step uses all 1257"),
    ],
)
def test_all_three_descend_on_other_networks(task, heading, tmp_path, capsys):
    if task == "flax":
        pytest.importorskip("flax")
    config = curvature.Config(task=task, rates=3, runs=1, steps=40, out=tmp_path / "out")
    results = curvature.main(config)
    assert capsys.readouterr().out.startswith(heading)
    for result in results.values():
        assert result.losses[0, -1] < result.losses[0, 0] / 2


def test_only_the_figure_is_written(small):
    config, _ = small
    assert sorted(path.name for path in config.out.iterdir()) == ["curvature.npz", "curvature.png"]
    assert (config.out / "curvature.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_is_the_best_of_its_grid_and_the_losses_are_those_of_its_steps(small, name):
    config, results = small
    keys = jax.random.split(jax.random.key(config.seed), 1 + config.runs)
    ends = curvature.make_problem(config).grids[name]
    np.testing.assert_allclose(results[name].rates, ends)
    curves = [step_by_step(name, rate, keys[:2], config) for rate in ends]
    steps = [count(tuning, config.target) for tuning, _ in curves]
    assert len(set(steps)) == 2
    best = int(np.argmin(steps))
    assert results[name].rate == pytest.approx(ends[best])
    # Two programs round differently, and large learning rates amplify the difference.
    np.testing.assert_allclose(results[name].losses[0][:10], curves[best][1][:10], rtol=1e-3)


@pytest.mark.parametrize("name", ["SGD", "KFAC"])
def test_what_is_clipped_is_what_is_stepped_along(name):
    params = {"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    factors = {"weight": bp.Kronecker(1e-4 * jnp.eye(4), 1e-4 * jnp.eye(2)), "bias": ()}
    optimizer = curvature.make_optimizer(name, 2.0, curvature.Config(clip=0.25))
    updates, _ = optax.with_extra_args_support(optimizer).update(
        params, optimizer.init(params), params, factors=factors
    )
    assert float(optax.tree.norm(updates)) == pytest.approx(2.0 * 0.25)


class Bar:
    def update(self):
        pass


@pytest.mark.parametrize(
    ("curves", "rate", "limits"),
    [
        # The second rate is the first to reach the target, and limits the third.
        ({1.0: [9, 8, 7, 2], 2.0: [9, 1, 5, 5], 3.0: [9, 9, 0, 0]}, 2.0, [4, 3, 1]),
        # No rate reaches the target: the lowest last loss.
        ({1.0: [9, 8, 7, 6], 2.0: [9, 5, 5, 5], 3.0: [9, 4, 8, 8]}, 2.0, [4, 4, 4]),
        # A loss that is not finite is worse than any other.
        ({1.0: [9, np.nan, np.nan, np.nan], 2.0: [9, 9, 9, 99]}, 2.0, [4, 4]),
        ({1.0: [9, np.nan, np.nan, np.nan]}, 1.0, [4]),
    ],
)
def test_the_fewest_steps_are_chosen_and_nothing_runs_longer(curves, rate, limits):
    asked = []

    def descend(rate, key, target, limit):
        del key, target
        asked.append(limit)
        return np.where(np.arange(4) < limit, curves[rate], np.nan), ()

    assert curvature.choose(descend, list(curves), None, 2.5, 4, Bar()) == rate
    assert asked == limits


def test_steps_are_counted_along_the_last_axis():
    losses = np.array([[3.0, 2.0, 1.0], [1.0, 3.0, 1.0], [3.0, np.nan, 3.0]])
    assert curvature.steps_to(losses, 1.5).tolist() == [2, 0, math.inf]


def made_up(losses, rate):
    rates = np.array([0.1, 0.2, 0.4])
    return curvature.Result(rates, rate, np.array(losses, float), np.full(len(losses), 0.5))


def test_the_table_has_medians_and_says_what_never_came_and_what_lies_at_an_end(capsys):
    results = {
        "SGD": made_up([[9, 8, 7], [9, 8, 6], [9, 8, 5]], 0.4),
        "KFAC": made_up([[9, 1, 0.7], [9, 4, 0.2], [1, 1, 0.3]], 0.2),
    }
    curvature.print_table(results, 2.0)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    grid = ["0.1", "...", "0.4"]
    assert lines[1] == ["SGD", "0.4", *grid, "never", "500.0", "never", "6"]
    assert lines[2] == ["KFAC", "0.2", *grid, "1", "(0-2)", "500.0", "0.50", "0.3"]
    assert [" ".join(line[:3]) for line in lines[3:]] == ["SGD's best rate"]

    figure = curvature.draw(results, 2.0, curvature.Config(runs=3, steps=3))
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    line = "the target, 2"
    assert legends == [["SGD: never", "KFAC: 1 steps", line], ["SGD: never", "KFAC: 0.50 s", line]]


def test_the_floor_is_the_entropy_of_the_pixels(capsys):
    config = curvature.Config()
    problem = curvature.make_problem(config)
    x = np.asarray(data.load(None).train[0], float)
    inside = x[(x > 0) & (x < 1)]
    entropy = -np.sum(inside * np.log(inside) + (1 - inside) * np.log(1 - inside)) / len(x)
    assert problem.floor == pytest.approx(entropy, rel=1e-5)
    assert problem.targets is problem.inputs
    # If every pixel is predicted exactly, the loss is the floor.
    grey = np.clip(x, 1e-6, 1 - 1e-6)
    values, _ = problem.loss((np.log(grey) - np.log(1 - grey)).astype(np.float32), x)
    assert float(values.mean()) == pytest.approx(problem.floor, abs=1e-3)

    curvature.print_problem(problem, config)
    printed = capsys.readouterr().out
    assert (
        f"autoencoder 64-128-64-16-64-128-64 with tanh; each step uses all {len(x)} train"
        in printed
    )
    assert "target 1.5\n" in printed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rates": 1}, "rates is 1; it takes at least 2"),
        ({"runs": 0, "steps": 0}, "runs is 0; it takes at least 1; steps is 0; it takes at"),
        ({"target": -1.0}, "target is -1.0; it takes a positive number"),
        ({"clip": math.nan}, "clip is nan; it takes a positive number"),
        ({"seed": -1}, "seed is -1; it takes an integer"),
        ({"damping": 0.0}, "damping is 0.0, expected a positive number"),
        ({"every": 0}, "every is 0, expected a positive integer"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(wrong, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        curvature.main(curvature.Config(**wrong, out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"out takes a directory: .*out is a file"):
        curvature.main(curvature.Config(out=tmp_path / "out" / "below"))
    assert (tmp_path / "out").read_text() == "mine"
