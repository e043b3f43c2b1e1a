"""Activations along an axis: each output depends on all inputs along it, or on two.

`axis` counts the axes of one example, from 0 without N, or backwards from -1, the last.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbp.require import require_axis, require_delta, require_floats, require_integer
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, Shape, show_shape, widened

__all__ = ["glu", "log_softmax", "softmax"]


def softmax(axis: int = -1) -> Layer:
    """Probabilities along an axis, y_c = e^x_c / sum_b e^x_b.

        dx_c = y_c (dy_c - sum_b dy_b y_b)

    For the softmax of -x, put `scale(-1)` before it. As the last layer of a classifier, leave it
    out: `softmax_cross_entropy` takes the logits and has no rounding in its tails. Outputs and
    sums of 16-bit numbers are computed in 32 bits.

    Args:
      axis: an axis of one example, from 0 without N, or from -1 backwards.

    Raises:
      ValueError: `axis` is not an integer.
      LayerError: the inputs do not have this axis.

    References:
      "Probabilistic Interpretation of Feedforward Classification Network Outputs, with
      Relationships to Statistical Pattern Recognition", Bridle, 1990.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.softmax().forward((), jnp.log(jnp.array([[1.0, 2.0, 5.0]])))
      >>> [round(float(value), 3) for value in y[0]]
      [0.125, 0.25, 0.625]
    """

    def forward(x, axis):
        y = jax.nn.softmax(widened(x), axis=axis).astype(x.dtype)
        return y, y

    def backward(y, dy, axis):
        wide, p = widened(dy), widened(y)
        return (p * (wide - jnp.sum(wide * p, axis, keepdims=True))).astype(dy.dtype)

    return _along("softmax", axis, forward, backward)


def log_softmax(axis: int = -1) -> Layer:
    """Logarithms of probabilities along an axis, y_c = x_c - log sum_b e^x_b.

        dx_c = dy_c - e^y_c sum_b dy_b

    Outputs and sums of 16-bit numbers are computed in 32 bits.

    Args:
      axis: an axis of one example, from 0 without N, or from -1 backwards.

    Raises:
      ValueError: `axis` is not an integer.
      LayerError: the inputs do not have this axis.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.log_softmax().forward((), jnp.array([[0.0, 1000.0]]))
      >>> y[0].tolist()
      [-1000.0, 0.0]
    """

    def forward(x, axis):
        y = jax.nn.log_softmax(widened(x), axis=axis).astype(x.dtype)
        return y, y

    def backward(y, dy, axis):
        wide = widened(dy)
        rest = jnp.exp(widened(y)) * jnp.sum(wide, axis, keepdims=True)
        return (wide - rest).astype(dy.dtype)

    return _along("log_softmax", axis, forward, backward)


def glu(axis: int = -1) -> Layer:
    """The gated linear unit, y = a s(b), where a and b are the two halves of x along an axis.

        da = s(b) dy     db = a s(b) s(-b) dy     with s(b) = 1 / (1 + e^-b)

    Inputs [N, ..., 2 O] give outputs [N, ..., O]. Slopes of 16-bit numbers are computed in 32 bits.
    For other gates, or halves that are computed by layers of their own, use `gated`.

    Args:
      axis: an axis of one example, from 0 without N, or from -1 backwards.

    Raises:
      ValueError: `axis` is not an integer.
      LayerError: the inputs do not have this axis, or its size is odd.

    References:
      "Language Modeling with Gated Convolutional Networks", Dauphin, Fan, Auli, Grangier, 2017.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.glu().forward((), jnp.array([[3.0, 4.0, 0.0, 100.0]]))
      >>> y[0].tolist()
      [1.5, 4.0]
    """

    def halved(shape, axis):
        if shape[axis] % 2:
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(('N', *shape))}; it halves axis {axis}, whose "
                "size has to be even.",
            )
        return (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])

    def forward(x, axis):
        a, b = jnp.split(widened(x), 2, axis)
        gate = jax.nn.sigmoid(b)
        y = a * gate
        slopes = jnp.concatenate([gate, y * jax.nn.sigmoid(-b)], axis)
        return y.astype(x.dtype), slopes.astype(x.dtype)

    def backward(slopes, dy, axis):
        return slopes * jnp.concatenate([dy, dy], axis)

    layer = _along("glu", axis, forward, backward, halved)
    name = layer.name
    return layer


def _along(
    name: str,
    axis: int,
    function: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
    transpose: Callable[[jax.Array, jax.Array, int], jax.Array],
    out_shape: Callable[[Shape, int], Shape] = lambda shape, axis: shape,
) -> Layer:
    """A layer without parameters: y, cache = function(x, ...) and dx = transpose(cache, dy, ...).

    The cache has the shape of x. Both functions get the axis of arrays [N, ...], and `out_shape`
    that of one example.
    """
    axis = require_integer(name, "axis", axis)
    name = name if axis == -1 else f"{name}(axis={axis})"

    def init(key, shape):
        del key
        return (), out_shape(tuple(shape), require_axis(name, axis, shape))

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        place = require_axis(name, axis, x.shape[1:])
        out_shape(x.shape[1:], place)
        return function(x, 1 + place)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_floats(name, cache, what="a cache")
        place = require_axis(name, axis, cache.shape[1:])
        require_delta(name, dy, (cache.shape[0], *out_shape(cache.shape[1:], place)))
        return transpose(cache, dy, 1 + place), ()

    return Layer(name, init, forward, backward)
