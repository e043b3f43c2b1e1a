"""Normalisation: each example by its own mean and variance, then a gain and a bias for each output.

Forward, with means over the values that are normalised together:

    h = (x - mean(x)) r,   r = 1 / sqrt(mean((x - mean(x))^2) + eps),   y = g h + b

Backward, with dh = g dy:

    dx = r (dh - mean(dh) - h mean(dh h))     dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

Shifting or scaling x does not change h (up to eps). The two means in dx therefore remove these
directions from dh. The cache is h and r.

The layers differ in which values are normalised together. None of them takes means over examples.
Batch normalisation does in training: the output of each example then depends on all examples of the
batch, and there is no per-example gradient. Its form for inference, with a mean and a variance that
are constants, is `fixed_norm`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.nn import initializers
from jax.typing import ArrayLike, DTypeLike

from jaxbp.require import (
    require_cache,
    require_count,
    require_delta,
    require_floats,
    require_last_axis,
    require_params,
    require_positive,
)
from jaxbp.sharding import gathered, reshaped
from jaxbp.signals.kinds import Bias, Scale, keep
from jaxbp.types import Layer, LayerError, show_shape, widened

__all__ = ["fixed_norm", "group_norm", "layer_norm", "rms_norm"]


def layer_norm(
    *,
    axes: int = 1,
    eps: float = 1e-5,
    use_gain: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = float,
) -> Layer:
    """Layer normalisation: the O values at each position are normalised together.

        h = (x - mean(x)) r,   r = 1 / sqrt(variance(x) + eps),   y = g h + b
        dx = r (dh - mean(dh) - h mean(dh h)) with dh = g dy
        dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

    Inputs are [N, ..., O]. Parameters are `{"gain": [O], "bias": [O]}`, without those that are
    switched off, and `()` without both. Means of 16-bit numbers are computed in 32 bits.

    The norms of each layer's gradients are `layer_norms`, a reading's.

    Args:
      axes: how many of the last axes are normalised together. With more than one, O is the product
        of their sizes, and entry o of the parameters belongs to entry o of these axes in row-major
        order. The parameters stay vectors, so that rules do not take them for weight matrices.
      eps: a positive number, added to the variance.
      use_gain: whether to multiply by a gain g.
      use_bias: whether to add a bias b.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `axes` is not a positive integer, or `eps` is not positive.
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
    name, standardisation = "layer_norm", _by_own_values("layer_norm", _mean, eps)
    return _norm(name, standardisation, use_gain, use_bias, dtype, axes=axes)


