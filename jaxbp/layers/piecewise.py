"""Piecewise activations: elementwise layers that are straight lines (or a parabola) between kinks.

At a kink the derivative is that of one side; each docstring says which. If the output tells the
piece, the cache is the output. The next layer keeps it as its input anyway, so it costs no memory.
Otherwise the cache is the derivative itself.
"""

import jax.numpy as jnp

from jaxbp.layers.pointwise import keeping_slope, pointwise
from jaxbp.require import require_nonzero, require_number
from jaxbp.types import Layer

__all__ = [
    "hard_shrink",
    "hard_sigmoid",
    "hard_tanh",
    "hardswish",
    "leaky_relu",
    "relu",
    "relu6",
    "soft_shrink",
    "threshold",
]


def relu() -> Layer:
    """The rectifier, y = max(x, 0), elementwise. dx = dy where y > 0, else 0 (at x = 0 too)."""

    def forward(x):
        # XLA would recompute jnp.maximum(x, 0) in the backward pass, and keep x for it beside y.
        y = jnp.where(x <= 0, 0, x)
        return y, y

    return pointwise("relu", forward, lambda y, dy: jnp.where(y > 0, dy, 0))


def leaky_relu(negative_slope: float = 0.01) -> Layer:
    """The leaky rectifier, elementwise: y = x where x >= 0, else `negative_slope` x.

    dx = dy where x >= 0, else `negative_slope` dy (at x = -0 too).

    Args:
      negative_slope: if it is positive, y has the sign of x, and the cache is y; otherwise x. The
        absolute value is `leaky_relu(-1)`.

    Raises:
      ValueError: `negative_slope` is zero (that is `relu()`) or not finite.

    References:
      "Rectifier Nonlinearities Improve Neural Network Acoustic Models", Maas, Hannun, Ng, 2013.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, cache = bp.leaky_relu(0.5).forward((), jnp.array([[-2.0, 0.0, 2.0]]))
      >>> dx, _ = bp.leaky_relu(0.5).backward((), cache, jnp.ones((1, 3)))
      >>> y[0].tolist(), dx[0].tolist()
      ([-1.0, 0.0, 2.0], [0.5, 1.0, 1.0])
    """
    negative_slope = require_nonzero("leaky_relu", "negative_slope", negative_slope)

    def forward(x):
        y = jnp.where(x >= 0, x, negative_slope * x)
        return y, y if negative_slope > 0 else x

    def backward(signed, dy):
        # Not y < 0: if x is negative and tiny, y is rounded to -0.
        return jnp.where(jnp.signbit(signed), negative_slope * dy, dy)

    return pointwise(f"leaky_relu({negative_slope})", forward, backward)


def relu6() -> Layer:
    """The rectifier up to 6, y = min(max(x, 0), 6), elementwise.

    dx = dy where 0 < x < 6, else 0 (at both kinks too).

    References:
      "Convolutional Deep Belief Networks on CIFAR-10", Krizhevsky, 2010.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.relu6().forward((), jnp.array([[-1.0, 5.0, 7.0]]))
      >>> y[0].tolist()
      [0.0, 5.0, 6.0]
    """
    return _clipped("relu6", 0, 6)


def hard_tanh(low: float = -1.0, high: float = 1.0) -> Layer:
    """The identity between two bounds, y = min(max(x, low), high), elementwise.

    dx = dy where low < x < high, else 0 (at both kinks too).

    Args:
      low: the smallest output.
      high: the largest output.

    Raises:
      ValueError: a bound is not finite, or `low` is not below `high`.

    References:
      "Large Scale Machine Learning", Collobert, 2004.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, cache = bp.hard_tanh().forward((), jnp.array([[-2.0, 0.5, 1.0]]))
      >>> y[0].tolist(), bp.hard_tanh().backward((), cache, jnp.ones((1, 3)))[0][0].tolist()
      ([-1.0, 0.5, 1.0], [0.0, 1.0, 0.0])
    """
    low = require_number("hard_tanh", "low", low)
    high = require_number("hard_tanh", "high", high)
    if not low < high:
        raise ValueError(f"hard_tanh: low is {low} and high is {high}; low has to be smaller.")
    return _clipped(f"hard_tanh({low}, {high})", low, high)


def _clipped(name, low, high):
    """The identity between two bounds; at the bounds the derivative is 0."""

    def forward(x):
        y = jnp.where(x <= low, low, jnp.where(x >= high, high, x))
        return y, y

    return pointwise(name, forward, lambda y, dy: jnp.where((y > low) & (y < high), dy, 0))


