"""Pooling: fewer positions, or more, without anything to learn.

Each of these maps every channel by itself. Windows lie as those of a convolution do (`windows`): an
output at t sees the inputs at u = s t + k - p. What is added as padding is never an input: it wins
no maximum and counts in no mean.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np

from jaxbp.require import require_count, require_delta, require_floats, require_shape
from jaxbp.signals.conv_products import placed, summed, taps
from jaxbp.signals.conv_windows import make_windows
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, show_shape, widened


def max_pool(window, *, strides=None, padding="VALID"):
    """The largest of what each window sees, y_t = max_k x_u; dy goes back to where it was.

      dx_u = sum of dy_t over the t of which u is the winner

    Of several inputs that are equal and largest the first is the winner, in the order in which the
    positions are stored: it gets all of dy. An input that is not a number wins.

    Inputs are [N, *S, O] and outputs [N, *S', O], with S' as of `conv`.

    Args:
      window: K, a tuple of as many sizes as there are axes of positions: (2, 2) for images.
      strides: s, for all axes or for each; the size of the window if none are given.
      padding: `SAME`, `VALID`, or a pair for each axis, less than the window.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs do not fit, or the window is larger than they are.

    References:
      "Hierarchical Models of Object Recognition in Cortex", Riesenhuber, Poggio, 1999.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.max_pool((2,))
      >>> y, cache = layer.forward((), jnp.array([1.0, 3.0, 2.0, 2.0]).reshape(1, 4, 1))
      >>> dx, _ = layer.backward((), cache, jnp.ones((1, 2, 1)))
      >>> y.ravel().tolist(), dx.ravel().tolist()
      ([3.0, 2.0], [0.0, 1.0, 1.0, 0.0])
    """
    windows = _windows("max_pool", window, strides, padding)
    number = jnp.uint8 if max(window) <= 256 else jnp.uint32

    def pool(x, geometry):
        # Where all are minus infinity, the winner is still an input and not the padding.
        pairs = zip(geometry.axes, x.shape[1:-1], strict=True)
        first = _of_places(geometry, [np.argmax(axis.sees(size), axis=1) for axis, size in pairs])
        best, winner = jnp.full((), -jnp.inf, x.dtype), jnp.asarray(first, number)
        for k, seen in enumerate(taps(x, geometry, fill=-np.inf)):
            better = (seen > best) | (seen != seen)
            best, winner = jnp.where(better, seen, best), jnp.where(better, number(k), winner)
        return best, winner

    def unpool(winner, dy, geometry, sizes):
        if _are_side_by_side(geometry):
            pairs = zip(geometry.kernel, sizes, strict=True)
            place = _of_places(geometry, [np.arange(size) % k for k, size in pairs])
            winner, dy = (_at_all_places(a, geometry, sizes) for a in (winner, dy))
            return jnp.where(winner == jnp.asarray(place, number), dy, 0)
        parts = [jnp.where(winner == number(k), dy, 0) for k in range(math.prod(geometry.kernel))]
        return summed(placed(parts, geometry, sizes), dy.dtype)

    return _pooling(windows, pool, unpool)


def avg_pool(window, *, strides=None, padding="VALID"):
    """The mean of what each window sees, y_t = sum_k x_u / K_t; each gets the same part of dy.

      dx_u = sum of dy_t / K_t over the t that see u

    K_t is the number of inputs that the window at t sees, without the padding. Inputs are
    [N, *S, O] and outputs [N, *S', O], with S' as of `conv`. Sums of numbers of 16 bits are taken
    in 32.

    Args:
      window: K, a tuple of as many sizes as there are axes of positions: (2, 2) for images.
      strides: s, for all axes or for each; the size of the window if none are given.
      padding: `SAME`, `VALID`, or a pair for each axis, less than the window.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs do not fit, or the window is larger than they are.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.avg_pool((2,), strides=1, padding="SAME")
      >>> y, _ = layer.forward((), jnp.array([1.0, 3.0, 2.0]).reshape(1, 3, 1))
      >>> y.ravel().tolist()                                    # the last sees but one
      [2.0, 2.5, 2.0]
    """
    windows = _windows("avg_pool", window, strides, padding)

    def pool(x, geometry):
        y = summed(taps(x, geometry), widened(x).dtype)
        return (y / inside(geometry, x.shape[1:-1], y.dtype)).astype(x.dtype), ()

    def unpool(kept, dy, geometry, sizes):
        del kept
        part = widened(dy) / inside(geometry, sizes, widened(dy).dtype)
        if _are_side_by_side(geometry):
            return _at_all_places(part.astype(dy.dtype), geometry, sizes)
        return summed(placed(part, geometry, sizes), dy.dtype)

    def inside(geometry, sizes, dtype):
        pairs = zip(geometry.axes, sizes, strict=True)
        counts = [np.sum(axis.sees(size), axis=1) for axis, size in pairs]
        return jnp.asarray(functools.reduce(np.multiply.outer, counts)[..., None], dtype)

    return _pooling(windows, pool, unpool)


def global_pool(how="mean"):
    """One vector of each example, over all of its positions: their mean, or the largest of each.

      mean    y = sum_u x_u / T      dx_u = dy / T
      max     y = max_u x_u          dx_u = dy where u is the winner, the first if there are several

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
    if how not in ("mean", "max"):
        raise ValueError(f"global_pool: how is {how!r}; it takes 'mean' or 'max'.")
    name = "global_pool"

    def init(key, shape):
        del key
        return (), (_require_positions(name, require_shape(name, shape))[-1],)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        _require_positions(name, x.shape[1:])
        rows = x.reshape(len(x), -1, x.shape[-1])
        if how == "mean":
            return jnp.mean(widened(rows), axis=1).astype(x.dtype), (x[:0], None)
        winner = jnp.argmax(rows, axis=1, keepdims=True)
        return jnp.take_along_axis(rows, winner, axis=1)[:, 0], (x[:0], winner)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        no_examples, winner = cache
        shape = no_examples.shape[1:]
        require_delta(name, dy, (len(dy), shape[-1]))
        t = math.prod(shape[:-1])
        if winner is None:
            dx = jnp.broadcast_to(dy[:, None] / t, (len(dy), t, shape[-1]))
        else:
            dx = jnp.where(jnp.arange(t)[:, None] == winner, dy[:, None], 0)
        return dx.reshape(len(dy), *shape), ()

    return Layer(name, init, forward, backward)


def upsample(factor):
    """Each position f times over along each axis, y_u = x_t with t = floor(u / f).

      dx_t = sum of dy_u over the copies u of t

    Inputs are [N, *S, O], outputs [N, *f S, O]. With a convolution after it, it is the other way
    to make images larger.

    Args:
      factor: f, for all axes, of which there may then be any number, or a tuple with one for each.

    Raises:
      ValueError: `factor` is not a positive integer, nor a tuple of them.
      LayerError: the inputs do not fit.

    References:
      "Deconvolution and Checkerboard Artifacts", Odena, Dumoulin, Olah, 2016.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.upsample(2).forward((), jnp.array([1.0, 2.0]).reshape(1, 2, 1))
      >>> y.ravel().tolist()
      [1.0, 1.0, 2.0, 2.0]
    """
    for f in factor if isinstance(factor, tuple) and factor else (factor,):
        require_count("upsample", "factor", f)
    name = f"upsample({factor})"

    def factors(shape):
        _require_positions(name, shape)
        if not isinstance(factor, tuple):
            return (factor,) * (len(shape) - 1)
        if len(factor) != len(shape) - 1:
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(('N', *shape))}; it takes {len(factor)} axes of "
                "positions.",
            )
        return factor

    def init(key, shape):
        del key
        *sizes, o = require_shape(name, shape)
        pairs = zip(sizes, factors((*sizes, o)), strict=True)
        return (), (*(size * f for size, f in pairs), o)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        y = x
        for axis, f in enumerate(factors(x.shape[1:]), 1):
            y = jnp.repeat(y, f, axis=axis)
        return y, x[:0]

    def backward(params, no_examples, dy, *, read=keep):
        del params, read
        *sizes, o = no_examples.shape[1:]
        pairs = list(zip(sizes, factors((*sizes, o)), strict=True))
        require_delta(name, dy, (len(dy), *(size * f for size, f in pairs), o))
        copies = widened(dy).reshape(len(dy), *(part for pair in pairs for part in pair), o)
        return jnp.sum(copies, axis=range(2, copies.ndim - 1, 2)).astype(dy.dtype), ()

    return Layer(name, init, forward, backward)


