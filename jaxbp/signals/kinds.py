"""Signals: the operands of a parameter's gradient, before anything is summed over the examples.

At each parameter, the backward pass has two arrays: the input from the forward pass, and the error
signal (delta) at the output. The gradient is a product of the two (for a bias, it is a sum of
deltas alone). A signal keeps these operands, so that a reading can compute the gradient from them,
or the gradient of each example, its norm, or a curvature factor (see `readings`). This often costs
far less than forming the gradient of each example first.

There are many layers, but only five kinds of signal, and two that are made of others. A reading is
written once per kind.

A kind of your own is a record, a pytree, with a method `per_example() -> gradients [N, ...]`. Every
reading then works, from these gradients. Where a formula of yours is cheaper, add its method, and
the readings take it; 16-bit operands are widened to 32 bits before. `check` tests them all.

    per_example()     g_n, [N, ...]                                                 required
    total(weights)    sum_n w_n g_n, with w [N] or None (for `mean`, `reweighted`)  optional
    sq_norms()        |g_n|^2, [N]                                                  optional
    gram(other)       g_n . g'_m, [N, M], with another signal of the kind           optional

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> from typing import NamedTuple
  >>> class Shared(NamedTuple):  # of a number that multiplies all inputs
  ...     inputs: jnp.ndarray
  ...     deltas: jnp.ndarray
  ...     def per_example(self):
  ...         return jnp.sum(self.inputs * self.deltas, axis=1)
  >>> signal = Shared(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 2)))
  >>> float(bp.mean(signal)), bp.sq_norms(signal).tolist()
  (5.0, [9.0, 49.0])
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp

from jaxbp.signals.conv_windows import Geometry
from jaxbp.signals.stacked import map_layers
from jaxbp.signals.views import View
from jaxbp.types import PyTree, exportable, widened

__all__ = [
    "Bias",
    "Conv",
    "Lookup",
    "Outer",
    "Scale",
    "Signal",
    "Sum",
    "Through",
    "keep",
    "map_signals",
    "unshared",
]


@exportable
class Outer(NamedTuple):
    """The signal of a weight matrix [I, O]: dE_n/dW = sum_t inputs_nt deltas_nt^T.

    Attributes:
      inputs: x, the inputs of the product x W, [N, ..., I].
      deltas: the derivative of the loss with respect to x W, [N, ..., O]. Axes between the first
        and the last, if any, are positions.
    """

    inputs: jax.Array
    deltas: jax.Array


@exportable
class Bias(NamedTuple):
    """The signal of a vector [O] that is added, such as a bias: dE_n/db = sum_t deltas_nt.

    For an array that has an entry for each position, pass the signal to `unshared`.

    Attributes:
      deltas: the derivative of the loss with respect to the sum, [N, ..., O].
    """

    deltas: jax.Array


@exportable
class Scale(NamedTuple):
    """The signal of a vector [O] that multiplies elementwise, such as the gain of a normalisation.

    dE_n/dg = sum_t inputs_nt deltas_nt. For an array that has an entry for each position, pass the
    signal to `unshared`.

    Attributes:
      inputs: the other factor of the product, [N, ..., O].
      deltas: the derivative of the loss with respect to the product, [N, ..., O].
    """

    inputs: jax.Array
    deltas: jax.Array


@exportable
class Lookup(NamedTuple):
    """The signal of a table [V, O] whose rows are looked up, such as an embedding.

    Row v of dE_n/dW is the sum of deltas_nt over the positions t with indices_nt = v. An index
    outside [0, V) is of no row, and adds nothing.

    Attributes:
      indices: the rows that were looked up, integers [N, ...].
      deltas: the derivative of the loss with respect to these rows, [N, ..., O].
      table: an empty array [V, 0], whose shape tells V.
    """

    indices: jax.Array
    deltas: jax.Array
    table: jax.Array


@exportable
class Conv(NamedTuple):
    """The signal of a kernel [*K, I / G, O]: dE_n/dW_k = sum_t inputs_nu deltas_nt^T.

    u is the position that the window at t sees at place k of the kernel (see `conv_windows`). In a
    transposed convolution, t is a position of the inputs and u a position of the deltas:
    dE_n/dW_k = sum_t inputs_nt deltas_nu^T.

    Attributes:
      inputs: the images, [N, ..., *S, I].
      deltas: the derivative of the loss with respect to the outputs, [N, ..., *S', O]. Axes between
        N and the positions, the same in both arrays, count images that share the kernel.
      geometry: where the windows lie.
    """

    inputs: jax.Array
    deltas: jax.Array
    geometry: Geometry


@exportable
class Through(NamedTuple):
    """The signal of a parameter W that is used in another form V = f(W), such as its transpose.

    dE_n/dW = back(dE_n/dV), with `back` the transpose of the derivative of f.

    Attributes:
      signal: the signal of V.
      back: takes a gradient of V to one of W. A `View` only moves entries (`back.moves`), so that
        norms and inner products are those of `signal`.
    """

    signal: Any
    back: Any

    @property
    def deltas(self) -> jax.Array:
        """The derivative of the loss with respect to what V is used for, [N, ...]."""
        return self.signal.deltas


@exportable
class Sum(NamedTuple):
    """The signal of a parameter that is used in several ways: dE_n/dW is the sum over its uses.

    An example is a table that embeds tokens and also maps features back to tokens.

    Attributes:
      signals: one for each way.
    """

    signals: tuple[Any, ...]

    @property
    def deltas(self) -> jax.Array:
        """The derivative of the loss where the parameter is used first, [N, ...]."""
        return self.signals[0].deltas


KINDS = (Outer, Bias, Scale, Lookup, Conv, Through, Sum)
Signal: TypeAlias = Outer | Bias | Scale | Lookup | Conv | Through | Sum


def is_signal(node: Any) -> TypeGuard[Signal]:
    """Whether a node of a tree is a signal; pass it as `is_leaf` for trees of signals."""
    # Of the class: a variable of Flax passes on the attributes of what it holds.
    return isinstance(node, KINDS) or hasattr(type(node), "per_example")


def map_signals(function: Callable[..., Any], signals: PyTree, *rest: PyTree) -> PyTree:
    """Applies a function, such as a reading, to each signal of a tree.

    Use it for signals that a backward pass with `read=keep` returned. In a stack, the function is
    applied to one layer at a time, and its results get L as first axis.

    Args:
      function: takes a signal, and the node of each other tree at the same place.
      signals: a tree of signals, as a backward pass with `read=keep` returns it, or a part of it.
      *rest: trees that have the structure of `signals` as a prefix.

    Returns:
      A tree like `signals`, with each signal replaced by the result.

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


def keep(signal: Signal) -> Signal:
    """The reading that returns the signal itself, with its operands. The default of `backward`.

    Use it to apply readings after the backward pass (`map_signals`), or to compute inner products
    of gradients (`gram`). The operands of all layers then stay in memory.

    Args:
      signal: the operands of one parameter.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(2)
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> y, cache = net.forward(params, jnp.ones((5, 3)))
      >>> _, signals = net.backward(params, cache, y, read=bp.keep)
      >>> signals["weight"].inputs.shape, signals["weight"].deltas.shape
      ((5, 3), (5, 2))
    """
    return signal


def unshared(signal: Bias | Scale) -> Through:
    """The signal of an array with an entry for each position, which positions do not share.

    Use it for an elementwise map, such as a parameter [H, W, C] that is added to or multiplied with
    inputs [N, H, W, C].

    Args:
      signal: a `Bias` or a `Scale` with operands [N, ...].

    Returns:
      The signal of a parameter [...].

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> x, dy = jnp.ones((5, 4, 4, 3)), jnp.ones((5, 4, 4, 3))
      >>> bp.total(bp.Scale(x, dy)).shape, bp.total(bp.unshared(bp.Scale(x, dy))).shape
      ((3,), (4, 4, 3))
    """
    shape = signal.deltas.shape[1:]
    flat = type(signal)(*(operand.reshape(operand.shape[0], -1) for operand in signal))
    return Through(flat, View((math.prod(shape),)).reshape(shape))


def as_positions(x: jax.Array) -> jax.Array:
    """Reshapes [N, ..., O] to [N, T, O], with T = 1 if there are no positions."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def as_images(signal: Conv, x: jax.Array) -> jax.Array:
    """Reshapes [N, ..., *S, C] to [N, T, *S, C], where T images of an example share the kernel."""
    return x.reshape(x.shape[0], -1, *x.shape[-1 - len(signal.geometry.kernel) :])


def widen(signal: Signal) -> Signal:
    """The same signal with operands of 16 bits in 32, for sums that would round or overflow."""
    if isinstance(signal, Through):
        return signal._replace(signal=widen(signal.signal))
    if isinstance(signal, Sum):
        return Sum(tuple(map(widen, signal.signals)))
    return jax.tree.map(widened, signal)


def uses_of(signal: Signal) -> tuple[Signal, ...]:
    """The signals of a `Sum`, one by one, or the only signal that there is."""
    return signal.signals if isinstance(signal, Sum) else (signal,)


def joined(signals: Sequence[Any]) -> Signal:
    """Joins the signals of several uses of one parameter: the uses become further positions.

    The gradient of a parameter is the sum over its uses, just as it is the sum over positions. The
    squared norm of a sum is not the sum of the squared norms, so a reading has to see all uses at
    once. Uses of different kinds, or in different layouts, become a `Sum`.
    """
    groups = {}
    for signal in itertools.chain(*map(uses_of, signals)):
        groups.setdefault(_layout(signal), []).append(signal)
    ways = tuple(_side_by_side(group) if len(group) > 1 else group[0] for group in groups.values())
    return ways[0] if len(ways) == 1 else Sum(ways)


def _layout(signal):
    """What has to be equal for the operands of two signals to stand side by side."""
    if isinstance(signal, Through):
        return (signal.back, _layout(signal.signal)) if signal.back.moves else id(signal)
    if isinstance(signal, Conv):
        sizes = (as_images(signal, a).shape[2:-1] for a in (signal.inputs, signal.deltas))
        return type(signal), signal.geometry, *sizes
    return type(signal) if isinstance(signal, KINDS) else id(signal)


def _side_by_side(signals):
    first = signals[0]
    if isinstance(first, Through):
        return first._replace(signal=_side_by_side([s.signal for s in signals]))
    if isinstance(first, Lookup):
        indices = [s.indices.reshape(s.indices.shape[0], -1) for s in signals]
        deltas = [as_positions(s.deltas) for s in signals]
        return Lookup(jnp.concatenate(indices, 1), jnp.concatenate(deltas, 1), first.table)
    if isinstance(first, Conv):
        # Each use stays an image of its own. If the images were joined along their positions,
        # windows would reach from one image into the next.
        inputs = [as_images(s, s.inputs) for s in signals]
        deltas = [as_images(s, s.deltas) for s in signals]
        return Conv(jnp.concatenate(inputs, 1), jnp.concatenate(deltas, 1), first.geometry)
    operands = zip(*signals, strict=True)
    return type(first)(*(jnp.concatenate(list(map(as_positions, x)), axis=1) for x in operands))


def rows_of(signal: Lookup) -> jax.Array:
    """The rows that each example looks up, [N, T], with V for an index outside [0, V).

    V is no row, so that `mode="drop"` leaves it out. A negative index would wrap.
    """
    indices = signal.indices.reshape(signal.indices.shape[0], -1)
    if indices.dtype.itemsize < 4:  # V may be too large for these integers
        indices = indices.astype(jnp.int32)
    rows = len(signal.table)
    return jnp.where((indices >= 0) & (indices < rows), indices, rows)


def each_row_once(signal: Lookup) -> Lookup:
    """A signal with the same gradients, in which each example looks up each of its rows once.

    If an example looks up a row at several positions, one of them gets the sum of the deltas, and
    the remaining positions get deltas of zero, as do those that look up no row. With T positions
    this sums the gradients in an array [N, T, O] instead of [N, V, O].
    """
    deltas, rows = as_positions(signal.deltas), rows_of(signal)
    t, no_row = rows.shape[1], len(signal.table)

    def merge(rows, deltas):  # `jnp.unique` does not know explicit sharding
        order = jnp.argsort(rows)
        rows, deltas = rows[order], deltas[order]
        is_new = (rows != jnp.roll(rows, 1)).astype(jnp.int32)
        places = jnp.where(rows < no_row, jnp.cumsum(is_new) - is_new[0], t)
        found = jnp.full_like(rows, no_row).at[places].set(rows, mode="drop")
        return found, jnp.zeros_like(deltas).at[places].add(deltas, mode="drop")

    rows, sums = jax.vmap(merge)(rows, deltas)
    return Lookup(rows, sums, signal.table)


def as_rows(x: jax.Array) -> jax.Array:
    """Reshapes [N, ..., O] to [N T, O]."""
    return x.reshape(-1, x.shape[-1])


def formula_of(signal: Any, name: str) -> Callable[..., Any] | None:
    """The formula that a signal of one's own kind has for a reading, or None if it has none."""
    formula = None if isinstance(signal, KINDS) else getattr(signal, name, None)
    return formula if callable(formula) else None


def not_a_signal(reading: str, signal: Any) -> TypeError:
    """The error for a reading, called by its name, that did not get a signal of a known kind."""
    return TypeError(
        f"{reading}: takes the signal of one parameter "
        f"({', '.join(kind.__name__ for kind in KINDS)}, or a record with a method per_example); "
        f"got {type(signal).__name__}. "
        f"Pass it as read={reading}, or apply it to a tree by map_signals({reading}, signals)?"
    )
