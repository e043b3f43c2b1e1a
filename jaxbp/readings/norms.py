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

import jax
import jax.numpy as jnp

from jaxbp.readings.costs import by_place_is_less_work, gram_is_less_work
from jaxbp.readings.sums import per_example
from jaxbp.signals.conv_patches import map_place_gradients, patched
from jaxbp.signals.kinds import (
    Bias,
    Conv,
    Lookup,
    Outer,
    Scale,
    Signal,
    Sum,
    Through,
    as_positions,
    each_row_once,
    not_a_signal,
    widen,
)
from jaxbp.signals.stacked import map_layers, stack_axes, sum_leaves
from jaxbp.types import PyTree, show_shape, widened

__all__ = ["example_norms", "layer_norms", "sq_norms"]


@functools.singledispatch
def sq_norms(signal: Signal) -> jax.Array:
    """Computes the squared norm of each example's gradient, |g_n|^2.

        weight matrix      |x_n|^2 |d_n|^2
        with positions     sum_st (x_ns . x_nt) (d_ns . d_nt), from two Gram matrices [N, T, T], or
                           from the gradient [N, I, O], whichever is less work
        kernel             as a weight matrix shared by patches, or one place after another
        table              from the rows that an example looks up; the deltas of a row that it looks
                           up several times are added first
        bias, gain         from the gradient

    `costs` has the formulas that decide. Numbers of 16 bits are accumulated in 32.

    Args:
      signal: the operands of one parameter.

    Returns:
      An array [N]. `example_norms` and `layer_norms` combine those of several parameters.

    Raises:
      TypeError: `signal` is not a signal of a known kind.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.sq_norms(bp.Bias(jnp.array([[3.0, 4.0], [0.0, 1.0]]))).tolist()
      [25.0, 1.0]
    """
    raise not_a_signal("sq_norms", signal)


@sq_norms.register
def _(signal: Outer):
    x, d = as_positions(widened(signal.inputs)), as_positions(widened(signal.deltas))
    (_, t, i), o = x.shape, d.shape[-1]
    if t == 1:
        return _sq_norm(x) * _sq_norm(d)
    if gram_is_less_work(i, o, pairs=t * t, rows=t, products=1):
        grams = jnp.einsum("nsi,nti->nst", x, x) * jnp.einsum("nso,nto->nst", d, d)
        # Where terms cancel, rounding errors are left, which can be negative or far below the norm.
        # The bound from below is the size of the rounding. Without it, an example's norm could be
        # underestimated, and a clipped sum could exceed its threshold.
        lengths = jnp.linalg.norm(x, axis=2) * jnp.linalg.norm(d, axis=2)
        rounding = jnp.finfo(x.dtype).eps * jnp.square(jnp.sum(lengths, axis=1))
        return jnp.maximum(jnp.sum(grams, axis=(1, 2)), rounding)
    return _sq_norm(per_example(Outer(x, d)))


@sq_norms.register(Bias)
@sq_norms.register(Scale)
def _(signal):
    return _sq_norm(per_example(jax.tree.map(widened, signal)))


@sq_norms.register
def _(signal: Lookup):
    return _sq_norm(each_row_once(jax.tree.map(widened, signal)).deltas)


@sq_norms.register
def _(signal: Conv):
    signal = jax.tree.map(widened, signal)
    if by_place_is_less_work(signal):
        squares = map_place_gradients(lambda g: jnp.sum(g * g, axis=(0, 2, 3)), signal)
        return jnp.sum(squares, axis=0)
    return jnp.sum(jax.vmap(sq_norms)(patched(signal)), axis=0)


@sq_norms.register
def _(signal: Through):
    if signal.back.moves:
        return sq_norms(signal.signal)
    return _sq_norm(per_example(widen(signal)))


@sq_norms.register
def _(signal: Sum):
    # |sum_i g_i|^2 = sum_i |g_i|^2 + 2 sum_(i > j) g_i . g_j, if all products have a closed form.
    uses, terms = [widen(use) for use in signal.signals], []
    for use, other in itertools.combinations(uses, 2):
        product = _product(use, other)
        if product is None:
            return _sq_norm(per_example(Sum(tuple(uses))))
        terms.append(2 * product)
    return functools.reduce(jnp.add, [*map(sq_norms, uses), *terms])


def _product(use, other):
    """g_n . h_n of a table whose rows are looked up in one use and are a matrix in the other."""
    if isinstance(other, Lookup):
        use, other = other, use
    if not isinstance(use, Lookup) or not isinstance(other, Through | Outer):
        return None
    if isinstance(other, Outer):  # the row with index v is that of input v
        rows, columns = other.inputs, other.deltas
    elif isinstance(other.signal, Outer) and getattr(other.back, "transposes", False):
        rows, columns = other.signal.deltas, other.signal.inputs
    else:
        return None
    d, rows, columns = map(as_positions, (use.deltas, rows, columns))
    at = jnp.take_along_axis(rows, use.indices.reshape(len(d), 1, -1), axis=2)
    return jnp.einsum("nso,nto,nts->n", d, columns, at)


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
    axes = jax.tree.leaves(stack_axes(readings))
    leaves = jax.tree.leaves(readings)
    shapes = {jnp.shape(leaf)[k:] for leaf, k in zip(leaves, axes, strict=True)}
    if len(shapes) != 1 or len(*shapes) != 1:
        raise ValueError(
            "example_norms: takes a tree of squared norms, all of shape [N], as read=sq_norms "
            f"gives; it got {', '.join(map(show_shape, sorted(shapes))) or 'no leaves'}."
        )
    return jnp.sqrt(sum_leaves(readings))


def layer_norms(readings: PyTree) -> PyTree:
    """Computes the norm of each example's gradient with respect to each layer.

    A layer is an innermost collection of parameters, such as the dict of a weight and its bias.

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

    def parts(node):
        return jax.tree.leaves(node, is_leaf=lambda child: child is not node)

    return map_layers(
        lambda layer: example_norms(layer) if parts(layer) else layer,
        readings,
        is_leaf=lambda node: jax.tree_util.all_leaves(parts(node)),
    )


def _sq_norm(x: jax.Array) -> jax.Array:
    """The squared norm of each row, [N, ...] to [N]."""
    return jnp.sum(x * x, axis=range(1, x.ndim))
