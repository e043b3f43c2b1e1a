"""Layouts only move numbers: whatever is computed in a comparison, the library computes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

# What moves numbers, by JAX's names. The sum is that of the two biases of a recurrent network.
MOVES = {
    *("broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "gather", "reshape", "slice"),
    *("split", "squeeze", "stack", "transpose"),
    "add",
}


def find_arithmetic(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The names of the operations in a function of arrays that do not only move numbers."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return sorted(set(_operations(jaxpr.jaxpr)) - MOVES)


def _operations(jaxpr) -> Iterator[str]:
    """The names of all operations, also of those within others."""
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr")]
        if inner:
            for part in inner:
                yield from _operations(part.jaxpr)
        else:
            yield equation.primitive.name
