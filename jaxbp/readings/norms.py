"""Norms: the norm of each example's gradient, for a parameter, a layer or the whole network.

With g_n the gradient of example n's own loss:

    sq_norms         |g_n|^2 for one parameter      a reading
    layer_norms      |g_n| for each layer           from a tree of squared norms
    example_norms    |g_n| for the whole network    from a tree of squared norms

`sq_norms` computes the norm from the operands, without forming g_n, where that is cheaper.

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
  >>> bp.sq_norms(signal).tolist()
  [45.0, 16.0]

Sources:
  "Efficient Per-Example Gradient Computations", Goodfellow, 2015: |x d^T|^2 = |x|^2 |d|^2.
  "Large Language Models Can Be Strong Differentially Private Learners", Li, Tramer, Liang,
  Hashimoto, 2021: the same with positions, by Gram matrices.
  "Scalable and Efficient Training of Large Convolutional Neural Networks with Differential
  Privacy", Bu, Mao, Xu, 2022: the choice between Gram matrices and gradients for each layer.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp.readings.costs import (
    by_place_is_less_work,
    forming_is_less_work,
    gram_is_less_work,
    one_by_one_is_less_work,
)
from jaxbp.readings.sums import per_example, sum_of, wide_total
from jaxbp.sharding import placement
from jaxbp.signals.conv_patches import map_examples, map_place_gradients, patched
from jaxbp.signals.kinds import (
    Conv,
    Lookup,
    Outer,
    Signal,
    Sum,
    Through,
    as_positions,
    each_row_once,
    formula_of,
    rows_of,
    widen,
)
from jaxbp.signals.operands import require_signal
from jaxbp.signals.stacked import map_layers, stack_axes, sum_leaves
from jaxbp.types import PyTree, show_shape, unit_of

__all__ = ["example_norms", "layer_norms", "sq_norms"]


def sq_norms(signal: Signal) -> jax.Array:
    """Computes the squared norm of each example's gradient, |g_n|^2.

        weight matrix      |x_n|^2 |d_n|^2
        with positions     sum_st (x_ns . x_nt) (d_ns . d_nt), from two Gram matrices [N, T, T], or
                           from the gradient [N, I, O], whichever is less work
        kernel             as a weight matrix shared by patches, or one place after another
        table              from the rows that an example looks up; the deltas of a row that it looks
                           up several times are added first
        bias, gain         from the gradient

    `costs` has the formulas that decide. Numbers of 16 bits are accumulated in 32. The square of a
    norm above 2e19 is inf in 32 bits, and that of a norm below 1e-19 is zero or inaccurate.
    `reweighted` computes norms over the whole range of the dtype.

    Args:
      signal: the operands of one parameter.

    Returns:
      An array [N]. `example_norms` and `layer_norms` combine those of several parameters.

    Raises:
      TypeError: `signal` is not a signal.
      ValueError: the operands do not fit each other.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.sq_norms(bp.Bias(jnp.array([[3.0, 4.0], [0.0, 1.0]]))).tolist()
      [25.0, 1.0]
    """
    require_signal("sq_norms", signal)
    squares, unit = _measured(widen(signal))
    return unit * (unit * squares)


def parameter_norms(signal: Signal) -> jax.Array:
    """The norm of each example's gradient for one parameter, [N], over the range of the dtype.

    Args:
      signal: the operands of one parameter.
    """
    require_signal("parameter_norms", signal)
    return _measured(widen(signal)).norms


class Measured(NamedTuple):
    """The squared norms of gradients, measured in units of each example's own.

    Squares overflow, or vanish, where norms do not. In a unit that is near the largest entry of the
    example's operands they do neither.

    Attributes:
      squares: |g_n|^2 / u_n^2, [N].
      unit: u, [N], powers of two, so that dividing by them rounds nothing.
    """

    squares: jax.Array
    unit: jax.Array

    @property
    def norms(self) -> jax.Array:
        """|g_n|, [N]."""
        return self.unit * _root(self.squares)


@functools.singledispatch
def _measured(signal: Signal) -> Measured:
    """The squared norm of each example's gradient, of operands of at least 32 bits."""
    if own := formula_of(signal, "sq_norms"):
        squares = own()
        return Measured(squares, jnp.ones_like(squares))
    return _measure(per_example(signal))


@_measured.register
def _(signal: Outer):
    x, d = as_positions(signal.inputs), as_positions(signal.deltas)
    (_, t, i), o = x.shape, d.shape[-1]
    if t == 1:
        inputs, deltas = _measure(x), _measure(d)
        return Measured(inputs.squares * deltas.squares, inputs.unit * deltas.unit)
    if gram_is_less_work(i, o, pairs=t * t, rows=t, products=1):
        return _measured_by_grams(x, d)
    return _measure(per_example(Outer(x, d)))


