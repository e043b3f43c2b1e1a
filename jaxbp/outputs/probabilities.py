"""Losses of outputs that are probabilities already, or their logarithms.

Use them where the network ends in a sigmoid, a softmax or a log-softmax that has to stay in it. The
losses of logits, `softmax_cross_entropy` and `sigmoid_cross_entropy`, are the more accurate choice:
they are exact where a probability is close to 0 or 1.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import (
    require_array,
    require_between,
    require_class_weights,
    require_fitting,
    require_labels,
    require_like,
    require_outputs,
)
from jaxbp.outputs.curvature import DRAW, IS_LINEAR, Drawn, diagonal, without_factor
from jaxbp.outputs.sigmoid import judged, require_top_of_two
from jaxbp.outputs.softmax import right_of_labels
from jaxbp.types import Loss

__all__ = ["binary_cross_entropy", "make_nll", "nll"]


def _binary_cross_entropy():
    name = "binary_cross_entropy"

    def terms(outputs, targets):
        """Cross-entropy of probabilities: E = -sum_o t_o log p_o + (1 - t_o) log(1 - p_o).

        delta = (1 - t) / (1 - p) - t / p

            Hessian    diag(t / p^2 + (1 - t) / (1 - p)^2)
            sample     0 or 1, 1 with probability p

          p = 1, t = 1          value 0, delta -1; the same for p = 0, t = 0, with delta 1
          p = 1, t < 1          value inf, delta inf; the same for p = 0, t > 0, with -inf
          p not in [0, 1]       NaN

        PyTorch's `BCELoss` computes the same, but limits the logarithms to -100.

        Args:
          outputs: probabilities p, [N, ..., O].
          targets: 0, 1 or a probability for each output, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a target
            is not in [0, 1].
        """
        p = probabilities_of(outputs)
        t = require_targets(p, targets)
        values = -_times(t, jnp.log, p) - _times(1 - t, jnp.log1p, -p)
        delta = _over(1 - t, 1 - p) - _over(t, p)
        return values, delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        p = probabilities_of(outputs)
        return jax.random.bernoulli(key, p).astype(p.dtype)

    def hessian_factor(outputs, targets):
        p = probabilities_of(outputs)
        t = require_targets(p, targets)
        roots = jnp.sqrt(_over(_over(t, p), p) + _over(_over(1 - t, 1 - p), 1 - p))
        return diagonal(roots.astype(outputs.dtype))

    def right(outputs, targets, top):
        require_top_of_two(name, top)
        p = probabilities_of(outputs)
        return judged(p, p > 0.5, require_targets(p, targets) > 0.5)

    def probabilities_of(outputs):
        p = require_outputs(name, outputs)
        return jnp.where((p >= 0) & (p <= 1), p, jnp.nan)

    def require_targets(p, targets):
        targets = require_like(name, targets, p, "one target in [0, 1] per output")
        return require_between(name, targets, 0, 1)

    return Loss(name, terms, sample, hessian_factor, right)


def _times(a, function, x):
    """The product a f(x), 0 where a is 0 whatever f(x) is; but NaN where x is."""
    none = (a == 0) & ~jnp.isnan(x)
    return jnp.where(none, 0, a * function(jnp.where(none, 0.5, x)))


def _over(a, b):
    """The quotient a / b, 0 where a is 0 whatever b is; but NaN where b is."""
    none = (a == 0) & ~jnp.isnan(b)
    return jnp.where(none, 0, a / jnp.where(none, 1, b))


binary_cross_entropy = _binary_cross_entropy()


def make_nll(*, class_weights: Any = None) -> Loss:
    """The negative log-likelihood, with a weight for each class: E = -w_l y_l at the label l.

    Without arguments it is `bp.nll`. PyTorch's `NLLLoss` computes the same; its `mean` divides by
    the sum of the labels' weights.

    Args:
      class_weights: w, C finite numbers; 1 for each if it is None.

    Raises:
      ValueError: a weight is not finite; when called, as for `nll`, or the outputs have
        another number of classes than the weights.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.make_nll(class_weights=[1.0, 3.0])
      >>> value, delta = loss(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([1]))
      >>> round(float(value[0]), 4), float(delta[0, 1])
      (2.0794, -3.0)
    """
    name = "nll"
    if class_weights is not None:
        class_weights = require_class_weights(name, class_weights)

    def one_hot_of(y, labels):
        """1 at the label and 0 elsewhere, [N, ..., C]; NaN if there is no such class."""
        labels = require_labels(name, require_array(name, "targets", labels), y.shape)
        at = labels[..., None] == jnp.arange(y.shape[-1], dtype=labels.dtype)
        return jnp.where(jnp.any(at, axis=-1, keepdims=True), at.astype(y.dtype), jnp.nan)

    def weights_of(y, one_hot):
        """The weight of each label, [N, ..., 1]."""
        if class_weights is None:
            return jnp.ones_like(y[..., :1])
        weights = require_fitting(name, "class_weights", class_weights, y)
        return jnp.sum(weights * one_hot, axis=-1, keepdims=True)

    def terms(outputs, targets):
        """The negative log-likelihood of labels l: E = -y_l, y = log p. delta = -e_l.

            Hessian    0, because E is linear in y, so it has no factor
            sample     integers, c with probability e^y_c. Behind a log-softmax, the errors of
                       `sampled` have the Fisher information of softmax_cross_entropy.

        Args:
          outputs: logarithms of probabilities, y, [N, ..., C].
          targets: classes as integers, [N, ...].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a label is
            out of range.
          TypeError: a factor of the Hessian is asked for.
        """
        y = require_outputs(name, outputs)
        if isinstance(targets, Drawn):
            one_hot, weights = one_hot_of(y, targets.targets), targets.roots[..., None]
        else:
            one_hot = one_hot_of(y, targets)
            weights = weights_of(y, one_hot)
        counts = weights * one_hot
        values = -jnp.sum(jnp.where(counts == 0, 0, counts * y), axis=-1)
        return values, -counts.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        y = require_outputs(name, outputs)
        labels = jax.random.categorical(key, y)
        if class_weights is None:
            return labels
        if targets is None:
            return Drawn(labels, jnp.ones_like(labels, y.dtype))
        return Drawn(labels, jnp.sqrt(weights_of(y, one_hot_of(y, targets))[..., 0]))

    factor = without_factor(name, IS_LINEAR, DRAW)
    return Loss(name, terms, sample, factor, right_of_labels(name))


nll = make_nll()
