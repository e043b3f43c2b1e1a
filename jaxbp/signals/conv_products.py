"""The three products of a convolution: forward, transpose and kernel gradient.

With u the input that the window at t sees at place k of the kernel (see `conv_windows`), and
W [*K, I, O] the kernel:

    forward       y_t = sum_k x_u W_k            `convolve`
    transpose     x_u = sum_k y_t W_k^T          `convolve_transpose`, over the t and k with that u
    gradient      W_k = sum_nt x_nu y_nt^T       `kernel_gradient`

With G groups, the inputs and the outputs are split into G groups of neighbouring channels, and each
group of outputs sees one group of inputs. W is then [*K, I / G, O].

XLA's CPU compiler is slow for some shapes. For those, the products are computed as sums over the
places of the kernel, or group by group (`_is_depthwise`, `_has_few_products`, `_is_small`). It also
runs convolutions with many channels on one core. On a CPU these are computed as products of
matrices, which it runs on all cores, a block of images at a time (`_suits_tiles`, `suits_blocks`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from jaxbp.sharding import pieces_of, placement, summed_products, varying_with
from jaxbp.signals.conv_windows import Geometry
from jaxbp.signals.conv_winograd import convolved_in_tiles, transformed_kernel
from jaxbp.signals.kinds import as_rows
from jaxbp.types import Shape, widened


def convolve(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    """The outputs y_t = sum_k x_u W_k, [N, *S', O], of x [N, *S, I] and W [*K, I / G, O]."""
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
    return _convolved(
        *(x, weight, geometry),
        window_strides=geometry.strides,
        padding=geometry.padding,
        rhs_dilation=geometry.dilation,
    )


def convolve_transpose(
    y: jax.Array, weight: jax.Array, geometry: Geometry, sizes: Shape
) -> jax.Array:
    """The sums x_u = sum_k y_t W_k^T, [N, *S, I], of y [N, *S', O] and W [*K, I / G, O].

    As a convolution: y is spread out, with s - 1 zeros between its entries, and convolved with the
    kernel flipped and its inputs and outputs exchanged.
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
    return _convolved(
        *(y, jnp.flip(exchanged(weight, 1), range(rank)), geometry),
        window_strides=(1,) * rank,
        padding=padding,
        lhs_dilation=geometry.strides,
        rhs_dilation=geometry.dilation,
    )


def kernel_gradient(x: jax.Array, y: jax.Array, geometry: Geometry) -> jax.Array:
    """The gradient W_k = sum_nt x_nu y_nt^T, [*K, I / G, O], of x [N, *S, I] and y [N, *S', O].

    As a convolution: it sums over the examples instead of the inputs, and strides and dilation are
    exchanged, because u moves by d when k moves by one.
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
        # Here matrix products take a third of the time of XLA's convolution on a CPU (JAX 0.10.2:
        # 25 ms against 80 for 64 x 8 x 8 x 8 x 16, and 2.8 ms against 8.7 for 64 x 16 x 16 x 64
        # with one place). With two axes and more places, twice the time.
        products = map_taps(lambda seen: summed_products(seen, y), x, geometry)
        return products.reshape(*geometry.kernel, *products.shape[1:])
    if (
        suits_blocks(x, geometry)
        and x.shape[-1] * math.prod((*geometry.kernel, *y.shape[1:])) >= LARGE
    ):
        return lax.platform_dependent(
            *(x, y),
            cpu=functools.partial(_sum_of_blocks, geometry=geometry),
            default=functools.partial(_as_convolution, geometry=geometry),
        )
    return _as_convolution(x, y, geometry)


# The number of multiplications for one image from which blocks of images are faster than XLA's
# convolution. Times on 2 cores in ms for the gradient of a kernel of 3 x 3, in blocks against that:
# 10 / 34 for 64 x 16 x 16 x 64 to 64 outputs, 8 / 13 for 64 x 28 x 28 x 16 to 32 outputs, and
# 6.6 / 6.4 for 64 x 32 x 32 x 3 to 64 outputs (JAX 0.10.2). Convolutions may run side by side, and
# smaller ones then take less time in a whole backward pass.
LARGE = 3_000_000
# The number of positions of a block: enough for an efficient product of matrices.
POSITIONS = 2048


def suits_blocks(x: jax.Array, geometry: Geometry) -> bool:
    """Whether a CPU may compute the gradient of x [N, ...] in a loop over images or examples.

    The loop would gather arrays that are divided over devices, and in the automatic mode a program
    does not know whether they are.
    """
    return (
        geometry.groups == 1
        and jax.device_count() == 1
        and math.prod(geometry.kernel) <= 64  # the places of the kernel are traced one by one
        and not any(map(export.is_symbolic_dim, x.shape))
    )


def block_gradient(x: jax.Array, y: jax.Array, geometry: Geometry) -> jax.Array:
    """The `kernel_gradient` of a few images, without groups, as one product of matrices.

    With stride 1 along the first axis of positions, y is shifted for the places k along this axis,
    and x for the places l along the others:

        W_kl = sum_nt x_{n, t + k + l} y_nt^T = sum_nu x_{n, u + l} y_{n, u - k}^T

    A kernel of 3 x 3 then takes 3 copies of x and 3 of y instead of 9 of x. With other strides, x
    is shifted for all places.
    """
    i, o = x.shape[-1], y.shape[-1]
    if geometry.strides[0] == 1:
        _, size, *across = x.shape[:-1]
        seen = taps(x.reshape(-1, *across, i), geometry.along(slice(1, None)))
        rows = y.reshape(*y.shape[:2], -1)
        deltas = list(placed(rows, geometry.along(slice(1)), (size,)))
    else:
        seen, deltas = taps(x, geometry), [y]
    left = jnp.concatenate([at.reshape(-1, i) for at in seen], axis=-1)
    right = jnp.concatenate([at.reshape(-1, o) for at in deltas], axis=-1)
    products = (left.T @ right).reshape(-1, i, len(deltas), o)
    return jnp.moveaxis(products, -2, 0).reshape(*geometry.kernel, i, o)


def _sum_of_blocks(x, y, geometry):
    """The `kernel_gradient` as a sum over blocks of images."""
    size = divisor(x.shape[0], at_most=POSITIONS // math.prod(y.shape[1:-1]))

    def add(total, block):
        images, windows = block
        return total + block_gradient(images, windows, geometry), None

    zeros = jnp.zeros((*geometry.kernel, x.shape[-1], y.shape[-1]), x.dtype)
    blocks = tuple(a.reshape(-1, size, *a.shape[1:]) for a in (x, y))
    return lax.scan(add, varying_with((x, y), zeros), blocks)[0]


def divisor(n: int, *, at_most: int) -> int:
    """The largest divisor of n that is at most this number, but at least 1."""
    return next((size for size in range(min(n, at_most), 1, -1) if n % size == 0), 1)


def _as_convolution(x, y, geometry):
    """The `kernel_gradient` by XLA's convolution."""
    rank = len(geometry.kernel)
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
            (rank + 1, 0, *positions),  # x: its channels are the batch; examples are summed over
            (rank + 1, 0, *positions),  # y: the kernel of this convolution, with O outputs
            (rank, rank + 1, *range(rank)),
        ),
        out_sharding=placement(x, *[None] * rank, (x, -1), (y, -1)),
    )


def exchanged(weight: jax.Array, groups: int) -> jax.Array:
    """Exchanges the inputs and outputs of a kernel, [*K, I / G, O] to [*K, O / G, I]."""
    *kernel, i, o = weight.shape
    parts = weight.reshape(*kernel, i, groups, o // groups)
    return jnp.swapaxes(parts, -3, -1).reshape(*kernel, o // groups, groups * i)


def taps(x: jax.Array, geometry: Geometry, *, fill: float = 0.0) -> Iterator[jax.Array]:
    """Yields, for one place of the kernel after another, the inputs that it sees, [N, *S', C].

    Args:
      x: the inputs, [N, *S, C].
      geometry: where the windows lie.
      fill: the value of the padding.
    """
    counts = geometry.count(x.shape[1:-1])
    x = _padded(x, geometry, fill)
    for place in np.ndindex(*geometry.kernel):
        first = [axis.dilation * k for axis, k in zip(geometry.axes, place, strict=True)]
        reach = zip(first, geometry.strides, counts, strict=True)
        end = [at + s * (n - 1) + 1 for at, s, n in reach]
        yield lax.slice(
            x, (0, *first, 0), (x.shape[0], *end, x.shape[-1]), (1, *geometry.strides, 1)
        )


def map_taps(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, geometry: Geometry
) -> jax.Array:
    """Applies a function to each of the `taps`, in a compiled loop that holds one at a time.

    Returns its results, stacked to [K, ...].
    """
    counts = geometry.count(x.shape[1:-1])
    x = _padded(x, geometry)
    reach = [s * (n - 1) + 1 for s, n in zip(geometry.strides, counts, strict=True)]
    first = np.zeros((math.prod(geometry.kernel), x.ndim), np.int32)
    first[:, 1:-1] = np.array(list(np.ndindex(*geometry.kernel))) * geometry.dilation

    def at(first):
        reached = lax.dynamic_slice(x, tuple(first), (x.shape[0], *reach, x.shape[-1]))
        steps = (1, *geometry.strides, 1)
        return function(lax.slice(reached, (0,) * x.ndim, reached.shape, steps))

    return lax.map(at, jnp.asarray(first))


def placed(x: jax.Array | list[jax.Array], geometry: Geometry, sizes: Shape) -> Iterator[jax.Array]:
    """Yields, for one place of the kernel after another, x put at the positions that it sees.

    This is the transpose of `taps`: the entry of x for the window at t goes to the position that
    the window sees at this place. The other positions are zero, and the result is [N, *S, C].

    Args:
      x: one entry for each window, [N, *S', C], or a list with such an array for each place.
      geometry: where the windows lie.
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


def summed(arrays: Iterable[jax.Array], dtype: DTypeLike) -> jax.Array:
    """The sum of arrays of this dtype; numbers of 16 bits are accumulated in 32."""
    return functools.reduce(jnp.add, map(widened, arrays)).astype(dtype)


def _convolved(x: jax.Array, weight: jax.Array, geometry: Geometry, **options: Any) -> jax.Array:
    """The convolution of images [N, *S, I] and a kernel [*K, I, O], [N, *S', O].

    The windows are those of `options`. They are as far apart as those of the geometry.
    """
    by_xla = functools.partial(_convolved_by_xla, **options)
    if not _suits_tiles(x, weight, geometry):
        return by_xla(x, weight)
    tiles = 16 * math.prod(x.shape[1:-1]) // 4 * max(weight.shape[-2:])
    size = divisor(x.shape[0], at_most=TILES // tiles)

    def by_tiles(x, weight):
        kernel, blocks = transformed_kernel(weight), x.reshape(-1, size, *x.shape[1:])
        y = lax.map(lambda block: convolved_in_tiles(block, kernel, options["padding"]), blocks)
        return y.reshape(-1, *y.shape[2:])

    return lax.platform_dependent(x, weight, cpu=by_tiles, default=by_xla)


# The number of entries of the transformed tiles of a block of images, which fit into a cache.
TILES = 2**18


def _suits_tiles(x: jax.Array, weight: jax.Array, geometry: Geometry) -> bool:
    """Whether Winograd's convolution is faster on a CPU than XLA's.

    Times on 2 cores in ms, against XLA's convolution (JAX 0.10.2): 7 / 12 for 64 x 16 x 16 x 64 to
    64 outputs, and 0.7 / 1.0 for 64 x 8 x 8 x 32 to 64 outputs; but 1.0 / 0.8 for 64 x 14 x 14 x 16
    to 32 outputs.
    """
    return (
        geometry.kernel == (3, 3)
        and geometry.strides == geometry.dilation == (1, 1)
        and min(weight.shape[-2:]) >= 32
        and x.dtype.itemsize >= 4
        and suits_blocks(x, geometry)
    )


def _convolved_by_xla(x: jax.Array, weight: jax.Array, **options: Any) -> jax.Array:
    """XLA's convolution.

    Where the images are divided over devices, `vmap` over images batches them behind the examples,
    [N K, ...], which stay where they are. JAX's own rule batches them in front, [K N, ...], which
    gathers them on all devices.
    """

    def plain(x, weight):
        numbers = _channels_last(x.ndim - 2)
        return lax.conv_general_dilated(x, weight, dimension_numbers=numbers, **options)

    if pieces_of(x) == 1:
        return plain(x, weight)

    batched = custom_vmap(plain)
    convolved = jax.custom_jvp(batched)  # autodiff cannot transpose a custom_vmap

    @batched.def_vmap
    def _(size, in_batched, x, weight):
        del size
        if in_batched != [True, False]:
            axes = tuple(0 if batched else None for batched in in_batched)
            return jax.vmap(plain, axes)(x, weight), True
        images = jnp.moveaxis(x, 0, 1)
        y = _convolved_by_xla(images.reshape(-1, *images.shape[2:]), weight, **options)
        return jnp.moveaxis(y.reshape(*images.shape[:2], *y.shape[1:]), 1, 0), True

    @convolved.defjvp
    def _(primals, tangents):
        (x, weight), (dx, dweight) = primals, tangents
        return convolved(x, weight), plain(dx, weight) + plain(x, dweight)

    return convolved(x, weight)


def _is_depthwise(weight: jax.Array, geometry: Geometry) -> bool:
    """Whether each output sees one input channel, so that all products are elementwise.

    XLA's CPU compiler is slow at grouped convolutions. Times in ms for 64 x 16 x 16 x 64 and a
    kernel of 3 x 3, computed as here against XLA's convolution:

                                      forward        transpose      gradient
        depthwise, place by place     0.8 / 28       0.6 / 38       4 / 24
        4 groups, one by one          8 / 33         11 / 56        11 / 880
    """
    return weight.shape[-2] == 1 < geometry.groups


def _has_few_products(weight: jax.Array) -> bool:
    """Whether an output is a sum over so few inputs and places that elementwise sums are faster.

    XLA's CPU compiler fuses them into one loop (JAX 0.10.2). Times for a kernel of 3 x 3, as sums
    against XLA's convolution: 0.2 ms against 1.6 for 64 x 28 x 28 x 1 to 16 outputs; 0.7 against
    2.2 for 64 x 32 x 32 x 3 to 16 outputs; 3.2 against 4.0 to 64 outputs.
    """
    *kernel, i, _ = weight.shape
    return i <= 3 and math.prod(kernel) * i <= 27


def _is_small(sizes: Shape, geometry: Geometry) -> bool:
    """Whether an image has fewer positions along an axis than the kernel has places.

    XLA's CPU compiler then convolves without matrix products (JAX 0.10.2). Times in ms for 64
    images, by one matrix product for each place against XLA's convolution:

                                            forward       transpose
        2 x 2 x 128, kernel of 3 x 3        0.9 / 6.7     1.1 / 5.5
        6 x 6 x 64, kernel of 7 x 7         8 / 69        11 / 67
    """
    return any(size < k for size, k in zip(sizes, geometry.kernel, strict=True))


def _group_by_group(
    function: Callable[..., jax.Array], geometry: Geometry, *operands: jax.Array
) -> jax.Array:
    """Applies a product to one group after another; the last axis of each array has them."""
    one = dataclasses.replace(geometry, groups=1)
    parts = zip(*(jnp.split(a, geometry.groups, axis=-1) for a in operands), strict=True)
    return jnp.concatenate([function(*part, one) for part in parts], axis=-1)


def _by_place(weight: jax.Array) -> jax.Array:
    """Reshapes a kernel [*K, I, O] to [K, I, O]."""
    return weight.reshape(-1, *weight.shape[-2:])


def _padded(x: jax.Array, geometry: Geometry, fill: float = 0.0) -> jax.Array:
    pairs = [(0, 0, 0), *((axis.before, axis.after, 0) for axis in geometry.axes), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), pairs)


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    positions = tuple(range(1, rank + 1))
    images = (0, rank + 1, *positions)
    return lax.ConvDimensionNumbers(images, (rank + 1, rank, *range(rank)), images)
