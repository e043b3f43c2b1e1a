"""Losses: how far outputs are from their targets, and which way to move them.

A loss maps outputs [N, ..., O] and targets to the value of each example, [N], and to its derivative
with respect to the outputs, delta = dE/dy, of the outputs' shape. Nothing is averaged over the
examples. The positions of one example are summed: the loss of a sequence is minus the logarithm of
its probability. `weighted` and `ignoring` leave out padded positions and examples.

The cross-entropies take logits, not probabilities. Value and delta are exact to the last digits
wherever the result can be represented, also where a prediction is certain or a logit is infinite.
16-bit outputs are computed in 32 bits; delta is returned in the dtype of the outputs, the value in
32 bits. Outside jit, targets out of range are refused. Under jit they are not known, and the value
and delta of that position are NaN.

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
import numbers

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import (
    require_array,
    require_distributions,
    require_labels,
    require_like,
    require_outputs,
    require_probabilities,
)
from jaxbp.types import Loss, show_shape

__all__ = [
    "huber",
    "make_huber",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
]


def _softmax_cross_entropy():
    name = "softmax_cross_entropy"

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
        z, targets = require_outputs(name, outputs), require_array(name, "targets", targets)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            values, delta = _at_labels(z, require_labels(name, targets, z.shape))
        else:
            values, delta = _at_probabilities(z, require_distribution(targets, z))
        return values, delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        return jax.random.categorical(key, require_outputs(name, outputs))

    def hessian_factor(outputs, targets):
        del targets
        z = require_outputs(name, outputs)
        shifted = _difference(z, _largest(z))
        e, own = jnp.exp(shifted), jnp.eye(z.shape[-1], dtype=bool)
        s = jnp.sum(e, axis=-1, keepdims=True)
        # Column k is sqrt(p_k) (e_k - p), in rows [..., k, c]. 1 - p_k is the sum of the other p_c.
        others = jnp.where(own, 0, e[..., None, :])
        rows = jnp.where(own, jnp.sum(others, axis=-1, keepdims=True), -others) / s[..., None]
        # sqrt(p_k) by half the exponent: p_k itself may be too small to be represented.
        roots = jnp.exp(shifted / 2) / jnp.sqrt(s)
        return jnp.moveaxis(roots[..., None] * rows, -2, 0).astype(outputs.dtype)

    def right(outputs, targets, top):
        z, targets = require_outputs(name, outputs), require_array(name, "targets", targets)
        if top > z.shape[-1]:
            raise ValueError(f"{name}: has {z.shape[-1]} classes, fewer than the {top} to look at.")
        best = jnp.argmax(z, axis=-1)[..., None] if top == 1 else jax.lax.top_k(z, top)[1]
        if jnp.issubdtype(targets.dtype, jnp.integer):
            labels = require_labels(name, targets, z.shape)
            hits = best.astype(labels.dtype) == labels[..., None]
        else:
            targets = require_distribution(targets, z)
            largest = jnp.max(targets, axis=-1, keepdims=True)
            hits = jnp.take_along_axis(targets, best, axis=-1) == largest
        hits = jnp.any(hits, axis=-1) & ~jnp.any(jnp.isnan(z), axis=-1)
        return hits, jnp.ones(hits.shape, jnp.float32)

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


def _largest(z):
    """The largest logit m, [..., 1], by which the others are shifted before exp.

    The shift cancels wherever it is used, so it has no derivative.
    """
    return jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))


def _difference(z, m):
    """The difference z - m, where inf counts as the largest number, so that inf - inf is 0."""
    top = jnp.finfo(z.dtype).max
    return jnp.minimum(z, top) - jnp.minimum(m, top)


def _at_labels(z, labels):
    """Value and delta of a softmax cross-entropy at labels l [N, ...], without cancellation.

        E = log sum_c e^(z_c - z_l),    delta_l = p_l - 1 = -sum of the other p_c

    The label is found by comparison. A gather and a scatter were slower on a CPU, and would bring
    together classes that are distributed over devices.
    """
    at = labels[..., None] == jnp.arange(z.shape[-1], dtype=labels.dtype)
    exists = (labels >= 0) & (labels < z.shape[-1])
    m = _largest(z)
    e = jnp.exp(_difference(z, m))
    others = jnp.sum(jnp.where(at, 0, e), axis=-1, keepdims=True)
    z_l = jnp.sum(jnp.where(at, z, 0), axis=-1, keepdims=True)
    e_l = jnp.where(exists[..., None], jnp.exp(_difference(z_l, m)), jnp.nan)
    # E = (m - z_l) + log(others + e_l). If z_l is the largest logit, e_l - 1 is 0, and log1p is
    # exact however little the others are. Otherwise m - z_l or the others are far from 0.
    gap = jnp.where(z_l == jnp.inf, 0, m - z_l)
    values = gap + jnp.log1p(others + (e_l - 1))
    return values[..., 0], jnp.where(at, -others, e) / (others + e_l)


def _at_probabilities(z, t):
    """Value and delta of a softmax cross-entropy at probabilities t [N, ..., C].

        E = sum_c t_c (m - z_c + log sum_k e_k),    e_c = e^(z_c - m)
        delta_c = (e_c sum_{k != c} t_k - t_c sum_{k != c} e_k) / sum_k e_k

    This is p_c sum_k t_k - t_c, in which nothing cancels if t is one-hot.
    """
    m = _largest(z)
    e = jnp.exp(_difference(z, m))
    largest = jnp.sum(jnp.where(z == m, e, 0), axis=-1, keepdims=True)
    rest = jnp.sum(jnp.where(z == m, 0, e), axis=-1, keepdims=True)
    # The differences are exactly 0 at a single largest logit, and at a target of 1.
    e_others, t_others = rest + (largest - e), jnp.sum(t, axis=-1, keepdims=True) - t
    # 0 log 0 = 0: a class that cannot occur costs nothing if the target does not have it.
    gaps = m - z
    gaps = jnp.where((z == jnp.inf) | ((t == 0) & (gaps == jnp.inf)), 0, gaps)
    values = jnp.sum(t * (gaps + jnp.log1p(rest + (largest - 1))), axis=-1)
    return values, (e * t_others - t * e_others) / (rest + largest)


softmax_cross_entropy = _softmax_cross_entropy()


def _sigmoid_cross_entropy():
    name = "sigmoid_cross_entropy"

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
        t = require_targets(z, targets)
        size, is_one = jnp.abs(z), z >= 0
        miss = jnp.where(is_one, 1 - t, t)  # the target's probability of the less likely answer
        e = jnp.exp(-size)  # the odds that the outputs give to this answer
        values = miss * jnp.where((miss == 0) & (size == jnp.inf), 0, size) + jnp.log1p(e)
        delta = (miss - (1 - miss) * e) / (1 + e)
        return values, jnp.where(is_one, delta, -delta).astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        z = require_outputs(name, outputs)
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)

    def hessian_factor(outputs, targets):
        del targets
        size = jnp.abs(require_outputs(name, outputs))
        # sqrt(p (1 - p)), in which 1 - p would round to zero for large z.
        return _diagonal((jnp.exp(-size / 2) / (1 + jnp.exp(-size))).astype(outputs.dtype))

    def right(outputs, targets, top):
        if top != 1:
            raise ValueError(f"{name}: each output has two answers, so top has to be 1, not {top}.")
        z = require_outputs(name, outputs)
        hits = ((z > 0) == (require_targets(z, targets) > 0.5)) & ~jnp.isnan(z)
        return hits, jnp.ones(hits.shape, jnp.float32)

    def require_targets(z, targets):
        targets = require_like(name, targets, z, "one target in [0, 1] per output")
        return require_probabilities(name, targets, "targets")

    return Loss(name, terms, sample, hessian_factor, right)


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
        y = require_outputs(name, outputs)
        residuals = y - require_like(name, targets, y, "one target per output")
        # Halved first: the square may overflow where half of it does not.
        return (residuals / 2) * residuals, residuals.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        y = require_outputs(name, outputs)
        return y + jax.random.normal(key, y.shape, y.dtype)

    def hessian_factor(outputs, targets):
        del targets
        y = require_outputs(name, outputs)
        return _diagonal(jnp.ones(y.shape, outputs.dtype))

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
      ValueError: `threshold` is not a positive number.

    References:
      "Robust Estimation of a Location Parameter", Huber, 1964.
    """
    if not isinstance(threshold, numbers.Real) or not threshold > 0:
        raise ValueError(f"huber: threshold is {threshold!r}; it takes a positive number.")
    threshold = float(threshold)
    name = "huber"

    def residuals_of(outputs, targets):
        y = require_outputs(name, outputs)
        return y - require_like(name, targets, y, "one target per output")

    def terms(outputs, targets):
        """The Huber loss (see `make_huber`): d (r - d / 2) with d = r clipped to [-h, h]."""
        r = residuals_of(outputs, targets)
        # Not jnp.clip: the derivative of its minimum would multiply 0 by an infinite residual.
        delta = jnp.where(jnp.abs(r) <= threshold, r, threshold * jnp.sign(r))
        return delta * (r - delta / 2), delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        y = require_outputs(name, outputs)
        which, middle, tail = jax.random.split(key, 3)
        # The integrals of e^-E over the middle and over both tails.
        in_middle = math.sqrt(2 * math.pi) * math.erf(threshold / math.sqrt(2))
        in_tails = 2 / threshold * math.exp(-threshold * threshold / 2)
        near = jax.random.truncated_normal(middle, -threshold, threshold, y.shape, y.dtype)
        size = threshold + jax.random.exponential(tail, y.shape, y.dtype) / threshold
        far = jnp.where(near < 0, -size, size)
        is_near = jax.random.bernoulli(which, in_middle / (in_middle + in_tails), y.shape)
        return y + jnp.where(is_near, near, far)

    def hessian_factor(outputs, targets):
        near = jnp.abs(residuals_of(outputs, targets)) <= threshold
        return _diagonal(near.astype(outputs.dtype))

    return Loss(name, terms, sample, hessian_factor)


huber = make_huber(1.0)


def _diagonal(values):
    """The columns of diagonal matrices, [O, N, ..., O], from their diagonals, [N, ..., O]."""
    eye = jnp.eye(values.shape[-1], dtype=values.dtype)
    return jnp.moveaxis(values[..., None, :] * eye, -2, 0)
