"""Losses where digits are easily lost: against 60 decimal digits, and at infinite logits."""

import decimal
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import late
from oracles import assert_close

import jaxbp as bp

decimal.getcontext().prec = 60
INF = math.inf

# The relative error of value, delta and Hessian by the dtype of the outputs. The value of 16-bit
# outputs has 32 bits.
RTOL = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}
every_dtype = pytest.mark.parametrize("dtype", RTOL)
LOGITS = [
    [20, 0, -3],
    [80, 0, 0],
    [-20, 0, 20],
    [0, 0, 0],
    [0.5, 0.25, 0.125],
    [-7, 1, 1],
    [5, 5, 0],
]


def softmax(row):
    powers = [Decimal(z).exp() for z in row]
    return [e / sum(powers) for e in powers]


def assert_exact(got, want, dtype):
    """Equal up to the dtype's rounding and its smallest number, below which 32 bits are zero."""
    got, want = np.asarray(got, np.float64), np.array(want, np.float64)
    info = jnp.finfo(dtype)
    atol = float(info.smallest_subnormal if dtype == "float16" else info.tiny)
    np.testing.assert_allclose(got, want, rtol=RTOL[dtype], atol=atol)


def value_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


@every_dtype
@pytest.mark.parametrize("form", ["labels", "one-hot", "smoothed"])
def test_softmax_cross_entropy(form, dtype):
    classes = [(row, label) for row in LOGITS for label in range(3)]
    z = jnp.asarray([row for row, _ in classes], dtype)
    labels = jnp.asarray([label for _, label in classes])
    t = jax.nn.one_hot(labels, 3, dtype=float)
    if form == "smoothed":
        t = t * 0.75 + 0.25 * jnp.asarray([0.5, 0.5, 0])
    value, delta = jax.jit(bp.softmax_cross_entropy)(z, labels if form == "labels" else t)
    values, deltas = [], []
    for (row, _), targets in zip(classes, t.tolist(), strict=True):
        p, targets = softmax(row), [Decimal(t) for t in targets]
        values.append(-sum(t * q.ln() for t, q in zip(targets, p, strict=True)))
        deltas.append([q - t for t, q in zip(targets, p, strict=True)])
    assert_exact(value, values, value_dtype(dtype))
    if form == "smoothed":  # p - t may cancel to anything there
        np.testing.assert_allclose(
            np.asarray(delta, float), np.array(deltas, float), atol=RTOL[dtype]
        )
    else:
        assert_exact(delta, deltas, dtype)


@every_dtype
def test_sigmoid_cross_entropy(dtype):
    cases = [(z, t) for z in (0, 2**-10, 1, 20, 80) for z in (z, -z) for t in (0, 1, 0.25)]
    z, t = (jnp.asarray(column, dtype)[:, None] for column in zip(*cases, strict=True))
    value, delta = jax.jit(bp.sigmoid_cross_entropy)(z, t)
    values, deltas, roots = [], [], []
    for z_, t_ in cases:
        p, q = softmax([z_, 0])
        t_ = Decimal(t_)
        values.append(-t_ * p.ln() - (1 - t_) * q.ln())
        deltas.append([p - t_])
        roots.append([[(p * q).sqrt()]])
    assert_exact(value, values, value_dtype(dtype))
    assert_exact(delta, deltas, dtype)
    columns = bp.sigmoid_cross_entropy.hessian_factor(z, t)
    assert_exact(columns[0], [root[0] for root in roots], dtype)


