"""Padding: values around those of each example, copied from them, constant or learned.

Axes are those of one example, counted from 0 without N.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.layers.shapes import rearranging
from jaxbp.require import (
    is_integer,
    require_count,
    require_delta,
    require_floats,
    require_key,
    require_number,
    require_params,
    require_shape,
    require_shape_alone,
)
from jaxbp.sharding import gathered, repeated
from jaxbp.signals.kinds import Bias, keep, unshared
from jaxbp.types import Layer, LayerError, Shape, shape_alone, show_shape, widened

__all__ = ["pad", "prepend"]

MODES = ("constant", "reflect", "edge", "wrap")


def pad(
    widths: Sequence[tuple[int, int]],
    *,
    mode: Literal["constant", "reflect", "edge", "wrap"] = "constant",
    value: float = 0,
) -> Layer:
    """Puts values before and after those of an axis, and takes some away where a width is negative.

        mode        before and after 1 2 3, with widths (2, 2)
        constant    0 0  1 2 3  0 0      `value`
        reflect     3 2  1 2 3  2 1      mirrored at the outermost value
        edge        1 1  1 2 3  3 3      the outermost value, repeated
        wrap        2 3  1 2 3  1 2      as on a circle

    dx_u is the sum of dy over the places to which x_u was copied; sums of 16-bit numbers are
    computed in 32 bits. Axes without widths stay as they are, so that images [H, W, C] take two
    pairs. Values at negative widths are removed first, and what is left is padded.

    Args:
      widths: a pair (before, after) for each axis of an example from the first on.
      mode: what is put there. The modes are those of `jnp.pad`.
      value: the constant, for the mode `constant`.

    Raises:
      ValueError: an argument is out of range.
      LayerError: the inputs have fewer axes, nothing would be left, a width is larger than what
        `reflect` (the size less one) or `wrap` (the size) can copy, or integers get a fraction.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> y, _ = bp.pad(((1, 2),), mode="edge").forward((), jnp.array([[1.0, 2.0]]))
      >>> y[0].tolist()
      [1.0, 1.0, 2.0, 2.0, 2.0]
      >>> bp.pad(((-1, 0), (0, 1))).forward((), jnp.ones((1, 2, 1)))[0][0].tolist()
      [[1.0, 0.0]]
    """
    pairs = _require_widths(widths)
    if mode not in MODES:
        raise ValueError(f"pad: mode is {mode!r}; it takes one of {', '.join(MODES)}.")
    value = require_number("pad", "value", value)
    if value != 0 and mode != "constant":
        raise ValueError(f"pad: value is {value}, which the mode {mode!r} does not use.")
    name = f"pad({pairs}, {value})" if mode == "constant" else f"pad({pairs}, {mode!r})"
    added = [(max(before, 0), max(after, 0)) for before, after in pairs]
    removed = [(min(before, 0), min(after, 0)) for before, after in pairs]

    def out_shape(shape):
        _require_fit(name, pairs, mode, shape)
        sizes = (size + sum(pair) for size, pair in zip(shape, pairs, strict=False))
        return (*sizes, *shape[len(pairs) :])

    def move(x):
        if mode == "constant":
            if not jnp.issubdtype(x.dtype, jnp.floating) and value != int(value):
                raise LayerError(
                    name, f"got inputs of dtype {x.dtype}; it pads them by a fraction."
                )
            return _extended(x, pairs, value)
        x = _extended(x, removed)
        return jax.vmap(lambda one: jnp.pad(one, _of_all_axes(x, added)[1:], mode=mode))(x)

    def move_back(dy, shape):
        if mode == "constant":
            return _extended(dy, [(-before, -after) for before, after in pairs])
        dx = widened(dy)
        for axis, (size, cut, widths) in enumerate(zip(shape, removed, added, strict=False), 1):
            dx = _folded(dx, axis, size + sum(cut), *widths, mode)
        return _extended(dx.astype(dy.dtype), [(-before, -after) for before, after in removed])

    return rearranging(name, out_shape, move, move_back)


def _require_widths(widths: Any) -> tuple[tuple[int, int], ...]:
    """Returns the widths as a tuple of pairs of integers; raises otherwise."""
    if not isinstance(widths, tuple | list) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 and all(map(is_integer, pair))
        for pair in widths
    ):
        raise ValueError(
            f"pad: widths is {widths!r}; it takes a pair of integers, before and after, for each "
            "axis of an example, such as ((1, 1), (1, 1)) for images [H, W, C]."
        )
    return tuple((int(before), int(after)) for before, after in widths)


def _require_fit(name: str, pairs: tuple[tuple[int, int], ...], mode: str, shape: Shape) -> None:
    """Raises unless examples of this shape can be padded so."""
    got = f"got inputs of shape {show_shape(('N', *shape))}"
    if len(pairs) > len(shape):
        raise LayerError(
            name, f"{got}; it pads {len(pairs)} axes, and an example has {len(shape)}."
        )
    for axis, (size, pair) in enumerate(zip(shape, pairs, strict=False)):
        left = size + sum(min(width, 0) for width in pair)
        if left < 1:
            raise LayerError(name, f"{got}; widths {pair} leave nothing of axis {axis}.")
        most = {"reflect": left - 1, "wrap": left}.get(mode)
        if most is not None and max(pair) > most:
            raise LayerError(
                name, f"{got}; {mode!r} can copy {most} values of axis {axis}, not {max(pair)}."
            )


def _of_all_axes(x: jax.Array, widths: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A pair for each axis of an array [N, ...], from those of the first axes of an example."""
    return [(0, 0), *widths, *[(0, 0)] * (x.ndim - 1 - len(widths))]


