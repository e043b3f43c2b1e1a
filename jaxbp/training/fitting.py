"""Training with validation and early stopping.

`fit` trains for many epochs, and measures the network after each. It stops when the network is good
enough, when it no longer improves, or after the last epoch. Arguments and data are checked before
the first step.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbp.forward import require_answer
from jaxbp.require import first_difference, is_count, require_examples
from jaxbp.rules.feedback import exact
from jaxbp.training.nonfinite import BadStepError, NonFiniteError, is_finite, locate, run_watched
from jaxbp.training.step import (
    Metric,
    TrainState,
    evaluate,
    init_state,
    make_epoch,
    make_step,
    require_state,
    shuffle,
    take,
)
from jaxbp.types import Layer, LayerError, LossFunction, Params, PyTree, Reading, Rule

__all__ = ["Fit", "fit"]

Data: TypeAlias = tuple[PyTree, PyTree]  # inputs and targets, trees of arrays [N, ...]


class Fit(NamedTuple):
    """The result of a run of `fit`.

    Attributes:
      params: the parameters of the best epoch on the validation set; without one, the last
        parameters.
      state: the last state, from which another run can continue.
      records: what was recorded, one dict for each epoch.
      stopped_by: `target`, `patience` or `epochs`.
      reason: the same as a sentence with its numbers.
    """

    params: Params
    state: TrainState
    records: list[dict[str, Any]]
    stopped_by: str
    reason: str


def fit(
    net: Layer,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    train: Data | Iterable[Data],
    *,
    key: jax.Array | None = None,
    state: TrainState | None = None,
    held_out: Data | None = None,
    metric: Metric | None = None,
    target: float | None = None,
    patience: int | None = None,
    epochs: int = 100,
    batch_size: int = 64,
    rule: Rule = exact(),
    read: Mapping[str, Reading] | None = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    extra_args: Mapping[str, Callable[..., Any]] | None = None,
    callback: Callable[[TrainState, dict[str, Any]], object] | None = None,
) -> Fit:
    """Trains until the network is good enough, no longer improves, or all epochs are done.

    After each epoch `fit` computes one number, the *measure*. It is the mean of `metric`, where
    higher is better; without a metric it is the mean loss, where lower is better. It is computed on
    the validation set `held_out`. Without one it is computed on the training data: the metric with
    the parameters after the epoch, the loss as the mean during the epoch.

        target      stops when the measure is at least as good as this
        patience    stops when the measure has not improved for this number of epochs
        epochs      stops after this number of epochs

    `train` is a data set or batches, which its type tells apart. Inputs and targets may be trees:
    arrays, or tuples and dicts of arrays, all [N, ...].

        (inputs, targets)           a tuple of two is a data set, split into shuffled batches
        ((x, mask), targets)        a data set too: its inputs are the pair (x, mask)
        [inputs, targets]           a data set too, since its first entry is an array
        [(x1, t1), (x2, t2)]        any other list, or iterable, gives batches; it is gone through
                                    once per epoch

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      optimizer: any optax optimizer.
      train: a data set or batches (see below).
      key: a random key to make a new state.
      state: a state to continue from, instead of a key.
      held_out: the validation set, a pair `(inputs, targets)`.
      metric: `metric(outputs, targets) -> [N]`, such as `bp.accuracy`.
      target: the measure that is good enough.
      patience: the number of epochs to wait for an improvement; needs `held_out`.
      epochs: the largest number of epochs.
      batch_size: the number of examples in a batch, if `train` is a data set.
      rule: which weights carry the error back (see `rules`).
      read: a dict of readings to record, as their mean over the epoch.
      measures: a dict of other functions to record, as in `make_step`; also as their mean.
      extra_args: other arguments of the optimizer's update, as in `make_step`.
      callback: `callback(state, record)` is called after each epoch, such as to print progress.

    Returns:
      A `Fit`. Each of its records has `epoch`; `loss`, the mean training loss of the epoch;
      `held_out_loss` if there is a validation set; `metric` if there is a metric; and the readings
      and measures by their names.

    Raises:
      ValueError: an argument is wrong; or the data are empty, of unequal lengths, not finite, or of
        shapes, dtypes or labels that the network or the loss refuses; or `state` is that of another
        optimizer, rule or network. Targets need not be finite where the loss gives them no weight.
      NonFiniteError: a loss, a parameter, the state of the rule or the measure became infinite or
        not a number. The error says where, and has the last good state.

    References:
      "Early Stopping - But When?", Prechelt, 1998.

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
        net, loss, optimizer, rule, key, state, held_out, metric, callback, patience, epochs,
        batch_size, target,
    )  # fmt: skip
    batched = not _is_data_set(train)
    if batched and metric is not None and held_out is None:
        raise ValueError("fit: a metric needs held_out data where train comes in batches.")
    if batched:
        train, first_inputs = _peek(train, epochs)
    else:
        train = _as_arrays("train", train)
        first_inputs = train[0]
    shape = jax.tree.map(lambda x: x.shape[1:], first_inputs)
    if state is None:
        assert key is not None  # checked by _require_arguments
        state = init_state(net, optimizer, key, shape, rule=rule)
    else:
        _require_own_state(state, net, optimizer, rule, shape)

    require_data = _make_require_data(net, loss, state.params)

    def make(maker, **options):
        recorded = {"read": read, "measures": measures, "extra_args": extra_args}
        return maker(net, loss, optimizer, rule=rule, **recorded, **options)

    if batched:
        run_epoch = _epochs_on_batches(make, train, require_data)
    else:
        require_data("train", train)
        run_epoch = _epochs_on_arrays(make, train, batch_size)
    if held_out is not None:
        held_out = _as_arrays("held_out", held_out)
        require_data("held_out", held_out)

    measure = _make_measure(net, loss, metric, held_out, train)
    goal = _make_goal(metric, held_out, target, patience, epochs)
    best = _Best(0, -goal.sign * math.inf, state.params)
    records, epoch = [], 0

    while True:
        epoch += 1
        try:
            state, record = run_epoch(state)
        except BadStepError as bad:
            place = locate(net, loss, rule, bad)
            raise NonFiniteError(epoch, bad.step, place, bad.state, records) from None
        value, measured = measure(state.params, record)
        if not math.isfinite(value):
            raise NonFiniteError(epoch, None, f"the {goal.name}", state, records)
        records.append({"epoch": epoch, **jax.tree.map(np.asarray, {**record, **measured})})
        if callback is not None:
            callback(state, records[-1])
        if goal.is_better(value, best.value):
            best = _Best(epoch, value, state.params)
        stop = goal.reason_to_stop(epoch, value, best)
        if stop is not None:
            stopped_by, reason = stop
            params = state.params if held_out is None else best.params
            return Fit(params, state, records, stopped_by, f"{stopped_by}: {reason}")