def rms_norm(
    *, axes: int = 1, eps: float = 1e-6, use_gain: bool = True, dtype: DTypeLike = float
) -> Layer:
    """Normalisation by the root mean square at each position, without a mean and without a bias.

        h = x r,   r = 1 / sqrt(mean(x^2) + eps),   y = g h
        dx = r (dh - h mean(dh h)) with dh = g dy     dE/dg = sum_nt h_nt dy_nt

    Inputs are [N, ..., O], parameters `{"gain": [O]}`, or `()` if `use_gain` is false. Means of
    16-bit numbers are computed in 32 bits.

    Args:
      axes: how many of the last axes are normalised together, as in `layer_norm`.
      eps: a positive number, added to the mean square.
      use_gain: whether to multiply by a gain g.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `axes` is not a positive integer, or `eps` is not positive.
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
    name, standardisation = "rms_norm", _by_own_values("rms_norm", _mean, eps, centred=False)
    return _norm(name, standardisation, use_gain, False, dtype, axes=axes)


def group_norm(
    groups: int,
    *,
    eps: float = 1e-5,
    use_gain: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = float,
) -> Layer:
    """Group normalisation: the values of a group of channels are normalised over all positions.

        h = (x - mean(x)) r,   r = 1 / sqrt(variance(x) + eps),   y = g h + b
        dx = r (dh - mean(dh) - h mean(dh h)) with dh = g dy
        dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

    The last axis is split into `groups` groups of neighbouring channels. The mean and the variance
    of each group are taken over its channels and all positions of an example. One group gives layer
    normalisation of whole images. As many groups as channels give instance normalisation: 64
    channels take `group_norm(64)`, or `group_norm(64, use_gain=False, use_bias=False)` to do
    without parameters.

    Inputs are [N, ..., O]. Parameters are `{"gain": [O], "bias": [O]}`, without those that are
    switched off, and `()` without both. Means of 16-bit numbers are computed in 32 bits.

    Args:
      groups: the number of groups, which must divide O.
      eps: a positive number, added to the variance.
      use_gain: whether to multiply by a gain g.
      use_bias: whether to add a bias b.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `groups` is not a positive integer, or `eps` is not positive.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Group Normalization", Wu, He, 2018.
      "Instance Normalization: The Missing Ingredient for Fast Stylization", Ulyanov, Vedaldi,
      Lempitsky, 2016.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.group_norm(2)
      >>> params, _ = layer.init(jax.random.key(0), (5, 4))
      >>> y, _ = layer.forward(params, jax.random.normal(jax.random.key(1), (1, 5, 4)))
      >>> [abs(round(float(y[..., part].mean()), 3)) for part in (slice(2), slice(2, 4))]
      [0.0, 0.0]
    """
    groups = require_count("group_norm", "groups", groups)
    name = f"group_norm({groups})"

    def mean(x):
        n, *positions, o = x.shape
        parts = reshaped(x, math.prod(positions), groups, o // groups)
        means = jnp.mean(parts, axis=(1, 3), keepdims=True)
        means = jnp.broadcast_to(means, (n, 1, groups, o // groups))
        return reshaped(means, *[1] * len(positions), o)

    def require_groups(o):
        if o % groups:
            raise LayerError(
                name, f"got inputs of {o} channels, not a multiple of {groups} groups."
            )

    standardisation = _by_own_values(name, mean, eps)
    return _norm(name, standardisation, use_gain, use_bias, dtype, require_features=require_groups)


def fixed_norm(
    mean: ArrayLike,
    variance: ArrayLike,
    *,
    eps: float = 1e-5,
    use_gain: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = float,
) -> Layer:
    """Normalisation by a mean and a variance that are constants, such as those of a data set.

        h = (x - mean) r,   r = 1 / sqrt(variance + eps),   y = g h + b
        dx = r g dy     dE/dg = sum_nt h_nt dy_nt     dE/db = sum_nt dy_nt

    This is batch normalisation at inference, with its running mean and variance. Use it to train on
    from a network that has them. Gain and bias are parameters; the two constants are not trained.

    Inputs are [N, ..., O]. Parameters are `{"gain": [O], "bias": [O]}`, without those that are
    switched off, and `()` without both. Numbers of 16 bits are normalised in 32.

    Args:
      mean: the mean of each output, [O].
      variance: its variance, [O], not negative.
      eps: a positive number, added to the variance.
      use_gain: whether to multiply by a gain g.
      use_bias: whether to add a bias b.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `eps` is not positive, `mean` and `variance` are not two vectors of one length, or
        a variance is negative.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
      Shift", Ioffe, Szegedy, 2015: the inference of algorithm 2.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 50.0]])
      >>> layer = bp.fixed_norm(jnp.mean(x, axis=0), jnp.var(x, axis=0))
      >>> params, _ = layer.init(jax.random.key(0), (2,))
      >>> layer.forward(params, x)[0].round(3).tolist()
      [[-1.0, -1.0], [1.0, 1.0]]
    """
    name = "fixed_norm"
    require_positive(name, "eps", eps)
    eps = float(eps)
    if np.ndim(mean) != 1 or np.shape(mean) != np.shape(variance):
        raise ValueError(
            f"{name}: mean has shape {show_shape(np.shape(mean))} and variance "
            f"{show_shape(np.shape(variance))}; it takes two vectors, [O] each."
        )
    if not isinstance(variance, Tracer) and not np.all(np.asarray(variance) >= 0):
        raise ValueError(
            f"{name}: variance has entries below zero or undefined; it takes numbers from 0."
        )
    (features,) = np.shape(mean)

    def r(dtype):
        return jax.lax.rsqrt(jnp.asarray(variance, dtype) + eps)

    def require_constants(o):
        if o != features:
            raise LayerError(
                name, f"got inputs of {o} features; its mean and variance are of {features}."
            )

    def forward(x):
        return (x - jnp.asarray(mean, x.dtype)) * r(x.dtype), ()

    def backward(kept, h, dh):
        del kept, h
        return r(dh.dtype) * dh

    standardisation = _Standardisation(forward, backward)
    return _norm(
        name, standardisation, use_gain, use_bias, dtype, require_features=require_constants
    )


class _Standardisation(NamedTuple):
    """What a normalisation is before its gain and bias; all arrays have at least 32 bits.

    Attributes:
      forward: `forward(x) -> (h, kept)`, with h of x's shape.
      backward: `backward(kept, h, dh) -> dx`.
    """

    forward: Callable[[jax.Array], tuple[jax.Array, Any]]
    backward: Callable[[Any, jax.Array, jax.Array], jax.Array]


def _by_own_values(
    name: str, mean: Callable[[jax.Array], jax.Array], eps: float, *, centred: bool = True
) -> _Standardisation:
    """Standardises values by their own mean, if `centred`, and their own mean square.

    `mean` is taken over the values that are normalised together, in a shape that broadcasts to x.
    """
    require_positive(name, "eps", eps)
    eps = float(eps)

    def forward(x):
        if centred:
            # The mean of large values is rounded. The second time it is the mean of small ones:
            # without it, the values of a constant row would come out near 1 or -1.
            x = x - mean(x)
            x = x - mean(x)
        r = jax.lax.rsqrt(mean(jnp.square(x)) + eps)
        return x * r, r

    def backward(r, h, dh):
        dx = dh - h * mean(dh * h)
        if centred:
            dx = dx - mean(dh)
        return r * dx

    return _Standardisation(forward, backward)


def _mean(x: jax.Array) -> jax.Array:
    """The mean over the last axis, [..., 1]."""
    return jnp.mean(x, axis=-1, keepdims=True)


def _norm(
    name: str,
    standardisation: _Standardisation,
    use_gain: bool,
    use_bias: bool,
    dtype: DTypeLike,
    *,
    axes: int = 1,
    require_features: Callable[[int], None] = lambda o: None,
) -> Layer:
    """Standardises, then multiplies by a gain and adds a bias, a vector [O] each.

    The last `axes` axes are taken as one of O entries. `require_features(o)` raises if O does not
    fit.
    """
    axes = require_count(name, "axes", axes)
    make = {}
    if use_gain:
        make["gain"] = initializers.ones
    if use_bias:
        make["bias"] = initializers.zeros

    def rows(x):
        """Reshapes the axes that are normalised together to one, [N, ..., O]."""
        return x.reshape(*x.shape[:-axes], math.prod(x.shape[-axes:]))

    def require_fitting(params, shape):
        """Raises unless inputs of this shape, with N or its letter, and parameters fit."""
        if len(shape) <= axes:
            takes = "takes [N, ..., O]"
            if axes > 1:
                takes = f"normalises the last {axes} axes of an example"
            raise LayerError(name, f"got inputs of shape {show_shape(shape)}; it {takes}.")
        o = math.prod(shape[-axes:])
        require_features(o)
        if make:
            require_params(name, params, dict.fromkeys(make, (o,)))

    def init(key, shape):
        shape = require_last_axis(name, shape, "O")
        o = (math.prod(shape[-axes:]),)
        params = {leaf: initialiser(key, o, dtype) for leaf, initialiser in make.items()}
        require_fitting(params, ("N", *shape))
        return params or (), shape

    def forward(params, x, *, key=None):
        del key
        require_floats(name, x)
        require_fitting(params, x.shape)
        require_floats(name, x, next((params[leaf].dtype for leaf in make), None))
        params = gathered(params, x)
        h, kept = standardisation.forward(widened(rows(x)))
        y = h = h.astype(x.dtype)
        if use_gain:
            y = y * params["gain"]
        if use_bias:
            y = y + params["bias"]
        return y.reshape(x.shape), (h.reshape(x.shape), kept)

    def backward(params, cache, dy, *, read=keep):
        require_cache(name, cache, 2)
        h, kept = cache
        require_fitting(params, h.shape)
        require_delta(name, dy, h.shape)
        params = gathered(params, dy)
        h, dh, readings = rows(h), rows(dy), {}
        if use_bias:
            readings["bias"] = read(Bias(dh))
        if use_gain:
            readings["gain"] = read(Scale(h, dh))
            dh = dh * params["gain"]
        dx = standardisation.backward(kept, widened(h), widened(dh)).astype(dy.dtype)
        return dx.reshape(dy.shape), readings or ()

    return Layer(name, init, forward, backward)
