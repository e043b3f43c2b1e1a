"""Trees of stacked layers: one array for the same parameter of all of them, with L as first axis.

Layers that are alike can be swept by one compiled loop, if what is the same in each stands in one
array, [L, ...]. A `Stacked` node says so, in a tree of parameters and in whatever has its
structure: signals, readings, states of rules. What is said of a layer, such as which of its
parameters are matrices, or what the norm of one is, is then said of each of the L on its own, by
going into the node one layer at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Stacked(NamedTuple):
    """What the layers of a stack have, in one tree.

    Attributes:
      layers: a tree as of one layer, of arrays with L as their first axis.
    """

    layers: Any


def is_stacked(node):
    """Whether a node of a tree is that of stacked layers: `is_leaf` for what goes into them."""
    return isinstance(node, Stacked)


def map_layers(function, tree, *rest, is_leaf=lambda node: False):
    """`jax.tree.map`, for which every layer of a stack is a layer of its own.

    Args:
      function: of the leaves, without L; its answers get it as first axis.
      tree: a tree, in which there may be stacked layers.
      *rest: others that begin with its structure.
      is_leaf: `is_leaf(node) -> bool`, what else is a leaf.
    """

    def visit(node, *others):
        if not is_stacked(node):
            return function(node, *others)
        if not jax.tree.leaves(node):
            return node
        # One layer after another: products in batches are slow on a CPU, and all at once are large.
        return Stacked(
            jax.lax.map(
                lambda trees: map_layers(function, *trees, is_leaf=is_leaf),
                (node.layers, *(other.layers for other in others)),
            )
        )

    return jax.tree.map(visit, tree, *rest, is_leaf=lambda n: is_stacked(n) or is_leaf(n))


def stack_axes(tree):
    """How many axes of stacked layers the leaves of a tree begin with: a tree of integers."""

    def count(node):
        if not is_stacked(node):
            return 0
        return Stacked(jax.tree.map(lambda axes: axes + 1, stack_axes(node.layers)))

    return jax.tree.map(count, tree, is_leaf=is_stacked)


def one_layer(tree):
    """A tree with the shapes and dtypes of its arrays, in stacks those of one layer."""
    return jax.tree.map(
        lambda leaf, axes: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype),
        tree,
        stack_axes(tree),
    )


def sum_leaves(tree):
    """The sum of a tree's leaves, those of stacked layers summed over the layers too."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(stack_axes(tree)), strict=True)
    return sum(jnp.sum(leaf, axis=range(axes)) for leaf, axes in pairs)