class _Best(NamedTuple):
    """The epoch with the best measure so far."""

    epoch: int
    value: float
    params: Params


class _Goal(NamedTuple):
    """When to stop.

    Attributes:
      name: the measure in messages.
      sign: 1 if a higher measure is better, -1 if a lower one is.
      target: as in `fit`.
      patience: as in `fit`.
      epochs: as in `fit`.
    """

    name: str
    sign: int
    target: float | None
    patience: int | None
    epochs: int

    def is_better(self, value: float, other: float) -> bool:
        """Whether one measure is strictly better than another."""
        return self.sign * value > self.sign * other

    def reason_to_stop(self, epoch: int, value: float, best: _Best) -> tuple[str, str] | None:
        """What stops the run after this epoch, and a sentence about it; None to continue."""
        if self.target is not None and not self.is_better(self.target, value):
            return (
                "target",
                f"{self.name} {value:.4g} is as good as {self.target:.4g} after {epoch} epochs",
            )
        if self.patience is not None and epoch - best.epoch >= self.patience:
            return (
                "patience",
                f"{self.name} has not improved for {self.patience} epochs; the best is "
                f"{best.value:.4g}, of epoch {best.epoch}",
            )
        if epoch == self.epochs:
            return "epochs", f"all {self.epochs} epochs are done, {self.name} {value:.4g}"
        return None


def _make_goal(metric, held_out, target, patience, epochs) -> _Goal:
    name = ("loss" if metric is None else getattr(metric, "__name__", "metric")).replace("_", " ")
    name = name if held_out is None else f"held-out {name}"
    return _Goal(name, -1 if metric is None else 1, target, patience, epochs)


