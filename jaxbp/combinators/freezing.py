"""Freezing: a network of which only a part of the parameters is trained."""

from collections.abc import Callable
from typing import Any

import jax

from jaxbp.require import placed, require_function, require_layers
from jaxbp.signals.changing import without_changes
from jaxbp.signals.kinds import keep
from jaxbp.signals.stacked import one_layer
from jaxbp.types import Layer, LayerError, Params, show_path

__all__ = ["freeze"]


def freeze(net: Layer, params: Params, where: Callable[[str, Any], bool]) -> tuple[Layer, Params]:
    """A network whose parameters are fixed where `where` says so, and the rest of its parameters.

    Use it to fine-tune a part of a network. The layer takes the trainable parameters, a tree like
    params with None in place of each fixed one. Readings, norms and optimizers see these alone.
    Inside `jit`, nothing is computed for what is fixed: no gradients of fixed parameters, and no
    errors below the lowest layer that is trained.

    Args:
      net: a Layer.
      params: its parameters, of which the fixed ones are kept.
      where: `where(path, leaf) -> bool`, true for what is fixed. `path` is written as in messages,
        `0.weight`, and `leaf` has shape and dtype; in a stack, those of one layer.

    Returns:
      The layer and its trainable parameters. `init` draws the trainable ones anew.

    Raises:
      TypeError: `net` is not a Layer.
      ValueError: everything is fixed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(8), bp.relu(), bp.dense(3))
      >>> params, _ = net.init(jax.random.key(0), (4,))
      >>> head, trainable = bp.freeze(net, params, lambda path, leaf: path.startswith("0."))
      >>> trainable[0], trainable[2]["bias"].shape
      ({'bias': None, 'weight': None}, (3,))
      >>> value, grads = bp.value_and_grad(head, bp.squared_error)(
      ...     trainable, jnp.ones((5, 4)), jnp.zeros((5, 3))
      ... )
      >>> grads[0], grads[2]["bias"].shape
      ({'bias': None, 'weight': None}, (3,))
    """
    require_layers("freeze: part", (net,))
    require_function("freeze", "where", where)
    paths = [show_path(path) for path, _ in jax.tree.leaves_with_path(params)]
    name = f"freeze({net.name})"
    structure, leaves = jax.tree.structure(params), jax.tree.leaves(params)
    one = jax.tree.leaves(one_layer(params))
    is_fixed = [bool(where(path, leaf)) for path, leaf in zip(paths, one, strict=True)]
    if all(is_fixed):
        raise ValueError("freeze: every parameter is fixed; where has to leave something to train.")
    fixed = [leaf if f else None for leaf, f in zip(leaves, is_fixed, strict=True)]

    def trainable(tree):
        """The part of a tree like params that belongs to trainable parameters."""
        own = zip(structure.flatten_up_to(tree), is_fixed, strict=True)
        return structure.unflatten([None if f else leaf for leaf, f in own])

    def whole(tree):
        """Trainable parameters and the fixed ones, as the network takes them."""
        try:
            leaves = structure.flatten_up_to(tree)
        except ValueError:
            raise LayerError(
                name,
                "got parameters that are not its own; it takes a tree like the trainable ones "
                "that freeze returned. Are they those of another network?",
            ) from None
        own = zip(leaves, fixed, strict=True)
        return structure.unflatten([leaf if kept is None else kept for leaf, kept in own])

    def init(key, shape):
        with placed("freeze", net):
            drawn, out_shape = net.init(key, shape)
        return trainable(drawn), out_shape

    def forward(params, x, *, key=None):
        params = whole(params)
        with placed("freeze", net):
            return net.forward(params, x, key=key)

    def backward(tree, cache, dy, *, read=keep):
        tree = whole(tree)
        with placed("freeze", net):
            dx, readings = net.backward(tree, cache, dy, read=without_changes(read))
        return dx, trainable(readings)

    return Layer(name, init, forward, backward), trainable(params)
