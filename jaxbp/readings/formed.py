"""Formed gradients: what readings share of the gradients that norms are computed from.

Where the norms of a parameter's gradients cost less from the gradients, g_n, than from Gram
matrices (`costs`), the gradients are there for sums too. A sum then takes an addition for each
entry, instead of another product over all examples and positions.

    read_together    sum_n g_n and |g_n| in one backward pass
    formed           keeps g_n instead of its operands, until the weights of sum_n w_n g_n are known
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxbp.readings.costs import forming_is_less_work
from jaxbp.readings.norms import sq_norms, summed_and_measured
from jaxbp.readings.sums import mean, per_example, sum_of, total
from jaxbp.signals.kinds import Bias, Conv, Outer, Scale, Signal, Through, widen
from jaxbp.signals.operands import count_examples, dtype_of, gradient_shape, require_signal
from jaxbp.types import Reading


class Formed(NamedTuple):
    """The signal of a parameter of which the gradients are formed already.

    Attributes:
      gradients: g_n, [N, ...].
    """

    gradients: jax.Array

    def per_example(self) -> jax.Array:
        """The gradients."""
        return self.gradients

    def total(self, weights: jax.Array | None) -> jax.Array:
        """The sum of the weighted gradients."""
        return sum_of(self.gradients, weights)


def formed(signal: Signal, share: float = 1.25) -> Signal | Formed:
    """The reading that keeps the gradients of a signal if `is_small_formed`, or else the signal.

    Args:
      signal: the operands of one parameter.
      share: as for `is_small_formed`.
    """
    if not is_small_formed(signal, share):
        return signal
    if isinstance(signal, Through):
        return signal._replace(signal=formed(signal.signal, share))
    return Formed(per_example(widen(signal)))


def is_small_formed(signal: Signal, share: float) -> bool:
    """Whether the norms are computed from gradients that are small beside their operands.

    Args:
      signal: the operands of one parameter.
      share: how many numbers the gradients may have for each number of the operands.
    """
    require_signal("formed", signal)
    if isinstance(signal, Through):
        return signal.back.moves and is_small_formed(signal.signal, share)
    match signal:
        case Outer() | Conv() if forming_is_less_work(signal, with_sum=True):
            operands = signal.inputs, signal.deltas
        case Bias() | Scale() if signal.deltas.ndim > 2:
            operands = tuple(signal)
        case _:
            return False
    size = sum(math.prod(operand.shape[1:]) for operand in operands)
    return math.prod(gradient_shape(signal) or ()) <= share * size


def read_together(readings: Mapping[str, Reading], signal: Signal) -> dict[str, Any]:
    """Applies several readings to a signal; `mean`, `total` and `sq_norms` share the gradients."""
    asked = [id(reading) for reading in readings.values()]  # a reading need not be hashable
    shared = {}
    if id(sq_norms) in asked and (id(mean) in asked or id(total) in asked):
        shared = {id(reading): answer for reading, answer in _shared(signal).items()}
    return {
        name: shared[id(reading)] if id(reading) in shared else reading(signal)
        for name, reading in readings.items()
    }


def _shared(signal):
    """The results of the readings that share gradients; none if the norms need no gradients."""
    require_signal("sq_norms", signal)
    both = summed_and_measured(widen(signal))
    if both is None:
        return {}
    sums, (squares, unit) = both
    dtype = dtype_of(signal)
    return {
        total: sums.astype(dtype),
        mean: (sums / count_examples(signal)).astype(dtype),
        sq_norms: unit * (unit * squares),
    }
