"""Recurrent layers: a cell that runs along a sequence and carries its state from step to step.

Let F be the formulas of the cell (`cells`), a_t its drive, e_t its echo and s_t its state. The
first part of the state is the output h_t. Forward:

    a_t = x_t W + b     e_t = h_(t-1) U (+ c)     s_t = F(a_t, e_t, s_(t-1))     y_t = h_t

Backward, which is backpropagation through time (BPTT). ds_t comes from step t + 1, and dy_t is
added to its first part:

    da_t, de_t, ds_(t-1) = dF^T ds_t     dh_(t-1) += de_t U^T     dx_t = da_t W^T
    dE/dW = sum_nt x_nt da_nt^T          dE/dU = sum_nt h_(n,t-1) de_nt^T

`stateful` gets the state before the first step as an input and returns the last one. `recurrent` is
the same layer with a first state of zero, or one that is learned.

Only the products with U and the elementwise work of the cell have to be done step by step, in the
loops of `through_time`. Everything else is one product over all steps: the drives before the loop
of the forward pass, and dx and the gradients after the loop of the backward pass. The signals have
the steps as positions.

Letters are those of `types` and `cells`.
"""

from collections.abc import Callable
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
    is_count,
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
from jaxbp.sharding import gathered, repeated, zeros_beside
from jaxbp.signals.kinds import Bias, Outer, is_signal, keep
from jaxbp.types import Layer, LayerError, Params, Shape, exportable, show_shape

__all__ = ["ForwardInTime", "bidirectional", "recurrent", "stateful"]


@exportable
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
    use_bias: bool = True,
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
    state. A `gru` with its reset before the product and an `lstm` with a projection have one more
    matrix, and other sizes: see there.

    Several layers are a chain, `chain(recurrent(lstm(64)), dropout(0.2), recurrent(lstm(64)))`. To
    carry the state over batches, use `stateful`.

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
      use_bias: whether there are the biases b and c.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      recurrent_init: the initialiser of each gate's [H, H] in U, and of V.
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
    run = _make_run(
        "recurrent",
        cell,
        mask=mask,
        horizon=horizon,
        segment=segment,
        reverse=reverse,
        learn_initial=learn_initial,
        use_bias=use_bias,
        weight_init=weight_init,
        recurrent_init=recurrent_init,
        dtype=dtype,
    )

    def forward(params, x, *, key=None):
        del key
        y, _, cache = run.forward(params, x, None)
        return y, cache

    def backward(tree, cache, dy, *, read=keep):
        dx, _, readings = run.backward(tree, cache, dy, None, read)
        return dx, readings

    return Layer(run.name, run.init, forward, backward)


def stateful(
    cell: Cell,
    *,
    mask: jax.Array | np.ndarray | None = None,
    horizon: int | None = None,
    segment: int | None = None,
    reverse: bool = False,
    use_bias: bool = True,
    weight_init: Initializer = initializers.lecun_normal(),  # noqa: B008 -- a pure function
    recurrent_init: Initializer = initializers.orthogonal(),  # noqa: B008
    dtype: DTypeLike = float,
) -> Layer:
    """Runs a cell along a sequence from a given state, and returns the last state too.

    It has the formulas of `recurrent`. Inputs are a pair (x, state) of [N, T, I] and a tuple with
    one array [N, H] for each part of the state: (h,), or (h, c) for an `lstm`. Outputs are the pair
    (y, state) of [N, T, H] and the state after the last step, and dx is the pair of their
    derivatives. Parameters are those of `recurrent`, without an initial state.

    Use it for a stream that comes in pieces, where each batch goes on from the last state of the
    batch before. If the error is to stop between two batches (truncated BPTT), give the last state
    a derivative of zero. If it is to go on, give it the derivative with respect to the first state
    of the next batch. With T = 1 it is a single step of the cell. In a network, `on` applies layers
    to the sequence and passes the state on:

        chain(on(0, embedding(100, 8)), stateful(lstm(64)), on(0, dense(100)))

    The last state comes after the last position even if this is padding: a masked step leaves the
    state unchanged. With `reverse` the first step is the last position. Two directions need the
    whole sequence, so `bidirectional` has no such form.

    Args:
      cell: the cell, such as `lstm(64)`.
      mask: booleans [T] or [N, T], false at padded steps; see `recurrent`.
      horizon: the number of steps through which the error goes back; None for all steps.
      segment: the number of steps that are run again at a time, a divisor of T; None to keep all.
      reverse: whether to run from the last position to the first.
      use_bias: whether there are the biases b and c.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      recurrent_init: the initialiser of each gate's [H, H] in U, and of V.
      dtype: the dtype of the parameters, which inputs must share. `float` means JAX's default.

    Raises:
      TypeError: `cell` is not a Cell.
      ValueError: `horizon` or `segment` is not a positive integer, or `mask` is not an array of
        booleans with one or two axes.
      LayerError: the inputs, the state, the parameters or the mask do not fit.

    References:
      "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
      Trajectories", Williams, Peng, 1990: truncated BPTT.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> layer = bp.stateful(bp.lstm(4))
      >>> params, _ = layer.init(jax.random.key(0), ((6, 3), ((4,), (4,))))
      >>> x, state = jnp.ones((2, 6, 3)), (jnp.zeros((2, 4)),) * 2
      >>> (whole, last), _ = layer.forward(params, (x, state))
      >>> (first, between), _ = layer.forward(params, (x[:, :2], state))
      >>> (rest, same), _ = layer.forward(params, (x[:, 2:], between))
      >>> bool(jnp.allclose(rest, whole[:, 2:])), bool(jnp.allclose(same[1], last[1]))
      (True, True)
    """
    run = _make_run(
        "stateful",
        cell,
        mask=mask,
        horizon=horizon,
        segment=segment,
        reverse=reverse,
        learn_initial=False,
        use_bias=use_bias,
        weight_init=weight_init,
        recurrent_init=recurrent_init,
        dtype=dtype,
    )
    state_shape = tuple((size,) for size in cell.sizes)

    def pair(tree, what):
        if not isinstance(tree, tuple | list) or len(tree) != 2 or is_count(tree[0]):
            raise LayerError(run.name, f"got {what} not fit; it takes a pair, (sequence, state).")
        return tree

    def init(key, shape):
        shape, state = pair(shape, "a shape that does")
        params, out_shape = run.init(key, shape)
        if not isinstance(state, tuple | list) or tuple(state) != state_shape:
            raise LayerError(run.name, f"got a state of shape {state}; it takes {state_shape}.")
        return params, (out_shape, state_shape)

    def forward(params, x, *, key=None):
        del key
        y, last, cache = run.forward(params, *pair(x, "inputs that do"))
        return (y, last), cache

    def backward(tree, cache, dy, *, read=keep):
        dx, dstate, readings = run.backward(tree, cache, *pair(dy, "a dy that does"), read)
        return (dx, dstate), readings

    return Layer(run.name, init, forward, backward)


