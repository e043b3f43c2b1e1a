"""Activations along an axis: tails, infinite inputs, and arguments that do not fit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import jaxbp as bp

KEY = jax.random.key(0)


@jax.jit
def of_all(x, dy):
    """The outputs and dx of each layer, of the layer's own axis as the last one."""

    def sweep(layer, dy):
        y, cache = layer.forward((), x)
        return y, layer.backward((), cache, dy)[0]

    half = dy[..., : dy.shape[-1] // 2]
    return {
        "softmax": sweep(bp.softmax(), dy),
        "log_softmax": sweep(bp.log_softmax(), dy),
        "glu": sweep(bp.glu(), half),
    }


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.float16, jnp.bfloat16])
def test_tails_have_the_digits_of_their_dtype(dtype):
    rows = [
        [0.0, 1, 2, 3], [-12, 0, 12, 40], [60, -60, -60, 60], [800, 0, -800, 5], [3e4, 3e4, -3e4, 1]
    ]  # fmt: skip
    x, dy = jnp.asarray(rows, dtype), jnp.asarray([[1.0, -2, 3, 0.5]] * 5, dtype)
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    found = jax.tree.map(lambda a: np.asarray(a, np.float64), of_all(x, dy))
    x, dy = (np.asarray(a, np.float64) for a in (x, dy))
    centred = x - x.max(1, keepdims=True)
    total = np.exp(centred).sum(1, keepdims=True)
    p = np.exp(centred) / total
    y, dx = found["softmax"]
    np.testing.assert_allclose(y, p, rtol=32 * eps, atol=4 * tiny)
    spread = p * (np.abs(dy) + (p * np.abs(dy)).sum(1, keepdims=True))
    assert (
        np.abs(dx - p * (dy - (p * dy).sum(1, keepdims=True))) <= 32 * eps * spread + 4 * tiny
    ).all()
    y, dx = found["log_softmax"]
    np.testing.assert_allclose(y, centred - np.log(total), rtol=4 * eps, atol=eps)
    np.testing.assert_allclose(dx, dy - p * dy.sum(1, keepdims=True), rtol=0, atol=16 * eps)
    y, dx = found["glu"]
    (a, b), half = np.split(x, 2, axis=1), dy[:, :2]
    e = np.exp(-np.abs(b))
    gate, slope = np.where(b >= 0, 1, e) / (1 + e), e / (1 + e) ** 2
    np.testing.assert_allclose(y, a * gate, rtol=4 * eps, atol=4 * tiny)
    # 1 - gate has no digits left at b = 40.
    np.testing.assert_allclose(
        dx, np.hstack([gate * half, a * slope * half]), rtol=8 * eps, atol=8 * tiny
    )


def test_an_input_of_minus_infinity_has_no_probability():
    x, dy = jnp.array([[0.0, -jnp.inf, 0, -jnp.inf]]), jnp.array([[1.0, 2, 3, 4]])
    found = of_all(x, dy)
    y, dx = (a.tolist() for a in found["softmax"])
    assert (y, dx) == ([[0.5, 0, 0.5, 0]], [[-0.5, 0, 0.5, 0]])
    y, dx = (a.tolist() for a in found["log_softmax"])
    assert y == [[-math.log(2), -math.inf, -math.log(2), -math.inf]]
    assert dx == [[-4, 2, -2, 4]]


def test_an_input_that_is_no_number_is_seen():
    x = jnp.array([[jnp.nan, 1.0, 2.0, -800.0]])
    for y, _ in of_all(x, x).values():
        assert np.isnan(y[0, 0])


@pytest.mark.parametrize("make", [bp.softmax, bp.log_softmax, bp.glu])
def test_axes_are_counted_without_the_examples(make):
    x = normal(KEY, (2, 4, 6))
    for axis, place in ((0, 1), (1, 2), (-1, 2), (-2, 1)):
        last = jnp.moveaxis(x, place, -1)
        want = jnp.moveaxis(make().forward((), last)[0], -1, place)
        np.testing.assert_allclose(make(axis).forward((), x)[0], want)
        assert make(axis).init(KEY, (4, 6))[1] == want.shape[1:]


@pytest.mark.parametrize("make", [bp.softmax, bp.log_softmax, bp.glu])
def test_axes_that_are_not_there_are_refused(make):
    for wrong in (None, 0.0, "T", True, (0,)):
        with pytest.raises(ValueError, match=f"{make.__name__}: axis is .*; it takes an integer"):
            make(wrong)
    message = r"got inputs of shape \[N, 4, 6\], without an axis (2|-3): axes are counted from 0"
    for axis in (2, -3):
        for call in (
            lambda axis=axis: make(axis).init(KEY, (4, 6)),
            lambda axis=axis: make(axis).forward((), jnp.ones((3, 4, 6))),
        ):
            with pytest.raises(bp.LayerError, match=message):
                call()
    with pytest.raises(bp.LayerError, match=r"got inputs of shape \[N\], without an axis -1"):
        make().forward((), jnp.ones(3))


def test_an_odd_axis_has_no_halves():
    message = (
        r"glu\(axis=0\) got inputs of shape \[N, 3, 2\]; it halves axis 0, whose size has to be"
    )
    with pytest.raises(bp.LayerError, match=message):
        bp.glu(0).init(KEY, (3, 2))
    with pytest.raises(bp.LayerError, match=message):
        bp.glu(0).forward((), jnp.ones((4, 3, 2)))
