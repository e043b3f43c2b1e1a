"""Second moments: readings of the second order, from a gradient multiplied with itself.

The products of a gradient with itself measure two things, depending on the error that was sent
back. With the loss's own delta they tell how gradients scatter over the examples. With the columns
s_k of a square root of the loss's Hessian, sum_k s_k s_k^T (see `errors`), they are curvature: the
generalised Gauss-Newton matrix of one example is sum_k g_nk g_nk^T, with g_nk = J_n^T s_nk. In the
place of those columns the loss's own delta gives what is called the empirical Fisher information.

  diagonal               sum_nk g_nk^2           [shape of the parameter]
  per_example_diagonal   sum_k g_nk^2            [N, shape of the parameter]
  second_moment          sum_n g_n^2 / N         [shape of the parameter]
  variance               sum_n (g_n - m)^2 / N   [shape of the parameter], m the mean
  kronecker              A [I, I] and G [O, O], of which the product stands for sum_nk g g^T / N

Those with an argument `columns` take the sum over k where it is cheapest, which for a weight
matrix is before any product is formed; `backprop` hands it to them. All numbers of 16 bits are
accumulated in 32.

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> signal = bp.Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [4.0]]))
  >>> bp.diagonal(signal)[:, 0].tolist(), bp.variance(signal)[:, 0].tolist()
  ([9.0, 52.0], [2.25, 1.0])

Sources:
  "BackPACK: Packing more into backprop", Dangel, Kunstner, Hennig, 2020: moments and the diagonal.
  "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", Martens, Grosse, 2015.
  "A Kronecker-factored approximate Fisher matrix for convolution layers", Grosse, Martens, 2016.
  "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", Eschenhagen,
  Immer, Turner, Schneider, Hennig, 2023: weights that positions share, expand and reduce.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.readings.sums import mean, per_example, total
from jaxbp.signals.conv_patches import patched_outputs
from jaxbp.signals.kinds import (
    Bias,
    Conv,
    Lookup,
    Outer,
    Scale,
    as_positions,
    as_rows,
    each_row_once,
    is_signal,
    not_a_signal,
)
from jaxbp.types import widened


@functools.singledispatch
def per_example_diagonal(signal, *, columns=None) -> jax.Array:
    """The squared gradient of each example, sum_k g_nk^2, [N, shape of the parameter].

    With the columns of the loss's Hessian: the diagonal of each example's Gauss-Newton matrix.

    Args:
      signal: the operands of one parameter.
      columns: the name of the axis over which the sweep is vmapped, if k runs over several.

    Raises:
      TypeError: `signal` is not of a kind known here.
    """
    del columns
    raise not_a_signal("per_example_diagonal", signal)


@per_example_diagonal.register
def _(signal: Outer, *, columns=None):
    x, d = as_positions(widened(signal.inputs)), _all_columns(signal.deltas, columns)
    if x.shape[1] == 1:
        return per_example(Outer(jnp.square(x), _sum_squares(lambda d: d, d)))
    return _sum_squares(lambda d: per_example(Outer(x, d)), d)


@per_example_diagonal.register
def _(signal: Bias, *, columns=None):
    return _sum_squares(lambda d: jnp.sum(d, axis=1), _all_columns(signal.deltas, columns))


@per_example_diagonal.register
def _(signal: Scale, *, columns=None):
    x, d = as_positions(widened(signal.inputs)), _all_columns(signal.deltas, columns)
    return _sum_squares(lambda d: jnp.sum(x * d, axis=1), d)


@per_example_diagonal.register
def _(signal: Lookup, *, columns=None):
    return per_example(_squared(signal, columns))


@per_example_diagonal.register
def _(signal: Conv, *, columns=None):
    signal = jax.tree.map(widened, signal)
    return _sum_squares(
        lambda d: per_example(signal._replace(deltas=d)), _every_column(signal.deltas, columns)
    )


def _squared(signal, columns):
    """A signal of which the gradients are the squares of this one's, summed over the columns."""

    def sums(d):
        return each_row_once(signal._replace(deltas=d)).deltas

    squares = _sum_squares(sums, _all_columns(signal.deltas, columns))
    return each_row_once(signal)._replace(deltas=squares)


