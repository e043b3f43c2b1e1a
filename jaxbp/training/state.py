"""The train state: all that training changes, and the random numbers that follow from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbp.require import require_key, require_layer
from jaxbp.rules.feedback import exact, require_rule
from jaxbp.types import Layer, Params, PyTree, Rule, Shape, exportable

__all__ = ["TrainState", "init_state"]

# Keys are folded from a key that never changes, so a network that draws nothing computes no keys.
# Splitting a key at every step took a tenth of the time of a small network's epoch.
SHUFFLE_STREAM, RULE_STREAM = 2**31, 2**31 + 1  # no step counter reaches these


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
