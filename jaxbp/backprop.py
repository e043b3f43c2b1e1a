"""The calls that users make: a forward pass, a loss and a backward sweep in one.

  y, cache = net.forward(params, x)               feedforward
  value, delta = loss(y, targets)                 compare with the targets
  _, readings = net.backward(params, cache, delta)    spread the error backwards

Each call returns a pure function, to be jit-compiled with the code around it.
"""

import jax
import jax.numpy as jnp

from jaxbp.readings import mean, total


def value_and_grad(net, loss):
    """The mean loss and its gradient: in the place of `jax.value_and_grad`, by explicit chain rule.

      value = sum_n E_n / N,   grads = sum_n g_n / N

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.

    Returns:
      `function(params, inputs, targets, *, key=None) -> (value, grads)`; grads is a tree like
      params. `key` is for layers that draw random numbers.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2))
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> step = jax.jit(bp.value_and_grad(net, bp.squared_error))
      >>> value, grads = step(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
      >>> grads[0]["weight"].shape
      (3, 4)
    """

    def function(params, inputs, targets, *, key=None):
        outputs, cache = net.forward(params, inputs, key=key)
        values, delta = loss(outputs, targets)
        # The sweep is linear in delta: divided here by N, it gives the mean as a total.
        _, grads = net.backward(params, cache, delta / len(delta), read=total)
        return jnp.mean(values), grads

    return function


def backprop(net, loss, *, read=mean):
    """What one backward sweep knows: the loss of each example and a reading at each parameter.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      read: a reading (see `readings`), or a dict of readings, all answered by the same sweep.

    Returns:
      `function(params, inputs, targets, *, key=None) -> (values, readings)`: values is [N], and
      readings a tree like params, with a reading in place of each parameter. If `read` is a dict,
      readings is a dict of such trees.

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
    """
    several = isinstance(read, dict)

    def read_each(signal):
        return {name: reading(signal) for name, reading in read.items()}

    def pick(name, params, readings):
        return jax.tree.map(lambda _, answers: answers[name], params, readings)

    def function(params, inputs, targets, *, key=None):
        outputs, cache = net.forward(params, inputs, key=key)
        values, delta = loss(outputs, targets)
        _, readings = net.backward(params, cache, delta, read=read_each if several else read)
        if several:
            return values, {name: pick(name, params, readings) for name in read}
        return values, readings

    return function
