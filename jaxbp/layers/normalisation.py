"""Normalisation: each example by its own mean and variance, then a gain and a bias for each output.

  h = (x - mean(x)) r,   r = 1 / sqrt(variance(x) + eps),   y = g h + b

What h does not see of x, its mean and its size, cannot come back either: with dh = g dy

  dx = r (dh - mean(dh) - h mean(dh h))

so that a layer keeps h and r. Layers differ in what the means are over. None of them is over
examples: batch normalisation, whose are, makes every example's output depend on all the others, and
there is then no gradient of one example, on which everything here rests.
"""

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxbp.require import (
    require_count,
    require_delta,
    require_floats,
    require_last_axis,
    require_leaves,
    require_positive,
)
from jaxbp.signals.kinds import Bias, Scale, keep
from jaxbp.types import Layer, LayerError, show_shape, widened


def layer_norm(*, eps=1e-5, use_bias=True, dtype=float):
    """Layer normalisation: at each position, over the outputs.

      dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

    Inputs are [N, ..., O]. Parameters are `{"gain": [O], "bias": [O]}`, without the bias if
    `use_bias` is false. Means of numbers of 16 bits are taken in 32.

    Args:
      eps: what is added to the variance; positive.
      use_bias: whether there is a b.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      ValueError: `eps` is not positive.
      LayerError: the inputs, or the parameters, do not fit.

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


def rms_norm(*, eps=1e-6, dtype=float):
    """Normalisation by the root mean square at each position, with no mean taken off and no bias.

      h = x r,   r = 1 / sqrt(mean(x^2) + eps),   dx = r (dh - h mean(dh h))

    Inputs are [N, ..., O], parameters `{"gain": [O]}`. Means of numbers of 16 bits are taken in 32.

    Args:
      eps: what is added to the mean square; positive.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      ValueError: `eps` is not positive.
      LayerError: the inputs, or the parameters, do not fit.

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


def group_norm(groups, *, eps=1e-5, use_bias=True, dtype=float):
    """Group normalisation: over all positions and the outputs of a group.

    The last axis is split into `groups` groups of neighbours, each of which has a mean and a
    variance over itself and all the positions of an example. Otherwise as `layer_norm`.

    Args:
      groups: how many; they have to divide O.
      eps: what is added to the variance; positive.
      use_bias: whether there is a b.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      ValueError: `groups` is not a positive integer, or `eps` not positive.
      LayerError: the inputs, or the parameters, do not fit.

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
    require_count("group_norm", "groups", groups)
    return _norm(f"group_norm({groups})", eps, use_bias, dtype, groups=groups)


def _norm(name, eps, use_bias, dtype, *, centred=True, groups=None):
    """A normalisation at each position, or over all of them in so many groups."""
    require_positive(name, "eps", eps)
    leaves = ("gain", "bias") if use_bias else ("gain",)

    def mean(x):
        """Over what is normalised together, of its own shape for what it is to be taken from."""
        if groups is None:
            return jnp.mean(x, axis=-1, keepdims=True)
        parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
        means = jnp.mean(parts, axis=(1, 3), keepdims=True)
        means = jnp.broadcast_to(means, (len(x), 1, groups, parts.shape[-1]))
        return means.reshape(len(x), *[1] * (x.ndim - 2), x.shape[-1])

    def require(params, shape):
        require_leaves(name, params, leaves)
        for leaf in leaves:
            if jnp.shape(params[leaf]) != shape[-1:]:
                raise LayerError(
                    name,
                    f"got inputs of shape {show_shape(shape)}, and a {leaf} of shape "
                    f"{show_shape(jnp.shape(params[leaf]))}; it takes [{shape[-1]}].",
                )

    def init(key, shape):
        shape = require_last_axis(name, shape, "O")
        if groups is not None and shape[-1] % groups:
            raise LayerError(name, f"got {shape[-1]} outputs, which {groups} groups do not divide.")
        make = {"gain": initializers.ones, "bias": initializers.zeros}
        return {leaf: make[leaf](key, shape[-1:], dtype) for leaf in leaves}, shape

    def forward(params, x, *, key=None):
        del key
        if jnp.ndim(x) < 2:
            raise LayerError(
                name, f"got inputs of shape {show_shape(jnp.shape(x))}; it takes [N, ..., O]."
            )
        require(params, jnp.shape(x))
        require_floats(name, x, params["gain"].dtype)
        wide = widened(x)
        if centred:
            wide = wide - mean(wide)
        r = jax.lax.rsqrt(mean(jnp.square(wide)) + eps)
        h = (wide * r).astype(x.dtype)
        y = h * params["gain"]
        return (y + params["bias"] if use_bias else y), (h, r)

    def backward(params, cache, dy, *, read=keep):
        h, r = cache
        require(params, h.shape)
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
