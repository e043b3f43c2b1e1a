"""Recurrent layers: a state that is carried from position to position, and the error that returns.

With a cell's F of drive a_t, echo e_t and state s_t, of which the first part is the output h_t:

  a_t = x_t W + b     e_t = h_(t-1) U (+ c)     s_t = F(a_t, e_t, s_(t-1))     y_t = h_t

and back, with ds_t what came from the step after, and dy_t added to its first part:

  da_t, de_t, ds_(t-1) = dF^T ds_t     dh_(t-1) += de_t U^T                 backpropagation through
  dW = sum_t x_t da_t^T     dU = sum_t h_(t-1) de_t^T     dx_t = da_t W^T        time (BPTT)

So the loops over time (`through_time`) hold a product with U and what is elementwise. Everything
else is one product over all steps: the drives before the loop, and after the way back the
gradients, from operands that have the steps for positions.

Letters are those of `types` and `cells`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from jaxbp.combinators.compose import parallel
from jaxbp.layers.cells import Cell
from jaxbp.layers.segments import run_segments, sweep_segments
from jaxbp.layers.through_time import carry_influences, run_steps, sweep_steps
from jaxbp.require import (
    require_count,
    require_delta,
    require_fit,
    require_floats,
    require_leaves,
    require_mask,
    require_shape,
)
from jaxbp.signals.kinds import Bias, Outer, is_signal, keep
from jaxbp.types import Layer, LayerError, show_shape


class ForwardInTime(NamedTuple):
    """A tree for a recurrent layer's backward that has credit assigned forward in time (`rtrl`).

    Attributes:
      params: what carries the error, as the layer's parameters.
    """

    params: Any


def recurrent(
    cell,
    *,
    mask=None,
    horizon=None,
    segment=None,
    reverse=False,
    learn_initial=False,
    weight_init=initializers.lecun_normal(),  # noqa: B008 -- a pure function
    recurrent_init=initializers.orthogonal(),  # noqa: B008
    dtype=float,
):
    """A cell taken along a sequence; the formulas stand above.

    Inputs are [N, T, I], outputs [N, T, H]. Parameters are `{"weight": [I, G H], "recurrent":
    [H, G H], "bias": [G H]}`, with a `"recurrent_bias"` [G H] if the cell has one, and if it is
    learned the state to begin with, `"initial"`, a vector [H] for each of its parts.

      mask false at t       the state stays as it was: y_t = h_(t-1), and da_t = de_t = 0. Padded
                            at their ends, sequences end with the output of their last step
      horizon=k             truncated BPTT: ds_(t-1) = 0 where t is a multiple of k, and not 0; the
                            state is carried on, its derivative is not
      segment=k             only every k-th state is kept, and each k steps run again on the way
                            back; the numbers are the same
      reverse               time runs from the last position to the first

    What a segment saves is what the layer keeps between the passes, O(T / k + k) numbers of each
    unit beside its outputs in the place of O(T): least at k = sqrt(T). The deltas of all steps are
    there after the way back in any case, since they are the operands of what is read. So it saves
    most in a `stack`, which has those of one layer at a time.

    Args:
      cell: such as `lstm(64)`.
      mask: booleans, false at steps that are not there: [T], or [N, T] for each example. Of lengths
        [N] it is `jnp.arange(T) < lengths[:, None]`; `masked` brings one with each batch.
      horizon: how many steps the error goes back at most; through all if it is None.
      segment: how many steps are run again at a time; it has to divide T.
      reverse: whether time runs backwards.
      learn_initial: whether the state to begin with is learned, from zero, or is zero.
      weight_init: an initialiser in the form of `jax.nn.initializers`, for W.
      recurrent_init: the same, for the [H, H] of U at each gate.
      dtype: of the parameters; inputs have to have it too. `float` is jax's default.

    Raises:
      TypeError: `cell` is not a Cell.
      ValueError: `horizon` or `segment` is not a positive integer, or `mask` is not of one or two
        axes of booleans.
      LayerError: the inputs, or the parameters, do not fit, or the mask.

    References:
      "Backpropagation Through Time: What It Does and How to Do It", Werbos, 1990.
      "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
      Trajectories", Williams, Peng, 1990: truncated.
      "Training Deep Nets with Sublinear Memory Cost", Chen, Xu, Zhang, Guestrin, 2016: in segments.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.masked(lambda mask: bp.recurrent(bp.lstm(4), mask=mask))
      >>> params, out_shape = net.init(jax.random.key(0), ((7, 3), (7,)))
      >>> lengths = jnp.array([5, 7])
      >>> y, _ = net.forward(params, (jnp.ones((2, 7, 3)), jnp.arange(7) < lengths[:, None]))
      >>> y.shape, bool(jnp.all(y[0, 6] == y[0, 4]))
      ((2, 7, 4), True)
    """
    _require_cell(cell)
    for argument, count in (("horizon", horizon), ("segment", segment)):
        if count is not None:
            require_count("recurrent", argument, count)
    require_mask("recurrent", mask)
    name = f"recurrent({cell.name})"
    leaves = ["weight", "recurrent", "bias"]
    leaves += ["recurrent_bias"] * cell.recurrent_bias + ["initial"] * learn_initial

    def init(key, shape):
        shape = require_shape(name, shape)
        _require_sequence(name, shape, "N", mask, segment)
        weight_key, bias_key, *gate_keys = jax.random.split(key, 2 + cell.gates)
        h, wide = cell.features, cell.gates * cell.features
        gates = [recurrent_init(k, (h, h), dtype) for k in gate_keys]
        params: dict[str, Any] = {
            "weight": weight_init(weight_key, (shape[1], wide), dtype),
            "recurrent": jnp.concatenate(gates, axis=1),
            "bias": cell.bias_init(bias_key, (wide,), dtype),
        }
        if cell.recurrent_bias:
            params["recurrent_bias"] = jnp.zeros((wide,), dtype)
        if learn_initial:
            params["initial"] = tuple(jnp.zeros((h,), dtype) for _ in range(cell.parts))
        return params, (shape[0], h)

    def forward(params, x, *, key=None):
        del key
        _require_params(name, params, leaves, cell)
        require_floats(name, x, params["weight"].dtype)
        _require_sequence(name, x.shape[1:], len(x), mask, segment)
        _require_features(name, x, len(params["weight"]))
        there = mask_of(x)
        if there is not None:
            # A delta of zero at a masked step is not enough: zero times infinity is nan.
            x = jnp.where(there[..., None], x, 0)
        zeros = jnp.zeros((len(x), cell.features), x.dtype)
        state = tuple(zeros + part for part in params.get("initial", (0,) * cell.parts))
        if segment is None:
            y, _, gates, before = run_steps(cell, params, x, there, state, reverse)
            return y, (x, y, state, (gates, before))
        y, states = run_segments(cell, params, x, there, state, segment, reverse)
        # The parameters are kept too: the tree that carries the error may be another one.
        return y, (x, y, state, (params, states))

    def backward(tree, cache, dy, *, read=keep):
        carrier = tree.params if isinstance(tree, ForwardInTime) else tree
        _require_params(name, carrier, leaves, cell)
        x, y, state, kept = cache
        require_delta(name, dy, y.shape)
        h, there = _before(y, state[0], reverse), mask_of(x)
        cuts, dstate = _cuts(x.shape[1], horizon, reverse), tuple(map(jnp.zeros_like, state))
        if segment is None:
            gates, before = kept
            deltas, dstate = sweep_steps(
                cell, carrier, gates, (h, *before), there, cuts, dy, dstate, reverse
            )
        else:
            params, states = kept
            deltas, dstate = sweep_segments(
                cell, params, carrier, x, h, states, there, cuts, dy, dstate, segment, reverse
            )
        if isinstance(tree, ForwardInTime):
            gates, before = gates_of(cache)
            influences = carry_influences(
                cell, carrier, x, gates, (h, *before), there, cuts, dy, reverse=reverse
            )
            signals = {leaf: _as_signals(grads) for leaf, grads in influences.items()}
        else:
            da, de = deltas[0], deltas[-1]
            signals = {
                "weight": Outer(x, da),
                "bias": Bias(da),
                "recurrent": Outer(h, de),
                "recurrent_bias": Bias(de),
                "initial": tuple(map(Bias, dstate)),
            }
        readings = jax.tree.map(read, {leaf: signals[leaf] for leaf in leaves}, is_leaf=is_signal)
        return deltas[0] @ carrier["weight"].T, readings

    def mask_of(x):
        """The mask of each example, [N, T], or None."""
        return None if mask is None else jnp.broadcast_to(mask, x.shape[:2])

    def gates_of(cache):
        """What `run_steps` kept of all steps; with segments they run again."""
        x, _, state, kept = cache
        if segment is not None:
            params, _ = kept
            _, _, *kept = run_steps(cell, params, x, mask_of(x), state, reverse)
        return kept

    return Layer(name, init, forward, backward)


def bidirectional(
    cell,
    *,
    mask=None,
    horizon=None,
    segment=None,
    learn_initial=False,
    weight_init=initializers.lecun_normal(),  # noqa: B008 -- a pure function
    recurrent_init=initializers.orthogonal(),  # noqa: B008
    dtype=float,
):
    """A cell taken along a sequence in both directions, y_t = (what came before, what comes after).

      parallel(recurrent(cell), recurrent(cell, reverse=True), combine="concatenate")

    under another name. Inputs are [N, T, I], outputs [N, T, 2 H]. Parameters are pairs: each
    direction has its own.

    Args:
      cell: such as `lstm(64)`.
      mask: as the others, of `recurrent`.
      horizon: how many steps the error goes back at most.
      segment: how many steps are run again at a time.
      learn_initial: whether the states to begin with are learned.
      weight_init: an initialiser, for W.
      recurrent_init: an initialiser, for U.
      dtype: of the parameters.

    Raises:
      TypeError: `cell` is not a Cell.
      ValueError: as of `recurrent`.
      LayerError: the inputs, or the parameters, do not fit, or the mask.

    References:
      "Bidirectional Recurrent Neural Networks", Schuster, Paliwal, 1997.

    Example:
      >>> import jax, jaxbp as bp
      >>> bp.bidirectional(bp.gru(4)).init(jax.random.key(0), (7, 3))[1]
      (7, 8)
    """
    directions = [
        recurrent(
            cell,
            mask=mask,
            horizon=horizon,
            segment=segment,
            reverse=reverse,
            learn_initial=learn_initial,
            weight_init=weight_init,
            recurrent_init=recurrent_init,
            dtype=dtype,
        )
        for reverse in (False, True)
    ]
    return parallel(*directions, combine="concatenate")._replace(name=f"bidirectional({cell.name})")


def _as_signals(grads):
    """Signals of which the gradients of the examples are these: of matrices [N, I, O], row by row.

    The rows of the one are the unit vectors, so that no product changes the other.
    """
    if isinstance(grads, tuple):
        return tuple(map(_as_signals, grads))
    if grads.ndim == 2:
        return Bias(grads)
    n, i, _ = grads.shape
    return Outer(jnp.broadcast_to(jnp.eye(i, dtype=grads.dtype), (n, i, i)), grads)


def _require_cell(cell):
    if not isinstance(cell, Cell):
        called = getattr(cell, "__name__", None)
        hint = f" Call it: {called}(...)?" if callable(cell) and called else ""
        raise TypeError(f"recurrent: cell is {cell!r}; it takes a Cell, such as lstm(64).{hint}")


def _require_sequence(name, shape, n, mask, segment):
    """Refuses inputs that are not [n, T, I], with a T that fits the mask and the segments."""
    if len(shape) != 2:
        got = show_shape((n, *shape))
        raise LayerError(name, f"got inputs of shape {got}; it takes [N, T, I].")
    require_fit(name, mask, n, shape)
    if segment and shape[0] % segment:
        raise LayerError(
            name, f"got inputs of {shape[0]} steps, which segments of {segment} do not divide."
        )


def _require_features(name, x, features):
    if x.shape[2] != features:
        got = show_shape(x.shape)
        raise LayerError(name, f"got inputs of shape {got}; its weight takes [N, T, {features}].")


def _require_params(name, params, leaves, cell):
    """Refuses parameters of another layer, or of another cell."""
    require_leaves(name, params, leaves)
    h, wide = cell.features, cell.gates * cell.features
    got = [jnp.shape(params["weight"]), jnp.shape(params["recurrent"])]
    if len(got[0]) != 2 or got != [(got[0][0], wide), (h, wide)]:
        raise LayerError(
            name,
            f"got a weight of shape {show_shape(got[0])} and a recurrent one of "
            f"{show_shape(got[1])}; it takes [I, {wide}] and {show_shape((h, wide))}. "
            "Are they those of another network?",
        )


def _before(y, first, reverse):
    """The output before each step."""
    first = first[:, None]
    if reverse:
        return jnp.concatenate([y[:, 1:], first], axis=1)
    return jnp.concatenate([first, y[:, :-1]], axis=1)


def _cuts(t, horizon, reverse):
    """At which steps the derivative with respect to the state before is cut off, [T], or None."""
    if horizon is None:
        return None
    order = np.arange(t)
    cuts = (order % horizon == 0) & (order > 0)
    return jnp.asarray(cuts[::-1] if reverse else cuts)
