"""Margin losses: 0 where the right output is ahead by a margin, and linear below.

    hinge                 each output has the answers 1 and -1
    multi_margin          the label is ahead of every other class
    multi_label_margin    every label is ahead of every class that is none
    hinge_embedding       the outputs are distances

At the kink itself delta is 0. These losses are the logarithm of no distribution. Except for
`make_multi_margin(power=2)`, they are piecewise linear, so that their Hessian is 0 wherever it
exists: `ggn_columns` and `sampled` refuse them.
"""

import math
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
    require_number,
    require_one_of,
    require_outputs,
)
from jaxbp.outputs.curvature import IS_LINEAR, without_factor, without_sample
from jaxbp.outputs.sigmoid import judged, require_top_of_two
from jaxbp.outputs.softmax import right_of_labels
from jaxbp.types import Loss

__all__ = ["hinge", "make_hinge_embedding", "make_multi_margin", "multi_label_margin"]

SMOOTH = "Use a smooth loss, such as a cross-entropy?"


def is_short(gap: jax.Array) -> jax.Array:
    """1 where a gap to the margin is positive, 0 where it is not, and NaN where it is NaN."""
    return jnp.sign(jax.nn.relu(gap))


def _hinge():
    name = "hinge"

    def targets_of(y, targets):
        return require_one_of(name, require_like(name, targets, y, "1 or -1 per output"), -1, 1)

    def terms(outputs, targets):
        """The hinge loss: E = sum_o max(0, 1 - t_o y_o). delta = -t where t y < 1, else 0.

        It is the loss of support vector machines.

        Args:
          outputs: y, [N, ..., O].
          targets: 1 or -1 for each output, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a target
            is not 1 or -1.
          TypeError: a factor of the Hessian or a sample is asked for.

        References:
          "Support-Vector Networks", Cortes, Vapnik, 1995.
        """
        y = require_outputs(name, outputs)
        t = targets_of(y, targets)
        gap = 1 - t * y
        return jax.nn.relu(gap), (-t * is_short(gap)).astype(outputs.dtype)

    def right(outputs, targets, top):
        require_top_of_two(name, top)
        y = require_outputs(name, outputs)
        return judged(y, y > 0, targets_of(y, targets) > 0)

    factor = without_factor(name, IS_LINEAR, SMOOTH)
    return Loss(name, terms, without_sample(name), factor, right, filler=1)


hinge = _hinge()


def make_multi_margin(*, power: int = 1, margin: float = 1.0, class_weights: Any = None) -> Loss:
    """The multi-class hinge loss: the label l is ahead of every other class by a margin m.

        E = w_l sum_(c != l) g_c^k,    g_c = max(0, m - y_l + y_c)
        delta_c = w_l k g_c^(k - 1) where g_c > 0,    delta_l = -sum of the others

        Hessian    2 w_l sum_c (e_c - e_l) (e_c - e_l)^T over the c with g_c > 0, for k = 2

    Outputs are y, [N, ..., C]; targets are classes as integers, [N, ...]. PyTorch's
    `MultiMarginLoss` is this loss divided by C.

    Args:
      power: k, 1 or 2.
      margin: m.
      class_weights: w, C finite numbers; 1 for each if it is None.

    Raises:
      ValueError: an argument is out of range; when called, outputs or targets have the wrong shape
        or dtype. Outside jit also: a label is out of range.
      TypeError: a sample is asked for, or a factor of the Hessian for k = 1.

    References:
      "Support Vector Machines for Multi-Class Pattern Recognition", Weston, Watkins, 1999.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> value, delta = bp.make_multi_margin()(jnp.array([[1.0, 0.5, -1.0]]), jnp.array([0]))
      >>> value.tolist(), delta.tolist()
      ([0.5], [[-1.0, 1.0, 0.0]])
    """
    name = "multi_margin"
    if power not in (1, 2):
        raise ValueError(f"{name}: power is {power!r}; it takes 1 or 2.")
    margin = require_number(name, "margin", margin)
    if class_weights is not None:
        class_weights = require_class_weights(name, class_weights)

    def gaps_of(outputs, targets):
        """Where the label is and the gaps g of the others, [N, ..., C]; weights, [N, ..., 1]."""
        y = require_outputs(name, outputs)
        labels = require_labels(name, require_array(name, "targets", targets), y.shape)
        at = labels[..., None] == jnp.arange(y.shape[-1], dtype=labels.dtype)
        exists = jnp.any(at, axis=-1, keepdims=True)
        own = jnp.where(exists, jnp.sum(jnp.where(at, y, 0), axis=-1, keepdims=True), jnp.nan)
        weights = jnp.ones_like(own)
        if class_weights is not None:
            fitting = require_fitting(name, "class_weights", class_weights, y)
            weights = jnp.sum(jnp.where(at, fitting, 0), axis=-1, keepdims=True)
        return at, jnp.where(at, 0, margin - own + y), weights

    def terms(outputs, targets):
        """The multi-class hinge loss (see `make_multi_margin`)."""
        at, gaps, weights = gaps_of(outputs, targets)
        short = jax.nn.relu(gaps)
        slopes = weights * (is_short(gaps) if power == 1 else 2 * short)
        delta = jnp.where(at, -jnp.sum(slopes, axis=-1, keepdims=True), slopes)
        return jnp.sum(weights * short**power, axis=-1), delta.astype(outputs.dtype)

    def hessian_factor(outputs, targets):
        at, gaps, weights = gaps_of(outputs, targets)
        c = gaps.shape[-1]
        # Column k is sqrt(2 w) (e_k - e_l) where g_k > 0, and 0 at the label, where g is 0.
        columns = jnp.eye(c, dtype=gaps.dtype) - at[..., None, :].astype(gaps.dtype)
        roots = math.sqrt(2) * jnp.sqrt(weights) * is_short(gaps)
        return jnp.moveaxis(roots[..., None] * columns, -2, 0).astype(outputs.dtype)

    factor = hessian_factor if power == 2 else without_factor(name, IS_LINEAR, SMOOTH)
    return Loss(name, terms, without_sample(name), factor, right_of_labels(name))


