"""Normalisation: each example by its own mean and variance, then a gain and a bias for each output.

Forward, with means over the values that are normalised together:

    h = (x - mean(x)) r,   r = 1 / sqrt(mean((x - mean(x))^2) + eps),   y = g h + b

Backward, with dh = g dy:

    dx = r (dh - mean(dh) - h mean(dh h))     dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

Shifting or scaling x does not change h (up to eps). The two means in dx therefore remove these
directions from dh. The cache is h and r.

The layers differ in which values are normalised together. None of them takes means over examples.
Batch normalisation does: the output of each example then depends on all examples of the batch, and
there is no per-example gradient.
"""

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from jaxbp.require import (
    require_cache,
    require_count,
    require_delta,
    require_floats,
    require_last_axis,
    require_params,
    require_positive,
)
from jaxbp.signals.kinds import Bias, Scale, keep
from jaxbp.types import Layer, LayerError, show_shape, widened

__all__ = ["group_norm", "layer_norm", "rms_norm"]


def layer_norm(*, eps: float = 1e-5, use_bias: bool = True, dtype: DTypeLike = float) -> Layer:
    """Layer normalisation: the O values at each position are normalised together.

        h = (x - mean(x)) r,   r = 1 / sqrt(variance(x) + eps),   y = g h + b
        dx = r (dh - mean(dh) - h mean(dh h)) with dh = g dy
        dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

    Inputs are [N, ..., O]. Parameters are `{"gain": [O], "bias": [O]}`, without the bias if
    `use_bias` is false. Means of 16-bit numbers are computed in 32 bits.

    Args:
      eps: a positive number, added to the variance.
      use_bias: whether to add a bias b.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `eps` is not positive.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Layer Normalization", Ba, Kiros, Hinton, 2016.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.layer_norm()
      >>> params, _ = layer.init(jax.random.key(0), (4,))
      >>> y, _ = layer.forward(params, jnp.array([[1.0, 2.0, 3.0, 4.0]]))
      >>> [round(float(value), 3) for value in (y.mean(), y.std())]
      [0.0, 1.0]
    """
    return _norm("layer_norm", eps, use_bias, dtype)


def rms_norm(*, eps: float = 1e-6, dtype: DTypeLike = float) -> Layer:
    """Normalisation by the root mean square at each position, without a mean and without a bias.

        h = x r,   r = 1 / sqrt(mean(x^2) + eps),   y = g h
        dx = r (dh - h mean(dh h)) with dh = g dy     dE/dg = sum_nt h_nt dy_nt

    Inputs are [N, ..., O], parameters `{"gain": [O]}`. Means of 16-bit numbers are computed in 32
    bits.

    Args:
      eps: a positive number, added to the mean square.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `eps` is not positive.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Root Mean Square Layer Normalization", Zhang, Sennrich, 2019.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.rms_norm()
      >>> params, _ = layer.init(jax.random.key(0), (2,))
      >>> y, _ = layer.forward(params, jnp.array([[3.0, 4.0]]))
      >>> round(float(jnp.mean(y**2)), 3)
      1.0
    """
    return _norm("rms_norm", eps, False, dtype, centred=False)


def group_norm(
    groups: int, *, eps: float = 1e-5, use_bias: bool = True, dtype: DTypeLike = float
) -> Layer:
    """Group normalisation: the values of a group of channels are normalised over all positions.

        h = (x - mean(x)) r,   r = 1 / sqrt(variance(x) + eps),   y = g h + b
        dx = r (dh - mean(dh) - h mean(dh h)) with dh = g dy
        dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

    The last axis is split into `groups` groups of neighbouring channels. The mean and the variance
    of each group are taken over its channels and all positions of an example. One group gives layer
    normalisation of whole images; as many groups as channels, instance normalisation.

    Inputs are [N, ..., O]. Parameters are `{"gain": [O], "bias": [O]}`, without the bias if
    `use_bias` is false. Means of 16-bit numbers are computed in 32 bits.

    Args:
      groups: the number of groups, which must divide O.
      eps: a positive number, added to the variance.
      use_bias: whether to add a bias b.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `groups` is not a positive integer, or `eps` is not positive.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Group Normalization", Wu, He, 2018.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.group_norm(2)
      >>> params, _ = layer.init(jax.random.key(0), (5, 4))
      >>> y, _ = layer.forward(params, jax.random.normal(jax.random.key(1), (1, 5, 4)))
      >>> [abs(round(float(y[..., part].mean()), 3)) for part in (slice(2), slice(2, 4))]
      [0.0, 0.0]
    """
    groups = require_count("group_norm", "groups", groups)
    return _norm(f"group_norm({groups})", eps, use_bias, dtype, groups=groups)


def _norm(
    name: str,
    eps: float,
    use_bias: bool,
    dtype: DTypeLike,
    *,
    centred: bool = True,
    groups: int | None = None,
) -> Layer:
    """Normalises each position by itself, or each group of channels over all positions.

    `centred` says whether the mean is subtracted.
    """
    require_positive(name, "eps", eps)
    leaves = ("gain", "bias") if use_bias else ("gain",)

    def mean(x):
        """The mean over values that are normalised together, in a shape that broadcasts to x."""
        if groups is None:
            return jnp.mean(x, axis=-1, keepdims=True)
        parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
        means = jnp.mean(parts, axis=(1, 3), keepdims=True)
        means = jnp.broadcast_to(means, (len(x), 1, groups, parts.shape[-1]))
        return means.reshape(len(x), *[1] * (x.ndim - 2), x.shape[-1])

    def init(key, shape):
        shape = require_last_axis(name, shape, "O")
        if groups is not None and shape[-1] % groups:
            raise LayerError(
                name, f"got inputs of {shape[-1]} channels, not a multiple of {groups} groups."
            )
        make = {"gain": initializers.ones, "bias": initializers.zeros}
        return {leaf: make[leaf](key, shape[-1:], dtype) for leaf in leaves}, shape

    def forward(params, x, *, key=None):
        del key
        require_floats(name, x)
        if x.ndim < 2:
            raise LayerError(
                name, f"got inputs of shape {show_shape(x.shape)}; it takes [N, ..., O]."
            )
        require_params(name, params, dict.fromkeys(leaves, x.shape[-1:]))
        require_floats(name, x, params["gain"].dtype)
        wide = widened(x)
        if centred:
            # The mean of large values is rounded. The second time it is the mean of small ones:
            # without it, the values of a constant row would come out near 1 or -1.
            wide = wide - mean(wide)
            wide = wide - mean(wide)
        r = jax.lax.rsqrt(mean(jnp.square(wide)) + eps)
        h = (wide * r).astype(x.dtype)
        y = h * params["gain"]
        return (y + params["bias"] if use_bias else y), (h, r)

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 2)
        h, r = cache
        require_params(name, params, dict.fromkeys(leaves, h.shape[-1:]))
        require_delta(name, dy, h.shape)
        readings = {"gain": read(Scale(h, dy))}
        if use_bias:
            readings["bias"] = read(Bias(dy))
        wide, dh = widened(h), widened(dy * params["gain"])
        dx = dh - wide * mean(dh * wide)
        if centred:
            dx = dx - mean(dh)
        return (r * dx).astype(dy.dtype), readings

    return Layer(name, init, forward, backward)
