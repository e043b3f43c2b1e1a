"""Metrics: the fraction of predictions that are right, for each example.

`accuracy` takes labels, and binary targets of one output. `make_accuracy` makes the metric of a
loss, with targets in every form that the loss takes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import require_outputs
from jaxbp.outputs.sigmoid import sigmoid_cross_entropy
from jaxbp.outputs.softmax import softmax_cross_entropy
from jaxbp.outputs.weighting import weighted
from jaxbp.require import require_count
from jaxbp.types import Loss, PyTree, show_shape

__all__ = ["accuracy", "make_accuracy", "top_k_accuracy"]


def accuracy(outputs: jax.Array, targets: PyTree) -> jax.Array:
    """Whether each example's prediction is right, 1.0 or 0.0; the fraction if it has positions.

      outputs [N, ..., C]    targets are integers [N, ...], right is the largest output
      outputs [N, ..., 1]    targets are 0 or 1, [N, ..., 1], and the prediction is 1 if z > 0
      either of these        targets are a pair (targets, weights), as for `weighted`

    For targets of the shape [N, ..., C], such as one-hot, use `make_accuracy(loss)`. See there for
    the details.

    Args:
      outputs: logits, [N, ..., C] or [N, ..., 1].
      targets: in one of the forms above.

    Returns:
      The accuracy of each example, [N].

    Raises:
      ValueError: outputs or targets have the wrong shape or dtype; outside jit also: a label is out
        of range.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0])).tolist()
      [1.0, 0.0]
      >>> bp.accuracy(jnp.array([[-0.3], [2.0]]), jnp.array([[0.0], [1.0]])).tolist()
      [1.0, 1.0]
    """
    y = require_outputs("accuracy", outputs)
    answers = targets[0] if _is_pair(targets) else targets
    if y.shape[-1] > 1 and getattr(answers, "shape", None) == y.shape:
        raise ValueError(
            f"accuracy: targets have the outputs' shape, {show_shape(y.shape)}. They may be "
            "probabilities of classes, or labels that do not exclude one another. Use "
            "make_accuracy(softmax_cross_entropy) or make_accuracy(sigmoid_cross_entropy)."
        )
    loss = sigmoid_cross_entropy if y.shape[-1] == 1 else softmax_cross_entropy
    return make_accuracy(weighted(loss) if _is_pair(targets) else loss)(outputs, targets)


def top_k_accuracy(k: int) -> Callable[[Any, Any], jax.Array]:
    """Makes a metric: whether the label is among the k largest outputs.

    Targets are integers [N, ...], probabilities [N, ..., C], or a pair of these and weights.

    Args:
      k: a positive integer.

    Returns:
      `metric(outputs, targets) -> [N]`, as `make_accuracy` returns it.

    Raises:
      ValueError: `k` is not a positive integer.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.top_k_accuracy(2)(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([1])).tolist()
      [1.0]
    """
    require_count("top_k_accuracy", "k", k)

    def metric(outputs, targets):
        loss = weighted(softmax_cross_entropy) if _is_pair(targets) else softmax_cross_entropy
        return make_accuracy(loss, top=k)(outputs, targets)

    return metric


def make_accuracy(loss: Loss, *, top: int = 1) -> Callable[[Any, Any], jax.Array]:
    """Makes the accuracy for a loss, which knows what its outputs and targets mean.

        softmax_cross_entropy    right if the largest output is that of the label, or of the class
                                 of the largest probability
        sigmoid_cross_entropy    right if z > 0 and t > 1/2, or neither. Each of the O outputs
                                 counts.
        weighted, ignoring       as the inner loss, by weight

    The accuracy of an example is the mean over its positions and outputs, by weight.

      an output is NaN           wrong
      equal outputs              the first counts as the largest
      weights sum to 0           0, so that such an example lowers a mean over N. To leave it out,
                                 divide the sum over examples by the number of the others.

    Args:
      loss: one of these losses.
      top: the number of largest outputs among which the label may be.

    Returns:
      `metric(outputs, targets) -> [N]`, for `fit` and `evaluate`.

    Raises:
      TypeError: `loss` is none of these.
      ValueError: `top` is not a positive integer; when called, what the loss raises.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> metric = bp.make_accuracy(bp.ignoring(bp.softmax_cross_entropy, -1))
      >>> logits = jnp.array([[[2.0, 1.0], [0.0, 3.0], [0.0, 0.0]]])
      >>> metric(logits, jnp.array([[0, 0, -1]])).tolist()
      [0.5]
    """
    if not isinstance(loss, Loss) or loss.right is None:
        got = loss.name if isinstance(loss, Loss) else repr(loss)
        raise TypeError(
            f"make_accuracy: loss is {got}, which does not say which outputs are right; it takes "
            "softmax_cross_entropy or sigmoid_cross_entropy, also weighted or ignoring a label."
        )
    require_count("make_accuracy", "top", top)
    judge = loss.right

    def metric(outputs, targets):
        try:
            right, weights = judge(outputs, targets, top)
        except ValueError as error:
            raise ValueError(f"accuracy of {error}") from None
        axes = range(1, right.ndim)
        total = jnp.sum(weights, axis=axes)
        hits = jnp.sum(jnp.where(right, weights, 0), axis=axes)
        return jnp.where(total == 0, 0, hits / jnp.where(total == 0, 1, total))

    return metric


def _is_pair(targets):
    return isinstance(targets, tuple) and len(targets) == 2
