"""Kullback-Leibler divergences: of a prediction from given probabilities, or from a prior."""

import math

import jax
import jax.numpy as jnp

from jaxbp.outputs.arguments import (
    halves,
    require_between,
    require_distributions,
    require_like,
    require_outputs,
)
from jaxbp.outputs.curvature import DRAW, IS_LINEAR, diagonal, without_factor, without_sample
from jaxbp.outputs.softmax import at_probabilities, softmax_factor
from jaxbp.types import Loss

__all__ = ["kl_divergence", "make_kl_divergence", "standard_normal_kl"]


def make_kl_divergence(*, log_outputs: bool = False, log_targets: bool = False) -> Loss:
    """The Kullback-Leibler divergence of logits or log-probabilities, E = sum_c t_c log(t_c / p_c).

        of logits               p = softmax(z), delta = p - t, Hessian diag(p) - p p^T
        of log-probabilities    p = e^y, delta = -t, Hessian 0, so it has no factor
        sample                  one-hot, c with probability p_c; its logarithm if `log_targets`

    It is the cross-entropy less the entropy of the targets, so its delta is that of
    `softmax_cross_entropy` at probabilities. Without arguments it is `bp.kl_divergence`.

      t_c = 0                                  no term
      logits, targets that do not sum to 1     refused; NaN under jit
      log-probabilities, such targets          allowed: the formula as it stands

    Args:
      log_outputs: whether the outputs are the logarithms of probabilities, as PyTorch's `KLDivLoss`
        takes them, instead of logits. Put a log-softmax into the network.
      log_targets: whether the targets are the logarithms of probabilities.

    Raises:
      ValueError: when called, outputs or targets have the wrong shape or dtype. Outside jit also: a
        target is out of range.
      TypeError: a factor of the Hessian is asked for, with `log_outputs`.

    References:
      "On Information and Sufficiency", Kullback, Leibler, 1951.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> loss = bp.make_kl_divergence(log_outputs=True)
      >>> value, delta = loss(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[1.0, 0.0]]))
      >>> round(float(value[0]), 4), float(delta[0, 0])
      (0.6931, -1.0)
    """
    name = "kl_divergence"

    def probabilities_of(targets, y):
        """The targets t [N, ..., C] as probabilities, and log t, which is 0 where t is 0."""
        what = "one probability per class"
        targets = require_like(
            name, targets, y, f"the logarithm of {what}" if log_targets else what
        )
        t = jnp.exp(targets) if log_targets else targets
        if log_outputs:
            t = require_between(name, t, 0, jnp.inf)
        else:
            t = require_distributions(name, t)
        logarithm = targets if log_targets else jnp.log(jnp.where(t == 0, 1, t))
        return t, jnp.where(t == 0, 0, logarithm)

    def terms(outputs, targets):
        """The Kullback-Leibler divergence from targets t: E = sum_c t_c log(t_c / p_c).

        See `make_kl_divergence`. p = softmax(z) of the outputs, and delta = p - t.

        Args:
          outputs: logits z, [N, ..., C].
          targets: probabilities t, [N, ..., C].

        Raises:
          ValueError: outputs or targets have the wrong shape or dtype. Outside jit also: a
            probability is out of range, or probabilities do not sum to 1.
        """
        y = require_outputs(name, outputs)
        t, log_t = probabilities_of(targets, y)
        if log_outputs:
            gaps = jnp.where(t == 0, 0, log_t - y)
            return jnp.sum(t * gaps, axis=-1), -t.astype(outputs.dtype)
        values, delta = at_probabilities(y, t)
        return values + jnp.sum(t * log_t, axis=-1), delta.astype(outputs.dtype)

    def sample(key, outputs, targets=None):
        del targets
        y = require_outputs(name, outputs)
        one_hot = jax.nn.one_hot(jax.random.categorical(key, y), y.shape[-1], dtype=y.dtype)
        return jnp.log(one_hot) if log_targets else one_hot

    def hessian_factor(outputs, targets):
        del targets
        return softmax_factor(require_outputs(name, outputs)).astype(outputs.dtype)

    factor = without_factor(name, IS_LINEAR, DRAW) if log_outputs else hessian_factor
    # Where the weight is 0, all classes are equally probable.
    filler = (lambda classes: -math.log(classes)) if log_targets else None
    return Loss(name, terms, sample, factor, filler=filler)


kl_divergence = make_kl_divergence()


def _standard_normal_kl():
    name = "standard_normal_kl"

    def terms(outputs, targets):
        """The divergence of normal distributions from the standard one, sum_o KL(N(m, e^s) || N).

            E = sum_o (m_o^2 + e^s_o - s_o - 1) / 2
            delta = m of the means, (e^s - 1) / 2 of the log-variances s

            Hessian    diag(1, e^s / 2)
            sample     there is none: E is no logarithm of a distribution

        It is the second part of the loss of a variational autoencoder; `joint_loss` adds it to that
        of the reconstruction.

        Args:
          outputs: means and log-variances side by side, [N, ..., 2 O]: the means are the first O.
          targets: None.

        Raises:
          ValueError: outputs have the wrong shape or dtype, or targets are not None.
          TypeError: a sample is asked for.

        References:
          "Auto-Encoding Variational Bayes", Kingma, Welling, 2014.
        """
        if targets is not None:
            raise ValueError(f"{name}: targets is a {type(targets).__name__}, expected None.")
        m, s = halves(name, outputs)
        more = jnp.expm1(s)
        values = jnp.sum(m * m + (more - s), axis=-1) / 2
        return values, jnp.concatenate([m, more / 2], axis=-1).astype(outputs.dtype)

    def hessian_factor(outputs, targets):
        del targets
        m, s = halves(name, outputs)
        roots = jnp.concatenate([jnp.ones_like(m), jnp.exp(s / 2) * math.sqrt(0.5)], axis=-1)
        return diagonal(roots.astype(outputs.dtype))

    return Loss(name, terms, without_sample(name), hessian_factor)


standard_normal_kl = _standard_normal_kl()
