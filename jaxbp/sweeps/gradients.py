"""The calls that users make: a forward pass, a loss and a backward sweep in one.

  y, cache = net.forward(params, x)               feedforward
  value, delta = loss(y, targets)                 compare with the targets
  tree = rule.choose(rule_state, params)          the weights that carry the error: exactly, params
  _, readings = net.backward(tree, cache, delta)  spread the error backwards

Each call returns a pure function, to be jit-compiled with the code around it. With a rule, it is
given the rule's state by name.
"""

import functools
import inspect

import jax
import jax.numpy as jnp

from jaxbp.readings.sums import mean, total
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.types import show_shape


def value_and_grad(net, loss, *, rule=exact()):
    """The mean loss and its gradient: in the place of `jax.value_and_grad`, by explicit chain rule.

      value = sum_n E_n / N,   grads = sum_n g_n / N

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      rule: which weights carry the error back (see `feedback`).

    Returns:
      `function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None) -> (value,
      grads)`; grads is a tree like params. `key` is for layers that draw random numbers, and
      `rule_key` for a rule that does.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> step = jax.jit(bp.value_and_grad(net, bp.squared_error))
      >>> value, grads = step(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> grads[0]["weight"].shape
      (3, 4)
    """
    require_rule("value_and_grad", rule)

    def function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None):
        outputs, cache = net.forward(params, inputs, key=key)
        values, delta = loss(outputs, targets)
        tree = rule.choose(rule_state, params, key=rule_key)
        # The sweep is linear in delta: divided here by N, it gives the mean as a total.
        _, grads = net.backward(tree, cache, delta / len(delta), read=total)
        return jnp.mean(values), grads

    return function


def backprop(net, loss, *, read=mean, error=None, rule=exact()):
    """What one backward sweep knows: the loss of each example and a reading at each parameter.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      read: a reading (see `readings`), or a dict of readings, all answered by the same sweep.
      error: what enters at the outputs, in place of the loss's delta: one of `errors`, of K
        columns. A reading with an argument `columns`, such as `diagonal`, then sums over the
        columns; any other is answered for each, with a first axis K more.
      rule: which weights carry the error back (see `feedback`).

    Returns:
      `function(params, inputs, targets, *, key=None, error_key=None, rule_state=(), rule_key=None)
      -> (values, readings)`: values is [N], and readings a tree like params, with a reading in
      place of each parameter. If `read` is a dict, readings is a dict of such trees. `key` is for
      layers that draw random numbers, `error_key` for an error that does, `rule_key` for a rule.

    Raises:
      ValueError: what `error` gives is not K arrays of the outputs' shape; or `rule` is no Rule, or
        the state that it gets is not its own.

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
    require_rule("backprop", rule)
    several = isinstance(read, dict)
    readings = read if several else {"one": read}

    def function(
        params, inputs, targets, *, key=None, error_key=None, rule_state=(), rule_key=None
    ):
        outputs, cache = net.forward(params, inputs, key=key)
        values, delta = loss(outputs, targets)
        tree = rule.choose(rule_state, params, key=rule_key)
        if error is None:
            answers = sweep(net, params, tree, cache, delta, readings)
        else:
            columns = error(loss, outputs, targets, error_key)
            if jnp.shape(columns)[1:] != outputs.shape:
                raise ValueError(
                    f"backprop: the error has shape {show_shape(jnp.shape(columns))}, expected "
                    f"columns of the outputs' shape, {show_shape(('K', *outputs.shape))}."
                )
            answers = sweep_columns(net, params, tree, cache, columns, readings)
        return values, answers if several else answers["one"]

    return function


def sweep(net, params, tree, cache, delta, readings):
    """One sweep: a dict with the tree, like params, of answers of each reading of a dict."""

    def read(signal):
        return {name: reading(signal) for name, reading in readings.items()}

    _, answers = net.backward(tree, cache, delta, read=read)
    return {
        name: jax.tree.map(lambda _, answer, name=name: answer[name], params, answers)
        for name in readings
    }


COLUMNS = "columns"  # the name of the axis over which sweeps of several errors are vmapped


def sweep_columns(net, params, tree, cache, columns, readings):
    """The sweeps of all columns [K, N, ...] side by side, over one cache: a dict as of `sweep`."""
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


def _takes_columns(reading):
    return "columns" in inspect.signature(reading).parameters
