"""Shapes: layers that rearrange values and change none of them."""

import math

import jax.numpy as jnp

from jaxbp.require import require_shape
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError

__all__ = ["flatten"]


def flatten() -> Layer:
    """Reshapes each example to one vector, [N, ...] to [N, O]. dx is dy in the shape of x."""

    def init(key, shape):
        del key
        return (), (math.prod(require_shape("flatten", shape)),)

    def forward(params, x, *, key=None):
        del params, key
        if jnp.ndim(x) < 1:
            raise LayerError("flatten", "got inputs of shape []; it takes [N, ...].")
        # Backward needs only the shape of x. An array without examples carries it through jit.
        return x.reshape(len(x), math.prod(x.shape[1:])), x[:0]

    def backward(params, no_examples, dy, *, read=keep):
        del params, read
        return dy.reshape(len(dy), *no_examples.shape[1:]), ()

    return Layer("flatten", init, forward, backward)