@functools.singledispatch
def diagonal(signal, *, columns=None) -> jax.Array:
    """The sum of squared gradients, sum_nk g_nk^2, of the parameter's shape.

    With the columns of the loss's Hessian: the diagonal of the Gauss-Newton matrix of the summed
    loss; divided by N, that of the mean loss.

    Args:
      signal: the operands of one parameter.
      columns: the name of the axis over which the sweep is vmapped, if k runs over several.

    Raises:
      TypeError: `signal` is not of a kind known here.
    """
    del columns
    raise not_a_signal("diagonal", signal)


@diagonal.register
def _(signal: Outer, *, columns=None):
    x, d = as_positions(widened(signal.inputs)), _all_columns(signal.deltas, columns)
    if x.shape[1] == 1:
        # (x d^T)^2 = x^2 (d^2)^T, so that the sum over examples is one matrix product.
        return jnp.square(x[:, 0]).T @ _sum_squares(lambda d: d[:, 0], d)
    example = jnp.tile(jnp.arange(len(x)), len(d))  # by its number, so that x is held but once
    pairs = example, d.reshape(-1, *d.shape[2:])
    return _sum_squares(lambda pair: x[pair[0]].T @ pair[1], pairs)


@diagonal.register
def _(signal: Bias, *, columns=None):
    d = jnp.sum(_all_columns(signal.deltas, columns), axis=2)
    return jnp.sum(jnp.square(as_rows(d)), axis=0)


@diagonal.register
def _(signal: Scale, *, columns=None):
    return jnp.sum(per_example_diagonal(signal, columns=columns), axis=0)


@diagonal.register
def _(signal: Lookup, *, columns=None):
    return total(_squared(signal, columns))


@diagonal.register
def _(signal: Conv, *, columns=None):
    x, d = widened(signal.inputs), _every_column(widened(signal.deltas), columns)
    example = jnp.tile(jnp.arange(len(x)), len(d))

    def gradient(pair):
        return per_example(signal._replace(inputs=x[pair[0]][None], deltas=pair[1][None]))[0]

    return _sum_squares(gradient, (example, d.reshape(-1, *d.shape[2:])))


def second_moment(signal) -> jax.Array:
    """The mean over examples of the squared gradient, sum_n g_n^2 / N, of the parameter's shape.

    Raises:
      TypeError: `signal` is not of a kind known here.
    """
    if not is_signal(signal):
        raise not_a_signal("second_moment", signal)
    return diagonal(signal) / len(signal.deltas)


def variance(signal) -> jax.Array:
    """The variance over examples of the gradient, sum_n (g_n - m)^2 / N, of the parameter's shape.

    m is the mean. It is computed as second_moment - m^2, which costs two matrix products instead of
    the gradient of every example; where the deviation is below m times the root of the number
    format's precision, what is left is rounding (never below zero).

    Raises:
      TypeError: `signal` is not of a kind known here.
    """
    if not is_signal(signal):
        raise not_a_signal("variance", signal)
    return jnp.maximum(second_moment(signal) - jnp.square(mean(jax.tree.map(widened, signal))), 0)


class Kronecker(NamedTuple):
    """Two factors whose Kronecker product stands for the curvature of one weight matrix [I, O].

    That of a kernel [*K, I, O] is [K I, O]; of one in G groups there are G pairs.

    As matrices over the entries (i, o) of the weight, row by row: `jnp.kron(inputs, deltas)`.

    Attributes:
      inputs: A, [I, I], or [I + 1, I + 1] with the bias folded in.
      deltas: G, [O, O].
    """

    inputs: jax.Array
    deltas: jax.Array


