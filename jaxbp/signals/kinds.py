"""Signals: the operands of a parameter's gradient, before anything is summed over the examples.

A backward sweep has two things in hand at every parameter, what came up to it and the error that
came down, and the gradient is a product of the two. A signal keeps them apart. From the pair one
reads the gradient, but just as well the gradient of every example, its norm, or a curvature
factor (see `readings`), and for far less than forming the gradient of each example first.

Layers are many, kinds of signal are few: whatever is read is written once per kind.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.signals.conv_windows import Geometry
from jaxbp.signals.stacked import map_layers


class Outer(NamedTuple):
    """The signal of a weight matrix [I, O]: dE_n/dW = sum_t inputs_nt deltas_nt^T.

    Attributes:
      inputs: what the matrix was applied to, [N, ..., I].
      deltas: the error at what it gave, [N, ..., O]. The axes between, if any, are positions.
    """

    inputs: jax.Array
    deltas: jax.Array


class Bias(NamedTuple):
    """The signal of a vector [O] that is added: dE_n/db = sum_t deltas_nt.

    Attributes:
      deltas: the error at the sum, [N, ..., O].
    """

    deltas: jax.Array


class Scale(NamedTuple):
    """The signal of a vector [O] that is multiplied with, entry by entry.

    dE_n/dg = sum_t inputs_nt deltas_nt.

    Attributes:
      inputs: what it was multiplied with, [N, ..., O].
      deltas: the error at the product, [N, ..., O].
    """

    inputs: jax.Array
    deltas: jax.Array


class Lookup(NamedTuple):
    """The signal of a table [V, O] of which rows are looked up.

    Row v of dE_n/dW is the sum of deltas_nt over the t with indices_nt = v.

    Attributes:
      indices: the rows, integers [N, ...].
      deltas: the error at them, [N, ..., O].
      table: V, as an array [V, 0] that holds nothing.
    """

    indices: jax.Array
    deltas: jax.Array
    table: jax.Array


class Conv(NamedTuple):
    """The signal of a kernel [*K, I / G, O]: dE_n/dW_k = sum_t inputs_nu deltas_nt^T.

    Here u is the position that the window at t sees at its place k (see `windows`); of a transposed
    convolution t are the positions of the inputs, and u those of the deltas.

    Attributes:
      inputs: the images, [N, ..., *S, I].
      deltas: the error at what the kernel gave, [N, ..., *S', O]. The axes that stand between, in
        both, are of images that share the kernel.
      geometry: where the windows lie.
    """

    inputs: jax.Array
    deltas: jax.Array
    geometry: Geometry


KINDS = (Outer, Bias, Scale, Lookup, Conv)


def is_signal(node):
    """Whether a node of a tree is a signal: `is_leaf` for trees of them."""
    return isinstance(node, KINDS)


def map_signals(function, signals, *rest):
    """What a function, such as a reading, gives for each of a tree of signals that were kept.

    A stack's layers are asked one by one, and their answers get L as first axis.

    Args:
      function: of a signal, and of what stands in its place in the other trees.
      signals: what a sweep with `read=keep` hands out, or a part of it.
      *rest: trees that begin with its structure.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.stack(bp.dense(2), 4)
      >>> params, _ = net.init(jax.random.key(0), (2,))
      >>> y, cache = net.forward(params, jnp.ones((5, 2)))
      >>> _, signals = net.backward(params, cache, y)
      >>> bp.map_signals(bp.sq_norms, signals).layers["weight"].shape
      (4, 5)
    """
    return map_layers(function, signals, *rest, is_leaf=is_signal)


def keep(signal):
    """The reading that reads nothing: the signal itself, operands and all."""
    return signal


def as_positions(x):
    """[N, ..., O] as [N, T, O], with T = 1 where there are no positions."""
    return x.reshape(len(x), -1, x.shape[-1])


def as_images(signal, x):
    """[N, ..., *S, C] of a convolution's signal as [N, T, *S, C], with T images that share it."""
    return x.reshape(len(x), -1, *x.shape[-1 - len(signal.geometry.kernel) :])


def joined(signals):
    """One signal of several uses of the same parameter: their operands side by side, as positions.

    The gradient of a parameter is the sum over its uses, as it is over positions; the square of a
    sum is not the sum of the squares, and what is read has to see all of them.
    """
    first = signals[0]
    if isinstance(first, Lookup):
        indices = [s.indices.reshape(len(s.indices), -1) for s in signals]
        deltas = [as_positions(s.deltas) for s in signals]
        return Lookup(jnp.concatenate(indices, 1), jnp.concatenate(deltas, 1), first.table)
    if isinstance(first, Conv):
        # Every use is an image of its own: side by side, windows would reach from one to the next.
        inputs = [as_images(s, s.inputs) for s in signals]
        deltas = [as_images(s, s.deltas) for s in signals]
        return Conv(jnp.concatenate(inputs, 1), jnp.concatenate(deltas, 1), first.geometry)
    operands = zip(*signals, strict=True)
    return type(first)(*(jnp.concatenate(list(map(as_positions, x)), axis=1) for x in operands))


def each_row_once(signal):
    """The same gradients, of which every example looks up each of its rows at one position.

    Where a row is looked up at several, one has the sum of the deltas; what is left over has
    deltas of zero. So with T positions the gradients are summed up in [N, T, O], not [N, V, O].
    """
    deltas = as_positions(signal.deltas)

    def merge(indices, deltas):
        rows, places = jnp.unique(indices, return_inverse=True, size=len(indices))
        return rows, jnp.zeros_like(deltas).at[places].add(deltas)

    rows, sums = jax.vmap(merge)(signal.indices.reshape(deltas.shape[:2]), deltas)
    return Lookup(rows, sums, signal.table)


def as_rows(x):
    """[N, ..., O] as [N T, O]."""
    return x.reshape(-1, x.shape[-1])


def not_a_signal(reading, signal):
    """The error of a reading that got something else than a signal of a kind that it knows."""
    return TypeError(
        f"{reading}: takes a signal ({', '.join(kind.__name__ for kind in KINDS)}), "
        f"one parameter's; got {type(signal).__name__}. Pass it as read={reading}, "
        f"or map_signals({reading}, signals) over a tree of them?"
    )
