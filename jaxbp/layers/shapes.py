"""Shapes: layers that rearrange values and change none of them."""

import math

import jax.numpy as jnp

from jaxbp.require import require_array, require_delta, require_shape, require_shape_alone
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, shape_alone

__all__ = ["flatten"]


def flatten() -> Layer:
    """Reshapes each example to one vector, [N, ...] to [N, O]. dx is dy in the shape of x.

    Integers, such as tokens, have no derivative: dx is None.
    """

    def init(key, shape):
        del key
        return (), (math.prod(require_shape("flatten", shape)),)

    def forward(params, x, *, key=None):
        del params, key
        require_array("flatten", x)
        return x.reshape(len(x), math.prod(x.shape[1:])), shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        shape = require_shape_alone("flatten", cache)
        if not jnp.issubdtype(cache.dtype, jnp.floating):
            return None, ()
        require_delta("flatten", dy, (shape[0], math.prod(shape[1:])))
        return dy.reshape(shape), ()

    return Layer("flatten", init, forward, backward)
