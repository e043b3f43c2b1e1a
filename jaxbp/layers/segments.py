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

from jaxbp.layers.through_time import Arrays, Loop, run_steps, sweep_steps
from jaxbp.types import Params


def run_segments(
    loop: Loop, params: Params, x: jax.Array, state: Arrays, size: int
) -> tuple[jax.Array, Arrays]:
    """The forward pass in segments of `size` steps.

    Returns:
      The outputs [N, T, H], and the state before each segment, an array [T / size, N, H] for each
      part of the state.
    """

    def run(carry, start):
        state, y = carry
        y_of_segment, after, *_ = run_steps(
            _segment_of(loop, start, size), params, _steps(x, start, size), state
        )
        return (after, jax.lax.dynamic_update_slice_in_dim(y, y_of_segment, start, axis=1)), state

    y = jnp.zeros((*x.shape[:2], loop.cell.features), x.dtype)
    (_, y), states = jax.lax.scan(run, (state, y), _starts(x, size), reverse=loop.reverse)
    return y, states


def sweep_segments(
    loop: Loop,
    params: Params,
    carrier: Params,
    x: jax.Array,
    h: jax.Array,
    states: Arrays,
    dy: jax.Array,
    size: int,
) -> tuple[Arrays, Arrays]:
    """The backward pass in segments of `size` steps; returns what `sweep_steps` returns.

    Args:
      loop: that of the forward pass.
      params: the parameters of the forward pass, to run the steps again.
      carrier: the parameters that carry the error.
      x: the inputs [N, T, I].
      h: the output before each step, [N, T, H].
      states: the state before each segment, from `run_segments`.
      dy: the derivative with respect to the outputs, [N, T, H].
      size: the number of steps of a segment.
    """
    cell, reverse = loop.cell, loop.reverse

    def sweep(carry, segment):
        dstate, *deltas = carry
        start, state = segment
        # Without the barrier XLA runs the steps of all segments first, and keeps what each needs.
        state, dstate = jax.lax.optimization_barrier((state, dstate))
        part = _segment_of(loop, start, size)
        steps = functools.partial(_steps, start=start, size=size)
        _, _, kept, before = run_steps(part, params, steps(x), state)
        deltas_of_segment, dstate = sweep_steps(
            part, carrier, kept, (steps(h), *before), steps(dy), dstate
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return (dstate, *map(put, deltas, deltas_of_segment)), None

    dstate = tuple(jnp.zeros_like(part[0]) for part in states)
    zeros = jnp.zeros((*x.shape[:2], cell.gates * cell.features), x.dtype)
    (dstate, *deltas), _ = jax.lax.scan(
        sweep,
        (dstate, *[zeros] * (1 + cell.recurrent_bias)),
        (_starts(x, size), states),
        reverse=not reverse,
    )
    return tuple(deltas), dstate


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
