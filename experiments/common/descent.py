"""Descent on all examples at once, with everything that it passes through."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxbp as bp


def descend(
    net: bp.Layer,
    loss: bp.LossFunction,
    params: Any,
    inputs: jax.Array,
    targets: jax.Array,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[Any, jax.Array]:
    """Runs an optimizer; returns the parameters and the mean loss, [steps + 1, ...].

    Both are those before each step, and after the last.
    """
    value_and_grad = bp.value_and_grad(net, loss)

    def step(carry, _):
        params, state = carry
        value, grads = value_and_grad(params, inputs, targets)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), (params, value)

    start = params, optimizer.init(params)
    (last, _), (befores, values) = jax.lax.scan(step, start, length=steps)
    path = jax.tree.map(lambda before, own: jnp.concatenate([before, own[None]]), befores, last)
    return path, jnp.append(values, value_and_grad(last, inputs, targets)[0])