def _measured_by_grams(x, d):
    """The squared norm of sum_t x_t d_t^T as sum_st (x_s . x_t) (d_s . d_t)."""
    # Each position has units of its own: where its input is large, its delta may be small.
    x_unit, d_unit = unit_of(x, axis=2), unit_of(d, axis=2)
    x, d = x * (1 / x_unit), d * (1 / d_unit)
    x_gram, d_gram = _grams(x), _grams(d)
    lengths = x_unit * d_unit * _lengths(x_gram) * _lengths(d_gram)
    unit = unit_of(lengths, axis=(1, 2))
    # At most 4, except where a position is zero: there it may not be infinite.
    sizes = jnp.minimum(x_unit * d_unit / unit, 2.0**60)
    squares = jnp.sum(x_gram * sizes * (d_gram * jnp.swapaxes(sizes, 1, 2)), axis=(1, 2))
    lengths, unit = jnp.sum(lengths / unit, axis=(1, 2)), unit[:, 0, 0]
    return Measured(_above_rounding(squares, lengths), unit)


def _grams(x):
    """The inner products of all pairs of positions, [N, T, T], of an array [N, T, I]."""
    return jnp.einsum("nsi,nti->nst", x, x, out_sharding=placement(x, (x, 0), None, None))


def _lengths(gram):
    """The norms of the rows that have this Gram matrix, [N, T, 1]; constants for derivatives."""
    squares = jnp.diagonal(jax.lax.stop_gradient(gram), axis1=1, axis2=2)
    return jnp.sqrt(squares)[..., None]


@_measured.register
def _(signal: Lookup):
    return _measure(each_row_once(signal).deltas)


@_measured.register
def _(signal: Conv):
    if not one_by_one_is_less_work(signal):
        return _measured_by_parts(signal)
    return lax.platform_dependent(
        signal,
        cpu=lambda signal: _one_by_one(signal)[1],
        default=_measured_by_parts,
    )


def _measured_by_parts(signal):
    """The squared norms for a kernel, from those of its places or groups."""
    if by_place_is_less_work(signal):
        parts = map_place_gradients(lambda g: _measure(jnp.moveaxis(g, 1, 0)).norms, signal)
    else:
        parts = jax.vmap(lambda outer: _measured(outer).norms)(patched(signal))
    return _measure(parts.T)


def summed_and_measured(signal: Signal) -> tuple[jax.Array, Measured] | None:
    """The sum of the examples' gradients, and their squared norms, of operands of 32 bits or more.

    The two share the gradients that the norms are computed from. None if there are none.
    """
    match signal:
        case Outer() if forming_is_less_work(signal, with_sum=True):
            gradients = per_example(signal)
            return sum_of(gradients), _measure(gradients)
        case Conv() if one_by_one_is_less_work(signal):
            return lax.platform_dependent(
                signal,
                cpu=_one_by_one,
                default=lambda signal: (wide_total(signal), _measured_by_parts(signal)),
            )
        case Through() if signal.back.moves and (both := summed_and_measured(signal.signal)):
            return signal.back(both[0]), both[1]
    return None


def _one_by_one(signal):
    """Both for a kernel, with the gradient of one example in memory at a time."""
    total, measured = map_examples(lambda gradient: _measure(gradient[None]), signal)
    return total, Measured(*(x[:, 0] for x in measured))


@_measured.register
def _(signal: Through):
    if signal.back.moves:
        return _measured(signal.signal)
    return _measure(per_example(signal))


@_measured.register
def _(signal: Sum):
    # |sum_i g_i|^2 = sum_i |g_i|^2 + 2 sum_(i > j) g_i . g_j, if all products have a closed form.
    pairs = [_table_pair(*pair) for pair in itertools.combinations(signal.signals, 2)]
    if None in pairs:
        return _measure(per_example(signal))
    norms = jnp.stack([_measured(use).norms for use in signal.signals], axis=1)
    squares, unit = _measure(norms)
    products = functools.reduce(jnp.add, (_product(pair, unit) for pair in pairs))
    lengths = jnp.sum(norms, axis=1) / unit
    return Measured(_above_rounding(squares + 2 * products, lengths), unit)


def _table_pair(use, other):
    """Two uses of a table as (use, rows, columns): one looks up rows, the other is a matrix.

    The gradient of the other use is sum_t rows_t columns_t^T. None stands for any other pair.
    """
    if isinstance(other, Lookup):
        use, other = other, use
    if not isinstance(use, Lookup):
        return None
    if isinstance(other, Outer):
        return use, other.inputs, other.deltas
    if (
        isinstance(other, Through)
        and isinstance(other.signal, Outer)
        and getattr(other.back, "transposes", False)
    ):
        return use, other.signal.deltas, other.signal.inputs
    return None


