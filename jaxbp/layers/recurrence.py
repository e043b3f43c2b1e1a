"""Recurrent layers: a cell that runs along a sequence and carries its state from step to step.

Let F be the formulas of the cell (`cells`), a_t its drive, e_t its echo and s_t its state. The
first part of the state is the output h_t. Forward:

    a_t = x_t W + b     e_t = h_(t-1) U (+ c)     s_t = F(a_t, e_t, s_(t-1))     y_t = h_t

Backward, which is backpropagation through time (BPTT). ds_t comes from step t + 1, and dy_t is
added to its first part:

    da_t, de_t, ds_(t-1) = dF^T ds_t     dh_(t-1) += de_t U^T     dx_t = da_t W^T
    dE/dW = sum_nt x_nt da_nt^T          dE/dU = sum_nt h_(n,t-1) de_nt^T

Only the products with U and the elementwise work of the cell have to be done step by step, in the
loops of `through_time`. Everything else is one product over all steps: the drives before the loop
of the forward pass, and dx and the gradients after the loop of the backward pass. The signals have
the steps as positions.

Letters are those of `types` and `cells`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxbp.combinators.compose import parallel
from jaxbp.layers.cells import Cell
from jaxbp.layers.segments import run_segments, sweep_segments
from jaxbp.layers.through_time import Loop, carry_influences, run_steps, sweep_steps
from jaxbp.require import (
    require_cache,
    require_count,
    require_delta,
    require_fit,
    require_floats,
    require_key,
    require_mask,
    require_params,
    require_shape,
)
from jaxbp.signals.kinds import Bias, Outer, is_signal, keep
from jaxbp.types import Layer, LayerError, Params, Shape, show_shape

__all__ = ["ForwardInTime", "bidirectional", "recurrent"]


class ForwardInTime(NamedTuple):
    """A tree for the backward pass of `recurrent` that selects real-time recurrent learning.

    The rule `rtrl` passes it as the first argument of backward, in place of the parameters.

    Attributes:
      params: the parameters that carry the error.
    """

    params: Params


def recurrent(
    cell: Cell,
    *,
    mask: jax.Array | np.ndarray | None = None,
    horizon: int | None = None,
    segment: int | None = None,
    reverse: bool = False,
    learn_initial: bool = False,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    recurrent_init: Initializer = initializers.orthogonal(),  # noqa: B008
    dtype: DTypeLike = float,
) -> Layer:
    """Runs a cell along a sequence and carries its state from step to step.

        a_t = x_t W + b     e_t = h_(t-1) U (+ c)     s_t = F(a_t, e_t, s_(t-1))     y_t = h_t

    F is the cell, and the output h_t is the first part of its state s_t. The backward pass is
    backpropagation through time (BPTT). With ds_t the derivative with respect to s_t, to whose
    first part dy_t is added:

        da_t, de_t, ds_(t-1) = dF^T ds_t     dh_(t-1) += de_t U^T     dx_t = da_t W^T
        dE/dW = sum_nt x_nt da_nt^T          dE/dU = sum_nt h_(n,t-1) de_nt^T
        dE/db = sum_nt da_nt                 dE/dc = sum_nt de_nt

    Inputs are [N, T, I], outputs [N, T, H]. Parameters are `{"weight": [I, G H], "recurrent":
    [H, G H], "bias": [G H]}`. There is also a `"recurrent_bias"` [G H] if the cell has one (c). If
    `learn_initial` is true, there is an `"initial"`, a tuple of one vector [H] for each part of the
    state.

        mask false at t       the state is unchanged: y_t = h_(t-1) and da_t = de_t = 0. The last
                              output of a sequence padded at its end is that of its last real step
        horizon=k             truncated BPTT: ds_(t-1) = 0 if t is a positive multiple of k. The
                              state itself is carried on
        segment=k             the forward pass keeps only every k-th state, and the backward pass
                              runs each segment of k steps again. The numbers are the same
        reverse               the first step is the last position

    A segment reduces what is kept between the passes, in addition to the outputs, from O(T) numbers
    per unit to O(T / k + k). The minimum is at k = sqrt(T). After the backward pass the deltas of
    all steps exist in any case, because they are operands of the signals. Segments therefore save
    most in a `stack`, which holds the deltas of one layer at a time.

    Args:
      cell: the cell, such as `lstm(64)`.
      mask: booleans, false at padded steps: [T], or [N, T] with one row for each example. For
        lengths [N] it is `jnp.arange(T) < lengths[:, None]`. Use `masked` to pass a mask with each
        batch.
      horizon: the number of steps through which the error goes back; None for all steps.
      segment: the number of steps that are run again at a time, a divisor of T; None to keep all.
      reverse: whether to run from the last position to the first.
      learn_initial: whether the initial state is learned, starting from zero. If not, it is zero.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      recurrent_init: the initialiser of each gate's [H, H] in U.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      TypeError: `cell` is not a Cell.
      ValueError: `horizon` or `segment` is not a positive integer, or `mask` is not an array of
        booleans with one or two axes.
      LayerError: the inputs, the parameters or the mask do not fit.

    References:
      "Backpropagation Through Time: What It Does and How to Do It", Werbos, 1990.
      "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
      Trajectories", Williams, Peng, 1990: truncated BPTT.
      "Training Deep Nets with Sublinear Memory Cost", Chen, Xu, Zhang, Guestrin, 2016: segments.
      "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks", Saxe,
      McClelland, Ganguli, 2014: the default of `recurrent_init`.

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
    horizon, segment = (
        None if count is None else require_count("recurrent", argument, count)
        for argument, count in (("horizon", horizon), ("segment", segment))
    )
    require_mask("recurrent", mask)
    name = f"recurrent({cell.name})"
    h, wide = cell.features, cell.gates * cell.features
    shapes: dict[str, Any] = {"weight": ("I", wide), "recurrent": (h, wide), "bias": (wide,)}
    if cell.recurrent_bias:
        shapes["recurrent_bias"] = (wide,)
    if learn_initial:
        shapes["initial"] = ((h,),) * cell.parts

    def init(key, shape):
        require_key(name, "key", key)
        shape = require_shape(name, shape)
        _require_sequence(name, shape, "N", mask, segment)
        weight_key, bias_key, *gate_keys = jax.random.split(key, 2 + cell.gates)
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
        require_params(name, params, shapes)
        require_floats(name, x, params["weight"].dtype)
        _require_sequence(name, x.shape[1:], len(x), mask, segment)
        _require_features(name, x, params, "inputs")
        loop = loop_over(x)
        if loop.mask is not None:
            # A delta of zero at a masked step is not enough: zero times infinity is nan.
            x = jnp.where(loop.mask[..., None], x, 0)
        zeros = jnp.zeros((len(x), cell.features), x.dtype)
        state = tuple(zeros + part for part in params.get("initial", (0,) * cell.parts))
        if segment is None:
            y, _, gates, before = run_steps(loop, params, x, state)
            return y, (x, y, state, (gates, before))
        y, states = run_segments(loop, params, x, state, segment)
        # Backward runs the steps again with these parameters; its own argument may be another tree.
        return y, (x, y, state, (params, states))

    def backward(tree, cache, dy, *, read=keep):
        carrier = tree.params if isinstance(tree, ForwardInTime) else tree
        require_params(name, carrier, shapes)
        require_cache(name, cache, 4)
        x, y, state, kept = cache
        _require_features(name, x, carrier, "a cache")
        require_delta(name, dy, y.shape)
        loop, h = loop_over(x), _previous(y, state[0], reverse)
        if segment is None:
            gates, before = kept
            dstate = tuple(map(jnp.zeros_like, state))
            deltas, dstate = sweep_steps(loop, carrier, gates, (h, *before), dy, dstate)
        else:
            params, states = kept
            deltas, dstate = sweep_segments(loop, params, carrier, x, h, states, dy, segment)
        da, de = deltas[0], deltas[-1]
        signals = {
            "weight": Outer(x, da),
            "bias": Bias(da),
            "recurrent": Outer(h, de),
            "recurrent_bias": Bias(de),
            "initial": tuple(map(Bias, dstate)),
        }
        if isinstance(tree, ForwardInTime):
            gates, before = kept if segment is None else run_steps(loop, kept[0], x, state)[2:]
            grads = carry_influences(loop, carrier, x, gates, (h, *before), dy)
            signals = {leaf: _as_signals(grads[leaf]) for leaf in shapes}
        readings = jax.tree.map(read, {leaf: signals[leaf] for leaf in shapes}, is_leaf=is_signal)
        return da @ carrier["weight"].T, readings

    def loop_over(x):
        """The loop over the steps of inputs [N, T, I]."""
        masks = None if mask is None else jnp.broadcast_to(mask, x.shape[:2])
        return Loop(cell, masks, _cuts(x.shape[1], horizon, reverse), reverse)

    return Layer(name, init, forward, backward)


