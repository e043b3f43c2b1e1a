"""Trees of stacked layers: one array holds the same parameter of all layers, L as first axis.

Layers that are alike can run in one compiled loop if each of their parameters is stored in one
array, [L, ...]. A `Stacked` node marks such arrays, in a tree of parameters and in every tree of
the same structure: signals, readings, states of rules. Each of the L layers still counts as a layer
of its own: whether a parameter is a matrix, or what its norm is, is decided for one layer at a
time (`map_layers`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from jaxbp.sharding import alike
from jaxbp.types import PyTree, exportable

__all__ = ["Stacked"]


@exportable
class Stacked(NamedTuple):
    """The parameters of a stack of alike layers, or anything with their structure, in one tree.

    Attributes:
      layers: the tree of one layer, but each array has L as its first axis.
    """

    layers: PyTree


def is_stacked(node: Any) -> TypeGuard[Stacked]:
    """Whether a node of a tree is a `Stacked`; pass it as `is_leaf` to handle stacks as a whole."""
    return isinstance(node, Stacked)


def map_layers(
    function: Callable[..., Any],
    tree: PyTree,
    *rest: PyTree,
    is_leaf: Callable[[Any], bool] = lambda node: False,
) -> PyTree:
    """Maps a function over trees like `jax.tree.map`, and over each layer of a stack separately.

    Args:
      function: takes one leaf of each tree, without the axis L. Its results are stacked: L becomes
        their first axis.
      tree: a tree, which may contain stacked layers.
      *rest: trees that have the structure of `tree` as a prefix.
      is_leaf: `is_leaf(node) -> bool`, which other nodes to treat as leaves.
    """

    def visit(node, *others):
        if not is_stacked(node):
            return function(node, *others)
        if not jax.tree.leaves(node):
            return node
        # One layer at a time: batched matrix products are slow on a CPU, and the results for all
        # layers at once take L times the memory.
        return Stacked(
            jax.lax.map(
                lambda trees: map_layers(function, *trees, is_leaf=is_leaf),
                (node.layers, *(other.layers for other in others)),
            )
        )

    return jax.tree.map(visit, tree, *rest, is_leaf=lambda n: is_stacked(n) or is_leaf(n))


def stack_axes(tree: PyTree) -> PyTree:
    """Counts the leading axes L of each leaf, one per enclosing `Stacked`: a tree of integers."""

    def count(node):
        if not is_stacked(node):
            return 0
        return Stacked(jax.tree.map(lambda axes: axes + 1, stack_axes(node.layers)))

    return jax.tree.map(count, tree, is_leaf=is_stacked)


def one_layer(tree: PyTree) -> PyTree:
    """The shape and dtype of each array in a tree, without the axes of stacked layers."""
    return jax.tree.map(
        lambda leaf, axes: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype),
        tree,
        stack_axes(tree),
    )


def divided_like(params: PyTree, readings: PyTree, examples: PyTree = ()) -> PyTree:
    """The readings; those of their parameter's shape are divided over devices as it is.

    Args:
      params: a tree of parameters. If a rule's tree stands for it and has another structure, such
        as that of direct feedback, the readings are returned as they are.
      readings: a tree that has the structure of `params` as a prefix.
      examples: arrays [N, ...]. A reading [N] of a vector of N entries may be one number for each
        example, and is returned as it is. Without them, all readings are of the parameters' shape.
    """
    shapes = {(array.shape[0],) for array in jax.tree.leaves(examples)}
    try:
        found = jax.tree.structure(params).flatten_up_to(readings)
    except ValueError:
        return readings

    def divided(param, axes, reading):
        if isinstance(reading, dict):  # several readings of the parameter
            return {name: divided(param, axes, one) for name, one in reading.items()}
        same = isinstance(reading, jax.Array) and reading.shape == jnp.shape(param)
        return alike(param, reading) if same and reading.shape[axes:] not in shapes else reading

    leaves = jax.tree.leaves(params), jax.tree.leaves(stack_axes(params)), found
    return jax.tree.structure(params).unflatten(map(divided, *leaves))


def sum_leaves(tree: PyTree) -> jax.Array:
    """Adds up the leaves of a tree, and over the layers of stacks; there is at least one leaf."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(stack_axes(tree)), strict=True)
    return functools.reduce(jnp.add, (jnp.sum(leaf, axis=range(axes)) for leaf, axes in pairs))