def _product(pair, unit):
    """g_n . h_n / u_n^2 for the gradients of a table's two uses, as `_table_pair` gives them."""
    use, rows, columns = pair
    arrays = [as_positions(a) for a in (use.deltas, rows, columns)]
    units = [unit_of(a, axis=(1, 2)) for a in arrays]
    d, rows, columns = arrays
    at = jnp.take_along_axis(rows, rows_of(use)[:, None], axis=2, mode="fill", fill_value=0)
    d, at, columns = (a * (1 / own) for a, own in zip((d, at, columns), units, strict=True))
    products = jnp.einsum("nso,nto,nts->n", d, columns, at)
    d_unit, row_unit, column_unit = (own[:, 0, 0] for own in units)
    return products * (d_unit / unit) * (row_unit / unit * column_unit)


def _measure(x: jax.Array) -> Measured:
    """The squared norm of each row of an array, [N, ...] to [N]."""
    axes = tuple(range(1, x.ndim))
    unit = unit_of(x, axis=axes)
    return Measured(jnp.sum(jnp.square(x * (1 / unit)), axis=axes), unit.reshape(x.shape[0]))


def _above_rounding(squares: jax.Array, lengths: jax.Array) -> jax.Array:
    """Squared norms, [N], at least as large as the rounding error that cancelling terms leave.

    Such errors can be negative or far below the norm. Without the bound, an example's norm could be
    underestimated, and a clipped sum could exceed its threshold. The bound is a constant for
    derivatives, which are those of the squares.

    Args:
      squares: sums of terms that may cancel.
      lengths: the sum of the norms of what is added, so that the terms are up to its square.
    """
    rounding = jnp.finfo(squares.dtype).eps * jnp.square(lengths)
    return squares + jax.lax.stop_gradient(jnp.maximum(rounding - squares, 0))


def _root(x: jax.Array) -> jax.Array:
    """The square root, with a derivative of zero at zero, where that of a norm is not defined."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def example_norms(readings: PyTree) -> jax.Array:
    """Computes the norm of each example's whole gradient, sqrt(sum over parameters of |g_n|^2).

    Args:
      readings: the tree of squared norms that a sweep with `read=sq_norms` returns.

    Returns:
      An array [N].

    Raises:
      ValueError: there are no parameters, or the leaves are not all of shape [N].

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.example_norms({"weight": jnp.array([9.0, 0.0]), "bias": jnp.array([16.0, 4.0])})
      Array([5., 2.], dtype=float32)
    """
    _require_norms("example_norms", readings)
    return _root(sum_leaves(readings))


def layer_norms(readings: PyTree) -> PyTree:
    """Computes the norm of each example's gradient with respect to each layer.

    A layer is an innermost collection of parameters, such as the dict of a weight and its bias.

    The layer that normalises is `layer_norm`.

    Args:
      readings: the tree of squared norms that a sweep with `read=sq_norms` returns.

    Returns:
      A tree with an array [N] in place of each layer; in a stack, [L, N] for its L layers.

    Raises:
      ValueError: the leaves of a layer are not all of shape [N].

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.layer_norms(({"weight": jnp.array([9.0]), "bias": jnp.array([16.0])}, ()))
      (Array([5.], dtype=float32), ())
    """
    return by_layer(example_norms, readings)


def joint_norms(norms: PyTree) -> jax.Array:
    """The norm of each example's whole gradient, [N], from a tree of `parameter_norms`."""
    _require_norms("joint_norms", norms)
    rows = [leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(norms)]
    return _measure(jnp.concatenate(rows).T).norms


def by_layer(function: Callable[[PyTree], jax.Array], readings: PyTree) -> PyTree:
    """Applies a function to the readings of each layer, one layer of a stack at a time."""

    def parts(node):
        return jax.tree.leaves(node, is_leaf=lambda child: child is not node)

    return map_layers(
        lambda layer: function(layer) if parts(layer) else layer,
        readings,
        is_leaf=lambda node: jax.tree_util.all_leaves(parts(node)),
    )


def _require_norms(name: str, readings: PyTree) -> None:
    """Raises unless there are leaves, all of shape [N], with L in front in a stack."""
    axes, leaves = jax.tree.leaves(stack_axes(readings)), jax.tree.leaves(readings)
    shapes = {jnp.shape(leaf)[k:] for leaf, k in zip(leaves, axes, strict=True)}
    if len(shapes) != 1 or len(*shapes) != 1:
        raise ValueError(
            f"{name}: takes a tree of squared norms, all of shape [N], as read=sq_norms gives; it "
            f"got {', '.join(map(show_shape, sorted(shapes))) or 'no leaves'}."
        )
