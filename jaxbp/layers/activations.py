"""Smooth activations: elementwise layers without parameters, each with its derivative.

If the derivative is a function of the output (sigmoid, tanh, log_sigmoid, softplus, elu, celu,
selu), the cache is the output. The next layer keeps it as its input anyway, so it costs no memory.
Where the output saturates, as sigmoid does near 1, the derivative has the rounding error of the
output. Otherwise (silu, mish, gelu, softsign, tanh_shrink) the cache is the derivative itself. The
forward pass computes it while the exponentials are at hand, so that the backward pass is one
product; it has the size of the input.

Outputs and derivatives are finite wherever their limits are, also at infinite inputs.
"""

import math

import jax
import jax.numpy as jnp

from jaxbp.layers.pointwise import keeping_slope, pointwise, vanishing
from jaxbp.require import require_nonzero, require_number, require_positive
from jaxbp.types import Layer, widened

__all__ = [
    "celu",
    "elu",
    "gelu",
    "log_sigmoid",
    "mish",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softsign",
    "tanh",
    "tanh_shrink",
]


def sigmoid() -> Layer:
    """The logistic function, y = 1 / (1 + e^-x), elementwise. dx = y (1 - y) dy."""

    def forward(x):
        y = jax.nn.sigmoid(x)
        return y, y

    return pointwise("sigmoid", forward, lambda y, dy: y * (1 - y) * dy)


def tanh() -> Layer:
    """The hyperbolic tangent, elementwise. dx = (1 - y^2) dy."""

    def forward(x):
        y = jnp.tanh(x)
        return y, y

    return pointwise("tanh", forward, lambda y, dy: (1 - y) * (1 + y) * dy)


def log_sigmoid() -> Layer:
    """The logarithm of the logistic function, y = -log(1 + e^-x), elementwise. dx = (1 - e^y) dy.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.log_sigmoid().forward((), jnp.array([[-1000.0, 1000.0]]))
      >>> y[0].tolist()
      [-1000.0, -0.0]
    """

    def forward(x):
        y = -jax.nn.softplus(-x)
        return y, y

    return pointwise("log_sigmoid", forward, lambda y, dy: -jnp.expm1(y) * dy)


def softplus(beta: float = 1.0) -> Layer:
    """The smooth rectifier, y = log(1 + e^(beta x)) / beta, elementwise. dx = (1 - e^(-beta y)) dy.

    Args:
      beta: positive; the larger it is, the closer y is to max(x, 0).

    Raises:
      ValueError: `beta` is not a positive number, or infinite.

    References:
      "Incorporating Second-Order Functional Knowledge for Better Option Pricing", Dugas, Bengio,
      Belisle, Nadeau, Garcia, 2001.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> x = jnp.array([[-1.0, 0.0, 1.0]])
      >>> y, _ = bp.softplus(10.0).forward((), x)
      >>> [round(float(value), 2) for value in y[0]]
      [0.0, 0.07, 1.0]
    """
    require_positive("softplus", "beta", beta)
    beta = require_number("softplus", "beta", beta)

    def forward(x):
        if beta == 1:
            y = jax.nn.softplus(x)
        else:
            # log(1 + e^z) = z + log(1 + e^-z), with the z of the right half as x: beta x overflows.
            z = beta * jnp.where(x > 0, -x, x)
            y = jnp.where(x > 0, x, 0) + jax.nn.softplus(z) / beta
        return y, y

    name = "softplus" if beta == 1 else f"softplus({beta})"
    return pointwise(name, forward, lambda y, dy: -jnp.expm1(-beta * y) * dy)


def elu(alpha: float = 1.0) -> Layer:
    """The exponential linear unit, elementwise: y = x where x > 0, else alpha (e^x - 1).

    dx = dy where x > 0, else alpha e^x dy = (y + alpha) dy.

    Args:
      alpha: the limit of y far left is -alpha. With a negative alpha, y does not tell the sign of
        x, and the cache is the derivative.

    Raises:
      ValueError: `alpha` is zero (that is `relu()`) or not finite.

    References:
      "Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs)", Clevert,
      Unterthiner, Hochreiter, 2016.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.elu(2.0).forward((), jnp.array([[-jnp.inf, 0.0, 3.0]]))
      >>> y[0].tolist()
      [-2.0, 0.0, 3.0]
    """
    alpha = require_nonzero("elu", "alpha", alpha)
    name = f"elu({alpha})"

    def forward(x):
        y = jax.nn.elu(x, alpha)
        return y, y

    def forward_with_slope(x):
        rest = alpha * jnp.exp(jnp.where(x > 0, 0, x))
        return jax.nn.elu(x, alpha), jnp.where(x > 0, 1, rest)

    if alpha < 0:
        return keeping_slope(name, forward_with_slope)
    return pointwise(name, forward, lambda y, dy: jnp.where(y > 0, dy, (y + alpha) * dy))


