"""Joins: layers that make one array of the arrays of several streams.

    add           y = x_1 + x_2 + ...             dx_k = dy
    subtract      y = x_1 - x_2                   dx_1 = dy,   dx_2 = -dy
    multiply      y = x_1 x_2 ...                 dx_k = dy times the product of the others
    concatenate   y = (x_1, x_2, ...)             dx_k is the part of dy that belongs to x_k

Inputs are a tuple or a dict of arrays [N, ...], as `fork`, `on` and `shared` return it. There are
no parameters. In the first three, the first array has the shape of the outputs, and the others may
lack positions: they have sizes of 1 there, or are one vector [N, O] that is the same at all
positions. Their dx is summed over these. The first entry of a dict is that of the first key in
sorted order.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from jaxbp.combinators.broadcasting import expand, fits, reduce_like
from jaxbp.require import (
    entries_of,
    require_axis,
    require_delta,
    require_floats,
    require_integer,
    require_shape,
    require_shape_alone,
)
from jaxbp.signals.kinds import keep
from jaxbp.types import Layer, LayerError, shape_alone, show_shape

__all__ = ["add", "concatenate", "multiply", "subtract"]


def add() -> Layer:
    """The sum of the inputs, y = x_1 + x_2 + ...; dx_k = dy.

    Inputs are a tuple of arrays. The first has the shape of y, and the others may lack positions
    (see the module `joins`): [N, O] is added to [N, ..., O] at every position.

    Raises:
      LayerError: there is only one array, or their shapes or dtypes do not fit.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.add().init(jax.random.key(0), ((6, 4), (4,), (6, 1)))[1]
      (6, 4)
    """

    def total(terms):
        return functools.reduce(jnp.add, terms)

    return _elementwise("add", total, lambda x, dy: [dy] * len(x))


def subtract() -> Layer:
    """The difference of two inputs, y = x_1 - x_2; dx_1 = dy, dx_2 = -dy.

    Inputs are a pair of arrays. The second may lack positions (see the module `joins`).

    Raises:
      LayerError: there are not two arrays, or their shapes or dtypes do not fit.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.subtract().init(jax.random.key(0), ((4,), (4,)))[1]
      (4,)
    """
    return _elementwise("subtract", lambda x: x[0] - x[1], lambda x, dy: [dy, -dy], n=2)


def multiply() -> Layer:
    """The product of the inputs, y = x_1 x_2 ...; dx_k = dy times the product of the others.

    Inputs are a tuple of arrays. The first has the shape of y, and the others may lack positions
    (see the module `joins`): a gate [N, C] multiplies each channel of images [N, H, W, C].

    Raises:
      LayerError: there is only one array, or their shapes or dtypes do not fit.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.multiply().init(jax.random.key(0), ((6, 5, 4), (4,), (6, 5, 1)))[1]
      (6, 5, 4)
    """

    def product(factors):
        return functools.reduce(jnp.multiply, factors)

    def backward(x, dy):
        return [product([dy, *x[:k], *x[k + 1 :]]) for k in range(len(x))]

    return _elementwise("multiply", product, backward, keeps=True)


def _elementwise(name, function, derivative, *, n=None, keeps=False):
    """A join of arrays that are aligned first.

    Args:
      name: of the layer.
      function: `function(x) -> y`, of a list of aligned arrays.
      derivative: `derivative(x, dy) -> [dx_1, ...]`, before the sums over what was repeated.
      n: the number of arrays, if only one is possible.
      keeps: whether the derivative needs the values of x.
    """

    def require_fit(shapes):
        _require_several(name, shapes, n)
        if not all(fits(shape, shapes[0]) for shape in shapes):
            raise LayerError(
                name,
                f"got inputs of shapes {_show(shapes)}; the others take the shape of the first, "
                "with sizes of 1 where they are repeated, or are one vector.",
            )

    def init(key, shape):
        del key
        shapes = _require_shapes(name, shape)
        require_fit(shapes)
        return (), shapes[0]

    def forward(params, x, *, key=None):
        del params, key
        arrays, _ = entries_of(x)
        require_fit(_shapes_without_n(name, arrays))
        y = function([expand(a, arrays[0].shape) for a in arrays])
        return y, x if keeps else jax.tree.map(shape_alone, x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        arrays, structure = entries_of(cache)
        if keeps:
            require_fit(_shapes_without_n(name, arrays, "a cache"))
            shapes = [a.shape for a in arrays]
            arrays = [expand(a, shapes[0]) for a in arrays]
        else:
            shapes = [require_shape_alone(name, kept) for kept in arrays]
            require_fit([shape[1:] for shape in shapes])
        require_delta(name, dy, shapes[0])
        pairs = zip(derivative(arrays, dy), shapes, strict=True)
        return structure.unflatten([reduce_like(dx, shape) for dx, shape in pairs]), ()

    return Layer(name, init, forward, backward)


def concatenate(axis: int = -1) -> Layer:
    """The inputs one after another along an axis, y = (x_1, x_2, ...); dx_k is its part of dy.

    Inputs are a tuple of arrays whose shapes are equal but for this axis.

    Args:
      axis: an axis of one example: 0 is the first after N, such as the positions of a sequence, and
        -1 the last.

    Raises:
      ValueError: `axis` is not an integer.
      LayerError: there is only one array, or their shapes or dtypes do not fit.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.concatenate().init(jax.random.key(0), ((6, 2), (6, 1)))[1]
      (6, 3)
      >>> bp.concatenate(axis=0).init(jax.random.key(0), ((6, 2), (1, 2)))[1]
      (7, 2)
    """
    axis = require_integer("concatenate", "axis", axis)
    name = "concatenate" if axis == -1 else f"concatenate(axis={axis})"

    def place(shapes):
        """Which axis of one example it is, from 0; raises unless the shapes fit."""
        _require_several(name, shapes)
        at = require_axis(name, axis, shapes[0])
        others = {(len(shape), shape[:at], shape[at + 1 :]) for shape in shapes}
        if len(others) > 1:
            raise LayerError(
                name,
                f"got inputs of shapes {_show(shapes)}; it takes arrays that differ only in axis "
                f"{axis} of one example.",
            )
        return at

    def init(key, shape):
        del key
        shapes = _require_shapes(name, shape)
        at = place(shapes)
        first = shapes[0]
        return (), (*first[:at], sum(shape[at] for shape in shapes), *first[at + 1 :])

    def forward(params, x, *, key=None):
        del params, key
        arrays, _ = entries_of(x)
        at = place(_shapes_without_n(name, arrays))
        return jnp.concatenate(arrays, axis=at + 1), jax.tree.map(shape_alone, x)

    def backward(params, cache, dy, *, read=keep):
        del params, read
        kept, structure = entries_of(cache)
        shapes = [require_shape_alone(name, own) for own in kept]
        at = place([shape[1:] for shape in shapes]) + 1
        *ends, total = itertools.accumulate(shape[at] for shape in shapes)
        first = shapes[0]
        require_delta(name, dy, (*first[:at], total, *first[at + 1 :]))
        return structure.unflatten(jnp.split(dy, ends, axis=at)), ()

    return Layer(name, init, forward, backward)


def _require_several(name, shapes, n=None):
    if len(shapes) != n if n else len(shapes) < 2:
        takes = f"{n}" if n else "two or more"
        raise LayerError(name, f"got {len(shapes)} arrays; it takes a tuple of {takes}.")


def _require_shapes(name, shape):
    """The shapes of one example, of each array."""
    return [require_shape(name, own) for own in entries_of(shape)[0]]


def _shapes_without_n(name, arrays, what="inputs"):
    """The shapes of one example; raises unless all are floats of one dtype and one N."""
    for array in arrays:
        require_floats(name, array, what=what)
    if len({array.dtype for array in arrays}) > 1:
        got = " and ".join(dict.fromkeys(str(array.dtype) for array in arrays))
        raise LayerError(name, f"got {what} of dtypes {got}; it takes one for all. Convert them?")
    if len({array.shape[0] for array in arrays}) > 1:
        got = ", ".join(show_shape(array.shape) for array in arrays)
        raise LayerError(
            name, f"got {what} of shapes {got}; their first axis has to be the same N."
        )
    return [array.shape[1:] for array in arrays]


def _show(shapes):
    return ", ".join(show_shape(("N", *shape)) for shape in shapes)
