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


KINDS = (Outer, Bias, Scale)


def is_signal(node):
    """Whether a node of a tree is a signal: `is_leaf` for trees of them."""
    return isinstance(node, KINDS)


def keep(signal):
    """The reading that reads nothing: the signal itself, operands and all."""
    return signal


def as_positions(x):
    """[N, ..., O] as [N, T, O], with T = 1 where there are no positions."""
    return x.reshape(len(x), -1, x.shape[-1])


def joined(signals):
    """One signal of several uses of the same parameter: their operands side by side, as positions.

    The gradient of a parameter is the sum over its uses, as it is over positions; the square of a
    sum is not the sum of the squares, and what is read has to see all of them.
    """
    operands = zip(*signals, strict=True)
    return type(signals[0])(
        *(jnp.concatenate(list(map(as_positions, x)), axis=1) for x in operands)
    )


def as_rows(x):
    """[N, ..., O] as [N T, O]."""
    return x.reshape(-1, x.shape[-1])


def not_a_signal(reading, signal):
    """The error of a reading that got something else than a signal of a kind that it knows."""
    return TypeError(
        f"{reading}: takes a signal ({', '.join(kind.__name__ for kind in KINDS)}), "
        f"one parameter's; got {type(signal).__name__}. Pass it as read={reading}, "
        "or map it over the tree of signals?"
    )
