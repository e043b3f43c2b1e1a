"""The train state, the training step, the epoch, and evaluation.

Each function here returns a pure function, jit-compiled as a whole:

    make_step    one batch: a forward pass, a backward pass, and an update of the parameters
    make_epoch   every example once, in batches drawn at random: one `lax.scan` of steps
    evaluate     the mean loss and metric, without an update

`fitting.fit` runs epochs until the network is good enough.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.core import Tracer

from jaxbp.forward import forward_and_loss
from jaxbp.readings.sums import mean
from jaxbp.require import (
    require_call,
    require_count,
    require_examples,
    require_function,
    require_key,
    require_layer,
    require_positive,
)
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.sweeps.gradients import backprop, value_and_grad
from jaxbp.training.averages import over, plus, summed, times
from jaxbp.training.fused import fused_update
from jaxbp.training.placing import batch_at, jit, kept, varying
from jaxbp.training.updates import GRADS
from jaxbp.types import (
    Layer,
    LossFunction,
    Params,
    PyTree,
    Reading,
    Rule,
    Shape,
    exportable,
    show_shape,
)

__all__ = ["TrainState", "deferred", "evaluate", "init_state", "make_epoch", "make_step"]

# `metric(outputs, targets) -> [N]`.
Metric: TypeAlias = Callable[[Any, Any], jax.Array]


@exportable
class TrainState(NamedTuple):
    """All that training changes.

    `jax.export` can serialize a step, once the records in the state of the optimizer are registered
    by `jax.export.register_namedtuple_serialization`. Those of the library are.

    Attributes:
      params: the parameters.
      opt_state: the state of the optimizer.
      step: the number of steps so far.
      key: every random number is drawn from this key and `step`. The key itself never changes.
      rule_state: the state of the rule that carries the error back.
    """

    params: Params
    opt_state: PyTree
    step: jax.Array
    key: jax.Array
    rule_state: PyTree = ()


def init_state(
    net: Layer,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    shape: Shape,
    *,
    rule: Rule = exact(),
) -> TrainState:
    """The state before the first step, with parameters drawn by the network's initialisers.

    Args:
      net: a Layer.
      optimizer: an optax optimizer.
      key: a random key.
      shape: the shape of one example, without N; of several inputs a tree of shapes.
      rule: which weights carry the error back. The drawn parameters do not depend on it.

    Raises:
      TypeError: `net` is not a Layer, or `optimizer` is not one of optax.
      ValueError: `rule` is not a Rule, `key` is not a random key, or the network or the rule
        refuses the shape.

    Example:
      >>> import jax, optax, jaxbp as bp
      >>> state = bp.init_state(bp.dense(2), optax.sgd(0.1), jax.random.key(0), (3,))
      >>> state.params["weight"].shape, int(state.step)
      ((3, 2), 0)
    """
    require_layer("init_state: net", net)
    require_optimizer("init_state", optimizer)
    require_rule("init_state", rule)
    if key is None:
        raise ValueError("init_state: draws parameters and needs a random key.")
    require_key("init_state", "key", key)
    init_key, key = jax.random.split(key)
    params, _ = net.init(init_key, shape)
    # With another key than the network's: otherwise a rule that draws by the network's initialisers
    # would draw the parameters again.
    rule_state = rule.make(jax.random.fold_in(init_key, RULE_STREAM), net, shape)
    # Some optimizers hold an array twice, or hold the parameters. A step donates the state, and a
    # donated array must occur only once.
    opt_state = jax.tree.map(jnp.copy, optimizer.init(params))
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key, rule_state)


def make_step(
    net: Layer,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    rule: Rule = exact(),
    read: Mapping[str, Reading] | None = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    extra_args: Mapping[str, Callable[..., Any]] | None = None,
    fused: bool = False,
    max_norm: float | None = None,
    donate: bool = True,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Any]]]:
    """A training step: one forward and backward pass over a batch, one update by the mean gradient.

    The step is pure and jit-compiled.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      optimizer: an optax optimizer; its update may also take `value`, `grad` and `value_fn`.
      rule: which weights carry the error back (see `rules`). `init_state` makes its state.
      read: a dict of readings to record, computed in the same backward pass.
      measures: a dict of other functions to record, each `function(params, inputs, targets, *, key,
        rule_state, rule_key) -> value`, such as `alignment` returns. They get the parameters before
        the step. What they share with the step, such as the forward pass, is computed once.
      extra_args: a dict of other arguments for the optimizer's update, by name. Each is computed by
        a `function(params, inputs, targets, *, key) -> value`, such as `kfac_factors` returns. The
        key is that of the forward pass. The optimizer itself computes those that are `deferred`.
      fused: whether each layer is updated inside the backward pass, as soon as its gradient is
        read, so that the gradients of all layers never exist at once. The numbers are the same; a
        `stack` takes less memory (see `fused`). For optimizers that work leaf by leaf.
      max_norm: the largest norm of the mean gradient of all parameters in a fused step; a larger
        gradient is scaled to it, as `optax.clip_by_global_norm` does.
      donate: whether the new state may use the memory of the old one. The old state can then no
        longer be read.

    Returns:
      `step(state, inputs, targets) -> (state, record)`. The record is a dict with the mean loss as
      `loss`, a tree for each reading, and the value of each measure.

    Raises:
      TypeError: `net` is not a Layer, `optimizer` is not one of optax, or something is not a
        function.
      ValueError: `read`, `measures` or `extra_args` is not a dict, or uses a reserved name;
        `max_norm` is not positive, or given to a step that is not fused, or `extra_args` to one
        that is; or, when called, the state was given to a step that donates, inputs and targets do
        not have the same number of examples, or the optimizer or the rule of a fused step needs the
        gradients of all parameters at once.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxbp as bp
      >>> net, optimizer = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2)), optax.sgd(0.1)
      >>> state = bp.init_state(net, optimizer, jax.random.key(0), (3,))
      >>> step = bp.make_step(net, bp.squared_error, optimizer)
      >>> state, record = step(state, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> int(state.step), sorted(record)
      (1, ['loss'])
    """
    options = _Options(read, measures, extra_args, fused, max_norm)
    return _make_step("make_step", net, loss, optimizer, rule, options, donate=donate)


class _Options(NamedTuple):
    """What a step does beside its update, and how it updates: arguments of `make_step`."""

    read: Mapping[str, Reading] | None
    measures: Mapping[str, Callable[..., Any]] | None
    extra_args: Mapping[str, Callable[..., Any]] | None
    fused: bool
    max_norm: float | None


def _make_step(name, net, loss, optimizer, rule, options, *, donate=True):
    """`make_step`, with the name of a call for messages."""
    require_call(name, net, loss)
    require_optimizer(name, optimizer)
    require_rule(name, rule)
    _require_options(name, options)
    optimizer = optax.with_extra_args_support(optimizer)
    if options.fused:
        read, max_norm = options.read or {}, options.max_norm
        update = _fused(name, net, loss, optimizer, rule, read, max_norm)
    else:
        update = _by_gradients(net, loss, optimizer, rule, options.read, options.extra_args or {})

    def step(state, inputs, targets, layout=None):
        require_state(name, state)
        require_examples(name, inputs=inputs, targets=targets)
        choose_key, update_key = rule_keys(state)
        how = {
            "key": forward_key(state),
            "rule_state": state.rule_state,
            "rule_key": choose_key,
        }
        value, params, opt_state, record, move = update(state, inputs, targets, how)
        for own, measure in (options.measures or {}).items():
            record[own] = measure(state.params, inputs, targets, **how)
        rule_state = rule.update(state.rule_state, params, move=move, key=update_key)
        after = TrainState(params, opt_state, state.step + 1, state.key, rule_state)
        return kept(after, layout), {"loss": value, **record}

    return _in_words(name, jit(step, donate=donate))


def _by_gradients(net, loss, optimizer, rule, read, extra_args):
    """The update by a tree of gradients.

    It is `update(state, inputs, targets, how) -> (value, params, opt_state, record, move)`.
    """
    sweep = backprop(net, loss, read={GRADS: mean, **(read or {})}, rule=rule)
    mean_sweep = value_and_grad(net, loss, rule=rule)

    def update(state, inputs, targets, how):
        key = how["key"]
        if read:
            values, record = sweep(state.params, inputs, targets, **how)
            value, grads = jnp.mean(values), record.pop(GRADS)
        else:  # faster: the mean over examples is taken once, in delta, and not per parameter
            value, grads = mean_sweep(state.params, inputs, targets, **how)
            record = {}

        def value_fn(params):  # for optimizers with a line search
            outputs, _ = net.forward(params, inputs, key=key)
            return jnp.mean(loss(outputs, targets)[0])

        extra = {
            own: function(state.params, inputs, targets, key=key)
            for own, function in extra_args.items()
        }

        def move(tree):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, tree, value=value, grad=grads, value_fn=value_fn, **extra
            )
            return optax.apply_updates(tree, updates), opt_state

        params, opt_state = move(state.params)
        return value, params, opt_state, record, lambda tree: move(tree)[0]

    return update


def _fused(name, net, loss, optimizer, rule, read, max_norm):
    """The update inside the sweep, as `_by_gradients` returns it."""
    sweep = fused_update(name, net, loss, optimizer, rule, read, max_norm)

    def move(tree):
        del tree
        raise ValueError(
            f"{name}: the rule {rule.name} updates its state by the gradients of all parameters, "
            "which a fused step does not have. Leave fused out?"
        )

    def update(state, inputs, targets, how):
        return *sweep(state.params, state.opt_state, inputs, targets, **how), move

    return update


def _in_words(name, jitted):
    """A jitted step, epoch or evaluation that says what is wrong where `jax.jit` itself refuses.

    Everything else is checked while it is traced. These checks run only after an error, so they
    cost nothing.
    """

    @functools.wraps(jitted)
    def function(start, inputs, targets):
        try:
            return jitted(start, inputs, targets)
        except (TypeError, ValueError, RuntimeError) as error:
            if any(map(_is_deleted, jax.tree.leaves(start))):
                raise ValueError(
                    f"{name}: the state was already given to a step that donates it, so its arrays "
                    "are deleted. Go on from the state that the step returned, or make the step "
                    "with donate=False?"
                ) from error
            if not str(error).startswith(name):
                require_examples(name, inputs=inputs, targets=targets)
            raise

    for method in ("clear_cache", "eval_shape", "lower", "trace"):  # what else users do with it
        setattr(function, method, getattr(jitted, method))
    return function


def _is_deleted(leaf):
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted()


def deferred(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """An extra argument that the optimizer computes itself, where it needs it.

    Use it in `extra_args` for an optimizer that takes a function instead of a value, such as
    `scale_by_kfac` with `factors_every`. In steps in which the optimizer does not call the
    function, nothing is computed.

    Args:
      function: `function(params, inputs, targets, *, key) -> value`, as `extra_args` takes it.

    Returns:
      `function(params, inputs, targets, *, key) -> (function() -> value)`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> later = bp.deferred(lambda params, inputs, targets, *, key: jnp.mean(inputs))
      >>> value = later((), jnp.ones(3), jnp.ones(3), key=jax.random.key(0))
      >>> float(value())
      1.0
    """

    def defer(params, inputs, targets, *, key):
        return lambda: function(params, inputs, targets, key=key)

    return defer


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
    options = _Options(read, measures, extra_args, fused, max_norm)
    step = _make_step(name, net, loss, optimizer, rule, options)
    run = _on_batches(step, batch_size)

    def epoch(state, inputs, targets, layout=None):
        require_state(name, state)
        n = require_examples(name, inputs=inputs, targets=targets)
        _require_whole_batches(name, n, batch_size)
        state, sums = run(state, shuffle(state, n), inputs, targets, layout)
        return state, over(sums, n)

    return _in_words(name, jit(epoch))


def make_part(net, loss, optimizer, *, batch_size, rule, **options):
    """A part of an epoch, `part(state, inputs, targets, indices) -> (state, sums)`, jit-compiled.

    It takes the examples at these indices in batches, or if they are None, all examples in the
    random order of the next epoch. The sums are those of the records over these examples.
    """
    step = _make_step("fit", net, loss, optimizer, rule, _Options(**options))
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

    return _in_words(name, jit(function))


# Names that readings and measures may not use: the other entries of records, and the optimizer's
# own reading.
RESERVED = {"epoch", "loss", "held_out_loss", "metric", GRADS}


# Arguments that the optimizer's update gets in any case.
PASSED = {"updates", "state", "params", "value", "grad", "value_fn"}


def require_optimizer(name: str, optimizer: Any) -> None:
    """Raises unless an optimizer is one of optax; `name` is the call, for messages."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"{name}: optimizer is {optimizer!r}; it takes one of optax.")


def require_state(name: str, state: Any) -> None:
    """Raises unless a state is a TrainState; `name` is the call, for messages."""
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{name}: state is not a TrainState, which init_state makes; it is of structure "
            f"{jax.tree.structure(state)}."
        )


