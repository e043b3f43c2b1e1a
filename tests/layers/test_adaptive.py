"""Adaptive pooling: windows by their definition, ties, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from oracles import assert_close, layer_vjp

import jaxbp as bp

SIZES = [(5, 3), (3, 7), (4, 2), (1, 3), (7, 5), (6, 1), (3, None)]  # S and S'
HOW = ["mean", "max"]


def test_windows_are_those_of_a_loop(key):
    inputs = {s: normal(key, (2, s, 2)) for s, _ in SIZES}
    layers = {(s, new, how): bp.adaptive_pool((new,), how) for s, new in SIZES for how in HOW}

    @jax.jit
    def sweeps(inputs):
        answers = {}
        for (s, new, how), layer in layers.items():
            y, cache = layer.forward((), inputs[s])
            dy = jnp.cos(jnp.arange(1.0, y.size + 1)).reshape(y.shape)
            by_autodiff = layer_vjp(layer, (), inputs[s], dy)
            answers[s, str(new), how] = y, layer.backward((), cache, dy), by_autodiff
        return answers

    for (s, new, how), (y, got, by_autodiff) in sweeps(inputs).items():
        new, x = s if new == "None" else int(new), np.asarray(inputs[s])
        of = {"mean": np.mean, "max": np.max}[how]
        edges = [(math.floor(t * s / new), math.ceil((t + 1) * s / new)) for t in range(new)]
        want = np.stack([of(x[:, first:end], axis=1) for first, end in edges], axis=1)
        assert_close(y, jnp.asarray(want))
        assert_close(got, by_autodiff)


@pytest.mark.parametrize("how", HOW)
def test_axes_are_pooled_one_after_another(how, key):
    """Where windows lie side by side they are those of other layers."""
    x = normal(key, (2, 4, 3, 6, 1))
    side_by_side = {"mean": bp.avg_pool, "max": bp.max_pool}[how]((2, 1, 3))
    layers = bp.adaptive_pool((2, None, 2), how), side_by_side

    @jax.jit
    def sweeps(x):
        pairs = [(layer, *layer.forward((), x)) for layer in layers]
        return [(y, layer.backward((), cache, jnp.cos(y))) for layer, y, cache in pairs]

    assert_close(*sweeps(x))
    assert layers[0].init(key, x.shape[1:])[1] == (2, 3, 2, 1)


def test_of_equal_inputs_the_first_gets_the_error():
    layer = bp.adaptive_pool((2,), "max")
    for x, want in (
        ([1, 1, 1], [1, 1, 0]),  # the windows are the first two and the last two
        ([0, 1, 1], [0, 2, 0]),
        ([1, 0, 1], [1, 0, 1]),
        ([-np.inf] * 3, [1, 1, 0]),
    ):
        y, cache = layer.forward((), jnp.array(x, float).reshape(1, 3, 1))
        dx, _ = layer.backward((), cache, jnp.ones_like(y))
        assert dx.ravel().tolist() == want


def test_what_is_infinite_is_so_only_in_windows_that_see_it():
    x = jnp.array([1.0, 2.0, 3.0, jnp.inf]).reshape(1, 4, 1)
    assert bp.adaptive_pool((2,)).forward((), x)[0].ravel().tolist() == [1.5, np.inf]
    layer = bp.adaptive_pool((3,))  # of windows [0, 1], [1, 2], [2, 3]
    _, cache = layer.forward((), x)
    dx, _ = layer.backward((), cache, jnp.array([2.0, 4.0, jnp.inf]).reshape(1, 3, 1))
    assert dx.ravel().tolist() == [1, 3, np.inf, np.inf]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda key: bp.adaptive_pool(2),
            "adaptive_pool: sizes is 2; it takes a tuple of positive",
        ),
        (lambda key: bp.adaptive_pool(()), r"sizes is \(\)"),
        (lambda key: bp.adaptive_pool((2, 0)), r"sizes is \(2, 0\); .* or None for an axis that"),
        (lambda key: bp.adaptive_pool((2,), "sum"), "how is 'sum'; it takes 'mean' or 'max'"),
        (
            lambda key: bp.adaptive_pool((2, 2)).init(key, (4, 3)),
            r"adaptive_pool\(\(2, 2\)\) got inputs of shape \[N, 4, 3\]; it takes 2 axes of",
        ),
        (
            lambda key: bp.adaptive_pool((2,)).forward((), jnp.ones((1, 4, 3, 2))),
            r"got inputs of shape \[N, 4, 3, 2\]; it takes 1 axis of positions",
        ),
        (lambda key: bp.adaptive_pool((2,)).forward((), jnp.ones((1, 4, 2), int)), "dtype int64"),
    ],
)
def test_what_is_wrong_is_said(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(key)
