"""Rescaling: each value divided by the size of the values around it; no means, no parameters.

In `l2_norm` these are all outputs of a position, in `local_response_norm` the neighbouring
channels. Sums of 16-bit numbers are computed in 32 bits.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp.require import (
    require_array,
    require_cache,
    require_count,
    require_delta,
    require_floats,
    require_last_axis,
    require_positive,
)
from jaxbp.signals.conv_products import summed
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, length_and_direction, show_shape, widened

__all__ = ["l2_norm", "local_response_norm"]


def l2_norm(*, eps: float = 1e-12) -> Layer:
    """Scales the O outputs of each position to a vector of length 1, y = x / max(|x|, eps).

        dx = (dy - y sum_o y_o dy_o) / |x|     if |x| > eps
        dx = dy / eps                          otherwise, as for x = 0

    Inner products of such vectors are cosines. Inputs are [N, ..., O]. Sums of 16-bit numbers are
    computed in 32 bits.

    Args:
      eps: a positive number, the smallest length that is divided by.

    Raises:
      ValueError: `eps` is not positive.
      LayerError: the inputs do not fit.

    References:
      "FaceNet: A Unified Embedding for Face Recognition and Clustering", Schroff, Kalenichenko,
      Philbin, 2015.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.l2_norm().forward((), jnp.array([[3.0, 4.0], [0.0, 0.0]]))
      >>> y.round(3).tolist()
      [[0.6..., 0.8...], [0.0, 0.0]]
    """
    name = "l2_norm"
    require_positive(name, "eps", eps)
    eps = float(eps)

    def init(key, shape):
        del key
        return (), require_last_axis(name, shape, "O")

    def forward(params, x, *, key=None):
        del params, key
        _require_outputs(name, x)
        wide = widened(x)
        length = jnp.maximum(length_and_direction(wide)[0], eps)
        y = (wide / length).astype(x.dtype)
        return y, (y, length)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_cache(name, cache, 2)
        y, length = cache
        require_array(name, y, "a cache")
        require_delta(name, dy, y.shape)
        wide, wide_dy = widened(y), widened(dy)
        along = jnp.where(length > eps, jnp.sum(wide * wide_dy, axis=-1, keepdims=True), 0)
        return ((wide_dy - wide * along) / length).astype(dy.dtype), ()

    return Layer(name, init, forward, backward)


def local_response_norm(
    size: int, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Layer:
    """Divides each value by a power of the mean square over neighbouring channels.

        y_o = x_o s_o^-beta,   s_o = k + alpha / size sum_c x_c^2
        dx_c = s_c^-beta dy_c - 2 alpha beta / size x_c sum_o x_o s_o^(-beta - 1) dy_o

    The first sum runs over the `size` channels c from o - size // 2 to o + (size - 1) // 2, as far
    as there are such channels, and the second over the channels o that see c. The article has
    alpha without the division by `size`, so its alpha of 1e-4 with 5 channels is 5e-4 here.

    Inputs are [N, ..., O]. Sums of 16-bit numbers are computed in 32 bits.

    Args:
      size: the number of channels in a sum.
      alpha: the weight of the mean square, a positive number.
      beta: the power, a positive number.
      k: what is added to the mean square, a positive number.

    Raises:
      ValueError: an argument is not positive, or `size` is no integer.
      LayerError: the inputs do not fit.

    References:
      "ImageNet Classification with Deep Convolutional Neural Networks", Krizhevsky, Sutskever,
      Hinton, 2012: section 3.3.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.local_response_norm(3, alpha=3.0, beta=1.0)
      >>> y, _ = layer.forward((), jnp.array([[1.0, 2.0, 0.0, 1.0]]))
      >>> y.round(3).tolist()                            # 1 / 6, 2 / 6, 0 / 6, 1 / 2
      [[0.167..., 0.333..., 0.0, 0.5]]
    """
    size = require_count("local_response_norm", "size", size)
    name = f"local_response_norm({size})"
    for argument, value in {"alpha": alpha, "beta": beta, "k": k}.items():
        require_positive("local_response_norm", argument, value)
    alpha, beta, k = map(float, (alpha, beta, k))
    before, after = size // 2, (size - 1) // 2

    def init(key, shape):
        del key
        return (), require_last_axis(name, shape, "O")

    def forward(params, x, *, key=None):
        del params, key
        _require_outputs(name, x)
        wide = widened(x)
        s = k + alpha / size * _sum_around(jnp.square(wide), before, after)
        return (wide * s**-beta).astype(x.dtype), (x, s)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_cache(name, cache, 2)
        x, s = cache
        require_array(name, x, "a cache")
        require_delta(name, dy, x.shape)
        wide, direct = widened(x), s**-beta * widened(dy)
        around = _sum_around(wide * direct / s, after, before)
        return (direct - 2 * alpha * beta / size * wide * around).astype(dy.dtype), ()

    return Layer(name, init, forward, backward)


def _sum_around(x: jax.Array, before: int, after: int) -> jax.Array:
    """For each entry of the last axis, the sum from `before` entries in front to `after` behind."""
    o = x.shape[-1]
    before, after = min(before, o - 1), min(after, o - 1)
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(before, after, 0)])
    parts = (lax.slice_in_dim(padded, i, i + o, axis=-1) for i in range(before + after + 1))
    return summed(parts, x.dtype)


def _require_outputs(name: str, x: jax.Array) -> None:
    """Raises unless inputs are floating-point numbers [N, ..., O]."""
    require_floats(name, x)
    if x.ndim < 2:
        raise LayerError(name, f"got inputs of shape {show_shape(x.shape)}; it takes [N, ..., O].")
