"""The transformation: running averages of factors, and natural gradients by their inverses."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxbp.readings.moments import Kronecker
from jaxbp.require import is_count
from jaxbp.sharding import alike, is_manual, varying_with
from jaxbp.signals.kinds import Through
from jaxbp.signals.stacked import map_layers, one_layer
from jaxbp.training.kfac.inverses import inverted, natural
from jaxbp.training.kfac.layers import (
    as_rows,
    is_factors,
    is_layer,
    is_nothing,
    map_factors,
    matrices_of,
    parts_of,
    weight_and_bias,
)
from jaxbp.types import Params, PyTree, exportable, show_path, show_shape, widened

__all__ = ["KfacState", "scale_by_kfac"]


@exportable
class KfacState(NamedTuple):
    """The state of `scale_by_kfac`.

    Attributes:
      step: the number of updates so far.
      factors: the running averages: a `Kronecker` for each layer, in a `Through` if its weight has
        another layout, or the diagonal of a parameter without factors.
      inverses: the inverses of the damped averages, from the last time they were computed.
    """

    step: jax.Array
    factors: PyTree
    inverses: PyTree


def scale_by_kfac(
    like: PyTree | Callable[[Params], PyTree] | None = None,
    *,
    damping: float | jax.Array = 1e-2,
    decay: float = 0.95,
    every: int = 10,
    factors_every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from gradients to natural gradients, A^-1 g G^-1 for each layer.

    Its update takes the factors of the batch, `update(grads, state, params, factors=factors)`,
    which `kfac_factors` computes. In `fit`, `make_epoch` and `make_step`, pass
    `extra_args={"factors": bp.kfac_factors(net, loss)}`.

    The state has a place for each factor before the first batch comes. For networks that consist of
    dense layers and convolutions, their parameters tell the shapes. For any other network, pass
    `like`.

    Factors cost about as much as another gradient. With `factors_every=k` they are computed in
    every k-th step only. They are then passed as a function, which is called where they are due:
    `extra_args={"factors": bp.deferred(bp.kfac_factors(net, loss))}`.

    Learning rate and momentum come from optax transformations after this one. A natural gradient
    also needs a trust region while the averages hold few batches: put `optax.clip_by_global_norm`
    directly after this transformation.

    Args:
      like: the factors of any batch, for their shapes, or a function of the parameters that returns
        them and is not run. Without it, all parameters have to be those of dense layers and of
        convolutions without groups, dicts of a `weight` and a `bias`.
      damping: lambda, positive, in units of the curvature of one example's loss. A number, or a
        schedule by `optax.inject_hyperparams(scale_by_kfac, static_args=("like", "decay", "every",
        "factors_every"))`.
      decay: the decay of the running averages, in [0, 1), for each batch of factors. The first
        batches are averaged with equal weights.
      every: the number of steps from one inversion of the factors to the next.
      factors_every: the number of steps from one batch of factors to the next. None for every step.

    Raises:
      ValueError: an argument is out of range; at `init`, there is no `like`, and there are
        parameters of other layers than dense layers and convolutions; at `update`, factors are
        missing, are not a function where `factors_every` is given, or are not like those that the
        state was made for.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> x = jax.random.normal(jax.random.key(0), (200, 2))
      >>> labels = (x[:, 0] * x[:, 1] > 0).astype(int)
      >>> net = bp.chain(bp.dense(16), bp.layer_norm(), bp.tanh(), bp.dense(2))
      >>> loss = bp.softmax_cross_entropy
      >>> factors = bp.kfac_factors(net, loss)
      >>> def like(params):
      ...     return factors(params, x, labels, key=jax.random.key(0))
      >>> run = bp.fit(
      ...     net, loss,
      ...     optax.chain(
      ...         bp.scale_by_kfac(like, factors_every=2),
      ...         optax.clip_by_global_norm(1.0),
      ...         optax.sgd(0.3, momentum=0.9),
      ...     ),
      ...     (x, labels), key=jax.random.key(1), metric=bp.accuracy, target=0.95, batch_size=50,
      ...     extra_args={"factors": bp.deferred(factors)},
      ... )
      >>> run.stopped_by
      'target'
    """
    wrong = []
    if not isinstance(damping, Tracer) and not 0 < damping < math.inf:
        wrong.append(f"damping is {damping}, expected a positive number")
    if not 0 <= decay < 1:
        wrong.append(f"decay is {decay}, expected a number in [0, 1)")
    if not is_count(every):
        wrong.append(f"every is {every!r}, expected a positive integer")
    if factors_every is not None and not is_count(factors_every):
        wrong.append(f"factors_every is {factors_every!r}, expected a positive integer or None")
    if wrong:
        raise ValueError(f"scale_by_kfac: {'; '.join(wrong)}.")
    period = factors_every or 1

    def init(params):
        if like is None:
            _require_layers(params)
            factors = jax.eval_shape(_by_name, params)
        elif callable(like):
            _require_unmasked(params)
            factors = jax.eval_shape(like, params)
        else:
            factors = like
        shapes = jax.eval_shape(_own_factors, params, factors)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return KfacState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates, state, params=None, *, factors=None, **extra_args):
        del params, extra_args
        _require_factors(factors, factors_every)

        def averages():
            batch = _own_factors(updates, factors() if callable(factors) else factors)
            if jax.tree.map(jnp.shape, batch) != jax.tree.map(jnp.shape, state.factors):
                raise ValueError(WRONG_FACTORS)
            batches = state.step // period + 1  # with this one

            def average(old, new):
                kept = jnp.minimum(decay, 1 - 1 / batches.astype(old.dtype))
                return alike(old, kept * old + (1 - kept) * new)

            return jax.tree.map(average, state.factors, batch)

        if period == 1:
            averaged = averages()
        else:
            before = state.factors
            if is_manual():  # elsewhere the factors are not even traced before they are due
                like = jax.tree.map(jnp.zeros_like, jax.eval_shape(averages))
                before = varying_with(like, before)
            averaged = jax.lax.cond(state.step % period == 0, averages, lambda: before)
        before = varying_with(averaged, state.inverses)
        inverses = jax.lax.cond(
            state.step % every == 0,
            lambda: jax.tree.map(alike, before, inverted(averaged, damping)),
            lambda: before,
        )
        return natural(inverses, updates), KfacState(state.step + 1, averaged, inverses)

    return optax.GradientTransformationExtraArgs(init, update)