def _require_whole_batches(name, n, batch_size):
    """Raises if n is a symbolic size of `jax.export`, and the last batch may be a smaller one."""
    if export.is_symbolic_dim(n) and n % batch_size != 0:
        raise ValueError(
            f"{name}: the number of examples is {n}, which batches of {batch_size} may not divide. "
            f'Take a multiple, such as jax.export.symbolic_shape("{batch_size}*b")?'
        )


def _require_options(name, options):
    """Raises unless the arguments of a step are right, and go together."""
    _require_names(name, "read", "readings", options.read, RESERVED)
    taken = RESERVED | set(options.read or {})
    _require_names(name, "measures", "measures", options.measures, taken)
    _require_names(name, "extra_args", "arguments", options.extra_args, PASSED)
    if not isinstance(options.fused, bool):
        raise ValueError(f"{name}: fused is {options.fused!r}; it takes True or False.")
    if options.fused and options.extra_args:
        raise ValueError(
            f"{name}: extra_args are computed from all parameters, before the backward pass that "
            "updates them. A fused step has none. Leave one of the two out?"
        )
    if options.max_norm is not None:
        require_positive(name, "max_norm", options.max_norm)
        if not options.fused:
            raise ValueError(
                f"{name}: max_norm is for a step with fused=True. Without it, put "
                f"optax.clip_by_global_norm({options.max_norm}) before the optimizer?"
            )


