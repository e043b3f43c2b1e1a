"""Columns: several errors that go back at once, along an axis that `jax.vmap` maps."""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def every_column(x: jax.Array, columns: str | None) -> jax.Array:
    """The array of each column, [K, ...], with the mapped axis as first axis.

    Not to be called inside another `vmap` than that over the columns.

    Args:
      x: the array of one column.
      columns: the name of the mapped axis; without it there is one column, and K is 1.
    """
    if columns is None:
        return x[None]
    size = jax.lax.axis_size(columns)

    # As jax.lax.all_gather, which raises for a mapped axis inside shard_map (JAX 0.10.2).
    @custom_vmap
    def every(x):
        return jnp.broadcast_to(x, (size, *x.shape))

    @every.def_vmap
    def _(axis_size, in_batched, x):
        del axis_size, in_batched
        return x, False

    return every(x)
