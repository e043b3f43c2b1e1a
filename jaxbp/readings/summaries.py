"""Summaries: a few numbers that show whether training is healthy, and where a bad value came from.

`health` describes the three arrays that a backward pass has in hand at each parameter: the inputs,
the deltas and the gradient. The result has a fixed size, so that it can be recorded in every step.
`first_bad` searches such records for the first value that is infinite or not a number.

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> signal = bp.Outer(jnp.array([[3.0, 4.0], [0.0, jnp.nan]]), jnp.array([[1.0], [2.0]]))
  >>> inputs = bp.health(signal).inputs
  >>> float(inputs.largest), float(inputs.zeros), float(inputs.non_finite), int(inputs.example)
  (nan, 0.25, 0.25, 1)
"""

import math
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.readings.sums import mean
from jaxbp.sharding import placement
from jaxbp.signals.kinds import Signal, Sum, Through
from jaxbp.signals.operands import require_signal
from jaxbp.signals.stacked import is_stacked, stack_axes
from jaxbp.types import PyTree, exportable, show_path, show_shape, unit_of, widened

__all__ = ["FirstBad", "Health", "Summary", "first_bad", "health"]


@exportable
class Summary(NamedTuple):
    """Four numbers about the entries of an array, each a scalar, or [L] in a stack.

    They are stored as one array, because a program takes time for each array that it returns. If an
    entry is infinite or not a number, then so are `rms` and `largest`.

    Attributes:
      numbers: `rms`, `largest`, `zeros` and `non_finite`, [..., 4].
      example: the first example with an entry that is not finite, counted from 0, or -1 if there is
        none. None for a gradient, which belongs to all examples.
    """

    numbers: jax.Array
    example: jax.Array | None

    @property
    def rms(self) -> Any:
        """The root mean square of the entries."""
        return self._number(0)

    @property
    def largest(self) -> Any:
        """The largest magnitude of an entry."""
        return self._number(1)

    @property
    def zeros(self) -> Any:
        """The share of entries that are 0."""
        return self._number(2)

    @property
    def non_finite(self) -> Any:
        """The share of entries that are infinite or not a number."""
        return self._number(3)

    def _number(self, place):
        number = self.numbers[..., place]
        # The records of `fit` are NumPy's, and single numbers in them are Python's.
        return number.item() if isinstance(number, np.ndarray) and not number.ndim else number

    def times(self, n: Any) -> "Summary":
        """The term of a batch of n examples in the sum of which `over` takes the mean."""
        return self._scaled(jnp.asarray(n, self.numbers.dtype))

    def summed(self) -> "Summary":
        """The sum of the terms of several batches, along the first axis of the arrays."""
        unit = unit_of(self.rms, axis=0)
        squares = jnp.sum(jnp.square(self.rms / unit), axis=0)
        return _summary_of(
            rms=unit[0] * jnp.sqrt(squares),
            largest=jnp.max(self.largest, axis=0),
            zeros=jnp.sum(self.zeros, axis=0),
            non_finite=jnp.sum(self.non_finite, axis=0),
            example=None if self.example is None else _first(self.example),
        )

    def plus(self, other: "Summary") -> "Summary":
        """The sum of two sums."""
        return jax.tree.map(lambda *pair: jnp.stack(pair), self, other).summed()

    def over(self, n: Any) -> "Summary":
        """The summary of all batches of a sum, which had n examples together."""
        return self._scaled(1 / jnp.asarray(n, self.numbers.dtype))

    def _scaled(self, factor):
        factors = jnp.stack([jnp.sqrt(factor), jnp.ones_like(factor), factor, factor])
        return self._replace(numbers=self.numbers * factors)


def _summary_of(rms, largest, zeros, non_finite, example):
    return Summary(jnp.stack([rms, largest, zeros, non_finite], axis=-1), example)


