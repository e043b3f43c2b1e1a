"""Alignment: how far a rule's backward pass is from exact backpropagation.

Both backward passes start from the same forward pass, and are compared by angles. The angle between
arrays a and b, in degrees, takes all their entries as one vector:

    angle(a, b) = arccos(a . b / (|a| |b|))

        0   the same direction          90   orthogonal          180   opposite directions

A small step along a gradient within 90 degrees of the exact one still lowers the loss.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxbp.combinators.compose import Direct
from jaxbp.forward import forward_and_loss, scaled_for_mean
from jaxbp.layers.recurrence import ForwardInTime
from jaxbp.readings.sums import total
from jaxbp.require import require_call, require_key
from jaxbp.rules.feedback import require_rule
from jaxbp.signals.kinds import map_signals
from jaxbp.types import Layer, LossFunction, Params, PyTree, Rule, exportable, widened

__all__ = ["Alignment", "alignment"]


@exportable
class Alignment(NamedTuple):
    """How far a rule is from backpropagation at one parameter: scalars, with angles in degrees.

    Attributes:
      gradient: the angle between the rule's mean gradient and the exact one.
      delta: the angle between the rule's error at the layer's outputs and the exact one, for each
        example, averaged over the examples; nan for a signal of your own without `deltas`.
      weight: the angle between the parameter and the array that replaces it in the backward pass; 0
        if nothing replaces it.
      norm_ratio: the norm of that array divided by the norm of the parameter; 1 if nothing replaces
        it.
    """

    gradient: jax.Array
    delta: jax.Array
    weight: jax.Array
    norm_ratio: jax.Array


class Measure(Protocol):
    """What `alignment` returns, and what `make_step` takes as one of its `measures`."""

    def __call__(
        self,
        params: Params,
        inputs: PyTree,
        targets: PyTree,
        *,
        key: jax.Array | None = None,
        rule_state: PyTree = (),
        rule_key: jax.Array | None = None,
    ) -> PyTree:
        """Measures a network on a batch; `key` is for layers that draw, `rule_key` for rules."""
        ...


def alignment(net: Layer, loss: LossFunction, *, rule: Rule) -> Measure:
    """The angles between a rule's backward pass and the exact one, at every parameter.

    Use it to watch whether a rule learns what backpropagation would.

        one vector is zero     90 degrees, and a norm ratio of 0 or inf
        both are zero          0 degrees, and a norm ratio of 1

    Under `direct_feedback`, `weight` and `norm_ratio` describe the trees that carry the error
    inside the blocks, because the rule's own matrices replace no weight.

    Args:
      net: a Layer.
      loss: a Loss, or any `loss(outputs, targets) -> (value [N], delta)`.
      rule: the rule to compare with backpropagation.

    Returns:
      `function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None) -> tree`, a tree
      like params with an `Alignment` at each parameter. To record it during training, pass
      `measures={"alignment": bp.alignment(net, loss, rule=rule)}` to `fit`, `make_epoch` or
      `make_step`.

    Raises:
      TypeError: `net` is not a Layer, or `loss` is not a function.
      ValueError: `rule` is not a Rule; or, when called, the tree that it chooses is that of `rtrl`,
        which carries no error back through time, or as for `value_and_grad`.

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
    require_call("alignment", net, loss)
    require_rule("alignment", rule)

    def compare(exact, ruled, tree, param):
        return Alignment(
            _angle(total(ruled), total(exact)),
            _angle_of_deltas(ruled, exact),
            _angle(tree, param),
            _norm_ratio(tree, param),
        )

    def function(params, inputs, targets, *, key=None, rule_state=(), rule_key=None):
        require_key("alignment", "rule_key", rule_key)
        _, cache, values, delta = forward_and_loss(
            "alignment", net, loss, params, inputs, targets, key
        )
        tree = rule.choose(rule_state, params, key=rule_key)
        # No angle depends on the division by N. With it, the rule's backward pass is the same as
        # in `value_and_grad`, so a training step that measures alignment computes it only once.
        delta, _ = scaled_for_mean(delta, cache, values.shape[0])
        inside = _inside_blocks(tree)
        _, exact = net.backward(params, cache, delta)
        _, ruled = net.backward(tree, cache, delta)
        return map_signals(compare, exact, ruled, inside, params)

    return function


def _inside_blocks(tree: PyTree) -> PyTree:
    """A tree for backward in which each `Direct` is replaced by the tuple of its parts."""

    def parts(node):
        if isinstance(node, ForwardInTime):
            raise ValueError(
                "alignment: rtrl carries no error back through time, and its gradient is exact."
            )
        return _inside_blocks(node.parts) if isinstance(node, Direct) else node

    return jax.tree.map(parts, tree, is_leaf=lambda node: isinstance(node, Direct | ForwardInTime))


def _angle_of_deltas(ruled, exact):
    """The mean over the examples; nan for a kind of signal that keeps no deltas."""
    d, e = (getattr(signal, "deltas", None) for signal in (ruled, exact))
    return jnp.full((), jnp.nan) if d is None or e is None else jnp.mean(jax.vmap(_angle)(d, e))


def _angle(a, b):
    # From the difference and the sum of the directions, because the arccosine would lose half the
    # digits of small angles.
    a, b = _direction(a), _direction(b)
    return jnp.rad2deg(2 * jnp.arctan2(_norm(a - b), _norm(a + b)))


def _direction(a):
    a = _over_largest(widened(a))
    return a / _one_for_zero(jnp.sqrt(jnp.sum(jnp.square(a))))


def _norm(a):
    a = widened(a)
    return jnp.max(jnp.abs(a)) * jnp.sqrt(jnp.sum(jnp.square(_over_largest(a))))


def _norm_ratio(a, b):
    a, b = _norm(a), _norm(b)
    return jnp.where(b > 0, a / _one_for_zero(b), jnp.where(a > 0, jnp.inf, 1))


def _over_largest(a):
    """The array divided by its largest entry, so that squares of small numbers do not underflow."""
    return a / _one_for_zero(jnp.max(jnp.abs(a)))


def _one_for_zero(x):
    return jnp.where(x == 0, 1, x)