WRONG_FACTORS = (
    "scale_by_kfac: the factors are not those of this network's layers with their biases "
    "folded in, as kfac_factors computes them. (A convolution in groups has a pair for each "
    "group. Give it another optimizer by optax.partition, or pass like=...?)"
)


def _own_factors(params: PyTree, factors: PyTree) -> PyTree:
    """The factors of each layer in its dtype, after a check that they fit its parameters."""

    def own(factors, params):
        leaves = jax.tree.leaves(params)
        if factors is None or (is_nothing(factors) and not leaves):
            return factors
        if not leaves:  # masked by optax.partition: another optimizer updates it
            if is_factors(factors) or not is_layer(factors):
                return None
            structure = jax.tree.structure(factors, is_leaf=lambda n: n is not factors)
            return structure.unflatten([None] * structure.num_leaves)
        if is_layer(factors):
            return _of_layer(factors, leaves)
        (leaf,) = leaves
        if is_nothing(factors) or factors.shape != leaf.shape:
            raise ValueError(WRONG_FACTORS)
        return factors.astype(widened(leaf).dtype)

    try:
        return map_factors(own, factors, params, is_layer=is_layer)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(WRONG_FACTORS) from error


def _of_layer(node, leaves):
    """The factors of a layer with these parameters, without a row for a bias if it has none."""
    factors = node if is_factors(node) else next(filter(is_factors, parts_of(node)))
    matrices, view = matrices_of(factors)
    a, g = matrices
    _, weight, bias = weight_and_bias(leaves)
    rows = as_rows(weight, bias, matrices, view).shape[-2]
    if bias is None and a.shape[-1] == rows + 1:  # A is that of (x, 1)
        a = a[..., :-1, :-1]
    if a.shape[-1] != rows:
        raise ValueError(WRONG_FACTORS)
    dtype = widened(weight).dtype
    own = Kronecker(a.astype(dtype), g.astype(dtype))
    return own if view is None else Through(own, view)


def _require_factors(factors, factors_every):
    if factors is None:
        raise ValueError(
            "scale_by_kfac: its update takes factors=..., as kfac_factors computes them. With fit "
            "or make_step: extra_args={'factors': bp.kfac_factors(net, loss)}."
        )
    if factors_every is not None and not callable(factors):
        raise ValueError(
            f"scale_by_kfac: factors_every is {factors_every}, but the factors were computed "
            "already; it takes a function that computes them. With fit or make_step: "
            "extra_args={'factors': bp.deferred(bp.kfac_factors(net, loss))}."
        )


def _is_named_layer(node):
    """Whether a node of a tree of parameters looks like a dense layer's or a convolution's."""
    return (
        isinstance(node, dict)
        and set(node) in ({"weight"}, {"weight", "bias"})
        and getattr(node["weight"], "ndim", 0) >= 2
    )


def _by_name(params):
    """Factors of the right shapes for the parameters of dense layers and convolutions."""

    def factors_of(layer):
        if layer is None:
            return None
        *rows, o = layer["weight"].shape
        i = math.prod(rows) + 1
        factors = Kronecker(jnp.zeros((i, i)), jnp.zeros((o, o)))
        return {name: factors if name == "weight" else () for name in layer}

    # What optax.partition masks is updated by another optimizer.
    own = jax.tree.map(lambda n: None if _is_masked(n) else n, params, is_leaf=_is_masked)
    return map_layers(factors_of, own, is_leaf=lambda n: n is None or _is_named_layer(n))


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def _require_unmasked(params):
    if any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        raise ValueError(
            "scale_by_kfac: like is a function of the parameters, but some parameters belong to "
            "another optimizer. Pass the factors of a batch, or their shapes: "
            "like=jax.eval_shape(function, params)."
        )


def _require_layers(params: Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(one_layer(params), is_leaf=_is_named_layer):
        if not _is_named_layer(leaf):
            raise ValueError(
                "scale_by_kfac: takes the parameters of dense layers and convolutions, dicts of a "
                f"weight [..., I, O] and a bias; got {show_path(path)} of shape "
                f"{show_shape(jnp.shape(leaf))}. Give others an optimizer of their own by "
                "optax.partition, or pass like=..., the factors of a batch?"
            )
