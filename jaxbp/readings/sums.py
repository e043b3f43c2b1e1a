"""Readings: what can be read off the operands of a gradient.

A reading takes the signal of one parameter and returns an array, or a tree of them. Applied inside
the sweep (`backward(..., read=mean)`) it turns each signal into its answer on the spot, and the
operands need not outlive their layer. Several readings of one sweep are a dict of them
(see `backprop`).

Each is written here once for every kind of signal, with g_n the gradient of example n's own loss
with respect to the parameter:

  total          sum_n g_n             [shape of the parameter]
  mean           sum_n g_n / N         [shape of the parameter]
  per_example    g_n                   [N, shape of the parameter]
  sq_norms       |g_n|^2               [N]

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
  >>> bp.per_example(signal)[..., 0].tolist()
  [[3.0, 6.0], [0.0, 4.0]]
  >>> bp.mean(signal)[:, 0].tolist(), bp.sq_norms(signal).tolist()
  ([1.5, 5.0], [45.0, 16.0])

Sources:
  "Efficient Per-Example Gradient Computations", Goodfellow, 2015: |x d^T|^2 = |x|^2 |d|^2.
  "Large Language Models Can Be Strong Differentially Private Learners", Li, Tramer, Liang,
  Hashimoto, 2021: the same with positions.
  "Scalable and Efficient Training of Large Convolutional Neural Networks with Differential
  Privacy", Bu, Mao, Xu, 2022: the choice between the two ways to compute it.
  "Efficient Per-Example Gradient Computations in Convolutional Neural Networks", Rochette, Manoel,
  Tramel, 2019: that a kernel's gradient of each example is a convolution again.
"""

import functools

import jax
import jax.numpy as jnp

from jaxbp.readings.costs import by_place_is_less_work
from jaxbp.signals.conv_patches import as_kernel, map_place_gradients, patched, windowed
from jaxbp.signals.conv_products import exchanged, kernel_gradient
from jaxbp.signals.kinds import (
    Bias,
    Conv,
    Lookup,
    Outer,
    Scale,
    as_positions,
    as_rows,
    is_signal,
    not_a_signal,
)
from jaxbp.types import weighed


@functools.singledispatch
def total(signal, *, weights=None) -> jax.Array:
    """The sum over examples, sum_n w_n g_n, of the parameter's shape.

    Args:
      signal: the operands of one parameter.
      weights: w, [N]; 1 if there are none.

    Raises:
      TypeError: `signal` is not of a kind known here.
      ValueError: `weights` is not of shape [N].
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


def mean(signal, *, weights=None) -> jax.Array:
    """The mean over examples, sum_n w_n g_n / sum_n w_n, of the parameter's shape.

      weights=None       sum_n g_n / N
      all weights zero   zero

    Args:
      signal: the operands of one parameter.
      weights: w, [N], not negative.

    Raises:
      TypeError: `signal` is not of a kind known here.
      ValueError: `weights` is not of shape [N].
    """
    # A sum is linear in the deltas, and they are smaller than what they are multiplied into.
    if not is_signal(signal):
        raise not_a_signal("mean", signal)
    if weights is None:
        n = len(signal.deltas)
        return total(signal, weights=jnp.full(n, 1 / n, signal.deltas.dtype))
    norm = jnp.sum(weights)
    return total(signal, weights=jnp.where(norm == 0, 0, weights / jnp.where(norm == 0, 1, norm)))


@functools.singledispatch
def per_example(signal) -> jax.Array:
    """The gradient of each example, g_n, [N, shape of the parameter].

    Raises:
      TypeError: `signal` is not of a kind known here.
    """
    raise not_a_signal("per_example", signal)


@per_example.register
def _(signal: Outer):
    x, d = as_positions(signal.inputs), as_positions(signal.deltas)
    if x.shape[1] == 1:
        # A product that broadcasts: a batch of matrix products of rank one is far slower on a CPU.
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