def bidirectional(
    cell: Cell,
    *,
    mask: jax.Array | np.ndarray | None = None,
    horizon: int | None = None,
    segment: int | None = None,
    learn_initial: bool = False,
    use_bias: bool = True,
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
      use_bias: whether there are the biases b and c.
      weight_init: the initialiser of W, as in `jax.nn.initializers`.
      recurrent_init: the initialiser of each gate's [H, H] in U, and of V.
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
            use_bias=use_bias,
            weight_init=weight_init,
            recurrent_init=recurrent_init,
            dtype=dtype,
        )
        for reverse in (False, True)
    ]
    return parallel(*directions, combine="concatenate")._replace(name=f"bidirectional({cell.name})")


class _Run(NamedTuple):
    """A cell that runs along sequences, from a given state or from one of its own.

    Attributes:
      name: the name of the layer.
      init: that of the layer, for the shape of x.
      forward: `forward(params, x, state) -> (y, last state, cache)`. None stands for the learned
        initial state, or zero.
      backward: `backward(tree, cache, dy, dlast, read) -> (dx, dstate, readings)`, with `dlast` the
        derivative with respect to the last state, without that of its output in dy. None stands for
        zero.
    """

    name: str
    init: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _make_run(
    factory: str,
    cell: Cell,
    *,
    mask: jax.Array | np.ndarray | None,
    horizon: int | None,
    segment: int | None,
    reverse: bool,
    learn_initial: bool,
    use_bias: bool,
    weight_init: Initializer,
    recurrent_init: Initializer,
    dtype: DTypeLike,
) -> _Run:
    """The functions that `recurrent` and `stateful` have in common; see there."""
    _require_cell(cell)
    horizon, segment = (
        None if count is None else require_count(factory, argument, count)
        for argument, count in (("horizon", horizon), ("segment", segment))
    )
    require_mask(factory, mask)
    name = f"{factory}({cell.name})"
    units, outputs, inner = cell.features, cell.sizes[0], cell.inner
    wide, heard = cell.gates * units, cell.echoes * units
    shapes: dict[str, Any] = {"weight": ("I", wide), "recurrent": (outputs, heard)}
    if use_bias:
        shapes["bias"] = (wide,)
    if use_bias and cell.recurrent_bias:
        shapes["recurrent_bias"] = (heard,)
    if inner is not None:
        shapes[inner.name] = (inner.inputs, inner.outputs)
    if learn_initial:
        shapes["initial"] = tuple((size,) for size in cell.sizes)

    def init(key, shape):
        require_key(name, "key", key)
        shape = require_shape(name, shape)
        _require_sequence(name, shape, "N", mask, segment)
        keys = jax.random.split(key, 2 + cell.gates + (inner is not None))
        weight_key, bias_key, *gate_keys = keys
        gates = [recurrent_init(k, (outputs, units), dtype) for k in gate_keys[: cell.echoes]]
        params: dict[str, Any] = {
            "weight": weight_init(weight_key, (shape[1], wide), dtype),
            "recurrent": jnp.concatenate(gates, axis=1),
        }
        if use_bias:
            params["bias"] = cell.bias_init(bias_key, (wide,), dtype)
        if "recurrent_bias" in shapes:
            params["recurrent_bias"] = jnp.zeros((heard,), dtype)
        if inner is not None:
            params[inner.name] = recurrent_init(gate_keys[-1], shapes[inner.name], dtype)
        if learn_initial:
            params["initial"] = tuple(jnp.zeros(size, dtype) for size in cell.sizes)
        return params, (shape[0], outputs)

    def forward(params, x, state):
        require_params(name, params, shapes)
        require_floats(name, x, params["weight"].dtype)
        _require_sequence(name, x.shape[1:], x.shape[0], mask, segment)
        _require_features(name, x, params, "inputs")
        params = gathered(params, x)
        loop = loop_over(x)
        if loop.mask is not None:
            # A delta of zero at a masked step is not enough: zero times infinity is nan.
            x = jnp.where(loop.mask[..., None], x, 0)
        if state is None:
            first = params.get("initial", (0,) * cell.parts)
            state = tuple(
                zeros_beside(x[:, 0], size) + part
                for size, part in zip(cell.sizes, first, strict=True)
            )
        state = _require_state(name, state, cell, x, "a state", x.dtype)
        if segment is None:
            y, last, steps = run_steps(loop, params, x, state)
            return y, last, (x, y, state, steps)
        y, last, states = run_segments(loop, params, x, state, segment)
        # Backward runs the steps again with these parameters; its own argument may be another tree.
        return y, last, (x, y, state, (params, states))

    def backward(tree, cache, dy, dlast, read):
        carrier = tree.params if isinstance(tree, ForwardInTime) else tree
        require_params(name, carrier, shapes)
        require_cache(name, cache, 4)
        x, y, state, kept = cache
        _require_features(name, x, carrier, "a cache")
        carrier = gathered(carrier, x)
        require_delta(name, dy, y.shape)
        if dlast is None:
            dlast = tuple(map(jnp.zeros_like, state))
        dlast = _require_state(name, dlast, cell, x, "a dy of the last state", None)
        loop, h = loop_over(x), _previous(y, state[0], reverse)
        if segment is None:
            steps = kept._replace(before=(h, *kept.before))
            deltas, dstate = sweep_steps(loop, carrier, steps, dy, dlast)
            inputs = steps.inputs
        else:
            params, states = kept
            deltas, dstate, inputs = sweep_segments(
                loop, params, carrier, x, h, states, dy, dlast, segment
            )
        da, de = deltas.gates[0], deltas.gates[-1][..., :heard]
        signals: dict[str, Any] = {
            "weight": Outer(x, da),
            "bias": Bias(da),
            "recurrent": Outer(h, de),
            "recurrent_bias": Bias(de),
            "initial": tuple(map(Bias, dstate)),
        }
        if inner is not None:
            signals[inner.name] = Outer(*inputs, *deltas.inner)
        if isinstance(tree, ForwardInTime):
            steps = kept if segment is None else run_steps(loop, kept[0], x, state)[2]
            steps = steps._replace(before=(h, *steps.before))
            grads = carry_influences(loop, carrier, x, steps, dy, dlast)
            signals, dstate = {leaf: _as_signals(grads[leaf]) for leaf in shapes}, grads["initial"]
        readings = jax.tree.map(read, {leaf: signals[leaf] for leaf in shapes}, is_leaf=is_signal)
        return da @ carrier["weight"].T, dstate, readings

    def loop_over(x):
        """The loop over the steps of inputs [N, T, I]."""
        masks = None if mask is None else jnp.broadcast_to(mask, x.shape[:2])
        return Loop(cell, masks, _cuts(x.shape[1], horizon, reverse), reverse)

    return _Run(name, init, forward, backward)


def _as_signals(grads: Any) -> Any:
    """Signals whose per-example gradients are these arrays [N, I, O] or [N, O].

    For a matrix, the I rows of the gradient become the deltas of I positions. The inputs there are
    the unit vectors, so that the products return the rows unchanged.
    """
    if isinstance(grads, tuple):
        return tuple(map(_as_signals, grads))
    if grads.ndim == 2:
        return Bias(grads)
    i = grads.shape[1]
    return Outer(repeated(jnp.eye(i, dtype=grads.dtype), grads), grads)


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


def _require_state(
    name: str, state: Any, cell: Cell, x: jax.Array, what: str, dtype: DTypeLike | None
) -> tuple[jax.Array, ...]:
    """Returns the parts of a state; raises unless they are those of the cell, for inputs x."""
    shapes = [(x.shape[0], size) for size in cell.sizes]
    if not isinstance(state, tuple | list) or [np.shape(part) for part in state] != shapes:
        raise LayerError(
            name,
            f"got {what} that does not fit; for inputs of shape {show_shape(x.shape)} it takes a "
            f"tuple of {len(shapes)}, {', '.join(map(show_shape, shapes))}.",
        )
    for part in state:
        require_floats(name, part, dtype, what=what)
    return tuple(state)


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
