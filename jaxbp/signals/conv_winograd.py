"""Winograd's convolution: a kernel of 3 x 3 in fewer multiplications.

Outputs are computed in tiles of 2 x 2. A tile sees 4 x 4 inputs, and takes 16 products instead of
36 for each pair of channels. With d the inputs of a tile, w the kernel and * elementwise:

    y = A^T ((G w G^T) * (B^T d B)) A,   summed over the input channels

The transformed kernels are 16 matrices [I, O], and the transformed inputs 16 matrices [tiles, I].
So the products are 16 products of matrices. The transforms only add, subtract and halve.

The rounding error is about that of the direct sum. But an output is computed from all inputs that
its tile sees. So it is not exactly zero where all inputs that it sees itself are zero, and an input
that is not finite spoils all outputs of its tile.

Source:
  "Fast Algorithms for Convolutional Neural Networks", Lavin, Gray, 2016: F(2 x 2, 3 x 3).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxbp.signals.kinds import as_rows

Rows: TypeAlias = Sequence[jax.Array]
Grid: TypeAlias = Sequence[Rows]


def transformed_kernel(weight: jax.Array) -> jax.Array:
    """G w G^T of a kernel [3, 3, I, O], [16, I, O]."""
    return _stacked(_transformed(_of_kernel, weight))


def convolved_in_tiles(
    x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """The outputs y_t = sum_k x_u W_k, [N, *S', O], of x [N, *S, I] and a transformed kernel."""
    n, sizes = x.shape[0], x.shape[1:-1]
    counts = [size + sum(pair) - 2 for size, pair in zip(sizes, padding, strict=True)]
    tiles = [-(-count // 2) for count in counts]
    inputs = _stacked(_transformed(_of_inputs, _seen(x, padding, tiles)))
    products = jnp.einsum("pti,pio->pto", inputs, kernel)
    outputs = _transformed(_of_products, products.reshape(4, 4, n, *tiles, -1))
    y = jnp.stack([jnp.stack(row, axis=3) for row in outputs], axis=2)
    y = y.reshape(n, *(2 * count for count in tiles), -1)
    return y[:, : counts[0], : counts[1]]


def _seen(x, padding, tiles):
    """The inputs at each of the 4 x 4 places of all tiles, each [N, *tiles, I]."""
    pairs = [
        (before, 2 * count + 2 - size - before, 0)
        for (before, _), count, size in zip(padding, tiles, x.shape[1:-1], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pairs, (0, 0, 0)])
    ends = [2 * count - 1 for count in tiles]
    return [[x[:, a : a + ends[0] : 2, b : b + ends[1] : 2] for b in range(4)] for a in range(4)]


def _transformed(rows: Callable[[Rows], list[jax.Array]], grid: Grid | jax.Array) -> Grid:
    """M^T g M of a grid, with M^T a transform of its rows."""
    columns = [rows(column) for column in zip(*grid, strict=True)]
    return [rows(row) for row in zip(*columns, strict=True)]


def _of_inputs(d):
    """B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(w):
    """G w."""
    outer = w[0] + w[2]
    return [w[0], (outer + w[1]) / 2, (outer - w[1]) / 2, w[2]]


def _of_products(m):
    """A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _stacked(grid):
    """The entries [..., C] of a grid as matrices, [entries, rows, C]."""
    return jnp.stack([as_rows(entry) for row in grid for entry in row])
