"""Weights of examples and positions: losses that leave out padding, or count some terms more."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import require_array, require_outputs
from jaxbp.outputs.curvature import Drawn
from jaxbp.types import Loss, PyTree, Shape, show_shape

__all__ = ["ignoring", "weighted"]


def weighted(loss: Loss) -> Loss:
    """The loss with a weight for each example or position: E_n = sum_t w_nt E_nt.

    Its targets are a pair `(targets, weights)`. Weights are [N] or [N, T], or have any number of
    the first axes of the loss's terms. A mask is weights of 0 and 1. The weights are part of each
    example's own loss, so a mean over examples still divides by N.

      weight 0    value 0 and delta 0, whatever outputs and targets are: also NaN, or a label of -1

    The inputs of the network have to be finite even there. The gradient of a weight matrix is the
    product of inputs and deltas, and 0 times NaN is NaN. So pad inputs with zeros.

    Weights that depend on the norms of the gradients are those of `reweighted`.

    Args:
      loss: a Loss.

    Raises:
      TypeError: `loss` is not a Loss.
      ValueError: when called, the targets are not a pair, or the weights do not fit the terms.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.weighted(bp.squared_error)
      >>> value, delta = loss(
      ...     jnp.array([[3.0], [5.0]]), (jnp.zeros((2, 1)), jnp.array([1.0, 0.0]))
      ... )
      >>> value
      Array([4.5, 0. ], dtype=float32)
    """
    _require_loss("weighted", loss)
    name = f"weighted({loss.name})"

    def unpack(outputs, targets):
        """Outputs in at least 32 bits and targets, both valid where the weight is 0; weights."""
        y, shape = _widened_outputs(name, outputs)
        if not isinstance(targets, tuple) or len(targets) != 2:
            raise ValueError(f"{name}: takes its targets as a pair (targets, weights).")
        targets, weights = targets
        if isinstance(targets, list):
            targets = require_array(name, "targets", targets)
        weights = require_array(name, "weights", weights).astype(jax.tree.leaves(y)[0].dtype)
        if weights.ndim < 1 or weights.shape != shape[: weights.ndim]:
            raise ValueError(
                f"{name}: weights has shape {show_shape(weights.shape)}, expected the first axes "
                f"of {show_shape(shape)}."
            )
        y = jax.tree.map(lambda y: _where_kept(weights, y), y)
        valid = jax.tree.map(lambda t: _valid(weights, t, loss.filler), targets)
        return y, valid, weights

    def times(weights, values):
        if weights.ndim > values.ndim:
            raise ValueError(
                f"{name}: weights has shape {show_shape(weights.shape)}, expected the first axes "
                f"of {show_shape(values.shape)}."
            )
        return _where_kept(weights, _spread(weights, values) * values)

    def terms(outputs, targets):
        """The terms of a loss, each multiplied by its weight (see `weighted`)."""
        y, targets, weights = unpack(outputs, targets)
        values, delta = loss.terms(y, targets)
        delta = jax.tree.map(lambda d, y: times(weights, d).astype(y.dtype), delta, outputs)
        return times(weights, values), delta

    def sample(key, outputs, targets=None):
        if targets is None:
            y, (n, *_) = _widened_outputs(name, outputs)
            return loss.sample(key, y), jnp.ones(n, jax.tree.leaves(y)[0].dtype)
        y, targets, weights = unpack(outputs, targets)
        # w delta has second moment w^2 H, where the weighted loss's Hessian is w H.
        return loss.sample(key, y, targets), jnp.sqrt(weights)

    def hessian_factor(outputs, targets):
        y, targets, weights = unpack(outputs, targets)
        roots = _where_kept(weights, jnp.sqrt(weights))
        columns = jax.vmap(lambda column: times(roots, column))(loss.hessian_factor(y, targets))
        return columns.astype(outputs.dtype)

    def right_by(judge):
        def right(outputs, targets, top):
            y, targets, weights = unpack(outputs, targets)
            hits, own = judge(y, targets, top)
            return hits, times(weights.astype(own.dtype), own)

        return right

    right = None if loss.right is None else right_by(loss.right)
    return Loss(name, terms, sample, hessian_factor, right, loss.filler)


def ignoring(loss: Loss, label: int = -100) -> Loss:
    """The loss without the examples and positions that have a certain label, such as padding.

    It is `weighted(loss)` with weights of 0 where the target is `label`, and 1 elsewhere. Its
    targets are the labels alone.

    Args:
      loss: a Loss whose targets are one array, such as `softmax_cross_entropy`.
      label: the label to leave out. It may be a class, or any other integer.

    Raises:
      TypeError: `loss` is not a Loss.
      ValueError: `label` is not an integer.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.ignoring(bp.softmax_cross_entropy, -1)
      >>> value, delta = loss(jnp.zeros((1, 3, 2)), jnp.array([[0, 1, -1]]))
      >>> round(float(value[0]), 4), delta.tolist()
      (1.3863, [[[-0.5, 0.5], [0.5, -0.5], [0.0, 0.0]]])
    """
    _require_loss("ignoring", loss)
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"ignoring: label is {label!r}; it takes an integer.")
    name = f"ignoring({loss.name}, {label})"
    inner = weighted(loss)

    def kept(outputs, targets):
        if isinstance(targets, Drawn):
            return tuple(targets)
        _, shape = _widened_outputs(name, outputs)
        targets = require_array(name, "targets", targets)
        if targets.ndim < 1 or targets.shape != shape[: targets.ndim]:
            raise ValueError(
                f"{name}: targets has shape {show_shape(targets.shape)}, expected the first axes "
                f"of {show_shape(shape)}."
            )
        return targets, ~_equal(targets, label)

    def terms(outputs, targets):
        """The terms of a loss, zero where the target is a certain label (see `ignoring`)."""
        return inner.terms(outputs, kept(outputs, targets))

    def sample(key, outputs, targets=None):
        # A drawn label may be the one that is ignored, and then counts.
        return Drawn(
            *inner.sample(key, outputs, None if targets is None else kept(outputs, targets))
        )

    def hessian_factor(outputs, targets):
        return inner.hessian_factor(outputs, kept(outputs, targets))

    def right_by(judge):
        return lambda outputs, targets, top: judge(outputs, kept(outputs, targets), top)

    right = None if inner.right is None else right_by(inner.right)
    return Loss(name, terms, sample, hessian_factor, right, loss.filler)


def _widened_outputs(name: str, outputs: PyTree) -> tuple[Any, Shape]:
    """Outputs in at least 32 bits, and the shape of the first of them if they are a tree."""
    y = jax.tree.map(lambda y: require_outputs(name, y), outputs)
    leaves = jax.tree.leaves(y)
    if not leaves:
        raise ValueError(f"{name}: outputs is {outputs!r}, expected arrays [N, ..., O].")
    return y, leaves[0].shape


def _equal(targets, label):
    """Where targets are the label; nowhere if their dtype cannot hold it."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        held = jnp.iinfo(targets.dtype)
        if not held.min <= label <= held.max:
            return jnp.zeros_like(targets, bool)
    return targets == label


