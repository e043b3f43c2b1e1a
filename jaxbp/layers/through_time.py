"""Through time: the three loops over the steps of a sequence that a recurrent layer consists of.

  run_steps          of a cell, from the first to the last
  sweep_steps        the derivative back through them, from the last to the first (BPTT)
  carry_influences   the same gradients, carried along from the first to the last (RTRL)

They hold a product with U and what is elementwise in the cell, and nothing else that could be one
product over all steps. Arrays are [N, T, ...] and are read and written where they are: between the
loops, one array of memory holds in turn the drives, what is kept of them, and their deltas.

A step that `mask` [N, T] says is not there leaves the state as it was. `reverse` is for sequences
of which the first step is the last position. Letters are those of `cells` and `recurrent`.
"""

import jax
import jax.numpy as jnp


def run_steps(cell, params, x, mask, state, reverse):
    """The outputs, the last state, what is kept, and the state before each step, without its h."""
    drive = x @ params["weight"] + params["bias"]
    y = jnp.zeros((*x.shape[:2], cell.features), x.dtype)

    def step(carry, t):
        state, kept, before, y = carry
        echo = state[0] @ params["recurrent"]
        if cell.recurrent_bias:
            echo = echo + params["recurrent_bias"]
        after, new = cell.forward(_at(kept[0], t), echo, state)
        kept, before = _put(kept, new, t), _put(before, state[1:], t)
        state = _where(mask, t, after, state)
        return (state, kept, before, *_put((y,), state[:1], t)), None

    kept = (drive, *[jnp.zeros_like(drive)] * cell.recurrent_bias)
    start = state, kept, (y,) * (cell.parts - 1), y
    (state, kept, before, y), _ = jax.lax.scan(step, start, _times(y), reverse=reverse)
    return y, state, kept, before


def sweep_steps(cell, carrier, kept, before, mask, cuts, dy, dstate, reverse):
    """The deltas of all steps, in the place of what was kept, and dE/d of the first state."""
    times = _times(dy)
    following = jnp.clip(times + (1 if reverse else -1), 0, len(times) - 1)

    def step(carry, now):
        dstate, own, kept = carry
        t, following, cut = now
        here = dstate[0] + _at(dy, t), *dstate[1:]
        new, dbefore = cell.backward(own, _all_at(before, t), here)
        new = _where(mask, t, new, tuple(map(jnp.zeros_like, new)))
        dbefore = dbefore[0] + new[-1] @ carrier["recurrent"].T, *dbefore[1:]
        dbefore = _where(mask, t, dbefore, here)
        if cuts is not None:
            dbefore = tuple(jnp.where(cut, 0, part) for part in dbefore)
        # What the next step reads is read behind what this one writes, or XLA would copy the array
        # to keep the two apart.
        kept = _put(kept, new, t)
        return (dbefore, _all_at(kept, following), kept), None

    first = _all_at(kept, 0 if reverse else -1)
    (dstate, _, deltas), _ = jax.lax.scan(
        step, (dstate, first, kept), (times, following, cuts), reverse=not reverse
    )
    return deltas, dstate


def carry_influences(cell, params, x, kept, before, mask, cuts, dy, *, reverse):
    """The gradient of each example, carried forward in time: of each parameter, [N, its shape].

    The influence of a parameter on the state, M_t = ds_t / d theta, goes with time:

      M_t = D_t M_(t-1) + (what theta does to s_t at this step),   D_t = ds_t / ds_(t-1)

    and the gradient is sum_t dy_t . M_t, of the rows of h. Of a cell's derivatives at one-hot
    dstates, all the units at once, are made D_t and the influence at the step.

    Shapes: M is [N, P, H, ...] with P the parts of the state, and then [R, G, H] for the R rows of
    W and b, or U and c, which see what is before the drive, (x, 1), or the echo, (h, 1); [P, H]
    for the first state.
    """
    n, _, h = dy.shape
    p, g = cell.parts, cell.gates
    eye, units = jnp.eye(h, dtype=dy.dtype), params["recurrent"].reshape(h, g, h)

    def rows(x, bias):
        return jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1) if bias else x

    def step(carry, now):
        influences, grads = carry
        t, cut = now
        of_drive, of_echo, of_state = [], [], []
        for part in range(p):
            ones = tuple(jnp.full((n, h), q == part, dy.dtype) for q in range(p))
            deltas, dbefore = cell.backward(_all_at(kept, t), _all_at(before, t), ones)
            of_drive.append(deltas[0].reshape(n, g, h))
            of_echo.append(deltas[-1].reshape(n, g, h))
            of_state.append(jnp.stack(dbefore, axis=1))
        drive, echo = jnp.stack(of_drive, axis=1), jnp.stack(of_echo, axis=1)
        transition = jnp.einsum("npqk,kj->npkqj", jnp.stack(of_state, axis=1), eye)
        through_echo = jnp.einsum("npgk,jgk->npkj", echo, units)
        transition = transition.at[:, :, :, 0].add(through_echo)
        at_drive, at_echo = rows(_at(x, t), True), rows(_at(before[0], t), cell.recurrent_bias)
        here = (
            jnp.einsum("npgk,ni,kj->npkigj", drive, at_drive, eye),
            jnp.einsum("npgk,ni,kj->npkigj", echo, at_echo, eye),
            jnp.zeros((n, p, h, p, h), dy.dtype),
        )
        if cuts is not None:
            influences = tuple(jnp.where(cut, 0, m) for m in influences)
        after = tuple(
            jnp.einsum("npkqj,nqj...->npk...", transition, m) + new
            for m, new in zip(influences, here, strict=True)
        )
        influences = _where(mask, t, after, influences)
        grads = tuple(
            grad + jnp.einsum("nk,nk...->n...", _at(dy, t), m[:, 0])
            for grad, m in zip(grads, influences, strict=True)
        )
        return (influences, grads), None

    sizes = [(x.shape[2] + 1, g, h), (h + cell.recurrent_bias, g, h), (p, h)]
    zeros = [jnp.zeros((n, p, h, *size), dy.dtype) for size in sizes]
    identity = jnp.broadcast_to(jnp.eye(p * h, dtype=dy.dtype).reshape(p, h, p, h), zeros[2].shape)
    start = (*zeros[:2], identity), tuple(m[:, 0, 0] for m in zeros)
    (_, grads), _ = jax.lax.scan(step, start, (_times(dy), cuts), reverse=reverse)
    drive, echo = (grad.reshape(n, grad.shape[1], g * h) for grad in grads[:2])
    return {
        "weight": drive[:, :-1],
        "bias": drive[:, -1],
        "recurrent": echo[:, :h],
        "recurrent_bias": echo[:, -1],
        "initial": tuple(grads[2][:, part] for part in range(p)),
    }


def _times(y):
    return jnp.arange(y.shape[1])


def _at(array, t):
    """What is there at a step, [N, ...]."""
    return jax.lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)


def _all_at(arrays, t):
    return tuple(_at(array, t) for array in arrays)


def _put(arrays, new, t):
    """Arrays [N, T, ...] with others [N, ...] at a step, which XLA writes in their place."""
    put = jax.lax.dynamic_update_index_in_dim
    return tuple(put(array, own, t, axis=1) for array, own in zip(arrays, new, strict=True))


def _where(mask, t, arrays, others):
    """The arrays where there is a step, and the others where there is none."""
    if mask is None:
        return arrays
    there = _at(mask, t)

    def choose(a, b):
        return jnp.where(there.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return tuple(map(choose, arrays, others))
