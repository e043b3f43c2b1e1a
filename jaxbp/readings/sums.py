"""Readings: what can be read off the operands of a gradient.

A reading takes the signal of one parameter and returns an array, or a tree of them. Applied inside
the sweep (`backward(..., read=mean)`) it turns each signal into its answer on the spot, and the
operands need not outlive their layer. Several readings of one sweep are a dict of them
(see `backprop`).

Each is written here once for every kind of signal, with g_n the gradient of example n's own loss
with respect to the parameter:

  total          sum_n g_n             [shape of the parameter]
  mean           sum_n g_n / N         [shape of the parameter]
  per_example    g_n                   [N, shape of the parameter]
  sq_norms       |g_n|^2               [N]

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
  >>> bp.per_example(signal)[..., 0].tolist()
  [[3.0, 6.0], [0.0, 4.0]]
  >>> bp.mean(signal)[:, 0].tolist(), bp.sq_norms(signal).tolist()
  ([1.5, 5.0], [45.0, 16.0])

Sources:
  "Efficient Per-Example Gradient Computations", Goodfellow, 2015: |x d^T|^2 = |x|^2 |d|^2.
  "Large Language Models Can Be Strong Differentially Private Learners", Li, Tramer, Liang,
  Hashimoto, 2021: the same with positions.
  "Scalable and Efficient Training of Large Convolutional Neural Networks with Differential
  Privacy", Bu, Mao, Xu, 2022: the choice between the two ways to compute it.
  "Efficient Per-Example Gradient Computations in Convolutional Neural Networks", Rochette, Manoel,
  Tramel, 2019: that a kernel's gradient of each example is a convolution again.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxbp.signals.conv_patches import as_kernel, map_place_gradients, patched, windowed
from jaxbp.signals.conv_products import exchanged, kernel_gradient
from jaxbp.signals.kinds import (
    Bias,
    Conv,
    Lookup,
    Outer,
    Scale,
    as_positions,
    as_rows,
    is_signal,
    not_a_signal,
)
from jaxbp.signals.stacked import map_layers, stack_axes, sum_leaves
from jaxbp.types import show_shape, weighed, widened


@functools.singledispatch
def total(signal, *, weights=None) -> jax.Array:
    """The sum over examples, sum_n w_n g_n, of the parameter's shape.

    Args:
      signal: the operands of one parameter.
      weights: w, [N]; 1 if there are none.

    Raises:
      TypeError: `signal` is not of a kind known here.
      ValueError: `weights` is not of shape [N].
    """
    del weights
    raise not_a_signal("total", signal)


@total.register
def _(signal: Outer, *, weights=None):
    deltas = weighed(signal.deltas, weights)
    return as_rows(signal.inputs).T @ as_rows(deltas)


@total.register
def _(signal: Bias, *, weights=None):
    return jnp.sum(as_rows(weighed(signal.deltas, weights)), axis=0)


@total.register
def _(signal: Scale, *, weights=None):
    return jnp.sum(as_rows(signal.inputs * weighed(signal.deltas, weights)), axis=0)


@total.register
def _(signal: Lookup, *, weights=None):
    deltas = as_rows(weighed(signal.deltas, weights))
    zeros = jnp.zeros((len(signal.table), deltas.shape[-1]), deltas.dtype)
    return zeros.at[signal.indices.ravel()].add(deltas)


@total.register
def _(signal: Conv, *, weights=None):
    signal = signal._replace(deltas=weighed(signal.deltas, weights))
    x, y = (a.reshape(-1, *a.shape[2:]) for a in windowed(signal))
    gradient = kernel_gradient(x, y, signal.geometry)
    if signal.geometry.transposed:
        gradient = exchanged(gradient, signal.geometry.groups)
    return gradient


def mean(signal, *, weights=None) -> jax.Array:
    """The mean over examples, sum_n w_n g_n / sum_n w_n, of the parameter's shape.

      weights=None       sum_n g_n / N
      all weights zero   zero

    Args:
      signal: the operands of one parameter.
      weights: w, [N], not negative.

    Raises:
      TypeError: `signal` is not of a kind known here.
      ValueError: `weights` is not of shape [N].
    """
    # A sum is linear in the deltas, and they are smaller than what they are multiplied into.
    if not is_signal(signal):
        raise not_a_signal("mean", signal)
    if weights is None:
        n = len(signal.deltas)
        return total(signal, weights=jnp.full(n, 1 / n, signal.deltas.dtype))
    norm = jnp.sum(weights)
    return total(signal, weights=jnp.where(norm == 0, 0, weights / jnp.where(norm == 0, 1, norm)))


@functools.singledispatch
def per_example(signal) -> jax.Array:
    """The gradient of each example, g_n, [N, shape of the parameter].

    Raises:
      TypeError: `signal` is not of a kind known here.
    """
    raise not_a_signal("per_example", signal)


@per_example.register
def _(signal: Outer):
    x, d = as_positions(signal.inputs), as_positions(signal.deltas)
    if x.shape[1] == 1:
        # A product that broadcasts: a batch of matrix products of rank one is far slower on a CPU.
        return x[:, 0, :, None] * d[:, 0, None, :]
    return jnp.einsum("nti,nto->nio", x, d)


@per_example.register
def _(signal: Bias):
    return jnp.sum(as_positions(signal.deltas), axis=1)


@per_example.register
def _(signal: Scale):
    return jnp.sum(as_positions(signal.inputs * signal.deltas), axis=1)


@per_example.register
def _(signal: Lookup):
    deltas = as_positions(signal.deltas)
    n, t, o = deltas.shape
    zeros = jnp.zeros((n, len(signal.table), o), deltas.dtype)
    return zeros.at[jnp.arange(n)[:, None], signal.indices.reshape(n, t)].add(deltas)


@per_example.register
def _(signal: Conv):
    if by_place_is_less_work(signal):
        gradients = jnp.moveaxis(map_place_gradients(lambda g: g, signal), 0, 2)
    else:
        gradients = jax.vmap(per_example)(patched(signal))
    return as_kernel(gradients, signal.geometry)


@functools.singledispatch
def sq_norms(signal) -> jax.Array:
    """The squared norm of each example's gradient, |g_n|^2, [N], without forming the gradient.

    For a weight matrix it is |x_n|^2 |d_n|^2. With positions it is sum_st (x_ns . x_nt)
    (d_ns . d_nt), from two Gram matrices [N, T, T], or that of the gradient itself, [N, I, O],
    whichever is less work (`gram_is_less_work`). A kernel is a matrix that patches share, or one
    at each of its places (`by_place_is_less_work`). Of a table it is that of the rows that an
    example looks up, with what is looked up at several positions added up first. Numbers of 16 bits
    are accumulated in 32.

    Raises:
      TypeError: `signal` is not of a kind known here.
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
        # What cancels leaves rounding, below zero or far below the norm. Never less than its size,
        # or an example could pass for shorter than it is, and a clipped sum exceed its threshold.
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


