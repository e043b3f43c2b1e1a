"""Axis maps: constant linear maps along one axis of positions, with few nonzero weights per output.

    y_t = sum_u M_tu x_u           dx_u = sum_t M_tu dy_t

M is a NumPy matrix [S', S], known when the layer is traced. The derivative is the same map with M
transposed. A product with the whole matrix would multiply by its zeros, which takes time and makes
one infinite input nan everywhere. So each output gathers the inputs of its nonzero weights: 2 for
linear interpolation, 4 for cubic.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxbp.signals.conv_products import summed


def along(x: jax.Array, axis: int, matrix: NDArray[Any]) -> jax.Array:
    """The map of a matrix [S', S] along an axis of x that has S entries; it then has S'.

    Times on a CPU for 16 x 64 x 64 x 3 to twice its size and back by linear interpolation, with 2
    weights for each output: 3 ms by one gather for each weight, 17 by one for all, 15 by products
    with the matrix. Many weights would be many gathers to compile.
    """
    places, weights = rows_of(matrix)

    def products(place, weight):
        """The products with one weight of each output, [S'], or with all of them, [S', K]."""
        seen = jnp.take(x, place, axis=axis, mode="clip")
        weight = across(weight, seen.ndim, axis)
        return jnp.where(weight != 0, seen * weight.astype(x.dtype), 0)  # 0 times infinity is nan

    if places.shape[1] > 8:
        return jnp.sum(products(places, weights), axis=axis + 1)
    return summed(map(products, places.T, weights.T), x.dtype)


def rows_of(matrix: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The places of the nonzero weights of each row, and the weights, both [S', K].

    K is the largest number of them in any row. Rows with fewer repeat their first place, with
    weights of zero.
    """
    is_weight = matrix != 0
    count = max(1, is_weight.sum(axis=1).max())
    places = np.argsort(~is_weight, axis=1, kind="stable")[:, :count]
    weights = np.take_along_axis(matrix, places, axis=1)
    return np.where(weights != 0, places, places[:, :1]), weights


def across(array: NDArray[Any], ndim: int, axis: int) -> NDArray[Any]:
    """Gives an array more axes of size 1, `ndim` in all, so that its first one is `axis`."""
    return array.reshape([1] * axis + [*array.shape] + [1] * (ndim - axis - array.ndim))
