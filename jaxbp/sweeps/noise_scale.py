"""How much of a gradient is signal: the scatter of the examples' gradients about their mean.

With G the expectation of an example's gradient and S the covariance, estimated without bias from
N examples with gradients g_n of mean m:

  tr S  ~  (sum_n |g_n|^2 / N - |m|^2) N / (N - 1)
  |G|^2 ~  |m|^2 - tr S / N

Source:
  "An Empirical Model of Large-Batch Training", McCandlish, Kaplan, Amodei, 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.readings.inner_products import directional_derivatives
from jaxbp.readings.norms import example_norms, sq_norms
from jaxbp.signals.kinds import map_signals
from jaxbp.types import widened


class GradientNoise(NamedTuple):
    """The scatter of the examples' gradients, as scalars.

    Attributes:
      trace: tr S, the variance of one example's gradient, summed over all parameters.
      sq_norm: |G|^2, which may come out below zero where the noise is larger than the signal.
      scale: the simple noise scale tr S / |G|^2, the batch size, in examples, at which signal and
        noise are equal. A single batch tells little of it: average `trace` and `sq_norm` over
        steps, and divide the averages.
      signal_to_noise: |m| / sqrt(tr S), of one example; inf where all gradients are alike, and not
        a number where all are zero.
      cosine: the mean over examples of the cosine between g_n and m; 0 for a gradient of zero.
    """

    trace: jax.Array
    sq_norm: jax.Array
    scale: jax.Array
    signal_to_noise: jax.Array
    cosine: jax.Array


def gradient_noise(signals, grads):
    """The scatter of the examples' gradients about their mean, from the operands of one sweep.

    It costs one product of the forward pass's size beside the sweep, for the cosines; where they
    are not used, jit leaves it out.

    Args:
      signals: what a sweep with `read=keep` hands out.
      grads: the mean gradient of the same examples.

    Returns:
      A `GradientNoise`.

    Raises:
      ValueError: there are fewer than two examples, or `grads` is not of the same network.

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
    n = len(norms)
    if n < 2:
        raise ValueError("gradient_noise: takes two examples or more, of which to see the scatter.")
    products = directional_derivatives(signals, grads)
    # g_n . m averages to |m|^2, but this is a sum of squares, which rounding leaves positive.
    sq_mean = sum(jnp.sum(jnp.square(widened(g))) for g in jax.tree.leaves(grads))
    trace = jnp.maximum(jnp.mean(jnp.square(norms)) - sq_mean, 0) * n / (n - 1)
    sq_norm = sq_mean - trace / n
    lengths = norms * jnp.sqrt(sq_mean)
    cosines = jnp.where(lengths == 0, 0, products / jnp.where(lengths == 0, 1, lengths))
    return GradientNoise(
        trace, sq_norm, trace / sq_norm, jnp.sqrt(sq_mean / trace), jnp.mean(cosines)
    )