def _windows(name, window, strides, padding):
    strides = window if strides is None else strides
    windows = make_windows(name, f"{name}({window})", window, strides, padding, called="window")
    if not isinstance(windows.padding, str) and any(
        max(pair) >= size for pair, size in zip(windows.padding, window, strict=True)
    ):
        raise ValueError(
            f"{name}: padding is {padding!r}, and the window is {window}; it takes less padding "
            "than that, or some windows would see no inputs."
        )
    return windows


def _pooling(windows, pool, unpool):
    """A layer that pools in steps, each along some axes of positions.

    A step is y, kept = pool(x, geometry) and dx = unpool(kept, dy, geometry, sizes), with x
    [A, *S, B] and y [A, *S', B]: the axes before and after are folded.
    """
    name = windows.name

    def init(key, shape):
        del key
        *sizes, o = windows.require_axes(require_shape(name, shape), "O")
        return (), (*windows.on(tuple(sizes)).count(sizes), o)

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        windows.require_axes(x.shape[1:], "O")
        geometry, y, kept = windows.on(x.shape[1:-1]), x, []
        for axes in _steps(geometry):
            rows, own = pool(_folded(y, axes), geometry.along(axes))
            y = _unfolded(rows, y.shape, axes)
            kept.append(own)
        return y, (x[:0], tuple(kept))

    def backward(params, cache, dy, *, read=keep):
        del params, read
        no_examples, kept = cache
        *sizes, o = no_examples.shape[1:]
        geometry = windows.on(tuple(sizes))
        require_delta(name, dy, (len(dy), *geometry.count(sizes), o))
        dx = dy
        for axes, own in zip(reversed(_steps(geometry)), reversed(kept), strict=True):
            rows = unpool(own, _folded(dx, axes), geometry.along(axes), tuple(sizes[axes]))
            dx = _unfolded(rows, dx.shape, axes)
        return dx, ()

    return Layer(name, init, forward, backward)