@exportable
class Health(NamedTuple):
    """What `health` returns for a parameter.

    In a `Sum`, `inputs` and `deltas` are tuples with one entry for each use of the parameter.

    Attributes:
      inputs: of the inputs of the forward pass; None for a bias and a table, which have none.
      deltas: of the derivatives of each example's own loss, which the backward pass brings.
      gradient: of the mean gradient.
    """

    inputs: Any
    deltas: Any
    gradient: Summary


def health(signal: Signal) -> Health:
    """Computes magnitudes, and shares of zeros and of non-finite entries, at a parameter.

    Use it to watch training: `read={"health": bp.health}` in `make_step`, `make_epoch` or `fit`.
    It describes the inputs, the deltas and the mean gradient, which is that of `mean` and shared
    with it in a compiled program. Numbers of 16 bits are summed in 32. The root mean square is
    accurate over the whole range of the dtype.

    The record of an epoch describes the entries of all batches: `largest` is that of the epoch, and
    not a mean. `example` is then the smallest place in a batch.

    Inside `jax.shard_map`, the numbers are those of the device's own examples.

    Args:
      signal: the operands of one parameter. Of a kind of your own, the attributes `inputs` and
        `deltas` are described if it has them; they have to be arrays [N, ...].

    Returns:
      A `Health` of `Summary` records. `first_bad` searches a tree of them.

    Raises:
      TypeError: `signal` is not a signal.
      ValueError: the operands do not fit each other.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> signal = bp.Outer(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([[1.0], [2.0]]))
      >>> found = bp.health(signal)
      >>> float(found.inputs.rms), float(found.inputs.zeros), float(found.gradient.largest)
      (2.5, 0.5, 2.0)
    """
    require_signal("health", signal)
    gradient = _summary(jnp.atleast_1d(mean(signal)))._replace(example=None)
    return Health(_of("inputs", signal), _of("deltas", signal), gradient)


def _of(operand, signal):
    """The summary of an operand, called by its name; a tuple for the uses of a `Sum`."""
    if isinstance(signal, Through):
        return _of(operand, signal.signal)
    if isinstance(signal, Sum):
        return tuple(_of(operand, use) for use in signal.signals)
    x = getattr(signal, operand, None)
    return None if x is None or not jnp.issubdtype(x.dtype, jnp.floating) else _summary(x)


def _summary(x: jax.Array) -> Summary:
    """The summary of an array [N, ...]."""
    x = widened(x)
    largest, zeros, non_finite = _counted(x)
    # The compiler may join the inverse of the unit with other factors, such as 1 / N. The bound,
    # 2^94 in 32 bits, keeps the product from vanishing; squares are far from their range anyway.
    unit = jnp.minimum(unit_of(largest, axis=0), float(jnp.finfo(x.dtype).tiny) ** -0.75)
    squares = jnp.mean(jnp.square(x * (1 / unit)), axis=tuple(range(1, x.ndim)))
    entries = math.prod(x.shape[1:])
    return _summary_of(
        rms=unit[0] * jnp.sqrt(jnp.mean(squares)),
        largest=jnp.max(largest),
        zeros=jnp.mean(zeros) / entries,
        non_finite=jnp.mean(non_finite) / entries,
        example=_first(jnp.where(jnp.isfinite(largest), -1, _numbers(largest))),
    )


@jax.custom_jvp
def _counted(x):
    """The largest magnitude, and the numbers of zeros and of non-finite entries, each [N].

    They are read from the bits of the entries. Without the bit of the sign, the bits of larger
    magnitudes are larger integers; infinity is above all numbers, and what is not a number above
    infinity. XLA's compiler for CPUs sums and compares integers in vectors, and all three in one
    loop, which takes a fifth of the time of three reductions of floating-point numbers.
    """
    integer = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integer) << 1
    infinity = np.array(np.inf, x.dtype).view(integer) << 1
    each = bits, (bits == 0).astype(integer), (bits >= infinity).astype(integer)

    def joined(a, b):
        return jnp.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]

    starts = (np.zeros((), integer),) * 3
    largest, zeros, non_finite = jax.lax.reduce(each, starts, joined, range(1, x.ndim))
    magnitude = jax.lax.bitcast_convert_type(largest >> 1, x.dtype)
    return magnitude, zeros.astype(x.dtype), non_finite.astype(x.dtype)


