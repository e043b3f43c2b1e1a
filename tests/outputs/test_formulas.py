"""Losses against formulas that are written the slow way, and their derivatives by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CLASS_WEIGHTS, LOSSES, normal
from jax.scipy.special import gammaln
from oracles import assert_close

import jaxbp as bp

W = jnp.asarray(CLASS_WEIGHTS)


def at(y, labels):
    """The output of the label."""
    return jnp.take_along_axis(y, labels[..., None], axis=-1)[..., 0]


def smoothed(y, q):
    """The cross-entropy of C = 4 classes at targets q, smoothed by 0.1, with class weights."""
    return -jnp.sum(W * (0.9 * q + 0.025) * jax.nn.log_softmax(y), axis=-1)


def gaps(y, labels, margin):
    """How far each class but the label's is short of the margin."""
    gap = jnp.maximum(0, margin + y - at(y, labels)[..., None])
    return jnp.where(jnp.arange(4) == labels[..., None], 0, gap)


def pairs_of_labels(y, t):
    """A loop over all pairs of a label and a class that is none."""
    total = jnp.zeros(y.shape[:-1])
    for j in range(4):
        for i in range(4):
            gap = jnp.maximum(0, 1 - y[..., j] + y[..., i])
            total += jnp.where((t[..., j] == 1) & (t[..., i] == 0), gap, 0)
    return total


def cosine(a, b):
    return jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)


def distance(a, b):
    return jnp.linalg.norm(a - b, axis=-1)


def ctc(y, targets):
    labels, lengths = targets
    after = jnp.asarray(jnp.arange(y.shape[1]) >= lengths[:, None], float)
    padding = jnp.asarray(labels == 0, float)
    return optax.ctc_loss(y, after, labels, padding, log_epsilon=-1e30)


def right(p, t):
    """The probability of the right answer."""
    return jnp.where(t == 1, p, 1 - p)


FORMULAS = {
    "softmax_cross_entropy, smoothed": lambda y, t: optax.softmax_cross_entropy(
        y, optax.smooth_labels(jax.nn.one_hot(t, 4, dtype=float), 0.1)
    ),
    "softmax_cross_entropy of classes with weights, smoothed, at positions": lambda y, t: smoothed(
        y, jax.nn.one_hot(t, 4, dtype=float)
    ),
    "softmax_cross_entropy of probabilities of classes with weights": lambda y, t: (
        -jnp.sum(W * t * jax.nn.log_softmax(y), axis=-1)
    ),
    "sigmoid_cross_entropy of answers with weights": lambda y, t: (
        -W * t * jnp.log(jax.nn.sigmoid(y)) - (1 - t) * jnp.log(jax.nn.sigmoid(-y))
    ),
    "absolute_error": lambda y, t: jnp.abs(y - t),
    "log_cosh": lambda y, t: jnp.log(jnp.cosh(y - t)),
    "poisson_nll": lambda y, t: jnp.exp(y) - t * y,
    "poisson_nll of rates, in full": lambda y, t: (
        y - t * jnp.log(y) + jnp.where(t > 1, t * jnp.log(t) - t + jnp.log(2 * np.pi * t) / 2, 0)
    ),
    "gaussian_nll": lambda y, t: y[..., 2:] / 2 + (y[..., :2] - t) ** 2 / (2 * jnp.exp(y[..., 2:])),
    "standard_normal_kl": lambda y, t: (y[..., :2] ** 2 + jnp.exp(y[..., 2:]) - y[..., 2:] - 1) / 2,
    "binary_cross_entropy": lambda y, t: -t * jnp.log(y) - (1 - t) * jnp.log(1 - y),
    "nll": lambda y, t: -at(y, t),
    "nll of classes with weights": lambda y, t: -W[t] * at(y, t),
    "kl_divergence": lambda y, t: t * (jnp.log(t) - jax.nn.log_softmax(y)),
    "kl_divergence, log targets": lambda y, t: jnp.exp(t) * (t - jax.nn.log_softmax(y)),
    "kl_divergence, log outputs": lambda y, t: t * (jnp.log(t) - y),
    "sigmoid_focal": lambda y, t: (
        -jnp.where(t == 1, 0.25, 0.75)
        * (1 - right(jax.nn.sigmoid(y), t)) ** 2
        * jnp.log(right(jax.nn.sigmoid(y), t))
    ),
    "softmax_focal": lambda y, t: (
        -W[t] * (1 - at(jax.nn.softmax(y), t)) ** 0.5 * at(jax.nn.log_softmax(y), t)
    ),
    "hinge": lambda y, t: jnp.maximum(0, 1 - t * y),
    "multi_margin": lambda y, t: gaps(y, t, 0.5),
    "multi_margin, squared": lambda y, t: W[t][:, None] * gaps(y, t, 1) ** 2,
    "multi_label_margin": pairs_of_labels,
    "hinge_embedding": lambda y, t: jnp.where(t == 1, y, jnp.maximum(0, 1 - y)),
    "margin_ranking": lambda y, t: jnp.maximum(0, 0.5 - t * (y[0] - y[1])),
    "cosine_embedding": lambda y, t: jnp.where(
        t == 1, 1 - cosine(*y), jnp.maximum(0, cosine(*y) + 0.5)
    ),
    "contrastive": lambda y, t: (
        jnp.where(t == 1, distance(*y), jnp.maximum(0, 5 - distance(*y))) ** 2 / 2
    ),
    "triplet": lambda y, t: jnp.maximum(0, distance(y[0], y[1]) - distance(y[0], y[2]) + 1),
    "ctc": ctc,
}


