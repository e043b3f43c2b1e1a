"""Until the model is good: epochs, each of them looked at, and a reason to stop."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbp.rules.feedback import exact
from jaxbp.training.nonfinite import BadStepError, NonFiniteError, is_finite, locate, run_watched
from jaxbp.training.step import (
    TrainState,
    evaluate,
    init_state,
    make_epoch,
    make_step,
    shuffle,
    take,
)
from jaxbp.types import Layer, LayerError, Rule, show_shape


class Fit(NamedTuple):
    """What a run of `fit` has come to.

    Attributes:
      params: the best parameters by the measure on held-out data; without such data, the last.
      state: the last state, from which another run can go on.
      records: what was recorded, a dict for each epoch.
      stopped_by: `target`, `patience` or `epochs`.
      reason: the same as a sentence with its numbers.
    """

    params: Any
    state: TrainState
    records: list[dict[str, Any]]
    stopped_by: str
    reason: str


def fit(
    net,
    loss,
    optimizer,
    train,
    *,
    key=None,
    state=None,
    held_out=None,
    metric=None,
    target=None,
    patience=None,
    epochs=100,
    batch_size=64,
    rule=exact(),
    read=None,
    measures=None,
    extra_args=None,
    callback=None,
):
    """Trains until the model is good, patience is at its end, or all epochs are done.

      target      stop once the measure is as good as this
      patience    stop when the measure on held-out data has not improved for so many epochs
      epochs      stop after so many

    The *measure* is the mean of `metric`, the higher the better, or without a metric the mean
    loss, the lower the better; on held-out data, or without them on the data of training (the
    metric after the epoch, the loss on the way).

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      optimizer: any optax optimizer.
      train: a pair of arrays `(inputs, targets)`, trained on in shuffled batches on the device; or
        an iterable of such pairs, each of them a batch, gone through once an epoch.
      key: a random key for a new state.
      state: a state to go on from, in place of a key.
      held_out: a pair of arrays `(inputs, targets)`.
      metric: `metric(outputs, targets) -> [N]`, such as `bp.accuracy`.
      target: how good is good.
      patience: how many epochs to wait for something better.
      epochs: how many at most.
      batch_size: examples a step, if `train` is a pair of arrays.
      rule: which weights carry the error back (see `feedback`).
      read: a dict of readings, recorded as their mean over the epoch.
      measures: a dict of what else to record, as of `make_step`, also as its mean.
      extra_args: what else the optimizer asks for, as of `make_step`.
      callback: called after each epoch as `callback(state, record)`, for progress and figures.

    Returns:
      A `Fit`. Its records have `epoch`; `loss`, the mean over the epoch while training;
      `held_out_loss` and `metric` where there are such; and readings and measures by their names.

    Raises:
      ValueError: an argument is wrong, or the data are: empty, of unequal lengths, not finite, or
        of shapes, dtypes or labels that the network or the loss refuses.
      NonFiniteError: a loss, a parameter, the state of the rule or the measure became infinite or
        not a number. It says where, and has the last good state.

    Example:
      >>> import jax, optax, jaxbp as bp
      >>> x = jax.random.normal(jax.random.key(0), (200, 2))
      >>> labels = (x[:, 0] > x[:, 1]).astype(int)
      >>> net = bp.chain(bp.dense(8), bp.tanh(), bp.dense(2))
      >>> run = bp.fit(
      ...     net, bp.softmax_cross_entropy, optax.adam(0.03), (x, labels),
      ...     key=jax.random.key(1), metric=bp.accuracy, target=0.98,
      ... )
      >>> run.stopped_by
      'target'
    """
    _require_arguments(
        net, optimizer, rule, key, state, held_out, patience, epochs, batch_size, target
    )
    batched = not _is_pair_of_arrays(train)
    if batched:
        if metric is not None and held_out is None:
            raise ValueError("fit: a metric needs held_out data where train comes in batches.")
        train, first_inputs = _peek(train, epochs)
    else:
        train = _as_arrays("train", train)
        first_inputs = train[0]
    if state is None:
        state = init_state(net, optimizer, key, first_inputs.shape[1:], rule=rule)

    require = _make_require(net, loss, state.params)

    def make(maker, **how):
        what = {"read": read, "measures": measures, "extra_args": extra_args}
        return maker(net, loss, optimizer, rule=rule, **what, **how)

    if batched:
        run_epoch = _epochs_on_batches(make, train, require)
    else:
        require("train", train)
        run_epoch = _epochs_on_arrays(make, train, batch_size)
    if held_out is not None:
        held_out = _as_arrays("held_out", held_out)
        require("held_out", held_out)

    measure = _make_measure(net, loss, metric, held_out, train)
    name = ("loss" if metric is None else getattr(metric, "__name__", "metric")).replace("_", " ")
    name = name if held_out is None else f"held-out {name}"
    sign = -1 if metric is None else 1  # so that more is better
    value, best, best_epoch, best_params = math.nan, -math.inf, 0, state.params
    records = []

    for epoch in range(1, epochs + 1):
        try:
            state, record = run_epoch(state)
        except BadStepError as bad:
            place = locate(net, loss, rule, bad)
            raise NonFiniteError(epoch, bad.step, place, bad.state, records) from None
        value, measured = measure(state.params, record)
        if not math.isfinite(value):
            raise NonFiniteError(epoch, None, f"the {name}", state, records)
        records.append({"epoch": epoch, **jax.tree.map(np.asarray, {**record, **measured})})
        if callback is not None:
            callback(state, records[-1])
        if sign * value > best:
            best, best_epoch, best_params = sign * value, epoch, state.params
        if target is not None and sign * value >= sign * target:
            stopped_by = "target"
            reason = f"{name} {value:.4g} is as good as {target:.4g} after {epoch} epochs"
            break
        if patience is not None and epoch - best_epoch >= patience:
            stopped_by = "patience"
            reason = (
                f"{name} has not improved for {patience} epochs on {sign * best:.4g} of "
                f"epoch {best_epoch}"
            )
            break
    else:
        stopped_by, reason = "epochs", f"all {epochs} epochs are done, {name} {value:.4g}"
    params = state.params if held_out is None else best_params
    return Fit(params, state, records, stopped_by, f"{stopped_by}: {reason}")


def _epochs_on_arrays(make, train, batch_size):
    """An epoch as a function of the state: one compiled scan, looked into if it goes wrong."""
    epoch = make(make_epoch, batch_size=batch_size)
    n = len(train[0])

    def run_epoch(start):
        state, record = epoch(start, *train)
        if not is_finite((record["loss"], state.params, state.rule_state)):
            order = shuffle(start, n)
            batches = (take(train, order[i : i + batch_size]) for i in range(0, n, batch_size))
            step = make(make_step, donate=False)
            # Compiled on its own, the step may round otherwise and just escape: so much the better.
            state, record = run_watched(step, start, batches)
        return state, record

    return run_epoch


def _epochs_on_batches(make, batches, require):
    """An epoch as a function of the state: a step for each batch as it comes."""
    step = make(make_step, donate=False)

    def checked():
        i = 0
        for i, batch in enumerate(batches, 1):
            batch = _as_arrays(f"batch {i}", batch)
            require(f"batch {i}", batch)
            yield batch
        if i == 0:
            raise ValueError(
                "fit: train has no more batches. It has to give all of them anew for each epoch."
            )

    return lambda state: run_watched(step, state, checked())


def _make_measure(net, loss, metric, held_out, train):
    """`measure(params, record) -> (value, what was measured)`, by the rule in `fit`."""
    if held_out is None and metric is None:
        return lambda params, record: (float(record["loss"]), {})
    evaluation = evaluate(net, loss, metric=metric)

    def measure(params, record):
        del record
        answer = evaluation(params, *(train if held_out is None else held_out))
        value = answer["loss"] if metric is None else answer["metric"]
        measured = {} if held_out is None else {"held_out_loss": answer["loss"]}
        if metric is not None:
            measured["metric"] = answer["metric"]
        return float(value), measured

    return measure


def _is_pair_of_arrays(data):
    return isinstance(data, tuple | list) and len(data) == 2 and hasattr(data[0], "shape")


def _as_arrays(name, data):
    if not _is_pair_of_arrays(data):
        raise ValueError(
            f"fit: {name} is {type(data).__name__}, expected a pair of arrays (inputs, targets)."
        )
    return jax.tree.map(jnp.asarray, tuple(data))


def _peek(batches, epochs):
    """The iterable, whole, and the inputs of its first batch."""
    if not hasattr(batches, "__iter__"):
        raise ValueError(
            f"fit: train is {type(batches).__name__}, expected a pair of arrays (inputs, targets) "
            "or an iterable of such pairs."
        )
    iterator = iter(batches)
    once_only = iterator is batches
    if once_only and epochs > 1:
        raise ValueError(
            f"fit: train is {type(batches).__name__}, which can be gone through once, for "
            f"{epochs} epochs. Pass a list, or an object with __iter__; or epochs=1?"
        )
    first = next(iterator, None)
    if first is None:
        raise ValueError("fit: train has no batches.")
    inputs, _ = _as_arrays("batch 1", first)
    return (itertools.chain([first], iterator) if once_only else batches), inputs


def _make_require(net, loss, params):
    """`require(name, data)` refuses data, in the words of the network and of the loss."""

    def require(name, data):
        inputs, targets = data
        n = len(inputs) if inputs.ndim else 0
        if n == 0:
            raise ValueError(f"fit: {name} has inputs of shape {show_shape(inputs.shape)}: empty.")
        for leaf in jax.tree.leaves(targets):
            if leaf.shape[:1] != (n,):
                raise ValueError(
                    f"fit: {name} has {n} inputs and targets of shape {show_shape(leaf.shape)}."
                )
        for what, tree in (("inputs", inputs), ("targets", targets)):
            if not is_finite(tree):
                leaf = next(leaf for leaf in jax.tree.leaves(tree) if not is_finite(leaf))
                example = np.argwhere(~np.isfinite(np.asarray(leaf)))[0][0]
                raise ValueError(
                    f"fit: {name} has {what} that are infinite or not a number, the first in "
                    f"example {example}."
                )
        try:
            for i in range(0, n, 1024):  # in pieces, so that the outputs of all are never held
                x, t = take(data, slice(i, i + 1024))
                outputs, _ = jax.eval_shape(net.forward, params, x)
                loss(jnp.zeros(outputs.shape, outputs.dtype), t)
        except LayerError as error:
            raise error.inside(f"fit: {name}") from None
        except ValueError as error:
            raise ValueError(f"fit: {name}: {error}") from None

    return require


def _require_arguments(
    net, optimizer, rule, key, state, held_out, patience, epochs, batch_size, target
):
    """Refuses wrong arguments, all of them in one message."""
    wrong = []
    if not isinstance(net, Layer):
        wrong.append(f"net is {type(net).__name__}, expected a Layer")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        wrong.append(f"optimizer is {type(optimizer).__name__}, expected one of optax")
    if not isinstance(rule, Rule):
        wrong.append(f"rule is {type(rule).__name__}, expected a Rule, such as exact()")
    if (key is None) == (state is None):
        wrong.append("expected a key for a new state, or a state to go on from, and not both")
    counts = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    for name, count in counts.items():
        if name == "patience" and count is None:
            continue
        if not isinstance(count, int) or count < 1:
            wrong.append(f"{name} is {count!r}, expected a positive integer")
    if patience is not None and held_out is None:
        wrong.append("patience needs held_out data")
    if target is not None and not math.isfinite(target):
        wrong.append(f"target is {target}, expected a finite number")
    if wrong:
        raise ValueError(f"fit: {'; '.join(wrong)}.")
