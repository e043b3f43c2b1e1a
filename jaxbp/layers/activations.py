"""Activations: elementwise layers without parameters, each with its derivative.

If the derivative is a function of the output (sigmoid, tanh, relu, and others), the cache is the
output: the next layer keeps it as its input anyway, so it costs no memory. Otherwise (gelu, silu)
the cache is the derivative itself, computed in the forward pass while the exponentials are at
hand. It has the size of the input, and backward is one product.
"""

import math

import jax
import jax.numpy as jnp

from jaxbp.require import require_delta, require_floats, require_positive, require_shape
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer


def sigmoid():
    """The logistic function, y = 1 / (1 + e^-x), elementwise. dx = y (1 - y) dy."""

    def forward(x):
        y = jax.nn.sigmoid(x)
        return y, y

    return _elementwise("sigmoid", forward, lambda y: y * (1 - y))


def tanh():
    """The hyperbolic tangent, elementwise. dx = (1 - y^2) dy."""

    def forward(x):
        y = jnp.tanh(x)
        return y, y

    return _elementwise("tanh", forward, lambda y: 1 - y * y)


def relu():
    """The rectifier, y = max(x, 0), elementwise. dx = dy where y > 0, else 0 (at x = 0 too)."""

    def forward(x):
        # As a maximum, XLA would compute it again on the way back, and keep x for that beside y.
        y = jnp.where(x <= 0, 0, x)
        return y, y

    return _elementwise("relu", forward, lambda y: (y > 0).astype(y.dtype))


def leaky_relu(negative_slope=0.01):
    """The leaky rectifier, elementwise: y = x where x >= 0, else `negative_slope` x.

    dx = dy where y >= 0, else `negative_slope` dy.

    Args:
      negative_slope: positive, so that the sign of y tells that of x.

    Raises:
      ValueError: `negative_slope` is not positive.
    """
    require_positive("leaky_relu", "negative_slope", negative_slope)

    def forward(x):
        y = jax.nn.leaky_relu(x, negative_slope)
        return y, y

    def slope(y):
        return jnp.where(y >= 0, jnp.ones_like(y), negative_slope)

    return _elementwise(f"leaky_relu({negative_slope})", forward, slope)


def elu(alpha=1.0):
    """The exponential linear unit, elementwise: y = x where x > 0, else alpha (e^x - 1).

    dx = dy where y > 0, else (y + alpha) dy.

    Args:
      alpha: positive; y never falls below -alpha.

    Raises:
      ValueError: `alpha` is not positive.

    References:
      "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)", Clevert,
      Unterthiner, Hochreiter, 2016.
    """
    require_positive("elu", "alpha", alpha)

    def forward(x):
        y = jax.nn.elu(x, alpha)
        return y, y

    def slope(y):
        return jnp.where(y > 0, jnp.ones_like(y), y + alpha)

    return _elementwise(f"elu({alpha})", forward, slope)


def softplus():
    """The smooth rectifier, y = log(1 + e^x), elementwise. dx = (1 - e^-y) dy."""

    def forward(x):
        y = jax.nn.softplus(x)
        return y, y

    return _elementwise("softplus", forward, lambda y: -jnp.expm1(-y))


def silu():
    """The sigmoid linear unit or swish, y = x s with s = 1 / (1 + e^-x), elementwise.

    dx = (s + y (1 - s)) dy.

    References:
      "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in Reinforcement
      Learning", Elfwing, Uchibe, Doya, 2018.
    """

    def forward(x):
        s = jax.nn.sigmoid(x)
        y = x * s
        return y, s + y * (1 - s)

    return _elementwise("silu", forward, lambda slope: slope)


def gelu(*, approximate=True):
    """The Gaussian error linear unit, y = x P(x), elementwise. dx = (P(x) + x P'(x)) dy.

      exact          P(x) = (1 + erf(x / sqrt 2)) / 2    P'(x) = e^(-x^2 / 2) / sqrt(2 pi)
      approximate    P(x) = (1 + t) / 2                  P'(x) = (1 - t^2) u'(x) / 2
                     with t = tanh(u), u(x) = sqrt(2 / pi) (x + 0.044715 x^3)

    Args:
      approximate: whether to take the form with tanh, which GPT-2 has, or the exact one.

    References:
      "Gaussian Error Linear Units (GELUs)", Hendrycks, Gimpel, 2016.
    """

    def forward_exact(x):
        p = jax.scipy.special.erfc(-x * math.sqrt(0.5)) / 2
        return x * p, p + x * jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def forward_tanh(x):
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        t = jnp.tanh(scale * (x + cubic * x * x * x))
        p = (1 + t) / 2
        return x * p, p + x * (1 - t * t) * (scale * (1 + 3 * cubic * x * x)) / 2

    if approximate:
        return _elementwise("gelu", forward_tanh, lambda slope: slope)
    return _elementwise("gelu(approximate=False)", forward_exact, lambda slope: slope)


def _elementwise(name, function, slope):
    """A layer without parameters: y, cache = function(x) and dx = slope(cache) dy."""

    def init(key, shape):
        del key
        return (), require_shape(name, shape)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        return function(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_delta(name, dy, cache.shape)
        return slope(cache) * dy, ()

    return Layer(name, init, forward, backward)
