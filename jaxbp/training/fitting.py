"""Training with validation and early stopping.

`fit` trains for many epochs, and measures the network after each. It stops when the network is good
enough, when it no longer improves, or after the last epoch. Arguments and data are checked before
the first step.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from jaxbp.require import first_difference, is_count
from jaxbp.rules.feedback import exact
from jaxbp.training.averages import over
from jaxbp.training.batches import Metric
from jaxbp.training.checkpoints import outline
from jaxbp.training.data import Data, as_arrays, is_data_set, make_require_data, peek
from jaxbp.training.epochs import OnArrays, OnBatches
from jaxbp.training.interrupts import Interrupted, noted_signals
from jaxbp.training.nonfinite import BadStepError, NonFiniteError, locate
from jaxbp.training.placing import beside
from jaxbp.training.processes import happened_anywhere
from jaxbp.training.runs import Best, Run, after_fit, make_goal, make_measure, plain
from jaxbp.training.state import TrainState, init_state, require_state
from jaxbp.training.storage import Storage
from jaxbp.types import Layer, LayerError, LossFunction, Params, PyTree, Reading, Rule

__all__ = ["Fit", "fit"]


class Fit(NamedTuple):
    """The result of a run of `fit`.

    Attributes:
      params: the parameters of the best epoch on the validation set; without one, the last
        parameters.
      state: the last state, from which another run can continue.
      records: what was recorded, one dict for each epoch. Single numbers are Python's, so that
        `json.dumps(records, default=np.ndarray.tolist)` writes them down; other arrays are NumPy's.
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
    state: "TrainState | Fit | None" = None,
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
    fused: bool = False,
    max_norm: float | None = None,
    callback: Callable[[TrainState, dict[str, Any]], object] | None = None,
    checkpoints: str | PathLike[str] | None = None,
    checkpoint_every: tuple[int, Literal["epochs", "steps"]] = (1, "epochs"),
    keep_checkpoints: int = 3,
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

    With `checkpoints`, a folder, the run survives: the same call goes on where the run was stopped,
    and its result is that of a run that was never stopped, bit for bit. Everything that decides the
    future is stored: parameters, optimizer, rule, key, the best epoch, the records, and the
    position in the data. If the batches come from an iterator that has `get_state` and `set_state`,
    as those of grain have, its state is stored; other batches are drawn again from the start of the
    epoch. A checkpoint that cannot be read is passed over, with a warning. Needs the extra
    `checkpoints` (orbax).

    The data may be divided among devices by examples, as in `make_epoch`, also among those of
    several processes (`jax.distributed`). Then each process makes the same call, with a callback
    that does the same in each and a folder of checkpoints that all of them see. A state that is
    divided stays so, and a stored one is divided again as the state of the call that goes on.

    Ctrl-C and SIGTERM end the current step, or the current part of an epoch between two
    checkpoints; then they store a checkpoint and raise `Interrupted`. A signal to one of several
    processes ends all.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      optimizer: any optax optimizer.
      train: a data set or batches (see above).
      key: a random key to make a new state.
      state: a state to continue from, instead of a key. Or the `Fit` of an earlier run with the
        same data, metric and readings: then its epochs, records and patience go on counting, and
        `epochs` counts those of both runs.
      held_out: the validation set, a pair `(inputs, targets)`.
      metric: `metric(outputs, targets) -> [N]`, such as `bp.accuracy`.
      target: the measure that is good enough.
      patience: the number of epochs to wait for an improvement; needs `held_out`.
      epochs: the largest number of epochs.
      batch_size: the number of examples in a batch, if `train` is a data set.
      rule: which weights carry the error back (see `rules`).
      read: a dict of readings to record, as their mean over the epoch. The records of `health`
        describe all batches of the epoch together.
      measures: a dict of other functions to record, as in `make_step`; also as their mean.
      extra_args: other arguments of the optimizer's update, as in `make_step`.
      fused: whether the update happens inside the backward pass, as in `make_step`.
      max_norm: the largest norm of the gradient in a fused step, as in `make_step`.
      callback: `callback(state, record)` is called after each epoch, such as to print progress.
        What it raises leaves `fit`, with the state and the records as attributes.
      checkpoints: a folder for checkpoints, or None.
      checkpoint_every: how often to store one: after so many epochs, or after each epoch and in it
        after so many steps.
      keep_checkpoints: how many of the newest checkpoints to keep. Each of them also has the
        parameters of the best epoch.

    Returns:
      A `Fit`. Each of its records has `epoch`; `loss`, the mean training loss of the epoch;
      `held_out_loss` if there is a validation set; `metric` if there is a metric; and the readings
      and measures by their names.

    Raises:
      ValueError: an argument is wrong; or the data are empty, of unequal lengths, not finite, or of
        shapes, dtypes or labels that the network or the loss refuses; or `state` is that of another
        optimizer, rule or network; or `checkpoints` has those of another run. Targets need not be
        finite where the loss gives them no weight.
      NonFiniteError: a loss, a parameter, the state of the rule or the measure became infinite or
        not a number. The error says where, and has the last good state.
      Interrupted: the run got SIGINT (Ctrl-C) or SIGTERM. It has the last state and the records.
      ImportError: `checkpoints` are asked for and orbax is not installed.

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
        batch_size, target, checkpoint_every, keep_checkpoints,
    )  # fmt: skip
    if batched := not is_data_set(train):
        if metric is not None and held_out is None:
            raise ValueError("fit: a metric needs held_out data where train comes in batches.")
        batches, first = peek(train, epochs)
    else:
        batches, first = None, as_arrays("train", train)
    shape = jax.tree.map(lambda x: x.shape[1:], first[0])
    earlier, state = (state, state.state) if isinstance(state, Fit) else (None, state)
    if state is None:
        assert key is not None  # checked by _require_arguments
        state = init_state(net, optimizer, key, shape, rule=rule)
    else:
        _require_own_state(state, net, optimizer, rule, shape)
    state = beside(state, first)

    require_data = make_require_data(net, loss, state.params)

    def make(maker, **options):
        how = {"read": read, "measures": measures, "extra_args": extra_args}
        how |= {"rule": rule, "fused": fused, "max_norm": max_norm}
        return maker(net, loss, optimizer, **how, **options)

    def checked(i, batch):
        batch = as_arrays(f"batch {i}", batch)
        require_data(f"batch {i}", batch)
        return batch

    often, unit = checkpoint_every
    if batches is not None:
        parts = OnBatches(make, batches, checked, first)
    else:
        require_data("train", first)
        steps = often if checkpoints is not None and unit == "steps" else None
        parts = OnArrays(make, first, batch_size, steps)
    if held_out is not None:
        held_out = as_arrays("held_out", held_out)
        require_data("held_out", held_out)

    measure = make_measure(net, loss, metric, held_out, first)
    goal = make_goal(metric, held_out, target, patience, epochs)
    start = Run(state, Best(0, -goal.sign * math.inf, state.params))

    def describe() -> dict[str, Any]:
        """What the run has to share with its checkpoints, for JSON."""
        return {
            "network": {"name": net.name, "parameters": outline(start.state.params)},
            "optimizer": outline(start.state.opt_state),
            "rule": {"name": rule.name, "state": outline(start.state.rule_state)},
            "start": {
                "key": jax.random.key_data(start.state.key).tolist(),
                "step": int(start.state.step),
            },
            "train": outline(first),
            "held_out": outline(held_out),
            "batch_size": "that of the batches" if batched else batch_size,
            "measure": goal.name,
            "checkpoint_every": [often, unit],
        }

    def like() -> tuple[PyTree, PyTree]:
        """The sums of an epoch, and a record without its epoch, as shapes and dtypes."""
        sums = parts.sums_like(start.state)
        means = jax.eval_shape(lambda sums: over(sums, 1), sums)
        return sums, {**means, **jax.eval_shape(measure, start.state.params)}

    if earlier is not None:
        start = after_fit(start, earlier.params, earlier.records, like()[1], goal)

    with Storage(checkpoints, keep_checkpoints, describe) as storage, noted_signals() as signals:

        def keep(run, *, due):
            """Stores the run if it is time, or at a signal, which then ends the run."""
            interrupted = happened_anywhere(bool(signals), run.state)
            if due or interrupted:
                storage.save(run)
            if interrupted:
                raise Interrupted(run.epoch, run.state, run.plain_records, checkpoints is not None)

        run = storage.restored(start, like)
        while (stop := goal.reason_to_stop(run)) is None:
            try:
                for state, progress in parts.rest(run.state, run.progress):
                    run = run._replace(state=state, progress=progress)
                    keep(run, due=unit == "steps" and progress.steps % often == 0)
            except BadStepError as bad:
                place = locate(net, loss, rule, bad)
                records = run.plain_records
                raise NonFiniteError(run.epoch, bad.step, place, bad.state, records) from None
            record = {**run.progress.record(), **measure(run.state.params)}
            if not math.isfinite(float(record[goal.entry])):
                what = f"the {goal.name}"
                raise NonFiniteError(run.epoch, None, what, run.state, run.plain_records)
            run = run.after_epoch(record, goal)
            if unit == "steps" or run.epochs % often == 0:
                storage.save(run)
            if callback is not None:
                _call_back(callback, run, storage)
            keep(run, due=False)
        storage.save(run)
    stopped_by, reason = stop
    params = run.state.params if held_out is None else run.best.params
    return Fit(params, run.state, run.plain_records, stopped_by, f"{stopped_by}: {reason}")


