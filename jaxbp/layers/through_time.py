"""Through time: the three loops over the steps of a sequence that a recurrent layer is made of.

    run_steps          the forward pass, from the first step to the last
    sweep_steps        the backward pass, from the last step to the first (BPTT)
    carry_influences   the same gradients, accumulated from the first step to the last (RTRL)

Each step of the first two holds one product with U, one with V if the cell has an `Inner`, and the
elementwise work of the cell. Everything
that can be one product over all steps stands outside of the loops. Arrays are [N, T, ...] and are
read and written in place: one array holds the drives, then what the cell keeps, then the deltas.

Letters are those of `types`, `cells` and `recurrence`.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxbp.layers.cells import Cell
from jaxbp.sharding import repeated, zeros_beside
from jaxbp.types import Params, exportable

Arrays: TypeAlias = tuple[jax.Array, ...]


class Loop(NamedTuple):
    """What the loops over the steps of one sequence have in common.

    Attributes:
      cell: the cell.
      mask: booleans [N, T], or None. A step where it is false leaves the state unchanged.
      cuts: booleans [T], or None. At a step where it is true, the derivative with respect to the
        previous state is set to zero (truncated BPTT).
      reverse: whether the first step is the last position.
    """

    cell: Cell
    mask: jax.Array | None
    cuts: jax.Array | None
    reverse: bool


@exportable
class Steps(NamedTuple):
    """What the backward pass needs of each step.

    Attributes:
      kept: what the cell keeps, arrays [N, T, G H].
      before: the state before the step, arrays [N, T, H].
      inputs: u of the product v = u V within the step, an array [N, T, inputs], or none.
    """

    kept: Arrays
    before: Arrays
    inputs: Arrays


class Deltas(NamedTuple):
    """The error signals of each step.

    Attributes:
      gates: (da, de), or (da,) if both are equal, [N, T, G H].
      inner: dv of the product v = u V within the step, an array [N, T, outputs], or none.
    """

    gates: Arrays
    inner: Arrays


def run_steps(
    loop: Loop, params: Params, x: jax.Array, state: Arrays
) -> tuple[jax.Array, Arrays, Steps]:
    """The forward pass over all steps, from the state before the first one.

    Returns:
      The outputs y [N, T, H], the last state, and what the backward pass needs of the steps. The
      state before each step has no first part, which is the output of the step before.
    """
    cell, mask, _, reverse = loop
    drive = x @ params["weight"]
    if "bias" in params:
        drive = drive + params["bias"]
    inner = cell.inner
    product = () if inner is None else (lambda u: u @ params[inner.name],)

    def step(carry, t):
        state, (kept, before, inputs), y = carry
        echo = state[0] @ params["recurrent"]
        if "recurrent_bias" in params:
            echo = echo + params["recurrent_bias"]
        # kept[0] holds the drives of the steps from t on.
        new_state, kept_of_step, *u = cell.forward(_at(kept[0], t), echo, state, *product)
        steps = Steps(
            _put(kept, kept_of_step, t), _put(before, state[1:], t), _put(inputs, tuple(u), t)
        )
        state = _where(mask, t, new_state, state)
        return (state, steps, *_put((y,), state[:1], t)), None

    steps = Steps(
        (drive, *[jnp.zeros_like(drive)] * cell.recurrent_bias),
        tuple(zeros_beside(drive, size) for size in cell.sizes[1:]),
        () if inner is None else (zeros_beside(drive, inner.inputs),),
    )
    start = state, steps, zeros_beside(drive, cell.sizes[0])
    (state, steps, y), _ = jax.lax.scan(step, start, jnp.arange(x.shape[1]), reverse=reverse)
    return y, state, steps


def sweep_steps(
    loop: Loop, carrier: Params, steps: Steps, dy: jax.Array, dstate: Arrays
) -> tuple[Deltas, Arrays]:
    """The backward pass over all steps.

    Args:
      loop: that of the forward pass.
      carrier: the parameters that carry the error. Only U and V are read.
      steps: what the forward pass left of each step, with all parts of the state before it.
      dy: the derivative with respect to the outputs, [N, T, H].
      dstate: the derivative with respect to the last state, without that of its output in dy.

    Returns:
      The deltas of all steps, and the derivative with respect to the state before the first step.
    """
    cell, mask, cuts, reverse = loop
    times = jnp.arange(dy.shape[1])
    following = jnp.clip(times + (1 if reverse else -1), 0, len(times) - 1)
    inner = cell.inner
    product = () if inner is None else (lambda dv: dv @ carrier[inner.name].T,)
    heard = carrier["recurrent"].shape[1]  # the gates whose echo is a part of h U

    def step(carry, at_step):
        dstate, kept_of_step, kept, dvs = carry
        t, following, cut = at_step
        dstate = dstate[0] + _at(dy, t), *dstate[1:]
        before = _all_at(steps.before, t)
        deltas, dbefore, *dv = cell.backward(kept_of_step, before, dstate, *product)
        deltas, dv = (
            _where(mask, t, arrays, tuple(map(jnp.zeros_like, arrays)))
            for arrays in (deltas, tuple(dv))
        )
        dbefore = dbefore[0] + deltas[-1][:, :heard] @ carrier["recurrent"].T, *dbefore[1:]
        dbefore = _where(mask, t, dbefore, dstate)
        if cuts is not None:
            dbefore = tuple(jnp.where(cut, 0, part) for part in dbefore)
        # The deltas overwrite what was kept of this step. What the following step needs is read
        # only after this write: otherwise XLA copies the whole array to keep the two apart.
        kept = _put(kept, deltas, t)
        return (dbefore, _all_at(kept, following), kept, _put(dvs, dv, t)), None

    first = _all_at(steps.kept, 0 if reverse else -1)
    dvs = () if inner is None else (zeros_beside(dy, inner.outputs),)
    (dstate, _, *deltas), _ = jax.lax.scan(
        step, (dstate, first, steps.kept, dvs), (times, following, cuts), reverse=not reverse
    )
    return Deltas(*deltas), dstate


def carry_influences(
    loop: Loop, params: Params, x: jax.Array, steps: Steps, dy: jax.Array, dstate: Arrays
) -> dict[str, Any]:
    """The per-example gradients of all parameters, [N, ...], accumulated forward in time (RTRL).

    The influence of a parameter theta on the state is M_t = ds_t / d theta. It obeys

        M_t = D_t M_(t-1) + I_t,   D_t = ds_t / ds_(t-1)

    where I_t is the direct effect of theta on s_t in this step. The gradient is sum_t dy_t . M_t,
    with the rows of M_t that belong to h, and ds_T . M_T for the last state. A cell is elementwise,
    so one call of `cell.backward` with ones gives the derivatives of one part of the state for all
    units; D_t and I_t consist of these.

    M is [N, P, H, ...] for the P parts of the state. The axes behind are those of the parameter:

        [I + 1, G, H]   for W and, as last row, b: their input is (x, 1)
        [H + 1, G, H]   for U and, as last row, c: their input is (h, 1); [H, G, H] without c
        [P, H]          for the initial state

    Args:
      loop: that of the forward pass.
      params: the parameters that carry the error. Only U is read.
      x: the inputs [N, T, I].
      steps: what the forward pass left of each step, with all parts of the state before it.
      dy: the derivative with respect to the outputs, [N, T, H].
      dstate: the derivative with respect to the last state, without that of its output in dy.
    """
    cell, mask, cuts, reverse = loop
    n, _, h = dy.shape
    p, g = cell.parts, cell.gates
    eye, units = jnp.eye(h, dtype=dy.dtype), params["recurrent"].reshape(h, g, h)

    def with_one(x, bias):
        return jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1) if bias else x

    def derivatives(t):
        """Of each part of the state by the drive and the echo, and by the state before: D_t."""
        by_drive, by_echo, by_state = [], [], []
        for part in range(p):
            ones = tuple(jnp.full_like(dy[:, 0], q == part) for q in range(p))
            deltas, dbefore = cell.backward(_all_at(steps.kept, t), _all_at(steps.before, t), ones)
            by_drive.append(deltas[0].reshape(n, g, h))
            by_echo.append(deltas[-1].reshape(n, g, h))
            by_state.append(jnp.stack(dbefore, axis=1))
        by_drive, by_echo = jnp.stack(by_drive, axis=1), jnp.stack(by_echo, axis=1)
        transition = jnp.einsum("npqk,kj->npkqj", jnp.stack(by_state, axis=1), eye)
        through_echo = jnp.einsum("npgk,jgk->npkj", by_echo, units)
        return by_drive, by_echo, transition.at[:, :, :, 0].add(through_echo)

    def step(carry, at_step):
        influences, grads = carry
        t, cut = at_step
        by_drive, by_echo, transition = derivatives(t)
        drive_input = with_one(_at(x, t), True)
        echo_input = with_one(_at(steps.before[0], t), cell.recurrent_bias)
        direct = (
            jnp.einsum("npgk,ni,kj->npkigj", by_drive, drive_input, eye),
            jnp.einsum("npgk,ni,kj->npkigj", by_echo, echo_input, eye),
            zeros[2],
        )
        if cuts is not None:
            influences = tuple(jnp.where(cut, 0, m) for m in influences)
        after = tuple(
            jnp.einsum("npkqj,nqj...->npk...", transition, m) + new
            for m, new in zip(influences, direct, strict=True)
        )
        influences = _where(mask, t, after, influences)
        grads = tuple(
            grad + jnp.einsum("nk,nk...->n...", _at(dy, t), m[:, 0])
            for grad, m in zip(grads, influences, strict=True)
        )
        return (influences, grads), None

    sizes = [(x.shape[2] + 1, g, h), (h + cell.recurrent_bias, g, h), (p, h)]
    zeros = [repeated(jnp.zeros((p, h, *size), dy.dtype), dy) for size in sizes]
    identity = zeros[2] + jnp.eye(p * h, dtype=dy.dtype).reshape(p, h, p, h)
    start = (*zeros[:2], identity), tuple(m[:, 0, 0] for m in zeros)
    times = jnp.arange(dy.shape[1])
    (influences, grads), _ = jax.lax.scan(step, start, (times, cuts), reverse=reverse)
    last = jnp.stack(dstate, axis=1)
    grads = [
        grad + jnp.einsum("npk,npk...->n...", last, m)
        for grad, m in zip(grads, influences, strict=True)
    ]
    drive, echo = (grad.reshape(n, grad.shape[1], g * h) for grad in grads[:2])
    return {
        "weight": drive[:, :-1],
        "bias": drive[:, -1],
        "recurrent": echo[:, :h],
        "recurrent_bias": echo[:, -1],
        "initial": tuple(grads[2][:, part] for part in range(p)),
    }


def _at(array: jax.Array, t) -> jax.Array:
    """The entries of one step, [N, ...], of an array [N, T, ...]."""
    return jax.lax.dynamic_index_in_dim(array, t, axis=1, keepdims=False)


def _all_at(arrays: Arrays, t) -> Arrays:
    return tuple(_at(array, t) for array in arrays)


def _put(arrays: Arrays, entries: Arrays, t) -> Arrays:
    """Arrays [N, T, ...] with these entries [N, ...] at one step. XLA writes them in place."""
    put = jax.lax.dynamic_update_index_in_dim
    return tuple(put(array, entry, t, axis=1) for array, entry in zip(arrays, entries, strict=True))


def _where(mask: jax.Array | None, t, arrays: Arrays, others: Arrays) -> Arrays:
    """The arrays [N, ...] for examples whose mask is true at step t, the others for the rest."""
    if mask is None:
        return arrays
    present = _at(mask, t)

    def choose(a, b):
        return jnp.where(present.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return tuple(map(choose, arrays, others))