def _require_names(name, argument, what, functions, reserved):
    if functions is None:
        return
    if not isinstance(functions, Mapping):
        raise ValueError(
            f"{name}: {argument} is {type(functions).__name__}, expected a dict of {what} by name."
        )
    if taken := reserved & set(functions):
        raise ValueError(
            f"{name}: {argument} has {what} called {', '.join(sorted(taken))}: names are taken."
        )
    for own, function in functions.items():
        require_function(name, f"{argument}[{own!r}]", function)


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


# Keys are folded from a key that never changes, so a network that draws nothing computes no keys.
# Splitting a key at every step took a tenth of the time of a small network's epoch.
SHUFFLE_STREAM, RULE_STREAM = 2**31, 2**31 + 1  # no step counter reaches these


def forward_key(state: TrainState) -> jax.Array:
    """The key of the next step's forward pass, for layers that draw."""
    return jax.random.fold_in(state.key, state.step)


def rule_keys(state: TrainState) -> jax.Array:
    """The two keys for the rule's `choose` and `update` in the next step."""
    stream = jax.random.fold_in(state.key, RULE_STREAM)
    return jax.random.split(jax.random.fold_in(stream, state.step))


def shuffle(state: TrainState, n: int) -> jax.Array:
    """The indices of n examples in the random order of the next epoch, [N]."""
    stream = jax.random.fold_in(state.key, SHUFFLE_STREAM)
    # One sort by random numbers. jax.random.permutation sorts twice or more, and sorts are slow.
    return jnp.argsort(jax.random.bits(jax.random.fold_in(stream, state.step), (n,), "uint32"))


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
