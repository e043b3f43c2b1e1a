"""Broadcasting: an array that meets a larger one is repeated over the positions that it lacks.

The rule is stricter than NumPy's. With shapes of one example, [..., O] is the larger array, and the
smaller one may be

    of as many axes   where each size is equal, or 1: [H, W, 1] or [1, 1, O] for [H, W, O]
    one vector        [O] or [1], the same at all positions

The derivative with respect to the smaller array is a sum over what it was repeated for.
"""

import jax
import jax.numpy as jnp

from jaxbp.types import Shape, widened


def fits(shape: Shape, larger: Shape) -> bool:
    """Whether an array of this shape can meet a larger one; both are shapes of one example."""
    aligned = _aligned(shape, larger)
    return len(aligned) == len(larger) and all(
        size in (1, whole) for size, whole in zip(aligned, larger, strict=True)
    )


def expand(x: jax.Array, larger: Shape) -> jax.Array:
    """Gives x [N, ...] the number of axes of the larger array, whose shape is [N, ...] too."""
    return x.reshape(x.shape[0], *_aligned(x.shape[1:], larger[1:]))


def reduce_like(dy: jax.Array, shape: Shape) -> jax.Array:
    """The transpose of broadcasting: sums dy [N, ...] to an array of the smaller one's shape."""
    if dy.shape == shape:
        return dy
    aligned = (shape[0], *_aligned(shape[1:], dy.shape[1:]))
    axes = tuple(a for a, size in enumerate(aligned) if size != dy.shape[a])
    return jnp.sum(widened(dy), axis=axes).reshape(shape).astype(dy.dtype)


def _aligned(shape, larger):
    """A shape with ones for the positions that one vector lacks."""
    return (1,) * (len(larger) - 1) + tuple(shape) if len(shape) == 1 else tuple(shape)