def bidirectional(
    cell: Cell,
    *,
    mask: jax.Array | np.ndarray | None = None,
    horizon: int | None = None,
    segment: int | None = None,
    learn_initial: bool = False,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    recurrent_init: Initializer = initializers.orthogonal(),  # noqa: B008
    dtype: DTypeLike = float,
) -> Layer:
    """Runs a cell along a sequence in both directions and concatenates the outputs.

    It has the formulas of `recurrent` and is the same layer, under a name of its own, as

        parallel(recurrent(cell), recurrent(cell, reverse=True), combine="concatenate")

    The first H outputs at t depend on the inputs up to t, the other H on the inputs from t on.
    Inputs are [N, T, I], outputs [N, T, 2 H]. Parameters are a pair: each direction has its own.

    Args:
      cell: the cell, such as `lstm(64)`.
      mask: booleans [T] or [N, T], false at padded steps; see `recurrent`.
      horizon: the number of steps through which the error goes back; None for all steps.
      segment: the number of steps that are run again at a time, a divisor of T; None to keep all.
      learn_initial: whether the initial states are learned, starting from zero.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      recurrent_init: the initialiser of each gate's [H, H] in U.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      TypeError: `cell` is not a Cell.
      ValueError: `horizon` or `segment` is not a positive integer, or `mask` is not an array of
        booleans with one or two axes.
      LayerError: the inputs, the parameters or the mask do not fit.

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


def _as_signals(grads: Any) -> Any:
    """Signals whose per-example gradients are these arrays [N, I, O] or [N, O].

    For a matrix, the I rows of the gradient become the deltas of I positions. The inputs there are
    the unit vectors, so that the products return the rows unchanged.
    """
    if isinstance(grads, tuple):
        return tuple(map(_as_signals, grads))
    if grads.ndim == 2:
        return Bias(grads)
    n, i, _ = grads.shape
    return Outer(jnp.broadcast_to(jnp.eye(i, dtype=grads.dtype), (n, i, i)), grads)


def _require_cell(cell: Any) -> None:
    """Raises if this is not a Cell, with a hint for a factory that was not called."""
    if not isinstance(cell, Cell):
        called = getattr(cell, "__name__", None)
        hint = f" Call it: {called}(...)?" if callable(cell) and called else ""
        raise TypeError(f"recurrent: cell is {cell!r}; it takes a Cell, such as lstm(64).{hint}")


def _require_sequence(name: str, shape: Shape, n: Any, mask: Any, segment: int | None) -> None:
    """Raises if inputs [n, *shape] are not [n, T, I], or do not fit the mask or the segments."""
    if len(shape) != 2:
        got = show_shape((n, *shape))
        raise LayerError(name, f"got inputs of shape {got}; it takes [N, T, I].")
    require_fit(name, mask, n, shape)
    if segment and shape[0] % segment:
        raise LayerError(
            name, f"got inputs of {shape[0]} steps, not a multiple of segment = {segment}."
        )


def _require_features(name: str, x: jax.Array, params: Params, what: str) -> None:
    """Raises if the last axis of the inputs does not fit the weight."""
    features = len(params["weight"])
    if x.shape[2] != features:
        got = show_shape(x.shape)
        raise LayerError(name, f"got {what} of shape {got}; its weight takes [N, T, {features}].")


def _previous(y: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """The output before each step, [N, T, H]; before the first step it is `first`, [N, H]."""
    first = first[:, None]
    if reverse:
        return jnp.concatenate([y[:, 1:], first], axis=1)
    return jnp.concatenate([first, y[:, :-1]], axis=1)


def _cuts(t: int, horizon: int | None, reverse: bool) -> jax.Array | None:
    """At which steps truncated BPTT sets ds_(t-1) to zero, [T], or None if it never does."""
    if horizon is None:
        return None
    order = np.arange(t)
    cuts = (order % horizon == 0) & (order > 0)
    return jnp.asarray(cuts[::-1] if reverse else cuts)
