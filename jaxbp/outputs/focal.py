"""The focal loss: a cross-entropy in which examples that are right already count less.

With p the probability of the right answer, E = -(1 - p)^g log p. The larger g, the less an example
counts whose p is near 1.

The Hessian has negative eigenvalues, and E is the logarithm of no distribution: `ggn_columns` and
`sampled` refuse these losses.

Sources:
  "Focal Loss for Dense Object Detection", Lin et al., 2017.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import (
    require_array,
    require_class_weights,
    require_fitting,
    require_fraction,
    require_labels,
    require_like,
    require_number,
    require_one_of,
    require_outputs,
)
from jaxbp.outputs.curvature import IS_INDEFINITE, MULTIPLY, without_factor, without_sample
from jaxbp.outputs.sigmoid import judged, require_top_of_two
from jaxbp.outputs.softmax import at_labels, right_of_labels
from jaxbp.types import Loss

__all__ = ["make_sigmoid_focal", "make_softmax_focal"]


def make_sigmoid_focal(*, gamma: float = 2.0, alpha: float | None = None) -> Loss:
    """The focal loss of outputs with two answers each, 0 and 1.

        E = -sum_o a_o (1 - p_o)^g log p_o,    p_o = sigmoid(m_o), m_o = z_o if t_o = 1, else -z_o
        dE/dm_o = -a_o (1 - p_o)^g (1 - p_o - g p_o log p_o)

    Outputs are logits z, [N, ..., O]; targets are 0 or 1 for each, [N, ..., O].

    Args:
      gamma: g, not negative; 0 is `sigmoid_cross_entropy`.
      alpha: from 0 to 1: a_o is alpha if t_o = 1, and 1 - alpha if t_o = 0. None is 1 for both.

    Raises:
      ValueError: an argument is out of range; when called, outputs or targets have the wrong shape
        or dtype. Outside jit also: a target is not 0 or 1.

    References:
      "Focal Loss for Dense Object Detection", Lin et al., 2017.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> value, delta = bp.make_sigmoid_focal()(jnp.zeros((1, 1)), jnp.ones((1, 1)))
      >>> round(float(value[0]), 4), round(float(delta[0, 0]), 4)
      (0.1733, -0.2983)
    """
    name = "sigmoid_focal"
    gamma = require_number(name, "gamma", gamma, low=0)
    if alpha is not None:
        alpha = require_fraction(name, "alpha", alpha)

    def targets_of(z, targets):
        return require_one_of(name, require_like(name, targets, z, "0 or 1 per output"), 0, 1)

    def terms(outputs, targets):
        """The focal loss of outputs with two answers each (see `make_sigmoid_focal`)."""
        z = require_outputs(name, outputs)
        t = targets_of(z, targets)
        side = 2 * t - 1
        margin = side * z
        cost = jax.nn.softplus(-margin)  # -log p
        p, miss = jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
        # (1 - p)^g by its logarithm, which is finite where 1 - p is 0.
        focus = jnp.exp(-gamma * jax.nn.softplus(margin)) if gamma else 1.0
        focus = focus * (alpha * t + (1 - alpha) * (1 - t) if alpha is not None else 1.0)
        slope = focus * (miss + gamma * jnp.where(p == 0, 0, p * cost))
        return focus * cost, (-side * slope).astype(outputs.dtype)

    def right(outputs, targets, top):
        require_top_of_two(name, top)
        z = require_outputs(name, outputs)
        return judged(z, z > 0, targets_of(z, targets) > 0.5)

    factor = without_factor(name, IS_INDEFINITE, MULTIPLY)
    return Loss(name, terms, without_sample(name), factor, right, filler=1)


def make_softmax_focal(*, gamma: float = 2.0, class_weights: Any = None) -> Loss:
    """The focal loss of classes.

        E = -w_l (1 - p_l)^g log p_l at the label l,    p = softmax(z)
        delta = w_l (1 - p_l)^g (1 - g p_l log p_l / (1 - p_l)) (p - e_l)

    Outputs are logits z, [N, ..., C]; targets are classes as integers, [N, ...].

    Args:
      gamma: g, not negative; 0 is `softmax_cross_entropy`.
      class_weights: w, C finite numbers; 1 for each if it is None.

    Raises:
      ValueError: an argument is out of range; when called, outputs or targets have the wrong shape
        or dtype. Outside jit also: a label is out of range.

    References:
      "Focal Loss for Dense Object Detection", Lin et al., 2017.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> value, delta = bp.make_softmax_focal()(jnp.zeros((1, 2)), jnp.array([0]))
      >>> round(float(value[0]), 4)
      0.1733
    """
    name = "softmax_focal"
    gamma = require_number(name, "gamma", gamma, low=0)
    if class_weights is not None:
        class_weights = require_class_weights(name, class_weights)

    def terms(outputs, targets):
        """The focal loss of classes (see `make_softmax_focal`)."""
        z = require_outputs(name, outputs)
        labels = require_labels(name, require_array(name, "targets", targets), z.shape)
        cost, delta = at_labels(z, labels)
        at = labels[..., None] == jnp.arange(z.shape[-1], dtype=labels.dtype)
        miss = -jnp.sum(jnp.where(at, delta, 0), axis=-1)  # 1 - p_l, in which nothing cancels
        p = 1 - miss
        # Where 1 - p_l is 0, -log p_l / (1 - p_l) is 1, and a power may have no derivative.
        positive = jnp.where(miss > 0, miss, 1)
        ratio = jnp.where(miss > 0, jnp.where(p == 0, 0, p * cost) / positive, 1)
        focus = jnp.where(miss > 0, positive**gamma, 0) if gamma else jnp.ones_like(cost)
        if class_weights is not None:
            weights = require_fitting(name, "class_weights", class_weights, z)
            focus = focus * jnp.sum(jnp.where(at, weights, 0), axis=-1)
        slope = focus * (1 + gamma * ratio)
        return focus * cost, (slope[..., None] * delta).astype(outputs.dtype)

    factor = without_factor(name, IS_INDEFINITE, MULTIPLY)
    return Loss(name, terms, without_sample(name), factor, right_of_labels(name))
