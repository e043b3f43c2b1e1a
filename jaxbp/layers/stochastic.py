"""Stochastic layers: they draw random numbers from the `key` of forward; without one, none."""

import jax
import jax.numpy as jnp

from jaxbp.require import (
    require_array,
    require_cache,
    require_delta,
    require_drop_prob,
    require_float_pair,
    require_floats,
    require_key,
    require_pair,
    require_same_shapes,
    require_shape,
    require_shape_alone,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, shape_alone

__all__ = ["dropout", "sample_gaussian"]


def dropout(drop_prob: float) -> Layer:
    """Sets each value to zero with probability `drop_prob` and divides the others by 1 - drop_prob.

        y = m x / (1 - drop_prob),   dx = m dy / (1 - drop_prob),   m ~ Bernoulli(1 - drop_prob)

    The expectation of y is x. The mask m is drawn from the `key` of forward. Without a key, as at
    inference, y = x and dx = dy.

    Args:
      drop_prob: the probability that a value is set to zero, in [0, 1).

    Raises:
      ValueError: `drop_prob` is not in [0, 1).

    References:
      "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", Srivastava, Hinton,
      Krizhevsky, Sutskever, Salakhutdinov, 2014.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer, x = bp.dropout(0.5), jnp.ones((1, 100))
      >>> y, _ = layer.forward((), x, key=jax.random.key(0))
      >>> without_key, _ = layer.forward((), x)
      >>> sorted({*y.ravel().tolist()}), sorted({*without_key.ravel().tolist()})
      ([0.0, 2.0], [1.0])
    """
    require_drop_prob("dropout", drop_prob)
    keep_prob = 1 - drop_prob

    def init(key, shape):
        del key
        return (), require_shape(name, shape)

    def forward(params, x, *, key=None):
        del params
        require_floats(name, x)
        require_key(name, "key", key)
        if key is None:
            return x, shape_alone(x)
        # The mask takes one byte per value. Drawing it again would cost more than reading it.
        mask = jax.random.bernoulli(key, keep_prob, x.shape)
        return apply(mask, x), mask

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_array(name, cache, "a cache")
        if cache.dtype == bool:
            require_delta(name, dy, cache.shape)
            return apply(cache, dy), ()
        require_delta(name, dy, require_shape_alone(name, cache))
        return dy, ()

    def apply(mask, x):
        return jnp.where(mask, x / keep_prob, 0)

    name = f"dropout({drop_prob})"
    return Layer(name, init, forward, backward)


def sample_gaussian() -> Layer:
    """Draws from a normal distribution, so that the error reaches its mean and its variance.

        y = mean + s,   s = exp(log_variance / 2) e,   e ~ Normal(0, 1)
        d_mean = dy     d_log_variance = s dy / 2

    Inputs are the pair (mean, log_variance), of equal shapes. The noise e is drawn from the `key`
    of forward. Without a key, as at inference, y is the mean, and d_log_variance is 0. There are no
    parameters.

    Raises:
      LayerError: the inputs are not a pair of arrays of equal shape and dtype.

    References:
      "Auto-Encoding Variational Bayes", Kingma, Welling, 2014: the reparameterisation.

    Example:
      A variational autoencoder, whose outputs are ((mean, log_variance), reconstruction):

      >>> import jax, jaxbp as bp
      >>> encoder = bp.chain(bp.dense(8), bp.tanh(), bp.fork(bp.dense(2), bp.dense(2)))
      >>> decoder = bp.chain(bp.dense(8), bp.tanh(), bp.dense(5))
      >>> vae = bp.chain(
      ...     encoder, bp.fork(bp.chain(), bp.chain(bp.sample_gaussian(), decoder))
      ... )
      >>> vae.init(jax.random.key(0), (5,))[1]
      (((2,), (2,)), (5,))
    """
    name = "sample_gaussian"

    def init(key, shape):
        del key
        mean, log_variance = require_pair(name, shape)
        mean, log_variance = require_shape(name, mean), require_shape(name, log_variance)
        require_same_shapes(name, ("N", *mean), ("N", *log_variance))
        return (), mean

    def forward(params, x, *, key=None):
        del params
        mean, log_variance = require_float_pair(name, x)
        require_same_shapes(name, mean.shape, log_variance.shape)
        require_key(name, "key", key)
        like = jax.tree.map(shape_alone, x)
        if key is None:
            return mean, (like, None)
        noise = jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
        return mean + noise, (like, noise)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_cache(name, cache, 2)
        like, noise = cache
        mean, _ = require_pair(name, like, "a cache")
        shape = require_shape_alone(name, mean)
        require_delta(name, dy, shape)
        slope = jnp.zeros_like(dy) if noise is None else noise * dy / 2
        return jax.tree.structure(like).unflatten((dy, slope)), ()

    return Layer(name, init, forward, backward)
