"""A training step that never holds a tree of gradients: the update happens inside the sweep.

A step that is not fused reads all gradients, and then calls the optimizer with them. The gradients
take the memory of the parameters once more. Here the loop of a stack carries the parameters and the
state of the optimizer. It updates a layer as soon as its gradient is read, and drops the gradient:

    for each layer, from the last to the first:
        dx, g = backward(W, cache, dy)
        W, state = update(W, state, g)          W is no longer needed: dx is computed

Outside of stacks the compiler orders the updates so by itself.

With a clip by the global norm, c = min(1, max_norm / |g|), a gradient counts only once the norms of
all are known. Two ways lead to them in one forward pass, and the shapes decide:

    the operands take less memory   one sweep keeps them; the norms are computed from Gram matrices,
    than the gradients              and then the gradients, one layer at a time
    otherwise                       two sweeps: the first one forms each gradient, measures it and
                                    drops it, and the second one forms it again and updates

Source:
  "Full Parameter Fine-tuning for Large Language Models with Limited Resources", Lv, Yang, Liu, Gao,
  Guo, Qiu, 2023: the update fused into the backward pass; its clip takes two forward passes too.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxbp.forward import forward_and_loss, scaled_for_mean
from jaxbp.readings.costs import likely_size
from jaxbp.readings.formed import read_together
from jaxbp.readings.norms import sq_norms
from jaxbp.readings.sums import mean
from jaxbp.sharding import pieces_of
from jaxbp.signals.changing import ChangingReading
from jaxbp.signals.kinds import Outer, is_signal, keep, map_signals
from jaxbp.signals.stacked import is_stacked, sum_leaves
from jaxbp.training.updates import GRADS, LeafwiseUpdate
from jaxbp.types import Layer, LossFunction, Params, PyTree, Reading, Rule, widened


def fused_update(
    name: str,
    net: Layer,
    loss: LossFunction,
    optimizer: optax.GradientTransformationExtraArgs,
    rule: Rule,
    read: Mapping[str, Reading],
    max_norm: float | None,
) -> Callable[..., tuple[jax.Array, Params, PyTree, dict[str, PyTree]]]:
    """Makes the sweep that updates.

    Args:
      name: the call, for messages.
      net: a Layer.
      loss: a Loss.
      optimizer: an optimizer that works leaf by leaf.
      rule: which weights carry the error back.
      read: other readings to record.
      max_norm: the largest norm of the mean gradient, or None.

    Returns:
      `function(params, opt_state, inputs, targets, *, key, rule_state, rule_key) -> (value, params,
      opt_state, record)`.
    """

    def function(params, opt_state, inputs, targets, *, key, rule_state, rule_key):
        _, cache, values, delta = forward_and_loss(name, net, loss, params, inputs, targets, key)
        value, tree = jnp.mean(values), rule.choose(rule_state, params, key=rule_key)
        update = LeafwiseUpdate(
            name, functools.partial(optimizer.update, value=value), params, opt_state
        )
        grads_of, scale, signals = mean, None, None
        if not read:  # faster: the mean over examples is taken once, in delta
            delta, grads_of = scaled_for_mean(delta, cache, values.shape[0])
        if max_norm is not None:
            signals = _operands_if_small(net, params, tree, cache, delta)
            norm = _global_norm(net, tree, cache, delta, grads_of, signals)
            scale = jnp.where(norm < max_norm, 1, max_norm / jnp.where(norm == 0, 1, norm))
            # Behind the barrier nothing is merged with the sweep that measured.
            delta, scale = jax.lax.optimization_barrier((delta, scale))

        def read_each(signal):
            answers = read_together({GRADS: grads_of, **read}, signal)
            if scale is not None:
                answers[GRADS] = (scale * answers[GRADS]).astype(answers[GRADS].dtype)
            return answers

        if signals is None:
            changing = ChangingReading(read_each, update.changes(tree))
            _, readings = net.backward(tree, cache, delta, read=changing)
        else:
            readings = _read_layers(read_each, signals, update.changes(signals))
        return value, *update.finish(readings, read)

    return function


def _operands_if_small(net, params, tree, cache, delta):
    """The signals of all parameters, if they take less memory than the gradients; or None."""

    def operands():
        return net.backward(tree, cache, delta, read=keep)[1]

    return operands() if _count(jax.eval_shape(operands)) <= _count(params) else None


def _count(tree):
    """The number of entries of all arrays."""
    return sum(math.prod(map(likely_size, leaf.shape)) for leaf in jax.tree.leaves(tree))


def _global_norm(net, tree, cache, delta, grads_of, signals):
    """The norm of the gradient of all parameters. Each one's is dropped once it is measured."""

    def square(signal):
        if signals is None or not isinstance(signal, Outer) or pieces_of(signal.inputs) > 1:
            return jnp.sum(widened(grads_of(signal)) ** 2)
        # The gradient is that of one example, which has the positions of all examples.
        one = Outer(*(array.reshape(1, -1, array.shape[-1]) for array in signal))
        return sq_norms(one)[0] / (signal.deltas.shape[0] ** 2 if grads_of is mean else 1)

    if signals is None:
        _, squares = net.backward(tree, cache, delta, read=square)
    else:
        squares = map_signals(square, signals)
    return jnp.sqrt(sum_leaves(squares))


def _read_layers(read, signals, changes):
    """Applies a reading to kept signals; those of a stack one layer at a time, with its change."""

    def read_node(node):
        change = next((own for own in changes if own.stack is node), None)
        if change is None:
            return map_signals(read, node)
        arrays, structure = jax.tree.flatten(node.layers)

        def step(carry, arrays):
            return carry, map_signals(read, structure.unflatten(arrays))

        return change.run(step, (), arrays)[1]

    return jax.tree.map(read_node, signals, is_leaf=lambda n: is_stacked(n) or is_signal(n))