@_counted.defjvp
def _counted_derivative(primals, tangents):
    """The largest magnitude moves with the entries that have it, in equal parts."""
    (x,), (change,) = primals, tangents
    largest, zeros, non_finite = _counted(x)
    rest = tuple(range(1, x.ndim))
    has_it = (jnp.abs(x) == jnp.expand_dims(largest, rest)).astype(x.dtype)
    moved = jnp.sum(has_it * jnp.sign(x) * change, rest) / jnp.sum(has_it, rest)
    return (largest, zeros, non_finite), (moved, jnp.zeros_like(zeros), jnp.zeros_like(zeros))


def _numbers(x):
    """0, 1, ..., N - 1 for an array [N], divided over the devices as it is."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0, out_sharding=placement(x, (x, 0)))


def _first(examples):
    """The smallest of numbers that is not negative; -1 if there is none."""
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(examples < 0, none, examples), axis=0)
    return jnp.where(first == none, -1, first)


@exportable
class FirstBad(NamedTuple):
    """Where the first value that is infinite or not a number stands. All are integers.

    Attributes:
      parameter: the index of the parameter among the records, counted from 0 in the order of the
        tree, one layer of a stack after another; -1 if all values are finite.
      source: 0 for the inputs, and so the forward pass; 1 for the deltas, and so the backward pass;
        2 for the gradient; -1 if all values are finite.
      example: the first example with such a value, counted from 0; -1 for a gradient.
    """

    parameter: jax.Array
    source: jax.Array
    example: jax.Array

    def place(self, readings: PyTree) -> str:
        """The same in words, outside of `jax.jit`.

        Args:
          readings: the tree that was searched. Only its structure and shapes count.
        """
        parameter, source, example = map(int, self)
        if parameter < 0:
            return "nowhere: all values are finite"
        name = dict(_uses(readings))[parameter]
        return (
            f"the forward pass, the inputs of {name}, example {example}",
            f"the backward pass, the deltas of {name}, example {example}",
            f"the mean over the examples of the gradient of {name}",
        )[source]


def first_bad(readings: PyTree) -> FirstBad:
    """Finds the first value that is infinite or not a number, in the order of one training step.

        1. forward pass    the first parameter whose inputs have such an entry
        2. backward pass   else the last parameter whose deltas have one
        3. gradient        else the first parameter whose gradient has one, such as by an overflow

    The value came into being before that array: between it and the parameter before, in the order
    of the pass. Parameters are in the order of the tree, which is that of the layers in a network
    made of combinators. A lifted model has the order of its names. The uses of a `Sum` after the
    first, such as the output layer that is tied to an embedding, stand after all others of their
    tree.

    This works under `jax.jit`, without a second look at the batch. `fit` says more of a step that
    is not finite (`NonFiniteError`): it runs the step again, operation by operation, and names the
    layer that made the value.

    Args:
      readings: the tree that a sweep with `read=health` returns.

    Returns:
      A `FirstBad`. Its `place(readings)` says the same in words.

    Raises:
      ValueError: there are no records of `health`, or they have an axis more, such as that of the
        columns of an error.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(2), bp.elementwise(jnp.log, jnp.reciprocal), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (1,))
      >>> params[0]["weight"] = jnp.array([[1.0, -1.0]])
      >>> sweep = jax.jit(bp.backprop(net, bp.squared_error, read=bp.health))
      >>> _, readings = sweep(params, jnp.ones((3, 1)), jnp.zeros((3, 2)))
      >>> bp.first_bad(readings).place(readings)
      'the forward pass, the inputs of 2.weight, example 0'
    """
    _require_records(readings)
    inputs, deltas, gradients = (_examples(readings, source) for source in Health._fields)
    uses = np.array([number for number, _ in _uses(readings)], np.int32)
    # Everything in the order in which it comes into being.
    examples = jnp.concatenate([inputs, deltas[::-1], gradients])
    parameters = np.concatenate([uses, uses[::-1], np.arange(gradients.size, dtype=np.int32)])
    sources = np.repeat(np.arange(3, dtype=np.int32), [uses.size, uses.size, gradients.size])
    first = jnp.argmax(examples >= 0)
    is_bad = examples[first] >= 0
    parameter, source, example = (
        jnp.where(is_bad, jnp.asarray(a)[first], -1) for a in (parameters, sources, examples)
    )
    return FirstBad(parameter, source, jnp.where(source == 2, -1, example))


def _examples(readings, source):
    """The first bad example of one source at each use of a parameter, [K], in the order of `_uses`.

    It is -1 if all entries are finite. For gradients, which have no examples and stand in the order
    of the parameters, it is 0 if they are not. Inside a stack it is [L, K].
    """
    own, later = [], []
    for _, node in _nodes(readings):
        if is_stacked(node):
            layers = _examples(node.layers, source)
            own.append(layers.reshape(*layers.shape[:-2], -1))
        else:
            first, *others = (_example(s, node) for s in _each(getattr(node, source)))
            own.append(first)
            later.extend(others)
    return jnp.concatenate([*own, *later], axis=-1)


def _example(summary, record):
    """The first bad example of a summary, [1], as `_examples` says it; or [L, 1]."""
    if summary is None:
        return jnp.full_like(record.gradient.non_finite, -1, jnp.int32)[..., None]
    if summary.example is None:
        return jnp.where(jnp.asarray(summary.non_finite) > 0, 0, -1).astype(jnp.int32)[..., None]
    return jnp.asarray(summary.example, jnp.int32)[..., None]


def _uses(readings, axes=0):
    """The number and the name of the parameter at each use, in the order of the forward pass.

    Uses of a parameter after its first stand at the end. Inside stacks, arrays have `axes` axes L.
    """
    own, later, count = [], [], 0
    for path, node in _nodes(readings):
        name = show_path(path) or "the parameter"
        if is_stacked(node):
            inner, size = _uses(node.layers, axes + 1), jax.tree.leaves(node)[0].shape[axes]
            own += [
                (count + layer * _count(inner) + number, f"{name}.layers.{inside}[{layer}]")
                for layer in range(size)
                for number, inside in inner
            ]
            count += size * _count(inner)
        else:
            first, *others = [(count, name) for _ in _each(node.deltas)]
            own.append(first)
            later += others
            count += 1
    return own + later


def _count(uses):
    """The number of parameters of which these are the uses."""
    return 1 + max(number for number, _ in uses)


def _each(summaries):
    """The summary of each use of a parameter."""
    return summaries if type(summaries) is tuple else (summaries,)


def _nodes(readings):
    """The records and the stacks that have some, with their paths."""
    nodes = jax.tree.leaves_with_path(readings, is_leaf=lambda n: is_stacked(n) or _is_health(n))
    return [(path, node) for path, node in nodes if jax.tree.leaves(node)]


def _is_health(node: Any) -> TypeGuard[Health]:
    return isinstance(node, Health)


def _require_records(readings):
    """Raises unless all leaves are those of records of `health`, with L in front in a stack."""
    records = jax.tree.leaves(readings, is_leaf=_is_health)
    others = [type(node).__name__ for node in records if not _is_health(node)]
    if others or not records:
        raise ValueError(
            "first_bad: takes a tree of records as read=health gives; it got "
            f"{f'a leaf of type {others[0]}' if others else 'no leaves'}."
        )
    expected = jax.tree.leaves(stack_axes(readings), is_leaf=_is_health)
    for record, stacks in zip(records, expected, strict=True):
        shape, axes = jnp.shape(record.gradient.numbers)[:-1], stacks.gradient.numbers
        if len(shape) != axes:
            raise ValueError(
                f"first_bad: got a record with numbers of shape {show_shape(shape)}, "
                f"expected {show_shape('L' * axes)}, with L for each stack around it. Search the "
                "records of the columns of an error one by one, by jax.vmap?"
            )