def _epochs_on_arrays(make, train, batch_size):
    """`run_epoch(state) -> (state, record)` on arrays: one compiled scan, checked at its end."""
    epoch = make(make_epoch, batch_size=batch_size)
    n = len(jax.tree.leaves(train)[0])

    def run_epoch(start):
        state, record = epoch(start, *train)
        if not is_finite((record["loss"], state.params, state.rule_state)):
            order = shuffle(start, n)
            batches = (take(train, order[i : i + batch_size]) for i in range(0, n, batch_size))
            step = make(make_step, donate=False)
            # Compiled separately, the steps may round differently and all stay finite. Then their
            # result is good, and training continues from it.
            state, record = run_watched(step, start, batches)
        return state, record

    return run_epoch


def _epochs_on_batches(make, batches, require_data):
    """`run_epoch(state) -> (state, record)` on batches: one step for each, checked one by one."""
    step = make(make_step, donate=False)

    def checked():
        i = 0
        for i, batch in enumerate(batches, 1):
            batch = _as_arrays(f"batch {i}", batch)
            require_data(f"batch {i}", batch)
            yield batch
        if i == 0:
            raise ValueError(
                "fit: train has no more batches. It has to give all of its batches in each epoch."
            )

    return lambda state: run_watched(step, state, checked())


def _make_measure(net, loss, metric, held_out, train):
    """`measure(params, record) -> (value, measured)`: the measure of `fit`, and what to record."""
    if held_out is None and metric is None:
        return lambda params, record: (float(record["loss"]), {})
    evaluation = evaluate(net, loss, metric=metric)

    def measure(params, record):
        del record
        means = evaluation(params, *(train if held_out is None else held_out))
        value = means["loss"] if metric is None else means["metric"]
        measured = {} if held_out is None else {"held_out_loss": means["loss"]}
        if metric is not None:
            measured["metric"] = means["metric"]
        return float(value), measured

    return measure


def _is_data_set(train: Any) -> bool:
    """Whether `train` is a pair (inputs, targets), and not batches; `fit` says how to tell."""
    if isinstance(train, list):
        return len(train) == 2 and hasattr(train[0], "shape")
    return _is_pair(train)


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2


def _as_arrays(name: str, data: Any) -> tuple[PyTree, PyTree]:
    """A data set or a batch as arrays; raises unless it is a pair with N examples."""
    _require_pair(name, data)
    inputs, targets = data
    require_examples(f"fit: {name}", inputs=inputs, targets=targets)
    return jax.tree.map(jnp.asarray, (inputs, targets))


def _require_pair(name, data):
    if not _is_pair(data):
        raise ValueError(
            f"fit: {name} is {type(data).__name__}, expected a pair of arrays (inputs, targets)."
        )


def _peek(batches: Any, epochs: int) -> tuple[Iterable[Data], PyTree]:
    """The iterable, with its first batch still in it, and the inputs of the first batch."""
    if not hasattr(batches, "__iter__") or isinstance(batches, str | bytes):
        raise ValueError(
            f"fit: train is {type(batches).__name__}, expected a pair of arrays (inputs, targets) "
            "or an iterable of such pairs."
        )
    if isinstance(batches, list | tuple):
        _require_pairs(batches)
    iterator = iter(batches)
    once_only = iterator is batches
    if once_only and epochs > 1:
        raise ValueError(
            f"fit: train is {type(batches).__name__}, which gives its batches only once, "
            f"for {epochs} epochs. Pass a list, or an object with __iter__; or epochs=1?"
        )
    first = next(iterator, None)
    if first is None:
        raise ValueError("fit: train has no batches.")
    inputs, _ = _as_arrays("batch 1", first)
    return (itertools.chain([first], iterator) if once_only else batches), inputs


def _require_pairs(batches):
    """Refuses a list that is meant as a data set of several inputs, before its first step."""
    for i, batch in enumerate(batches, 1):
        if not _is_pair(batch):
            raise ValueError(
                f"fit: train is a {type(batches).__name__}, so its entries are batches, and batch "
                f"{i} is {type(batch).__name__}, expected a pair of arrays (inputs, targets). A "
                "data set with several inputs is a tuple, ((x, mask), targets)."
            )


