"""The layers of a network in its tree of factors, and the parameters of one layer as a matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.readings.moments import Kronecker
from jaxbp.sharding import replicated
from jaxbp.signals.kinds import Through
from jaxbp.signals.stacked import Stacked, is_stacked
from jaxbp.signals.views import View


def is_factors(node):
    """Whether a node of a tree of factors is the pair A, G, also in another layout."""
    return isinstance(node.signal if isinstance(node, Through) else node, Kronecker)


def is_layer(node):
    """Whether a node of a tree of factors is one layer: a weight's, alone or with its bias."""
    if is_factors(node):
        return True
    if is_stacked(node):
        return False
    if is_stack(node):
        return is_layer(inside(node))
    parts = parts_of(node)
    rest = [part for part in parts if not is_factors(part)]
    return len(parts) - len(rest) == 1 and len(rest) < 2 and all(map(is_nothing, rest))


def is_nothing(node):
    """Whether a node is the empty tuple, which stands at the bias of a layer."""
    return type(node) is tuple and not node


def parts_of(node):
    """The nodes directly below a node of a tree; of a leaf, itself."""
    return jax.tree.leaves(node, is_leaf=lambda n: n is not node)


def bare(node):
    """A node without the stacks around it."""
    return bare(node.layers) if is_stacked(node) else node


def is_stack(node):
    """Whether a node is a stack, or a collection in which each part is one."""
    parts = parts_of(node)
    return is_stacked(node) or (len(parts) > 0 and all(map(is_stacked, parts)))


def inside(node):
    """A stack without its `Stacked`, or without those of its parts."""
    if is_stacked(node):
        return node.layers
    structure = jax.tree.structure(node, is_leaf=lambda n: n is not node)
    return structure.unflatten([p.layers if is_stacked(p) else p for p in parts_of(node)])


def map_factors(function, factors, *rest, is_layer=is_factors):
    """Maps a function over layers, over each one of a stack separately, as `map_layers` does.

    A layer is a node of a tree of factors, and what other trees have there. In a lifted network
    each of its parameters may have a `Stacked` of its own. The result then has one, around the
    layer.
    """

    def is_leaf(node):
        return node is None or is_nothing(node) or is_stacked(node) or is_layer(node)

    def visit(node, *others):
        if not is_stack(node):
            return function(node, *others)
        trees = tuple(map(inside, (node, *others)))

        def one(trees):
            return map_factors(function, *trees, is_layer=is_layer)

        return Stacked(jax.lax.map(one, trees) if jax.tree.leaves(trees) else one(trees))

    return jax.tree.map(visit, factors, *rest, is_leaf=is_leaf)


def matrices_of(factors: Any) -> tuple[Kronecker, View | None]:
    """The two factors, and the view through which the parameter is seen, if there is one."""
    return (factors.signal, factors.back) if isinstance(factors, Through) else (factors, None)


def as_rows(weight, bias, matrices, view):
    """The matrix [I, O] of a layer, or [G, I, O / G], with the bias as its last row."""
    weight, bias = replicated((weight, bias))
    *groups, _, o = matrices.deltas.shape
    matrix = weight if view is None else view.take(weight)
    rows = matrix.reshape(-1, *groups, o)
    if bias is not None:
        rows = jnp.concatenate([rows, bias.reshape(1, *groups, o)])
    return jnp.moveaxis(rows, 0, -2)


def weight_and_bias(leaves):
    """The place of the weight among the one or two parameters of a layer, and both of them."""
    at = max(range(len(leaves)), key=lambda i: extent(leaves[i]))
    rest = [*leaves[:at], *leaves[at + 1 :]]
    return at, leaves[at], rest[0] if rest else None


def extent(array):
    """What is larger for the weight of a layer than for its bias."""
    return array.size, array.ndim