def _steps(geometry):
    """The axes of each step, as slices: all at once, or one after another, the last first.

    On a CPU, 64 x 28 x 28 x 16 take there and back, all axes at once and one after another:

      2 x 2, side by side             0.3 ms   1.4 ms
      4 x 4, side by side             1.3      1.3
      3 x 3, with strides of 2 or 1   3.5, 20  1.7, 7      in two steps there are 6 places, not 9
    """
    rank = len(geometry.kernel)
    if _are_side_by_side(geometry) and math.prod(geometry.kernel) <= 16:
        return [slice(0, rank)]
    return [slice(i, i + 1) for i in reversed(range(rank))]


def _are_side_by_side(geometry):
    """Whether every position is in one window at most, and none is of padding."""
    return geometry.strides == geometry.kernel and not np.any(geometry.padding)


def _at_all_places(y, geometry, sizes):
    """What windows side by side gave, [N, *S', C], at all places of each, [N, *S, C]; else 0."""
    for i, (k, size) in enumerate(zip(geometry.kernel, sizes, strict=True), 1):
        y = jnp.repeat(y, k, axis=i)
        rest = [(0, 0)] * y.ndim
        rest[i] = (0, size - y.shape[i])
        y = jnp.pad(y, rest)
    return y


def _of_places(geometry, places):
    """The numbers of a window's places, [..., 1], in their order, from those along each axis."""
    number = np.zeros((), int)
    for k, along in zip(geometry.kernel, places, strict=True):
        number = number[..., None] * k + along
    return number[..., None]


def _folded(x, axes):
    """[N, *S, C] as [A, *S, B] for some axes of positions."""
    first, last = axes.start + 1, axes.stop + 1
    return x.reshape(math.prod(x.shape[:first]), *x.shape[first:last], math.prod(x.shape[last:]))


def _unfolded(rows, shape, axes):
    """What `_folded` took, with other sizes of these axes."""
    return rows.reshape(*shape[: axes.start + 1], *rows.shape[1:-1], *shape[axes.stop + 1 :])


def _require_positions(name, shape):
    """The shape of one example, once it is known to be [..., O] with axes of positions."""
    if len(shape) < 2:
        raise LayerError(
            name,
            f"got inputs of shape {show_shape(('N', *shape))}; it takes [N, ..., O], with "
            "axes of positions.",
        )
    return shape
