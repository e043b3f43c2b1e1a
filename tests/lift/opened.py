"""What a lifted function is compared with: `jax.vmap` of `jax.vjp` of the user's own function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from oracles import TOLERANCE, is_float

import jaxbp as bp

N = 4


class Model(NamedTuple):
    """A function as a user would write it, with what it takes, and how it is lifted."""

    function: Callable[..., Any]
    params: Any
    inputs: Any
    options: dict[str, Any] = {}  # noqa: RUF012 -- never changed

    def lift(self, **options):
        return bp.lift(self.function, self.params, self.inputs, **self.options | options)

    def of_one(self, params, x, *key):
        """The function of one example."""
        if self.options.get("per_example"):
            return self.function(params, x, *key)
        y = self.function(params, jax.tree.map(lambda a: a[None], x), *key)
        return jax.tree.map(lambda a: a[0], y)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def tokens(seed, *shape, vocabulary=11):
    return jnp.asarray(np.random.default_rng(seed).integers(vocabulary, size=shape))


def cotangents(outputs):
    """Errors at the outputs, which no two entries share."""
    leaves, structure = jax.tree.flatten(outputs)
    return structure.unflatten([normal(90 + i, *y.shape) for i, y in enumerate(leaves)])


def by_autodiff(model, dy, keys=()):
    """(outputs, dx, gradients) of every example, [N, ...]; dx is None for integers."""

    def one(x, dy, *key):
        floats = jax.tree.map(lambda a: a if is_float(a) else None, x)

        def outputs(params, floats):
            whole = jax.tree.map(
                lambda own, given: given if own is None else own,
                floats,
                x,
                is_leaf=lambda a: a is None,
            )
            return model.of_one(params, whole, *key)

        y, vjp = jax.vjp(outputs, model.params, floats)
        grads, dx = vjp(dy)
        return y, dx, grads

    return jax.jit(jax.vmap(one))(model.inputs, dy, *keys)


READ = {
    "total": bp.total,
    "per_example": bp.per_example,
    "sq_norms": bp.sq_norms,
    "variance": bp.variance,
}


def read_all(signal):
    return Readings(**{name: read(signal) for name, read in READ.items()})


class Readings(NamedTuple):
    """What one reading gives that reads everything."""

    total: Any
    per_example: Any
    sq_norms: Any
    variance: Any


def swept(net, params, x, dy, key=None, tree=None):
    """(outputs, dx, readings by name) of a sweep with a given error, in one program."""

    @jax.jit
    def sweep(params, x, dy, key):
        y, cache = net.forward(params, x, key=key)
        dx, read = net.backward(params if tree is None else tree, cache, dy, read=read_all)
        return y, dx, read

    y, dx, read = sweep(params, x, dy, key)
    return y, dx, by_name(read)


def by_name(read):
    """A tree for each reading, from a tree of `Readings`, examples first and layers after them."""
    is_readings = lambda node: isinstance(node, Readings)  # noqa: E731
    trees = {}
    for name in Readings._fields:
        tree = jax.tree.map(lambda node, name=name: getattr(node, name), read, is_leaf=is_readings)
        trees[name] = tree
    return trees


def examples_first(tree):
    """A tree with `Stacked` in it, of readings [L, N, ...], as the function has it, [N, L, ...]."""

    def visit(node, depth=0):
        if isinstance(node, bp.Stacked):
            return jax.tree.map(
                functools.partial(visit, depth=depth + 1),
                node.layers,
                is_leaf=lambda n: isinstance(n, bp.Stacked),
            )
        return jnp.moveaxis(node, depth, 0)

    return jax.tree.map(visit, tree, is_leaf=lambda n: isinstance(n, bp.Stacked))


def assert_agree(got, want, tolerance=TOLERANCE["float64"]):
    """Equal relative to the leaf's largest entry, or to the tree's where that is rounding."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    largest = max(
        (float(jnp.max(jnp.abs(b), initial=0)) for b in jax.tree.leaves(want)), default=0.0
    )
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        own = float(jnp.max(jnp.abs(b), initial=0))
        scale = own if own > 10 * tolerance * largest else largest
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=0,
            atol=tolerance * (scale or 1),
            err_msg=jax.tree_util.keystr(path),
        )


def assert_opened(model, *, key=None, tolerance=TOLERANCE["float64"], **options):
    """Outputs, dx and readings of the lifted function are those of autodiff of the function."""
    agree = functools.partial(assert_agree, tolerance=tolerance)
    net, params = model.lift(**options)
    dy = cotangents(jax.eval_shape(net.forward, params, model.inputs)[0])
    n = len(jax.tree.leaves(model.inputs)[0])
    keys = () if key is None else (jax.random.split(key, n),)
    y, dx, grads = by_autodiff(model, dy, keys)
    got_y, got_dx, read = swept(net, params, model.inputs, dy, key)
    agree(got_y, y)
    assert jax.tree.structure(got_dx) == jax.tree.structure(dx)
    agree(got_dx, dx)
    agree(examples_first(read["per_example"]), grads)
    agree(bp.unstacked(read["total"]), jax.tree.map(lambda g: g.sum(0), grads))
    agree(bp.unstacked(read["variance"]), jax.tree.map(lambda g: g.var(0), grads))
    agree(read["sq_norms"], sq_norms_like(params, grads))
    assert any(bool(jnp.any(g)) for g in jax.tree.leaves(grads)), "no gradient to compare"
    return net, params


def sq_norms_like(params, grads):
    """The squared norms of gradients [N, ...], layer by layer where params has a `Stacked`."""

    def visit(node, grads):
        depth = 0
        while isinstance(node, bp.Stacked):
            depth, node = depth + 1, node.layers
        norms = jnp.sum(grads**2, axis=range(1 + depth, grads.ndim))
        norms = jnp.moveaxis(norms, 0, depth)
        for _ in range(depth):
            norms = bp.Stacked(norms)
        return norms

    return jax.tree.map(visit, params, grads, is_leaf=lambda n: isinstance(n, bp.Stacked))
