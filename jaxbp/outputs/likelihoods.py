"""Negative log-likelihoods of distributions whose parameters are the outputs.

poisson_nll     counts: the outputs are the logarithm of the rate
gaussian_nll    numbers with an uncertainty: the outputs are mean and log-variance
"""

import math

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import halves, require_between, require_like, require_outputs
from jaxbp.outputs.curvature import DRAW, IS_INDEFINITE, diagonal, without_factor
from jaxbp.sharding import divided_by_compiler
from jaxbp.types import Loss

__all__ = ["gaussian_nll", "make_poisson_nll", "poisson_nll"]


def make_poisson_nll(*, log_rates: bool = True, full: bool = False) -> Loss:
    """The negative log-likelihood of counts t under a Poisson distribution of rate m.

        log rates    m = e^z, E = sum_o m_o - t_o z_o,  delta = m - t,  Hessian diag(m)
        rates        m = y,   E = sum_o m_o - t_o log m_o,  delta = 1 - t / m,
                     Hessian diag(t / m^2)
        sample       Poisson, with rate m

    Without arguments it is `bp.poisson_nll`. The term log t! does not depend on the outputs and is
    left out.

      m = 0, t = 0    value 0, delta m - t = 0, or 1 of rates
      m = 0, t > 0    value inf
      m < 0           NaN

    Args:
      log_rates: whether the outputs are log m. Otherwise they are the rates m, which have to be
        positive: put `softplus()` at the end of the network.
      full: whether to add log t! by Stirling's formula, as PyTorch's `PoissonNLLLoss` does:
        t log t - t + log(2 pi t) / 2, for t > 1.

    Raises:
      ValueError: when called, outputs or targets have the wrong shape or dtype. Outside jit also: a
        target is negative.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.make_poisson_nll(log_rates=False)
      >>> loss(jnp.array([[2.0]]), jnp.array([[3.0]]))[1].tolist()
      [[-0.5]]
    """
    name = "poisson_nll"

    def counts_of(targets, y):
        targets = require_like(name, targets, y, "one count per output")
        return require_between(name, targets, 0, math.inf)

    def rates_of(outputs):
        y = require_outputs(name, outputs)
        return jnp.exp(y) if log_rates else jnp.where(y >= 0, y, jnp.nan)

    def terms(outputs, targets):
        """The negative log-likelihood of counts: E = sum_o e^z_o - t_o z_o. delta = e^z - t.

        The outputs are the logarithms of the rates of Poisson distributions. See
        `make_poisson_nll`.

            Hessian    diag(e^z)
            sample     Poisson, with rate e^z

        Args:
          outputs: log rates z, [N, ..., O].
          targets: counts t, [N, ..., O], not negative.

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a target
            is negative.
        """
        y, m = require_outputs(name, outputs), rates_of(outputs)
        t = counts_of(targets, y)
        none = t == 0
        if log_rates:
            values, delta = m - jnp.where(none, 0, t * jnp.where(none, 0, y)), m - t
        else:
            safe = jnp.where(none & ~jnp.isnan(m), 1, m)
            values, delta = m - t * jnp.log(safe), 1 - t / safe
        if full:
            values = values + _stirling(t)
        return values, delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        m = rates_of(outputs)
        return divided_by_compiler(jax.random.poisson, key, m).astype(m.dtype)

    def hessian_factor(outputs, targets):
        y, m = require_outputs(name, outputs), rates_of(outputs)
        if log_rates:
            roots = jnp.exp(y / 2)
        else:
            t = counts_of(targets, y)
            none = t == 0  # where sqrt(t) has no derivative, and m may be 0
            roots = jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, t)) / jnp.where(none, 1, m))
        return diagonal(roots.astype(outputs.dtype))

    return Loss(name, terms, sample, hessian_factor)


def _stirling(t):
    """Stirling's formula for log t! where t > 1, and 0 elsewhere."""
    large = jnp.where(t > 1, t, 1)
    return jnp.where(t > 1, t * jnp.log(large) - t + jnp.log(2 * math.pi * large) / 2, 0 * t)


poisson_nll = make_poisson_nll()


def _gaussian_nll():
    name = "gaussian_nll"

    def terms(outputs, targets):
        """The negative log-likelihood of numbers under normal distributions of learned variance.

            E = sum_o (s_o + u_o^2) / 2,    u = (y - t) e^(-s / 2)
            delta = u e^(-s / 2) of the means y, (1 - u^2) / 2 of the log-variances s

            Hessian    has negative eigenvalues where u is not 0, so it has no factor
            sample     normal, with mean y and variance e^s. Its Fisher information is e^-s and 1/2.

        The constant log(2 pi) / 2 is left out. PyTorch's `GaussianNLLLoss` computes the same from
        variances v: s = log v, and its derivative is that of s divided by v.

        Args:
          outputs: means and log-variances side by side, [N, ..., 2 O]: the means are the first O.
          targets: t, [N, ..., O].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype.
          TypeError: a factor of the Hessian is asked for.

        References:
          "Estimating the Mean and Variance of the Target Probability Distribution", Nix, Weigend,
          1994.
        """
        y, s = halves(name, outputs)
        root = jnp.exp(-s / 2)
        u = (y - require_like(name, targets, y, "one target per mean")) * root
        values = s / 2 + (u / 2) * u
        delta = jnp.concatenate([u * root, 0.5 - (u / 2) * u], axis=-1)
        return jnp.sum(values, axis=-1), delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        y, s = halves(name, outputs)
        return y + jnp.exp(s / 2) * jax.random.normal(key, y.shape, y.dtype)

    return Loss(name, terms, sample, without_factor(name, IS_INDEFINITE, DRAW))


gaussian_nll = _gaussian_nll()
