"""The rest of a layer's contract: shapes, other examples, the tree that carries the error, keys."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.check.derivatives import of_primals
from jaxbp.check.report import AUTODIFF_TOLERANCE, Finding, broken
from jaxbp.check.sweep import Swept, matched_dx
from jaxbp.check.trees import difference, floats, leaves
from jaxbp.readings.sums import total
from jaxbp.types import Layer, PyTree, is_shape

FAR = -1000.0  # a multiple of dy that shows what is not linear, such as clipped deltas


def compare_shapes(outputs: PyTree, out_shape: Any, n: int) -> Finding:
    """Compares the shapes of the outputs with what `init` promised."""
    shapes = jax.tree.map(jnp.shape, outputs)
    promised = jax.tree.map(lambda shape: (n, *shape), out_shape, is_leaf=is_shape)
    if shapes != promised:
        problem = f"the outputs have shape {shapes}; the out_shape of init promised {promised}."
        return broken("outputs", "out_shape", problem)
    return Finding("outputs", "out_shape", 0.0, 0.0)


def replace_others(
    run: Callable[..., PyTree], params: PyTree, x: PyTree, outputs: PyTree, n: int
) -> Finding:
    """Whether the outputs of an example stay the same if all other examples become copies of it."""

    def row(tree, i):
        return jax.tree.map(lambda a: a[i], tree)

    errors, problem = [], ""
    for i in range(n):
        copies = jax.tree.map(lambda a, i=i: jnp.broadcast_to(a[i], a.shape), x)
        errors.append(difference(row(run(params, copies), i), row(outputs, i)))
    error = float(np.max(errors))
    if not error <= AUTODIFF_TOLERANCE:
        problem = (
            "the outputs of an example change with other examples, as in batch normalisation in "
            "training, so no example has a gradient of its own. Use group, layer or RMS "
            "normalisation?"
        )
    return Finding("outputs", "other examples", error, AUTODIFF_TOLERANCE, problem)


def carry_by(
    tree: PyTree,
    layer: Layer,
    key: jax.Array | None,
    params: PyTree,
    x: PyTree,
    cotangent: PyTree,
    swept: Swept,
    needs_tree: bool,
) -> list[Finding]:
    """Whether backward carries the error by the tree that it gets, and is linear in dy."""

    @jax.jit
    def sweep(tree, params, x, dy):
        _, cache = layer.forward(params, x, key=key)
        dx, gradients = layer.backward(tree, cache, dy, read=total)
        return matched_dx(dx, floats(x))[0], gradients

    own, other = (sweep(t, params, x, cotangent) for t in (params, tree))
    far = sweep(tree, params, x, jax.tree.map(lambda u: FAR * u, cotangent))
    error = difference(jax.tree.map(lambda a: a / FAR, far), other)
    linear = Finding("all together", "linear in dy", error, AUTODIFF_TOLERANCE)
    if needs_tree and difference(other[0], own[0]) == 0:
        problem = (
            "dx is the same whatever tree backward gets. Carry the error by the weights of the "
            "first argument, not by weights from the cache?"
        )
        return [linear, broken("inputs", "another tree", problem)]
    error = difference(own[0] | leaves({"params": own[1]}), swept.gradients)
    return [linear, Finding("inputs", "another tree", error, AUTODIFF_TOLERANCE)]


def without_key(layer: Layer, primals: PyTree, x: PyTree, cotangent: PyTree) -> Finding:
    """Compares the pass without a key with autodiff."""

    @jax.jit
    def both(primals, x, dy):
        run = of_primals(lambda params, x: layer.forward(params, x)[0], x)
        (want,) = jax.vjp(run, primals)[1](dy)
        _, cache = layer.forward(primals["params"], x)
        dx, gradients = layer.backward(primals["params"], cache, dy, read=total)
        return leaves({"params": gradients}) | matched_dx(dx, floats(x))[0], leaves(want)

    error = difference(*both(primals, x, cotangent))
    return Finding("all together", "without a key", error, AUTODIFF_TOLERANCE)
