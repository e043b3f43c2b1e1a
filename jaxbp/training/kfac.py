"""KFAC: natural gradients from Kronecker factors, as an optax transformation.

The Fisher information of each dense layer and each convolution is approximated by A x G, where A is
the second moment of the layer's inputs and G that of its error signals (see `readings.moments`; a
kernel [*K, I, O] counts as a matrix [K I, O]). The natural gradient F^-1 g is then

    A^-1 g G^-1   for the gradient g [I + 1, O] of a weight and, as its last row, the bias.

Layers are treated as independent. The factors are averaged over steps. Damping by lambda adds
sqrt(lambda) times the identity to both factors, balanced by pi, the square root of the ratio of
their mean eigenvalues:

    A + pi sqrt(lambda) I,   G + sqrt(lambda) / pi I,   pi^2 = (tr A / dim A) / (tr G / dim G)

Source:
  "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", Martens, Grosse, 2015.
  "A Kronecker-factored approximate Fisher matrix for convolution layers", Grosse, Martens, 2016.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxbp.outputs.errors import sampled
from jaxbp.readings.moments import Kronecker, kronecker
from jaxbp.signals.stacked import map_layers, one_layer
from jaxbp.sweeps.gradients import backprop
from jaxbp.types import Layer, Loss, Params, PyTree, show_path, show_shape, widened

__all__ = ["KfacState", "kfac_factors", "scale_by_kfac"]

# Folded into the key of the forward pass. A small number would not do: layers split that key, and
# one of them gets the key that fold_in(key, 1) gives.
ERROR_STREAM = 2**31


class FactorsOfBatch(Protocol):
    """What `kfac_factors` returns: the factors of a network's layers on a batch."""

    def __call__(
        self, params: Params, inputs: PyTree, targets: PyTree, *, key: jax.Array
    ) -> PyTree:
        """Returns the factors; `key` is for layers that draw and for the sampled targets."""
        ...


def kfac_factors(
    net: Layer,
    loss: Loss,
    *,
    error: Callable[..., jax.Array] = sampled,
    shared: Literal["expand", "reduce"] = "expand",
) -> FactorsOfBatch:
    """The Kronecker factors of a network's layers on a batch, for `scale_by_kfac`.

    They are computed by exact backpropagation, whatever rule computes the gradient.

    Args:
      net: a Layer.
      loss: a Loss.
      error: the error whose second moment is the curvature: `sampled` for KFAC, `ggn_columns` for
        its exact form, KFLR.
      shared: how positions are treated, `expand` or `reduce` (see `kronecker`).

    Returns:
      `function(params, inputs, targets, *, key) -> factors`, a tree like params with a `Kronecker`
      at each weight. There is nothing at the biases, because the factors of the weights include
      them.

    Raises:
      TypeError: when called, `loss` is a plain function, and `error` takes a Loss.

    References:
      "Practical Gauss-Newton Optimisation for Deep Learning", Botev, Ritter, Barber, 2017: KFLR.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(2)
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> factors_of = bp.kfac_factors(net, bp.squared_error)
      >>> batch = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> factors = factors_of(params, *batch, key=jax.random.key(1))
      >>> factors["weight"].inputs.shape, factors["weight"].deltas.shape
      ((4, 4), (2, 2))
    """
    sweep = backprop(net, loss, read=functools.partial(kronecker, shared=shared), error=error)

    def function(params, inputs, targets, *, key):
        error_key = jax.random.fold_in(key, ERROR_STREAM)
        return sweep(params, inputs, targets, key=key, error_key=error_key)[1]

    return function


class KfacState(NamedTuple):
    """The state of `scale_by_kfac`.

    Attributes:
      step: the number of updates so far.
      factors: the running averages of the factors, a `Kronecker` for each layer.
      inverses: the inverses of the damped averages, from the last time they were computed.
    """

    step: jax.Array
    factors: PyTree
    inverses: PyTree


