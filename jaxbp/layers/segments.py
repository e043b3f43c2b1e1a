"""Segments: the loops over the steps with recomputation, to save memory.

The forward pass keeps only the state before each segment of k steps. The backward pass takes one
segment at a time: it runs the steps of the segment again, and then sweeps back through them. The
numbers are those of `run_steps` and `sweep_steps`.

Source:
  "Training Deep Nets with Sublinear Memory Cost", Chen, Xu, Zhang, Guestrin, 2016.
"""

import functools

import jax
import jax.numpy as jnp

from jaxbp.layers.through_time import Arrays, Deltas, Loop, run_steps, sweep_steps
from jaxbp.sharding import zeros_beside
from jaxbp.types import Params


def run_segments(
    loop: Loop, params: Params, x: jax.Array, state: Arrays, size: int
) -> tuple[jax.Array, Arrays, Arrays]:
    """The forward pass in segments of `size` steps.

    Returns:
      The outputs [N, T, H], the last state, and the state before each segment, an array
      [T / size, N, H] for each part of the state.
    """

    def run(carry, start):
        state, y = carry
        y_of_segment, after, _ = run_steps(
            _segment_of(loop, start, size), params, _steps(x, start, size), state
        )
        return (after, jax.lax.dynamic_update_slice_in_dim(y, y_of_segment, start, axis=1)), state

    y = zeros_beside(x, loop.cell.sizes[0])
    (last, y), states = jax.lax.scan(run, (state, y), _starts(x, size), reverse=loop.reverse)
    return y, last, states


def sweep_segments(
    loop: Loop,
    params: Params,
    carrier: Params,
    x: jax.Array,
    h: jax.Array,
    states: Arrays,
    dy: jax.Array,
    dstate: Arrays,
    size: int,
) -> tuple[Deltas, Arrays, Arrays]:
    """The backward pass in segments of `size` steps.

    Returns what `sweep_steps` returns, and the inputs of the product within the steps.

    Args:
      loop: that of the forward pass.
      params: the parameters of the forward pass, to run the steps again.
      carrier: the parameters that carry the error.
      x: the inputs [N, T, I].
      h: the output before each step, [N, T, H].
      states: the state before each segment, from `run_segments`.
      dy: the derivative with respect to the outputs, [N, T, H].
      dstate: the derivative with respect to the last state, without that of its output in dy.
      size: the number of steps of a segment.
    """
    cell, reverse = loop.cell, loop.reverse

    def sweep(carry, segment):
        dstate, arrays = carry
        start, state = segment
        # Without the barrier XLA runs the steps of all segments first, and keeps what each needs.
        state, dstate = jax.lax.optimization_barrier((state, dstate))
        part = _segment_of(loop, start, size)
        at = functools.partial(_steps, start=start, size=size)
        _, _, steps = run_steps(part, params, at(x), state)
        steps = steps._replace(before=(at(h), *steps.before))
        deltas, dstate = sweep_steps(part, carrier, steps, at(dy), dstate)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return (dstate, jax.tree.map(put, arrays, (deltas, steps.inputs))), None

    inner = cell.inner
    arrays = (
        Deltas(
            (zeros_beside(x, cell.gates * cell.features),) * (1 + cell.recurrent_bias),
            () if inner is None else (zeros_beside(x, inner.outputs),),
        ),
        () if inner is None else (zeros_beside(x, inner.inputs),),
    )
    (dstate, (deltas, inputs)), _ = jax.lax.scan(
        sweep, (dstate, arrays), (_starts(x, size), states), reverse=not reverse
    )
    return deltas, dstate, inputs


def _starts(x: jax.Array, size: int) -> jax.Array:
    """The first position of each segment."""
    return jnp.arange(0, x.shape[1], size)


def _steps(array: jax.Array, start, size: int, axis: int = 1) -> jax.Array:
    """The steps of one segment, of an array [N, T, ...]."""
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=axis)


def _segment_of(loop: Loop, start, size: int) -> Loop:
    """The loop over the steps of one segment."""
    mask = None if loop.mask is None else _steps(loop.mask, start, size)
    cuts = None if loop.cuts is None else _steps(loop.cuts, start, size, axis=0)
    return loop._replace(mask=mask, cuts=cuts)
