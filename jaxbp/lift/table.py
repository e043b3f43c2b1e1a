"""The table of uses: what `lift` made of each use of each parameter."""

import dataclasses
import math

from jaxbp.lift.model import Lifted
from jaxbp.lift.versions import source_of
from jaxbp.signals.kinds import Signal, Through, uses_of
from jaxbp.types import Layer

__all__ = ["UseOf", "Uses", "uses"]


@dataclasses.dataclass(frozen=True)
class UseOf:
    """One use of one parameter.

    Attributes:
      path: of the parameter in its tree; of several, if the value that is used is made of them.
      operation: the primitive of JAX, such as `dot_general`.
      signal: the kind of signal, such as `Outer`.
      bytes_per_example: what the norm of an example's gradient has to form, 0 for a structured one.
      source: file, line and function.
    """

    path: str
    operation: str
    signal: str
    bytes_per_example: int
    source: str


class Uses(tuple[UseOf, ...]):
    """All uses, as a tuple that prints as a table."""

    def __str__(self) -> str:
        """The table, a line for each use."""
        head = ("parameter", "operation", "signal", "norms", "source")
        rows = [
            (
                use.path,
                use.operation,
                use.signal,
                f"by example, {use.bytes_per_example:,} B"
                if use.bytes_per_example
                else "structured",
                use.source,
            )
            for use in self
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join(lines)


def uses(net: Layer) -> Uses:
    """The uses of every parameter of a lifted layer: operation, kind of signal, place in the code.

    Use it to see whether norms are computed from operands, or whether the gradient of each example
    has to be formed, and how much memory that takes.

    Args:
      net: a layer that `lift` made.

    Raises:
      TypeError: it is another layer.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["w"] + params["b"])
      >>> net, _ = bp.lift(model, {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, jnp.ones((5, 3)))
      >>> [(use.path, use.operation, use.signal) for use in bp.uses(net)]
      [('b', 'add', 'Bias'), ('w', 'dot_general', 'Outer')]
    """
    if not isinstance(net.forward, Lifted):
        raise TypeError(f"uses: {net.name} was not made by lift, and is no program with uses.")
    rows = []
    for use in net.forward.table():
        for signal in uses_of(use.signal):
            base = signal
            while isinstance(base, Through):
                base = base.signal
            rows.append(
                UseOf(
                    use.path,
                    "output" if use.equation is None else use.equation.primitive.name,
                    type(base).__name__,
                    _bytes_formed(signal) if use.formed or not _is_structured(signal) else 0,
                    "" if use.equation is None else source_of(use.equation),
                )
            )
    return Uses(sorted(rows, key=lambda row: row.path))


def _is_structured(signal: Signal) -> bool:
    return not isinstance(signal, Through) or signal.back.moves


def _bytes_formed(signal: Signal) -> int:
    """The bytes of one example's gradient."""
    array = signal.deltas
    return math.prod(array.shape[1:]) * array.dtype.itemsize
