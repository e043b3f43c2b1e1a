"""Losses: how far outputs are from their targets, and which way to move them.

A loss maps outputs [N, ..., O] and targets to the value of each example, [N], and to its derivative
with respect to the outputs, delta = dE/dy, of the outputs' shape. Nothing is averaged over the
examples. The positions of one example are summed: the loss of a sequence is minus the logarithm of
its probability. `weighted` leaves out padded positions and examples.

The cross-entropies take logits, not probabilities. They are exact wherever the result can be
represented. 16-bit outputs are computed in 32 bits; delta is returned in the dtype of the outputs,
the value in 32 bits.

Each loss is the negative logarithm of a distribution p(target | outputs), up to a constant. It can
draw targets from this distribution, and it knows a factor of its Hessian (see `Loss`).

Example:
  >>> import jax.numpy as jnp, jaxbp as bp
  >>> logits, labels = jnp.array([[0.0, 0.0], [-1e4, 1e4]]), jnp.array([0, 0])
  >>> value, delta = bp.softmax_cross_entropy(logits, labels)
  >>> [round(float(v), 4) for v in value], delta.tolist()
  ([0.6931, 20000.0], [[-0.5, 0.5], [-1.0, 1.0]])
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbp.types import Loss, Shape, show_shape, widened

__all__ = [
    "accuracy",
    "huber",
    "make_huber",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "weighted",
]


def _softmax_cross_entropy():
    name = "softmax_cross_entropy"

    def terms(outputs, targets):
        """Cross-entropy of a softmax: E = -sum_c t_c log p_c with p = softmax(z). delta = p - t.

            Hessian    diag(p) - p p^T, with columns sqrt(p_c) (e_c - p)
            sample     integers, c with probability p_c

        Args:
          outputs: logits z, [N, ..., C].
          targets: classes as integers [N, ...], or probabilities [N, ..., C].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a label or
            a probability is out of range, or probabilities do not sum to 1.
        """
        z, targets = _require_outputs(name, outputs), jnp.asarray(targets)
        p = jax.nn.softmax(z)
        log_p = jax.nn.log_softmax(z)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            _require_labels(name, targets, z.shape)
            values = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
            # p - one_hot(t), computed by a subtraction at the labels only. It takes as many FLOP,
            # but the whole pass was measured to be up to a tenth faster on a CPU.
            rows, places = p.reshape(-1, p.shape[-1]), targets.ravel()
            delta = rows.at[jnp.arange(len(rows)), places].add(-1).reshape(p.shape)
        else:
            targets = _require_like(name, targets, outputs, "one probability per class")
            _require_range(name, targets, 0, 1, "probabilities")
            _require_sum_to_one(name, targets)
            # 0 log 0 = 0, also where p is too small to be represented and log p is -inf.
            values = -jnp.sum(jnp.where(targets == 0, 0, targets * log_p), axis=-1)
            delta = p * jnp.sum(targets, axis=-1, keepdims=True) - targets
        return values, delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        return jax.random.categorical(key, outputs)

    def hessian_factor(outputs, targets):
        del targets
        p = jax.nn.softmax(_require_outputs(name, outputs))
        columns = jnp.sqrt(p)[..., None, :] * (jnp.eye(p.shape[-1], dtype=p.dtype) - p[..., None])
        return jnp.moveaxis(columns, -1, 0).astype(outputs.dtype)

    return Loss(name, terms, sample, hessian_factor)


softmax_cross_entropy = _softmax_cross_entropy()


def _sigmoid_cross_entropy():
    name = "sigmoid_cross_entropy"

    def terms(outputs, targets):
        """Cross-entropy of sigmoids: E = -sum_o t_o log p_o + (1 - t_o) log(1 - p_o).

        p = sigmoid(z), delta = p - t. Use it for two classes with one output, or for O labels that
        do not exclude one another.

            Hessian    diag(p (1 - p))
            sample     0 or 1, 1 with probability p

        Args:
          outputs: logits z, [N, ..., O].
          targets: 0, 1 or a probability for each output, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a target
            is not in [0, 1].
        """
        z = _require_outputs(name, outputs)
        targets = _require_like(name, targets, outputs, "one target in [0, 1] per output")
        _require_range(name, targets, 0, 1, "targets")
        values = jnp.maximum(z, 0) - z * targets + jnp.log1p(jnp.exp(-jnp.abs(z)))
        return values, (jax.nn.sigmoid(z) - targets).astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        return jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype)

    def hessian_factor(outputs, targets):
        del targets
        z = _require_outputs(name, outputs)
        # sqrt(p(z) p(-z)) and not sqrt(p (1 - p)): for large z, 1 - p would round to zero.
        return _diagonal(jnp.sqrt(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)).astype(outputs.dtype))

    return Loss(name, terms, sample, hessian_factor)


sigmoid_cross_entropy = _sigmoid_cross_entropy()


def _squared_error():
    name = "squared_error"

    def terms(outputs, targets):
        """Half the squared error: E = sum_o (y_o - t_o)^2 / 2. delta = y - t.

            Hessian    the identity
            sample     normal, with mean y and variance 1

        Args:
          outputs: y, [N, ..., O].
          targets: t, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype.
        """
        y = _require_outputs(name, outputs)
        residuals = y - _require_like(name, targets, outputs, "one target per output")
        return residuals * residuals / 2, residuals.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)

    def hessian_factor(outputs, targets):
        del targets
        return _diagonal(jnp.ones_like(outputs))

    return Loss(name, terms, sample, hessian_factor)


squared_error = _squared_error()


def make_huber(threshold: float) -> Loss:
    """The Huber loss: a squared error up to a threshold h, an absolute error beyond it.

        E = sum_o  r_o^2 / 2            where |r_o| <= h,   r = y - t
                   h (|r_o| - h / 2)    elsewhere
        delta = r clipped to [-h, h]

        Hessian    1 where |r_o| <= h, else 0, on the diagonal
        sample     y + r, r with a density proportional to e^-E: normal in the middle,
                   exponential in the tails

    `bp.huber` is this loss with h = 1.

    Args:
      threshold: h, positive.

    Raises:
      ValueError: `threshold` is not positive.

    References:
      "Robust Estimation of a Location Parameter", Huber, 1964.
    """
    if not threshold > 0:
        raise ValueError(f"huber: threshold is {threshold}; it takes a positive number.")
    name = "huber"

    def residuals_of(outputs, targets):
        y = _require_outputs(name, outputs)
        return y - _require_like(name, targets, outputs, "one target per output")

    def terms(outputs, targets):
        """The Huber loss (see `make_huber`): d (r - d / 2) with d = r clipped to [-h, h]."""
        r = residuals_of(outputs, targets)
        delta = jnp.clip(r, -threshold, threshold)
        return delta * (r - delta / 2), delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        shape, dtype = outputs.shape, outputs.dtype
        which, middle, tail = jax.random.split(key, 3)
        # The integrals of e^-E over the middle and over both tails.
        in_middle = math.sqrt(2 * math.pi) * math.erf(threshold / math.sqrt(2))
        in_tails = 2 / threshold * math.exp(-(threshold**2) / 2)
        near = jax.random.truncated_normal(middle, -threshold, threshold, shape, dtype)
        size = threshold + jax.random.exponential(tail, shape, dtype) / threshold
        far = jnp.where(near < 0, -size, size)
        is_near = jax.random.bernoulli(which, in_middle / (in_middle + in_tails), shape)
        return outputs + jnp.where(is_near, near, far)

    def hessian_factor(outputs, targets):
        near = jnp.abs(residuals_of(outputs, targets)) <= threshold
        return _diagonal(near.astype(outputs.dtype))

    return Loss(name, terms, sample, hessian_factor)


huber = make_huber(1.0)


def weighted(loss: Loss) -> Loss:
    """The loss with a weight for each example or position: E_n = sum_t w_nt E_nt.

    Its targets are a pair `(targets, weights)`. Weights are [N] or [N, T], or have any number of
    the first axes of the loss's terms. A mask is weights of 0 and 1: terms of weight 0 contribute
    nothing, even if they are not finite. The weights are part of each example's own loss, so a mean
    over examples still divides by N.

    Args:
      loss: a Loss.

    Raises:
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
    name = f"weighted({loss.name})"

    def unpack(targets):
        if not isinstance(targets, tuple) or len(targets) != 2:
            raise ValueError(f"{name}: takes its targets as a pair (targets, weights).")
        return targets

    def times(weights, values):
        weights = weights.astype(values.dtype)
        weights = weights.reshape(*weights.shape, *[1] * (values.ndim - weights.ndim))
        return jnp.where(weights == 0, 0, weights * values)

    def terms(outputs, targets):
        """The terms of a loss, each multiplied by its weight (see `weighted`)."""
        targets, weights = unpack(targets)
        values, delta = loss.terms(outputs, targets)
        weights = jnp.asarray(weights)
        if weights.ndim < 1 or weights.shape != values.shape[: weights.ndim]:
            raise ValueError(
                f"{name}: weights has shape {show_shape(weights.shape)}, expected the first axes "
                f"of {show_shape(values.shape)}."
            )
        return times(weights, values), times(weights, delta)

    def sample(key, outputs, targets=None):
        if targets is None:
            return loss.sample(key, outputs), jnp.ones(len(outputs), outputs.dtype)
        targets, weights = unpack(targets)
        # w delta has second moment w^2 H, where the weighted loss's Hessian is w H.
        return loss.sample(key, outputs, targets), jnp.sqrt(weights)

    def hessian_factor(outputs, targets):
        targets, weights = unpack(targets)
        return jax.vmap(lambda column: times(jnp.sqrt(weights), column))(
            loss.hessian_factor(outputs, targets)
        )

    return Loss(name, terms, sample, hessian_factor)