def hard_sigmoid() -> Layer:
    """A sigmoid of three lines, y = min(max(x + 3, 0), 6) / 6, elementwise.

    dx = dy / 6 where -3 < x < 3, else 0 (at both kinks too).

    References:
      "Searching for MobileNetV3", Howard et al., 2019.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.hard_sigmoid().forward((), jnp.array([[-4.0, 0.0, 1.5, 4.0]]))
      >>> y[0].tolist()
      [0.0, 0.5, 0.75, 1.0]
    """

    def forward(x):
        y = jnp.where(x <= -3, 0, jnp.where(x >= 3, 1, (x + 3) / 6))
        # Not from y: just below x = 3 it is rounded to 1.
        return y, jnp.where((x > -3) & (x < 3), 1 / 6, jnp.zeros_like(x))

    return keeping_slope("hard_sigmoid", forward)


def hardswish() -> Layer:
    """The input gated by `hard_sigmoid`, y = x min(max(x + 3, 0), 6) / 6, elementwise.

        x <= -3        y = 0                dx = 0
        -3 < x < 3     y = x (x + 3) / 6    dx = (2 x + 3) / 6 dy
        x >= 3         y = x                dx = dy

    References:
      "Searching for MobileNetV3", Howard et al., 2019.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.hardswish().forward((), jnp.array([[-4.0, 0.0, 1.0, 4.0]]))
      >>> [round(float(value), 4) for value in y[0]]
      [0.0, 0.0, 0.6667, 4.0]
    """

    def forward(x):
        y = jnp.where(x <= -3, 0, jnp.where(x >= 3, x, x * ((x + 3) / 6)))
        return y, jnp.where(x <= -3, 0, jnp.where(x >= 3, 1, (2 * x + 3) / 6))

    return keeping_slope("hardswish", forward)


def hard_shrink(bound: float = 0.5) -> Layer:
    """Sets what is small to zero: y = x where |x| > bound, else 0, elementwise.

    dx = dy where |x| > bound, else 0 (at both kinks too).

    Args:
      bound: not negative.

    Raises:
      ValueError: `bound` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.hard_shrink().forward((), jnp.array([[-1.0, 0.5, 2.0]]))
      >>> y[0].tolist()
      [-1.0, 0.0, 2.0]
    """
    bound = require_number("hard_shrink", "bound", bound, least=0)

    def forward(x):
        y = jnp.where(jnp.abs(x) <= bound, 0, x)
        return y, y

    return pointwise(f"hard_shrink({bound})", forward, lambda y, dy: jnp.where(y != 0, dy, 0))


def soft_shrink(bound: float = 0.5) -> Layer:
    """Soft thresholding: what is small becomes zero, the rest moves towards zero by `bound`.

        |x| <= bound    y = 0                    dx = 0
        |x| > bound     y = x - sign(x) bound    dx = dy

    Args:
      bound: not negative.

    Raises:
      ValueError: `bound` is negative or not finite.

    References:
      "De-Noising by Soft-Thresholding", Donoho, 1995.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.soft_shrink().forward((), jnp.array([[-1.0, 0.5, 2.0]]))
      >>> y[0].tolist()
      [-0.5, 0.0, 1.5]
    """
    bound = require_number("soft_shrink", "bound", bound, least=0)

    def forward(x):
        y = jnp.where(jnp.abs(x) <= bound, 0, x - jnp.sign(x) * bound)
        return y, y

    return pointwise(f"soft_shrink({bound})", forward, lambda y, dy: jnp.where(y != 0, dy, 0))


def threshold(bound: float, value: float = 0.0) -> Layer:
    """The identity above a bound: y = x where x > bound, else `value`, elementwise.

    dx = dy where x > bound, else 0 (at x = bound too).

    Args:
      bound: the largest x that is replaced.
      value: what it is replaced by.

    Raises:
      ValueError: an argument is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.threshold(1.0, -5.0).forward((), jnp.array([[0.0, 1.0, 2.0]]))
      >>> y[0].tolist()
      [-5.0, -5.0, 2.0]
    """
    bound = require_number("threshold", "bound", bound)
    value = require_number("threshold", "value", value)

    def forward(x):
        low = x <= bound
        return jnp.where(low, value, x), jnp.where(low, 0, jnp.ones_like(x))

    return keeping_slope(f"threshold({bound}, {value})", forward)
