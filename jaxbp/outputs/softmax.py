"""Losses of a softmax: outputs are logits of C classes, of which one is right.

`softmax_cross_entropy` is the loss of classification. `make_softmax_cross_entropy` makes it with
class weights and label smoothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import (
    require_array,
    require_class_weights,
    require_distributions,
    require_fitting,
    require_fraction,
    require_labels,
    require_like,
    require_outputs,
)
from jaxbp.outputs.curvature import Drawn
from jaxbp.types import Loss, show_shape

__all__ = ["make_softmax_cross_entropy", "softmax_cross_entropy"]


def make_softmax_cross_entropy(*, class_weights: Any = None, label_smoothing: float = 0.0) -> Loss:
    """The cross-entropy of a softmax, with a weight for each class and smoothed targets.

        E = -sum_c q_c log p_c,    q_c = w_c ((1 - s) t_c + s / C),    p = softmax(z)
        delta = p sum_c q_c - q

        Hessian    (sum_c q_c) (diag(p) - p p^T)
        sample     c with probability p_c, and the square root of the term's weight sum_c q_c

    Labels l are targets t with t_l = 1. Without arguments it is `bp.softmax_cross_entropy`.
    PyTorch's `CrossEntropyLoss` computes the same; its `mean` divides by the sum of the labels'
    weights.

    Args:
      class_weights: w, C finite numbers; 1 for each if it is None. The Hessian's factor and the
        sampler are NaN where a term's weight is negative.
      label_smoothing: s, from 0 to 1: the part of the targets that is spread over the classes.

    Raises:
      ValueError: an argument is out of range; when called, as for `softmax_cross_entropy`, or the
        outputs have another number of classes than the weights.

    References:
      "Rethinking the Inception Architecture for Computer Vision", Szegedy et al., 2016: label
      smoothing.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.make_softmax_cross_entropy(class_weights=[1.0, 3.0], label_smoothing=0.1)
      >>> value, delta = loss(jnp.zeros((2, 2)), jnp.array([0, 1]))
      >>> [round(float(v), 4) for v in value]
      [0.7625, 2.0101]
    """
    name = "softmax_cross_entropy"
    smoothing = require_fraction(name, "label_smoothing", label_smoothing)
    if class_weights is not None:
        class_weights = require_class_weights(name, class_weights)
    is_plain = class_weights is None and smoothing == 0

    def smoothed_and_weighted(z, targets):
        """The weight q of each class in the sum, [N, ..., C]."""
        if jnp.issubdtype(targets.dtype, jnp.integer):
            labels = require_labels(name, targets, z.shape)
            at = labels[..., None] == jnp.arange(z.shape[-1], dtype=labels.dtype)
            exists = jnp.any(at, axis=-1, keepdims=True)
            targets = jnp.where(exists, at.astype(z.dtype), jnp.nan)
        else:
            targets = require_distribution(targets, z)
        if smoothing:
            targets = (1 - smoothing) * targets + smoothing / z.shape[-1]
        if class_weights is not None:
            targets = targets * require_fitting(name, "class_weights", class_weights, z)
        return targets

    def terms_of_drawn(outputs, drawn):
        z = require_outputs(name, outputs)
        values, delta = at_labels(z, require_labels(name, drawn.targets, z.shape))
        delta = drawn.roots[..., None] * delta
        return drawn.roots * values, delta.astype(outputs.dtype)

    def terms(outputs, targets):
        """Cross-entropy of a softmax: E = -sum_c t_c log p_c with p = softmax(z). delta = p - t.

            Hessian    diag(p) - p p^T, with columns sqrt(p_c) (e_c - p)
            sample     integers, c with probability p_c

          p_c = 1 at the label    value 0, delta 0
          z_c = -inf              p_c = 0: no error at this class, value inf if it is the label
          z_c = inf               p_c = 1
          z = -inf for all c      NaN

        Args:
          outputs: logits z, [N, ..., C].
          targets: classes as integers [N, ...], or probabilities [N, ..., C].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a label or
            a probability is out of range, or probabilities do not sum to 1.
        """
        if isinstance(targets, Drawn):
            return terms_of_drawn(outputs, targets)
        z, targets = require_outputs(name, outputs), require_array(name, "targets", targets)
        if is_plain and jnp.issubdtype(targets.dtype, jnp.integer):
            values, delta = at_labels(z, require_labels(name, targets, z.shape))
        else:
            values, delta = at_probabilities(z, smoothed_and_weighted(z, targets))
        return values, delta.astype(outputs.dtype)

    def roots_of(z, targets):
        """The square root of the weight of each term, [N, ...]."""
        if isinstance(targets, Drawn):
            return targets.roots
        if targets is None or class_weights is None:
            return jnp.ones_like(z[..., 0])
        weights = smoothed_and_weighted(z, require_array(name, "targets", targets))
        return jnp.sqrt(jnp.sum(weights, axis=-1))

    def sample(key, outputs, targets=None):
        z = require_outputs(name, outputs)
        labels = jax.random.categorical(key, z)
        return labels if is_plain else Drawn(labels, roots_of(z, targets))

    def hessian_factor(outputs, targets):
        z = require_outputs(name, outputs)
        columns = softmax_factor(z)
        if class_weights is not None:
            columns = roots_of(z, targets)[..., None] * columns
        return columns.astype(outputs.dtype)

    def right(outputs, targets, top):
        z, targets = require_outputs(name, outputs), require_array(name, "targets", targets)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            return right_of_labels(name)(outputs, targets, top)
        targets = require_distribution(targets, z)
        largest = jnp.max(targets, axis=-1, keepdims=True)
        best = _best_classes(name, z, top)
        return _judged(z, jnp.take_along_axis(targets, best, axis=-1) == largest)

    def require_distribution(targets, z):
        if targets.dtype == bool or targets.shape == z.shape[:-1]:
            raise ValueError(
                f"{name}: targets has dtype {targets.dtype} and shape {show_shape(targets.shape)}, "
                f"expected integers {show_shape(z.shape[:-1])}, or probabilities "
                f"{show_shape(z.shape)}. For labels, convert them by .astype(int)?"
            )
        return require_distributions(
            name, require_like(name, targets, z, "one probability per class")
        )

    return Loss(name, terms, sample, hessian_factor, right)


def right_of_labels(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The `right` of a loss of labels: whether the label is among the largest outputs."""

    def right(outputs, targets, top):
        z, labels = require_outputs(name, outputs), require_array(name, "targets", targets)
        labels = require_labels(name, labels, z.shape)
        best = _best_classes(name, z, top)
        return _judged(z, best.astype(labels.dtype) == labels[..., None])

    return right


