"""Factors: a constant, a learned gain of each output, and a learned slope on the negative side."""

import math
import numbers

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbp.require import (
    require_delta,
    require_floats,
    require_last_axis,
    require_number,
    require_params,
    require_shape,
    require_shape_alone,
)
from jaxbp.sharding import gathered, reshaped
from jaxbp.signals.kinds import Scale, keep
from jaxbp.types import Layer, LayerError, shape_alone, show_shape

__all__ = ["layer_scale", "prelu", "scale"]


def scale(constant: float | jax.Array) -> Layer:
    """Multiplies by a constant, y = c x. dx = c dy.

    Args:
      constant: a number, or an array that broadcasts to one example, such as [O] for a factor of
        each output. It is converted to the dtype of the inputs.

    Raises:
      ValueError: `constant` is neither a finite number nor an array of floating-point numbers.
      LayerError: the constant does not broadcast to one example.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.scale(jnp.array([1.0, -2.0])).forward((), jnp.ones((1, 3, 2)))
      >>> y[0].tolist()
      [[1.0, -2.0], [1.0, -2.0], [1.0, -2.0]]
    """
    dtype = None if isinstance(constant, numbers.Real) else getattr(constant, "dtype", None)
    if dtype is None:
        constant = require_number("scale", "constant", constant)
    elif not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"scale: constant is an array of dtype {dtype}; it takes floating-point numbers."
        )
    factor_shape = jnp.shape(constant)
    name = f"scale({constant if dtype is None else show_shape(factor_shape)})"

    def require_fit(shape):
        shape = require_shape(name, shape)
        try:
            fits = jnp.broadcast_shapes(factor_shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(('N', *shape))}; its constant "
                f"{show_shape(factor_shape)} does not broadcast to one example.",
            )
        return shape

    def init(key, shape):
        del key
        return (), require_fit(shape)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        require_fit(x.shape[1:])
        return jnp.asarray(constant, x.dtype) * x, shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_delta(name, dy, require_shape_alone(name, cache))
        return jnp.asarray(constant, dy.dtype) * dy, ()

    return Layer(name, init, forward, backward)


def layer_scale(initial: float = 1e-5, *, dtype: DTypeLike = float) -> Layer:
    """A learned gain for each output, y = g x, with the same initial value for all.

        dE/dg = sum_nt x_nt dy_nt     dx = g dy

    Put at the end of a residual branch, with a small initial value, it lets deep networks begin
    near the identity. Inputs are [N, ..., O], parameters `{"gain": [O]}`.

    Args:
      initial: the initial value of g.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `initial` is not a finite number.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Going Deeper with Image Transformers", Touvron, Cord, Sablayrolles, Synnaeve, Jegou, 2021.

    Example:
      >>> import jax, jaxbp as bp
      >>> block = bp.residual(bp.layer_norm(), bp.dense(4), bp.layer_scale(0.1))
      >>> params, _ = block.init(jax.random.key(0), (4,))
      >>> [round(float(value), 2) for value in params[2]["gain"]]
      [0.1, 0.1, 0.1, 0.1]
    """
    initial = require_number("layer_scale", "initial", initial)
    name = f"layer_scale({initial})"

    def init(key, shape):
        del key
        shape = require_last_axis(name, shape, "O")
        return {"gain": jnp.full(shape[-1:], initial, dtype)}, shape

    def forward(params, x, *, key=None):
        del key
        gain = _require_fit(name, params, "gain", x, "inputs")
        return gain * x, x

    def backward(params, x, dy, *, read=keep):
        gain = _require_fit(name, params, "gain", x, "a cache")
        require_delta(name, dy, x.shape)
        return gain * dy, {"gain": read(Scale(x, dy))}

    return Layer(name, init, forward, backward)


def prelu(*, shared: bool = False, initial: float = 0.25, dtype: DTypeLike = float) -> Layer:
    """The leaky rectifier with a learned slope: y = x where x >= 0, else a x.

        dE/da = sum_nt min(x_nt, 0) dy_nt     dx = dy where x >= 0, else a dy

    Inputs are [N, ..., O], parameters `{"slope": [O]}`, or [1] if the slope is shared.

    Args:
      shared: whether all outputs have the same slope.
      initial: the initial value of a.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `initial` is not a finite number.
      LayerError: the inputs or the parameters do not fit.

    References:
      "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification",
      He, Zhang, Ren, Sun, 2015.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> params, _ = bp.prelu().init(jax.random.key(0), (3,))
      >>> y, _ = bp.prelu().forward(params, jnp.array([[-2.0, 0.0, 2.0]]))
      >>> y[0].tolist()
      [-0.5, 0.0, 2.0]
    """
    initial = require_number("prelu", "initial", initial)
    name = "prelu(shared=True)" if shared else "prelu"

    def init(key, shape):
        del key
        shape = require_last_axis(name, shape, "O")
        return {"slope": jnp.full((1,) if shared else shape[-1:], initial, dtype)}, shape

    def forward(params, x, *, key=None):
        del key
        slope = _require_fit(name, params, "slope", x, "inputs", shared)
        return jnp.where(x >= 0, x, slope * x), x

    def backward(params, x, dy, *, read=keep):
        slope = _require_fit(name, params, "slope", x, "a cache", shared)
        require_delta(name, dy, x.shape)
        signal = Scale(jnp.where(x >= 0, 0, x), dy)
        if shared:  # every value is a position
            signal = Scale(*(reshaped(operand, math.prod(x.shape[1:]), 1) for operand in signal))
        return jnp.where(x >= 0, dy, slope * dy), {"slope": read(signal)}

    return Layer(name, init, forward, backward)


def _require_fit(name, params, leaf, x, what, shared=False):
    """Returns the only parameter, [O] or [1], for x [N, ..., O]; raises unless they fit."""
    require_floats(name, x, what=what)
    shape = require_last_axis(name, x.shape[1:], "O")
    require_params(name, params, {leaf: (1,) if shared else shape[-1:]})
    require_floats(name, x, params[leaf].dtype, what=what)
    return gathered(params[leaf], x)
