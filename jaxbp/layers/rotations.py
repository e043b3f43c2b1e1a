"""Rotary position embedding: rotations of pairs of values by angles that grow with the position."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.require import (
    require_count,
    require_delta,
    require_floats,
    require_positive,
    require_shape,
    require_shape_alone,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, Shape, shape_alone, show_shape, widened

__all__ = ["Rotary", "rotary"]

BASE = 10000.0


class Rotary(NamedTuple):
    """How an attention layer rotates its queries and keys; see `rotary` for the formulas.

    Attributes:
      base: a positive number. The larger it is, the more slowly the last pairs rotate.
      size: the number of values of each head that are rotated, the first ones; None means all.
      interleaved: whether the two values of a pair stand side by side.

    Example:
      >>> import jaxbp as bp
      >>> bp.attention(64, heads=4, causal=True, rotary=bp.Rotary(base=5e5, size=8)).name
      'attention(64, 4)'
    """

    base: float = BASE
    size: int | None = None
    interleaved: bool = False


def rotary(
    heads: int, *, base: float = BASE, size: int | None = None, interleaved: bool = False
) -> Layer:
    """Rotary position embedding: rotates pairs of values in each head by angles that grow with t.

    Of the d values in each head, the first r are rotated, in r / 2 pairs, and the others pass. With
    a = t base^(-2 j / r) the angle of pair j at position t:

        y_j = x_j cos a - x_(j + r/2) sin a     y_(j + r/2) = x_(j + r/2) cos a + x_j sin a

    dx is dy rotated by -a. The product of a rotated query and a rotated key depends on the distance
    between their positions, not on the positions themselves.

        by default     the two values of a pair stand r / 2 apart, as in GPT-NeoX and Llama
        interleaved    they stand side by side, x_(2 j) and x_(2 j + 1), as in RoFormer and GPT-J

    Inputs and outputs are [N, T, H d]. 16-bit inputs are rotated in 32 bits.

    Args:
      heads: H, a divisor of the size of the last axis.
      base: a positive number. The larger it is, the more slowly the last pairs rotate.
      size: r, an even number of at most d; None means d.
      interleaved: whether the two values of a pair stand side by side.

    Raises:
      ValueError: `heads` is not a positive integer, `base` is not positive, or `size` is not a
        positive even integer.
      LayerError: the inputs do not fit, r is larger than d, or d is odd without an r.

    References:
      "RoFormer: Enhanced Transformer with Rotary Position Embedding", Su et al., 2021.
      "GPT-NeoX-20B: An Open-Source Autoregressive Language Model", Black et al., 2022: r below d.

    Example:
      >>> import jax.numpy as jnp, jaxbp as bp
      >>> x = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
      >>> y, _ = bp.rotary(1).forward((), x)                   # rotated by angles 0 and 1
      >>> [[round(float(number), 2) for number in position] for position in y[0]]
      [[1.0, 0.0], [0.54, 0.84]]
    """
    heads = require_count("rotary", "heads", heads)
    how = require_rotary("rotary", Rotary(base, size, interleaved))
    name = f"rotary({heads})"

    def by_heads(x):
        """Reshapes [N, T, H d] to [N, T, H, d]."""
        d = require_size(name, x.shape[1:], heads, "H d")
        require_rotated(name, x.shape[1:], d, how)
        return x.reshape(*x.shape[:2], heads, d)

    def init(key, shape):
        del key
        shape = require_shape(name, shape)
        require_rotated(name, shape, require_size(name, shape, heads, "H d"), how)
        return (), shape

    def forward(params, x, *, key=None):
        del params, key
        require_floats(name, x)
        return rotate(by_heads(x), how, 1).reshape(x.shape), shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        require_delta(name, dy, require_shape_alone(name, cache))
        return rotate(by_heads(dy), how, -1).reshape(dy.shape), ()

    return Layer(name, init, forward, backward)


def rotate(x: jax.Array, how: Rotary, sign: int, start: int = 0) -> jax.Array:
    """Rotates heads [N, T, H, d] at positions from `start` on by `sign` times their angles."""
    t, size = x.shape[1], x.shape[3] if how.size is None else how.size
    angles = (start + np.arange(t))[:, None, None] * how.base ** (-np.arange(0, size, 2) / size)
    wide, rest = widened(x[..., :size]), x[..., size:]
    cos, sin = (jnp.asarray(f(sign * angles), wide.dtype) for f in (np.cos, np.sin))
    if how.interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = jnp.split(wide, 2, axis=-1)
    parts = a * cos - b * sin, b * cos + a * sin
    if how.interleaved:
        y = jnp.stack(parts, axis=-1).reshape(wide.shape)
    else:
        y = jnp.concatenate(parts, axis=-1)
    y = y.astype(x.dtype)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y


def require_rotary(name: str, how: Any) -> Rotary:
    """Returns a `Rotary` whose values are in their ranges, or raises."""
    if not isinstance(how, Rotary):
        raise ValueError(
            f"{name}: rotary is {how!r}; it takes True, False, or a Rotary, such as "
            "bp.Rotary(base=500_000.0)."
        )
    require_positive(name, "base", how.base)
    if how.size is None:
        return how
    size = require_count(name, "size", how.size)
    if size % 2:
        raise ValueError(f"{name}: size is {size}; pairs take an even number.")
    return how._replace(size=size)


def require_size(name: str, shape: Shape, heads: int, letters: str) -> int:
    """Returns the size d of each of `heads` heads in inputs [N, *shape], or raises."""
    got = f"got inputs of shape {show_shape(('N', *shape))}"
    if len(shape) != 2:
        raise LayerError(name, f"{got}; it takes [N, T, {letters}], with one axis of positions.")
    if shape[1] % heads:
        raise LayerError(
            name, f"{got}; it takes [N, T, {letters}], a last axis that is a multiple of {heads}."
        )
    return shape[1] // heads


def require_rotated(name: str, shape: Shape, d: int, how: Rotary) -> None:
    """Raises unless heads of size d, in inputs [N, *shape], have the pairs that are rotated."""
    got = f"got inputs of shape {show_shape(('N', *shape))}, so that d = {d}"
    if how.size is None and d % 2:
        raise LayerError(name, f"{got}; pairs take an even d.")
    if how.size is not None and how.size > d:
        raise LayerError(name, f"{got}; it rotates the first {how.size} values of each head.")
