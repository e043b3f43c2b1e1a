"""Combinators: layers made of layers.

The chain rule of a composition is the composition of the chain rules in reverse: the dx of one
part is the dy of the part before it. Nothing else passes between layers.
"""

import contextlib

import jax

from jaxbp.signals import keep
from jaxbp.types import Layer, LayerError


def chain(*layers):
    """The layers one after another, y = f_n(... f_2(f_1(x))). dx = J_1^T J_2^T ... J_n^T dy.

    Parameters, caches and readings are tuples with an entry for each part.

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
        readings = []
        for layer, place, part_params, cache in reversed(parts(params, caches)):
            with place:
                dy, reading = layer.backward(part_params, cache, dy, read=read)
            readings.append(reading)
        return dy, tuple(reversed(readings))

    return Layer(name, init, forward, backward)


@contextlib.contextmanager
def _place(i, layer):
    """Says of an error inside the block that it stands in part `i` of a chain."""
    try:
        yield
    except LayerError as error:
        raise error.inside(f"chain: part {i}") from None
    except FloatingPointError as error:  # under jax.debug_nans or jax.debug_infs
        raise LayerError(layer.name, f"has an {error}").inside(f"chain: part {i}") from error