def by_formula(name, y, t):
    """The values by a formula, and the derivative of their sum."""

    def total(y):
        terms = FORMULAS[name](y, t)
        values = jnp.sum(terms, axis=range(1, terms.ndim))
        return jnp.sum(values), values

    delta, values = jax.grad(total, has_aux=True)(y)
    return values, delta


def test_values_and_deltas_of_all(key, standard_promotion):
    """In one program, so that it is compiled once. Optax mixes dtypes."""
    cases = {name: LOSSES[name] for name in FORMULAS}
    problems = {
        name: (case.outputs(key), case.targets(np.random.default_rng(7)))
        for name, case in cases.items()
    }

    @jax.jit
    def everything(problems):
        got = {name: cases[name].loss(*problems[name]) for name in problems}
        want = {name: by_formula(name, *problems[name]) for name in problems}
        return got, want

    got, want = everything(problems)
    for name in FORMULAS:
        assert_close(got[name], want[name])
        assert any(np.any(d) for d in jax.tree.leaves(want[name]))


def test_every_loss_that_is_not_one_of_optax_has_a_formula():
    names = {case.loss.name for case in LOSSES.values()}
    assert {LOSSES[name].loss.name for name in FORMULAS} >= {
        name for name in names if "(" not in name
    } - {"squared_error", "huber"}


def test_stirlings_formula_is_close_to_the_logarithm_of_the_factorial():
    counts = jnp.arange(2.0, 30.0)[:, None]
    ones = jnp.ones_like(counts)
    full, plain = (bp.make_poisson_nll(full=full)(ones, counts)[0] for full in (True, False))
    np.testing.assert_allclose(full - plain, gammaln(counts[:, 0] + 1), atol=0.05)


def test_a_smooth_l1_loss_is_a_huber_loss_divided_by_its_threshold(key):
    y = 2 * normal(key, (3, 4))
    want = jnp.where(jnp.abs(y) < 0.5, y**2 / (2 * 0.5), jnp.abs(y) - 0.25)
    assert_close(bp.make_huber(0.5)(y, 0 * y)[0] / 0.5, jnp.sum(want, axis=1))


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "value", "delta"),
    [
        (bp.log_cosh, 1e4, 0, 1e4 - np.log(2), 1),
        (bp.log_cosh, 1e-6, 0, 5e-13, 1e-6),
        (bp.poisson_nll, -np.inf, 0, 0, 0),
        (bp.poisson_nll, -np.inf, 2, np.inf, -2),
        (bp.make_poisson_nll(log_rates=False), 0, 0, 0, 1),
        (bp.make_poisson_nll(log_rates=False), 0, 2, np.inf, -np.inf),
        (bp.make_poisson_nll(log_rates=False), -1, 0, np.nan, np.nan),
        (bp.binary_cross_entropy, 1, 1, 0, -1),
        (bp.binary_cross_entropy, 0, 0, 0, 1),
        (bp.binary_cross_entropy, 0, 1, np.inf, -np.inf),
        (bp.binary_cross_entropy, 1, 0, np.inf, np.inf),
        (bp.binary_cross_entropy, 1.5, 1, np.nan, np.nan),
        (bp.make_sigmoid_focal(), 1e4, 1, 0, 0),
        (bp.make_sigmoid_focal(), -1e4, 1, 1e4, -1),
        (bp.make_sigmoid_focal(gamma=0), -1e4, 1, 1e4, -1),
        (bp.make_sigmoid_focal(), 40, 1, np.exp(-120), -3 * np.exp(-120)),
        (bp.hinge, 1, 1, 0, 0),
        (bp.hinge, np.nan, 1, np.nan, np.nan),
        (bp.absolute_error, 2, 2, 0, 0),
        (bp.absolute_error, np.nan, 2, np.nan, np.nan),
    ],
)
def test_edges(loss, outputs, targets, value, delta):
    got = loss(jnp.full((1, 1), float(outputs)), jnp.full((1, 1), float(targets)))
    np.testing.assert_allclose(got[0], [value], rtol=1e-12)
    np.testing.assert_allclose(got[1], [[delta]], rtol=1e-12)


