"""Segments: the loop over the steps and the sweep back, with recomputation.

Only the state before each segment of k steps is kept. On the way back the steps of one segment at
a time run again, and are swept. The numbers are those of `run_steps` and `sweep_steps`.

Source:
  "Training Deep Nets with Sublinear Memory Cost", Chen, Xu, Zhang, Guestrin, 2016.
"""

import functools

import jax
import jax.numpy as jnp

from jaxbp.layers.through_time import run_steps, sweep_steps


def run_segments(cell, params, x, mask, state, size, reverse):
    """The outputs of `run_steps`, and the state before each segment, [T / size, N, H] a part."""

    def run(carry, start):
        state, y = carry
        own, own_mask = _steps(x, start, size), _steps(mask, start, size)
        new, after, *_ = run_steps(cell, params, own, own_mask, state, reverse)
        return (after, jax.lax.dynamic_update_slice_in_dim(y, new, start, axis=1)), state

    y = jnp.zeros((*x.shape[:2], cell.features), x.dtype)
    (_, y), states = jax.lax.scan(run, (state, y), _starts(x, size), reverse=reverse)
    return y, states


def sweep_segments(cell, params, carrier, x, h, states, mask, cuts, dy, dstate, size, reverse):
    """What `sweep_steps` gives: the deltas of all steps, and dE/d of the first state.

    `params` are those of the forward pass, `carrier` is the tree that carries the error.
    """

    def sweep(carry, own):
        dstate, *deltas = carry
        start, state = own
        # Without the barrier XLA would run all segments first, and keep what each of them needs.
        state, dstate = jax.lax.optimization_barrier((state, dstate))
        steps = functools.partial(_steps, start=start, size=size)
        there = steps(mask)
        _, _, kept, before = run_steps(cell, params, steps(x), there, state, reverse)
        before = steps(h), *before
        new, dstate = sweep_steps(
            cell, carrier, kept, before, there, steps(cuts, axis=0), steps(dy), dstate, reverse
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return (dstate, *map(put, deltas, new, [start] * len(new))), None

    zeros = jnp.zeros((*x.shape[:2], cell.gates * cell.features), x.dtype)
    (dstate, *deltas), _ = jax.lax.scan(
        sweep,
        (dstate, *[zeros] * (1 + cell.recurrent_bias)),
        (_starts(x, size), states),
        reverse=not reverse,
    )
    return deltas, dstate


def _starts(x, size):
    """The first position of each segment."""
    return jnp.arange(0, x.shape[1], size)


def _steps(array, start, size, axis=1):
    """The steps of one segment, of an array [N, T, ...] or of None."""
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, size, axis=axis)
