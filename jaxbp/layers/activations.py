"""Activations: elementwise layers without parameters, each with its derivative.

If the derivative is a function of the output (sigmoid, tanh, relu, leaky_relu, elu, softplus), the
cache is the output. The next layer keeps it as its input anyway, so it costs no memory. Where the
output saturates, as sigmoid does near 1, the derivative has the rounding error of the output.
Otherwise (gelu, silu) the cache is the derivative itself. The forward pass computes it while the
exponentials are at hand, so that the backward pass is one product; it has the size of the input.

Outputs and derivatives are finite wherever their limits are, also at infinite inputs.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbp.require import require_delta, require_floats, require_positive, require_shape
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, widened

__all__ = ["elu", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus", "tanh"]


def sigmoid() -> Layer:
    """The logistic function, y = 1 / (1 + e^-x), elementwise. dx = y (1 - y) dy."""

    def forward(x):
        y = jax.nn.sigmoid(x)
        return y, y

    return _elementwise("sigmoid", forward, lambda y, dy: y * (1 - y) * dy)


def tanh() -> Layer:
    """The hyperbolic tangent, elementwise. dx = (1 - y^2) dy."""

    def forward(x):
        y = jnp.tanh(x)
        return y, y

    return _elementwise("tanh", forward, lambda y, dy: (1 - y) * (1 + y) * dy)


def relu() -> Layer:
    """The rectifier, y = max(x, 0), elementwise. dx = dy where y > 0, else 0 (at x = 0 too)."""

    def forward(x):
        # XLA would recompute jnp.maximum(x, 0) in the backward pass, and keep x for it beside y.
        y = jnp.where(x <= 0, 0, x)
        return y, y

    return _elementwise("relu", forward, lambda y, dy: jnp.where(y > 0, dy, 0))


def leaky_relu(negative_slope: float = 0.01) -> Layer:
    """The leaky rectifier, elementwise: y = x where x >= 0, else `negative_slope` x.

    dx = dy where x >= 0, else `negative_slope` dy (at x = -0 too).

    Args:
      negative_slope: positive, so that y has the sign of x, and the cache can be y.

    Raises:
      ValueError: `negative_slope` is not positive.

    References:
      "Rectifier Nonlinearities Improve Neural Network Acoustic Models", Maas, Hannun, Ng, 2013.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, cache = bp.leaky_relu(0.5).forward((), jnp.array([[-2.0, 0.0, 2.0]]))
      >>> dx, _ = bp.leaky_relu(0.5).backward((), cache, jnp.ones((1, 3)))
      >>> y[0].tolist(), dx[0].tolist()
      ([-1.0, 0.0, 2.0], [0.5, 1.0, 1.0])
    """
    require_positive("leaky_relu", "negative_slope", negative_slope)

    def forward(x):
        y = jax.nn.leaky_relu(x, negative_slope)
        return y, y

    def backward(y, dy):
        # Not y < 0: if x is negative and tiny, y is rounded to -0.
        return jnp.where(jnp.signbit(y), negative_slope * dy, dy)

    return _elementwise(f"leaky_relu({negative_slope})", forward, backward)


def elu(alpha: float = 1.0) -> Layer:
    """The exponential linear unit, elementwise: y = x where x > 0, else alpha (e^x - 1).

    dx = dy where y > 0, else (y + alpha) dy.

    Args:
      alpha: positive; y never falls below -alpha.

    Raises:
      ValueError: `alpha` is not positive.

    References:
      "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)", Clevert,
      Unterthiner, Hochreiter, 2016.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.elu(2.0).forward((), jnp.array([[-jnp.inf, 0.0, 3.0]]))
      >>> y[0].tolist()
      [-2.0, 0.0, 3.0]
    """
    require_positive("elu", "alpha", alpha)

    def forward(x):
        y = jax.nn.elu(x, alpha)
        return y, y

    def backward(y, dy):
        return jnp.where(y > 0, dy, (y + alpha) * dy)

    return _elementwise(f"elu({alpha})", forward, backward)


def softplus() -> Layer:
    """The smooth rectifier, y = log(1 + e^x), elementwise. dx = (1 - e^-y) dy.

    References:
      "Incorporating Second-Order Functional Knowledge for Better Option Pricing", Dugas, Bengio,
      Belisle, Nadeau, Garcia, 2001.
    """

    def forward(x):
        y = jax.nn.softplus(x)
        return y, y

    return _elementwise("softplus", forward, lambda y, dy: -jnp.expm1(-y) * dy)


def silu() -> Layer:
    """The sigmoid linear unit (SiLU, swish), y = x s with s = 1 / (1 + e^-x), elementwise.

    dx = (s + y (1 - s)) dy.

    References:
      "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in Reinforcement
      Learning", Elfwing, Uchibe, Doya, 2018.
    """

    def forward(x):
        s = jax.nn.sigmoid(x)
        y = _times(x, s)
        return y, s + _times(y, 1 - s)

    return _keeping_slope("silu", forward)


def gelu(*, approximate: bool = True) -> Layer:
    """The Gaussian error linear unit, y = x P(x), elementwise. dx = (P(x) + x P'(x)) dy.

        exact          P(x) = (1 + erf(x / sqrt 2)) / 2    P'(x) = e^(-x^2 / 2) / sqrt(2 pi)
        approximate    P(x) = (1 + tanh(u(x))) / 2         P'(x) = 2 P(x) (1 - P(x)) u'(x)
                       with u(x) = sqrt(2 / pi) (x + 0.044715 x^3)

    Args:
      approximate: whether to use the approximation with tanh, as GPT-2 does, or the exact form.

    References:
      "Gaussian Error Linear Units (GELUs)", Hendrycks, Gimpel, 2016.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> x = jnp.array([[-1.0, 0.0, 1.0]])
      >>> exact, _ = bp.gelu(approximate=False).forward((), x)
      >>> [round(float(value), 4) for value in exact[0]]
      [-0.1587, 0.0, 0.8413]
    """

    def forward_exact(x):
        p = jax.scipy.special.erfc(-x * math.sqrt(0.5)) / 2  # 1 + erf would cancel on the left
        density = jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return _times(x, p), p + _times(x, density)

    def forward_tanh(x):
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = x * x
        p = jax.nn.sigmoid(2 * scale * x * (1 + cubic * square))  # 1 + tanh would cancel
        du = scale * (1 + 3 * cubic * square)
        return _times(x, p), p + _times(2 * x * du, p * (1 - p))

    if approximate:
        return _keeping_slope("gelu", forward_tanh)
    return _keeping_slope("gelu(approximate=False)", forward_exact)


def _times(x: jax.Array, p: jax.Array) -> jax.Array:
    """The product x p for a p that falls to zero faster than x grows: 0 times infinity is 0."""
    return jnp.where(p == 0, 0, x * p)


def _keeping_slope(
    name: str, function: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
) -> Layer:
    """A layer without parameters: y, slope = function(x), computed in at least 32 bits."""

    def forward(x):
        y, slope = function(widened(x))
        return y.astype(x.dtype), slope.astype(x.dtype)

    return _elementwise(name, forward, lambda slope, dy: slope * dy)


def _elementwise(
    name: str,
    function: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    transpose: Callable[[jax.Array, jax.Array], jax.Array],
) -> Layer:
    """A layer without parameters: y, cache = function(x), and dx = transpose(cache, dy)."""

    def init(key, shape):
        del key
        return (), require_shape(name, shape)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        return function(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_floats(name, cache, what="a cache")
        require_delta(name, dy, cache.shape)
        return transpose(cache, dy), ()

    return Layer(name, init, forward, backward)