def test_a_focal_loss_of_a_certain_prediction_is_0_and_without_gamma_a_cross_entropy(key):
    y, labels = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]), jnp.array([0, 0])
    for gamma in (0.5, 2.0):
        loss = bp.make_softmax_focal(gamma=gamma)
        value, delta = loss(y, labels)
        np.testing.assert_array_equal(value, [0, 2e4])
        np.testing.assert_array_equal(delta, [[0, 0, 0], [-1, 1, 0]])
        second = jax.jit(jax.jacobian(lambda y, loss=loss: loss(y, labels)[1]))(y)
        assert np.isfinite(second).all()
    z = normal(key, (2, 3))
    want = bp.softmax_cross_entropy(z, labels)
    assert_close(bp.make_softmax_focal(gamma=0)(z, labels), want)


ZERO, ONE = jnp.zeros((2, 3)), jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "value"),
    [
        (bp.make_cosine_embedding(), (ZERO, ONE), jnp.array([1, -1]), [1, 0]),
        (bp.make_contrastive(margin=2.0), (ONE, ONE), jnp.array([1, -1]), [0, 2]),
        (bp.make_triplet(), (ONE, ONE, ONE), None, [1, 1]),
    ],
)
def test_vectors_of_zero_and_equal_vectors_have_no_direction(loss, outputs, targets, value):
    got, deltas = loss(outputs, targets)
    np.testing.assert_array_equal(got, value)
    for delta in jax.tree.leaves(deltas):
        np.testing.assert_array_equal(delta, 0)
    second = jax.jit(jax.jacobian(lambda y: loss(y, targets)[1]))(outputs)
    assert all(np.isfinite(s).all() for s in jax.tree.leaves(second))


def test_far_and_tiny_vectors_neither_overflow_nor_vanish():
    a, b = jnp.array([[3.0, 4.0]], jnp.float32), jnp.array([[4.0, 3.0]], jnp.float32)
    for scale in (1e-30, 1e30):
        value, (da, _) = bp.make_cosine_embedding()((scale * a, b), jnp.array([1]))
        np.testing.assert_allclose(value, [0.04], rtol=1e-5)
        np.testing.assert_allclose(da * scale, [[-0.0448, 0.0336]], rtol=1e-4)


def test_labels_of_a_class_of_weight_0_count_nothing_and_wrong_ones_are_nan():
    z = jnp.array([[-jnp.inf, 0.0, 1.0], [0.0, 1.0, 2.0]])
    for loss in (bp.make_softmax_cross_entropy(class_weights=[0, 1, 2]),
                 bp.make_nll(class_weights=[0, 1, 2])):  # fmt: skip
        value, delta = jax.jit(loss)(z, jnp.array([0, 3]))
        np.testing.assert_array_equal(value, [0, np.nan])
        np.testing.assert_array_equal(delta[0], 0)
        assert np.isnan(delta[1]).any()


