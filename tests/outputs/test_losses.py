"""Losses: values, derivatives, Hessians and samplers against formulas that are not theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import LOSSES, SOON_LOSSES, N, every, normal
from oracles import assert_close, loss_delta, loss_hessian

import jaxbp as bp

every_loss = every("case", LOSSES, SOON_LOSSES)
WITH_FACTOR = {name: case for name, case in LOSSES.items() if case.has_factor}


def prepare(case, key):
    return case.outputs(key), case.targets(np.random.default_rng(7))


@every_loss
def test_delta_agrees_with_autodiff(case, key):
    outputs, targets = prepare(case, key)
    value, delta = jax.jit(case.loss)(outputs, targets)
    assert value.shape == (N,)
    assert_close(delta, loss_delta(case.loss, outputs, targets))


@every_loss
def test_the_check_passes_on_given_and_on_drawn_targets(case, key):
    _, targets = prepare(case, key)
    if case.link or targets is None:
        return  # the check draws outputs from a normal distribution, and targets instead of None
    bp.check(case.loss, key, case.shape, targets=targets).raise_if_wrong()
    if case.samples:
        bp.check(case.loss, key, case.shape).raise_if_wrong()


@every_loss
def test_compiled_or_not_is_the_same(case, key):
    outputs, targets = prepare(case, key)
    assert_close(jax.jit(case.loss)(outputs, targets), case.loss(outputs, targets))


@every_loss
def test_examples_do_not_see_each_other(case, key):
    outputs, targets = prepare(case, key)
    batch = jax.tree.map(np.asarray, (outputs, targets))
    alone = [case.loss(*jax.tree.map(lambda a, n=n: a[n : n + 1], batch)) for n in range(N)]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *alone)
    assert_close(case.loss(outputs, targets), together)


def has_examples_at_positions(case, targets):
    """Whether a position may be taken for an example: not if a target is of the whole example."""
    if not case.is_one_array or len(case.shape) < 2:
        return False
    return all(np.shape(t)[:2] == (N, case.shape[0]) for t in jax.tree.leaves(targets))


AT_POSITIONS = [
    name
    for name, case in LOSSES.items()
    if has_examples_at_positions(case, case.targets(np.random.default_rng(7)))
]


@pytest.mark.parametrize("name", AT_POSITIONS)
def test_the_value_is_the_sum_over_the_positions(name, key):
    case = LOSSES[name]
    outputs, targets = prepare(case, key)
    apart = jax.tree.map(lambda a: np.reshape(a, (-1, *a.shape[2:])), (outputs, targets))
    values, deltas = jax.jit(case.loss)(*apart)
    want = np.reshape(values, (N, -1)).sum(1), np.reshape(deltas, outputs.shape)
    assert_close(jax.jit(case.loss)(outputs, targets), want)


@every("case", WITH_FACTOR, SOON_LOSSES)
def test_the_hessian_factor_squares_to_the_hessian(case, key):
    outputs, targets = prepare(case, key)
    columns = jax.jit(case.loss.hessian_factor)(outputs, targets)
    assert columns.shape[1:] == outputs.shape
    hessians = np.einsum("k...i,k...j->...ij", columns, columns)
    outputs, targets = jax.tree.map(np.asarray, (outputs, targets))
    for place in np.ndindex(outputs.shape[:-1]):
        # One position alone; weights of the example (not of the position) stay the example's.
        at = jax.tree.map(lambda t, place=place: t[place[: t.ndim]][None], targets)
        assert_close(hessians[place], loss_hessian(case.loss, outputs[place], at))


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_delta_has_the_dtype_of_the_outputs_and_the_value_at_least_32_bits(case, key, dtype):
    outputs, targets = prepare(case, key)
    outputs = jax.tree.map(lambda y: y.astype(dtype), outputs)
    value, delta = jax.eval_shape(case.loss, outputs, targets)
    assert value.dtype == jnp.float32
    assert {d.dtype for d in jax.tree.leaves(delta)} == {jnp.dtype(dtype)}
    if case.has_factor:
        assert jax.eval_shape(case.loss.hessian_factor, outputs, targets).dtype == dtype


@pytest.mark.parametrize(
    ("case", "values"),
    [
        ("softmax_cross_entropy", optax.softmax_cross_entropy_with_integer_labels),
        ("softmax_cross_entropy of probabilities", optax.softmax_cross_entropy),
        (
            "softmax_cross_entropy at positions",
            lambda y, t: optax.softmax_cross_entropy_with_integer_labels(y, t).sum(1),
        ),
        (
            "sigmoid_cross_entropy of many labels",
            lambda y, t: optax.sigmoid_binary_cross_entropy(y, t).sum(1),
        ),
        ("squared_error", lambda y, t: optax.l2_loss(y, t).sum(1)),
        ("squared_error at positions", lambda y, t: optax.l2_loss(y, t).sum((1, 2))),
        ("huber", lambda y, t: optax.huber_loss(y, t).sum(1)),
        (
            "huber of another threshold at positions",
            lambda y, t: optax.huber_loss(y, t, delta=0.4).sum((1, 2)),
        ),
    ],
)
def test_values_are_those_of_optax(case, values, key):
    case = LOSSES[case]
    outputs, targets = prepare(case, key)
    assert_close(case.loss(outputs, targets)[0], values(outputs, targets))


@every_loss
def test_a_loss_has_the_docstring_of_its_formula(case):
    assert case.loss.__doc__ == case.loss.terms.__doc__ != bp.Loss.__doc__


def test_the_perceptrons_delta_is_prediction_minus_target(key):
    z = normal(key, (N, 1))
    t = jnp.array([[0.0], [1.0], [1.0]])
    assert_close(bp.sigmoid_cross_entropy(z, t)[1], 1 / (1 + jnp.exp(-z)) - t)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "value", "delta"),
    [
        (bp.sigmoid_cross_entropy, [[1e4, -1e4]], [[1, 0]], 0, [[0, 0]]),
        (bp.sigmoid_cross_entropy, [[1e4, -1e4]], [[0, 1]], 2e4, [[1, -1]]),
        (bp.sigmoid_cross_entropy, [[1e4, -1e4]], [[0.5, 0.5]], 1e4, [[0.5, -0.5]]),
        (bp.softmax_cross_entropy, [[1e4, -1e4]], [0], 0, [[0, 0]]),
        (bp.softmax_cross_entropy, [[1e4, -1e4]], [1], 2e4, [[1, -1]]),
        (bp.softmax_cross_entropy, [[-1e4, -1e4]], [1], np.log(2), [[0.5, -0.5]]),
        (bp.softmax_cross_entropy, [[1e4, -1e4]], [[0.0, 1.0]], 2e4, [[1, -1]]),
        (bp.softmax_cross_entropy, [[1e4, -1e4]], [[1.0, 0.0]], 0, [[0, 0]]),
        (bp.huber, [[1e4, -1e4]], [[0.0, 0.0]], 2e4 - 1, [[1, -1]]),
        (bp.squared_error, [[1e4, -1e4]], [[0.0, 0.0]], 1e8, [[1e4, -1e4]]),
    ],
)
def test_far_out_values_stay_exact(loss, outputs, targets, value, delta, dtype):
    outputs = jnp.asarray(outputs, dtype)
    targets = jnp.asarray(targets)
    outputs_seen = np.asarray(outputs, np.float64)  # bfloat16 rounds 1e4 to 9984
    got_value, got_delta = jax.jit(loss)(outputs, targets)
    scale = abs(outputs_seen[0, 0]) / 1e4
    want = value * scale ** (2 if loss is bp.squared_error else 1) if abs(value) > 1 else value
    np.testing.assert_allclose(got_value, [want], rtol=1e-4, atol=1e-6)
    want_delta = outputs_seen if loss is bp.squared_error else delta
    np.testing.assert_allclose(np.asarray(got_delta, np.float64), want_delta, atol=1e-6)


def test_a_probability_of_zero_costs_nothing_even_where_its_logarithm_is_infinite():
    value, delta = bp.softmax_cross_entropy(jnp.array([[0.0, -jnp.inf]]), jnp.array([[1.0, 0.0]]))
    np.testing.assert_array_equal(value, [0])
    np.testing.assert_array_equal(delta, [[0, 0]])


class TestWeighted:
    def test_weights_multiply_values_and_deltas(self, key):
        y, t = normal(key, (2, N, 5, 4))
        w = jnp.arange(N * 5.0).reshape(N, 5)
        value, delta = bp.weighted(bp.squared_error)(y, (t, w))
        assert_close(value, jnp.einsum("nt,nto->n", w, (y - t) ** 2 / 2))
        assert_close(delta, w[:, :, None] * (y - t))

    def test_a_masked_position_changes_nothing_whatever_it_holds(self, key):
        y, t = normal(key, (2, N, 5, 4))
        mask = jnp.ones((N, 5)).at[1, 2].set(0)
        loss = bp.weighted(bp.squared_error)
        before = loss(y, (t, mask))
        after = loss(y.at[1, 2].set(jnp.nan), (t.at[1, 2].set(jnp.inf), mask))
        assert_close(after, before)
        np.testing.assert_array_equal(after[1][1, 2], 0)

    def test_a_mask_may_be_of_truth_values_or_integers(self, key):
        y = normal(key, (N, 4))
        labels = jnp.array([0, 1, 2])
        loss = bp.weighted(bp.softmax_cross_entropy)
        want = loss(y, (labels, jnp.array([1.0, 0.0, 1.0])))
        assert_close(loss(y, (labels, jnp.array([True, False, True]))), want)
        assert_close(loss(y, (labels, jnp.array([1, 0, 1]))), want)

    def test_sampling_keeps_the_root_of_the_weights(self, key):
        weights = jnp.array([1.0, 0.0, 4.0])
        loss = bp.weighted(bp.squared_error)
        _, kept = loss.sample(key, jnp.zeros((N, 4)), (jnp.zeros((N, 4)), weights))
        np.testing.assert_array_equal(kept, [1, 0, 2])


DRAWS = 40_000  # the deviation of a fraction is at most 0.0025, of a mean at most 0.005 deviations


def draw(loss, key, outputs):
    """Targets, many for the same outputs [O]: [DRAWS, ...]."""
    return loss.sample(key, jnp.tile(outputs, (DRAWS, 1)))


def test_softmax_samples_its_probabilities(key):
    z = jnp.array([0.3, -1.0, 1.2])
    counts = np.bincount(draw(bp.softmax_cross_entropy, key, z), minlength=3)
    np.testing.assert_allclose(counts / DRAWS, jax.nn.softmax(z), atol=0.01)


def test_sigmoids_sample_their_probabilities(key):
    z = jnp.array([0.3, -1.0, 1.2])
    targets = draw(bp.sigmoid_cross_entropy, key, z)
    assert set(np.unique(targets)) == {0, 1}
    np.testing.assert_allclose(targets.mean(0), jax.nn.sigmoid(z), atol=0.01)


@pytest.mark.parametrize("loss", [bp.squared_error, bp.huber, bp.make_huber(0.4)])
def test_residuals_have_the_density_of_which_the_loss_is_the_logarithm(loss, key):
    y = jnp.array([2.0])
    residuals = np.asarray(draw(loss, key, y))[:, 0] - 2.0
    grid = np.linspace(-40, 40, 80_001)
    density = np.exp(-np.asarray(loss(jnp.zeros((len(grid), 1)), jnp.asarray(grid[:, None]))[0]))
    distribution = np.cumsum(density) / density.sum()
    for quantile in (-3, -1.2, -0.5, -0.2, 0, 0.3, 0.9, 2):
        want = np.interp(quantile, grid, distribution)
        np.testing.assert_allclose((residuals <= quantile).mean(), want, atol=0.012)


@every(
    "case",
    {
        name: case
        for name, case in WITH_FACTOR.items()
        if len(case.shape) == 1 and case.samples and ", weighted" not in name
    },
    SOON_LOSSES,
)
def test_the_score_of_sampled_targets_has_mean_zero_and_the_fisher_information(case, key):
    """E[delta] = 0 and E[delta delta^T] = the Hessian, for targets of the model's own."""
    outputs = normal(key, case.shape)
    outputs = case.link(outputs) if case.link else outputs
    targets = draw(case.loss, key, outputs)
    delta = np.asarray(case.loss(jnp.tile(outputs, (DRAWS, 1)), targets)[1])
    scale = max(1, np.abs(delta).max())
    np.testing.assert_allclose(delta.mean(0), 0, atol=0.025 * scale)
    columns = np.asarray(case.loss.hessian_factor(jnp.tile(outputs, (DRAWS, 1)), targets))
    hessian = np.einsum("kni,knj->ij", columns, columns) / DRAWS
    np.testing.assert_allclose(delta.T @ delta / DRAWS, hessian, atol=0.04 * scale)


