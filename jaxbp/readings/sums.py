"""Sums: the gradient of a parameter, summed over the examples, averaged, or per example.

With g_n the gradient of example n's own loss with respect to the parameter, and w_n its weight:

    total          sum_n w_n g_n                  [shape of the parameter]
    mean           sum_n w_n g_n / sum_n w_n      [shape of the parameter]
    per_example    g_n                            [N, shape of the parameter]

These are readings: each takes the signal of one parameter and returns an array. Pass a reading to
the backward pass, `backward(..., read=mean)`, and it is applied to each signal as soon as the
signal exists, so that the operands need not outlive their layer. To compute several readings in one
backward pass, give `backprop` a dict of them.

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
  >>> bp.per_example(signal)[..., 0].tolist()
  [[3.0, 6.0], [0.0, 4.0]]
  >>> bp.total(signal)[:, 0].tolist(), bp.mean(signal)[:, 0].tolist()
  ([3.0, 10.0], [1.5, 5.0])

Source:
  "Efficient Per-Example Gradient Computations in Convolutional Neural Networks", Rochette, Manoel,
  Tramel, 2019: each example's gradient of a kernel is a convolution again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbp.readings.costs import by_place_is_less_work, likely_size, one_by_one_is_less_work
from jaxbp.sharding import of_each_example, placement, reshaped, summed_products
from jaxbp.signals.conv_patches import (
    as_kernel,
    map_examples,
    map_place_gradients,
    patched,
    windowed,
)
from jaxbp.signals.conv_products import exchanged, kernel_gradient
from jaxbp.signals.kinds import (
    Bias,
    Conv,
    Lookup,
    Outer,
    Scale,
    Signal,
    Sum,
    Through,
    as_positions,
    as_rows,
    formula_of,
    rows_of,
    widen,
)
from jaxbp.signals.operands import count_examples, dtype_of, require_signal
from jaxbp.types import weighed, wide_dtype, widened

__all__ = ["mean", "per_example", "total"]


def total(signal: Signal, *, weights: ArrayLike | None = None) -> jax.Array:
    """Computes the sum of the gradients over the examples, sum_n w_n g_n.

    For a weight matrix it is one matrix product, X^T diag(w) D, over examples and positions.
    Numbers of 16 bits are weighed and accumulated in 32, and the sum is rounded to 16.

    Args:
      signal: the operands of one parameter.
      weights: w, [N]; without it, each weight is 1.

    Returns:
      An array of the parameter's shape.

    Raises:
      TypeError: `signal` is not a signal.
      ValueError: `weights` is not of shape [N], or the operands do not fit each other.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bias = bp.Bias(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> bp.total(bias).tolist(), bp.total(bias, weights=jnp.array([1.0, 0.0])).tolist()
      ([4.0, 6.0], [1.0, 2.0])
    """
    require_signal("total", signal)
    return wide_total(signal, weights=weights).astype(dtype_of(signal))


@functools.singledispatch
def wide_total(signal: Signal, *, weights: ArrayLike | None = None) -> jax.Array:
    """The `total` in at least 32 bits; for operands of 16 bits, before it is rounded to them."""
    signal = widen(signal)
    if own := formula_of(signal, "total"):
        return own(None if weights is None else jnp.asarray(weights))
    return jnp.sum(weighed(_formed(signal), weights), axis=0)


@wide_total.register
def _(signal: Outer, *, weights=None):
    x, d = signal.inputs, signal.deltas
    if weights is not None:
        x, d = widened(x), weighed(d, weights)
    return summed_products(x, d, wide_dtype(dtype_of(signal)))


@wide_total.register
def _(signal: Bias, *, weights=None):
    return jnp.sum(as_rows(widened(weighed(signal.deltas, weights))), axis=0)


@wide_total.register
def _(signal: Scale, *, weights=None):
    products = widened(signal.inputs) * widened(weighed(signal.deltas, weights))
    return jnp.sum(as_rows(products), axis=0)


@wide_total.register
def _(signal: Lookup, *, weights=None):
    deltas = as_rows(widened(weighed(signal.deltas, weights)))
    zeros = jnp.zeros((len(signal.table), deltas.shape[-1]), deltas.dtype)
    after = placement(deltas, None, (deltas, -1))
    return zeros.at[rows_of(signal).ravel()].add(deltas, mode="drop", out_sharding=after)


@wide_total.register
def _(signal: Conv, *, weights=None):
    signal = signal._replace(
        inputs=widened(signal.inputs), deltas=widened(weighed(signal.deltas, weights))
    )
    x, y = (a.reshape(-1, *a.shape[2:]) for a in windowed(signal))
    gradient = kernel_gradient(x, y, signal.geometry)
    if signal.geometry.transposed:
        gradient = exchanged(gradient, signal.geometry.groups)
    return gradient


@wide_total.register
def _(signal: Through, *, weights=None):
    return signal.back(wide_total(signal.signal, weights=weights))


@wide_total.register
def _(signal: Sum, *, weights=None):
    return functools.reduce(jnp.add, (wide_total(use, weights=weights) for use in signal.signals))


def sum_of(gradients: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The sum of formed gradients [N, ...], weighted or not, in their dtype.

    It is the product of a vector and a matrix: XLA's CPU compiler takes ten times as long for a sum
    over the first axis.
    """
    shape = gradients.shape[1:]
    rows = reshaped(gradients, math.prod(shape))
    ones = jnp.ones_like(rows[:, :1])
    weights = ones if weights is None else weighed(ones, weights)
    return summed_products(weights, rows).reshape(shape)


def mean(signal: Signal, *, weights: ArrayLike | None = None) -> jax.Array:
    """Computes the mean of the gradients over the examples, sum_n w_n g_n / sum_n w_n.

    This is the gradient of the mean loss, the one that an optimizer takes.

        weights=None       sum_n g_n / N
        all weights zero   zero

    Args:
      signal: the operands of one parameter.
      weights: w, [N], not negative.

    Returns:
      An array of the parameter's shape.

    Raises:
      TypeError: `signal` is not a signal.
      ValueError: `weights` is not of shape [N], or the operands do not fit each other.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bias = bp.Bias(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> bp.mean(bias).tolist(), bp.mean(bias, weights=jnp.array([3.0, 1.0])).tolist()
      ([2.0, 3.0], [1.5, 2.5])
    """
    require_signal("mean", signal)
    dtype = dtype_of(signal)
    if weights is None:
        n, deltas = count_examples(signal), getattr(signal, "deltas", None)
        # The sum is linear in the deltas: the smaller array of the two is divided, which a product
        # may have to copy.
        if deltas is not None and jnp.finfo(dtype).bits >= 32:
            shape = jax.eval_shape(wide_total, signal).shape
            if math.prod(shape) >= math.prod(map(likely_size, deltas.shape)):
                return wide_total(signal, weights=jnp.full(n, 1 / n, dtype))
        return (wide_total(signal) / n).astype(dtype)
    weights = jnp.asarray(weights)
    norm = jnp.sum(widened(weights))
    shares = jnp.where(norm == 0, 0, widened(weights) / jnp.where(norm == 0, 1, norm))
    return wide_total(signal, weights=shares).astype(dtype)


def per_example(signal: Signal) -> jax.Array:
    """Computes the gradient of each example, g_n.

    It needs N times the memory of the gradient. Where the norms of the gradients, their weighted
    sum or their inner products are enough, use `sq_norms`, `total(weights=...)` or `gram`.

    Args:
      signal: the operands of one parameter.

    Returns:
      An array [N, shape of the parameter].

    Raises:
      TypeError: `signal` is not a signal.
      ValueError: the operands do not fit each other.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
      >>> bp.per_example(signal).shape
      (2, 2, 1)
    """
    require_signal("per_example", signal)
    return _formed(widen(signal)).astype(dtype_of(signal))


@functools.singledispatch
def _formed(signal):
    """The gradient of each example, of operands of at least 32 bits."""
    return signal.per_example()


@_formed.register
def _(signal: Outer):
    x, d = as_positions(signal.inputs), as_positions(signal.deltas)
    if x.shape[1] == 1:
        # A broadcast product: a batch of rank-one matrix products is far slower on a CPU.
        return x[:, 0, :, None] * d[:, 0, None, :]
    return jnp.einsum("nti,nto->nio", x, d)


@_formed.register
def _(signal: Bias):
    return jnp.sum(as_positions(signal.deltas), axis=1)


@_formed.register
def _(signal: Scale):
    return jnp.sum(as_positions(signal.inputs * signal.deltas), axis=1)


@_formed.register
def _(signal: Lookup):
    deltas = as_positions(signal.deltas)
    zeros = jnp.zeros((len(signal.table), deltas.shape[-1]), deltas.dtype)
    return jax.vmap(lambda rows, d: zeros.at[rows].add(d, mode="drop"))(rows_of(signal), deltas)


@_formed.register
def _(signal: Conv):
    if not one_by_one_is_less_work(signal):
        return _formed_by_parts(signal)
    return lax.platform_dependent(
        signal,
        cpu=lambda signal: map_examples(lambda gradient: gradient, signal)[1],
        default=_formed_by_parts,
    )


def _formed_by_parts(signal):
    """The gradients of a kernel, from those of its places or groups."""
    if by_place_is_less_work(signal):
        gradients = jnp.moveaxis(map_place_gradients(lambda g: g, signal), 0, 2)
    else:
        gradients = jax.vmap(_formed)(patched(signal))
    return as_kernel(gradients, signal.geometry)


@_formed.register
def _(signal: Through):
    return of_each_example(signal.back, _formed(signal.signal))


@_formed.register
def _(signal: Sum):
    return functools.reduce(jnp.add, map(_formed, signal.signals))
