"""The signal of a convolution as that of a matrix: what its kernel is applied to, one by one.

A convolution applies its kernel, as a matrix [K I, O], to the patch that each window sees, and
whatever is read of a matrix can be read of it. There are as many patches as windows, K times what
the images hold, so that one forms them only for what is cheaper with them than without.

With G groups there are G matrices [K I / G, O / G], and G is the first axis of all that is here.
"""

import math

import jax.numpy as jnp

from jaxbp.signals.conv_products import exchanged, map_taps, placed, taps
from jaxbp.signals.kinds import Outer, as_images, as_positions


def windowed(signal):
    """What a convolution's windows lie on, [N, T, *S, C], and what they gave, [N, T, *S', O].

    Of a transposed convolution these are the deltas and the inputs: its kernel has the gradients
    of the convolution that it transposes, with inputs and outputs exchanged (`as_kernel`).
    """
    x, y = as_images(signal, signal.inputs), as_images(signal, signal.deltas)
    return (y, x) if signal.geometry.transposed else (x, y)


def patched(signal):
    """An Outer for each group, of the gradients that `as_kernel` puts into a kernel."""
    x, y = windowed(signal)
    return _outers(taps(_folded(x), signal.geometry), y, signal.geometry)


def patched_outputs(signal):
    """An Outer for each group, of the inputs that each output is made of and the deltas at it.

    Those of a transposed convolution are mostly zeros, and its gradients the products of fewer.
    """
    if not signal.geometry.transposed:
        return patched(signal)
    x, deltas = as_images(signal, signal.inputs), as_images(signal, signal.deltas)
    parts = placed(_folded(x), signal.geometry, deltas.shape[2:-1])
    return _outers(parts, deltas, signal.geometry)


def map_place_gradients(function, signal):
    """What a function gives for the gradients at each place, [G, N, I / G, O / G], one at a time.

    They are those of `patched`, of which no more than one of K parts is there at once. [K, ...].
    """
    x, y = windowed(signal)
    y, groups = as_positions(y), signal.geometry.groups
    grouped = _in_groups(y, signal.geometry)

    def at(seen):
        seen = seen.reshape(len(x), -1, x.shape[-1])
        if seen.shape[-1] == groups:
            # Sums of products as they lie: to move the groups first would take ten times as long.
            sums = jnp.sum(jnp.repeat(seen, y.shape[-1] // groups, axis=-1) * y, axis=1)
            return function(jnp.moveaxis(sums.reshape(len(x), groups, 1, -1), 1, 0))
        return function(jnp.einsum("gnti,gnto->gnio", _in_groups(seen, signal.geometry), grouped))

    return map_taps(at, _folded(x), signal.geometry)


def as_kernel(gradients, geometry):
    """Gradients [G, N, K I / G, O / G], or [G, N, K, I / G, O / G], as [N, *K, I / G, O]."""
    groups, n, *_, o = gradients.shape
    rows = jnp.moveaxis(gradients, 0, -2)
    kernel = rows.reshape(n, *geometry.kernel, -1, groups * o)
    return exchanged(kernel, groups) if geometry.transposed else kernel


def _outers(parts, y, geometry):
    """The signal of each group's matrix, from what each place sees, [N T, *S', C], and y."""
    patches = jnp.concatenate(list(parts), axis=-1)
    patches = patches.reshape(len(y), -1, patches.shape[-1])
    return Outer(
        _in_groups(patches, geometry, places=math.prod(geometry.kernel)),
        _in_groups(as_positions(y), geometry),
    )


def _folded(x):
    """[N, T, *S, C] as [N T, *S, C]."""
    return x.reshape(-1, *x.shape[2:])


def _in_groups(x, geometry, *, places=1):
    """[N, T, C] as [G, N, T, C / G], where C is of so many places, each with all groups."""
    n, t, c = x.shape
    parts = x.reshape(n, t, places, geometry.groups, -1)
    return jnp.moveaxis(parts, 3, 0).reshape(geometry.groups, n, t, c // geometry.groups)
