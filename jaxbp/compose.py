"""Combinators: layers made of layers.

The chain rule of a composition is the composition of the chain rules in reverse: the dx of one
part is the dy of the part before it. Nothing else passes between layers.
"""

import contextlib
import math
from typing import Any, NamedTuple

import jax

from jaxbp.signals import keep
from jaxbp.types import Layer, LayerError, show_shape


class Direct(NamedTuple):
    """A tree for backward that brings the error at a chain's outputs straight to each of its parts.

    Attributes:
      parts: what carries the error inside each part, as the chain's parameters.
      matrices: B of each part but the last, which gets the error as it is. [C, O] if its outputs
        have the positions of the chain's; else for both as flat vectors, [T C, ...].
    """

    parts: tuple[Any, ...]
    matrices: tuple[jax.Array, ...]


def chain(*layers):
    """The layers one after another, y = f_n(... f_2(f_1(x))). dx = J_1^T J_2^T ... J_n^T dy.

    Parameters, caches and readings are tuples with an entry for each part. If the tree for backward
    is a `Direct`, part i gets dy B_i in place of the dx of the part after it, and no part waits for
    another; dx is then that of the first part, for the error that it got.

    Args:
      *layers: in the order in which the forward pass meets them.

    Raises:
      TypeError: one of them is not a Layer.
      LayerError: a part refuses its inputs or parameters; the message says which part.

    Example:
      >>> import jax, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, out_shape = net.init(jax.random.key(0), (3,))
      >>> out_shape, [sorted(part) for part in params]
      ((2,), [['bias', 'weight'], [], ['bias', 'weight']])
    """
    for i, layer in enumerate(layers, 1):
        if not isinstance(layer, Layer):
            called = getattr(layer, "__name__", None)
            hint = f" Call it: {called}()?" if callable(layer) and called else ""
            raise TypeError(f"chain: part {i} is {layer!r}; it takes a Layer.{hint}")
    name = f"chain({', '.join(layer.name for layer in layers)})"

    def parts(*trees):
        """For each part: itself, the place for its errors, and what is its own in each tree."""
        for tree in trees:
            if not isinstance(tree, tuple) or len(tree) != len(layers):
                got = f"{len(tree)} entries" if isinstance(tree, tuple) else type(tree).__name__
                raise LayerError(
                    name,
                    f"got parameters with {got}; it takes a tuple of {len(layers)}, one for each "
                    "part. Are they those of another network?",
                )
        places = [_place(i, layer) for i, layer in enumerate(layers, 1)]
        return list(zip(layers, places, *trees, strict=True))

    def init(key, shape):
        params = []
        keys = jax.random.split(key, len(layers))
        for layer, place, part_key in parts(tuple(keys)):
            with place:
                part_params, shape = layer.init(part_key, shape)
            params.append(part_params)
        return tuple(params), shape

    def forward(params, x, *, key=None):
        keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
        caches = []
        for layer, place, part_params, part_key in parts(params, tuple(keys)):
            with place:
                x, cache = layer.forward(part_params, x, key=part_key)
            caches.append(cache)
        return x, tuple(caches)

    def backward(params, caches, dy, *, read=keep):
        if isinstance(params, Direct):
            trees, matrices = params.parts, (*params.matrices, None)
            if len(matrices) != len(layers):
                raise LayerError(
                    name,
                    f"got {len(params.matrices)} direct matrices; it takes {len(layers) - 1}, one "
                    "for each part but the last.",
                )
        else:
            trees, matrices = params, (None,) * len(layers)
        error, dx, readings = dy, dy, []
        for layer, place, tree, cache, matrix in reversed(parts(trees, caches, matrices)):
            with place:
                dy = dx if matrix is None else _sent(layer, error, matrix, dx.shape)
                dx, reading = layer.backward(tree, cache, dy, read=read)
            readings.append(reading)
        return dx, tuple(reversed(readings))

    return Layer(name, init, forward, backward)


def _sent(layer, error, matrix, shape):
    """The error [N, ..., C] at the outputs of a chain, by its own matrix to those of one part."""
    if error.shape[:-1] == shape[:-1] and matrix.shape == (error.shape[-1], shape[-1]):
        return error @ matrix
    sizes = math.prod(error.shape[1:]), math.prod(shape[1:])
    if matrix.shape != sizes:
        raise LayerError(
            layer.name,
            f"got a direct matrix of shape {show_shape(matrix.shape)}; to its outputs, "
            f"{show_shape(shape)}, from an error {show_shape(error.shape)}, it takes "
            f"{show_shape(sizes)}.",
        )
    return (error.reshape(len(error), -1) @ matrix).reshape(shape)


@contextlib.contextmanager
def _place(i, layer):
    """Says of an error inside the block that it stands in part `i` of a chain."""
    try:
        yield
    except LayerError as error:
        raise error.inside(f"chain: part {i}") from None
    except FloatingPointError as error:  # under jax.debug_nans or jax.debug_infs
        raise LayerError(layer.name, f"has an {error}").inside(f"chain: part {i}") from error
