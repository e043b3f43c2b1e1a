"""Shapes: layers that rearrange or select the values of each example and change none of them.

Axes are those of one example, counted from 0 without N, as in the shapes that `init` takes.
Integers, such as tokens, pass through; they have no derivative, and dx is None.

Layers that other libraries have are compositions. Merging some axes or splitting one, as PyTorch's
Flatten(start_dim) and Unflatten do, is a `reshape`. Its PixelShuffle of images [H, W, C r r] is

    reshape(H, W, C, r, r), permute(0, 3, 1, 4, 2), reshape(H r, W r, C)

and PixelUnshuffle is the same backwards. The shuffle of g groups of channels is
reshape(H, W, g, C / g), permute(0, 1, 3, 2), reshape(H, W, C).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbp.require import (
    is_count,
    is_integer,
    require_array,
    require_axis,
    require_delta,
    require_integer,
    require_shape,
    require_shape_alone,
)
from jaxbp.sharding import reshaped
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, Shape, shape_alone, show_shape

__all__ = ["flatten", "permute", "reshape", "take"]


def flatten() -> Layer:
    """Reshapes each example to one vector, [N, ...] to [N, O]. dx is dy in the shape of x.

    Integers, such as tokens, have no derivative: dx is None.
    """
    return rearranging(
        "flatten",
        lambda shape: (math.prod(shape),),
        lambda x: reshaped(x, math.prod(x.shape[1:])),
        lambda dy, shape: reshaped(dy, *shape),
    )


def reshape(*shape: int) -> Layer:
    """Gives each example another shape, [N, ...] to [N, *shape]. dx is dy in the shape of x.

    Args:
      *shape: the sizes of one example's axes, without N. One of them may be -1: what is left.

    Raises:
      ValueError: a size is neither a positive integer nor the only -1.
      LayerError: examples do not have as many values.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.reshape(2, -1).init(jax.random.key(0), (4, 3))[1]
      (2, 6)
    """
    if not all(is_count(n) or _is_rest(n) for n in shape) or sum(map(_is_rest, shape)) > 1:
        raise ValueError(
            f"reshape: got {shape}; it takes one positive integer for each axis of an example, "
            "such as reshape(28, 28), and -1 for at most one of them."
        )
    sizes = tuple(map(int, shape))
    name = f"reshape({', '.join(map(str, sizes))})"

    def resolved(shape):
        known, count = math.prod(n for n in sizes if n > 0), math.prod(shape)
        out = tuple(count // known if n < 0 else n for n in sizes)
        if math.prod(out) != count:
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(('N', *shape))}; the {count} values of an "
                f"example do not fill {show_shape(sizes)}.",
            )
        return out

    return rearranging(
        name,
        resolved,
        lambda x: reshaped(x, *resolved(x.shape[1:])),
        lambda dy, shape: reshaped(dy, *shape),
    )


def _is_rest(size):
    return is_integer(size) and size == -1


def permute(*axes: int) -> Layer:
    """Puts the axes of each example in another order. dx is dy with its axes put back.

    Axis k of an output is axis `axes[k]` of the example.

    Args:
      *axes: every axis of one example once, from 0 without N: `permute(1, 0)` transposes [T, O].

    Raises:
      ValueError: the axes are not 0, 1, ... in some order.
      LayerError: examples have another number of axes.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.permute(2, 0, 1).init(jax.random.key(0), (28, 20, 3))[1]    # channels first
      (3, 28, 20)
    """
    order = tuple(require_integer("permute", f"axis {k}", axis) for k, axis in enumerate(axes))
    if sorted(order) != list(range(len(order))):
        raise ValueError(
            f"permute: got {order}; it takes every axis of an example once, from 0 without N, "
            "such as permute(1, 0)."
        )
    name = f"permute({', '.join(map(str, order))})"
    inverse = sorted(range(len(order)), key=order.__getitem__)

    def permuted(shape):
        if len(shape) != len(order):
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(('N', *shape))}; it permutes {len(order)} axes, "
                f"and an example has {len(shape)}.",
            )
        return tuple(shape[axis] for axis in order)

    return rearranging(
        name,
        permuted,
        lambda x: x.transpose(0, *(1 + axis for axis in order)),
        lambda dy, shape: dy.transpose(0, *(1 + axis for axis in inverse)),
    )


def take(index: int | slice, *, axis: int = 0) -> Layer:
    """Selects one index, or a slice, of an axis. dx is dy at what was selected, and 0 elsewhere.

    An integer removes the axis; a slice keeps it. Of a sequence [N, T, O], `take(-1)` is the last
    position, `take(0)` the first, such as a class token, and `take(slice(1, None))` the others.

    Args:
      index: an integer, negative ones counted from the end, or a slice of integers.
      axis: an axis of one example, from 0 without N, or from -1 backwards.

    Raises:
      ValueError: `index` is neither, or `axis` is not an integer.
      LayerError: the inputs do not have this axis, or it does not have this index.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.take(-1).init(jax.random.key(0), (10, 3))[1]
      (3,)
      >>> bp.take(slice(0, 2), axis=-1).init(jax.random.key(0), (10, 3))[1]
      (10, 2)
    """
    axis = require_integer("take", "axis", axis)
    if isinstance(index, slice):
        parts = (index.start, index.stop, index.step)
        if not all(part is None or is_integer(part) for part in parts) or index.step == 0:
            raise ValueError(
                f"take: index is {index}; it takes a slice of integers, with a step other than 0."
            )
        shown = ":".join("" if part is None else str(part) for part in parts).removesuffix(":")
    elif is_integer(index):
        index = int(index)
        shown = str(index)
    else:
        raise ValueError(f"take: index is {index!r}; it takes an integer or a slice.")
    name = f"take({shown}, axis={axis})"

    def selected(shape):
        """The axis that is meant, and the places of the selected values on it."""
        place = require_axis(name, axis, shape)
        size = shape[place]
        if isinstance(index, slice):
            places = range(size)[index]
        else:
            places = range(size)[index : index + 1 or None] if -size <= index < size else ()
        if not places:
            raise LayerError(
                name,
                f"got inputs of shape {show_shape(('N', *shape))}; index {shown} selects nothing "
                f"on axis {axis}.",
            )
        return place, places

    def out_shape(shape):
        place, places = selected(shape)
        kept = (len(places),) if isinstance(index, slice) else ()
        return (*shape[:place], *kept, *shape[place + 1 :])

    def move(x):
        place, _ = selected(x.shape[1:])
        return x[(*[slice(None)] * (1 + place), index)]

    def move_back(dy, shape):
        place, places = selected(shape)
        rows = dy if isinstance(index, slice) else jnp.expand_dims(dy, 1 + place)
        rows = jnp.flip(rows, 1 + place) if places[0] > places[-1] else rows
        first, last = sorted((places[0], places[-1]))
        padding = [(0, 0, 0)] * rows.ndim
        padding[1 + place] = (first, shape[place] - 1 - last, abs(places.step) - 1)
        return jax.lax.pad(rows, jnp.zeros((), rows.dtype), padding)

    return rearranging(name, out_shape, move, move_back)


def rearranging(
    name: str,
    out_shape: Callable[[Shape], Shape],
    move: Callable[[jax.Array], jax.Array],
    move_back: Callable[[jax.Array, Shape], jax.Array],
) -> Layer:
    """A layer without parameters that moves values: y = move(x), dx = move_back(dy, shape).

    Args:
      name: its name.
      out_shape: maps the shape of one example to that of its output, or raises.
      move: takes x [N, ...].
      move_back: the transpose of `move`. It takes dy and the shape of one example of x.
    """

    def init(key, shape):
        del key
        return (), out_shape(require_shape(name, shape))

    def forward(params, x, *, key=None):
        del params, key
        require_array(name, x)
        out_shape(x.shape[1:])
        return move(x), shape_alone(x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        n, *shape = require_shape_alone(name, cache)
        if not jnp.issubdtype(cache.dtype, jnp.floating):
            return None, ()
        require_delta(name, dy, (n, *out_shape(tuple(shape))))
        return move_back(dy, tuple(shape)), ()

    return Layer(name, init, forward, backward)
