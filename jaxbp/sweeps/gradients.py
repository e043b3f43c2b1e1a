"""Gradients: a forward pass, the loss and a backward pass in one call.

    y, cache = net.forward(params, x)               forward pass
    value, delta = loss(y, targets)                 compare with the targets
    tree = rule.choose(rule_state, params)          the weights that carry the error
    _, readings = net.backward(tree, cache, delta)  backward pass

`value_and_grad` returns the mean loss and its gradient. `backprop` returns the loss of each example
and any readings. Both make a pure function; compile it with `jax.jit`, together with the code
around it. A backward pass through the whole network is also called a sweep.

Source:
  "Learning representations by back-propagating errors", Rumelhart, Hinton, Williams, 1986.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from jaxbp.forward import forward_and_loss, scaled_for_mean
from jaxbp.readings.formed import read_together
from jaxbp.readings.sums import mean
from jaxbp.require import require_call, require_function, require_key
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.signals.stacked import divided_like
from jaxbp.types import Layer, LossFunction, Params, PyTree, Reading, Rule, show_shape

__all__ = ["backprop", "value_and_grad"]

# An error, `error(loss, outputs, targets, key) -> columns [K, ...outputs' shape]` (see `errors`).
ErrorFunction: TypeAlias = Callable[[Any, Any, Any, Any], jax.Array]

Result_co = TypeVar("Result_co", covariant=True)


class SweepFunction(Protocol[Result_co]):
    """What `value_and_grad` and `reweighted` return: a forward and a backward pass."""

    def __call__(
        self,
        params: Params,
        inputs: PyTree,
        targets: PyTree,
        *,
        key: jax.Array | None = None,
        rule_state: PyTree = (),
        rule_key: jax.Array | None = None,
    ) -> Result_co:
        """Runs both passes; `key` is for layers that draw, `rule_key` for rules that draw."""
        ...


class BackpropFunction(Protocol):
    """What `backprop` returns: a forward and a backward pass, for any error and readings."""

    def __call__(
        self,
        params: Params,
        inputs: PyTree,
        targets: PyTree,
        *,
        key: jax.Array | None = None,
        error_key: jax.Array | None = None,
        rule_state: PyTree = (),
        rule_key: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Returns each example's loss, [N], and the readings."""
        ...


def value_and_grad(
    net: Layer, loss: LossFunction, *, rule: Rule = exact()
) -> SweepFunction[tuple[jax.Array, Params]]:
    """Makes a function that computes the mean loss and its gradient.

    Use it like `jax.value_and_grad`. The gradient comes from the explicit backward pass.

        value = sum_n E_n / N,   grads = sum_n g_n / N

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      rule: which weights carry the error back (see `feedback`).

    Returns:
      `function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None) -> (value,
      grads)`. `grads` is a tree like params. `key` is for layers that draw random numbers,
      `rule_state` is the state of the rule, and `rule_key` is for rules that draw random numbers.

    Raises:
      TypeError: `net` is not a Layer, or `loss` is not a function.
      ValueError: `rule` is not a Rule; or, when called, inputs and targets do not have the same
        number of examples, or the loss does not return a value for each.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> step = jax.jit(bp.value_and_grad(net, bp.squared_error))
      >>> value, grads = step(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> grads[0]["weight"].shape
      (3, 4)
    """
    name = "value_and_grad"
    require_call(name, net, loss)
    require_rule(name, rule)

    def function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None):
        require_key(name, "rule_key", rule_key)
        _, cache, values, delta = forward_and_loss(name, net, loss, params, inputs, targets, key)
        tree = rule.choose(rule_state, params, key=rule_key)
        delta, read = scaled_for_mean(delta, cache, values.shape[0])
        _, grads = net.backward(tree, cache, delta, read=read)
        return jnp.mean(values), divided_like(params, grads)

    return function


