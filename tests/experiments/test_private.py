"""Private: the noise suffices, the steps are those that the accountant assumes, in small."""

import math
import re

import dp_accounting
import jax
import numpy as np
import optax
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

import jaxbp as bp
from experiments import private

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("as_shipped")]
# The accountant is faster for more noise, so the budgets are smaller than useful ones.
SMALL = {"epsilon": 0.5, "hidden": (16,), "learning_rate": 0.03, "epochs": 3, "batch_size": 200}


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_noise_is_that_of_the_gaussian_mechanism_where_everyone_joins():
    """T compositions have the known curve of one mechanism with noise sigma / sqrt(T)."""
    epsilon, delta, steps = 2.0, 1e-5, 9
    sigma = private.calibrate(epsilon, delta, 1.0, steps) / math.sqrt(steps)

    def delta_of(sigma):
        return norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(
            -0.5 / sigma - epsilon * sigma
        )

    assert delta_of(sigma) <= delta < delta_of(sigma * (1 - 1e-3))


def test_no_less_noise_would_do():
    epsilon, delta, probability, steps = 0.3, 1e-4, 0.2, 10
    noise = private.calibrate(epsilon, delta, probability, steps)
    assert noise == round(noise, 3)
    assert private.spend(noise, delta, probability, steps) <= epsilon
    assert private.spend(noise - 1e-3, delta, probability, steps) > epsilon


def test_more_of_the_budget_needs_less_noise():
    base = {"epsilon": 0.1, "delta": 1e-5, "probability": 0.1, "steps": 20}
    most = private.calibrate(**base)
    for less in ({"epsilon": 0.2}, {"delta": 1e-4}, {"probability": 0.05}, {"steps": 10}):
        assert private.calibrate(**{**base, **less}) < most


def test_the_budget_is_met_with_batches_that_are_cut_to_their_room():
    """The accountant of this test takes the limited room into account."""
    config, n = private.Config(epsilon=0.3, epochs=2, batch_size=30), 300
    probability, room, steps = private.make_sampling(config, n)
    rest = (1 - private.OVERFLOW_SHARE) * config.delta
    noise = private.calibrate(config.epsilon, rest, probability, 2 * steps)
    step = dp_accounting.TruncatedSubsampledGaussianDpEvent(n, probability, room, noise)
    spent = PLDAccountant().compose(step, 2 * steps).get_epsilon(config.delta)
    assert 0.99 * config.epsilon < spent <= config.epsilon


@pytest.mark.parametrize("batch_size", [1, 10, 59, 60])
def test_room_is_the_least_that_costs_a_thousandth_of_delta(batch_size):
    n, config = 60, private.Config(epochs=3, batch_size=batch_size)
    q, room, steps = private.make_sampling(config, n)
    assert (q, steps) == (batch_size / n, round(n / batch_size))

    def cost(room):
        sizes = range(room + 1, n + 2)
        overflow = sum(math.comb(n + 1, k) * q**k * (1 - q) ** (n + 1 - k) for k in sizes)
        return (1 + math.exp(config.epsilon)) * 3 * steps * overflow

    assert cost(room) <= 1e-3 * config.delta < cost(room - 1)


def draw_batches(n, probability, room, draws=4000):
    sampling = private.Sampling(probability, room, steps=1)
    keys = jax.random.split(jax.random.key(0), draws)
    batches = jax.jit(jax.vmap(lambda key: private.poisson_batch(key, n, sampling)))(keys)
    return map(np.asarray, batches)


def test_each_example_joins_by_itself():
    n, q = 40, 0.15
    indices, present = draw_batches(n, q, room=n)
    joined = np.zeros((len(indices), n), int)
    np.add.at(joined, (np.nonzero(present)[0], indices[present]), 1)
    assert set(np.unique(joined)) == {0, 1}
    # Means, and products of pairs, within 5 standard deviations.
    assert np.max(np.abs(joined.mean(axis=0) - q)) < 5 * math.sqrt(q * (1 - q) / len(joined))
    covariance = np.cov(joined.T) - q * (1 - q) * np.eye(n)
    assert np.max(np.abs(covariance[~np.eye(n, dtype=bool)])) < 5 * q * (1 - q) / len(joined) ** 0.5


def test_a_batch_is_padded_at_its_end_and_cut_to_its_room():
    whole, present = draw_batches(40, 0.15, room=40)
    cut, present_of_cut = draw_batches(40, 0.15, room=5)
    sizes = present.sum(axis=1)
    assert sizes.min() < 5 < sizes.max()
    assert cut.shape == present_of_cut.shape == (4000, 5)
    np.testing.assert_array_equal(present, np.arange(40) < sizes[:, None])
    np.testing.assert_array_equal(present_of_cut, np.arange(5) < sizes[:, None])
    np.testing.assert_array_equal(cut[present_of_cut], whole[:, :5][present_of_cut])


NET, LOSS = bp.dense(3), bp.weighted(bp.softmax_cross_entropy)


@pytest.fixture
def problem():
    """A dense layer's state, inputs and labels of 12 examples, and their gradients by hand."""
    rng = np.random.default_rng(0)
    state = bp.init_state(NET, optax.sgd(1.0), jax.random.key(0), (5,))
    x = rng.normal(size=(12, 5)).astype(np.float32)
    labels = rng.integers(0, 3, 12).astype(np.int32)
    weight, bias = (np.asarray(state.params[name], float) for name in ("weight", "bias"))
    exps = np.exp(x @ weight + bias)
    deltas = exps / exps.sum(axis=1, keepdims=True) - np.eye(3)[labels]
    grads = np.concatenate([x[:, :, None] * deltas[:, None], deltas[:, None]], axis=1)
    return state, x, labels, grads  # [12, 5 + 1, 3]: the bias is the last row


