"""Patches: turns the signal of a convolution into the signal of a matrix.

A convolution multiplies the patch that each window sees by its kernel, as a matrix [K I, O]. So a
reading of a weight matrix can also be computed for a kernel, from the patches. With one patch for
each window, the patches are about K times as large as the images. Readings therefore form patches
only where this is cheaper than the alternatives (`by_place_is_less_work`).

With G groups there are G matrices [K I / G, O / G], and G is the first axis of the results here.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp.sharding import reshaped, varying_with
from jaxbp.signals.conv_products import block_gradient, exchanged, map_taps, placed, taps
from jaxbp.signals.conv_windows import Geometry
from jaxbp.signals.kinds import Conv, Outer, as_images, as_positions
from jaxbp.types import PyTree


def windowed(signal: Conv) -> tuple[jax.Array, jax.Array]:
    """The array on which the windows lie, [N, T, *S, C], and one entry per window, [N, T, *S', O].

    For a convolution these are the inputs and the deltas. For a transposed convolution they are the
    deltas and the inputs: its kernel gradient is that of the convolution that it transposes, with
    inputs and outputs exchanged (`as_kernel`).
    """
    x, y = as_images(signal, signal.inputs), as_images(signal, signal.deltas)
    return (y, x) if signal.geometry.transposed else (x, y)


def patched(signal: Conv) -> Outer:
    """The signal of each group's matrix, with arrays [G, N, T, ...].

    `as_kernel` turns the per-example gradients of these matrices into those of the kernel.
    """
    x, y = windowed(signal)
    return _outers(taps(_folded(x), signal.geometry), y, signal.geometry)


def patched_outputs(signal: Conv) -> Outer:
    """The signal of each group's matrix, with one patch for each output: the inputs that it sees.

    `kronecker` needs this form. For a convolution it is `patched(signal)`. For a transposed
    convolution with strides, most entries of these patches are zero. To compute its gradients, use
    `patched`, which takes fewer products.
    """
    if not signal.geometry.transposed:
        return patched(signal)
    x, deltas = as_images(signal, signal.inputs), as_images(signal, signal.deltas)
    parts = placed(_folded(x), signal.geometry, deltas.shape[2:-1])
    return _outers(parts, deltas, signal.geometry)


def map_place_gradients(function: Callable[[jax.Array], jax.Array], signal: Conv) -> jax.Array:
    """Applies a function to the per-example gradients at one place of the kernel after another.

    The function gets gradients [G, N, I / G, O / G]. Together, those of the K places are the
    gradients of `patched`, but only one place's are in memory at a time. Returns [K, ...].
    """
    x, y = windowed(signal)
    y, groups = as_positions(y), signal.geometry.groups
    grouped = _in_groups(y, signal.geometry)

    def at(seen):
        seen = _unfolded(seen, x.shape[0])
        if seen.shape[-1] == groups:
            # Depthwise: moving the groups to the front before the sum takes ten times as long.
            sums = jnp.sum(jnp.repeat(seen, y.shape[-1] // groups, axis=-1) * y, axis=1)
            return function(jnp.moveaxis(sums.reshape(x.shape[0], groups, 1, -1), 1, 0))
        return function(jnp.einsum("gnti,gnto->gnio", _in_groups(seen, signal.geometry), grouped))

    return map_taps(at, _folded(x), signal.geometry)


def map_examples(function: Callable[[jax.Array], PyTree], signal: Conv) -> tuple[jax.Array, PyTree]:
    """Forms the gradient of one example after another, [*K, I, O], in a loop; without groups.

    Returns the sum of the gradients, and the results of a function of each, [N, ...].
    """
    x, y = windowed(signal)

    def add(total, example):
        images, windows = example
        gradient = block_gradient(images, windows, signal.geometry)
        if signal.geometry.transposed:
            gradient = exchanged(gradient, 1)
        return total + gradient, function(gradient)

    shape = *signal.geometry.kernel, signal.inputs.shape[-1], signal.deltas.shape[-1]
    zeros = varying_with((x, y), jnp.zeros(shape, jnp.result_type(x, y)))
    return lax.scan(add, zeros, (x, y))


def as_kernel(gradients: jax.Array, geometry: Geometry) -> jax.Array:
    """Reshapes gradients [G, N, K I / G, O / G] or [G, N, K, I / G, O / G] to [N, *K, I / G, O].

    For a transposed convolution it also exchanges inputs and outputs.
    """
    groups, *_, o = gradients.shape
    rows = jnp.moveaxis(gradients, 0, -2)
    kernel = reshaped(rows, *geometry.kernel, -1, groups * o)
    return exchanged(kernel, groups) if geometry.transposed else kernel


def _outers(parts: Iterable[jax.Array], y: jax.Array, geometry: Geometry) -> Outer:
    """The signal of each group's matrix, from the inputs at each place, [N T, *S', C], and y."""
    patches = jnp.concatenate(list(parts), axis=-1)
    y = as_positions(y)
    patches = _unfolded(patches, y.shape[0])
    return Outer(
        _in_groups(patches, geometry, places=math.prod(geometry.kernel)),
        _in_groups(y, geometry),
    )


def _folded(x):
    """Reshapes [N, T, *S, C] to [N T, *S, C]."""
    return x.reshape(-1, *x.shape[2:])


def _unfolded(x, n):
    """Reshapes [N T, *S, C] to [N, T S, C]."""
    return as_positions(x.reshape(n, -1, *x.shape[1:]))


def _in_groups(x, geometry, *, places=1):
    """Splits [N, T, C] into groups, [G, N, T, C / G].

    The axis C holds the channels of one place of the kernel after another, each with all groups.
    """
    n, t, c = x.shape
    parts = x.reshape(n, t, places, geometry.groups, -1)
    return jnp.moveaxis(parts, 3, 0).reshape(geometry.groups, n, t, c // geometry.groups)
