"""How far a rule is from backpropagation: two sweeps over one forward pass, laid side by side.

The angle between vectors a and b, in degrees, is that of all their entries as one vector:

  angle(a, b) = arccos(a . b / (|a| |b|))

      0   the same direction          90   nothing in common          180   the opposite

A small step along a gradient within 90 degrees of the exact one still lowers the loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbp.combinators.compose import Direct
from jaxbp.layers.recurrence import ForwardInTime
from jaxbp.readings.sums import total
from jaxbp.rules.feedback import require_rule
from jaxbp.signals.kinds import map_signals
from jaxbp.types import widened


class Alignment(NamedTuple):
    """How far a rule is from backpropagation at one parameter, as scalars; angles in degrees.

    Attributes:
      gradient: the angle between the mean gradient by the rule and the exact one.
      delta: the angle between the rule's error at the layer's outputs and the exact one, of each
        example, on average.
      weight: the angle between what stands for the parameter on the way back and the parameter; 0
        where it stands for itself.
      norm_ratio: the norm of the one over that of the other; 1 where it stands for itself.
    """

    gradient: jax.Array
    delta: jax.Array
    weight: jax.Array
    norm_ratio: jax.Array


def alignment(net, loss, *, rule):
    """The angles between a rule's sweep and the exact one, at every parameter.

      one vector is zero     90 degrees, and a norm ratio of 0 or inf
      both are zero          0 degrees, and a norm ratio of 1

    Both sweeps start from the same forward pass. Under `direct_feedback`, `weight` and `norm_ratio`
    are of what carries the error inside the blocks: its own matrices stand for no weight.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      rule: which weights carry the error back.

    Returns:
      `function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None) -> tree`, a tree
      like params with an `Alignment` in place of each parameter. To have it recorded while
      training: `measures={"alignment": bp.alignment(net, loss, rule=rule)}`.

    References:
      "Random synaptic feedback weights support error backpropagation for deep learning",
      Lillicrap, Cownden, Tweed, Akerman, 2016.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbp as bp
      >>> net, rule = bp.chain(bp.dense(4), bp.tanh(), bp.dense(2)), bp.sign_symmetric()
      >>> params, _ = net.init(jax.random.key(0), (3,))
      >>> rule_state = rule.make(jax.random.key(1), net, (3,))
      >>> measure = jax.jit(bp.alignment(net, bp.squared_error, rule=rule))
      >>> angles = measure(params, jnp.ones((5, 3)), jnp.zeros((5, 2)), rule_state=rule_state)
      >>> bool(0 < angles[0]["weight"].delta < 90), float(angles[2]["weight"].gradient)
      (True, 0.0)
    """
    require_rule("alignment", rule)

    def compare(exact, ruled, tree, param):
        return Alignment(
            _angle(total(ruled), total(exact)),
            jnp.mean(jax.vmap(_angle)(ruled.deltas, exact.deltas)),
            _angle(tree, param),
            _norm_ratio(tree, param),
        )

    def function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None):
        outputs, cache = net.forward(params, inputs, key=key)
        _, delta = loss(outputs, targets)
        tree = rule.choose(rule_state, params, key=rule_key)
        # No angle depends on N; but so the rule's sweep is that of `value_and_grad`, which a step
        # without readings makes anyway.
        delta = delta / len(delta)
        inside = _inside(tree)
        _, exact = net.backward(params, cache, delta)
        _, ruled = net.backward(tree, cache, delta)
        return map_signals(compare, exact, ruled, inside, params)

    return function


def _inside(tree):
    """A tree for backward with the parts of every chain in place of its `Direct`."""

    def parts(node):
        if isinstance(node, ForwardInTime):
            raise ValueError(
                "alignment: rtrl carries no error back through time, and its gradient is exact."
            )
        return _inside(node.parts) if isinstance(node, Direct) else node

    return jax.tree.map(parts, tree, is_leaf=lambda node: isinstance(node, Direct | ForwardInTime))


def _angle(a, b):
    # By the difference and the sum of the directions: the arccosine would lose half the digits of
    # small angles.
    a, b = _direction(a), _direction(b)
    return jnp.rad2deg(2 * jnp.arctan2(_norm(a - b), _norm(a + b)))


def _direction(a):
    a = _by_its_largest(widened(a))
    return a / _one_for_zero(jnp.sqrt(jnp.sum(jnp.square(a))))


def _norm(a):
    a = widened(a)
    return jnp.max(jnp.abs(a)) * jnp.sqrt(jnp.sum(jnp.square(_by_its_largest(a))))


def _norm_ratio(a, b):
    a, b = _norm(a), _norm(b)
    return jnp.where(b > 0, a / _one_for_zero(b), jnp.where(a > 0, jnp.inf, 1))


def _by_its_largest(a):
    """The array with a largest entry of 1: the squares of small numbers would be lost as zeros."""
    return a / _one_for_zero(jnp.max(jnp.abs(a)))


def _one_for_zero(x):
    return jnp.where(x == 0, 1, x)
