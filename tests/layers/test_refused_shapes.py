"""What does not fit a layer is refused: parameters, caches and errors of another shape or batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LAYERS, VARIANTS, N, every, make_inputs, prepare

import jaxbp as bp

SOON = {
    "dense", "tanh", "dropout", "layer_norm at positions", "conv", "global_pool", "embedding",
    "recurrent, masked and backwards", "gated", "residual", "parallel, concatenated",
    "stack", "cast",
}  # fmt: skip
# An empty chain has no outputs and no cache of its own.
CASES = {name: case for name, case in (LAYERS | VARIANTS).items() if name != "chain of nothing"}
every_layer = every("case", CASES, soon=SOON)


def zeros_of_forward(layer, params, x):
    """Outputs and a cache of the right shapes, without compiling anything."""
    shapes = jax.eval_shape(layer.forward, params, x)
    return jax.tree.map(lambda a: jnp.asarray(np.zeros(a.shape, a.dtype)), shapes)


def others_of(a):
    """Arrays of other shapes and dtypes, of which several would broadcast to a's shape."""
    shapes = {
        (), (1,), (N, *a.shape), (1, *a.shape), a.shape[1:], (*a.shape, 1), a.shape[::-1],
        (*a.shape[:-1], 1), (*a.shape[:-1], a.shape[-1] + 1), (a.shape[0] + 1, *a.shape[1:]),
    }  # fmt: skip
    yield from (np.ones(shape, a.dtype) for shape in sorted(shapes - {a.shape}))
    yield np.ones(a.shape, int)
    yield np.ones(a.shape, bool)
    yield a.tolist()
    yield None


def refused(function, *arguments):
    """Whether a call is refused by an error that names the layer."""
    with pytest.raises(bp.LayerError):
        function(*arguments)


@every_layer
def test_parameters_of_another_shape(case, key):
    layer, params, x, _ = prepare(case, key)
    y, cache = zeros_of_forward(layer, params, x)
    leaves, structure = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        for other in others_of(leaf):
            changed = structure.unflatten([*leaves[:i], other, *leaves[i + 1 :]])
            refused(layer.forward, changed, x)
            refused(layer.backward, changed, cache, y)


@every_layer
def test_errors_of_another_shape(case, key):
    layer, params, x, _ = prepare(case, key)
    y, cache = zeros_of_forward(layer, params, x)
    leaves, structure = jax.tree.flatten(y)
    for i, leaf in enumerate(leaves):
        for other in others_of(leaf):
            changed = structure.unflatten([*leaves[:i], other, *leaves[i + 1 :]])
            refused(layer.backward, params, cache, changed)
    for other in ((y,), {"y": y}, [y]):
        refused(layer.backward, params, cache, other)


@every_layer
def test_caches_of_other_inputs(case, key):
    layer, params, x, _ = prepare(case, key)
    y, cache = zeros_of_forward(layer, params, x)
    _, other = zeros_of_forward(layer, params, make_inputs(case, key, n=N + 1))
    refused(layer.backward, params, other, y)
    for wrong in (None, 3, (), (cache,), [cache], {"x": cache}):
        refused(layer.backward, params, wrong, y)


@every_layer
def test_a_cache_and_an_error_that_are_exchanged(case, key):
    layer, params, x, _ = prepare(case, key)
    y, cache = zeros_of_forward(layer, params, x)
    kept = jax.tree.leaves(cache)
    if [a.shape for a in kept] == [a.shape for a in jax.tree.leaves(y)]:
        return  # nothing tells the two apart
    refused(layer.backward, params, y, cache)


@every_layer
def test_inputs_that_are_no_arrays(case, key):
    layer, params, _, _ = prepare(case, key)
    for wrong in (None, "x", 3, [[1.0]], np.ones(()), np.array([["x"]]), np.array([[None]])):
        refused(layer.forward, params, wrong)