def test_a_loss_without_distribution_or_factor_says_so(key):
    for case in LOSSES.values():
        outputs, targets = prepare(case, key)
        if not case.samples:
            with pytest.raises(TypeError, match=f"{case.loss.name}: has no distribution to draw"):
                bp.sampled(case.loss, outputs, targets, key)
        if not case.has_factor:
            with pytest.raises(TypeError, match=f"{case.loss.name}: has no factor of its Hessian"):
                bp.ggn_columns(case.loss, outputs, targets)


ONES = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bp.softmax_cross_entropy(ONES, jnp.zeros((3, 1), int)),
            r"softmax_cross_entropy: labels has shape \[3, 1\], expected \[3\]: one integer per ex",
        ),
        (
            lambda: bp.softmax_cross_entropy(jnp.ones((3, 2, 4)), jnp.zeros(3, int)),
            r"expected \[3, 2\]: one integer per position\. Put flatten\(\) into the network\?",
        ),
        (
            lambda: bp.softmax_cross_entropy(ONES, jnp.array([0, 4, 5])),
            r"labels go from 0 to 5, expected 0 to 3; the first that does not is 4, at \[1\]",
        ),
        (lambda: bp.softmax_cross_entropy(ONES, jnp.array([0, -1, 2])), r"labels go from -1 to 2"),
        (
            lambda: bp.softmax_cross_entropy(ONES, jnp.ones((3, 4))),
            r"probabilities sum to between 4 and 4 over the classes, expected 1",
        ),
        (
            lambda: bp.softmax_cross_entropy(ONES, jnp.full((3, 4), -0.25)),
            r"probabilities go from -0\.25 to -0\.25, expected 0 to 1",
        ),
        (
            lambda: bp.softmax_cross_entropy(ONES, jnp.ones(3)),
            r"targets has dtype float64 and shape \[3\], expected integers \[3\], or probabilities",
        ),
        (
            lambda: bp.sigmoid_cross_entropy(jnp.ones((3, 1)), jnp.ones(3)),
            r"targets has shape \[3\], expected \[3, 1\].*Add an axis, targets\[:, None\]\?",
        ),
        (
            lambda: bp.sigmoid_cross_entropy(ONES, 2 * ONES),
            r"sigmoid_cross_entropy: targets go from 2\.0 to 2\.0, expected 0 to 1",
        ),
        (
            lambda: bp.sigmoid_cross_entropy(ONES, ONES * jnp.nan),
            r"targets go from nan to nan, expected 0 to 1",
        ),
        (
            lambda: bp.squared_error(ONES, jnp.ones((3, 5))),
            r"squared_error: targets has shape \[3, 5\], expected \[3, 4\]: one target per output",
        ),
        (
            lambda: bp.squared_error(jnp.ones(3), jnp.ones(3)),
            r"outputs has shape \[3\], expected \[N",
        ),
        (
            lambda: bp.huber(jnp.ones((0, 4)), jnp.ones((0, 4))),
            r"outputs has shape \[0, 4\]: it is em",
        ),
        (lambda: bp.huber(jnp.ones((3, 4), int), ONES), r"outputs has dtype int64, expected float"),
        (lambda: bp.make_huber(0), r"huber: threshold is 0; it takes a positive number"),
        (
            lambda: bp.weighted(bp.huber)(ONES, ONES),
            r"weighted\(huber\): takes its targets as a pair \(targets, weights\)",
        ),
        (
            lambda: bp.weighted(bp.huber)(ONES, (ONES, jnp.ones(4))),
            r"weights has shape \[4\], expected the first axes of \[3, 4\]",
        ),
        (
            lambda: bp.weighted(bp.huber)(ONES, (ONES, 1.0)),
            r"weights has shape \[\], expected the first axes",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
