"""Losses of sigmoids: each output is the logit of a question with two answers.

`sigmoid_cross_entropy` is for two classes with one output, and for labels that do not exclude one
another. `make_sigmoid_cross_entropy` makes it with weights of the positive answers.

Some losses of PyTorch are this one in another form:

    SoftMarginLoss               targets (t + 1) / 2, for t = 1 or -1
    MultiLabelSoftMarginLoss     divided by the number of labels
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import (
    require_between,
    require_class_weights,
    require_fitting,
    require_like,
    require_outputs,
)
from jaxbp.outputs.curvature import Drawn, diagonal
from jaxbp.types import Loss

__all__ = ["make_sigmoid_cross_entropy", "sigmoid_cross_entropy"]


def make_sigmoid_cross_entropy(*, positive_weights: Any = None) -> Loss:
    """The cross-entropy of sigmoids, in which the positive answers of an output have a weight.

        E = -sum_o w_o t_o log p_o + (1 - t_o) log(1 - p_o),    p = sigmoid(z)
        delta = (w t + 1 - t) p - w t

        Hessian    diag((w t + 1 - t) p (1 - p))
        sample     0 or 1, 1 with probability p, and the square root of the weight w t + 1 - t

    Without arguments it is `bp.sigmoid_cross_entropy`. Weights above 1 raise the recall, weights
    below 1 the precision. They are `pos_weight` of PyTorch's `BCEWithLogitsLoss`; its `weight` is
    the weights of `weighted(loss)`.

    Args:
      positive_weights: w, O finite numbers; 1 for each if it is None.

    Raises:
      ValueError: a weight is not finite; when called, as for `sigmoid_cross_entropy`,
        or the number of outputs is not that of the weights.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.make_sigmoid_cross_entropy(positive_weights=[3.0])
      >>> value, delta = loss(jnp.zeros((2, 1)), jnp.array([[1.0], [0.0]]))
      >>> delta.tolist()
      [[-1.5], [0.5]]
    """
    name = "sigmoid_cross_entropy"
    if positive_weights is not None:
        positive_weights = require_class_weights(name, positive_weights, "positive_weights")

    def weights_of(z, t):
        """How much the answers 1 and 0 count in the sum, w t and 1 - t."""
        if positive_weights is None:
            return t, 1 - t
        return t * require_fitting(name, "positive_weights", positive_weights, z), 1 - t

    def roots_of(z, targets):
        """The square root of the weight of each term, [N, ..., O]."""
        if isinstance(targets, Drawn):
            return targets.roots
        if targets is None or positive_weights is None:
            return jnp.ones_like(z)
        return jnp.sqrt(sum(weights_of(z, require_targets(z, targets))))

    def terms(outputs, targets):
        """Cross-entropy of sigmoids: E = -sum_o t_o log p_o + (1 - t_o) log(1 - p_o).

        p = sigmoid(z), delta = p - t. Use it for two classes with one output, or for O labels that
        do not exclude one another.

            Hessian    diag(p (1 - p))
            sample     0 or 1, 1 with probability p

          z = inf, t = 1    value 0, delta 0; the same for z = -inf, t = 0
          z = inf, t < 1    value inf, delta 1 - t; the same for z = -inf, t > 0, with delta -t

        Args:
          outputs: logits z, [N, ..., O].
          targets: 0, 1 or a probability for each output, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a target
            is not in [0, 1].
        """
        z = require_outputs(name, outputs)
        if isinstance(targets, Drawn):
            values, delta = _at_answers(z, targets.targets, 1 - targets.targets)
            values, delta = targets.roots * values, targets.roots * delta
        else:
            values, delta = _at_answers(z, *weights_of(z, require_targets(z, targets)))
        return values, delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        z = require_outputs(name, outputs)
        bits = jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)
        return bits if positive_weights is None else Drawn(bits, roots_of(z, targets))

    def hessian_factor(outputs, targets):
        z = require_outputs(name, outputs)
        size = jnp.abs(z)
        # sqrt(p (1 - p)), in which 1 - p would round to zero for large z.
        roots = jnp.exp(-size / 2) / (1 + jnp.exp(-size))
        if positive_weights is not None:
            roots = roots_of(z, targets) * roots
        return diagonal(roots.astype(outputs.dtype))

    def right(outputs, targets, top):
        require_top_of_two(name, top)
        z = require_outputs(name, outputs)
        return judged(z, z > 0, require_targets(z, targets) > 0.5)

    def require_targets(z, targets):
        targets = require_like(name, targets, z, "one target in [0, 1] per output")
        return require_between(name, targets, 0, 1)

    return Loss(name, terms, sample, hessian_factor, right)


def require_top_of_two(name: str, top: int) -> None:
    """Raises unless top is 1, for a loss whose outputs have two answers each."""
    if top != 1:
        raise ValueError(f"{name}: each output has two answers, so top has to be 1, not {top}.")


def judged(outputs: jax.Array, answers: jax.Array, wanted: jax.Array) -> Any:
    """Whether each answer is the wanted one, and how much it counts; NaN is wrong."""
    hits = (answers == wanted) & ~jnp.isnan(outputs)
    return hits, jnp.ones_like(hits, jnp.float32)


def _at_answers(z, positive, negative):
    """Value and delta of E = -a log p - b log(1 - p), of the weights a of 1 and b of 0."""
    size, is_one = jnp.abs(z), z >= 0
    miss = jnp.where(is_one, negative, positive)  # the weight of the less likely answer
    hit = jnp.where(is_one, positive, negative)
    e = jnp.exp(-size)  # the odds that the outputs give to the less likely answer
    values = miss * jnp.where((miss == 0) & (size == jnp.inf), 0, size)
    delta = (miss - hit * e) / (1 + e)
    return values + (miss + hit) * jnp.log1p(e), jnp.where(is_one, delta, -delta)


sigmoid_cross_entropy = make_sigmoid_cross_entropy()
