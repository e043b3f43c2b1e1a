"""Losses of regression: outputs that are numbers near their targets.

With the residual r = y - t of each output:

    squared_error     r^2 / 2                  normal distribution
    absolute_error    |r|                      Laplace distribution
    huber             between these two        normal in the middle, Laplace in the tails
    log_cosh          log cosh r               hyperbolic secant distribution
"""

import math
import numbers

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import require_like, require_outputs
from jaxbp.outputs.curvature import DRAW, IS_LINEAR, diagonal, without_factor
from jaxbp.types import Loss

__all__ = ["absolute_error", "huber", "log_cosh", "make_huber", "squared_error"]


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
        return diagonal(jnp.ones_like(y, outputs.dtype))

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

    `bp.huber` is this loss with h = 1. PyTorch's `SmoothL1Loss(beta=h)` is this loss divided by h.

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
        return diagonal(near.astype(outputs.dtype))

    return Loss(name, terms, sample, hessian_factor)


huber = make_huber(1.0)


def _absolute_error():
    name = "absolute_error"

    def terms(outputs, targets):
        """The absolute error: E = sum_o |y_o - t_o|. delta = sign(y - t), 0 where y = t.

            Hessian    0 wherever it exists, so it has no factor
            sample     Laplace, with mean y and scale 1

        Args:
          outputs: y, [N, ..., O].
          targets: t, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype.
          TypeError: a factor of the Hessian is asked for.
        """
        y = require_outputs(name, outputs)
        residuals = y - require_like(name, targets, y, "one target per output")
        return jnp.abs(residuals), jnp.sign(residuals).astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        y = require_outputs(name, outputs)
        return y + jax.random.laplace(key, y.shape, y.dtype)

    return Loss(name, terms, sample, without_factor(name, IS_LINEAR, DRAW))


absolute_error = _absolute_error()


def _log_cosh():
    name = "log_cosh"

    def residuals_of(outputs, targets):
        y = require_outputs(name, outputs)
        return y - require_like(name, targets, y, "one target per output")

    def terms(outputs, targets):
        """The logarithm of cosh: E = sum_o log cosh r_o, r = y - t. delta = tanh r.

        It is about r^2 / 2 for small r, and |r| - log 2 for large r.

            Hessian    diag(1 / cosh^2 r)
            sample     y + r, r with the density 1 / (pi cosh r), the hyperbolic secant distribution

        Args:
          outputs: y, [N, ..., O].
          targets: t, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype.
        """
        r = residuals_of(outputs, targets)
        # cosh r = 1 + 2 sinh^2(r / 2), exact where r is small. Where it is large, cosh overflows.
        size = jnp.abs(r)
        near = jnp.where(size < 1, r, 0)
        values = jnp.where(
            size < 1,
            jnp.log1p(2 * jnp.sinh(near / 2) ** 2),
            size + (jnp.log1p(jnp.exp(-2 * size)) - math.log(2)),
        )
        return values, jnp.tanh(r).astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        y = require_outputs(name, outputs)
        angle = jax.random.uniform(key, y.shape, y.dtype, -math.pi / 2, math.pi / 2)
        # The distribution function is 1/2 + arctan(sinh r) / pi.
        return y + jnp.arcsinh(jnp.tan(angle))

    def hessian_factor(outputs, targets):
        size = jnp.abs(residuals_of(outputs, targets))
        # 1 / cosh r, in which cosh would overflow.
        return diagonal((2 * jnp.exp(-size) / (1 + jnp.exp(-2 * size))).astype(outputs.dtype))

    return Loss(name, terms, sample, hessian_factor)


log_cosh = _log_cosh()
