"""Gradient noise: how much the per-example gradients scatter about their mean.

Use it to choose the batch size: up to the noise scale, a larger batch gives a much better estimate
of the gradient; beyond it, the gain is small. G is the expectation of an example's gradient and S
its covariance. Both are estimated without bias from N per-example gradients g_n with mean m:

    tr S  ~  (sum_n |g_n|^2 / N - |m|^2) N / (N - 1)
    |G|^2 ~  |m|^2 - tr S / N

Source:
  "An Empirical Model of Large-Batch Training", McCandlish, Kaplan, Amodei, 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from jaxbp.readings.inner_products import directional_derivatives
from jaxbp.readings.norms import example_norms, sq_norms
from jaxbp.signals.kinds import map_signals
from jaxbp.types import PyTree, exportable, widened

__all__ = ["GradientNoise", "gradient_noise"]


@exportable
class GradientNoise(NamedTuple):
    """The scatter of the per-example gradients, as scalars.

    Attributes:
      trace: tr S, the variance of one example's gradient, summed over all parameters.
      sq_norm: |G|^2. The estimate can be negative if the noise is larger than the signal.
      scale: the simple noise scale tr S / |G|^2, the batch size at which signal and noise are
        equal. One batch gives a poor estimate: average `trace` and `sq_norm` over steps, and divide
        the averages.
      signal_to_noise: |m| / sqrt(tr S), for one example; inf if all gradients are equal, and nan if
        all are zero.
      cosine: the mean over examples of the cosine between g_n and m; 0 for a gradient of zero.
    """

    trace: jax.Array
    sq_norm: jax.Array
    scale: jax.Array
    signal_to_noise: jax.Array
    cosine: jax.Array


def gradient_noise(signals: PyTree, grads: PyTree) -> GradientNoise:
    """Estimates how much the per-example gradients scatter about their mean, from one sweep.

    Beside the sweep and the squared norms, it costs one product of the size of the forward pass,
    for the cosines. Under `jax.jit` this product is left out if the cosine is not used.

    Args:
      signals: the tree of signals that a sweep with `read=keep` returns.
      grads: the mean gradient of the same examples.

    Returns:
      A `GradientNoise`.

    Raises:
      ValueError: there are fewer than two examples, or `grads` is not of the same network.

    References:
      "An Empirical Model of Large-Batch Training", McCandlish, Kaplan, Amodei, 2018.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(2)
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> x = jax.random.normal(jax.random.key(1), (50, 3))
      >>> sweep = bp.backprop(net, bp.squared_error, read={"grads": bp.mean, "signals": bp.keep})
      >>> _, answers = sweep(params, x, jnp.ones((50, 2)))
      >>> noise = bp.gradient_noise(answers["signals"], answers["grads"])
      >>> bool(noise.trace > 0), bool(abs(noise.cosine) <= 1)
      (True, True)
    """
    norms = example_norms(map_signals(sq_norms, signals))
    n = norms.shape[0]
    if _may_be_one(n):
        hint = f' Use the constraint "{n} >= 2"?' if export.is_symbolic_dim(n) else ""
        raise ValueError(f"gradient_noise: takes two examples or more; got {n}.{hint}")
    products = directional_derivatives(signals, grads)
    # The mean of g_n . m is |m|^2 too, but rounding could make it negative, unlike this sum.
    sq_mean = sum(jnp.sum(jnp.square(widened(g))) for g in jax.tree.leaves(grads))
    trace = jnp.maximum(jnp.mean(jnp.square(norms)) - sq_mean, 0) * n / (n - 1)
    sq_norm = sq_mean - trace / n
    lengths = norms * jnp.sqrt(sq_mean)
    cosines = jnp.where(lengths == 0, 0, products / jnp.where(lengths == 0, 1, lengths))
    return GradientNoise(
        trace, sq_norm, trace / sq_norm, jnp.sqrt(sq_mean / trace), jnp.mean(cosines)
    )


def _may_be_one(n):
    """Whether there may be fewer than two examples."""
    try:
        return bool(n < 2)
    except Exception:  # n is symbolic, without bounds; the class depends on the version of JAX
        return True
