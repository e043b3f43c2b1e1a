"""Trees of arrays: their leaves by path, random numbers of their shapes, and their differences."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.signals.kinds import is_signal
from jaxbp.types import PyTree, is_shape, show_path, show_shape


def leaves(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    paths = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {show_path(path): leaf for path, leaf in paths}


def outline(node: Any) -> str:
    """Describes a leaf in a few words, for messages."""
    if is_signal(node):
        operands = ", ".join(show_shape(jnp.shape(a)) for a in jax.tree.leaves(node))
        return f"the signal {type(node).__name__}({operands})"
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return f"an array of shape {show_shape(node.shape)} and dtype {node.dtype}"
    return f"an object of type {type(node).__name__}"


def is_float(x: jax.Array) -> bool:
    """Whether an array has a derivative."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def floats(tree: PyTree) -> PyTree:
    """The arrays that have a derivative, and None for integers and booleans."""
    return jax.tree.map(lambda a: a if is_float(a) else None, tree)


def filled(tree: PyTree, floats: PyTree) -> PyTree:
    """The tree with other floating-point arrays."""
    leaves, structure = jax.tree.flatten(tree)
    own = zip(structure.flatten_up_to(floats), leaves, strict=True)
    return structure.unflatten([leaf if new is None else new for new, leaf in own])


def normals(key: jax.Array, shape: Any, n: int) -> PyTree:
    """Normal random numbers [N, *shape], for each shape of a tree."""
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((n, *s), jnp.float64), shape, is_leaf=is_shape
    )
    return normal_like(like, key)


def times(array: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiplies each example of an array [N, ...] by its weight, [N]."""
    return array * weights.reshape(-1, *[1] * (array.ndim - 1))


def dot(tree: PyTree, other: PyTree) -> jax.Array:
    """The inner product of two trees of arrays."""
    products = jax.tree.leaves(jax.tree.map(jnp.vdot, tree, other))
    return functools.reduce(jnp.add, products)


def normal_like(tree: PyTree, key: jax.Array) -> PyTree:
    """Normal random numbers of the shapes of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    )


def moved(tree: PyTree, directions: PyTree, step: float) -> PyTree:
    """The tree after a step along some directions."""
    return jax.tree.map(lambda p, v: p + step * v, tree, directions)


def difference(tree: PyTree, other: PyTree) -> float:
    """The largest difference of two trees, relative to the size of a leaf; inf if shapes differ."""
    (got, structure), (want, same) = jax.tree.flatten(tree), jax.tree.flatten(other)
    if structure != same or list(map(jnp.shape, got)) != list(map(jnp.shape, want)):
        return math.inf
    errors = []
    for a, b in zip(map(np.asarray, got), map(np.asarray, want), strict=True):
        differs = a != b  # equal infinities, such as those of masked logits, do not
        error = np.max(np.abs(a[differs] - b[differs]), initial=0)
        errors.append(ratio(error, np.max(np.abs(b), initial=0)))
    return float(np.max(errors, initial=0.0))


def ratio(error: Any, scale: Any) -> float:
    """The error divided by the scale; the error itself if the scale is zero."""
    return float(error / (scale if scale else 1))
