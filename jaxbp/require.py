"""What layers ask of what they are given, in the words of their errors."""

import contextlib

import jax.numpy as jnp
import numpy as np

from jaxbp.types import Layer, LayerError, show_shape


def require_positive(name, argument, value):
    """Refuses a number that is not above zero."""
    if not value > 0:
        raise ValueError(f"{name}: {argument} is {value}; it takes a positive number.")


def require_count(name, argument, value):
    """Refuses what is not an integer above zero."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {argument} is {value!r}; it takes a positive integer.")


def require_shape(name, shape):
    """The shape of one example, once it is known to be one."""
    if not isinstance(shape, tuple | list) or not all(isinstance(i, int) and i > 0 for i in shape):
        raise LayerError(
            name,
            f"got {shape!r} for the shape of one example; it takes a tuple of positive integers, "
            "such as (64,), without N.",
        )
    return tuple(shape)


def require_last_axis(name, shape, letter):
    """The shape of one example, once it is known to have an axis; messages call it by a letter."""
    shape = require_shape(name, shape)
    if not shape:
        raise LayerError(
            name,
            f"got inputs of shape [N]; it takes [N, ..., {letter}]. Give each example an axis?",
        )
    return shape


def require_floats(name, x, dtype=None):
    """Refuses inputs that are not an array of floating-point numbers, or not of `dtype`."""
    if not hasattr(x, "dtype"):
        raise LayerError(name, f"got inputs of type {type(x).__name__}; it takes an array.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayerError(
            name, f"got inputs of dtype {x.dtype}; it takes floating-point numbers. Convert them?"
        )
    if dtype is not None and x.dtype != dtype:
        raise LayerError(
            name, f"got inputs of dtype {x.dtype}, but its parameters are {dtype}. Convert one?"
        )


def require_mask(name, mask):
    """Refuses a mask that is not an array of booleans, for positions, or for each example's."""
    if mask is not None and (
        not hasattr(mask, "dtype") or mask.dtype != bool or mask.ndim not in (1, 2)
    ):
        got = show_shape(np.shape(mask))
        raise ValueError(
            f"{name}: mask is of type {getattr(mask, 'dtype', type(mask).__name__)} and shape "
            f"{got}; it takes an array of booleans, [T] or [N, T]."
        )


def require_fit(name, mask, n, shape):
    """Refuses a mask that is not of the positions of inputs [n, *shape], n a letter before init."""
    if mask is None or mask.shape == shape[:1]:
        return
    if mask.ndim == 2 and mask.shape[1] == shape[0] and n in ("N", mask.shape[0]):
        return
    raise LayerError(
        name,
        f"has a mask of shape {show_shape(mask.shape)}; inputs of shape "
        f"{show_shape((n, *shape))} take [{shape[0]}] or {show_shape((n, shape[0]))}.",
    )


def require_delta(name, dy, shape):
    """Refuses a derivative that is not of the outputs' shape, which might broadcast in silence."""
    if jnp.shape(dy) != shape:
        raise LayerError(
            name,
            f"got a dy of shape {show_shape(jnp.shape(dy))}; its outputs are {show_shape(shape)}.",
        )


def require_leaves(name, params, leaves):
    """Refuses parameters that are not a dict of these leaves, in the order of the message."""
    if not isinstance(params, dict) or set(params) != set(leaves):
        raise LayerError(
            name,
            f"got parameters that are not its own: {_outline(params)}; it takes a dict of "
            f"{' and '.join(leaves)}. Are they those of another network?",
        )


def require_layers(place, layers):
    """Refuses what is not a Layer; messages call it by its place and number."""
    for i, layer in enumerate(layers, 1):
        if not isinstance(layer, Layer):
            called = getattr(layer, "__name__", None)
            hint = f" Call it: {called}()?" if callable(layer) and called else ""
            raise TypeError(f"{place} {i} is {layer!r}; it takes a Layer.{hint}")


def require_entries(name, tree, n):
    """Refuses a tree that has not an entry for each part of a combinator."""
    if not isinstance(tree, tuple) or len(tree) != n:
        got = f"{len(tree)} entries" if isinstance(tree, tuple) else type(tree).__name__
        raise LayerError(
            name,
            f"got parameters with {got}; it takes a tuple of {n}, one for each part. Are they "
            "those of another network?",
        )


def require_same_shape(name, shape, out_shape, what):
    """Refuses an inner layer that does not map a shape to itself, which `what` needs."""
    if tuple(out_shape) != tuple(shape):
        raise LayerError(
            name,
            f"has an inner layer that maps {show_shape(shape)} to {show_shape(out_shape)}; {what} "
            "needs equal shapes.",
        )


@contextlib.contextmanager
def placed(place, layer):
    """Says of an error inside the block that it stands in this place, that of a layer."""
    try:
        yield
    except LayerError as error:
        raise error.inside(place) from None
    except FloatingPointError as error:  # under jax.debug_nans or jax.debug_infs
        raise LayerError(layer.name, f"has an {error}").inside(place) from error


def _outline(params):
    """What a tree of parameters is, in a few words."""
    if isinstance(params, dict):
        return f"a dict of {', '.join(map(str, params)) or 'nothing'}"
    if isinstance(params, tuple | list):
        return f"a {type(params).__name__} of {len(params)}"
    return f"a {type(params).__name__}"
