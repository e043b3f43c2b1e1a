"""The three products that a convolution consists of, over what each place of its kernel sees.

With u the input that the window at t sees at its place k (see `windows`), and W [*K, I, O]:

  forward       y_t = sum_k x_u W_k            `convolve`
  transpose     x_u = sum_k y_t W_k^T          `convolve_transpose`, over the t, k with that u
  gradient      W_k = sum_nt x_nu y_nt^T       `kernel_gradient`

With G groups, the inputs and the outputs are split into G of neighbours, the first outputs see the
first inputs, and W is [*K, I / G, O].
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbp.signals.kinds import as_rows
from jaxbp.types import widened


def convolve(x, weight, geometry):
    """y_t = sum_k x_u W_k: [N, *S, I] and [*K, I / G, O] to [N, *S', O]."""
    if _is_depthwise(weight, geometry):
        copies = weight.shape[-1] // geometry.groups
        pairs = zip(taps(x, geometry), _by_place(weight), strict=True)
        return summed((jnp.repeat(seen, copies, axis=-1) * at[0] for seen, at in pairs), x.dtype)
    if geometry.groups > 1:
        return _group_by_group(convolve, geometry, x, weight)
    pairs = zip(taps(x, geometry), _by_place(weight), strict=True)
    if _has_few_products(weight):
        products = (seen[..., i, None] * at[i] for seen, at in pairs for i in range(len(at)))
        return summed(products, x.dtype)
    if _is_small(x.shape[1:-1], geometry):
        return summed((seen @ at for seen, at in pairs), x.dtype)
    return lax.conv_general_dilated(
        x,
        weight,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=_channels_last(len(geometry.kernel)),
    )


def convolve_transpose(y, weight, geometry, sizes):
    """x_u = sum_k y_t W_k^T: [N, *S', O] and [*K, I / G, O] to [N, *S, I].

    The y are put s apart, with zeros between them, and are seen by the kernel from its other end.
    """
    if _is_depthwise(weight, geometry):
        copies = (*y.shape[:-1], geometry.groups, -1)
        parts = [jnp.sum((y * at[0]).reshape(copies), axis=-1) for at in _by_place(weight)]
        return summed(placed(parts, geometry, sizes), y.dtype)
    if geometry.groups > 1:
        return _group_by_group(
            functools.partial(convolve_transpose, sizes=sizes), geometry, y, weight
        )
    if _is_small(y.shape[1:-1], geometry):
        parts = [y @ at.T for at in _by_place(weight)]
        return summed(placed(parts, geometry, sizes), y.dtype)
    rank = len(geometry.kernel)
    padding = [
        (axis.span - 1 - axis.before, size - axis.stride * (n - 1) - 1 + axis.before)
        for axis, size, n in zip(geometry.axes, sizes, y.shape[1:-1], strict=True)
    ]
    return lax.conv_general_dilated(
        y,
        jnp.flip(exchanged(weight, 1), range(rank)),
        (1,) * rank,
        padding,
        lhs_dilation=geometry.strides,
        rhs_dilation=geometry.dilation,
        dimension_numbers=_channels_last(rank),
    )


def kernel_gradient(x, y, geometry):
    """W_k = sum_nt x_nu y_nt^T: [N, *S, I] and [N, *S', O] to [*K, I / G, O].

    A convolution again, over examples in place of inputs, in which strides and dilation change
    places: as k moves by one, u moves by d.
    """
    groups, rank = geometry.groups, len(geometry.kernel)
    if groups == x.shape[-1] > 1:  # depthwise
        copies = y.shape[-1] // groups

        def sum_products(seen):
            return jnp.sum(as_rows(jnp.repeat(seen, copies, axis=-1) * y), axis=0)

        return map_taps(sum_products, x, geometry).reshape(*geometry.kernel, 1, y.shape[-1])
    if groups > 1:
        return _group_by_group(kernel_gradient, geometry, x, y)
    if rank == 3 or math.prod(geometry.kernel) == 1:
        # By matrix products XLA for CPUs takes a third of the time (JAX 0.10.2; 64 x 8 x 8 x 8 x 16
        # in 25 ms and in 80, 64 x 16 x 16 x 64 in 2.8 and in 8.7); of two axes, twice as much.
        products = map_taps(lambda seen: as_rows(seen).T @ as_rows(y), x, geometry)
        return products.reshape(*geometry.kernel, *products.shape[1:])
    positions = tuple(range(1, rank + 1))
    padding = [
        (axis.before, axis.covered(n) - size - axis.before)
        for axis, size, n in zip(geometry.axes, x.shape[1:-1], y.shape[1:-1], strict=True)
    ]
    return lax.conv_general_dilated(
        x,
        y,
        geometry.dilation,
        padding,
        rhs_dilation=geometry.strides,
        dimension_numbers=lax.ConvDimensionNumbers(
            (rank + 1, 0, *positions),  # of x: the inputs are the batch, the examples summed over
            (rank + 1, 0, *positions),  # of y: it is the kernel, of O outputs
            (rank, rank + 1, *range(rank)),
        ),
    )


def exchanged(weight, groups):
    """The kernel with inputs and outputs exchanged, [*K, I / G, O] to [*K, O / G, I]."""
    *kernel, i, o = weight.shape
    parts = weight.reshape(*kernel, i, groups, o // groups)
    return jnp.swapaxes(parts, -3, -1).reshape(*kernel, o // groups, groups * i)


def taps(x, geometry, *, fill=0.0):
    """What each place of the kernel sees, [N, *S', C], for one place after another: K of them.

    Args:
      x: [N, *S, C].
      geometry: of the windows.
      fill: what lies outside of x.
    """
    counts = geometry.count(x.shape[1:-1])
    x = _padded(x, geometry, fill)
    for place in np.ndindex(*geometry.kernel):
        first = [axis.dilation * k for axis, k in zip(geometry.axes, place, strict=True)]
        reach = zip(first, geometry.strides, counts, strict=True)
        end = [at + s * (n - 1) + 1 for at, s, n in reach]
        yield lax.slice(x, (0, *first, 0), (len(x), *end, x.shape[-1]), (1, *geometry.strides, 1))


def map_taps(function, x, geometry):
    """What a function gives for each of the `taps`, [K, ...], in a loop that holds but one."""
    counts = geometry.count(x.shape[1:-1])
    x = _padded(x, geometry)
    reach = [s * (n - 1) + 1 for s, n in zip(geometry.strides, counts, strict=True)]
    first = np.zeros((math.prod(geometry.kernel), x.ndim), np.int32)
    first[:, 1:-1] = np.array(list(np.ndindex(*geometry.kernel))) * geometry.dilation

    def at(first):
        reached = lax.dynamic_slice(x, tuple(first), (len(x), *reach, x.shape[-1]))
        steps = (1, *geometry.strides, 1)
        return function(lax.slice(reached, (0,) * x.ndim, reached.shape, steps))

    return lax.map(at, jnp.asarray(first))


def placed(x, geometry, sizes):
    """For one place after another, [N, *S, C] with each of x [N, *S', C] where that place sees it.

    The transpose of `taps` is to take an x for each place, and the sum of what comes of them.

    Args:
      x: [N, *S', C], or one for each place.
      geometry: of the windows.
      sizes: S.
    """
    places = list(np.ndindex(*geometry.kernel))
    parts = x if isinstance(x, list) else [x] * len(places)
    for place, part in zip(places, parts, strict=True):
        pairs = []
        for axis, k, n, size in zip(geometry.axes, place, part.shape[1:-1], sizes, strict=True):
            first = axis.dilation * k - axis.before
            last = first + axis.stride * (n - 1)
            pairs.append((first, size - 1 - last, axis.stride - 1))
        yield lax.pad(part, jnp.zeros((), part.dtype), [(0, 0, 0), *pairs, (0, 0, 0)])


def summed(arrays, dtype):
    """The sum of arrays of one dtype, which of numbers of 16 bits is taken in 32."""
    return functools.reduce(jnp.add, map(widened, arrays)).astype(dtype)


def _is_depthwise(weight, geometry):
    """Whether each output sees one input, so that there are products of numbers and no matrices.

    XLA for CPUs is slow at convolutions in groups. Depthwise, 64 x 16 x 16 x 64 with 3 x 3 places,
    by places instead: forward in 0.8 ms and not 28, its transpose in 0.6 and not 38, its gradient
    in 4 and not 24. In four groups, one by one: 8 and not 33, 11 and not 56, 11 and not 880.
    """
    return weight.shape[-2] == 1 < geometry.groups


def _has_few_products(weight):
    """Whether an output is a sum over so few inputs and places that no matrix product pays.

    XLA for CPUs has one loop of sums of products for it (JAX 0.10.2): 3 x 3 places on 64 x 28 x 28
    x 1 to 16 outputs in 0.2 ms, where a convolution takes 1.6, and on 64 x 32 x 32 x 3 in 0.7 and
    not 2.2; to 64 outputs in 3.2 and not 4.0.
    """
    *kernel, i, _ = weight.shape
    return i <= 3 and math.prod(kernel) * i <= 27


def _is_small(sizes, geometry):
    """Whether an image has fewer positions along an axis than the kernel has places.

    XLA for CPUs then convolves without matrix products (JAX 0.10.2). By places instead, 64 images
    of 2 x 2 x 128 and 3 x 3 places: forward in 0.9 ms and not 6.7, its transpose in 1.1 and not
    5.5; 6 x 6 x 64 and 7 x 7 places: in 8 and not 69, and in 11 and not 67.
    """
    return any(size < k for size, k in zip(sizes, geometry.kernel, strict=True))


def _group_by_group(function, geometry, *operands):
    """The groups by themselves, and side by side: the last axis of all operands has them."""
    one = dataclasses.replace(geometry, groups=1)
    parts = zip(*(jnp.split(a, geometry.groups, axis=-1) for a in operands), strict=True)
    return jnp.concatenate([function(*part, one) for part in parts], axis=-1)


def _by_place(weight):
    """A kernel [*K, I, O] as [K, I, O]."""
    return weight.reshape(-1, *weight.shape[-2:])


def _padded(x, geometry, fill=0.0):
    pairs = [(0, 0, 0), *((axis.before, axis.after, 0) for axis in geometry.axes), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), pairs)


def _channels_last(rank):
    positions = tuple(range(1, rank + 1))
    images = (0, rank + 1, *positions)
    return lax.ConvDimensionNumbers(images, (rank + 1, rank, *range(rank)), images)