def _spread(weights, values):
    """Weights with axes of size 1 behind theirs, as many as the values have."""
    return weights.reshape(*weights.shape, *[1] * (values.ndim - weights.ndim))


def _where_kept(weights, values):
    """The values, and 0 where the weight is 0."""
    return jnp.where(_spread(weights, values) == 0, 0, values)


def _valid(weights, targets, filler):
    """Targets that the loss takes where the weight is 0, and the given ones elsewhere.

    There, they are the loss's filler. Without one, integers are 0, and the others 1/C, so that
    probabilities sum to 1.
    """
    if jnp.shape(targets)[: weights.ndim] != weights.shape or not _is_number(targets.dtype):
        return targets  # the loss says what is wrong
    if callable(filler):
        filler = filler(targets.shape[-1])
    if filler is None:
        filler = 1 / targets.shape[-1] if jnp.issubdtype(targets.dtype, jnp.floating) else 0
    return jnp.where(_spread(weights, targets) == 0, jnp.asarray(filler, targets.dtype), targets)


def _is_number(dtype):
    return jnp.issubdtype(dtype, jnp.bool) or jnp.issubdtype(dtype, jnp.number)


def _require_loss(name: str, loss: Loss | Callable[..., object]) -> None:
    if not isinstance(loss, Loss):
        raise TypeError(
            f"{name}: loss is {loss!r}; it takes a Loss. Make one of a function by loss_of?"
        )