def _extended(x: jax.Array, widths: Sequence[tuple[int, int]], value: float = 0) -> jax.Array:
    """Adds a constant at positive widths, and removes values at negative ones."""
    constant = jnp.asarray(value, x.dtype)
    return jax.lax.pad(x, constant, [(*pair, 0) for pair in _of_all_axes(x, widths)])


def _folded(dy: jax.Array, axis: int, size: int, before: int, after: int, mode: str) -> jax.Array:
    """Adds what was copied before and after an axis to where it came from."""

    def back_to(start, copies):
        if mode == "reflect":
            copies = jnp.flip(copies, axis)
        elif mode == "edge":
            copies = jnp.sum(copies, axis, keepdims=True)
        widths = [(0, 0)] * (axis - 1) + [(start, size - start - copies.shape[axis])]
        return _extended(copies, widths)

    front, dx, back = jnp.split(dy, (before, before + size), axis)
    if before:
        dx = dx + back_to({"reflect": 1, "edge": 0, "wrap": size - before}[mode], front)
    if after:
        dx = dx + back_to({"reflect": size - 1 - after, "edge": size - 1, "wrap": 0}[mode], back)
    return dx


def prepend(
    count: int = 1,
    *,
    weight_init: Initializer = initializers.normal(0.02),  # noqa: B008 -- a pure function
    dtype: DTypeLike = float,
) -> Layer:
    """Puts learned vectors before the positions of a sequence, such as a class token.

        y_nk = W[k] for k < K,   y_n,K+t = x_nt     dE/dW[k] = sum_n dy_nk     dx_nt = dy_n,K+t

    Inputs are [N, T, O], outputs [N, K + T, O], parameters `{"weight": [K, O]}`. `take(0)` reads
    the first vector of a later layer.

    Args:
      count: K, how many vectors.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      ValueError: `count` is not a positive integer.
      LayerError: the inputs or the parameters do not fit.

    References:
      "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", Devlin,
      Chang, Lee, Toutanova, 2019.

    Example:
      >>> import jax, jaxbp as bp
      >>> net = bp.chain(bp.prepend(), bp.attention(4, 2), bp.take(0))
      >>> params, out_shape = net.init(jax.random.key(0), (9, 4))
      >>> params[0]["weight"].shape, out_shape
      ((1, 4), (4,))
    """
    count = require_count("prepend", "count", count)
    name = f"prepend({count})"

    def require_sequence(shape):
        shape = require_shape(name, shape)
        if len(shape) != 2:
            raise LayerError(
                name, f"got inputs of shape {show_shape(('N', *shape))}; it takes [N, T, O]."
            )
        return shape

    def longer(shape: Shape) -> Shape:
        return count + shape[0], shape[1]

    def init(key, shape):
        require_key(name, "key", key)
        shape = require_sequence(shape)
        return {"weight": weight_init(key, (count, shape[1]), dtype)}, longer(shape)

    def forward(params, x, *, key=None):
        del key
        require_floats(name, x)
        shape = require_sequence(x.shape[1:])
        require_params(name, params, {"weight": (count, shape[1])})
        require_floats(name, x, params["weight"].dtype)
        first = repeated(gathered(params["weight"], x), x)
        return jnp.concatenate([first, x], axis=1), shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        n, *shape = require_shape_alone(name, cache)
        require_delta(name, dy, (n, *longer(require_sequence(tuple(shape)))))
        require_params(name, params, {"weight": (count, shape[1])})
        return dy[:, count:], {"weight": read(unshared(Bias(dy[:, :count])))}

    return Layer(name, init, forward, backward)