def _make_require_data(net, loss, params):
    """`require_data(name, data)` refuses data that cannot be trained on.

    The network and the loss look at the data too, and their messages become part of its own.
    """

    def require_data(name, data):
        inputs, _ = data
        if not is_finite(inputs):
            raise _not_finite_error(name, "inputs", _not_finite(inputs))
        n = len(jax.tree.leaves(inputs)[0])
        for i in range(0, n, 1024):  # in pieces, which bounds the memory for the outputs
            x, t = take(data, slice(i, i + 1024))
            try:
                outputs, _ = jax.eval_shape(net.forward, params, x)
                zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), outputs)
                answer = loss(zeros, t)
            except LayerError as error:
                raise error.inside(f"fit: {name}") from None
            except ValueError as error:
                raise ValueError(f"fit: {name}: {error}") from None
            size = require_examples(f"fit: {name}", inputs=x, outputs=outputs)
            values, _ = require_answer(f"fit: {name}", answer, zeros, size)
            # Where the loss gives a target no weight, its value is finite whatever the target is.
            if not is_finite(t) and not is_finite(values):
                wrong = _not_finite(t) & _not_finite(values)
                if wrong.any():
                    raise _not_finite_error(name, "targets", wrong, i)

    return require_data


def _not_finite(tree: PyTree) -> np.ndarray:
    """Which examples have a number that is infinite or nan, [N]."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    bad = [jnp.any(~jnp.isfinite(leaf), axis=range(1, leaf.ndim)) for leaf in leaves]
    return np.logical_or.reduce([np.asarray(one) for one in bad])


def _not_finite_error(name, what, wrong, start=0):
    return ValueError(
        f"fit: {name} has {what} that are infinite or not a number, the first in example "
        f"{start + int(np.argmax(wrong))}."
    )


def _require_own_state(state, net, optimizer, rule, shape):
    """Refuses a state of another network, optimizer or rule."""

    def require(what, own, like, of, *, dtypes):
        difference = first_difference(own, like, dtypes=dtypes)
        if difference is not None:
            raise ValueError(
                f"fit: state.{what} is that of another {of}: {difference}. Take the state of this "
                f"{of}, or make a new one by init_state(...)?"
            )

    require_state("fit", state)
    key = jax.eval_shape(lambda: jax.random.key(0))
    # Parameters may have been converted to another dtype than that in which they were drawn.
    try:
        params = jax.eval_shape(lambda key: net.init(key, shape)[0], key)
        rule_state = jax.eval_shape(lambda key: rule.make(key, net, shape), key)
    except LayerError:  # a network that draws no parameters; its forward pass checks the shapes
        pass
    else:
        require("params", state.params, params, "network", dtypes=False)
        require("rule_state", state.rule_state, rule_state, "rule", dtypes=False)
    opt_state = jax.eval_shape(optimizer.init, state.params)
    require("opt_state", state.opt_state, opt_state, "optimizer", dtypes=True)


def _require_arguments(
    net,
    loss,
    optimizer,
    rule,
    key,
    state,
    held_out,
    metric,
    callback,
    patience,
    epochs,
    batch_size,
    target,
):
    """Refuses wrong arguments, and names all of them in one message."""
    wrong = []
    if not isinstance(net, Layer):
        wrong.append(f"net is {type(net).__name__}, expected a Layer")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        wrong.append(f"optimizer is {type(optimizer).__name__}, expected one of optax")
    if not isinstance(rule, Rule):
        wrong.append(f"rule is {type(rule).__name__}, expected a Rule, such as exact()")
    if (key is None) == (state is None):
        wrong.append("expected a key for a new state or a state to continue from, and not both")
    functions = {"loss": loss, "metric": metric, "callback": callback}
    for name, function in functions.items():
        if not callable(function) and (name == "loss" or function is not None):
            wrong.append(f"{name} is {function!r}, expected a function")
    counts = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    for name, count in counts.items():
        if not is_count(count) and (name != "patience" or count is not None):
            wrong.append(f"{name} is {count!r}, expected a positive integer")
    if patience is not None and held_out is None:
        wrong.append("patience needs held_out data")
    if target is not None and not _is_finite_number(target):
        wrong.append(f"target is {target!r}, expected a finite number")
    if wrong:
        raise ValueError(f"fit: {'; '.join(wrong)}.")


def _is_finite_number(x: Any) -> bool:
    return np.shape(x) == () and np.isreal(x) and bool(np.isfinite(x))