def scale_by_kfac(
    *, damping: float | jax.Array = 1e-2, decay: float = 0.95, every: int = 10
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from gradients to natural gradients, A^-1 g G^-1 for each layer.

    Its update takes the factors of the batch, `update(grads, state, params, factors=factors)`,
    which `kfac_factors` computes. In `fit`, `make_epoch` and `make_step`, pass
    `extra_args={"factors": bp.kfac_factors(net, loss)}`.

    Learning rate and momentum come from optax transformations after this one. A natural gradient
    also needs a trust region while the averages hold few batches: put `optax.clip_by_global_norm`
    directly after this transformation.

    Args:
      damping: lambda, positive, in units of the curvature of one example's loss. A number, or a
        schedule by `optax.inject_hyperparams(scale_by_kfac, static_args=("decay", "every"))`.
      decay: the decay of the running averages, in [0, 1). The first steps are averaged with equal
        weights.
      every: the number of steps from one inversion of the factors to the next.

    Raises:
      ValueError: an argument is out of range; at `init`, there are parameters of other layers than
        dense layers and convolutions; at `update`, factors are missing or belong to another
        network, or a convolution has groups.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> x = jax.random.normal(jax.random.key(0), (200, 2))
      >>> labels = (x[:, 0] * x[:, 1] > 0).astype(int)
      >>> net = bp.chain(bp.dense(16), bp.tanh(), bp.dense(2))
      >>> loss = bp.softmax_cross_entropy
      >>> run = bp.fit(
      ...     net, loss,
      ...     optax.chain(
      ...         bp.scale_by_kfac(), optax.clip_by_global_norm(1.0), optax.sgd(0.3, momentum=0.9)
      ...     ),
      ...     (x, labels), key=jax.random.key(1), metric=bp.accuracy, target=0.95, batch_size=50,
      ...     extra_args={"factors": bp.kfac_factors(net, loss)},
      ... )
      >>> run.stopped_by
      'target'
    """
    wrong = []
    if not isinstance(damping, Tracer) and not 0 < damping < math.inf:
        wrong.append(f"damping is {damping}, expected a positive number")
    if not 0 <= decay < 1:
        wrong.append(f"decay is {decay}, expected a number in [0, 1)")
    if not isinstance(every, int) or every < 1:
        wrong.append(f"every is {every!r}, expected a positive integer")
    if wrong:
        raise ValueError(f"scale_by_kfac: {'; '.join(wrong)}.")

    def init(params):
        _require_layers(params)
        zeros = map_layers(_no_factors, params, is_leaf=_is_layer)
        return KfacState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates, state, params=None, *, factors=None, **extra_args):
        del params, extra_args
        batch = _own_factors(updates, factors, state.factors)
        step = state.step + 1

        def average(old, new):
            kept = jnp.minimum(decay, 1 - 1 / step.astype(old.dtype))
            return kept * old + (1 - kept) * new

        averages = jax.tree.map(average, state.factors, batch)
        inverses = jax.lax.cond(
            state.step % every == 0,
            lambda: map_layers(
                lambda factors: _inverted(factors, damping), averages, is_leaf=_is_factors
            ),
            lambda: state.inverses,
        )
        updates = map_layers(_natural, updates, inverses, is_leaf=_is_layer)
        return updates, KfacState(step, averages, inverses)

    return optax.GradientTransformationExtraArgs(init, update)


def _inverted(factors: Kronecker, damping: float | jax.Array) -> Kronecker:
    """The inverses of both damped factors."""
    a, g = factors
    pi = jnp.sqrt(_mean_eigenvalue(a) / _mean_eigenvalue(g))
    # A layer that no error reaches has a factor of zero, and its pi would be infinite.
    pi = jnp.where(jnp.isfinite(pi) & (pi > 0), pi, 1)
    root = jnp.sqrt(jnp.asarray(damping, a.dtype))
    return Kronecker(_inverse(a, pi * root), _inverse(g, root / pi))


def _mean_eigenvalue(matrix):
    return jnp.trace(matrix) / len(matrix)


def _inverse(matrix, shift):
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix + shift * eye), eye)


def _natural(grads, inverses):
    """A^-1 g G^-1 of one layer, with the bias as the last row of g."""
    weight = grads["weight"]
    matrix = weight.reshape(-1, weight.shape[-1])
    rows = widened(jnp.vstack([matrix, grads["bias"]]) if "bias" in grads else matrix)
    rows = inverses.inputs @ rows @ inverses.deltas
    natural = {"weight": rows[: len(matrix)].reshape(weight.shape), "bias": rows[-1]}
    return {name: natural[name].astype(g.dtype) for name, g in grads.items()}


def _is_factors(node):
    return isinstance(node, Kronecker)


def _is_layer(node):
    """Whether a node of a tree of parameters belongs to a dense layer or a convolution."""
    return (
        isinstance(node, dict)
        and set(node) in ({"weight"}, {"weight", "bias"})
        and getattr(node["weight"], "ndim", 0) >= 2
    )


def _no_factors(layer):
    *rows, o = layer["weight"].shape
    i = math.prod(rows) + ("bias" in layer)
    dtype = widened(layer["weight"]).dtype
    return Kronecker(jnp.zeros((i, i), dtype), jnp.zeros((o, o), dtype))


def _require_layers(params: Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(one_layer(params), is_leaf=_is_layer):
        if not _is_layer(leaf):
            raise ValueError(
                "scale_by_kfac: takes the parameters of dense layers and convolutions, dicts of a "
                f"weight [..., I, O] and a bias; got {show_path(path)} of shape "
                f"{show_shape(jnp.shape(leaf))}. Give others an optimizer of their own by "
                "optax.partition?"
            )


def _own_factors(params, factors, like):
    """The factors of each layer, after a check that they belong to this network."""
    if factors is None:
        raise ValueError(
            "scale_by_kfac: its update takes factors=..., as kfac_factors computes them. With fit "
            "or make_step: extra_args={'factors': bp.kfac_factors(net, loss)}."
        )

    def own(layer, factors):
        if not _is_layer(layer):  # masked by optax.partition: another optimizer updates it
            return layer
        a, g = factors["weight"]
        dtype = widened(layer["weight"]).dtype
        if "bias" not in layer:  # A is that of (x, 1); without the last row and column, that of x
            a = a[:-1, :-1]
        return Kronecker(a.astype(dtype), g.astype(dtype))

    def is_own(node):
        return _is_layer(node) or isinstance(node, optax.MaskedNode)

    problem = (
        "scale_by_kfac: the factors are not those of this network's layers with their biases "
        "folded in, as kfac_factors computes them. (A convolution in groups has a pair for each "
        "group. Give it another optimizer by optax.partition?)"
    )
    try:
        batch = map_layers(own, params, factors, is_leaf=is_own)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(problem) from error
    if jax.tree.map(jnp.shape, batch) != jax.tree.map(jnp.shape, like):
        raise ValueError(problem)
    return batch