def backprop(
    net: Layer,
    loss: LossFunction,
    *,
    read: Reading | Mapping[str, Reading] = mean,
    error: ErrorFunction | None = None,
    rule: Rule = exact(),
) -> BackpropFunction:
    """Makes a function that computes each example's loss and a reading for each parameter.

    Use it for everything beyond the mean gradient: per-example gradients and norms, curvature,
    several readings from one backward pass, or learning rules. What is not asked for is not
    computed.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      read: a reading (see `readings`), or a dict of readings, all computed in one backward pass.
      error: the error that enters at the outputs instead of the loss's delta, one of `errors`. It
        has K columns. A reading with an argument `columns`, such as `diagonal`, sums over them.
        Any other reading is computed for each column, and its result gets K as first axis.
      rule: which weights carry the error back (see `feedback`).

    Returns:
      `function(params, inputs, targets, *, key=None, error_key=None, rule_state=(), rule_key=None)
      -> (values, readings)`. `values` [N] is each example's loss. `readings` is a tree like params
      with a reading in place of each parameter, or a dict of such trees if `read` is a dict. `key`
      is for layers that draw random numbers, `error_key` for errors and `rule_key` for rules that
      do. `rule_state` is the state of the rule.

    Raises:
      TypeError: `net` is not a Layer; or `loss`, `error` or a reading is not a function.
      ValueError: `rule` is not a Rule, or gets a state of another rule; or, when called, inputs and
        targets do not have the same number of examples, the loss does not return a value for each,
        or the columns of `error` do not have the outputs' shape.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> sweep = bp.backprop(
      ...     net, bp.squared_error, read={"grads": bp.mean, "sq_norms": bp.sq_norms}
      ... )
      >>> values, answers = jax.jit(sweep)(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> answers["grads"][0]["weight"].shape, bp.example_norms(answers["sq_norms"]).shape
      ((3, 4), (5,))
      >>> exact = bp.backprop(net, bp.squared_error, read=bp.diagonal, error=bp.ggn_columns)
      >>> values, curvature = jax.jit(exact)(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> curvature[0]["weight"].shape
      (3, 4)
    """
    require_call("backprop", net, loss)
    require_rule("backprop", rule)
    several = isinstance(read, Mapping)
    readings: Mapping[str, Reading] = read if several else {"one": read}
    for which, reading in readings.items():
        require_function("backprop", f"read[{which!r}]" if several else "read", reading)
    if error is not None:
        require_function("backprop", "error", error)

    def function(
        params, inputs, targets, *, key=None, error_key=None, rule_state=(), rule_key=None
    ):
        require_key("backprop", "error_key", error_key)
        require_key("backprop", "rule_key", rule_key)
        outputs, cache, values, delta = forward_and_loss(
            "backprop", net, loss, params, inputs, targets, key
        )
        tree = rule.choose(rule_state, params, key=rule_key)
        if error is None:
            answers = sweep(net, params, tree, cache, delta, readings)
        else:
            columns = error(loss, outputs, targets, error_key)
            _require_columns(columns, outputs)
            answers = sweep_columns(net, params, tree, cache, columns, readings)
        return values, answers if several else answers["one"]

    return function


def _require_columns(columns, outputs):
    """Refuses an error that is not K arrays of the outputs' shape, for each output."""
    structures = jax.tree.structure(columns), jax.tree.structure(outputs)
    if structures[0] != structures[1]:
        raise ValueError(
            f"backprop: the error has the structure {structures[0]}, expected that of the outputs, "
            f"{structures[1]}."
        )
    for column, y in zip(jax.tree.leaves(columns), jax.tree.leaves(outputs), strict=True):
        if jnp.ndim(column) == 0 or jnp.shape(column)[1:] != y.shape:
            raise ValueError(
                f"backprop: the error has shape {show_shape(jnp.shape(column))}, expected columns "
                f"of the outputs' shape, {show_shape(('K', *y.shape))}."
            )


def sweep(
    net: Layer,
    params: Params,
    tree: Params,
    cache: PyTree,
    delta: jax.Array,
    readings: Mapping[str, Callable[..., Any]],
) -> dict[str, PyTree]:
    """One backward pass: for each reading by its name, a tree like params with its results."""

    def read(signal):
        return read_together(readings, signal)

    _, answers = net.backward(tree, cache, delta, read=read)
    trees = {
        name: jax.tree.map(lambda _, answer, name=name: answer[name], params, answers)
        for name in readings
    }
    return {name: divided_like(params, answer, delta) for name, answer in trees.items()}


COLUMNS = "columns"  # the name of the vmapped axis of the columns of an error


def sweep_columns(
    net: Layer,
    params: Params,
    tree: Params,
    cache: PyTree,
    columns: jax.Array,
    readings: Mapping[str, Callable[..., Any]],
) -> dict[str, PyTree]:
    """One backward pass for each column of an error, [K, N, ...], vmapped; returns as `sweep` does.

    A reading with an argument `columns` gets the name of the vmapped axis, and its result has no
    axis K.
    """
    sums = {name for name, reading in readings.items() if _takes_columns(reading)}
    named = {
        name: functools.partial(reading, columns=COLUMNS) if name in sums else reading
        for name, reading in readings.items()
    }
    return jax.vmap(
        lambda column: sweep(net, params, tree, cache, column, named),
        axis_name=COLUMNS,
        out_axes={name: None if name in sums else 0 for name in readings},
    )(columns)


def _takes_columns(reading: Callable[..., Any]) -> bool:
    return "columns" in inspect.signature(reading).parameters
