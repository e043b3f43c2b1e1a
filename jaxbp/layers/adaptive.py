"""Adaptive pooling: windows whose number is given, whatever the size of the inputs.

Each channel is treated separately. `global_pool` has one window, with all positions.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxbp.layers.axis_maps import across, along, rows_of
from jaxbp.require import (
    require_cache,
    require_delta,
    require_floats,
    require_positions,
    require_shape,
    require_shape_alone,
    require_sizes,
)
from jaxbp.signals.conv_products import summed
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, Shape, shape_alone, widened

__all__ = ["adaptive_pool", "global_pool"]


def adaptive_pool(sizes: tuple[int | None, ...], how: Literal["mean", "max"] = "mean") -> Layer:
    """Pools S positions to a given number S', by the mean or the maximum of each window.

        window t along an axis: floor(t S / S') <= u < ceil((t + 1) S / S'), of K_t positions

        mean    y_t = sum_u x_u / K_t      dx_u = sum of dy_t / K_t over the windows t that see u
        max     y_t = max_u x_u            dx_u = sum of dy_t over those whose maximum is x_u

    If S' divides S, windows lie side by side. Otherwise neighbours share positions, and if S' is
    larger than S, positions are repeated. Of equal maxima the first in memory gets all of dy.

    Inputs are [N, *S, O], outputs [N, *S', O]. Sums of 16-bit numbers are computed in 32 bits.

    Args:
      sizes: S', one for each axis of positions. None keeps the size of an axis.
      how: `mean` or `max`.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs do not fit.

    References:
      "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition", He, Zhang,
      Ren, Sun, 2014.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.adaptive_pool((2,)).forward((), jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1))
      >>> y.ravel().tolist()                             # both windows see the position between
      [2.0, 5.5]
    """
    sizes = require_sizes("adaptive_pool", sizes)
    _require_how("adaptive_pool", how)
    name = f"adaptive_pool({sizes})"

    def pooled(shape: Shape) -> list[tuple[int, int, int]]:
        """The axes that change, with S and S' of each, from the shape of one example."""
        require_positions(name, shape, len(sizes))
        pairs = enumerate(zip(shape[:-1], sizes, strict=True), 1)
        return [(axis, s, new) for axis, (s, new) in pairs if new is not None and new != s]

    def out_shape(shape: Shape) -> Shape:
        changed = {axis: new for axis, _, new in pooled(shape)}
        return tuple(changed.get(axis, size) for axis, size in enumerate(shape, 1))

    def init(key, shape):
        del key
        return (), out_shape(require_shape(name, shape))

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        y, winners = x if how == "max" else widened(x), []
        for axis, size, new in pooled(x.shape[1:]):
            windows = _windows(size, new)
            if how == "mean":
                y = along(y, axis, windows)
            else:
                y, winner = _maxima(y, axis, windows)
                winners.append(winner)
        return y.astype(x.dtype), (shape_alone(x), tuple(winners))

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_cache(name, cache, 2)
        n, *shape = require_shape_alone(name, cache[0])
        changed, winners = pooled(tuple(shape)), list(cache[1])
        require_delta(name, dy, (n, *out_shape(tuple(shape))))
        dx = widened(dy)
        for axis, size, new in reversed(changed):
            windows = _windows(size, new)
            if how == "mean":
                dx = along(dx, axis, windows.T)
            else:
                dx = _to_winners(dx, axis, windows, winners.pop())
        return dx.astype(dy.dtype), ()

    return Layer(name, init, forward, backward)


def global_pool(how: Literal["mean", "max"] = "mean") -> Layer:
    """Pools all T positions of an example to one, by the mean or the maximum of each channel.

        mean    y = sum_u x_u / T      dx_u = dy / T
        max     y = max_u x_u          dx_u = dy at the maximum (the first one, if several), else 0

    Inputs are [N, ..., O], outputs [N, O].

    Args:
      how: `mean` or `max`.

    Raises:
      ValueError: `how` is neither.
      LayerError: the inputs do not fit.

    References:
      "Network In Network", Lin, Chen, Yan, 2014.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.global_pool().init(jax.random.key(0), (7, 7, 16))[1]
      (16,)
    """
    name = "global_pool"
    _require_how(name, how)

    def init(key, shape):
        del key
        return (), (require_positions(name, require_shape(name, shape))[-1],)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        require_positions(name, x.shape[1:])
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        if how == "mean":
            return jnp.mean(widened(rows), axis=1).astype(x.dtype), (shape_alone(x), None)
        winner = jnp.argmax(rows, axis=1, keepdims=True)
        return jnp.take_along_axis(rows, winner, axis=1)[:, 0], (shape_alone(x), winner)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_cache(name, cache, 2)
        n, *positions, o = require_shape_alone(name, cache[0])
        winner = cache[1]
        require_delta(name, dy, (n, o))
        t = math.prod(positions)
        if winner is None:
            dx = jnp.broadcast_to(dy[:, None] / t, (n, t, o))
        else:
            dx = jnp.where(jnp.arange(t)[:, None] == winner, dy[:, None], 0)
        return dx.reshape(n, *positions, o), ()

    return Layer(name, init, forward, backward)


def _windows(size: int, new: int) -> NDArray[Any]:
    """The means over the windows of adaptive pooling as a matrix [S', S]."""
    t, u = np.arange(new)[:, None], np.arange(size)
    sees = (t * size // new <= u) & (u < -(-(t + 1) * size // new))
    return sees / np.sum(sees, axis=1, keepdims=True)


def _maxima(x: jax.Array, axis: int, windows: NDArray[Any]) -> tuple[jax.Array, jax.Array]:
    """The maximum of each window along an axis, and the position u of the first such input."""
    places, _ = rows_of(windows)
    seen = jnp.take(x, places, axis=axis, mode="clip")
    # A window with fewer places repeats its first one, which never wins by its second place.
    place = jnp.argmax(seen, axis=axis + 1, keepdims=True)
    y = jnp.take_along_axis(seen, place, axis=axis + 1).squeeze(axis + 1)
    return y, place.squeeze(axis + 1) + across(places[:, 0], x.ndim, axis)


def _to_winners(dy: jax.Array, axis: int, windows: NDArray[Any], winner: jax.Array) -> jax.Array:
    """Sums for each position u the dy_t of the windows whose maximum it is."""
    by_place, weights = rows_of(windows.T)  # for each u the windows that see it
    here = across(np.arange(len(by_place)), dy.ndim, axis)

    def parts():
        for t, weight in zip(by_place.T, weights.T, strict=True):
            wins = jnp.take(winner, t, axis=axis, mode="clip") == here
            part = jnp.take(dy, t, axis=axis, mode="clip")
            yield jnp.where(wins & across(weight != 0, dy.ndim, axis), part, 0)

    return summed(parts(), dy.dtype)


def _require_how(name: str, how: Any) -> None:
    if how not in ("mean", "max"):
        raise ValueError(f"{name}: how is {how!r}; it takes 'mean' or 'max'.")
