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
from jax.typing import ArrayLike

from jaxbp.readings.costs import by_place_is_less_work
from jaxbp.signals.conv_patches import as_kernel, map_place_gradients, patched, windowed
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
    is_signal,
    not_a_signal,
)
from jaxbp.types import weighed

__all__ = ["mean", "per_example", "total"]


@functools.singledispatch
def total(signal: Signal, *, weights: ArrayLike | None = None) -> jax.Array:
    """Computes the sum of the gradients over the examples, sum_n w_n g_n.

    For a weight matrix it is one matrix product, X^T diag(w) D, over examples and positions.

    Args:
      signal: the operands of one parameter.
      weights: w, [N]; without it, each weight is 1.

    Returns:
      An array of the parameter's shape.

    Raises:
      TypeError: `signal` is not a signal of a known kind.
      ValueError: `weights` is not of shape [N].

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bias = bp.Bias(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> bp.total(bias).tolist(), bp.total(bias, weights=jnp.array([1.0, 0.0])).tolist()
      ([4.0, 6.0], [1.0, 2.0])
    """
    del weights
    raise not_a_signal("total", signal)


@total.register
def _(signal: Outer, *, weights=None):
    deltas = weighed(signal.deltas, weights)
    return as_rows(signal.inputs).T @ as_rows(deltas)


@total.register
def _(signal: Bias, *, weights=None):
    return jnp.sum(as_rows(weighed(signal.deltas, weights)), axis=0)


@total.register
def _(signal: Scale, *, weights=None):
    return jnp.sum(as_rows(signal.inputs * weighed(signal.deltas, weights)), axis=0)


@total.register
def _(signal: Lookup, *, weights=None):
    deltas = as_rows(weighed(signal.deltas, weights))
    zeros = jnp.zeros((len(signal.table), deltas.shape[-1]), deltas.dtype)
    return zeros.at[signal.indices.ravel()].add(deltas)


@total.register
def _(signal: Conv, *, weights=None):
    signal = signal._replace(deltas=weighed(signal.deltas, weights))
    x, y = (a.reshape(-1, *a.shape[2:]) for a in windowed(signal))
    gradient = kernel_gradient(x, y, signal.geometry)
    if signal.geometry.transposed:
        gradient = exchanged(gradient, signal.geometry.groups)
    return gradient


@total.register
def _(signal: Through, *, weights=None):
    return signal.back(total(signal.signal, weights=weights))


@total.register
def _(signal: Sum, *, weights=None):
    return functools.reduce(jnp.add, (total(use, weights=weights) for use in signal.signals))


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
      TypeError: `signal` is not a signal of a known kind.
      ValueError: `weights` is not of shape [N].

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bias = bp.Bias(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> bp.mean(bias).tolist(), bp.mean(bias, weights=jnp.array([3.0, 1.0])).tolist()
      ([2.0, 3.0], [1.5, 2.5])
    """
    if not is_signal(signal):
        raise not_a_signal("mean", signal)
    # The sum is linear in the deltas: the smaller array of the two is divided, which a product may
    # have to copy. A sum in 16 bits might overflow, so there it is always the deltas.
    if weights is None:
        n, deltas = len(signal.deltas), signal.deltas
        if jnp.finfo(deltas.dtype).bits >= 32:
            shape = jax.eval_shape(total, signal).shape
            if math.prod(shape) < deltas.size:
                return total(signal) / n
        return total(signal, weights=jnp.full(n, 1 / n, deltas.dtype))
    norm = jnp.sum(weights)
    return total(signal, weights=jnp.where(norm == 0, 0, weights / jnp.where(norm == 0, 1, norm)))


@functools.singledispatch
def per_example(signal: Signal) -> jax.Array:
    """Computes the gradient of each example, g_n.

    It needs N times the memory of the gradient. Where the norms of the gradients, their weighted
    sum or their inner products are enough, use `sq_norms`, `total(weights=...)` or `gram`.

    Args:
      signal: the operands of one parameter.

    Returns:
      An array [N, shape of the parameter].

    Raises:
      TypeError: `signal` is not a signal of a known kind.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
      >>> bp.per_example(signal).shape
      (2, 2, 1)
    """
    raise not_a_signal("per_example", signal)


@per_example.register
def _(signal: Outer):
    x, d = as_positions(signal.inputs), as_positions(signal.deltas)
    if x.shape[1] == 1:
        # A broadcast product: a batch of rank-one matrix products is far slower on a CPU.
        return x[:, 0, :, None] * d[:, 0, None, :]
    return jnp.einsum("nti,nto->nio", x, d)


@per_example.register
def _(signal: Bias):
    return jnp.sum(as_positions(signal.deltas), axis=1)


@per_example.register
def _(signal: Scale):
    return jnp.sum(as_positions(signal.inputs * signal.deltas), axis=1)


@per_example.register
def _(signal: Lookup):
    deltas = as_positions(signal.deltas)
    n, t, o = deltas.shape
    zeros = jnp.zeros((n, len(signal.table), o), deltas.dtype)
    return zeros.at[jnp.arange(n)[:, None], signal.indices.reshape(n, t)].add(deltas)


@per_example.register
def _(signal: Conv):
    if by_place_is_less_work(signal):
        gradients = jnp.moveaxis(map_place_gradients(lambda g: g, signal), 0, 2)
    else:
        gradients = jax.vmap(per_example)(patched(signal))
    return as_kernel(gradients, signal.geometry)


@per_example.register
def _(signal: Through):
    return jax.vmap(signal.back)(per_example(signal.signal))


@per_example.register
def _(signal: Sum):
    return functools.reduce(jnp.add, map(per_example, signal.signals))
