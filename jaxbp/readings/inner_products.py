"""Inner products of gradients: which examples change the parameters in similar directions.

With g_n the gradient of example n's own loss with respect to all parameters:

    gram                      g_n . g_m    [N, M]   between examples, of one batch or of two
    directional_derivatives   g_n . v      [N]      along a direction v, a tree like the parameters

Both compute the products from the operands and form per-example gradients only where that is
cheaper. They take the tree of signals that a sweep with `read=keep` returns, a part of this tree,
or one signal, and sum over the parameters in it.

Sources:
  "Estimating Training Data Influence by Tracing Gradient Descent", Pruthi, Liu, Kale,
  Sundararajan, 2020: inner products of gradients as the influence of training examples.
  "Data Shapley in One Training Run", Wang, Mittal, Song, Jia, 2024: inner products from operands.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.readings.costs import by_place_is_less_work, gram_is_less_work, likely_size
from jaxbp.readings.sums import per_example, total
from jaxbp.sharding import everywhere, placement
from jaxbp.signals.conv_patches import patched, windowed
from jaxbp.signals.conv_products import convolve, exchanged
from jaxbp.signals.kinds import (
    Conv,
    Lookup,
    Outer,
    Signal,
    Sum,
    Through,
    as_positions,
    formula_of,
    is_signal,
    map_signals,
    rows_of,
    widen,
)
from jaxbp.signals.operands import require_kind, require_signal
from jaxbp.signals.stacked import sum_leaves
from jaxbp.types import PyTree, show_shape, widened

__all__ = ["directional_derivatives", "gram"]


def gram(signals: PyTree, other: PyTree | None = None) -> jax.Array:
    """Computes the inner products of the gradients of examples, g_n . g_m, over all parameters.

    A large product means that a step on one example also lowers the loss of the other.

        weight matrix      (x_n . x_m) (d_n . d_m)
        with positions     sum_ts (x_nt . x_ms) (d_nt . d_ms), or the product of the gradients,
                           whichever is less work (`gram_is_less_work`)
        kernel             as a weight matrix shared by patches, or the product of the gradients
        table              the pairs of positions that look up the same row, or the product of the
                           gradients
        bias, gain         the product of the gradients

    Numbers of 16 bits are accumulated in 32. If the examples are divided over devices, each device
    needs the operands of all: they are gathered.

    Args:
      signals: a tree of signals, of N examples.
      other: a tree of signals of M other examples, from the same network. Without it, the products
        are between the N examples.

    Returns:
      An array [N, M].

    Raises:
      TypeError: a leaf is not a signal.
      ValueError: the operands of a signal do not fit each other, the two trees are of different
        networks, or there are no signals.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
      >>> bp.gram(signal).tolist()
      [[45.0, 24.0], [24.0, 16.0]]
    """
    first = _wide_signals("gram", signals)
    if other is None:
        return sum_leaves(map_signals(lambda one: _gram(one, everywhere(one)), first))
    second = _wide_signals("gram", other)
    if _parameters_of(first) != _parameters_of(second):
        raise ValueError(
            "gram: the signals are not of the same network: their parameters have shapes "
            f"{_parameters_of(first)[1]} and {_parameters_of(second)[1]}."
        )
    return sum_leaves(map_signals(lambda one, two: _gram(one, everywhere(two)), first, second))


def _gram_of_formed(signal: Signal, other: Signal) -> jax.Array:
    """The inner products of gradients that are formed for each example."""
    if own := formula_of(signal, "gram"):
        return own(other)
    gradients, others = per_example(signal), per_example(other)
    return gradients.reshape(gradients.shape[0], -1) @ others.reshape(others.shape[0], -1).T


_gram = functools.singledispatch(_gram_of_formed)


@_gram.register
def _(signal: Outer, other):
    x, d = as_positions(signal.inputs), as_positions(signal.deltas)
    z, e = as_positions(other.inputs), as_positions(other.deltas)
    (n, t, i), o, (m, s) = x.shape, d.shape[-1], z.shape[:2]
    if t == s == 1:
        return (x[:, 0] @ z[:, 0].T) * (d[:, 0] @ e[:, 0].T)
    n, m = likely_size(n), likely_size(m)
    rows = n * t if other is signal else n * t + m * s
    if gram_is_less_work(i, o, pairs=n * t * m * s, rows=rows, products=n * m):
        return jnp.sum(
            jnp.einsum("nti,msi->nmts", x, z) * jnp.einsum("nto,mso->nmts", d, e), axis=(2, 3)
        )
    return _gram_of_formed(signal, other)


@_gram.register
def _(signal: Lookup, other):
    d, e = as_positions(signal.deltas), as_positions(other.deltas)
    (n, t, _), (m, s, _) = d.shape, e.shape
    if t * s < len(signal.table):
        rows, others = rows_of(signal).reshape(n, 1, t, 1), rows_of(other).reshape(1, m, 1, s)
        same = (rows == others) & (rows < len(signal.table))
        return jnp.sum(jnp.where(same, jnp.einsum("nto,mso->nmts", d, e), 0), axis=(2, 3))
    return _gram_of_formed(signal, other)


@_gram.register
def _(signal: Conv, other):
    # Where Gram matrices do not pay for a norm, they pay even less for products with many others.
    if by_place_is_less_work(signal):
        return _gram_of_formed(signal, other)
    first = patched(signal)
    if other is signal:
        return jnp.sum(jax.vmap(lambda outer: _gram(outer, outer))(first), axis=0)
    return jnp.sum(jax.vmap(_gram)(first, patched(other)), axis=0)


@_gram.register
def _(signal: Through, other):
    if signal.back.moves:
        same = other is signal
        return _gram(signal.signal, signal.signal if same else other.signal)
    return _gram_of_formed(signal, other)


def directional_derivatives(signals: PyTree, direction: PyTree) -> jax.Array:
    """Computes the derivative of each example's loss along a direction of the parameters, g_n . v.

    With `direction` a gradient, it tells by how much a step along it changes each example's loss.

    For a weight matrix it is sum_t (V^T x_nt) . d_nt. It costs one more product of the size of the
    forward pass; for a kernel, one more convolution. Numbers of 16 bits are accumulated in 32.

    Args:
      signals: a tree of signals, of N examples.
      direction: v, a tree like the parameters, with one array for each signal.

    Returns:
      An array [N].

    Raises:
      TypeError: a leaf is not a signal.
      ValueError: the operands of a signal do not fit each other, the direction is not a tree like
        the parameters, or there are no signals.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
      >>> bp.directional_derivatives(signal, bp.mean(signal)).tolist()
      [34.5, 20.0]
    """
    signals = _wide_signals("directional_derivatives", signals)
    structure, shapes = _parameters_of(signals)
    got = ", ".join(show_shape(jnp.shape(leaf)) for leaf in jax.tree.leaves(direction))
    if (jax.tree.structure(direction), got) != (structure, shapes):
        raise ValueError(
            "directional_derivatives: the direction is not a tree like the parameters, which have "
            f"shapes {shapes}; it has {got or 'no leaves'}."
        )
    return sum_leaves(map_signals(_along, signals, jax.tree.map(widened, direction)))


def _along_formed(signal: Signal, direction: jax.Array) -> jax.Array:
    """The products of a direction with gradients that are formed for each example."""
    gradients = per_example(signal)
    return gradients.reshape(gradients.shape[0], -1) @ direction.ravel()


_along = functools.singledispatch(_along_formed)


@_along.register
def _(signal: Outer, direction):
    x, d = as_positions(signal.inputs), as_positions(signal.deltas)
    return jnp.sum((x @ direction) * d, axis=(1, 2))


@_along.register
def _(signal: Lookup, direction):
    deltas = as_positions(signal.deltas)
    after = placement(deltas, (deltas, 0), None, (deltas, -1))
    rows = direction.at[rows_of(signal)].get(mode="fill", fill_value=0, out_sharding=after)
    return jnp.sum(rows * deltas, axis=(1, 2))


@_along.register
def _(signal: Conv, direction):
    x, y = windowed(signal)
    geometry = signal.geometry
    if geometry.transposed:
        direction = exchanged(direction, geometry.groups)
    moved = convolve(x.reshape(-1, *x.shape[2:]), direction, geometry)
    return jnp.sum((moved.reshape(y.shape) * y).reshape(y.shape[0], -1), axis=1)


@_along.register
def _(signal: Through, direction):
    if signal.back.moves:
        return _along(signal.signal, signal.back.take(direction))
    return _along_formed(signal, direction)


@_along.register
def _(signal: Sum, direction):
    return functools.reduce(jnp.add, (_along(use, direction) for use in signal.signals))


def _wide_signals(name: str, tree: PyTree) -> PyTree:
    """Converts a tree of signals to at least 32 bits; raises if a leaf is not a signal that fits.

    In a stack, operands fit one layer at a time.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_signal)
    if not leaves:
        raise ValueError(f"{name}: there are no signals in the tree. Has the network parameters?")
    for leaf in leaves:
        require_kind(name, leaf)
    jax.eval_shape(lambda tree: map_signals(lambda s: require_signal(name, s), tree), tree)
    return jax.tree.map(widen, tree, is_leaf=is_signal)


def _parameters_of(signals: PyTree) -> tuple[Any, str]:
    """The structure of the parameters that signals belong to, and their shapes for messages."""
    parameters = jax.eval_shape(lambda tree: map_signals(total, tree), signals)
    shapes = [leaf.shape for leaf in jax.tree.leaves(parameters)]
    return jax.tree.structure(parameters), ", ".join(map(show_shape, shapes))