def accuracy(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Whether each example's largest output is at its label: 1.0 or 0.0, [N].

    A metric for classifiers with integer labels. If there are positions, it is the fraction of
    positions at which this holds.

    Args:
      outputs: [N, ..., C].
      targets: integers, [N, ...].

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])).tolist()
      [1.0, 0.0]
    """
    targets = jnp.asarray(targets)
    right = jnp.argmax(outputs, axis=-1).astype(targets.dtype) == targets
    return jnp.mean(right, axis=range(1, right.ndim), dtype=jnp.float32)


def _diagonal(values):
    """The columns of diagonal matrices, [O, N, ..., O], from their diagonals, [N, ..., O]."""
    eye = jnp.eye(values.shape[-1], dtype=values.dtype)
    return jnp.moveaxis(values[..., None, :] * eye, -2, 0)


def _require_outputs(name: str, outputs: Any) -> jax.Array:
    """Refuses what cannot be outputs; returns them in at least 32 bits."""
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(outputs)):
        raise ValueError(
            f"{name}: outputs is a {type(outputs).__name__}, expected one array [N, ..., O]. For "
            "a network with several outputs, make a loss of a loss for each by joint_loss?"
        )
    if jnp.ndim(outputs) < 2:
        raise ValueError(
            f"{name}: outputs has shape {show_shape(jnp.shape(outputs))}, expected [N, ..., O]."
        )
    if outputs.size == 0:
        raise ValueError(f"{name}: outputs has shape {show_shape(outputs.shape)}: it is empty.")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(
            f"{name}: outputs has dtype {outputs.dtype}, expected floating-point numbers."
        )
    return widened(outputs)


def _require_like(name: str, targets: Any, outputs: jax.Array, what: str) -> jax.Array:
    """Refuses targets that do not fit the outputs; returns them in the dtype of the computation."""
    targets = jnp.asarray(targets)
    if targets.shape != outputs.shape:
        hint = " Add an axis, targets[:, None]?" if (*targets.shape, 1) == outputs.shape else ""
        raise ValueError(
            f"{name}: targets has shape {show_shape(targets.shape)}, "
            f"expected {show_shape(outputs.shape)}: {what}.{hint}"
        )
    return targets.astype(widened(outputs).dtype)


def _require_labels(name: str, labels: jax.Array, shape: Shape) -> None:
    if labels.shape != shape[:-1]:
        one = "example" if len(shape) == 2 else "position"
        hint = " Put flatten() into the network?" if labels.shape == shape[:1] else ""
        raise ValueError(
            f"{name}: labels has shape {show_shape(labels.shape)}, "
            f"expected {show_shape(shape[:-1])}: one integer per {one}.{hint}"
        )
    _require_range(name, labels, 0, shape[-1] - 1, "labels")


def _require_range(name: str, values: Any, low: float, high: float, what: str) -> None:
    """Refuses values out of range. Under jit values are not known, and all pass."""
    if isinstance(values, Tracer):
        return
    values = np.asarray(values)
    wrong = ~((values >= low) & (values <= high))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name}: {what} go from {values.min()} to {values.max()}, expected {low} to {high}; "
            f"the first that does not is {values[where]}, at {show_shape(where)}."
        )


def _require_sum_to_one(name: str, probabilities: Any) -> None:
    if isinstance(probabilities, Tracer):  # under jit, where values are not known
        return
    sums = np.asarray(probabilities, np.float64).sum(-1)
    if not np.allclose(sums, 1, atol=1e-2):
        raise ValueError(
            f"{name}: probabilities sum to between {sums.min():.4g} and {sums.max():.4g} over the "
            "classes, expected 1."
        )
