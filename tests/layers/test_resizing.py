"""Resizing: interpolation by its definition, at edges and corners, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracles import assert_close, layer_vjp

import jaxbp as bp

SIZES = [(5, 3), (3, 7), (4, 8), (1, 3), (3, 1)]  # S and S'
METHODS = [
    ("nearest", False),
    ("linear", False),
    ("linear", True),
    ("cubic", False),
    ("cubic", True),
]


def places(s, new, align_corners):
    """Where the outputs lie among the inputs."""
    if align_corners:
        return np.linspace(0, s - 1, new) if new > 1 else np.zeros(1)
    return (np.arange(new) + 0.5) / new * s - 0.5


def cubic(x, u):
    """Keys's cubic with a = -3/4 of a signal at one place, its outer values repeated."""
    a, value = -0.75, 0.0
    for i in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
        d = abs(u - i)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        weight = near if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        value = value + weight * x[min(max(i, 0), len(x) - 1)]
    return value


def by_definition(x, new, method, align_corners):
    """A signal [S] at S' places."""
    u = places(len(x), new, align_corners)
    if method == "nearest":
        return x[np.floor(u + 0.5).astype(int)]
    if method == "linear":
        return np.interp(u, np.arange(len(x)), x)
    return np.array([cubic(x, place) for place in u])


def test_outputs_are_those_of_the_definition(key):
    inputs = {s: normal(key, (2, s, 2)) for s, _ in SIZES}
    layers = {
        (s, new, *how): bp.resize((new,), method=how[0], align_corners=how[1])
        for s, new in SIZES
        for how in METHODS
    }

    @jax.jit
    def sweeps(inputs):
        answers = {}
        for how, layer in layers.items():
            x = inputs[how[0]]
            y, cache = layer.forward((), x)
            dy = jnp.cos(jnp.arange(1.0, y.size + 1)).reshape(y.shape)
            answers[how] = y, layer.backward((), cache, dy), layer_vjp(layer, (), x, dy)
        return answers

    for (s, *how), (y, got, by_autodiff) in sweeps(inputs).items():
        want = np.apply_along_axis(by_definition, 1, np.asarray(inputs[s]), *how)
        assert_close(y, jnp.asarray(want))
        assert_close(got, by_autodiff)


def test_axes_are_resized_one_after_another(key):
    x = normal(key, (1, 2, 3, 2, 1))
    y, _ = bp.resize((3, None, 4)).forward((), x)
    want = np.apply_along_axis(by_definition, 1, np.asarray(x), 3, "linear", False)
    want = np.apply_along_axis(by_definition, 3, want, 4, "linear", False)
    assert_close(y, jnp.asarray(want))
    assert bp.resize((3, None, 4)).init(key, x.shape[1:])[1] == (3, 3, 4, 1)


def test_upsample_interpolates_as_resize(key):
    x = normal(key, (2, 2, 3, 1))
    for method, align_corners in METHODS[1:]:
        how = {"method": method, "align_corners": align_corners}
        layer, other = bp.upsample((3, 2), **how), bp.resize((6, 6), **how)
        assert layer.init(key, (2, 3, 1)) == other.init(key, (2, 3, 1))
        (y, cache), (want, others) = layer.forward((), x), other.forward((), x)
        assert_close(y, want)
        assert_close(layer.backward((), cache, y), other.backward((), others, y))
    assert_close(
        bp.upsample(2).forward((), x)[0], bp.resize((4, 6), method="nearest").forward((), x)[0]
    )


def test_what_is_infinite_stays_where_it_is():
    x = jnp.array([1.0, 2.0, 3.0, jnp.inf]).reshape(1, 4, 1)
    layer = bp.resize((8,))
    y, cache = layer.forward((), x)
    assert y.ravel().tolist() == [1, 1.25, 1.75, 2.25, 2.75, np.inf, np.inf, np.inf]
    dx, _ = layer.backward((), cache, y)
    assert np.isfinite(dx.ravel()[:2]).all()
    half = bp.resize((2,), method="nearest")  # sees positions 1 and 3
    dx, _ = half.backward((), half.forward((), x)[1], jnp.array([[[2.0], [jnp.inf]]]))
    assert dx.ravel().tolist() == [0, 2, 0, np.inf]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: bp.resize(4), "resize: sizes is 4; it takes a tuple of positive integers"),
        (lambda key: bp.resize((4.0,)), r"resize: sizes is \(4\.0,\)"),
        (
            lambda key: bp.resize((4,), method="area"),
            "resize: method is 'area'; it takes 'nearest', 'linear' or 'cubic'",
        ),
        (
            lambda key: bp.upsample(2, align_corners=True),
            "upsample: align_corners is True, and the method 'nearest'; it takes the",
        ),
        (
            lambda key: bp.resize((2, 2)).init(key, (4, 3)),
            r"resize\(\(2, 2\)\) got inputs of shape \[N, 4, 3\]; it takes 2 axes of positions",
        ),
        (lambda key: bp.resize((2,)).forward((), jnp.ones((1, 4, 2), int)), "dtype int64"),
        (
            lambda key: bp.resize((2,)).backward((), jnp.zeros((0, 1, 4, 2)), jnp.ones((1, 4, 2))),
            r"got a dy of shape \[1, 4, 2\]; its outputs are \[1, 2, 2\]",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)
