"""Signals: the operands of a parameter's gradient, before anything is summed over the examples.

A backward sweep has two things in hand at every parameter, what came up to it and the error that
came down, and the gradient is a product of the two. A signal keeps them apart. From the pair one
reads the gradient, but just as well the gradient of every example, its norm, or a curvature
factor (see `readings`), and for far less than forming the gradient of each example first.

Layers are many, kinds of signal are few: whatever is read is written once per kind.
"""

from typing import NamedTuple

import jax


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


def keep(signal):
    """The reading that reads nothing: the signal itself, operands and all."""
    return signal
