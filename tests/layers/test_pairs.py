"""Layers of two inputs: against NumPy, at zero, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracles import assert_close

import jaxbp as bp

COMPARISONS = {
    "inner_product": (bp.inner_product, lambda a, b: a @ b),
    "cosine_similarity": (
        bp.cosine_similarity,
        lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b),
    ),
    "euclidean": (bp.distance, lambda a, b: np.linalg.norm(a - b)),
    "squared": (lambda: bp.distance("squared"), lambda a, b: np.sum((a - b) ** 2)),
    "manhattan": (lambda: bp.distance("manhattan"), lambda a, b: np.sum(np.abs(a - b))),
}


@pytest.mark.parametrize(("make", "formula"), COMPARISONS.values(), ids=COMPARISONS)
def test_comparisons_are_those_of_numpy(make, formula, key):
    a, b = normal(key, ((2, 3, 4), (2, 3, 4)))
    y, _ = make().forward((), (a, b))
    want = [[[formula(*map(np.asarray, (a[n, t], b[n, t])))] for t in range(3)] for n in range(2)]
    assert_close(y, jnp.asarray(want))


@pytest.mark.parametrize(("make", "formula"), COMPARISONS.values(), ids=COMPARISONS)
def test_at_zero_everything_is_finite_and_differentiated_once_more(make, formula, key):
    del formula
    x = jnp.zeros((2, 3)), jnp.zeros((2, 3)).at[1].set(jnp.array([0.0, 3.0, 4.0]))
    layer = make()

    def swept(x):
        y, cache = layer.forward((), x)
        return y, layer.backward((), cache, jnp.ones_like(y))[0]

    _, dx = swept(x)
    if "squared" not in layer.name:
        assert not any(np.any(d[0]) for d in dx)  # where both are zero
    again = jax.jacrev(swept)(x)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((dx, again)))


def test_a_vector_of_zeros_has_no_angle():
    a, b = jnp.zeros((1, 2)), jnp.array([[1.0, 2.0]])
    y, cache = bp.cosine_similarity().forward((), (a, b))
    assert_close(
        (y, bp.cosine_similarity().backward((), cache, jnp.ones((1, 1)))[0]), (y * 0, (a, a))
    )


def test_bilinear_is_a_sum_over_pairs_of_inputs(key):
    layer = bp.bilinear(2)
    params, _ = layer.init(key, ((3,), (4,)))
    a, b = normal(key, ((5, 3), (5, 4)))
    y, cache = layer.forward(params, (a, b))
    w = np.asarray(params["weight"])
    want = [[a[n] @ w[:, :, o] @ b[n] for o in range(2)] for n in range(5)]
    assert_close(y, jnp.asarray(want))
    _, squares = layer.backward(params, cache, y, read=bp.sq_norms)
    norms = (jnp.sum(v * v, axis=1) for v in (a, b, y))
    assert_close(squares["weight"], np.prod(list(norms), axis=0) * jnp.ones(5))


def test_bilinear_starts_with_outputs_of_variance_one(key):
    layer = bp.bilinear(400, dtype=jnp.float32)
    params, _ = layer.init(key, ((10,), (20,)))
    np.testing.assert_allclose(np.var(params["weight"]) * 200, 1, rtol=0.02)


def test_a_gaussian_sample_has_its_mean_and_variance(key):
    mean, log_variance = jnp.full((300, 200), 2.0), jnp.full((300, 200), jnp.log(9.0))
    layer = bp.sample_gaussian()
    y, cache = layer.forward((), (mean, log_variance), key=key)
    # Of 60 000 draws, the mean is known to 0.012 and the deviation to 0.009.
    np.testing.assert_allclose((np.mean(y), np.std(y)), (2, 3), atol=0.05)
    (d_mean, d_log_variance), _ = layer.backward((), cache, jnp.ones_like(y))
    assert_close((d_mean, d_log_variance), (jnp.ones_like(y), (y - mean) / 2))
    without_key, cache = layer.forward((), (mean, log_variance))
    assert without_key is mean
    assert not np.any(layer.backward((), cache, jnp.ones_like(y))[0][1])


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bp.distance("l3"), r"^distance: kind is 'l3'; it takes 'euclidean', 'squared'"),
        (
            lambda: bp.inner_product().init(jax.random.key(0), (3, 2)),
            r"^inner_product got inputs of 1 arrays; it takes a pair of them",
        ),
        (
            lambda: bp.distance().init(jax.random.key(0), ((3,), (2,))),
            r"^distance\('euclidean'\) got inputs of shapes \[N, 3\] and \[N, 2\]; it takes equal",
        ),
        (
            lambda: bp.cosine_similarity().forward((), (ONES, ONES[:, :1])),
            r"got inputs of shapes \[3, 2\] and \[3, 1\]; it takes equal shapes",
        ),
        (
            lambda: bp.inner_product().forward((), (ONES, ONES.astype(np.float32))),
            r"got inputs of dtypes float64 and float32; it takes one dtype",
        ),
        (
            lambda: bp.inner_product().forward((), (ONES, (ONES, ONES))),
            r"inner_product got inputs of type tuple; it takes an array",
        ),
        (lambda: bp.bilinear(0), r"^bilinear: features is 0; it takes a positive integer"),
        (
            lambda: bp.bilinear(1).init(jax.random.key(0), ((3, 2), (4, 2))),
            r"got inputs of shapes \[N, 3, 2\] and \[N, 4, 2\]; it takes equal shapes but for the",
        ),
        (
            lambda: bp.bilinear(1, use_bias=False).forward(
                {"weight": np.ones((2, 3, 1))}, (ONES, ONES)
            ),
            r"got inputs of shapes \[3, 2\] and \[3, 2\]; its weight takes \[N, \.\.\., 2\] and",
        ),
        (
            lambda: bp.sample_gaussian().forward((), (ONES, ONES[:, :1])),
            r"^sample_gaussian got inputs of shapes \[3, 2\] and \[3, 1\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_lengths_whose_squares_are_out_of_range(size):
    """In float32, where a square is infinite or 0."""
    a, b = jnp.array([[3.0, 4.0, 0.0]], "float32"), jnp.array([[0.0, 2.0, 0.0]], "float32")
    a, b, dy = a * jnp.float32(size), b * jnp.float32(size), jnp.ones((1, 1), "float32")
    cosine, cache = bp.cosine_similarity().forward((), (a, b))
    np.testing.assert_allclose(cosine, [[0.8]], rtol=1e-6)
    (da, _), _ = bp.cosine_similarity().backward((), cache, dy)
    np.testing.assert_allclose(da * jnp.float32(size), [[-0.096, 0.072, 0]], rtol=1e-5, atol=1e-7)
    apart, cache = bp.distance().forward((), (a, b))
    np.testing.assert_allclose(apart, [[np.sqrt(13) * size]], rtol=1e-6)
    (da, _), _ = bp.distance().backward((), cache, dy)
    np.testing.assert_allclose(da, np.array([[3, 2, 0]]) / np.sqrt(13), rtol=1e-6)
    y, _ = bp.l2_norm(eps=1e-30).forward((), a)
    np.testing.assert_allclose(y, [[0.6, 0.8, 0]], rtol=1e-6)
