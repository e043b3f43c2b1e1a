"""Elementwise layers of any function: y = f(x), dx = f'(x) dy, and the forms that they share.

A layer is `pointwise` if its derivative is a function of what the next layer keeps anyway, the
output, or of the input. Otherwise it is `keeping_slope`: the cache is the derivative itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbp.require import require_delta, require_floats, require_function, require_shape
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, show_shape, widened

__all__ = ["elementwise"]


def elementwise(
    function: Callable[[jax.Array], jax.Array],
    derivative: Callable[[jax.Array], jax.Array],
    *,
    name: str = "elementwise",
) -> Layer:
    """A layer of your own formula, y = f(x) for each value alone. dx = f'(x) dy.

    Both functions get the inputs [N, ...] and return an array of their shape and dtype. The cache
    is f'(x), so that the backward pass is one product. Nothing tells whether f' is the derivative
    of f, or whether f looks at one value at a time: `bp.check` does.

    Args:
      function: f.
      derivative: f', as a function of x too.
      name: the name of the layer in messages and tables.

    Raises:
      TypeError: one of the two is not a function.
      LayerError: what one of them returns is not an array like the inputs.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> sine = bp.elementwise(jnp.sin, jnp.cos, name="sine")
      >>> bp.check(sine, jax.random.key(0), (4,)).ok
      True
      >>> bp.check(bp.elementwise(jnp.sin, jnp.sin), jax.random.key(0), (4,)).ok
      False
    """
    require_function("elementwise", "function", function)
    require_function("elementwise", "derivative", derivative)

    def values(which, f, x):
        y = f(x)
        shape, dtype = jnp.shape(y), getattr(y, "dtype", type(y).__name__)
        if (shape, dtype) != (x.shape, x.dtype):
            raise LayerError(
                name,
                f"has a {which} that returns {dtype} {show_shape(shape)} for inputs {x.dtype} "
                f"{show_shape(x.shape)}; it has to keep the shape and the dtype.",
            )
        return y

    def forward(x):
        return values("function", function, x), values("derivative", derivative, x)

    return pointwise(name, forward, lambda slope, dy: slope * dy)


def pointwise(
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


def keeping_slope(name: str, function: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> Layer:
    """A layer without parameters: y, slope = function(x), computed in at least 32 bits."""

    def forward(x):
        y, slope = function(widened(x))
        return y.astype(x.dtype), slope.astype(x.dtype)

    return pointwise(name, forward, lambda slope, dy: slope * dy)


def vanishing(x: jax.Array, p: jax.Array) -> jax.Array:
    """The product x p for a p(x) that falls to zero faster than x grows: 0 times infinity is 0."""
    return jnp.where(p == 0, 0, x * p)