def _multi_label_margin():
    name = "multi_label_margin"

    def terms(outputs, targets):
        """The multi-label hinge loss: every label is ahead of every class that is none, by 1.

            E = sum_j t_j sum_(i: t_i = 0) g_ji,    g_ji = max(0, 1 - y_j + y_i)
            delta_i = sum_j t_j [g_ji > 0] where t_i = 0,    delta_j = -t_j sum_i [g_ji > 0]

        It takes memory for C^2 pairs of classes at each position. PyTorch's `MultiLabelMarginLoss`
        is this loss divided by C. Its targets list the labels; here t_c counts them.

        Args:
          outputs: y, [N, ..., C].
          targets: 1 for each label and 0 for the other classes, [N, ..., C]. A label of t_c > 1
            counts so many times.

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a target
            is negative.
          TypeError: a factor of the Hessian or a sample is asked for.

        References:
          "A Kernel Method for Multi-Labelled Classification", Elisseeff, Weston, 2001.
        """
        y = require_outputs(name, outputs)
        t = require_like(name, targets, y, "1 per label and 0 per other class")
        t = require_between(name, t, 0, math.inf)
        # [N, ..., j, i]: how much a pair counts, which is only if j is a label and i is none.
        pairs = t[..., None] * jnp.where(t == 0, 1, 0 * t)[..., None, :]
        gaps = 1 - y[..., None] + y[..., None, :]
        slopes = pairs * is_short(gaps)
        delta = jnp.sum(slopes, axis=-2) - jnp.sum(slopes, axis=-1)
        return jnp.sum(pairs * jax.nn.relu(gaps), axis=(-2, -1)), delta.astype(outputs.dtype)

    factor = without_factor(name, IS_LINEAR, SMOOTH)
    return Loss(name, terms, without_sample(name), factor)


multi_label_margin = _multi_label_margin()


def make_hinge_embedding(*, margin: float = 1.0) -> Loss:
    """The hinge loss of distances: similar pairs are near, others farther away than a margin m.

        E = sum_o y_o                where t_o = 1,     delta = 1
                  max(0, m - y_o)    where t_o = -1,    delta = -1 where y < m, else 0

    Outputs are distances y, [N, ..., O]; targets are 1 or -1 for each, [N, ..., O].

    Args:
      margin: m.

    Raises:
      ValueError: `margin` is not a number; when called, outputs or targets have the wrong shape or
        dtype. Outside jit also: a target is not 1 or -1.
      TypeError: a factor of the Hessian or a sample is asked for.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> bp.make_hinge_embedding()(jnp.array([[0.25, 0.25]]), jnp.array([[1, -1]]))[0].tolist()
      [1.0]
    """
    name = "hinge_embedding"
    margin = require_number(name, "margin", margin)

    def terms(outputs, targets):
        """The hinge loss of distances (see `make_hinge_embedding`)."""
        y = require_outputs(name, outputs)
        t = require_one_of(name, require_like(name, targets, y, "1 or -1 per output"), -1, 1)
        gap = margin - y
        values = jnp.where(t == -1, jax.nn.relu(gap), t * y)
        return values, jnp.where(t == -1, -is_short(gap), t).astype(outputs.dtype)

    factor = without_factor(name, IS_LINEAR, SMOOTH)
    return Loss(name, terms, without_sample(name), factor, filler=1)
