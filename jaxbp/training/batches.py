"""Training and evaluation on a whole data set, in batches.

Each function here returns a pure function, jit-compiled as a whole:

    make_epoch   every example once, in batches drawn at random: one `lax.scan` of steps
    evaluate     the mean loss and metric, without an update
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from jaxbp.forward import forward_and_loss
from jaxbp.require import require_call, require_count, require_examples, require_function
from jaxbp.rules.feedback import exact
from jaxbp.training.averages import over, plus, summed, times
from jaxbp.training.placing import batch_at, jit, kept, varying
from jaxbp.training.state import TrainState, require_state, shuffle
from jaxbp.training.step import StepOptions, in_words, make_named_step
from jaxbp.types import Layer, LossFunction, Params, PyTree, Reading, Rule, show_shape

__all__ = ["evaluate", "make_epoch"]

# `metric(outputs, targets) -> [N]`.
Metric: TypeAlias = Callable[[Any, Any], jax.Array]


def make_epoch(
    net: Layer,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    rule: Rule = exact(),
    read: Mapping[str, Reading] | None = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    extra_args: Mapping[str, Callable[..., Any]] | None = None,
    fused: bool = False,
    max_norm: float | None = None,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Any]]]:
    """An epoch: every example once, in batches drawn at random, as one `lax.scan` of steps.

    If the batch size does not divide N, the last batch is smaller. The epoch is pure and
    jit-compiled.

    If the data are divided among devices by examples, so is each batch, and each device computes
    its share; the order of the examples is that on one device. A batch that the devices cannot
    divide into equal parts is computed whole on each of them.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      optimizer: an optax optimizer, as in `make_step`.
      batch_size: the number of examples in a batch.
      rule: as in `make_step`.
      read: as in `make_step`. The shapes of readings must not depend on N.
      measures: as in `make_step`. Their shapes must not depend on N.
      extra_args: as in `make_step`.
      fused: as in `make_step`.
      max_norm: as in `make_step`.

    Returns:
      `epoch(state, inputs, targets) -> (state, record)`. The record is the mean, over all examples,
      of the records of the steps. The records of `health` describe all batches together.

    Raises:
      TypeError: as for `make_step`.
      ValueError: as for `make_step`; or `batch_size` is not a positive integer; or, when called,
        the shape of something recorded depends on the number of examples.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> net, optimizer = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2)), optax.sgd(0.1)
      >>> state = bp.init_state(net, optimizer, jax.random.key(0), (3,))
      >>> epoch = bp.make_epoch(net, bp.squared_error, optimizer, batch_size=4)
      >>> state, record = epoch(state, jnp.ones((10, 3)), jnp.zeros((10, 2)))
      >>> int(state.step)
      3
    """
    name = "make_epoch"
    require_count(name, "batch_size", batch_size)
    options = StepOptions(read, measures, extra_args, fused, max_norm)
    step = make_named_step(name, net, loss, optimizer, rule, options)
    run = _on_batches(step, batch_size)

    def epoch(state, inputs, targets, layout=None):
        require_state(name, state)
        n = require_examples(name, inputs=inputs, targets=targets)
        _require_whole_batches(name, n, batch_size)
        state, sums = run(state, shuffle(state, n), inputs, targets, layout)
        return state, over(sums, n)

    return in_words(name, jit(epoch))


def make_part(net, loss, optimizer, *, batch_size, rule, **options):
    """A part of an epoch, `part(state, inputs, targets, indices) -> (state, sums)`, jit-compiled.

    It takes the examples at these indices in batches, or if they are None, all examples in the
    random order of the next epoch. The sums are those of the records over these examples.
    """
    step = make_named_step("fit", net, loss, optimizer, rule, StepOptions(**options))
    run = _on_batches(step, batch_size)

    def part(state, inputs, targets, indices, layout=None):
        if indices is None:
            indices = shuffle(state, jax.tree.leaves(inputs)[0].shape[0])
        return run(state, indices, inputs, targets, layout)

    return jit(part)


def _on_batches(step, batch_size):
    """`run(state, indices, inputs, targets, layout) -> (state, sums)`: a step for each batch."""

    def run(state, indices, inputs, targets, layout):
        def step_on(state, indices):
            after, record = step(state, *batch_at((inputs, targets), indices, layout))
            return kept(after, layout), record

        return _scan_batches(step_on, state, indices, batch_size)

    return run


def evaluate(
    net: Layer, loss: LossFunction, *, metric: Metric | None = None, batch_size: int = 1024
) -> Callable[[Params, PyTree, PyTree], dict[str, jax.Array]]:
    """The mean loss and metric of a network, without an update and without random numbers.

    Use it on validation or test data. Layers that draw, such as dropout, get no key and are
    deterministic.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      metric: `metric(outputs, targets) -> [N]`, such as `bp.accuracy`.
      batch_size: the number of examples that go through the network at a time.

    Returns:
      `function(params, inputs, targets) -> record`, jit-compiled. The record is a dict with the
      mean over examples of `loss` and, if there is one, of `metric`.

    Raises:
      TypeError: `net` is not a Layer, or `loss` or `metric` is not a function.
      ValueError: `batch_size` is not a positive integer; or, when called, inputs and targets do not
        have the same number of examples, or the loss or the metric does not return a value for
        each.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.dense(2)
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> measure = bp.evaluate(net, bp.softmax_cross_entropy, metric=bp.accuracy)
      >>> sorted(measure(params, jnp.ones((10, 3)), jnp.zeros(10, int)))
      ['loss', 'metric']
    """
    name = "evaluate"
    require_call(name, net, loss)
    if metric is not None:
        require_function(name, "metric", metric)
    require_count(name, "batch_size", batch_size)

    def function(params, inputs, targets, layout=None):
        n = require_examples(name, inputs=inputs, targets=targets)
        _require_whole_batches(name, n, batch_size)

        def measure(carry, indices):
            x, t = batch_at((inputs, targets), indices, layout)
            outputs, _, values, _ = forward_and_loss(name, net, loss, params, x, t)
            record = {"loss": jnp.mean(values)}
            if metric is not None:
                record["metric"] = jnp.mean(_measured(name, metric(outputs, t), values.shape[0]))
            return carry, record

        _, sums = _scan_batches(measure, (), jnp.arange(n), batch_size)
        return over(sums, n)

    return in_words(name, jit(function))


def _measured(name, values, n):
    """What a metric returned, after a check that it is one number for each example."""
    shape = np.shape(values)
    if shape != (n,):
        hint = " Average the rest?" if shape[:1] == (n,) else ""
        raise ValueError(
            f"{name}: the metric returned an array of shape {show_shape(shape)}, expected [{n}]: "
            f"one number for each example.{hint}"
        )
    return jnp.asarray(values)


def _require_whole_batches(name, n, batch_size):
    """Raises if n is a symbolic size of `jax.export`, and the last batch may be a smaller one."""
    if export.is_symbolic_dim(n) and n % batch_size != 0:
        raise ValueError(
            f"{name}: the number of examples is {n}, which batches of {batch_size} may not divide. "
            f'Take a multiple, such as jax.export.symbolic_shape("{batch_size}*b")?'
        )


def _scan_batches(function, carry, indices, batch_size):
    """Scans `function(carry, indices) -> (carry, record)`.

    Returns the last carry, and the sum of the records, each times the size of its batch.
    """
    n = indices.shape[0]
    if not export.is_symbolic_dim(n):  # a symbolic one is a multiple of the batch size
        batch_size = min(batch_size, n)
    full = n // batch_size * batch_size
    batches = indices[:full].reshape(full // batch_size, batch_size)
    carry = varying(function, carry, batches[0])
    carry, records = jax.lax.scan(function, carry, batches)
    sums = times(summed(records), batch_size)
    if full < n:
        carry, record = function(carry, indices[full:])
        for name in record:
            if jax.tree.map(jnp.shape, record[name]) != jax.tree.map(jnp.shape, sums[name]):
                raise ValueError(
                    f"{name} has shapes that depend on the number of examples, which cannot be "
                    "averaged over batches. Average it over the examples?"
                )
        sums = plus(sums, times(record, n - full))
    return carry, sums