@pytest.mark.parametrize(
    ("loss", "shape", "wrong", "message"),
    [
        (bp.hinge, (2, 1), [[1.0], [0.0]], r"hinge: targets go from 0.0 to 1.0, expected -1 or 1"),
        (bp.make_sigmoid_focal(), (2, 1), [[1.0], [0.5]], "sigmoid_focal: .* expected 0 or 1"),
        (bp.poisson_nll, (2, 1), [[1.0], [-1.0]], "poisson_nll: .* expected 0 to inf"),
        (bp.multi_label_margin, (2, 1), [[1.0], [-1.0]], "multi_label_margin: .* expected 0 to"),
        (bp.binary_cross_entropy, (2, 1), [[1.0], [2.0]], "binary_cross_entropy: .* expected 0 to"),
        (bp.kl_divergence, (2, 2), [[0.5, 0.5], [0.5, 0.1]], "kl_divergence: probabilities sum to"),
        (bp.make_multi_margin(), (2, 3), [1, 3], "multi_margin: labels go from 1 to 3, expected 0"),
        (bp.make_softmax_focal(), (2, 3), [1, 3], "softmax_focal: labels go from 1 to 3"),
    ],
)  # fmt: skip
def test_targets_out_of_range_are_refused_outside_jit_and_nan_inside(loss, shape, wrong, message):
    y, t = jnp.full(shape, 0.5), jnp.asarray(wrong)
    with pytest.raises(ValueError, match=message):
        loss(y, t)
    value, delta = jax.jit(loss)(y, t)
    np.testing.assert_array_equal(np.isnan(value), [False, True])
    assert np.isnan(delta[1]).any()
    assert not np.isnan(delta[0]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.make_softmax_cross_entropy(label_smoothing=1.5), "label_smoothing is 1.5"),
        (lambda: bp.make_softmax_cross_entropy(class_weights=[1, np.inf]), "finite numbers"),
        (lambda: bp.make_nll(class_weights=2.0), "nll: class_weights is 2.0; it takes a list"),
        (lambda: bp.make_nll(class_weights=[1, 2])(jnp.ones((3, 4)), jnp.zeros(3, int)),
         r"nll: outputs has shape \[3, 4\], expected \[N, ..., 2\]: as many outputs as class_wei"),
        (lambda: bp.make_sigmoid_focal(gamma=-1), "gamma is -1; it takes a number of at least 0"),
        (lambda: bp.make_sigmoid_focal(alpha=2), "alpha is 2; it takes a number from 0 to 1"),
        (lambda: bp.make_multi_margin(power=3), "multi_margin: power is 3; it takes 1 or 2"),
        (lambda: bp.make_triplet(margin="a"), "triplet: margin is 'a'; it takes a finite number"),
        (lambda: bp.make_triplet()((ONE, ONE), None), "is a tuple of 2, expected a tuple"),
        (lambda: bp.make_triplet()((ONE, ONE, ONE), ONE), "targets is a .*, expected None"),
        (lambda: bp.make_contrastive()((ONE, ONE[:, :2]), ONE), r"arrays .*\[2, 3\], .*\[2, 2\]; "),
        (lambda: bp.gaussian_nll(ONE, ONE), r"gaussian_nll: outputs has shape \[2, 3\], expected"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pairs_may_be_weighted_ignored_and_joint(key):
    """A loss of two outputs inside the losses that wrap one."""
    y = tuple(normal(k, (3, 4)) for k in jax.random.split(key))
    loss, t = bp.make_contrastive(), jnp.array([1, -1, 1])
    value, delta = loss(y, t)
    bad = jax.tree.map(lambda y: y.at[1].set(jnp.nan), y)
    half = jax.tree.map(lambda d: d.at[1].set(0), delta)
    want = value.at[1].set(0), half
    assert_close(bp.weighted(loss)(bad, (t.at[1].set(7), jnp.array([1, 0, 1]))), want)
    assert_close(bp.ignoring(loss, 0)(bad, t.at[1].set(0)), want)
    joint = bp.joint_loss({"pair": loss, "one": bp.hinge}, {"pair": 2.0, "one": 0.0})
    outputs, targets = {"pair": y, "one": y[0]}, {"pair": t, "one": jnp.ones((3, 4))}
    got = joint(outputs, targets)
    assert_close(got[0], 2 * value)
    assert_close(got[1], {"pair": jax.tree.map(lambda d: 2 * d, delta), "one": 0 * y[0]})