def by_place_is_less_work(signal):
    """Whether a kernel's gradients cost less for one of its places after another than by patches.

    There are three ways to the norm of sum_t x_u d_t^T over all K places, of G groups:

      Gram matrices   of the patches [T, K I / G] and of the deltas       (`gram_is_less_work`)
      patches         form the gradients [K I / G, O / G], and square
      places          form those of one place at a time, [I / G, O / G]

    The last two multiply as often, but patches are K times the images, and have to be written.
    Where Gram matrices are not less work, places were measured on a CPU to take 0.3 to 0.9 of the
    time of patches (images of 8 x 8 to 32 x 32 with 3 to 64 inputs, 3 x 3 places), 1.1 for
    sequences and for 7 x 7 places of 3 inputs, and 1.8 for one input, of which a place leaves
    vectors. Where they are, with few positions, places took 1.4 to 6 times as long as they.
    """
    inputs, outputs, geometry = signal.inputs.shape, signal.deltas.shape, signal.geometry
    if geometry.transposed:
        inputs, outputs = outputs, inputs
    t = math.prod(outputs[1:-1])
    i, o = inputs[-1] // geometry.groups, outputs[-1] // geometry.groups
    i *= math.prod(geometry.kernel)
    return inputs[-1] > 1 and not gram_is_less_work(i, o, pairs=t * t, rows=t, products=1)


def each_row_once(signal):
    """The same gradients, of which every example looks up each of its rows at one position.

    Where a row is looked up at several, one has the sum of the deltas; what is left over has
    deltas of zero. So with T positions the gradients are summed up in [N, T, O], not [N, V, O].
    """
    deltas = as_positions(signal.deltas)

    def merge(indices, deltas):
        rows, places = jnp.unique(indices, return_inverse=True, size=len(indices))
        return rows, jnp.zeros_like(deltas).at[places].add(deltas)

    rows, sums = jax.vmap(merge)(signal.indices.reshape(deltas.shape[:2]), deltas)
    return Lookup(rows, sums, signal.table)


def gram_is_less_work(i, o, *, pairs, rows, products):
    """Whether inner products of gradients [I, O] cost less from Gram matrices of their operands.

    With positions there are two ways to an inner product of gradients sum_t x_t d_t^T:

      Gram matrices   sum_st (x_s . x_t) (d_s . d_t)      pairs (I + O) multiplications
      gradients       form them, and multiply those       (rows + products) I O

    The second also writes what it forms. On a CPU the times were measured to cross where it has
    1.3 to 2 times fewer multiplications (I and O from 64 to 512, T from 2 to 256); hence 3/2.

    Args:
      i: inputs.
      o: outputs.
      pairs: of positions that meet: T^2 for the norm of one example, N T M S for N with M others.
      rows: positions from which gradients are formed: T for one example, N T + M S for N and M.
      products: inner products: 1 for one example, N M for N with M others.
    """
    return pairs * (i + o) < 1.5 * (rows + products) * i * o


def example_norms(readings):
    """The norm of each example's whole gradient, [N]: sqrt(sum over parameters of |g_n|^2).

    Args:
      readings: the tree that a sweep with `read=sq_norms` answers with.

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


def layer_norms(readings):
    """The norm of each example's gradient with respect to each layer, [N] in place of each.

    A layer is an innermost collection of parameters, such as the dict of a weight and its bias.
    Each layer of a stack is one: [L, N].

    Args:
      readings: the tree that a sweep with `read=sq_norms` answers with.

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


def _sq_norm(x):
    """The squared norm of each row, [N, ...] to [N]."""
    return jnp.sum(x * x, axis=range(1, x.ndim))