def _best_classes(name, z, top):
    """The classes of the largest outputs, [N, ..., top]."""
    if top > z.shape[-1]:
        raise ValueError(f"{name}: has {z.shape[-1]} classes, fewer than the {top} to look at.")
    return jnp.argmax(z, axis=-1)[..., None] if top == 1 else jax.lax.top_k(z, top)[1]


def _judged(z, hits):
    """Whether any class is a hit, [N, ...], and how much each counts."""
    hits = jnp.any(hits, axis=-1) & ~jnp.any(jnp.isnan(z), axis=-1)
    return hits, jnp.ones_like(hits, jnp.float32)


def largest_of(z):
    """The largest logit m, [..., 1], by which the others are shifted before exp.

    The shift cancels wherever it is used, so it has no derivative.
    """
    return jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))


def difference(z, m):
    """The difference z - m, where inf counts as the largest number, so that inf - inf is 0."""
    top = jnp.finfo(z.dtype).max
    return jnp.minimum(z, top) - jnp.minimum(m, top)


def at_labels(z, labels):
    """Value and delta of a softmax cross-entropy at labels l [N, ...], without cancellation.

        E = log sum_c e^(z_c - z_l),    delta_l = p_l - 1 = -sum of the other p_c

    The label is found by comparison. A gather and a scatter were slower on a CPU, and would bring
    together classes that are distributed over devices.
    """
    at = labels[..., None] == jnp.arange(z.shape[-1], dtype=labels.dtype)
    exists = (labels >= 0) & (labels < z.shape[-1])
    m = largest_of(z)
    e = jnp.exp(difference(z, m))
    others = jnp.sum(jnp.where(at, 0, e), axis=-1, keepdims=True)
    z_l = jnp.sum(jnp.where(at, z, 0), axis=-1, keepdims=True)
    e_l = jnp.where(exists[..., None], jnp.exp(difference(z_l, m)), jnp.nan)
    # E = (m - z_l) + log(others + e_l). If z_l is the largest logit, e_l - 1 is 0, and log1p is
    # exact however little the others are. Otherwise m - z_l or the others are far from 0.
    gap = jnp.where(z_l == jnp.inf, 0, m - z_l)
    values = gap + jnp.log1p(others + (e_l - 1))
    return values[..., 0], jnp.where(at, -others, e) / (others + e_l)


def at_probabilities(z, t):
    """Value and delta of a softmax cross-entropy at probabilities t [N, ..., C].

        E = sum_c t_c (m - z_c) + (sum_c t_c) log sum_k e_k,    e_c = e^(z_c - m)
        delta_c = (e_c sum_{k != c} t_k - t_c sum_{k != c} e_k) / sum_k e_k

    This is p_c sum_k t_k - t_c, in which nothing cancels if t is one-hot.
    """
    m = largest_of(z)
    e = jnp.exp(difference(z, m))
    largest = jnp.sum(jnp.where(z == m, e, 0), axis=-1, keepdims=True)
    rest = jnp.sum(jnp.where(z == m, 0, e), axis=-1, keepdims=True)
    total = jnp.sum(t, axis=-1, keepdims=True)
    # 0 log 0 = 0: a class that cannot occur costs nothing if the target does not have it.
    gaps = jnp.where((t == 0) | (z == jnp.inf), 0, m - z)
    values = jnp.sum(t * gaps, axis=-1) + (total * jnp.log1p(rest + (largest - 1)))[..., 0]
    # The differences are exactly 0 at a single largest logit, and at a target of 1. One division
    # and a product are faster than a division of each class.
    delta = e * (total - t) - t * (rest + (largest - e))
    return values, delta * (1 / (rest + largest))


def softmax_factor(z: jax.Array) -> jax.Array:
    """The columns of a square root of diag(p) - p p^T, [C, N, ..., C]: sqrt(p_c) (e_c - p)."""
    shifted = difference(z, largest_of(z))
    e, own = jnp.exp(shifted), jnp.eye(z.shape[-1], dtype=bool)
    s = jnp.sum(e, axis=-1, keepdims=True)
    # Column k is sqrt(p_k) (e_k - p), in rows [..., k, c]. 1 - p_k is the sum of the other p_c.
    others = jnp.where(own, 0, e[..., None, :])
    rows = jnp.where(own, jnp.sum(others, axis=-1, keepdims=True), -others) / s[..., None]
    # sqrt(p_k) by half the exponent: p_k itself may be too small to be represented.
    roots = jnp.exp(shifted / 2) / jnp.sqrt(s)
    return jnp.moveaxis(roots[..., None] * rows, -2, 0)


softmax_cross_entropy = make_softmax_cross_entropy()