def celu(alpha: float = 1.0) -> Layer:
    """The continuously differentiable elu: y = x where x > 0, else alpha (e^(x / alpha) - 1).

    dx = dy where y > 0, else e^(x / alpha) dy = (1 + y / alpha) dy.

    Args:
      alpha: the limit of y far left is -alpha, if it is positive.

    Raises:
      ValueError: `alpha` is zero or not finite.

    References:
      "Continuously Differentiable Exponential Linear Units", Barron, 2017.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.celu(2.0).forward((), jnp.array([[-jnp.inf, 0.0, 3.0]]))
      >>> y[0].tolist()
      [-2.0, 0.0, 3.0]
    """
    alpha = require_nonzero("celu", "alpha", alpha)

    def forward(x):
        left = jnp.where(x > 0, 0, x)
        y = jnp.where(x > 0, x, alpha * jnp.expm1(left / alpha))
        return y, y

    def backward(y, dy):
        return jnp.where(y > 0, dy, (1 + y / alpha) * dy)

    return pointwise(f"celu({alpha})", forward, backward)


def selu() -> Layer:
    """The self-normalising elu, y = s x where x > 0, else s alpha (e^x - 1), elementwise.

    dx = s dy where y > 0, else (y + s alpha) dy. With s = 1.0507 and alpha = 1.6733, layers of
    normally distributed weights of variance 1 / I keep the mean 0 and the variance 1.

    References:
      "Self-Normalizing Neural Networks", Klambauer, Unterthiner, Mayr, Hochreiter, 2017.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.selu().forward((), jnp.array([[-jnp.inf, 0.0, 1.0]]))
      >>> [round(float(value), 4) for value in y[0]]
      [-1.7581, 0.0, 1.0507]
    """
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

    def forward(x):
        y = (scale * jax.nn.elu(widened(x), alpha)).astype(x.dtype)
        return y, y

    def backward(y, dy):
        return jnp.where(y > 0, scale * dy, (y + scale * alpha) * dy)

    return pointwise("selu", forward, backward)


def silu() -> Layer:
    """The sigmoid linear unit (SiLU, swish), y = x s with s = 1 / (1 + e^-x), elementwise.

    dx = (s + y (1 - s)) dy.

    References:
      "Sigmoid-Weighted Linear Units for Neural Network Function Approximation in Reinforcement
      Learning", Elfwing, Uchibe, Doya, 2018.
    """

    def forward(x):
        s = jax.nn.sigmoid(x)
        y = vanishing(x, s)
        return y, s + vanishing(y, 1 - s)

    return keeping_slope("silu", forward)


def mish() -> Layer:
    """The self-gated unit y = x t with t = tanh(log(1 + e^x)), elementwise.

    dx = (t + x (1 - t^2) / (1 + e^-x)) dy.

    References:
      "Mish: A Self Regularized Non-Monotonic Activation Function", Misra, 2020.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.mish().forward((), jnp.array([[-jnp.inf, 0.0, 1.0]]))
      >>> [round(float(value), 4) for value in y[0]]
      [0.0, 0.0, 0.8651]
    """

    def forward(x):
        t = jnp.tanh(jax.nn.softplus(x))
        return vanishing(x, t), t + vanishing(x, (1 - t) * (1 + t) * jax.nn.sigmoid(x))

    return keeping_slope("mish", forward)


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
        return vanishing(x, p), p + vanishing(x, density)

    def forward_tanh(x):
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = x * x
        p = jax.nn.sigmoid(2 * scale * x * (1 + cubic * square))  # 1 + tanh would cancel
        du = scale * (1 + 3 * cubic * square)
        return vanishing(x, p), p + vanishing(2 * x * du, p * (1 - p))

    if approximate:
        return keeping_slope("gelu", forward_tanh)
    return keeping_slope("gelu(approximate=False)", forward_exact)


def softsign() -> Layer:
    """A sigmoid that saturates slowly, y = x / (1 + |x|), elementwise. dx = dy / (1 + |x|)^2.

    References:
      "Quadratic Polynomials Learn Better Image Features", Bergstra, Desjardins, Lamblin, Bengio,
      2009.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.softsign().forward((), jnp.array([[-jnp.inf, -1.0, 3.0]]))
      >>> y[0].tolist()
      [-1.0, -0.5, 0.75]
    """

    def forward(x):
        size = 1 + jnp.abs(x)
        slope = 1 / size
        return jnp.where(jnp.isinf(x), jnp.sign(x), x / size), slope * slope

    return keeping_slope("softsign", forward)


def tanh_shrink() -> Layer:
    """What the hyperbolic tangent leaves, y = x - tanh x, elementwise. dx = tanh(x)^2 dy.

    The difference would cancel near zero. There y = x q / (1 + q), where tanh x = x / (1 + q) is
    Lambert's continued fraction, q = x^2 / (3 + x^2 / (5 + ...)).

    References:
      "Memoire sur quelques proprietes remarquables des quantites transcendentes circulaires et
      logarithmiques", Lambert, 1761.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.tanh_shrink().forward((), jnp.array([[0.003]]))
      >>> round(float(y[0, 0]) / 0.003**3, 4)
      0.3333
    """

    def forward(x):
        t = jnp.tanh(x)
        near = jnp.abs(x) < 1
        square = jnp.square(jnp.where(near, x, 0))
        q = jnp.zeros_like(x)
        for odd in range(19, 1, -2):
            q = square / (odd + q)
        return jnp.where(near, x * q / (1 + q), x - t), t * t

    return keeping_slope("tanh_shrink", forward)