@every_dtype
def test_the_hessian_factor_of_a_softmax(dtype):
    z = jnp.asarray(LOGITS, dtype)
    got = bp.softmax_cross_entropy.hessian_factor(z, None)
    want = np.empty((3, len(LOGITS), 3))
    for n, row in enumerate(LOGITS):
        p = softmax(row)
        for k in range(3):
            for c in range(3):
                rest = sum(p) - p[c] if c == k else -p[c]
                want[k, n, c] = p[k].sqrt() * rest
    assert_exact(got, want, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("logits", "label", "value", "delta"),
    [
        ([0, -INF, 0], 0, math.log(2), [-0.5, 0, 0.5]),
        ([0, -INF, -INF], 0, 0, [0, 0, 0]),
        ([-INF, 0, -INF], 0, INF, [-1, 1, 0]),
        ([INF, 0, -INF], 0, 0, [0, 0, 0]),
        ([INF, 0, -INF], 1, INF, [1, -1, 0]),
        ([INF, 0, -INF], 2, INF, [1, 0, -1]),
        ([-INF, -INF, -INF], 0, math.nan, [math.nan] * 3),
        ([math.nan, 0, 0], 1, math.nan, [math.nan] * 3),
    ],
)
def test_a_softmax_at_infinite_logits(logits, label, value, delta, dtype):
    z = jnp.asarray([logits], dtype)
    one_hot = jax.nn.one_hot(jnp.array([label]), 3, dtype=float)
    for targets in (jnp.array([label]), one_hot):
        got_value, got_delta = bp.softmax_cross_entropy(z, targets)
        np.testing.assert_allclose(got_value, [value], rtol=1e-6)
        np.testing.assert_allclose(np.asarray(got_delta, float), [delta])
    columns = np.asarray(bp.softmax_cross_entropy.hessian_factor(z, None), float)
    if not np.isnan(value):
        p = np.add(delta, np.eye(3)[label])
        want = np.diag(p) - np.outer(p, p)
        np.testing.assert_allclose(np.einsum("kni,knj->ij", columns, columns), want, atol=1e-2)
        drawn = bp.softmax_cross_entropy.sample(jax.random.key(0), jnp.tile(z, (50, 1)))
        assert set(np.asarray(drawn).tolist()) == set(np.flatnonzero(p))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("logit", "target", "value", "delta"),
    [
        (INF, 1, 0, 0),
        (INF, 0, INF, 1),
        (INF, 0.25, INF, 0.75),
        (-INF, 0, 0, 0),
        (-INF, 1, INF, -1),
        (math.nan, 1, math.nan, math.nan),
    ],
)
def test_a_sigmoid_at_infinite_logits(logit, target, value, delta, dtype):
    z, t = jnp.asarray([[logit]], dtype), jnp.asarray([[target]], dtype)
    got = bp.sigmoid_cross_entropy(z, t)
    np.testing.assert_array_equal(np.asarray(got[0], float), [value])
    np.testing.assert_array_equal(np.asarray(got[1], float), [[delta]])


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (bp.softmax_cross_entropy, [[0, -INF, 1.0], [40, 0, 0], [0, 0, 0]], [0, 0, 2]),
        late(bp.softmax_cross_entropy, [[0, -INF, 1.0], [40, 0, 0]], [[0.5, 0, 0.5], [1.0, 0, 0]]),
        late(bp.softmax_cross_entropy, [[0, 0, 0.0], [1, 1, 0]], [[0.5, 0.5, 0], [1.0, 0, 0]]),
        (bp.sigmoid_cross_entropy, [[0.0, 40, -INF]], [[1.0, 1, 0]]),
        (bp.sigmoid_cross_entropy, [[0.0, -40, INF]], [[0.0, 1, 1]]),
        (bp.huber, [[0.0, 40, INF]], [[0.0, 1, 1]]),
    ],
)
def test_value_delta_and_hessian_factor_can_be_differentiated(loss, outputs, targets):
    y, t = jnp.asarray(outputs), jnp.asarray(targets)

    @jax.jit
    def derivatives(y):
        """Of the value, of delta and of the factor, and the factor."""
        first = jax.grad(lambda y: jnp.sum(loss(y, t)[0]))(y)
        second = jax.jacobian(lambda y: loss(y, t)[1])(y)
        columns = loss.hessian_factor(y, t)
        return first, second, jax.jacobian(lambda y: loss.hessian_factor(y, t))(y), columns

    first, second, slopes, columns = map(np.asarray, derivatives(y))
    assert_close(first, loss(y, t)[1])
    assert np.isfinite(second).all()
    assert_close(np.einsum("ninj->nij", second), np.einsum("kni,knj->nij", columns, columns))
    assert np.isfinite(slopes).all()


def test_autodiff_of_the_value_is_right_twice_where_a_logit_is_zero():
    z, t = jnp.zeros((1, 1)), jnp.ones((1, 1))
    curvature = jax.jit(jax.hessian(lambda z: bp.sigmoid_cross_entropy(z, t)[0][0]))(z)
    assert curvature.item() == 0.25


def test_half_the_square_is_finite_where_the_square_is_not():
    far = jnp.full((1, 1), 2.5e19, jnp.float32)
    value, _ = bp.squared_error(far, 0 * far)
    np.testing.assert_allclose(value, [2.5e19**2 / 2], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("loss", [bp.squared_error, bp.huber])
def test_16_bits_are_computed_in_32(loss, dtype):
    y, t = jnp.full((1, 2), 30000, dtype), jnp.full((1, 2), -20000, dtype)
    want = loss(y.astype(jnp.float32), t.astype(jnp.float32))
    value, delta = loss(y, t)
    np.testing.assert_array_equal(value, want[0])
    np.testing.assert_array_equal(delta, want[1].astype(dtype))


def test_weights_beyond_16_bits_multiply_small_deltas():
    y = jnp.asarray([[12.0, 0]], jnp.float16)
    loss = bp.weighted(bp.softmax_cross_entropy)
    _, delta = loss(y, (jnp.array([0]), jnp.array([1e6])))
    want = 1e6 / (1 + math.exp(12))
    np.testing.assert_allclose(np.asarray(delta, float), [[-want, want]], rtol=1e-3)
    joint = bp.joint_loss([bp.softmax_cross_entropy], [1e6])
    np.testing.assert_array_equal(joint([y], [jnp.array([0])])[1][0], delta)
    columns = loss.hessian_factor(y, (jnp.array([0]), jnp.array([1e10])))
    plain = bp.softmax_cross_entropy.hessian_factor(y.astype(float), None)
    np.testing.assert_allclose(np.asarray(columns, float), 1e5 * plain, rtol=1e-3)
