"""Layers without parameters from a function of one example, with the derivative by `jax.vjp`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.lift.examples import Examples
from jaxbp.lift.trace import is_float
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer

__all__ = ["function"]


def function(f: Callable[..., Any], *, draws: bool = False, name: str | None = None) -> Layer:
    """A layer y_n = f(x_n) without parameters, from any function of one example. dx = J^T dy.

    Use it inside `chain` for what has no layer of its own. Inputs and outputs may be trees of
    arrays. Integers have no derivative: their dx is None.

    Args:
      f: `f(x)`, of one example, without N.
      draws: whether f draws random numbers. With a key it is then called as `f(x, key)`, with a key
        of its own for each example; without a key, as `f(x)`.
      name: the name in messages.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> last = bp.function(lambda x: x[-1])                      # [T, I] to [I]
      >>> net = bp.chain(bp.recurrent(bp.gru(4)), last, bp.dense(2))
      >>> params, out_shape = net.init(jax.random.key(0), (7, 3))
      >>> out_shape, net.forward(params, jnp.ones((5, 7, 3)))[0].shape
      ((2,), (5, 2))
    """
    name = name or f"function({getattr(f, '__name__', type(f).__name__)})"

    def init(key, shape):
        del key
        one = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s, jnp.result_type(float)), shape, is_leaf=_is_shape
        )
        return (), jax.tree.map(lambda y: y.shape, jax.eval_shape(f, one))

    def forward(params, x, *, key=None):
        del params
        leaves, structure = jax.tree.flatten(x)
        examples = Examples.of(x)
        keys = examples.keys(key) if draws else ()
        floats = [leaf for leaf in leaves if is_float(leaf)]

        def whole(floats, leaves, keys):
            rest = iter(floats)
            own = [next(rest) if is_float(leaf) else leaf for leaf in leaves]
            return jax.vmap(f)(structure.unflatten(own), *keys), ()

        y, vjp, _ = examples.vjp(whole, floats, leaves, keys)
        # Which of the inputs are floating-point: arrays of them without examples.
        return y, (vjp, jax.tree.map(lambda leaf: leaf[:0], x))

    def backward(params, cache, dy, *, read=keep):
        del params, read
        vjp, like = cache
        rest = iter(vjp(dy)[0])
        return jax.tree.map(lambda leaf: next(rest) if is_float(leaf) else None, like), ()

    return Layer(name, init, forward, backward)


def _is_shape(node):
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)
