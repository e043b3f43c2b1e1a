"""The training step: a forward pass, a backward pass, and an update of the parameters.

`make_step` returns a pure function, jit-compiled as a whole.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxbp.readings.sums import mean
from jaxbp.require import require_call, require_examples, require_function, require_positive
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.sweeps.gradients import backprop, value_and_grad
from jaxbp.training.fused import fused_update
from jaxbp.training.placing import jit, kept
from jaxbp.training.state import (
    TrainState,
    forward_key,
    require_optimizer,
    require_state,
    rule_keys,
)
from jaxbp.training.updates import GRADS
from jaxbp.types import Layer, LossFunction, PyTree, Reading, Rule

__all__ = ["deferred", "make_step"]


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
    options = StepOptions(read, measures, extra_args, fused, max_norm)
    return make_named_step("make_step", net, loss, optimizer, rule, options, donate=donate)


class StepOptions(NamedTuple):
    """What a step does beside its update, and how it updates: arguments of `make_step`."""

    read: Mapping[str, Reading] | None
    measures: Mapping[str, Callable[..., Any]] | None
    extra_args: Mapping[str, Callable[..., Any]] | None
    fused: bool
    max_norm: float | None


def make_named_step(name, net, loss, optimizer, rule, options, *, donate=True):
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

    return in_words(name, jit(step, donate=donate))


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


# Names that readings and measures may not use: the other entries of records, and the optimizer's
# own reading.
RESERVED = {"epoch", "loss", "held_out_loss", "metric", GRADS}


# Arguments that the optimizer's update gets in any case.
PASSED = {"updates", "state", "params", "value", "grad", "value_fn"}


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


def in_words(name, jitted):
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