def _call_back(callback, run, storage):
    """Calls the callback. What it raises carries the state and the records, which are stored."""
    try:
        callback(run.state, plain(run.records[-1]))
    except Exception as error:
        storage.save(run)
        error.state, error.records = run.state, run.plain_records  # type: ignore[attr-defined]
        error.add_note(
            f"fit: the callback raised this after epoch {run.epochs}. The last state and the "
            "records are in its `state` and `records`."
        )
        raise


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
    checkpoint_every,
    keep_checkpoints,
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
    if not is_count(keep_checkpoints):
        wrong.append(f"keep_checkpoints is {keep_checkpoints!r}, expected a positive integer")
    if not _is_often(checkpoint_every):
        wrong.append(
            f'checkpoint_every is {checkpoint_every!r}, expected such as (1, "epochs") or '
            '(500, "steps")'
        )
    if patience is not None and held_out is None:
        wrong.append("patience needs held_out data")
    if target is not None and not _is_finite_number(target):
        wrong.append(f"target is {target!r}, expected a finite number")
    if wrong:
        raise ValueError(f"fit: {'; '.join(wrong)}.")


def _is_finite_number(x: Any) -> bool:
    return np.shape(x) == () and np.isreal(x) and bool(np.isfinite(x))


def _is_often(every: Any) -> bool:
    if not isinstance(every, tuple | list) or len(every) != 2:
        return False
    return is_count(every[0]) and every[1] in ("epochs", "steps")
