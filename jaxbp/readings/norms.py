"""Norms: the size of each example's gradient, without forming the gradient where that is cheaper.

  sq_norms         |g_n|^2 of one parameter            a reading, [N]
  layer_norms      of all parameters of each layer     from the answers of a sweep
  example_norms    of all parameters                   from the answers of a sweep

Sources:
  "Efficient Per-Example Gradient Computations", Goodfellow, 2015: |x d^T|^2 = |x|^2 |d|^2.
  "Large Language Models Can Be Strong Differentially Private Learners", Li, Tramer, Liang,
  Hashimoto, 2021: the same with positions.
  "Scalable and Efficient Training of Large Convolutional Neural Networks with Differential
  Privacy", Bu, Mao, Xu, 2022: the choice between the two ways to compute it.
"""

import functools

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
    as_positions,
    each_row_once,
    not_a_signal,
)
from jaxbp.signals.stacked import map_layers, stack_axes, sum_leaves
from jaxbp.types import show_shape, widened


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
