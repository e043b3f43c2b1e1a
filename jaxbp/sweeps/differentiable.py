"""The way back: a Layer, its rule and its readings inside code that `jax.grad` differentiates.

The layer becomes a function with a derivative of its own, which is its backward pass. A gradient is
all that `jax.grad` hands out. So a reading is returned as the gradient of an extra argument, the
slots: zeros of the reading's shape, with which nothing is computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.readings.sums import total
from jaxbp.require import (
    first_difference,
    require_examples,
    require_function,
    require_key,
    require_layer,
)
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.sharding import varying_with
from jaxbp.signals.stacked import divided_like
from jaxbp.types import Layer, PyTree, Reading, Rule

__all__ = ["as_function"]

NO_READING = "as_function: there are no slots without a reading. Pass read=...?"


def as_function(
    net: Layer, *, rule: Rule = exact(), read: Reading | None = None
) -> tuple[Callable[..., Any], Callable[..., PyTree]]:
    """A Layer as a function for `jax.grad`: inside a model of Flax, under scan, checkpoint or vmap.

    The gradient of `params` is that of the rule's backward pass. If the loss is a mean over
    examples, each example's error is divided by N, and a reading sees it so.

    Args:
      net: a Layer.
      rule: which weights carry the error back.
      read: a reading of floating-point arrays, or None.

    Returns:
      `(call, make_slots)`. `call(params, x, slots=None, *, key=None, rule_state=(), rule_key=None)`
      returns the outputs. `make_slots(params, x)` returns zeros of the shape of what is read. Pass
      them to `call`, and the gradient of `slots` is a tree like params with the reading in place of
      each parameter.

    Raises:
      TypeError: `net` is not a Layer, or `read` is not a function.
      ValueError: `rule` is not a Rule; or there are slots without a reading; or, when called, the
        arrays of x do not have the same number of examples.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(2)
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> call, make_slots = bp.as_function(net, read=bp.sq_norms)
      >>> x = jnp.ones((5, 3))
      >>> def loss(params, slots):
      ...     return jnp.sum(jnp.sin(call(params, x, slots)))
      >>> grads, sq_norms = jax.grad(loss, argnums=(0, 1))(params, make_slots(params, x))
      >>> grads["weight"].shape, sq_norms["weight"].shape
      ((3, 2), (5,))
    """
    require_layer("as_function: net", net)
    require_rule("as_function", rule)
    if read is not None:
        require_function("as_function", "read", read)

    @jax.custom_vjp
    def apply(params, tree, x, slots, key):
        del tree, slots
        return net.forward(params, x, key=key)[0]

    def forward(params, tree, x, slots, key):
        y, cache = net.forward(params, x, key=key)
        # Of the parameters backward needs the tree alone: arrays of them without entries.
        like = jax.tree.map(lambda p: jnp.zeros((0,), p.dtype), params)
        return y, (tree, cache, like, slots)

    def backward(kept, dy):
        tree, cache, like, slots = kept

        def both(signal):
            return total(signal), () if slots is None or read is None else read(signal)

        dx, answers = net.backward(tree, cache, dy, read=both)
        grads, readings = (
            jax.tree.map(lambda _, answer, i=i: answer[i], like, answers) for i in (0, 1)
        )
        grads = divided_like(tree, grads)
        difference = None if slots is None else first_difference(slots, readings)
        if difference is not None:
            raise ValueError(f"as_function: slots are not those of make_slots: {difference}.")
        # None stands for zero: the derivatives of the tree that carries the error and of the key.
        return grads, None, dx, None if slots is None else readings, None

    apply.defvjp(forward, backward)

    def call(params, x, slots=None, *, key=None, rule_state=(), rule_key=None):
        require_key("as_function", "key", key)
        require_key("as_function", "rule_key", rule_key)
        require_examples("as_function", x=x)
        if slots is not None and read is None:
            raise ValueError(NO_READING)
        tree = rule.choose(rule_state, params, key=rule_key)
        return apply(varying_with(x, params), tree, x, slots, key)

    def make_slots(params, x):
        if read is None:
            raise ValueError(NO_READING)

        def answers(params, x, reading=read):
            require_examples("as_function", x=x)
            y, cache = net.forward(params, x)
            return net.backward(params, cache, y, read=reading)[1]

        shapes = jax.eval_shape(answers, params, x)
        return jax.tree.map(jnp.zeros_like, shapes)

    return call, make_slots
