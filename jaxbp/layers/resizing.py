"""Resizing: images of another size, by repeating positions or by interpolation between them.

Each channel and each axis of positions is treated separately. Output t of S' lies at

    u = (t + 1/2) S / S' - 1/2        in general: pixels are areas, and the outer edges coincide
    u = t (S - 1) / (S' - 1)          if `align_corners`: the centres of the outer pixels coincide

among the S inputs, and y is a weighted sum of the inputs around it:

    nearest    the input at floor(u + 1/2)
    linear     the 2 inputs around u, each weighted by 1 - |distance|
    cubic      the 4 inputs around u, by Keys's cubic with a = -3/4

Beyond the edge, the input at the edge is repeated. The weights of an axis are a constant matrix
[S', S], and dx is the product of dy with its transpose. There is no low-pass filter: to make images
smaller without aliasing, use `avg_pool` or `adaptive_pool`.

These are the conventions of PyTorch's `interpolate` (its `nearest` is here for whole factors, its
`nearest-exact` for all sizes).
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxbp.layers.axis_maps import along
from jaxbp.require import (
    require_count,
    require_delta,
    require_floats,
    require_positions,
    require_shape,
    require_shape_alone,
    require_sizes,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, Shape, shape_alone, widened

__all__ = ["resize", "upsample"]

Method = Literal["nearest", "linear", "cubic"]


def resize(
    sizes: tuple[int | None, ...], *, method: Method = "linear", align_corners: bool = False
) -> Layer:
    """Resizes images to S' positions by interpolation, y_t = sum_u M_tu x_u along each axis.

        dx_u = sum_t M_tu dy_t

    M [S', S] holds the weights of the method (see `layers.resizing`): two in each row for `linear`,
    which is bilinear for two axes, and four for `cubic`.

    Inputs are [N, *S, O], outputs [N, *S', O]. Sums of 16-bit numbers are computed in 32 bits.

    Args:
      sizes: S', one for each axis of positions. None keeps the size of an axis.
      method: `nearest`, `linear` or `cubic`.
      align_corners: whether the centres of the first and the last pixel of inputs and outputs
        coincide, not the edges of the images. For `linear` and `cubic`.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs do not fit.

    References:
      "Cubic Convolution Interpolation for Digital Image Processing", Keys, 1981.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> x = jnp.array([1.0, 5.0]).reshape(1, 2, 1)
      >>> bp.resize((4,)).forward((), x)[0].ravel().tolist()
      [1.0, 2.0, 4.0, 5.0]
      >>> bp.resize((3,), align_corners=True).forward((), x)[0].ravel().tolist()
      [1.0, 3.0, 5.0]
    """
    sizes = require_sizes("resize", sizes)
    _require_method("resize", method, align_corners)
    name = f"resize({sizes})"

    def new_sizes(shape):
        require_positions(name, shape, len(sizes))
        return tuple(s if new is None else new for s, new in zip(shape[:-1], sizes, strict=True))

    return _interpolating(name, new_sizes, method, align_corners)


def upsample(
    factor: int | tuple[int, ...], *, method: Method = "nearest", align_corners: bool = False
) -> Layer:
    """Makes images f times as large, by repeating each position or by interpolation.

        nearest          y_u = x_t, t = floor(u / f)    dx_t = sum of dy_u over the copies u of t
        linear, cubic    as `resize` to S' = f S

    Inputs are [N, *S, O], outputs [N, *f S, O]. `upsample` followed by `conv` makes images larger
    without the checkerboard patterns of `conv_transpose`.

    Args:
      factor: f, one for all axes or a tuple with one for each axis.
      method: `nearest`, `linear` or `cubic`.
      align_corners: as in `resize`.

    Raises:
      ValueError: `factor` is neither a positive integer nor a tuple of positive integers, or
        another argument is out of range.
      LayerError: the inputs do not fit.

    References:
      "Deconvolution and Checkerboard Artifacts", Odena, Dumoulin, Olah, 2016.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.upsample(2).forward((), jnp.array([1.0, 2.0]).reshape(1, 2, 1))
      >>> y.ravel().tolist()
      [1.0, 1.0, 2.0, 2.0]
    """
    if isinstance(factor, tuple) and factor:
        factor = tuple(require_count("upsample", "factor", f) for f in factor)
    else:
        factor = require_count("upsample", "factor", factor)
    _require_method("upsample", method, align_corners)
    name = f"upsample({factor})"

    def factors(shape):
        if isinstance(factor, tuple):
            require_positions(name, shape, len(factor))
            return factor
        require_positions(name, shape)
        return (factor,) * (len(shape) - 1)

    def new_sizes(shape):
        return tuple(s * f for s, f in zip(shape[:-1], factors(shape), strict=True))

    if method != "nearest":
        return _interpolating(name, new_sizes, method, align_corners)

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        return (), (*new_sizes(shape), shape[-1])

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        y = x
        for axis, f in enumerate(factors(x.shape[1:]), 1):
            y = jnp.repeat(y, f, axis=axis)
        return y, shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        n, *sizes, o = require_shape_alone(name, cache)
        pairs = list(zip(sizes, factors((*sizes, o)), strict=True))
        require_delta(name, dy, (n, *(size * f for size, f in pairs), o))
        copies = widened(dy).reshape(n, *(part for pair in pairs for part in pair), o)
        return jnp.sum(copies, axis=range(2, copies.ndim - 1, 2)).astype(dy.dtype), ()

    return Layer(name, init, forward, backward)


def _interpolating(
    name: str, new_sizes: Callable[[Shape], Shape], method: Method, align_corners: bool
) -> Layer:
    """A layer that resizes images; `new_sizes` gives S' from the shape of one example."""

    def mapped(x, sizes, new, *, transpose=False):
        """Maps x along all axes of positions that change size, in at least 32 bits."""
        y = widened(x)
        for axis, pair in enumerate(zip(sizes, new, strict=True), 1):
            if pair[0] != pair[1]:
                matrix = _weights(*pair, method, align_corners)
                y = along(y, axis, matrix.T if transpose else matrix)
        return y.astype(x.dtype)

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        return (), (*new_sizes(shape), shape[-1])

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        return mapped(x, x.shape[1:-1], new_sizes(x.shape[1:])), shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        n, *sizes, o = require_shape_alone(name, cache)
        new = new_sizes((*sizes, o))
        require_delta(name, dy, (n, *new, o))
        return mapped(dy, sizes, new, transpose=True), ()

    return Layer(name, init, forward, backward)


def _weights(size: int, new: int, method: Method, align_corners: bool) -> NDArray[np.float64]:
    """The matrix [S', S] of an axis that is resized from S to S'."""
    t = np.arange(new)
    # Products before quotients: where u + 1/2 is an integer, it comes out as one.
    u = t * (size - 1) / max(new - 1, 1) if align_corners else (t + 0.5) * size / new - 0.5
    if method == "nearest":
        around = np.floor(u + 0.5)[:, None]
        weights = np.ones_like(around)
    else:
        reach = {"linear": 1, "cubic": 2}[method]
        around = np.floor(u)[:, None] + np.arange(1 - reach, 1 + reach)
        distance = np.abs(around - u[:, None])
        weights = 1 - distance if method == "linear" else _keys_cubic(distance)
    matrix = np.zeros((new, size))
    at_edge = np.clip(around.astype(int), 0, size - 1)
    np.add.at(matrix, (t[:, None], at_edge), weights)
    return matrix


def _keys_cubic(distance: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
    """The weights of inputs at distances up to 2, by piecewise cubics with slope a at 1."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


def _require_method(name: str, method: Any, align_corners: bool) -> None:
    """Raises unless there is such a method, and it can align corners if it should."""
    if method not in ("nearest", "linear", "cubic"):
        raise ValueError(f"{name}: method is {method!r}; it takes 'nearest', 'linear' or 'cubic'.")
    if align_corners and method == "nearest":
        raise ValueError(
            f"{name}: align_corners is {align_corners}, and the method 'nearest'; it takes the "
            "method 'linear' or 'cubic' to align corners."
        )