def take_steps(gradient, state, x, labels, *, probability=1.0, steps=1):
    """What the steps of an epoch subtract from the parameters [I + 1, O], and the counts."""
    sampling = private.Sampling(probability, room=15, steps=steps)
    after, counts = private.make_epoch(gradient, optax.sgd(1.0), sampling)(state, x, labels)
    taken = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, after.params)
    return np.concatenate([taken["weight"], taken["bias"][None]]), counts


def private_gradient(noise_multiplier):
    return bp.private_gradient(
        NET, LOSS, max_norm=1.5, noise_multiplier=noise_multiplier, batch_size=4
    )


def test_a_private_step_is_the_clipped_sum(problem):
    *data, grads = problem
    norms = np.sqrt(np.sum(grads**2, axis=(1, 2)))
    assert norms.min() < 1.5 < norms.max()
    taken, counts = take_steps(private_gradient(0.0), *data)
    want = np.einsum("n,nio->io", np.minimum(1, 1.5 / norms), grads) / 4
    np.testing.assert_allclose(taken, want, rtol=1e-5, atol=1e-6)
    assert (counts["seen"], counts["clipped"]) == (12, np.sum(norms > 1.5))


def test_a_step_of_the_twin_is_the_sum(problem):
    *data, grads = problem
    taken, counts = take_steps(private.plain_gradient(NET, LOSS, batch_size=4), *data)
    np.testing.assert_allclose(taken, grads.sum(axis=0) / 4, rtol=1e-5, atol=1e-6)
    assert (counts["seen"], counts["clipped"]) == (12, 0)


def test_private_steps_have_noise_of_their_own_and_batches_that_vary():
    """If no example joins there is only noise, and its variance adds up over the steps."""
    x, labels = np.ones((12, 300), np.float32), np.zeros(12, np.int32)
    state = bp.init_state(NET, optax.sgd(1.0), jax.random.key(0), (300,))
    gradient = private_gradient(2.0)
    taken, counts = take_steps(gradient, state, x, labels, probability=0.0, steps=20)
    assert (counts["seen"], counts["clipped"]) == (0, 0)
    noise = taken / (20**0.5 * 2.0 * 1.5 / 4)
    # Mean and variance within 5 standard deviations.
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.size) ** 0.5
    _, counts = take_steps(gradient, state, x, labels, probability=0.5, steps=20)
    assert 0 < counts["seen"] < 240
    assert counts["seen"] % 20 != 0


def test_it_trains_both_reports_and_draws(tmp_path, capsys):
    accuracies = private.main(private.Config(**SMALL, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    table = (re.split(r"  +", line.strip()) for line in printed.splitlines())
    rows = {row[0]: row[1:] for row in table}
    assert accuracies[1] > max(0.85, accuracies[0] + 0.05)
    assert rows["test accuracy"] == [f"{accuracy:.2%}" for accuracy in accuracies]
    assert rows["steps"] == ["18", "18"]  # round(1257 / 200) = 6 in an epoch
    spent, none = rows["epsilon"]
    assert 0.49 < float(spent) <= 0.5
    assert none == "none"
    noise = rows["noise multiplier"][0]
    assert f"noise multiplier {noise}: 18 steps spend epsilon {spent} of 0.5 at delta 0." in printed
    clipped, unclipped = (int(share.rstrip("%")) for share in rows["clipped, of the whole run"])
    assert clipped > unclipped == 0
    assert "of the whole run. At its end, which the figure shows," in printed
    assert "standardised" not in printed
    assert files_in(tmp_path) == ["private_digits.npz", "private_digits.png"]
    assert (tmp_path / "out" / "private_digits.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_table_it_says_what_is_not_private(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = [f"{rng.normal() + 4 * (i % 2)},{'ab'[i % 2]}" for i in range(300)]
    path = tmp_path / "points.csv"
    path.write_text("\n".join(["x,class", *lines]))
    config = private.Config(**{**SMALL, "batch_size": 100}, data=path, out=tmp_path / "out")
    assert private.main(config)[1] > 0.9
    assert "standardised by the mean and deviation of the training set" in capsys.readouterr().out
    assert files_in(tmp_path / "out") == ["private_points.npz", "private_points.png"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon is 0.0; it takes a number in \[0.01, 10.0\]"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        (
            {"delta": 1e-3},
            r"delta is 0.001; it takes a number in \[1e-10, 1/1257\): with a larger",
        ),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"max_norm": math.inf}, "max-norm is inf; it takes a positive number"),
        ({"batch_size": 1258}, "batch-size is 1258; it takes 1 to 1257"),
        ({"batch_size": 0, "max_norm": 0.0}, "max-norm is 0.0; .*; batch-size is 0"),
        ({"epochs": 0}, "epochs is 0; it takes at least 1"),
        ({"seed": -1}, "seed is -1; it takes an integer"),
        ({"learning_rate": 0.0}, "learning-rate is 0.0; it takes a number"),
        ({"hidden": (0,)}, "dense: features is 0"),
        ({"target": "class"}, "only a .csv file has columns"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(wrong, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        private.main(private.Config(**wrong, out=tmp_path / "out"))
    assert capsys.readouterr().out == ""
    assert files_in(tmp_path) == []