@functools.singledispatch
def kronecker(signal, *, bias="folded", shared="expand", columns=None) -> Kronecker | tuple[()]:
    """The Kronecker factors of a weight's curvature, A = E[a a^T] and G = E[d d^T].

    Their product approximates the Gauss-Newton block of the mean loss, sum_nk g_nk g_nk^T / N.

      shared     A                              G                            exact, for example
      expand     sum_nt a_nt a_nt^T / (N T)     sum_ntk d_ntk d_ntk^T / N    if positions never meet
      reduce     sum_n b_n b_n^T / N            sum_nk e_nk e_nk^T / N       if they are averaged

    with b_n = sum_t a_nt / T and e_nk = sum_t d_ntk. Without positions the two are the same.

      bias       the weight's factors       the bias's
      folded     of a = (x, 1)              (), nothing: it is the last row of the weight
      apart      of a = x                   of a = 1, so that A = [[1]]

    A weight cannot tell whether it has a bias: folded, A is [I + 1, I + 1] in any case, and
    A[:-1, :-1] is that of x alone. A gain and a table have no such factors, and get ().

    A kernel [*K, I, O] is a matrix [K I, O] that is applied to patches, one for each output, and
    has the factors of that; in G groups it is G of them, and the factors have G as first axis.

    Args:
      signal: the operands of one parameter.
      bias: `folded` or `apart`.
      shared: `expand` or `reduce`.
      columns: the name of the axis over which the sweep is vmapped, if k runs over several.

    Returns:
      `Kronecker(inputs=A, deltas=G)`.

    Raises:
      TypeError: `signal` is not of a kind known here.
      ValueError: `bias` or `shared` is neither of its two words.
    """
    del bias, shared, columns
    raise not_a_signal("kronecker", signal)


@kronecker.register
def _(signal: Outer, *, bias="folded", shared="expand", columns=None):
    _require_choices(bias, shared)
    a, d = as_positions(widened(signal.inputs)), _all_columns(signal.deltas, columns)
    if bias == "folded":
        a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1)
    if shared == "reduce":
        a = jnp.mean(a, axis=1, keepdims=True)
    return Kronecker(_products(a) / (a.shape[0] * a.shape[1]), _deltas_factor(d, shared))


@kronecker.register
def _(signal: Conv, *, bias="folded", shared="expand", columns=None):
    signal = jax.tree.map(widened, signal)
    factors = jax.vmap(lambda outer: kronecker(outer, bias=bias, shared=shared, columns=columns))(
        patched_outputs(signal)
    )
    return jax.tree.map(lambda a: a[0], factors) if signal.geometry.groups == 1 else factors


@kronecker.register
def _(signal: Bias, *, bias="folded", shared="expand", columns=None):
    _require_choices(bias, shared)
    if bias == "folded":
        return ()
    d = _all_columns(signal.deltas, columns)
    return Kronecker(jnp.ones((1, 1), d.dtype), _deltas_factor(d, shared))


@kronecker.register(Scale)
@kronecker.register(Lookup)
def _(signal, *, bias="folded", shared="expand", columns=None):
    del signal, columns
    _require_choices(bias, shared)
    return ()


def _deltas_factor(d, shared):
    """G, of columns of deltas [K, N, T, O]."""
    if shared == "reduce":
        d = jnp.sum(d, axis=2)
    return _products(d) / d.shape[1]


def _products(x):
    """The sum of the outer products of all rows with themselves, [..., I] to [I, I]."""
    rows = as_rows(x)
    return rows.T @ rows


def _all_columns(deltas, columns):
    """Deltas [N, ..., O] of every column of the sweep, [K, N, T, O]; K = 1 if there is no axis."""
    return _every_column(as_positions(widened(deltas)), columns)


def _every_column(deltas, columns):
    return deltas[None] if columns is None else jax.lax.all_gather(deltas, columns)


def _sum_squares(function, stacked):
    """sum_k function(x_k)^2, over the first axis of a tree of arrays, term by term.

    Nothing of K times the size of a term is formed; and XLA for CPUs sums over the first of three
    axes 20 times more slowly than a loop does (JAX 0.10.2; 10 x 512 x 1024 in 84 ms and in 3).
    """
    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], stacked))

    def add(total, x):
        return total + jnp.square(function(x)), None

    return jax.lax.scan(add, jnp.zeros(first.shape, first.dtype), stacked)[0]


def _require_choices(bias, shared):
    if bias not in ("folded", "apart"):
        raise ValueError(f"kronecker: bias is {bias!r}; it takes 'folded' or 'apart'.")
    if shared not in ("expand", "reduce"):
        raise ValueError(f"kronecker: shared is {shared!r}; it takes 'expand' or 'reduce'.")
