"""Operands: whether the arrays of a signal fit each other, and what they say about its gradient.

Arrays that do not fit could broadcast, and a reading would be wrong in silence. So every reading
calls `require_signal` first. Shapes are known while a program is traced: compiled code has no
checks in it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.signals.kinds import (
    KINDS,
    Bias,
    Conv,
    Lookup,
    Outer,
    Scale,
    Signal,
    Sum,
    Through,
    is_signal,
    not_a_signal,
)
from jaxbp.types import Shape, show_shape

_TAKES = {
    Outer: "inputs [N, ..., I] and deltas [N, ..., O], equal but for the last axis",
    Bias: "deltas [N, ..., O]",
    Scale: "inputs and deltas [N, ..., O], of equal shapes",
    Lookup: "integers as indices [N, ...], deltas [N, ..., O] and a table [V, 0]",
    Conv: "inputs [N, ..., *S, I] and deltas [N, ..., *S', O] with as many windows as its geometry "
    "has, and channels that its groups divide",
}


def require_signal(reading: str, signal: Any) -> None:
    """Raises unless a signal's operands fit each other; `reading` is the name in messages.

    Raises:
      TypeError: it is not a signal, or its operands are not arrays of floating-point numbers.
      ValueError: the shapes of its operands do not fit.
    """
    require_kind(reading, signal)
    if isinstance(signal, Through):
        _require_through(reading, signal)
    elif isinstance(signal, Sum):
        _require_sum(reading, signal)
    elif isinstance(signal, KINDS):
        _require_arrays(reading, signal)
        if not _FITS[type(signal)](signal):
            raise ValueError(
                f"{reading}: got a signal {type(signal).__name__} with {_shapes(signal)}; it takes "
                f"{_TAKES[type(signal)]}."
            )


def require_kind(reading: str, node: Any) -> None:
    """Raises unless a node is a signal, whatever its operands, and a pytree."""
    if not is_signal(node):
        raise not_a_signal(reading, node)
    if jax.tree_util.all_leaves([node]):
        raise TypeError(
            f"{reading}: got a signal {type(node).__name__}, which is not a pytree. Make it a "
            "NamedTuple, or register it by jax.tree_util.register_dataclass?"
        )


def gradient_shape(signal: Signal) -> Shape | None:
    """The shape of the parameter, or None where only its gradient would tell."""
    match signal:
        case Outer(inputs, deltas):
            return inputs.shape[-1], deltas.shape[-1]
        case Bias() | Scale():
            return signal.deltas.shape[-1:]
        case Lookup(_, deltas, table):
            return len(table), deltas.shape[-1]
        case Conv(inputs, deltas, geometry):
            return *geometry.kernel, inputs.shape[-1] // geometry.groups, deltas.shape[-1]
        case Through() if signal.back.moves:
            return signal.back.out_shape
        case Sum():
            return gradient_shape(signal.signals[0])
    return None


def dtype_of(signal: Signal) -> jnp.dtype:
    """The dtype of a signal's operands, and of the gradients that readings compute from them."""
    match signal:
        case Outer(inputs, deltas) | Scale(inputs, deltas) | Conv(inputs, deltas, _):
            return jnp.result_type(inputs, deltas)
        case Bias() | Lookup():
            return signal.deltas.dtype
        case Through():
            return dtype_of(signal.signal)
        case Sum():
            return dtype_of(signal.signals[0])
    return _formed(signal).dtype


def count_examples(signal: Signal) -> int:
    """N, the number of examples of a signal."""
    if isinstance(signal, Through):
        return count_examples(signal.signal)
    if isinstance(signal, Sum):
        return count_examples(signal.signals[0])
    return signal.deltas.shape[0] if isinstance(signal, KINDS) else _formed(signal).shape[0]


def _formed(signal):
    """The shape and dtype of the per-example gradients of a signal of one's own kind."""
    return jax.eval_shape(lambda signal: signal.per_example(), signal)


def _require_arrays(reading, signal):
    for name, operand in zip(signal._fields, signal, strict=True):
        if name == "geometry":
            continue
        if not hasattr(operand, "shape") or not hasattr(operand, "dtype"):
            got = f"of type {type(operand).__name__}; it takes an array"
        elif name in ("inputs", "deltas") and not jnp.issubdtype(operand.dtype, jnp.floating):
            got = f"of dtype {operand.dtype}; it takes floating-point numbers"
        else:
            continue
        raise TypeError(f"{reading}: got a signal {type(signal).__name__} with {name} {got}.")


def _require_through(reading, signal):
    require_signal(reading, signal.signal)
    shape = gradient_shape(signal.signal)
    if signal.back.moves and shape not in (None, signal.back.shape):
        raise ValueError(
            f"{reading}: got a signal Through with a gradient of shape {show_shape(shape)}, and a "
            f"view of {show_shape(signal.back.shape)}; the two have to be equal."
        )


def _require_sum(reading, signal):
    for use in signal.signals:
        require_signal(reading, use)
    counts = set(map(count_examples, signal.signals))
    shapes = {gradient_shape(use) for use in signal.signals} - {None}
    if len(counts) > 1 or len(shapes) > 1:
        uses = ", ".join(type(use).__name__ for use in signal.signals)
        raise ValueError(
            f"{reading}: got a signal Sum ({uses}) of {_listed(counts)} examples and of parameters "
            f"of shape {_listed(map(show_shape, shapes))}; all have to be of the same examples and "
            "of one parameter."
        )


def _listed(values):
    return " and ".join(sorted(map(str, values))) or "unknown"


def _shapes(signal):
    arrays = zip(signal._fields, signal, strict=True)
    shapes = [f"{name} {show_shape(x.shape)}" for name, x in arrays if name != "geometry"]
    integers = f" of dtype {signal.indices.dtype}" if isinstance(signal, Lookup) else ""
    return f"{shapes[0]}{integers}{', ' * (len(shapes) > 1)}{', '.join(shapes[1:])}"


def _conv_fits(signal):
    inputs, deltas, geometry = signal
    rank = len(geometry.kernel)
    if inputs.ndim != deltas.ndim or inputs.ndim < rank + 2:
        return False
    seen, windows = (deltas, inputs) if geometry.transposed else (inputs, deltas)
    lead, channels = slice(0, -1 - rank), (inputs.shape[-1], deltas.shape[-1])
    return (
        inputs.shape[lead] == deltas.shape[lead]
        and geometry.count(seen.shape[-1 - rank : -1]) == windows.shape[-1 - rank : -1]
        and not any(c % geometry.groups for c in channels)
    )


_FITS = {
    Outer: lambda s: s.inputs.ndim >= 2 and s.inputs.shape[:-1] == s.deltas.shape[:-1],
    Bias: lambda s: s.deltas.ndim >= 2,
    Scale: lambda s: s.deltas.ndim >= 2 and s.inputs.shape == s.deltas.shape,
    Lookup: lambda s: (
        s.deltas.ndim >= 2
        and s.indices.shape == s.deltas.shape[:-1]
        and jnp.issubdtype(s.indices.dtype, jnp.integer)
        and s.table.ndim == 2
    ),
    Conv: _conv_fits,
}
